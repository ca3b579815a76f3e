"""Means, differences and their intervals over seeds. Needs NumPy and SciPy alone.

Every interval is a bootstrap over seeds: a seed is the unit of replication, so one number per seed
goes in. The method is BCa (bias-corrected and accelerated; Efron 1987,
doi:10.1080/01621459.1987.10478410), and the percentile method where BCa is undefined.

A bootstrap of few seeds is too narrow: on normal data a 95% interval covers the true mean in about
85% of cases at 5 seeds, 90% at 10 and 93% at 20. A decision rule on 5 seeds should ask for a margin
besides.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 9999


class Interval(NamedTuple):
    """An estimate with its interval, in the unit of the values. Unpacks as `mean, lo, hi`.

    `lo` and `hi` are NaN where there are too few seeds to say anything.
    """

    mean: float
    lo: float
    hi: float


def mean_interval(values: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean over seeds with its bootstrap interval.

    Args:
        values: one finite number per seed, shape (n,).
        level: the interval's coverage, strictly between 0 and 1.
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        The mean and the ends of its interval. One seed has no interval (`lo`, `hi` NaN);
        equal values have one of width zero.

    Raises:
        ValueError: `values` is empty, not one-dimensional or not finite, or `level` is out of
            range.
    """
    return _interval((_seeds(values, "values"),), _mean, level, seed)


def difference_interval(a: ArrayLike, b: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """`mean(a) - mean(b)` for unpaired seeds: each side is resampled on its own.

    Args:
        a: one finite number per seed, shape (n,).
        b: one finite number per seed, shape (m,); m may differ from n.
        level: the interval's coverage, strictly between 0 and 1.
        seed: of the resampling.

    Returns:
        The difference and its interval: NaN ends if either side has a single seed,
        width zero if each side is constant.

    Raises:
        ValueError: `a` or `b` is empty, not one-dimensional or not finite, or `level` is out of
            range.
    """
    return _interval((_seeds(a, "a"), _seeds(b, "b")), _mean_difference, level, seed)


def paired_difference_interval(
    a: ArrayLike, b: ArrayLike, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of `a[i] - b[i]` where entry i of both comes from the same seed.

    Pair only runs that share what the seed decides (initial weights, environment noise); otherwise
    `difference_interval` is the right one.

    Args:
        a: one finite number per seed, shape (n,).
        b: likewise, shape (n,), in the same order of seeds.
        level: the interval's coverage, strictly between 0 and 1.
        seed: of the resampling.

    Raises:
        ValueError: as `mean_interval`, or `a` and `b` differ in length.
    """
    first, second = _seeds(a, "a"), _seeds(b, "b")
    if first.size != second.size:
        raise ValueError(
            f"a has {first.size} seeds and b has {second.size}: paired values need one of each per "
            "seed; for unpaired seeds use difference_interval"
        )
    return _interval((first - second,), _mean, level, seed)


def _seeds(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """`values` as a finite float64 vector of shape (n,), n >= 1."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold one number per seed: {error}") from error
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (n_seeds,), not {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: give at least one seed")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{name} is not finite at index {', '.join(map(str, bad))}: decide first how a "
            "diverged seed counts (a floor return, or left out and reported)"
        )
    return array


def _mean(values: NDArray[np.float64], axis: int = -1) -> Any:
    return np.mean(values, axis=axis)


def _mean_difference(a: NDArray[np.float64], b: NDArray[np.float64], axis: int = -1) -> Any:
    return np.mean(a, axis=axis) - np.mean(b, axis=axis)


def _interval(
    samples: tuple[NDArray[np.float64], ...],
    statistic: Callable[..., Any],
    level: float,
    seed: int,
) -> Interval:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be strictly between 0 and 1, not {level!r}; write .95")
    estimate = float(statistic(*samples))
    if min(sample.size for sample in samples) < 2:
        return Interval(estimate, float("nan"), float("nan"))
    if all(np.ptp(sample) == 0.0 for sample in samples):
        return Interval(estimate, estimate, estimate)
    for method in ("BCa", "percentile"):
        # BCa is undefined where the jackknife has no spread: SciPy then warns and returns NaN, and
        # the percentile method takes over.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            ends = stats.bootstrap(
                samples,
                statistic,
                n_resamples=RESAMPLES,
                confidence_level=level,
                method=method,
                vectorized=True,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite(ends.low) and np.isfinite(ends.high):
            return Interval(estimate, float(ends.low), float(ends.high))
    return Interval(estimate, float("nan"), float("nan"))
