"""What runs with several seeds can say: estimates, their intervals, and comparisons.

Needs NumPy and SciPy alone. A seed is the unit of replication: one number per seed goes in.

- Means and differences of means (`mean_interval` and its kin): BCa bootstrap (bias-corrected and
  accelerated; Efron 1987, doi:10.1080/01621459.1987.10478410), and the percentile method where BCa
  is undefined.
- Interquartile mean, probability of improvement and performance profiles, over several tasks at
  once: percentile bootstrap that resamples the seeds of each task on their own, as in arXiv
  2108.13264 and its library rliable. ``N`` is the number of seeds, ``M`` that of tasks.
- Whether one condition differs from another: a test paired by seed, corrected for the number of
  comparisons, and one sentence (`compare`). Fewer than `MIN_SEEDS` seeds are not ranked.

A bootstrap of few seeds is too narrow: on normal data a 95% interval covers the true mean in about
85% of cases at 5 seeds, 90% at 10 and 93% at 20. A decision rule on 5 seeds should ask for a margin
besides.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import integrate, stats

from batchproof.errors import BatchproofError

RESAMPLES = 9999

MIN_SEEDS = 5
"""Fewer seeds than this are described, never ranked or tested."""


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


def iqm(scores: ArrayLike) -> float:
    """Interquartile mean: the mean without the lowest and the highest quarter (arXiv 2108.13264).

    Of n values it leaves out floor(n / 4) at each end, as rliable does.

    Args:
        scores: finite numbers of any shape, taken together.

    Raises:
        ValueError: `scores` is empty or not finite.
    """
    return float(_middle(_matrix(scores, "scores").reshape(1, -1))[0])


def iqm_interval(scores: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """Interquartile mean over seeds and tasks with its stratified bootstrap interval.

    Each resample draws N seeds with replacement within each task, and the ends are percentiles
    (arXiv 2108.13264, section 4.1).

    Args:
        scores: shape (N, M), or (N,) for one task. Several tasks need scores on one scale.
        level: the interval's coverage, strictly between 0 and 1.
        seed: of the resampling.

    Returns:
        The estimate (in the field `mean`) and its interval; NaN ends for a single seed.

    Raises:
        ValueError: `scores` is empty, not finite or of another shape, or `level` out of range.
    """
    matrix = _matrix(scores, "scores")
    estimate = float(_middle(matrix.reshape(1, -1))[0])
    if len(matrix) < 2:
        return Interval(estimate, math.nan, math.nan)
    draws = _middle(_resampled(matrix, RESAMPLES, np.random.default_rng(seed)))
    return Interval(estimate, *_percentiles(draws, level).tolist())


def iqm_curve(
    values: ArrayLike, level: float = 0.95, seed: int = 0, resamples: int = 1000
) -> NDArray[np.float64]:
    """Interquartile mean of learning curves, with a bootstrap interval at each evaluation.

    A resample draws whole curves. The intervals hold for each evaluation on its own, not for all
    of the curve at once.

    Args:
        values: shape (N, T), one curve per seed.
        level: the intervals' coverage, strictly between 0 and 1.
        seed: of the resampling.
        resamples: how many.

    Returns:
        Shape (3, T): estimate, lower and upper end. The ends are NaN for a single seed.

    Raises:
        ValueError: as `iqm_interval`.
    """
    curves = _matrix(values, "values")
    estimate = _middle(curves.T)
    if len(curves) < 2:
        return np.stack([estimate, *np.full((2, estimate.size), np.nan)])
    rows = np.random.default_rng(seed).integers(len(curves), size=(resamples, len(curves)))
    # One evaluation at a time: all of them at once would hold resamples x N x T numbers.
    draws = np.stack([_middle(column[rows]) for column in curves.T], axis=1)
    return np.vstack([estimate, _percentiles(draws, level)])


def probability_of_improvement(
    a: ArrayLike, b: ArrayLike, level: float = 0.95, seed: int = 0
) -> Interval:
    """How often a run of `a` beats a run of `b` on the same task (arXiv 2108.13264, section 4.3).

    P(A_m > B_m) + P(A_m = B_m) / 2, estimated over all pairs of seeds (the Mann-Whitney statistic
    divided by its maximum) and averaged over the tasks m. It says how often, not by how much.

    Args:
        a: shape (N, M), or (N,) for one task.
        b: shape (K, M), or (K,); K may differ from N.
        level: the interval's coverage, strictly between 0 and 1.
        seed: of the resampling; `a` and `b` are resampled on their own, seeds within tasks.

    Returns:
        The estimate in [0, 1] and its interval; NaN ends if either side has a single seed.

    Raises:
        ValueError: as `iqm_interval`, or `a` and `b` differ in their number of tasks.
    """
    first, second = _matrix(a, "a"), _matrix(b, "b")
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"a has {first.shape[1]} tasks and b has {second.shape[1]}: give both the same tasks"
        )
    # Each pair of seeds is compared once; a resample then only looks its pairs up.
    wins = [(np.sign(x[:, None] - y) + 1) / 2 for x, y in zip(first.T, second.T, strict=True)]
    estimate = float(np.mean([table.mean() for table in wins]))
    if min(len(first), len(second)) < 2:
        return Interval(estimate, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    draws = np.zeros(RESAMPLES)
    for table in wins:
        rows = _counts(rng, len(first))
        columns = _counts(rng, len(second))
        draws += np.einsum("rn,nk,rk->r", rows, table, columns, optimize=True)
    return Interval(estimate, *_percentiles(draws / (table.size * len(wins)), level).tolist())


def performance_profile(
    scores: ArrayLike,
    thresholds: ArrayLike,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> NDArray[np.float64]:
    """Share of runs that score above each threshold (arXiv 2108.13264, section 4.2).

    Args:
        scores: shape (N, M), or (N,) for one task; all runs of all tasks count alike.
        thresholds: shape (T,), on the scale of the scores.
        level: the intervals' coverage, strictly between 0 and 1; each holds on its own.
        seed: of the resampling, seeds within tasks.
        resamples: how many.

    Returns:
        Shape (3, T): share in [0, 1], lower and upper end; the ends are NaN for a single seed.

    Raises:
        ValueError: as `iqm_interval`.
    """
    matrix, at = _matrix(scores, "scores"), _seeds(thresholds, "thresholds")
    share = (matrix.ravel()[:, None] > at).mean(axis=0)
    if len(matrix) < 2:
        return np.stack([share, *np.full((2, at.size), np.nan)])
    drawn = _resampled(matrix, resamples, np.random.default_rng(seed))
    above = np.stack([(drawn > threshold).mean(axis=1) for threshold in at], axis=1)
    return np.vstack([share, _percentiles(above, level)])


def average_over_training(steps: ArrayLike, values: ArrayLike) -> NDArray[np.float64]:
    """Area under each learning curve divided by its length: the return averaged over training.

    The area is that of straight lines between evaluations (trapezoids), from the first to the last.

    Args:
        steps: shape (T,), rising; environment steps, not evenly spaced if you like.
        values: shape (N, T).

    Returns:
        Shape (N,), in the unit of the values; NaN where a curve has a NaN.

    Raises:
        ValueError: the shapes do not fit, or `steps` does not rise.
    """
    at, curves = _curves(steps, values)
    if at.size == 1:
        return curves[:, 0].copy()
    return np.asarray(integrate.trapezoid(curves, at, axis=1)) / (at[-1] - at[0])


class Crossing(NamedTuple):
    """When the seeds of a condition first reach a threshold.

    Attributes:
        steps: per seed, shape (N,): of the first evaluation at or above it; infinite where a seed
            was never seen to reach it.
        reached: how many seeds did.
        median: by when half of the seeds have reached it; infinite if fewer than half did.
        lo: lower end of the median's interval, NaN where the seeds are too few to bound it.
        hi: its upper end; infinite if the data give no upper bound.
    """

    steps: NDArray[np.float64]
    reached: int
    median: float
    lo: float
    hi: float


def steps_to_threshold(
    steps: ArrayLike, values: ArrayLike, threshold: float, level: float = 0.95
) -> Crossing:
    """Environment steps until the return first reaches a threshold.

    A seed that never does is censored, not dropped: leaving it out, or giving it the last step,
    would make a condition that often fails look fast. The median is Kaplan and Meier's
    (doi:10.1080/01621459.1958.10501452) and its interval is where the log-log interval of their
    curve holds one half (Brookmeyer and Crowley, doi:10.2307/2530286). Evaluations after a NaN (a
    diverged seed) do not count; such a seed stays censored at the last step, since it never will.

    Args:
        steps: shape (T,), rising.
        values: shape (N, T), one curve per seed.
        threshold: in the unit of the values.
        level: the interval's coverage, strictly between 0 and 1.

    Raises:
        ValueError: the shapes do not fit, `steps` does not rise, or `level` is out of range.
    """
    _check_level(level)
    at, curves = _curves(steps, values)
    hit = (curves >= threshold) & ~np.isnan(curves).cumsum(axis=1, dtype=bool)
    first = np.where(hit.any(axis=1), at[hit.argmax(axis=1)], np.inf)
    seen = first[np.isfinite(first)]
    if not seen.size:
        return Crossing(first, 0, math.inf, math.nan, math.inf)
    data = stats.CensoredData(seen, right=np.full(first.size - seen.size, at[-1]))
    curve = stats.ecdf(data).sf
    # Where the curve is 0 its log-log interval is undefined: SciPy says NaN, with a warning.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        band = curve.confidence_interval(level, method="log-log")

    def first_at_most_half(share: NDArray[np.float64]) -> float:
        below = np.flatnonzero(share <= 0.5)
        return float(curve.quantiles[below[0]]) if below.size else math.inf

    lower, upper = band.low.probabilities, band.high.probabilities
    known = np.isfinite(lower)
    lo = first_at_most_half(lower) if known.any() else math.nan
    # Once every seed has reached it the curve is 0 and has no interval: no upper bound from there.
    return Crossing(
        first,
        int(seen.size),
        first_at_most_half(curve.probabilities),
        lo if math.isfinite(lo) else math.nan,
        first_at_most_half(upper),
    )


def paired_test(a: ArrayLike, b: ArrayLike, method: str = "t") -> float:
    """Two-sided p-value of "no difference" between values paired by seed.

    Args:
        a: one finite number per seed, shape (n,).
        b: likewise, in the same order of seeds.
        method: ``t``, the paired t-test: it takes the mean difference as normal, and can tell five
            seeds apart. ``wilcoxon``, the signed-rank test: it takes the differences as symmetric,
            and its smallest p-value is 2^(1 - n), 0.06 for five seeds.

    Returns:
        The p-value in [0, 1]. 1 if all differences are 0. If all are the same other number there is
        no spread to test against, and it is 2^(1 - n), the chance of equal signs.

    Raises:
        ValueError: as `paired_difference_interval`, fewer than two seeds, or an unknown method.
    """
    if method not in ("t", "wilcoxon"):
        raise ValueError(f"unknown method {method!r}: use t or wilcoxon")
    first, second = _seeds(a, "a"), _seeds(b, "b")
    if first.size != second.size or first.size < 2:
        raise ValueError(
            f"a has {first.size} seeds and b has {second.size}: a paired test needs one of each "
            "per seed, and two seeds or more"
        )
    difference = first - second
    if not difference.any():
        return 1.0
    if np.ptp(difference) <= 1e-12 * np.abs(difference).max():
        return float(2.0 ** (1 - difference.size))
    test = stats.wilcoxon if method == "wilcoxon" else stats.ttest_1samp
    more = () if method == "wilcoxon" else (0.0,)
    return float(test(difference, *more).pvalue)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """P-values corrected for their number (Holm 1979, www.jstor.org/stable/4615733).

    With all corrected values below 0.05 called real, the chance of calling even one false is
    below 0.05, whatever the dependence between the tests.

    Args:
        p_values: shape (m,), each in [0, 1].

    Returns:
        Shape (m,), in the order given.

    Raises:
        ValueError: empty, or outside [0, 1].
    """
    p = _seeds(p_values, "p_values")
    if (p < 0).any() or (p > 1).any():
        raise ValueError("p_values must lie in [0, 1]")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


class Comparison(NamedTuple):
    """One condition against another on one task.

    Attributes:
        a: name of the first.
        b: name of the second.
        seeds: how many seeds both have; only those are compared.
        difference: mean of a - b over these seeds, with its 95% interval.
        improvement: probability that a run of a beats one of b, with its 95% interval.
        p: of the paired t-test; NaN with fewer than `MIN_SEEDS` seeds.
        p_holm: corrected for all comparisons made together.
        verdict: ``higher``, ``lower``, ``not told apart`` or ``too few seeds``.
        sentence: all this in words.
    """

    a: str
    b: str
    seeds: int
    difference: Interval
    improvement: Interval
    p: float
    p_holm: float
    verdict: str
    sentence: str


Pair = tuple[str, Mapping[int, float], str, Mapping[int, float]]


def compare(pairs: Sequence[Pair], alpha: float = 0.05, seed: int = 0) -> list[Comparison]:
    """Compare conditions two by two, paired by seed and corrected for their number.

    Args:
        pairs: for each comparison: name of a, its value for each seed, name of b, its values. All
            comparisons that a reader will look through belong into one call.
        alpha: a difference is called real if its Holm-corrected p-value is below this.
        seed: of the intervals' resampling.

    Returns:
        One `Comparison` for each pair, in order. Pairs that share fewer than `MIN_SEEDS` seeds have
        the verdict ``too few seeds`` and do not count among the tests.

    Raises:
        ValueError: two conditions share no seed, or a value is not finite.
    """
    shared = []
    for name_a, a, name_b, b in pairs:
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            raise ValueError(f"{name_a} and {name_b} share no seed: nothing to pair")
        shared.append(
            (_seeds([a[s] for s in seeds], name_a), _seeds([b[s] for s in seeds], name_b))
        )
    p = np.array([paired_test(a, b) if a.size >= MIN_SEEDS else np.nan for a, b in shared])
    tested = np.isfinite(p)
    corrected = np.full(p.size, np.nan)
    if tested.any():
        corrected[tested] = holm(p[tested])
    found = []
    for i, ((name_a, _, name_b, _), (x, y)) in enumerate(zip(pairs, shared, strict=True)):
        difference = paired_difference_interval(x, y, seed=seed)
        if not tested[i]:
            verdict = "too few seeds"
        elif corrected[i] >= alpha:
            verdict = "not told apart"
        else:
            verdict = "higher" if difference.mean > 0 else "lower"
        improvement = probability_of_improvement(x, y, seed=seed)
        sentence = _sentence(name_a, x, name_b, y, difference, float(corrected[i]), verdict)
        found.append(
            Comparison(
                name_a,
                name_b,
                x.size,
                difference,
                improvement,
                float(p[i]),
                float(corrected[i]),
                verdict,
                sentence,
            )
        )
    return found


def ranking(scores: Mapping[str, ArrayLike], seed: int = 0) -> list[tuple[str, Interval]]:
    """Conditions from the highest interquartile mean to the lowest, with their intervals.

    Args:
        scores: for each condition, shape (N,) or (N, M).
        seed: of the resampling.

    Raises:
        BatchproofError: a condition has fewer than `MIN_SEEDS` seeds, so that the order would say
            more about the seeds than about the conditions.
        ValueError: as `iqm_interval`.
    """
    few = {name: len(_matrix(s, name)) for name, s in scores.items()}
    few = {name: count for name, count in few.items() if count < MIN_SEEDS}
    if few:
        listed = ", ".join(f"{name} has {count}" for name, count in few.items())
        raise BatchproofError(
            f"no ranking on too few seeds: {listed}, and it takes {MIN_SEEDS}; run more seeds"
        )
    found = [(name, iqm_interval(values, seed=seed)) for name, values in scores.items()]
    return sorted(found, key=lambda item: -item[1].mean)


def _sentence(
    name_a: str,
    a: NDArray[np.float64],
    name_b: str,
    b: NDArray[np.float64],
    difference: Interval,
    p: float,
    verdict: str,
) -> str:
    means = f"{short(a.mean())} against {short(b.mean())}"
    if verdict == "too few seeds":
        seeds = "1 shared seed" if a.size == 1 else f"{a.size} shared seeds"
        return (
            f"{name_a} and {name_b} cannot be ranked on {seeds} ({MIN_SEEDS} are needed); "
            f"their means are {means}."
        )
    chance = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    measured = (
        f"mean {means}, difference {short(difference.mean)} (95% interval {short(difference.lo)} "
        f"to {short(difference.hi)}), {a.size} shared seeds, {chance} after Holm's correction"
    )
    if verdict == "not told apart":
        apart = difference.lo > 0 or difference.hi < 0
        note = " The interval, of this pair alone, leaves out 0: more seeds may tell them apart."
        return f"{name_a} and {name_b} are not told apart: {measured}.{note if apart else ''}"
    return f"{name_a} is {verdict} than {name_b}: {measured}."


def short(value: float) -> str:
    """A number for a sentence: four digits, a true minus sign, no exponent where it can be avoided.

    NaN and infinity read "unknown" and "none".
    """
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "none"
    rounded = float(f"{value:.4g}")
    text = f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.4g}"
    return ("0" if text == "-0" else text).replace("-", "\N{MINUS SIGN}")


def _matrix(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """`values` as finite float64 of shape (N, M), both at least 1; (N,) becomes (N, 1)."""
    array = np.asarray(values, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"{name} must have shape (n_seeds,) or (n_seeds, n_tasks) and hold a value, "
            f"not {np.shape(values)}"
        )
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} is not finite: decide first how a diverged seed counts (a floor return, or "
            "left out and reported)"
        )
    return array


def _curves(steps: ArrayLike, values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    at = _seeds(steps, "steps")
    curves = np.asarray(values, dtype=np.float64)
    if curves.ndim != 2 or curves.shape[1] != at.size or not len(curves):
        raise ValueError(
            f"values must have shape (n_seeds, {at.size}), one curve per seed, not {curves.shape}"
        )
    if (np.diff(at) <= 0).any():
        raise ValueError("steps must rise from each evaluation to the next")
    return at, curves


def _middle(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interquartile mean of each row."""
    count = values.shape[1]
    cut = count // 4
    # As `scipy.stats.trim_mean`, without its partition: rows are many and short here.
    return np.asarray(np.sort(values, axis=1)[:, cut : count - cut].mean(axis=1))


def _resampled(
    matrix: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Rows of N x M scores, (resamples, N * M): N seeds of each task, drawn within the task."""
    seeds, tasks = matrix.shape
    rows = rng.integers(seeds, size=(resamples, seeds, tasks))
    return matrix[rows, np.arange(tasks)].reshape(resamples, -1)


def _counts(rng: np.random.Generator, seeds: int) -> NDArray[np.float64]:
    """How often each of N seeds is drawn in each resample, (RESAMPLES, N)."""
    drawn = rng.integers(seeds, size=(RESAMPLES, seeds)) + seeds * np.arange(RESAMPLES)[:, None]
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * seeds).reshape(-1, seeds).astype(float)


def _percentiles(draws: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """Both ends of the percentile interval along the first axis, shape (2, ...)."""
    _check_level(level)
    return np.asarray(np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0))


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be strictly between 0 and 1, not {level!r}; write .95")


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
    _check_level(level)
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
