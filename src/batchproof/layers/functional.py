"""What the batch layers compute, as one function of tensors.

`normalize` is all of batch norm (arXiv 1502.03167) and Batch Renorm (arXiv 1702.03275): the layers
only hold its tensors and options, and `batchproof.layers.use_mode` hands it those of other
people's layers. Shapes: ``N`` batch, ``C`` features; statistics are per feature, (C,), over all
other axes of ``x`` (N, C, ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchproof.errors import BatchproofError
from batchproof.estimators import Batch
from batchproof.layers.estimators import ESTIMATORS
from batchproof.layers.moments import (
    all_but_features,
    check_group,
    group_of,
    moments,
    per_feature,
    pooled_moments,
)
from batchproof.modes import Mode

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

VARIANCES = ("biased", "unbiased")
FORMULAS = ("canonical", "folded")
WARMUPS = ("hard", "smooth")

_MODES = {letter: Mode(letter) for letter in "TtEeSsBbJjMm"}
_LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Renorm:
    """The options of Batch Renorm's correction; `batchproof.layers.BatchRenorm1d` explains them."""

    formula: str = "canonical"
    warmup: str = "hard"
    warmup_steps: int = 0
    r_max: float = 3.0
    d_max: float = 5.0

    def __post_init__(self) -> None:
        one_of("formula", self.formula, FORMULAS)
        one_of("warmup", self.warmup, WARMUPS)
        if self.r_max < 1 or self.d_max < 0:
            raise BatchproofError(
                f"Batch Renorm needs r_max >= 1 and d_max >= 0, got {self.r_max} and {self.d_max}"
            )


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        BatchproofError: naming the choices.
    """
    if value not in choices:
        raise BatchproofError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")


def as_mode(mode: Mode | str) -> Mode:
    """A mode that a single layer can be asked for.

    Raises:
        BatchproofError: unknown letter; ``J`` or ``M``, which a layer cannot carry out.
    """
    if isinstance(mode, str):
        mode = _MODES[mode] if mode in _MODES else Mode(mode)
    if mode.kind in "JM":
        same = "T" if mode.updates else "t"
        raise BatchproofError(
            f"mode {mode} is {same} on a concatenated batch: concatenate the two batches, call "
            f"the layer once with mode {same!r} and split the output"
        )
    return mode


def normalize(
    x: Tensor,
    mode: Mode,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor | None,
    momentum: float | None,
    eps: float,
    batch_variance: str = "biased",
    running_variance: str = "unbiased",
    renorm: Renorm | None = None,
    estimator: str = "ema",
    process_group: ProcessGroup | str | None = None,
) -> Tensor:
    """Normalize ``x`` (N, C, ...) in the given mode and move the running statistics in place.

    Without `renorm`: (x - mean) / sqrt(var + eps) * weight + bias. With it, in modes ``T`` and
    ``S``, r and d tie the batch's statistics to the running ones:
    ((x - mean) / sqrt(var + eps) * r + d) * weight + bias.

    Float16 and bfloat16 are computed in float32 and given back in their own type. A single row has
    variance 0 in either convention, so that batch norm gives ``bias``.

    Args:
        x: at least two axes, features on the second.
        mode: `T`, `t`, `E`, `S`, `s` or `B`.
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        running_mean: (C,), or None where no running statistics are kept.
        running_var: (C,), or None.
        count: (), int64, passes that moved the running statistics.
        momentum: weight of the new batch; None for the cumulative average, as in PyTorch.
        eps: added to the variance before the square root; positive.
        batch_variance: ``biased`` or ``unbiased``, for normalizing.
        running_variance: the same choice for what the running variance averages.
        renorm: Batch Renorm's options, or None for batch norm.
        estimator: a name in `ESTIMATORS`; it moves the running statistics.
        process_group: whose ranks' rows make one batch together; `BatchNorm1d` explains it.

    Raises:
        BatchproofError: mode ``E``, or Batch Renorm, without running statistics; an empty batch in
            a mode that uses its statistics; an estimator or a state of `torch.distributed` that the
            group cannot work with.
    """
    if mode.bypass:
        return x
    low = x.dtype if x.dtype in _LOW_PRECISION else None
    if low is not None:
        x = x.float()
        weight = None if weight is None else weight.float()
        bias = None if bias is None else bias.float()
    if mode.uses_batch:
        y = _by_batch(
            x,
            mode,
            weight,
            bias,
            running_mean,
            running_var,
            count,
            momentum,
            eps,
            batch_variance,
            running_variance,
            renorm,
            estimator,
            process_group,
        )
    elif running_mean is None or running_var is None:
        raise BatchproofError(
            "the layer keeps no running statistics to use in mode E: make it with "
            "track_running_stats=True, or ask for mode 't'"
        )
    else:
        # Copies, so that a later pass in T may move the statistics before this one's backward.
        copy = torch.is_grad_enabled()
        mean = running_mean.to(x.dtype, copy=copy)
        y = _apply(x, mean, running_var.to(x.dtype, copy=copy), weight, bias, eps)
    return y if low is None else y.to(low)


def _by_batch(
    x: Tensor,
    mode: Mode,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor | None,
    momentum: float | None,
    eps: float,
    batch_variance: str,
    running_variance: str,
    renorm: Renorm | None,
    estimator: str,
    process_group: ProcessGroup | str | None,
) -> Tensor:
    """`normalize` in the modes that use the batch's statistics, in float32 or better."""
    rows = x.numel() // x.shape[1]
    group = group_of(process_group)
    if group is None and rows == 0:
        raise BatchproofError(
            f"an empty batch has no statistics for mode {mode}: skip the call, or use mode 'E'"
        )
    bessel = _bessel(batch_variance, rows)
    batch = x.detach()
    if group is not None:
        check_group(process_group, estimator)
        mean, var, total = pooled_moments(x if mode.gradient else batch, group)
        normal_var, corrections = _pooled(var, batch_variance, total), None
        if renorm is not None:
            running = (running_mean, running_var, count)
            corrections = _r_and_d(renorm, mean.detach(), normal_var.detach(), *running, eps)
        y = _by_moments(x, mean, normal_var, weight, bias, eps, renorm, corrections)
        mean, var = mean.detach(), _pooled(var.detach(), running_variance, total)
    elif renorm is None and mode.gradient:
        y, mean, inverse_std = _standardize(x, weight, bias, eps, bessel)
        var = (inverse_std.pow(-2) - _lowered(eps, bessel)).clamp_(min=0)
    else:
        mean, var = moments(batch)
        if renorm is None:
            y = _apply(x, mean, _scaled(var, bessel), weight, bias, eps)
        else:
            normal_var = _scaled(var, bessel)
            r, d = _r_and_d(renorm, mean, normal_var, running_mean, running_var, count, eps)
            form = _folded if renorm.formula == "folded" else _canonical
            y = form(x, mean, normal_var, r, d, weight, bias, eps, bessel, mode.gradient)

    if mode.updates and running_mean is not None and running_var is not None:
        share: float | Tensor = 1.0 if momentum is None else momentum
        if count is not None:
            count.add_(1)
            if momentum is None:
                share = count.to(running_mean.dtype).reciprocal()
        bessel = _bessel(running_variance, rows) if group is None else None
        var = _scaled(var, bessel)
        if running_mean.dtype != mean.dtype:
            mean, var = mean.to(running_mean.dtype), var.to(running_mean.dtype)
        # Not `bessel or 1.0`: asking a traced size for its truth would fix it for torch.export.
        seen = Batch(mean, var, batch, count, 1.0 if bessel is None else bessel)
        ESTIMATORS[estimator](running_mean, running_var, seen, share)
    return y


