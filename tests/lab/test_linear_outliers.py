"""The linear task with outliers: a good Gymnasium citizen, and the same one in JAX."""

from __future__ import annotations

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from batchproof.envs import register_envs
from batchproof.envs.linear_outliers import (
    BOUND,
    EPISODE_STEPS,
    VARIANCE,
    WEIGHT,
    LinearOutliersEnv,
    scales,
)
from batchproof.errors import BatchproofError
from batchproof.lab.envs import JAX_ENVS
from batchproof.lab.envs.linear_outliers import LinearOutliers

ID = "batchproof/LinearOutliers-v0"
register_envs()
ODD = {"outlier_probability": 0.3, "outlier_size": -7.0, "drift": 0.5, "shift": 2.0, "spread": 4.0}


class Recorded:
    """A generator of random numbers that writes down what an environment drew."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self.features: np.ndarray | None = None
        self.draw = 0.0

    def uniform(self, *args: float) -> np.ndarray:
        self.features = self._rng.uniform(*args)
        return self.features

    def random(self) -> float:
        self.draw = self._rng.random()
        return self.draw


@pytest.mark.parametrize("options", [{}, ODD, {"outlier_probability": 1.0, "outlier_size": 1e3}])
def test_gymnasium_s_own_checks_pass(options: dict[str, float]) -> None:
    check_env(gymnasium.make(ID, **options).unwrapped)


def test_the_jax_environment_equals_it_step_by_step_given_the_same_draws() -> None:
    assert JAX_ENVS[ID] is LinearOutliers
    env, twin = LinearOutliersEnv(**ODD), LinearOutliers.make(**ODD)
    env.reset(seed=3)
    env.np_random = recorded = Recorded(env.np_random)
    obs, _ = env.reset()
    rng = np.random.default_rng(0)
    hits = 0

    def draws() -> tuple[jax.Array, jax.Array]:
        hit = float(recorded.draw < ODD["outlier_probability"])
        return jnp.asarray(recorded.features, jnp.float32), jnp.asarray(hit)

    state, twin_obs = twin.see(*draws(), jnp.zeros((), jnp.int32))
    for step in range(1, EPISODE_STEPS + 1):
        np.testing.assert_allclose(twin_obs, obs, rtol=1e-6)
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        before = state
        obs, reward, terminated, truncated, _ = env.step(action)
        result = twin.step(jax.random.key(step), before, jnp.asarray(action))
        np.testing.assert_allclose(result.reward, reward, rtol=1e-5, atol=1e-5)
        assert (bool(result.terminated), bool(result.truncated)) == (terminated, truncated)
        assert (terminated, truncated) == (False, step == EPISODE_STEPS)
        assert result.state.steps == step
        features, hit = draws()
        hits += int(hit)
        state, twin_obs = twin.see(features, hit, before.steps + 1)
    assert 0 < hits < EPISODE_STEPS


def observations(options: dict[str, float], episodes: int = 4000) -> np.ndarray:
    """Observations (episodes, EPISODE_STEPS, O) of the JAX environment."""
    env = LinearOutliers.make(**options)

    @jax.jit
    def episode(key: jax.Array) -> jax.Array:
        state, obs = env.reset(key)
        rows = [obs]
        for t in range(1, EPISODE_STEPS):
            result = env.step(jax.random.fold_in(key, t), state, jnp.zeros(1))
            state = result.state
            rows.append(result.obs)
        return jnp.stack(rows)

    return np.asarray(jax.vmap(episode)(jax.random.split(jax.random.key(0), episodes)))


def test_outliers_and_drift_do_what_their_options_say() -> None:
    p, size, drift, shift = 0.01, 50.0, 0.25, 3.0
    options = {"outlier_probability": p, "outlier_size": size, "drift": drift, "shift": shift}
    seen = observations(options) / scales(10.0)
    far = (seen > shift + drift * EPISODE_STEPS + BOUND).all(-1)
    assert far.mean() == pytest.approx(p, rel=0.2)
    # An outlier moves all features at once, and the mean is off by p times its size.
    assert ((seen > shift + drift * EPISODE_STEPS + BOUND).any(-1) == far).all()
    clean = seen[~far]
    assert clean.std(0) == pytest.approx(
        np.sqrt(1 + drift**2 * (EPISODE_STEPS**2 - 1) / 12) * np.ones(4), rel=0.02
    )
    per_step = np.where(far[..., None], np.nan, seen)
    drifted = np.nanmean(per_step, axis=(0, 2)) - shift
    np.testing.assert_allclose(drifted, drift * np.arange(EPISODE_STEPS), atol=0.03)
    assert (seen.mean((0, 1)) - clean.mean(0)) == pytest.approx(p * size * np.ones(4), rel=0.2)


def test_reward_is_the_coefficient_of_determination() -> None:
    env = LinearOutliersEnv()
    totals = {"perfect": 0.0, "constant": 0.0}
    episodes = 400
    for name in totals:
        env.reset(seed=0)
        for _ in range(episodes):
            env.reset()
            for _ in range(EPISODE_STEPS):
                target = WEIGHT * env._features.sum()
                assert -1 <= target <= 1
                action = target if name == "perfect" else 0.0
                totals[name] += env.step(np.asarray([action], np.float32))[1]
    mean = {name: total / (episodes * EPISODE_STEPS) for name, total in totals.items()}
    assert mean["perfect"] == pytest.approx(1.0, abs=1e-5)
    assert mean["constant"] == pytest.approx(0.0, abs=0.05)
    assert pytest.approx(1 / 12) == VARIANCE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"outlier_probability": 1.5}, "outlier_probability must be in"),
        ({"outlier_size": float("nan")}, "outlier_size must be finite"),
        ({"drift": float("inf")}, "drift must be finite"),
        ({"spread": 0.0}, "spread must be positive"),
    ],
)
def test_impossible_options_raise_in_both(options: dict[str, float], words: str) -> None:
    for make in (LinearOutliersEnv, LinearOutliers.make):
        with pytest.raises(BatchproofError, match=words):
            make(**options)
