"""What normalization does to a critic, its actor and its statistics, in a few numbers.

The same formulas as `batchproof.lab.measures`, for torch. Those of an actor's gradient take ``q``,
a differentiable function from a batch of actions (B, A) to their values (B,) with everything else
fixed: the states, the weights and the mode of slot 3.

Shapes: ``B`` rows of one batch, ``A`` action, ``C`` critics, ``F`` features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchproof.clinic.probe import LayerFacts

QFunction = Callable[[Tensor], Tensor]

NO_GRADIENT = 1e-6  # some ten times the rounding of float32
JITTER = 0.1  # standard deviation, in the action units of the critic


def action_gradient(q: QFunction, action: Tensor, weights: Tensor | None = None) -> Tensor:
    """Gradient (B, A) of the batch's mean value, of a weighted mean with ``weights`` (B,)."""
    action = action.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        value = q(action)
        value = value if weights is None else value * weights.to(value)
        (gradient,) = torch.autograd.grad(value.mean(), action, allow_unused=True)
    return torch.zeros_like(action) if gradient is None else gradient


def kappa(q: QFunction, action: Tensor) -> float:
    """Common-mode share of the actor's gradient, in [0, 1], averaged over action dimensions.

    kappa = |sum_i dQbar/da_i| / sum_i |dQbar/da_i|, Qbar the batch's mean value. 0 to rounding
    where a norm on the first layer that contains the action uses the batch's statistics with
    gradient; 1 where all rows want to move the same way. Where Qbar has no gradient at all (below
    `NO_GRADIENT` of the gradient for differences between rows) it is 0 too. The rows of ``action``
    must differ: at equal ones the share is 0/0.
    """
    gradient = action_gradient(q, action)
    contrast = action_gradient(q, action, _alternating(action))
    total = gradient.abs().sum(0)
    some = total > NO_GRADIENT * contrast.abs().sum(0)
    share = gradient.sum(0).abs() / torch.where(some, total, torch.ones_like(total))
    return float(torch.where(some, share, torch.zeros_like(share)).mean())


def _alternating(action: Tensor) -> Tensor:
    signs = torch.ones(len(action), dtype=action.dtype, device=action.device)
    signs[1::2] = -1
    return signs


def common_slope(q: QFunction, action: Tensor) -> float:
    """sum_i dQbar/da_i, averaged over action dimensions, in units of return per action unit.

    The change of the mean value when all actions of the batch shift together: what moves a policy.
    """
    return float(action_gradient(q, action).sum(0).mean())


class ActionGaps(NamedTuple):
    """Mean absolute change of a row's own value, in units of return."""

    individual: float  # its own action is shifted
    common: float  # every row's action is shifted


def action_gaps(q: QFunction, action: Tensor, delta: float = 0.1, rows: int = 8) -> ActionGaps:
    """G_ind and G_com of the first ``rows`` rows, every action dimension shifted by ``delta``."""
    rows = min(rows, len(action))
    with torch.no_grad():
        base = q(action)[:rows]
        common = (q(action + delta)[:rows] - base).abs().mean()
        alone = []
        for row in range(rows):
            shifted = action.clone()
            shifted[row] += delta
            alone.append((q(shifted)[row] - base[row]).abs())
    return ActionGaps(float(torch.stack(alone).mean()), float(common))


def response_ratio(q: QFunction, action: Tensor, delta: float = 0.1, rows: int = 8) -> float:
    """R = G_com / G_ind: 1 without coupling between rows, 0 for batch norm in T, 1/2 in M."""
    gaps = action_gaps(q, action, delta, rows)
    return gaps.common / (gaps.individual if gaps.individual > 0 else 1.0)


def batch_noise(
    q_at: Callable[[Tensor], Tensor],
    population: int,
    batch: int,
    *,
    fixed: int = 8,
    draws: int = 16,
) -> float:
    """Variance over batch companions of the value of a fixed (s, a), averaged over such pairs.

    Args:
        q_at: values (B,) of the transitions with the given indices (B,), as one batch.
        population: number of transitions to draw companions from.
        batch: rows of a batch.
        fixed: transitions whose value is watched; they are the first.
        draws: batches.

    Returns:
        In squared units of return; 0 where rows do not couple.
    """
    fixed = min(fixed, batch - 1, population - 1)
    generator = torch.Generator().manual_seed(0)
    values = []
    with torch.no_grad():
        for _ in range(draws):
            others = torch.randint(fixed, population, (batch - fixed,), generator=generator)
            values.append(q_at(torch.cat([torch.arange(fixed), others]))[:fixed].double())
    return float(torch.stack(values).var(0).mean())


class StatisticError(NamedTuple):
    """Error of running statistics against the true ones, per feature (F,)."""

    shift: Tensor  # |rm - mu_ref| / sigma_ref
    log_ratio: Tensor  # log(rv / var_ref)


