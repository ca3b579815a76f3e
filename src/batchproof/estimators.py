"""Estimators of running statistics: what each computes, in NumPy, and what is known about it.

A normalization layer sees a batch's mean and variance and keeps running ones for mode ``E``. How it
gets from one to the other is its estimator. The lab (`batchproof.lab.estimators`) and the torch
layers (`batchproof.layers.estimators`) compute the same formulas; tests hold all three equal.

Every function moves the running mean m and variance v by one batch. Nothing else is kept: m and v
are always what mode ``E`` uses, so that a state has the same two vectors and one counter whichever
estimator made it. Shapes: ``N`` rows of a batch, ``F`` features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

MAD_TO_STD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""

WINSOR = 3.0
"""Rows are clipped this many robust standard deviations from the median."""

HUBER = 3.0
"""Steps are clipped at this many standard deviations of a clean batch's own noise."""

BLOCKS = 9
"""Blocks of the median of means, for batches that have enough rows."""

SMALLEST_BLOCK = 4
"""Rows that a block of the median of means has at least."""

FLOOR = 1e-5
"""Batch norm's usual eps. Huber's limits are taken at v + FLOOR, or a feature that was constant for
a while could never move again."""

Values = Any
"""A NumPy array or a number."""

Moved = tuple[Any, Any]
"""The running mean and variance after a batch."""


class Batch(NamedTuple):
    """What an estimator sees, as arrays of NumPy, JAX or torch, without gradient."""

    mean: Any  # (F,)
    var: Any  # (F,), biased or unbiased as the layer says
    x: Any  # (N, F), the rows themselves
    count: Any  # () batches seen, this one included
    bessel: float = 1.0  # what turned the biased variance into `var`: 1 or N / (N - 1)


def ema(mean: Values, var: Values, batch: Batch, rho: Values) -> Moved:
    """Exponential moving average: m += rho (mu_B - m), and v likewise.

    Args:
        mean: m, (..., F).
        var: v, (..., F).
        batch: its mean mu_B, its variance v_B and the rest.
        rho: weight of the new batch, PyTorch's momentum; a number, or an array that broadcasts.

    Returns:
        The new m and v. All estimators have these arguments and give these.
    """
    return mean + rho * (batch.mean - mean), var + rho * (batch.var - var)


def debiased(mean: Values, var: Values, batch: Batch, rho: Values) -> Moved:
    """Bias-corrected average, as in Adam (arXiv 1412.6980): the initial 0 and 1 weigh nothing.

    An average that starts at 0, divided by 1 - (1 - rho)^t after t batches, is the average with
    weight rho / (1 - (1 - rho)^t). That is 1 for the first batch. m and v are the corrected values.
    """
    return ema(mean, var, batch, rho / (1 - (1 - rho) ** batch.count))


def cumulative(mean: Values, var: Values, batch: Batch, rho: Values) -> Moved:
    """Plain average over all batches: weight 1 / t. The momentum is not used."""
    return ema(mean, var, batch, 1 / batch.count + 0 * rho)


def chan(mean: Values, var: Values, batch: Batch, rho: Values) -> Moved:
    """Exponential Chan merge: v <- (1 - rho) (v + rho d^2) + rho v_B, d = mu_B - m.

    It is the variance of the pooled rows, with that of the batch means, which an average of
    variances leaves out. With rho = 1 / t it is the merge of Chan, Golub and LeVeque (1983).
    """
    d = batch.mean - mean
    return mean + rho * d, (1 - rho) * (var + rho * d**2) + rho * batch.var


def winsorized(mean: Values, var: Values, batch: Batch, rho: Values) -> Moved:
    """Average of batches whose rows were clipped to median +- 3 * 1.4826 * MAD first.

    MAD is the median absolute deviation. Where it is 0, as in a feature that is 0 on most rows,
    nothing is clipped. Of normal rows the clipping takes half a percent of the variance.
    """
    middle = lower_median(batch.x)
    mad = lower_median(np.abs(batch.x - middle))
    limit = np.where(mad > 0, WINSOR * MAD_TO_STD * mad, np.inf)
    x = np.clip(batch.x, middle - limit, middle + limit)
    return ema(mean, var, batch._replace(mean=x.mean(0), var=x.var(0) * batch.bessel), rho)


