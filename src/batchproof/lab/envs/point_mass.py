"""The point mass in JAX.

Given the same draws it equals `batchproof.envs.point_mass.PointMassEnv` step by step: both use
that file's rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.envs.point_mass import (
    ACTION_SIZE,
    EPISODE_STEPS,
    OBS_SIZE,
    RADIUS,
    Moment,
    check_radius,
    move,
    observe,
    start,
)
from batchproof.lab.envs.jax_env import Step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PointMass:
    """Sixty steps to bring a mass with momentum to a goal behind a disc, and to keep it there."""

    radius: Array  # () of the disc, metres

    obs_size: ClassVar[int] = OBS_SIZE
    action_size: ClassVar[int] = ACTION_SIZE
    max_steps: ClassVar[int] = EPISODE_STEPS

    @classmethod
    def make(cls, radius: float = RADIUS) -> PointMass:
        """Build it with a disc of ``radius`` metres; 0 is none."""
        check_radius(radius)
        return cls(jnp.asarray(float(radius)))

    def reset(self, key: Array) -> tuple[Moment, Array]:
        """At rest on the left of the disc, the goal on its right."""
        moment = start(jnp, jax.random.uniform(key, (4,)))
        return moment, observe(jnp, moment)

    def step(self, key: Array, state: Moment, action: Array) -> Step:
        """Push with ``action`` (2,) for a tenth of a second."""
        moved, reward = move(jnp, state, action, self.radius)
        return Step(
            state=moved,
            obs=observe(jnp, moved),
            reward=reward,
            terminated=jnp.asarray(False),
            truncated=moved.steps >= EPISODE_STEPS,
        )
