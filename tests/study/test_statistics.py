"""Against SciPy, rliable and hand computation, and the intervals' coverage on known data.

``data/rliable.json`` is what rliable 1.2.0 says of the scores in it; see
``benchmarks/statistics_reference.py``.
"""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from batchproof.errors import BatchproofError
from batchproof.study.statistics import (
    MIN_SEEDS,
    RESAMPLES,
    average_over_training,
    compare,
    difference_interval,
    holm,
    iqm,
    iqm_curve,
    iqm_interval,
    mean_interval,
    paired_difference_interval,
    paired_test,
    performance_profile,
    probability_of_improvement,
    ranking,
    short,
    steps_to_threshold,
)

RLIABLE = json.loads((Path(__file__).parent / "data" / "rliable.json").read_text())

SKEWED = np.array([-4.5, -1.6, 0.6, 2.0, 9.4, 30.0])


def test_the_mean_is_the_mean_and_lies_within():
    mean, low, high = mean_interval([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert low < mean < high


def test_two_values_have_three_possible_resampled_means():
    # The mean of two draws from {0, 1} is 0, 1/2 or 1 with odds 1:2:1: the middle half is all 1/2.
    assert mean_interval([0.0, 1.0]) == (0.5, 0.0, 1.0)
    assert mean_interval([0.0, 1.0], level=0.4) == (0.5, 0.5, 0.5)


def test_agrees_with_scipy_bca():
    expected = stats.bootstrap(
        (SKEWED,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(3)
    ).confidence_interval
    _, low, high = mean_interval(SKEWED, seed=3)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_agrees_with_bca_written_out():
    # Efron 1987: z0 from the share below the estimate, a from the jackknife's skewness.
    draws = np.random.default_rng(0).choice(SKEWED, (200_000, SKEWED.size)).mean(axis=1)
    z0 = stats.norm.ppf(np.mean(draws < SKEWED.mean()))
    jackknife = (SKEWED.sum() - SKEWED) / (SKEWED.size - 1)
    d = jackknife.mean() - jackknife
    a = (d**3).sum() / (6 * (d**2).sum() ** 1.5)
    z = z0 + stats.norm.ppf([0.025, 0.975])
    expected = np.quantile(draws, stats.norm.cdf(z0 + z / (1 - a * z)))
    _, low, high = mean_interval(SKEWED)
    assert (low, high) == pytest.approx(expected, abs=0.5)
    # The long tail is on the right, and the interval must follow it.
    assert high - SKEWED.mean() > 1.3 * (SKEWED.mean() - low)


def test_many_normal_values_give_the_normal_interval():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    mean, low, high = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(values.size)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


@pytest.mark.parametrize(("level", "least", "most"), [(0.95, 0.89, 0.98), (0.5, 0.41, 0.57)])
def test_covers_the_true_mean_about_as_often_as_it_says(level, least, most):
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        _, low, high = mean_interval(generator.normal(3.0, 2.0, 20), level=level, seed=trial)
        hits += low <= 3.0 <= high
    assert least < hits / 300 < most


def test_the_difference_covers_the_true_difference():
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        a, b = generator.normal(30.0, 1.0, 15), generator.normal(0.0, 6.0, 25)
        _, low, high = difference_interval(a, b, seed=trial)
        hits += low <= 30.0 <= high
    assert 0.88 < hits / 200 < 0.99


def test_pairing_takes_out_what_the_seeds_share():
    generator = np.random.default_rng(2)
    seed_effect = generator.normal(0.0, 10.0, 12)
    a = seed_effect + 3.0 + generator.normal(0.0, 0.5, 12)
    b = seed_effect + generator.normal(0.0, 0.5, 12)
    paired, unpaired = paired_difference_interval(a, b), difference_interval(a, b)
    assert paired.mean == pytest.approx(unpaired.mean)
    assert paired.lo > 0.0 > unpaired.lo
    assert (paired.hi - paired.lo) * 5 < unpaired.hi - unpaired.lo


def test_a_paired_difference_is_the_interval_of_the_differences():
    a, b = SKEWED, SKEWED[::-1] / 2
    assert paired_difference_interval(a, b, seed=4) == mean_interval(a - b, seed=4)


def test_swapping_the_sides_flips_the_sign():
    b = SKEWED[:4] + 20.0
    forward, backward = difference_interval(SKEWED, b), difference_interval(b, SKEWED)
    assert forward.mean == -backward.mean
    # Different resamples are drawn, hence the tolerance.
    assert (forward.lo, forward.hi) == pytest.approx((-backward.hi, -backward.lo), abs=1.0)


@pytest.mark.parametrize("values", [[30.0, 30.0, 30.0], [0.1] * 7, [0, 0]])
def test_equal_values_have_an_interval_of_width_zero(values):
    mean, low, high = mean_interval(values)
    assert mean == low == high == pytest.approx(values[0])
    assert difference_interval(values, values) == (0.0, 0.0, 0.0)
    assert paired_difference_interval(values, values) == (0.0, 0.0, 0.0)


def test_one_constant_side_leaves_the_spread_of_the_other():
    mean, low, high = difference_interval([30.0, 30.0, 30.0], [0.0, 1.0, 2.0])
    assert mean == 29.0
    assert 28.0 <= low < 29.0 < high <= 30.0


def test_one_seed_has_no_interval():
    mean, low, high = mean_interval([4.0])
    assert mean == 4.0
    assert math.isnan(low)
    assert math.isnan(high)
    assert math.isnan(difference_interval([1.0, 2.0], [0.0]).lo)
    assert math.isnan(paired_difference_interval([1.0], [0.0]).hi)


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    assert mean_interval(SKEWED, seed=1) == mean_interval(SKEWED, seed=1)
    assert mean_interval(SKEWED, seed=1) != mean_interval(SKEWED, seed=2)
    assert (np.random.get_state()[1] == before).all()


def test_units_and_offsets_pass_through():
    mean, low, high = mean_interval(SKEWED)
    scaled = mean_interval(10.0 * SKEWED + 5.0)
    assert scaled == pytest.approx((10 * mean + 5, 10 * low + 5, 10 * high + 5))


def test_a_wider_level_is_wider():
    narrow, wide = mean_interval(SKEWED, level=0.8), mean_interval(SKEWED, level=0.99)
    assert wide.lo < narrow.lo < narrow.hi < wide.hi


@pytest.mark.parametrize(
    "values", [[1.0, 1.0, 1.0, 1.0 + 1e-15], [0.0, 0.0, 0.0, 1e-300], [5.0, 5.0, 5.0, -5.0]]
)
def test_nearly_equal_values_warn_of_nothing(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, low, high = mean_interval(values)
        difference_interval(values, [1.0, 1.0])
    assert low <= mean <= high


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "values is empty"),
        ([1.0, float("nan"), 2.0], "not finite at index 1"),
        ([1.0, float("inf")], "not finite at index 1"),
        ([1.0, None], "not finite at index 1"),
        ([[1.0, 2.0]], r"shape \(n_seeds,\)"),
        (3.0, r"shape \(n_seeds,\)"),
        (["a"], "one number per seed"),
    ],
)
def test_bad_values_are_named(values, says):
    with pytest.raises(ValueError, match=says):
        mean_interval(values)


def test_bad_sides_are_named():
    with pytest.raises(ValueError, match="b is empty"):
        difference_interval([1.0], [])
    with pytest.raises(ValueError, match="a is not finite"):
        paired_difference_interval([float("nan")], [1.0])
    with pytest.raises(ValueError, match="use difference_interval"):
        paired_difference_interval([1.0, 2.0], [1.0])


@pytest.mark.parametrize("level", [0.0, 1.0, 95, -0.5, float("nan")])
def test_a_level_outside_zero_to_one_is_refused(level):
    with pytest.raises(ValueError, match="level"):
        mean_interval([1.0, 2.0], level=level)


# --- interquartile mean, improvement, profiles ---------------------------------------------------


@pytest.mark.parametrize(
    ("key", "scores"),
    [
        ("iqm_a", RLIABLE["a"]),
        ("iqm_b", RLIABLE["b"]),
        ("iqm_one_task", [row[2] for row in RLIABLE["a"]]),
    ],
)
def test_the_interquartile_mean_agrees_with_rliable(key, scores):
    mine, theirs = iqm_interval(scores), RLIABLE[key]
    assert mine.mean == iqm(scores) == pytest.approx(theirs["estimate"][0], rel=1e-12)
    # Both ends are percentiles of other resamples of the same distribution.
    assert (mine.lo, mine.hi) == pytest.approx((theirs["lo"][0], theirs["hi"][0]), abs=0.012)


def test_resampling_within_tasks_is_narrower_than_over_all_runs():
    # Tasks a hundred apart: only a bootstrap that keeps each task's share ignores that.
    scores = np.array([0.0, 100.0, 200.0, 300.0]) + np.random.default_rng(0).normal(0, 1, (8, 4))
    stratified, pooled = iqm_interval(scores), iqm_interval(scores.ravel())
    assert stratified.mean == pooled.mean
    assert stratified.hi - stratified.lo < 2.0 < 20.0 < pooled.hi - pooled.lo


def test_the_interquartile_mean_by_hand():
    assert iqm([100.0, 2.0, 3.0, -50.0]) == 2.5
    assert iqm([1.0, 2.0, 3.0, 4.0, 1000.0]) == 3.0  # one left out at each end
    assert iqm([1.0, 2.0, 6.0]) == 3.0  # none left out
    for count in range(1, 20):
        values = np.random.default_rng(count).normal(size=count)
        assert iqm(values) == pytest.approx(stats.trim_mean(values, 0.25), rel=1e-12)


def test_an_iqm_curve_is_the_iqm_at_each_evaluation():
    values = np.random.default_rng(3).normal(size=(9, 4)) * [1.0, 2.0, 3.0, 0.0]
    estimate, low, high = iqm_curve(values, resamples=4000)
    for t in range(4):
        alone = iqm_interval(values[:, t])
        assert estimate[t] == pytest.approx(alone.mean)
        assert (low[t], high[t]) == pytest.approx((alone.lo, alone.hi), abs=0.15)
    assert low[3] == high[3] == 0.0


def test_improvement_agrees_with_rliable_and_mann_whitney():
    a, b = np.array(RLIABLE["a"]), np.array(RLIABLE["b"])
    mine, theirs = probability_of_improvement(a, b), RLIABLE["improvement"]
    assert mine.mean == pytest.approx(theirs["estimate"][0], rel=1e-12)
    assert (mine.lo, mine.hi) == pytest.approx((theirs["lo"][0], theirs["hi"][0]), abs=0.012)
    statistic = stats.mannwhitneyu(a[:, 0], b[:, 0]).statistic
    assert probability_of_improvement(a[:, 0], b[:, 0]).mean == pytest.approx(statistic / 80)


def test_improvement_by_hand_and_turned_around():
    assert probability_of_improvement([3.0, 4.0], [1.0, 2.0]) == (1.0, 1.0, 1.0)
    assert probability_of_improvement([1.0, 1.0], [1.0, 1.0]).mean == 0.5
    assert probability_of_improvement([1.0, 3.0], [2.0, 2.0]).mean == 0.5
    forward = probability_of_improvement(SKEWED, SKEWED[:3]).mean
    assert forward + probability_of_improvement(SKEWED[:3], SKEWED).mean == pytest.approx(1.0)


def test_profiles_agree_with_rliable():
    share, low, high = performance_profile(RLIABLE["a"], RLIABLE["thresholds"])
    theirs = RLIABLE["profile_a"]
    assert share == pytest.approx(theirs["estimate"], rel=1e-12)
    assert low == pytest.approx(theirs["lo"], abs=0.021)  # one run of 50 more or less
    assert high == pytest.approx(theirs["hi"], abs=0.021)


def test_a_profile_counts_runs_strictly_above():
    assert performance_profile([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 4.0])[0].tolist() == [1.0, 0.5, 0.0]


def test_one_seed_has_estimates_without_intervals():
    assert np.isnan(iqm_interval([[1.0, 2.0]])[1:]).all()
    assert np.isnan(iqm_curve([[1.0, 2.0]])[1:]).all()
    assert np.isnan(performance_profile([1.0], [0.0])[1:]).all()
    assert np.isnan(probability_of_improvement([1.0], [0.0, 1.0])[1:]).all()


@pytest.mark.parametrize("function", [iqm, iqm_interval, iqm_curve])
@pytest.mark.parametrize("values", [[], [[]], [[[1.0]]], [1.0, float("nan")]])
def test_unusable_scores_are_refused(function, values):
    with pytest.raises(ValueError, match=r"scores|values"):
        function(values)


def test_unequal_tasks_are_refused():
    with pytest.raises(ValueError, match="a has 2 tasks and b has 1"):
        probability_of_improvement([[1.0, 2.0]], [[1.0]])


# --- learning curves -----------------------------------------------------------------------------


def test_the_average_over_training_by_hand():
    # 0 -> 10 over 10 steps, then 10 for 30 more: area 50 + 300 over 40 steps.
    assert average_over_training([0, 10, 40], [[0.0, 10.0, 10.0]]).tolist() == [8.75]
    assert average_over_training([5], [[3.0], [4.0]]).tolist() == [3.0, 4.0]
    assert math.isnan(average_over_training([0, 1], [[0.0, math.nan]])[0])


def _reaching(times, last):
    """Steps 1..last, and curves that are 1 from their time on, 0 before."""
    steps = np.arange(1, last + 1)
    return steps, (steps >= np.asarray(times, dtype=float)[:, None]).astype(float)


def test_steps_to_a_threshold_that_all_reach():
    found = steps_to_threshold(*_reaching([3, 1, 7, 5, 9], 10), 1.0)
    assert found.steps.tolist() == [3, 1, 7, 5, 9]
    assert (found.reached, found.median) == (5, 5)
    assert found.lo < 5 < found.hi


def test_a_seed_that_never_reaches_it_counts_as_late():
    found = steps_to_threshold(*_reaching([3, 1, 99, 99, 2], 10), 0.5)
    assert (found.reached, found.median, found.hi) == (3, 3, math.inf)
    # Left out, the two would have made it 2.
    assert np.isinf(found.steps[2:4]).all()
    assert steps_to_threshold(*_reaching([3, 99, 99, 99, 2], 10), 0.5).median == math.inf
    none = steps_to_threshold(*_reaching([99, 99], 10), 0.5)
    assert (none.reached, none.median, none.hi) == (0, math.inf, math.inf)


def test_the_median_and_its_interval_are_kaplan_and_meiers():
    # Greenwood's variance written out; the interval holds each step whose log-log band holds 1/2.
    times = np.array([2, 3, 3, 5, 6, 8, 9, 99, 99, 99], dtype=float)
    found = steps_to_threshold(*_reaching(times, 20), 1.0)
    events = np.unique(times[times < 99])
    survival, hazard, inside = 1.0, 0.0, []
    for t in events:
        at_risk, deaths = (times >= t).sum(), (times == t).sum()
        survival *= 1 - deaths / at_risk
        hazard += deaths / (at_risk * (at_risk - deaths))
        width = 1.96 * math.sqrt(hazard) / abs(math.log(survival))
        low, high = survival ** math.exp(width), survival ** math.exp(-width)
        inside.append((t, low <= 0.5, high <= 0.5))
    assert found.median == 6  # five of ten by step 6
    assert found.lo == next(t for t, low, _ in inside if low)
    assert found.hi == next((t for t, _, high in inside if high), math.inf)


def test_the_median_interval_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    steps = np.arange(1, 121)
    hits = 0
    for _ in range(300):
        times = rng.exponential(100.0, 30)  # censored at 120: a third never arrives
        found = steps_to_threshold(steps, (steps >= times[:, None]).astype(float), 1.0)
        hits += found.lo <= 100.0 * math.log(2) + 1 and found.hi >= 100.0 * math.log(2)
    assert 0.90 < hits / 300 < 0.99


def test_reaching_it_after_diverging_does_not_count():
    found = steps_to_threshold([1, 2, 3], [[0.0, math.nan, 9.0], [0.0, 9.0, math.nan]], 5.0)
    assert found.steps.tolist() == [math.inf, 2.0]


def test_curves_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="rise"):
        average_over_training([1, 1], [[0.0, 1.0]])
    with pytest.raises(ValueError, match=r"shape \(n_seeds, 2\)"):
        steps_to_threshold([1, 2], [[0.0]], 1.0)


