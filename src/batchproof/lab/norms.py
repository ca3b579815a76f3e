"""Normalization layers as pure functions: statistics go in as data and come back as data.

A layer is described by a frozen `Norm`, set up by `init` and run by `apply`. Nothing here knows
about train or eval: the `Mode` of the pass says which statistics are used, whether the gradient
flows through them and whether the running ones move (see `batchproof.modes`). Modes ``J`` and
``M`` are mode ``T`` on a batch that the caller concatenated (`batchproof.lab.passes`).

Shapes: ``B`` batch, ``F`` features. Everything acts on ``(B, F)`` and normalizes per feature
(batch, renorm) or per row (layer, group, rms).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.errors import BatchproofError
from batchproof.estimators import BY_MOMENTS, Batch
from batchproof.lab.estimators import ESTIMATORS
from batchproof.modes import Mode

PLACEMENTS = ("input", "pre", "post", "before-action")
Params = dict[str, Array]
Stats = dict[str, Array]


@dataclass(frozen=True)
class Norm:
    """What a normalization layer is and where it sits. Hashable, so static under `jax.jit`.

    Attributes:
        kind: a name in `KINDS`.
        placement: one of `PLACEMENTS`, or several joined with ``+`` (CrossQ is ``input+post``).
            ``pre`` and ``post`` are before and after the activation of each hidden layer.
            ``before-action`` is DDPG's own (arXiv 1509.02971): the input and each hidden layer
            that the action has not entered yet; the action then enters at the second layer.
        momentum: weight of the new batch in the running statistics, as in PyTorch. Flax writes
            0.99 for what is 0.01 here.
        eps: added to the variance before the square root.
        groups: number of feature groups of ``group``.
        batch_variance: ``biased`` (divided by B) or ``unbiased`` (B - 1), for normalizing.
        running_variance: the same choice for what the running variance averages.
        formula: ``canonical`` or ``folded`` Batch Renorm. The folded form, CrossQ's, puts r and d
            into the mean and the variance; the two differ where the variance is near eps.
        warmup: ``hard`` (r = 1, d = 0 until `warmup_steps`, where sb3-contrib waits one longer) or
            ``smooth`` (the schedule of arXiv 1702.03275, scaled: plain batch norm for 1/8 of
            `warmup_steps`, then d_max grows until 5/8 and r_max until the end).
        warmup_steps: forward passes that updated the statistics.
        r_max: upper bound of Batch Renorm's scale correction; the lower one is its inverse.
        d_max: bound of Batch Renorm's shift correction.
        estimator: a name in `batchproof.lab.estimators.ESTIMATORS`: how the running statistics of
            ``batch`` and ``renorm`` move.
        axis_name: a mapped axis of `jax.shard_map` (with ``check_vma=False``) or `jax.vmap` over
            which a batch is spread in equal parts: ``batch`` and ``renorm`` then take the
            statistics of all parts together. Gradients are those of the sum of the parts' losses;
            each part holds its own share of the parameters', for a `jax.lax.psum`. Not part of a
            run's record, because it says where a batch lies and not what is computed.
    """

    kind: str = "none"
    placement: str = "pre"
    momentum: float = 0.1
    eps: float = 1e-5
    groups: int = 8
    batch_variance: str = "biased"
    running_variance: str = "unbiased"
    formula: str = "canonical"
    warmup: str = "hard"
    warmup_steps: int = 0
    r_max: float = 3.0
    d_max: float = 5.0
    estimator: str = "ema"
    axis_name: str | None = field(default=None, metadata={"record": False})

    def __post_init__(self) -> None:
        _one_of("norm", self.kind, tuple(KINDS))
        for place in self.placement.split("+"):
            _one_of("placement", place, PLACEMENTS)
        _one_of("batch_variance", self.batch_variance, ("biased", "unbiased"))
        _one_of("running_variance", self.running_variance, ("biased", "unbiased"))
        _one_of("formula", self.formula, ("canonical", "folded"))
        _one_of("warmup", self.warmup, ("hard", "smooth"))
        _one_of("estimator", self.estimator, tuple(ESTIMATORS))
        if not 0 < self.momentum <= 1:
            raise BatchproofError(
                f"momentum must be in (0, 1], got {self.momentum}: it is the weight of the new "
                "batch, so flax's 0.99 is 0.01 here"
            )
        if not self.eps >= 0:
            raise BatchproofError(f"eps must not be negative, got {self.eps}")
        if self.axis_name is not None and self.estimator not in BY_MOMENTS:
            raise BatchproofError(
                f"estimator {self.estimator!r} looks at the rows of a batch, and an axis shares "
                f"only their mean and variance: use one of {', '.join(BY_MOMENTS)}"
            )
        if self.groups < 1:
            raise BatchproofError(f"groups must be at least 1, got {self.groups}")
        if self.r_max < 1 or self.d_max < 0:
            raise BatchproofError(
                f"Batch Renorm needs r_max >= 1 and d_max >= 0, got {self.r_max} and {self.d_max}"
            )

    def sits(self, place: str) -> bool:
        """Whether the layer is there at all and stands at `place`."""
        return self.kind != "none" and place in self.placement.split("+")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise BatchproofError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")


def init(norm: Norm, features: int) -> tuple[Params, Stats]:
    """Fresh parameters and statistics of one layer.

    Returns:
        Parameters ``scale`` and ``bias``, each (F,), and statistics ``mean`` and ``var`` (F,) and
        ``count`` () for the layers that keep running ones; empty dictionaries elsewhere.

    Raises:
        BatchproofError: `groups` does not divide the features.
    """
    if norm.kind == "none":
        return {}, {}
    if norm.kind == "group" and features % norm.groups:
        raise BatchproofError(
            f"group norm cannot split {features} features into {norm.groups} equal groups: "
            "choose groups that divide every normalized width"
        )
    params = {"scale": jnp.ones(features)}
    if norm.kind != "rms":
        params["bias"] = jnp.zeros(features)
    if norm.kind not in ("batch", "renorm"):
        return params, {}
    stats = {
        "mean": jnp.zeros(features),
        "var": jnp.ones(features),
        "count": jnp.zeros((), jnp.int32),
    }
    return params, stats


def apply(norm: Norm, params: Params, stats: Stats, x: Array, mode: Mode) -> tuple[Array, Stats]:
    """Normalize ``x`` (B, F) in the given mode.

    Returns:
        The output (B, F) and the statistics after the pass, equal to those before unless the
        mode updates them.
    """
    if norm.kind == "none" or mode.bypass:
        return x, stats
    return KINDS[norm.kind](norm, params, stats, x, mode)


def _none(norm: Norm, params: Params, stats: Stats, x: Array, mode: Mode) -> tuple[Array, Stats]:
    return x, stats


def _batch(norm: Norm, params: Params, stats: Stats, x: Array, mode: Mode) -> tuple[Array, Stats]:
    """Batch norm, arXiv 1502.03167: (x - mean) / sqrt(var + eps) * scale + bias."""
    scale, bias = params["scale"], params["bias"]
    if not mode.uses_batch:
        return _affine(x, stats["mean"], _inverse_std(norm, stats["var"]) * scale, bias), stats
    if mode.gradient:
        correction = _correction(norm, x)
        y, mean, var = _standardize(x, scale, bias, norm.eps, correction, norm.axis_name)
    else:
        mean, var = jax.lax.stop_gradient(_moments(x, norm.axis_name))
        inverse_std = _inverse_std(norm, var * _correction(norm, x))
        y = _affine(x, mean, inverse_std * scale, bias)
    return y, _move(norm, stats, mean, var, x) if mode.updates else stats


def _renorm(norm: Norm, params: Params, stats: Stats, x: Array, mode: Mode) -> tuple[Array, Stats]:
    """Batch Renorm, arXiv 1702.03275: r and d tie the batch's statistics to the running ones.

    r = clip(std_batch / std_running, 1/r_max, r_max), d = clip((mean_batch - mean_running) /
    std_running, -d_max, d_max), both without gradient; the running statistics move afterwards.
    """
    if not mode.uses_batch:
        return _batch(norm, params, stats, x, mode)
    scale, bias = params["scale"], params["bias"]
    correction = _correction(norm, x)
    mean, biased = _moments(x, norm.axis_name)
    new_stats = _move(norm, stats, mean, biased, x) if mode.updates else stats
    if not mode.gradient:
        mean, biased = jax.lax.stop_gradient((mean, biased))
    var = biased * correction
    r_max, d_max = _renorm_bounds(norm, stats["count"], x.dtype)
    running_inverse = _inverse_std(norm, stats["var"])
    r = jnp.clip(jnp.sqrt(var + norm.eps) * running_inverse, 1 / r_max, r_max)
    d = jnp.clip((mean - stats["mean"]) * running_inverse, -d_max, d_max)
    r, d = jax.lax.stop_gradient((r, d))
    if norm.formula == "folded":
        # The square root has no gradient at 0, where a constant feature sits: take it as 0 there.
        positive = var > 0
        std = jnp.where(positive, jnp.sqrt(jnp.where(positive, var, 1)), 0)
        inverse_std = _inverse_std(norm, var / r**2)
        return _affine(x, mean - d * std / r, inverse_std * scale, bias), new_stats
    # ((x - mean) / std * r + d) * scale + bias, with r and d constant.
    scale, bias = r * scale, d * scale + bias
    if mode.gradient:
        return _standardize(x, scale, bias, norm.eps, correction, norm.axis_name)[0], new_stats
    return _affine(x, mean, _inverse_std(norm, var) * scale, bias), new_stats


def _layer(norm: Norm, params: Params, stats: Stats, x: Array, mode: Mode) -> tuple[Array, Stats]:
    """Layer norm, arXiv 1607.06450: each row by its own mean and variance over the features."""
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    normalized = (x - mean) * jax.lax.rsqrt(var + norm.eps)
    return normalized * params["scale"] + params["bias"], stats


def _group(norm: Norm, params: Params, stats: Stats, x: Array, mode: Mode) -> tuple[Array, Stats]:
    """Group norm, arXiv 1803.08494: layer norm within each of `groups` blocks of features."""
    blocks = x.reshape(*x.shape[:-1], norm.groups, -1)
    mean = blocks.mean(-1, keepdims=True)
    var = jnp.square(blocks - mean).mean(-1, keepdims=True)
    normalized = ((blocks - mean) * jax.lax.rsqrt(var + norm.eps)).reshape(x.shape)
    return normalized * params["scale"] + params["bias"], stats


def _rms(norm: Norm, params: Params, stats: Stats, x: Array, mode: Mode) -> tuple[Array, Stats]:
    """RMS norm, arXiv 1910.07467: each row by its root mean square; no shift."""
    mean_square = jnp.square(x).mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + norm.eps) * params["scale"], stats


KINDS: dict[str, Callable[[Norm, Params, Stats, Array, Mode], tuple[Array, Stats]]] = {
    "none": _none,
    "batch": _batch,
    "renorm": _renorm,
    "layer": _layer,
    "group": _group,
    "rms": _rms,
}
"""Every normalization by name."""


def _rows(x: Array, axis_name: str | None) -> int:
    """Rows of the whole batch, of which ``x`` is one of equal parts where there is an axis."""
    return len(x) if axis_name is None else len(x) * jax.lax.axis_size(axis_name)


def _whole(sums: Array, axis_name: str | None) -> Array:
    """Sums over the whole batch from those over one part."""
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def _moments(x: Array, axis_name: str | None) -> tuple[Array, Array]:
    """Mean and biased variance over the batch, each (F,)."""
    rows = _rows(x, axis_name)
    mean = _whole(column_sum(x), axis_name) / rows
    return mean, _whole(column_sum(jnp.square(x - mean)), axis_name) / rows


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _standardize(
    x: Array, scale: Array, bias: Array, eps: float, correction: float, axis_name: str | None
) -> tuple[Array, Array, Array]:
    """(x - mean) / sqrt(correction * var + eps) * scale + bias, and the mean and biased variance.

    The gradient runs through mean and variance, in closed form: two sums and one pass over the
    batch, where differentiating the forward pass would take twice as long. The mean and the
    variance that come back are data and carry no gradient.
    """
    return _standardize_forward(x, scale, bias, eps, correction, axis_name)[0]


def _standardize_forward(
    x: Array, scale: Array, bias: Array, eps: float, correction: float, axis_name: str | None
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array, Array]]:
    mean, var = _moments(x, axis_name)
    inverse_std = jax.lax.rsqrt(correction * var + eps)
    y = _affine(x, mean, inverse_std * scale, bias)
    return (y, mean, var), (x, mean, inverse_std, scale)


def _standardize_backward(
    eps: float,
    correction: float,
    axis_name: str | None,
    saved: tuple[Array, Array, Array, Array],
    grads: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    x, mean, inverse_std, scale = saved
    grad = grads[0]
    bias_grad = column_sum(grad)
    scale_grad = column_sum(grad * (x - mean)) * inverse_std
    # Per feature: dx = scale / std * (g - mean(g) - correction * normalized * mean(g normalized)),
    # with means over the whole batch.
    rows = _rows(x, axis_name)
    slope = inverse_std * scale
    through_var = slope * inverse_std * _whole(scale_grad, axis_name) * (correction / rows)
    x_grad = slope * grad - through_var * (x - mean) - slope * _whole(bias_grad, axis_name) / rows
    return x_grad, scale_grad, bias_grad


_standardize.defvjp(_standardize_forward, _standardize_backward)


def _correction(norm: Norm, x: Array) -> float:
    """What turns the biased variance into the one that normalizes."""
    return _bessel(norm.batch_variance, _rows(x, norm.axis_name))


def _bessel(variance: str, rows: int) -> float:
    """B / (B - 1) for the unbiased variance; 1 for a batch of one, which has no unbiased one."""
    return rows / (rows - 1) if variance == "unbiased" and rows > 1 else 1.0


def _move(norm: Norm, stats: Stats, mean: Array, biased_var: Array, x: Array) -> Stats:
    """The running statistics after a batch ``x`` (B, F), carrying no gradient."""
    mean, biased_var, x = jax.lax.stop_gradient((mean, biased_var, x))
    bessel = _bessel(norm.running_variance, _rows(x, norm.axis_name))
    count = stats["count"] + 1
    batch = Batch(mean, biased_var * bessel, x, count, bessel)
    update = ESTIMATORS[norm.estimator]
    mean, var = update(stats["mean"], stats["var"], batch, norm.momentum)
    return {"mean": mean, "var": var, "count": count}


def _inverse_std(norm: Norm, var: Array) -> Array:
    return jax.lax.rsqrt(var + norm.eps)


@jax.custom_vjp
def _affine(x: Array, mean: Array, slope: Array, bias: Array) -> Array:
    """(x - mean) * slope + bias, with sums over the batch as `column_sum`."""
    return (x - mean) * slope + bias


def _affine_forward(
    x: Array, mean: Array, slope: Array, bias: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return (x - mean) * slope + bias, (x, mean, slope)


def _affine_backward(
    saved: tuple[Array, Array, Array], grad: Array
) -> tuple[Array, Array, Array, Array]:
    x, mean, slope = saved
    bias_grad = column_sum(grad)
    return grad * slope, -slope * bias_grad, column_sum(grad * (x - mean)), bias_grad


_affine.defvjp(_affine_forward, _affine_backward)


def column_sum(x: Array) -> Array:
    """Sum of ``x`` (B, F) over the batch, (F,), as a product with ones.

    On a CPU a compiled sum over the first axis is several times slower than the product. Full
    precision is asked for because accelerators would round the factors.
    """
    # They hang on x to be mapped with it: ones that all critics share would make `jax.vmap` copy
    # x, feature by feature, to one wide product.
    ones = jnp.where(x[:, 0] == 0, 1, jnp.ones((), x.dtype))
    return jnp.matmul(ones[None], x, precision=jax.lax.Precision.HIGHEST)[0]


def _renorm_bounds(norm: Norm, count: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """r_max and d_max after `count` updates of the statistics: 1 and 0 before the warm-up ends."""
    if norm.warmup == "hard":
        warm = count >= norm.warmup_steps
        return (
            jnp.where(warm, norm.r_max, 1.0).astype(dtype),
            jnp.where(warm, norm.d_max, 0.0).astype(dtype),
        )
    progress = count.astype(dtype) / max(norm.warmup_steps, 1)
    r_share = jnp.clip((progress - 1 / 8) / (7 / 8), 0, 1)
    d_share = jnp.clip((progress - 1 / 8) / (4 / 8), 0, 1)
    return 1 + (norm.r_max - 1) * r_share, norm.d_max * d_share