def _bessel(variance: str, rows: int) -> float | None:
    """What turns the biased variance into the named one; None for 1, also of a single row."""
    return rows / (rows - 1) if variance == "unbiased" and rows > 1 else None


def _scaled(var: Tensor, factor: float | None) -> Tensor:
    # As a sum: a product with a number costs torch twice the time on vectors this small.
    return var if factor is None else torch.add(var, var, alpha=factor - 1)


def _pooled(var: Tensor, variance: str, rows: Tensor) -> Tensor:
    """The named variance from the biased one of `pooled_moments`, whose rows are a tensor."""
    return var if variance == "biased" else var * (rows / (rows - 1).clamp(min=1))


def _lowered(eps: float, bessel: float | None) -> float:
    return eps if bessel is None else eps / bessel


def _standardize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, bessel: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(bessel * var + eps) * weight + bias, with gradient through mean and var.

    Returns:
        The output, and without gradient the mean and 1 / sqrt(var + eps / bessel), (C,).
    """
    if bessel is not None:
        weight = _times(weight, x.new_full((x.shape[1],), bessel**-0.5))
    # torch.nn.functional.batch_norm would refuse a batch of one.
    return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, _lowered(eps, bessel))


def _apply(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, with mean and var constant."""
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, cudnn)


def _r_and_d(
    renorm: Renorm,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Batch Renorm's r and d, (C,), clipped as far as the warm-up after `count` passes allows."""
    if running_mean is None or running_var is None or count is None:
        raise BatchproofError(
            "Batch Renorm in a batch mode needs running statistics and their count"
        )
    if running_var.dtype != var.dtype:
        running_var = running_var.to(var.dtype)
    inverse_std = (running_var + eps).rsqrt_()
    r = (var + eps).sqrt_().mul_(inverse_std)
    d = (mean - running_mean).mul_(inverse_std)
    if renorm.warmup == "smooth":
        progress = count.to(var.dtype) / max(renorm.warmup_steps, 1)
        r_max = 1 + (renorm.r_max - 1) * ((progress - 1 / 8) / (7 / 8)).clamp(0, 1)
        d_max = renorm.d_max * ((progress - 1 / 8) / (4 / 8)).clamp(0, 1)
        r, d = torch.clamp(r, 1 / r_max, r_max), torch.clamp(d, -d_max, d_max)
    else:
        r.clamp_(1 / renorm.r_max, renorm.r_max)
        d.clamp_(-renorm.d_max, renorm.d_max)
        if renorm.warmup_steps > 0:
            # On the device, because reading the count would stop a GPU and break a compiled graph.
            warm = count >= renorm.warmup_steps
            r, d = torch.where(warm, r, 1.0), torch.where(warm, d, 0.0)
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        r, d = _saved(r), _saved(d)
    return r, d


@torch.library.custom_op("batchproof::saved", mutates_args=(), schema="(Tensor x) -> Tensor")
def _saved(x: Tensor) -> Tensor:
    """A copy that a compiled backward must take from the forward.

    `torch.compile` may compute cheap things again in the backward, r and d among them, from running
    statistics that have moved since. It never does so through an operator that it does not know.
    """
    return x.clone()


@_saved.register_fake
def _saved_shape(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _canonical(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    r: Tensor,
    d: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    bessel: float | None,
    gradient: bool,
) -> Tensor:
    """((x - mean) / std * r + d) * weight + bias: batch norm with r and d put into the affine."""
    bias = _shifted(bias, weight, d)
    weight = _times(weight, r)
    if gradient:
        return _standardize(x, weight, bias, eps, bessel)[0]
    return _apply(x, mean, var, weight, bias, eps)


def _folded(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    r: Tensor,
    d: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    bessel: float | None,
    gradient: bool,
) -> Tensor:
    """(x - mean') / sqrt(var' + eps) * weight + bias, CrossQ's form of Batch Renorm.

    mean' = mean - d sqrt(var) / r and var' = var / r^2. That is the canonical form of u = x / r
    with d sqrt(v / (v + eps)) in the place of d, v the variance of u, through which the gradient
    runs there as well.
    """
    if not gradient:
        return _apply(x, mean - d * var.sqrt() / r, var / r.square(), weight, bias, eps)
    u = (x - per_feature(mean, x)) / per_feature(r, x)
    v = _scaled(u.square().mean(all_but_features(x)), bessel)
    # The square root has no gradient at 0, where a constant feature sits: it is taken as 0 there.
    share = v / (v + eps)
    positive = share > 0
    root = torch.where(positive, torch.where(positive, share, 1.0).sqrt(), 0.0)
    bias = _shifted(bias, weight, d * root)
    return _standardize(u, _times(weight, r), bias, eps, bessel)[0]


def _by_moments(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    renorm: Renorm | None,
    corrections: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Batch norm, or Batch Renorm in either form, by moments that may carry a gradient."""
    if renorm is not None and corrections is not None:
        r, d = corrections
        if renorm.formula == "folded":
            # As in `_folded`: no gradient through the root of 0.
            positive = var > 0
            std = torch.where(positive, torch.where(positive, var, 1.0).sqrt(), 0.0)
            mean, var = mean - d * std / r, var / r.square()
        else:
            bias, weight = _shifted(bias, weight, d), _times(weight, r)
    slope = _times(weight, (var + eps).rsqrt())
    y = (x - per_feature(mean, x)) * per_feature(slope, x)
    return y if bias is None else y + per_feature(bias, x)


def _times(weight: Tensor | None, factor: Tensor) -> Tensor:
    return factor if weight is None else weight * factor


def _shifted(bias: Tensor | None, weight: Tensor | None, shift: Tensor) -> Tensor:
    if bias is None:
        return _times(weight, shift)
    return bias + shift if weight is None else torch.addcmul(bias, weight, shift)
