"""Running observation statistics against Stable-Baselines3's, and their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stable_baselines3.common.running_mean_std import RunningMeanStd

from batchproof.lab import obs_norm

O = 3  # noqa: E741


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield


def draw(seed, *shape):
    return np.random.default_rng(seed).normal([5, -2, 0], [0.1, 1, 30], (*shape, O))


@pytest.mark.usefixtures("_float64")
def test_moments_are_stable_baselines3s():
    ours, theirs = obs_norm.init((O,)), RunningMeanStd(shape=(O,))
    for step, rows in enumerate((1, 7, 2, 100)):
        batch = draw(step, rows)
        ours = obs_norm.update(ours, jnp.asarray(batch))
        theirs.update(batch)
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-12)
        np.testing.assert_allclose(ours.var, theirs.var, rtol=1e-12)
        assert float(ours.rows) == pytest.approx(theirs.count, rel=1e-12)


@pytest.mark.usefixtures("_float64")
def test_normalized_is_what_vec_normalize_gives():
    """Its formula, with its defaults: clipped at 10, epsilon 1e-8."""
    from stable_baselines3.common.vec_env import VecNormalize

    moments, theirs = obs_norm.init((O,)), object.__new__(VecNormalize)
    theirs.epsilon, theirs.clip_obs = 1e-8, 10.0
    batch = draw(0, 50)
    rms = RunningMeanStd(shape=(O,))
    rms.update(batch)
    moments = obs_norm.update(moments, jnp.asarray(batch))
    far = np.concatenate([batch, batch + 1000, batch - 1000])
    expected = theirs._normalize_obs(far, rms)
    np.testing.assert_allclose(obs_norm.normalize(moments, jnp.asarray(far)), expected, rtol=1e-6)
    assert (np.abs(expected).max(), np.abs(expected).min() < 1) == (10, True)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("cuts", [(60,), (1, 2, 30), tuple(range(1, 60))])
def test_how_rows_are_split_does_not_matter(cuts):
    batch = draw(0, 60)
    moments = obs_norm.init((O,))
    for part in np.split(batch, [c for c in cuts if c < 60]):
        moments = obs_norm.update(moments, jnp.asarray(part))
    # The start counts as 1e-4 rows of mean 0 and variance 1.
    weight = np.r_[1e-4, np.ones(60)]
    rows = np.concatenate([np.zeros((1, O)), batch])
    mean = np.average(rows, axis=0, weights=weight)
    spread = (rows - mean) ** 2 + np.r_[1, np.zeros(60)][:, None]
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-11)
    np.testing.assert_allclose(moments.var, np.average(spread, axis=0, weights=weight), rtol=1e-11)


def test_float32_holds_over_a_hundred_thousand_steps():
    """One row at a time, means far from 0: within a thousandth of a standard deviation."""
    rows = draw(0, 100_000)
    moments, _ = jax.jit(
        lambda rows: jax.lax.scan(
            lambda m, row: (obs_norm.update(m, row[None]), None), obs_norm.init((O,)), rows
        )
    )(jnp.asarray(rows, jnp.float32))
    std = rows.std(0)
    assert np.abs((moments.mean - rows.mean(0)) / std).max() < 1e-3
    np.testing.assert_allclose(jnp.sqrt(moments.var), std, rtol=1e-3)


def test_a_constant_observation_becomes_zero():
    moments = obs_norm.init((O,))
    for _ in range(3):
        moments = obs_norm.update(moments, jnp.full((20, O), 4.0))
    assert np.abs(obs_norm.normalize(moments, jnp.full((1, O), 4.0))).max() < 0.1