# --- tests and comparisons -----------------------------------------------------------------------


def test_paired_tests_are_scipys():
    a, b = SKEWED, SKEWED[::-1] / 2 + [0.0, 1.0, 0.5, 0.25, 0.1, 0.7]
    assert paired_test(a, b) == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-12)
    assert paired_test(a, b, "wilcoxon") == stats.wilcoxon(a, b).pvalue


def test_differences_without_spread_get_the_chance_of_equal_signs():
    assert paired_test([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert paired_test([1.1, 2.1, 3.1, 4.1], [0.1, 1.1, 2.1, 3.1]) == 0.125


def test_the_paired_test_is_wrong_as_often_as_it_says():
    rng = np.random.default_rng(0)
    wrong = sum(
        paired_test(*(rng.normal(size=(2, 5)) + rng.normal(size=5))) < 0.05 for _ in range(2000)
    )
    assert 0.035 < wrong / 2000 < 0.065


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1 is .04 .06 .06 .04, then never falling.
    assert holm([0.03, 0.01, 0.04, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_holm_lies_between_no_correction_and_bonferroni_and_rejects_no_less():
    p = np.random.default_rng(0).uniform(0, 0.2, 20)
    corrected = holm(p)
    assert (corrected >= p).all()
    assert (corrected <= np.minimum(20 * p, 1.0) + 1e-12).all()
    assert corrected.min() == pytest.approx(20 * p.min())


def test_holm_agrees_with_the_closed_test_of_bonferroni():
    # Holm's step-down is the closure of Bonferroni's test: p of a set is m min p, and a hypothesis
    # gets the largest p over all sets that hold it.
    from itertools import combinations

    p = np.array([0.03, 0.004, 0.2, 0.012])
    every = [s for size in range(1, 5) for s in combinations(range(4), size)]
    closed = [max(min(1.0, len(s) * p[list(s)].min()) for s in every if i in s) for i in range(4)]
    assert holm(p) == pytest.approx(closed)


@pytest.mark.parametrize("values", [[0.5, 1.5], [-0.1], []])
def test_holm_refuses_what_is_no_probability(values):
    with pytest.raises(ValueError, match="p_values"):
        holm(values)


def _seeds(values):
    return dict(enumerate(values))


def test_comparisons_say_higher_lower_and_not_told_apart():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 5, 8)
    base = _seeds(shared)
    better = _seeds(shared + 10 + rng.normal(0, 1, 8))
    same = _seeds(shared + rng.normal(0, 1, 8))
    up, down, level = compare(
        [("A", better, "B", base), ("B", base, "A", better), ("C", same, "B", base)]
    )
    assert (up.verdict, down.verdict, level.verdict) == ("higher", "lower", "not told apart")
    assert up.sentence.startswith("A is higher than B: mean ")
    assert "8 shared seeds" in up.sentence
    assert level.sentence.startswith("C and B are not told apart")
    ps = [stats.ttest_rel(*[list(x.values()) for x in pair]).pvalue
          for pair in [(better, base), (base, better), (same, base)]]  # fmt: skip
    assert [c.p for c in (up, down, level)] == pytest.approx(ps)
    assert [c.p_holm for c in (up, down, level)] == pytest.approx(holm(ps).tolist())


def test_many_comparisons_ask_for_more_evidence():
    a, b = _seeds([1.0, 2.0, 3.0, 4.0, 5.5]), _seeds([0.5, 1.7, 2.2, 3.9, 4.7])
    assert compare([("a", a, "b", b)])[0].verdict == "higher"
    assert compare([("a", a, "b", b)] * 10)[0].verdict == "not told apart"


def test_pairs_are_matched_by_seed_and_not_by_order():
    a = {3: 30.0, 1: 10.0, 2: 20.0, 7: 71.0, 5: 52.0, 4: 40.5}
    b = {seed: value - 1.0 - seed / 100 for seed, value in sorted(a.items())} | {99: -1e9}
    found = compare([("a", a, "b", b)])[0]
    assert (found.seeds, found.verdict) == (6, "higher")
    assert found.difference.mean == pytest.approx(1.0 + 22 / 600)


def test_too_few_seeds_are_neither_tested_nor_ranked():
    few = _seeds([1.0, 2.0, 3.0, 4.0])
    enough = _seeds([9.0, 9.5, 8.0, 9.2, 9.9])
    found = compare([("few", few, "enough", enough), ("enough", enough, "few", few)])[0]
    assert found.verdict == "too few seeds"
    assert math.isnan(found.p_holm)
    assert "cannot be ranked on 4 shared seeds (5 are needed)" in found.sentence
    with pytest.raises(BatchproofError, match="few has 4, and it takes 5"):
        ranking({"few": list(few.values()), "enough": list(enough.values())})
    assert MIN_SEEDS == 5


def test_too_few_seeds_do_not_count_among_the_tests():
    a, b = _seeds(SKEWED), _seeds(SKEWED - np.arange(6.0))
    few = _seeds([1.0, 2.0])
    both = compare([("a", a, "b", b), ("a", a, "few", few)])
    assert both[0].p_holm == both[0].p


def test_a_ranking_is_by_interquartile_mean():
    # One wild seed lifts b's mean above a's, not its interquartile mean.
    a, b, c = [5.0] * 8, [3.0] * 7 + [100.0], [4.0] * 8
    found = ranking({"b": b, "a": a, "c": c})
    assert [name for name, _ in found] == ["a", "c", "b"]
    assert found[0][1] == iqm_interval(a)


def test_conditions_without_a_common_seed_are_refused():
    with pytest.raises(ValueError, match="share no seed"):
        compare([("a", {0: 1.0}, "b", {1: 1.0})])


@pytest.mark.parametrize(
    ("value", "text"),
    [(12893.4, "12,890"), (-1.23456, "−1.235"), (0.0, "0"), (-1e-12, "−1e−12"),
     (999.96, "1,000"), (math.inf, "none"), (math.nan, "unknown")],
)  # fmt: skip
def test_numbers_in_sentences_are_short(value, text):
    assert short(value) == text
