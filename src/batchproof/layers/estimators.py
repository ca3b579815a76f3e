"""Estimators of running statistics for torch; `batchproof.estimators` says what is known of each.

Every function moves ``running_mean`` and ``running_var`` (C,) in place, which are at any time what
mode ``E`` uses. The batch's x is (N, C, ...); its mean and var (C,) have the running statistics'
dtype. ``momentum`` is the weight of the new batch, or a tensor of 1 / count where the layer's is
None. `torch.export` of a mode that moves the statistics by ``huber`` or ``median-of-means`` needs a
fixed batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from batchproof.estimators import (
    FLOOR,
    HUBER,
    MAD_TO_STD,
    WINSOR,
    Batch,
    blocks,
    median_variance,
)

Share = float | Tensor
Estimator = Callable[[Tensor, Tensor, Batch, "float | Tensor"], None]


def ema(running_mean: Tensor, running_var: Tensor, batch: Batch, momentum: Share) -> None:
    """Exponential moving average: running += momentum * (batch - running)."""
    running_mean.lerp_(batch.mean, momentum)
    running_var.lerp_(batch.var, momentum)


def debiased(running_mean: Tensor, running_var: Tensor, batch: Batch, momentum: Share) -> None:
    """Bias-corrected average: weight momentum / (1 - (1 - momentum)^count), 1 at first."""
    if isinstance(momentum, float) and momentum < 1:  # 1 / count has no bias
        seen = batch.count.to(running_mean.dtype)
        momentum = momentum / -torch.expm1(seen * math.log1p(-momentum))
    ema(running_mean, running_var, batch, momentum)


def cumulative(running_mean: Tensor, running_var: Tensor, batch: Batch, momentum: Share) -> None:
    """Plain average over all batches: weight 1 / count. The momentum is not used."""
    share = batch.count.to(running_mean.dtype).reciprocal()
    ema(running_mean, running_var, batch, share)


def chan(running_mean: Tensor, running_var: Tensor, batch: Batch, momentum: Share) -> None:
    """Exponential Chan merge: v <- (1 - rho) (v + rho d^2) + rho var, d = mean - running_mean."""
    d = batch.mean - running_mean
    running_mean.add_(d * momentum)
    running_var.add_(d.square().mul_(momentum)).lerp_(batch.var, momentum)


def winsorized(running_mean: Tensor, running_var: Tensor, batch: Batch, momentum: Share) -> None:
    """Average of batches whose rows were clipped to median +- 3 * 1.4826 * MAD first.

    The rows of a feature map are its positions in all images.
    """
    rows = batch.x.transpose(0, 1).flatten(1)  # (C, rows)
    middle = rows.median(1, keepdim=True).values
    mad = (rows - middle).abs().median(1, keepdim=True).values
    limit = torch.where(mad > 0, WINSOR * MAD_TO_STD * mad, torch.inf)
    rows = torch.minimum(torch.maximum(rows, middle - limit), middle + limit)
    var, mean = torch.var_mean(rows, 1, correction=0)
    _average(running_mean, running_var, mean, var * batch.bessel, momentum)


def huber(running_mean: Tensor, running_var: Tensor, batch: Batch, momentum: Share) -> None:
    """Average with bounded steps: m += rho clip(mean - m, +- 3 sqrt(v / N)), and log v likewise.

    N is the length of the first axis: the positions of an image are not independent.
    """
    rows = len(batch.x)
    limit = HUBER * ((running_var + FLOOR) / rows).sqrt()
    log_limit = HUBER * math.sqrt(2 / rows)
    step = torch.clamp(batch.mean - running_mean, -limit, limit)
    log_step = ((batch.var + FLOOR) / (running_var + FLOOR)).log().clamp(-log_limit, log_limit)
    new_var = running_var + (running_var + FLOOR) * torch.expm1(momentum * log_step)
    first = batch.count == 1  # on the device: reading it would stop a GPU
    running_mean.copy_(torch.where(first, batch.mean, running_mean + momentum * step))
    running_var.copy_(torch.where(first, batch.var, new_var.clamp(min=0)))


def median_of_means(
    running_mean: Tensor, running_var: Tensor, batch: Batch, momentum: Share
) -> None:
    """Average of the median over 9 blocks of the blocks' means, and of their variances.

    Row i of the first axis belongs to block i mod 9, with all positions of a feature map.
    """
    x = batch.x
    number = blocks(len(x))
    if number == 1:
        return ema(running_mean, running_var, batch, momentum)
    size = len(x) // number
    parts = x[: size * number].reshape(size, number, x.shape[1], -1)
    spread, middle = torch.var_mean(parts, (0, 3), correction=1)  # (blocks, C)
    rows = x.numel() // x.shape[1]
    scale = batch.bessel * (rows - 1) / rows / median_variance(size * parts.shape[3])
    middle, spread = middle.median(0).values, spread.median(0).values * scale
    return _average(running_mean, running_var, middle, spread, momentum)


def _average(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: Share
) -> None:
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(var.to(running_var.dtype), momentum)


ESTIMATORS: dict[str, Estimator] = {
    "ema": ema,
    "debiased": debiased,
    "cumulative": cumulative,
    "chan": chan,
    "winsorized": winsorized,
    "huber": huber,
    "median-of-means": median_of_means,
}
"""Every estimator of running statistics by name."""