def huber(mean: Values, var: Values, batch: Batch, rho: Values) -> Moved:
    """Average with bounded steps: m += rho clip(mu_B - m, +- 3 sqrt(v / N)).

    log v likewise, clipped at +- 3 sqrt(2 / N): both limits are three times the noise of a clean
    batch of N normal rows. The first batch is taken as it is.
    """
    if batch.count == 1:
        return ema(mean, var, batch, 1 + 0 * rho)
    rows = len(batch.x)
    limit = HUBER * np.sqrt((var + FLOOR) / rows)
    log_limit = HUBER * math.sqrt(2 / rows)
    step = np.clip(batch.mean - mean, -limit, limit)
    log_step = np.clip(np.log((batch.var + FLOOR) / (var + FLOOR)), -log_limit, log_limit)
    var = np.maximum(var + (var + FLOOR) * np.expm1(rho * log_step), 0)
    return mean + rho * step, var


def median_of_means(mean: Values, var: Values, batch: Batch, rho: Values) -> Moved:
    """Average of the median over 9 blocks of the blocks' means, and of their variances.

    Row i belongs to block i mod 9; the last N mod 9 rows are left out. Blocks have at least 4 rows,
    so a batch of fewer than 36 has fewer blocks, always an odd number, and below 12 it is the plain
    average. Variances of blocks are skewed: their median is divided by what it is for normal rows.
    """
    rows = len(batch.x)
    number = blocks(rows)
    if number == 1:
        return ema(mean, var, batch, rho)
    size = rows // number
    parts = batch.x[: size * number].reshape(size, number, *batch.x.shape[1:])
    scale = batch.bessel * (rows - 1) / rows / median_variance(size)
    middle, spread = lower_median(parts.mean(0)), lower_median(parts.var(0, ddof=1))
    return ema(mean, var, batch._replace(mean=middle, var=spread * scale), rho)


def lower_median(x: np.ndarray) -> np.ndarray:
    """The median over the first axis; the smaller of the middle two, as `torch.median`."""
    middle = (len(x) - 1) // 2
    return np.partition(x, middle, axis=0)[middle]


def blocks(rows: int) -> int:
    """Blocks of the median of means in a batch of ``rows``: odd, so that one is the median."""
    number = max(1, min(BLOCKS, rows // SMALLEST_BLOCK))
    return number - 1 + number % 2


def median_variance(rows: int) -> float:
    """Median of the unbiased variance of ``rows`` standard normal values (Wilson and Hilferty)."""
    return (1 - 2 / (9 * (rows - 1))) ** 3


@dataclass(frozen=True)
class Estimator:
    """What is known about one estimator.

    Attributes:
        update: the formula.
        breakdown: the share of bad data from which on the error has no bound.
        lag: how far the statistics are behind a steady drift, in batches.
        choose: when it is the one to use.
    """

    update: Callable[[Values, Values, Batch, Values], Moved]
    breakdown: str
    lag: str
    choose: str


EMA_LAG = "(1 - rho) / rho"

ESTIMATORS: dict[str, Estimator] = {
    "ema": Estimator(
        ema,
        breakdown="0: one row of size M moves m by rho M / N",
        lag=EMA_LAG,
        choose="clean data; what torch does",
    ),
    "debiased": Estimator(
        debiased,
        breakdown="0, as `ema`",
        lag=f"{EMA_LAG}, and at most (t - 1) / 2 after t batches",
        choose="few batches, or a small rho: the initial 0 and 1 would still be seen",
    ),
    "cumulative": Estimator(
        cumulative,
        breakdown="0: one row of size M moves m by M / (N t)",
        lag="(t - 1) / 2 after t batches: it never forgets",
        choose="weights and data that stand still",
    ),
    "chan": Estimator(
        chan,
        breakdown="0: one batch that is M off moves v by rho (1 - rho) M^2",
        lag=f"{EMA_LAG}; v also grows with the drift of the mean",
        choose="batches that differ from each other: one episode or one environment each",
    ),
    "winsorized": Estimator(
        winsorized,
        breakdown="1/2 of a batch's rows",
        lag=EMA_LAG,
        choose="outliers, frequent ones too, in features that are not 0 on most rows",
    ),
    "huber": Estimator(
        huber,
        breakdown="1/2 of the batches; one row spoils a batch, but the step is bounded",
        lag=f"{EMA_LAG} up to a drift of 3 rho / sqrt(N) sigma a batch, beyond it without bound",
        choose="rare outliers beyond 3 sqrt(N) sigma, in small batches, with slow drift",
    ),
    "median-of-means": Estimator(
        median_of_means,
        breakdown="4 rows of a batch of 36 and more: 5 of 9 blocks have to be spoilt",
        lag=EMA_LAG,
        choose="rare outliers in symmetric features",
    ),
}
"""Every estimator by name."""

BY_MOMENTS = ("ema", "debiased", "cumulative", "chan")
"""Estimators that need a batch's mean and variance only, not its rows: all that is left of a batch
that is spread over processes or devices."""
