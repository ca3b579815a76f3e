"""Mean and variance of a batch: of this process's own, or of all ranks of a group together."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from batchproof.errors import BatchproofError
from batchproof.estimators import BY_MOMENTS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

WORLD = "world"
"""All ranks, looked up when a layer is called."""


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each feature, (C,), for an ``x`` that carries no gradient."""
    if x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        # Batch norm's own kernel: on a CPU `var_mean` over rows takes some thirty times as long.
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    var, mean = torch.var_mean(x, all_but_features(x), correction=0)
    return mean, var


def all_but_features(x: Tensor) -> list[int]:
    """The axes of ``x`` (N, C, ...) that statistics are taken over."""
    return [0, *range(2, x.dim())]


def per_feature(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (C,) in a shape that goes with ``x`` (N, C, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def pooled_moments(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) over the rows of all ranks, and the number of rows ().

    One `all_gather` in the forward pass; where ``x`` carries a gradient one `all_reduce` in the
    backward pass. The gradient is that of the sum of all ranks' losses. Every rank has to call
    this as often and in the same order, with a batch of any size; the results are equal to the bit.

    Raises:
        BatchproofError: no rank has a row.
    """
    mean, var, rows = _PooledMoments.apply(x, group)
    return mean, var, rows


class _PooledMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.numel() // x.shape[1]
        zeros = x.new_zeros(x.shape[1])
        own = torch.cat([*(moments(x) if rows else (zeros, zeros)), x.new_full((1,), rows)])
        # The merge costs nothing, so it is done in float64: exact to the rounding of its parts.
        means, variances, counts = gather(own, group).double().split([*[len(zeros)] * 2, 1], dim=1)
        total = counts.sum()
        # Asked of a rank without rows only, because reading the answer stops a GPU.
        if rows == 0 and total == 0:
            raise BatchproofError(
                "an empty batch on every rank has no statistics: skip the call, or use mode 'E'"
            )
        share = counts / total
        mean = (share * means).sum(0)
        # Chan, Golub and LeVeque: the spread within the ranks and that of their means. A sum of
        # squares less the square of the mean would cancel where the mean is large.
        var = (share * (variances + (means - mean).square())).sum(0)
        mean, var, total = mean.to(x.dtype), var.to(x.dtype), total.to(x.dtype)
        ctx.save_for_backward(x, mean, total)
        ctx.group = group
        ctx.mark_non_differentiable(total)
        return mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, mean, total = ctx.saved_tensors
        both = torch.stack(grads[:2])
        dist.all_reduce(both, group=ctx.group)
        by_mean, by_var = both / total
        slope = per_feature(2 * by_var, x)
        return (x - per_feature(mean, x)) * slope + per_feature(by_mean, x), None


def gather(own: Tensor, group: ProcessGroup) -> Tensor:
    """The tensors of all ranks, stacked in the order of the ranks, (ranks, ...)."""
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    return torch.stack(every)


def check_group(process_group: ProcessGroup | str | None, estimator: str) -> None:
    """Refuse what is no process group, and an estimator that a group cannot have.

    Raises:
        BatchproofError: saying what to give instead.
    """
    if process_group is None:
        return
    if process_group != WORLD and not (
        dist.is_available() and isinstance(process_group, dist.ProcessGroup)
    ):
        raise BatchproofError(
            f"process_group must be 'world', None, or what torch.distributed.new_group gave to a "
            f"rank of that group, got {process_group!r}"
        )
    if estimator not in BY_MOMENTS:
        raise BatchproofError(
            f"estimator {estimator!r} looks at the rows of a batch, and a process group shares "
            f"only their mean and variance: use one of {', '.join(BY_MOMENTS)}"
        )


def group_of(process_group: ProcessGroup | str | None) -> ProcessGroup | None:
    """The group whose ranks share their statistics now; None where this process is alone.

    `WORLD` before `torch.distributed.init_process_group` is this process alone.

    Raises:
        BatchproofError: the group of a `torch.distributed` that is no longer, or not yet, set up.
    """
    if process_group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if process_group == WORLD:
            return None
        raise BatchproofError(
            "the layer's process group is gone: call torch.distributed.init_process_group and "
            "convert_sync again, or set process_group to 'world' or None"
        )
    group: Any = dist.group.WORLD if process_group == WORLD else process_group
    return group if dist.get_world_size(group) > 1 else None


def copy_with_group(layer: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy` of a layer that keeps its process group, which cannot be copied."""
    kind: Any = type(layer)
    copied = kind.__new__(kind)
    memo[id(layer)] = copied
    memo[id(layer.process_group)] = layer.process_group
    copied.__setstate__(copy.deepcopy(vars(layer), memo))
    return copied
