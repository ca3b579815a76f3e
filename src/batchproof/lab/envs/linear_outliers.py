"""The linear task with outliers in JAX.

Given the same draws it equals `batchproof.envs.linear_outliers.LinearOutliersEnv` step by step:
both use that file's equations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.envs.linear_outliers import (
    BOUND,
    EPISODE_STEPS,
    FEATURES,
    check_options,
    observe,
    reward_of,
    scales,
)
from batchproof.lab.envs.jax_env import Step


class LinearState(NamedTuple):
    """What is hidden behind the observation, and how long the episode has run."""

    features: Array  # (FEATURES,)
    steps: Array  # () int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearOutliers:
    """Ten steps of telling a hidden linear function of four features, seen through bad sensors.

    The best return is 10, and 0 the best without looking at the observation.
    """

    probability: Array  # () of an outlier
    size: Array  # () of an outlier, in standard deviations
    drift: Array  # () standard deviations per step
    shift: Array  # () standard deviations
    scale: Array  # (FEATURES,)

    obs_size: ClassVar[int] = FEATURES
    action_size: ClassVar[int] = 1
    max_steps: ClassVar[int] = EPISODE_STEPS

    @classmethod
    def make(
        cls,
        outlier_probability: float = 0.0,
        outlier_size: float = 0.0,
        drift: float = 0.0,
        shift: float = 3.0,
        spread: float = 10.0,
    ) -> LinearOutliers:
        """Build it with the options of `batchproof.envs.linear_outliers.LinearOutliersEnv`."""
        check_options(outlier_probability, outlier_size, drift, shift, spread)
        return cls(
            probability=jnp.asarray(float(outlier_probability)),
            size=jnp.asarray(float(outlier_size)),
            drift=jnp.asarray(float(drift)),
            shift=jnp.asarray(float(shift)),
            scale=jnp.asarray(scales(spread)),
        )

    def reset(self, key: Array) -> tuple[LinearState, Array]:
        """First features, and what is seen of them."""
        return self.see(*self.draw(key), jnp.zeros((), jnp.int32))

    def step(self, key: Array, state: LinearState, action: Array) -> Step:
        """Pay for ``action`` (1,) and draw the next features."""
        reward = reward_of(state.features, jnp.clip(action[0], -1, 1))
        reached, obs = self.see(*self.draw(key), state.steps + 1)
        return Step(
            state=reached,
            obs=obs,
            reward=reward,
            terminated=jnp.asarray(False),
            truncated=reached.steps >= EPISODE_STEPS,
        )

    def draw(self, key: Array) -> tuple[Array, Array]:
        """Features (FEATURES,), and 1 for an outlier or 0."""
        draws = jax.random.uniform(key, (FEATURES + 1,))
        hit = (draws[FEATURES] < self.probability).astype(draws.dtype)
        return BOUND * (2 * draws[:FEATURES] - 1), hit

    def see(self, features: Array, hit: Array, steps: Array) -> tuple[LinearState, Array]:
        """The state with these ``features`` after ``steps`` steps, and its observation."""
        obs = observe(features, hit, steps, self.scale, self.size, self.drift, self.shift)
        return LinearState(features, steps), obs
