"""The intervals against SciPy, hand computation, and their coverage on data whose mean is known."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from batchproof.study.statistics import (
    RESAMPLES,
    difference_interval,
    mean_interval,
    paired_difference_interval,
)

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
