"""Gymnasium's Pendulum-v1 in JAX: swing a pendulum up with a motor too weak to lift it at once.

Equal to Gymnasium's step by step, with its equations and its time limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.envs.options import check_whole
from batchproof.lab.envs.jax_env import Step

MAX_SPEED = 8.0  # radians per second
MAX_TORQUE = 2.0  # newton metres
DT = 0.05  # seconds per step
MASS = LENGTH = 1.0
EPISODE_STEPS = 200


class PendulumState(NamedTuple):
    """Where the pendulum is, and how long the episode has run."""

    theta: Array  # () radians, 0 is upright; it is not wrapped
    speed: Array  # () radians per second
    steps: Array  # () int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pendulum:
    """Observations [cos, sin, speed]; the reward is minus a cost of angle, speed and torque.

    An episode is truncated, never terminated. About -150 an episode is as good as it gets.
    """

    g: Array  # () metres per second squared
    limit: Array  # () int, steps of an episode

    obs_size: ClassVar[int] = 3
    action_size: ClassVar[int] = 1
    max_steps: ClassVar[int] = EPISODE_STEPS

    @classmethod
    def make(cls, g: float = 10.0, max_episode_steps: int = EPISODE_STEPS) -> Pendulum:
        """Build it with gravity ``g`` and episodes of ``max_episode_steps``.

        Raises:
            BatchproofError: episodes that are not a whole number of steps from 1 to 200.
        """
        name = "max_episode_steps of Pendulum-v1 in JAX"
        check_whole(name, max_episode_steps, EPISODE_STEPS, "for longer episodes add --host-env")
        return cls(jnp.asarray(float(g)), jnp.asarray(max_episode_steps, jnp.int32))

    def reset(self, key: Array) -> tuple[PendulumState, Array]:
        """An angle within pi and a speed within 1, uniform."""
        theta, speed = jax.random.uniform(key, (2,), minval=-1, maxval=1) * jnp.array([jnp.pi, 1])
        state = PendulumState(theta, speed, jnp.zeros((), jnp.int32))
        return state, _observe(state)

    def step(self, key: Array, state: PendulumState, action: Array) -> Step:
        """Turn the motor with ``action`` (1,), times `MAX_TORQUE`, for `DT`."""
        theta, speed, steps = state
        torque = MAX_TORQUE * jnp.clip(action[0], -1, 1)
        angle = (theta + jnp.pi) % (2 * jnp.pi) - jnp.pi
        cost = angle**2 + 0.1 * speed**2 + 0.001 * torque**2
        push = 3 * self.g / (2 * LENGTH) * jnp.sin(theta) + 3 / (MASS * LENGTH**2) * torque
        speed = jnp.clip(speed + push * DT, -MAX_SPEED, MAX_SPEED)
        moved = PendulumState(theta + speed * DT, speed, steps + 1)
        return Step(
            state=moved,
            obs=_observe(moved),
            reward=-cost,
            terminated=jnp.asarray(False),
            truncated=moved.steps >= self.limit,
        )


def _observe(state: PendulumState) -> Array:
    return jnp.stack([jnp.cos(state.theta), jnp.sin(state.theta), state.speed])