def statistic_error(
    mean: Tensor, var: Tensor, true_mean: Tensor, true_var: Tensor
) -> StatisticError:
    """How far running statistics (F,) are from the data's; NaN where the data is constant."""
    mean, var, true_mean, true_var = (t.double() for t in (mean, var, true_mean, true_var))
    scale = torch.where(true_var > 0, true_var, torch.full_like(true_var, torch.nan))
    return StatisticError((mean - true_mean).abs() / scale.sqrt(), (var / scale).log())


def by_feature(x: Tensor) -> Tensor:
    """The input of a normalization layer as (N, F): features stand in dimension 1, as in torch."""
    return x.reshape(-1, 1) if x.ndim < 2 else x.transpose(0, 1).flatten(1).T


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (F,) of a layer's input, in float64."""
    flat = by_feature(x).double()
    return flat.mean(0), flat.var(0, correction=0)


def inputs_of(
    layers: Sequence[LayerFacts], run: Callable[[], Any], *, outputs: bool = False
) -> dict[str, Tensor]:
    """What reaches each layer while ``run`` runs, by the layer's name; calls are concatenated.

    Args:
        layers: whose input is wanted; those that ``run`` does not call are left out.
        run: calls the networks.
        outputs: the layers' outputs instead.
    """
    found: dict[str, list[Tensor]] = {}
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            values = (output,) if outputs else args
            tensor = next((v for v in values if isinstance(v, Tensor)), None)
            if tensor is not None:
                found.setdefault(name, []).append(tensor.detach().clone())

        return hook

    for layer in layers:
        handles.append(layer.call.module.register_forward_hook(keep(layer.name)))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@contextmanager
def precise_statistics(layers: Sequence[LayerFacts], run: Callable[[], Any]) -> Iterator[None]:
    """Running statistics of the data inside the block (PreciseBN, arXiv 2105.07576).

    Weights are fixed and all rows that ``run`` passes form one pool: each layer takes the mean and
    the biased variance of its own input, given that the layers before it have done so. They come
    back as they were. Use it in eval mode, and let ``run`` be one forward of each network.
    """
    kept = [layer for layer in layers if layer.running]
    saved = []
    for layer in kept:
        buffers = dict(layer.call.module.named_buffers(recurse=False))
        for name in filter(None, (layer.mean_buffer, layer.var_buffer)):
            saved.append((buffers[name], buffers[name].detach().clone()))
    handles = []

    def set_statistics(layer: LayerFacts) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = next((v for v in args if isinstance(v, Tensor)), None)
            if x is None:
                return
            buffers = dict(module.named_buffers(recurse=False))
            for name, value in zip((layer.mean_buffer, layer.var_buffer), moments(x), strict=True):
                if name:
                    buffers[name].data.copy_(value)

        return hook

    for layer in kept:
        handles.append(layer.call.module.register_forward_pre_hook(set_statistics(layer)))
    try:
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()
        yield
    finally:
        for buffer, content in saved:
            buffer.data.copy_(content)


class TDBias(NamedTuple):
    """What normalization adds to the TD error at fixed weights, each in TD-target units."""

    target: float  # b_t = gamma E[(1 - d)(Q_m5 - Q_ref)(s', a')]
    current: float  # b_c = -E[(Q_m4 - Q_ref)(s, a)]
    action: float  # b_a = gamma E[(1 - d)(Q_ref(s', pi_m2(s')) - Q_ref(s', pi_E(s')))]
    noise: tuple[float, float, float]  # standard error of each

    @property
    def total(self) -> float:
        """Their sum: the bias of the TD error."""
        return self.target + self.current + self.action


def td_bias(
    *,
    gamma: float,
    terminated: Tensor,
    next_q: Tensor,
    next_q_reference: Tensor,
    q: Tensor,
    q_reference: Tensor,
    next_q_running_action: Tensor | None = None,
) -> TDBias:
    """Split the bias of the TD error at fixed weights into its three sources.

    The reference is the same networks with the statistics of (s, a) and (s', pi(s')) pooled.

    Args:
        gamma: discount per step.
        terminated: (B,), at least 2 rows.
        next_q: value (B,) of (s', a') as training computes it, in slot 5's mode.
        next_q_reference: the same by the reference.
        q: value (B,) of (s, a) in slot 4's mode.
        q_reference: the same by the reference.
        next_q_running_action: by the reference, of (s', a') with a' of the actor in mode E; None
            where the actor's modes do not differ.
    """
    alive = gamma * (1 - terminated.double())
    target = alive * (next_q - next_q_reference).double()
    current = -(q - q_reference).double()
    if next_q_running_action is None:
        action = torch.zeros_like(target)
    else:
        action = alive * (next_q_reference - next_q_running_action).double()
    parts = (target, current, action)
    b_t, b_c, b_a = (float(part.mean()) for part in parts)
    e_t, e_c, e_a = (float(part.std() / len(part) ** 0.5) for part in parts)
    return TDBias(b_t, b_c, b_a, (e_t, e_c, e_a))
