"""dm_control's pendulum-swingup in JAX, without MuJoCo.

The equations are those of `batchproof.envs.pendulum_swingup`, the very same functions; how close
they are to dm_control's is written there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.envs import pendulum_swingup
from batchproof.envs.pendulum_swingup import EPISODE_STEPS, SwingupState
from batchproof.lab.envs.jax_env import Step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PendulumSwingup:
    """Observations [cos, sin, speed]; the reward is 1 within 8 degrees of upright, else 0.

    An episode is truncated, never terminated.
    """

    limit: Array  # () int, steps of an episode
    repeat: Array  # () int, steps that an action lasts

    obs_size: ClassVar[int] = 3
    action_size: ClassVar[int] = 1
    max_steps: ClassVar[int] = EPISODE_STEPS

    @classmethod
    def make(cls, max_steps: int = EPISODE_STEPS, repeat: int = 1) -> PendulumSwingup:
        """Build it with episodes of ``max_steps`` steps, an action for each ``repeat`` of them.

        Raises:
            BatchproofError: episodes of less than 1 or more than 1000 steps, or not a multiple of
                ``repeat``.
        """
        pendulum_swingup.check_options(max_steps, repeat)
        return cls(jnp.asarray(max_steps, jnp.int32), jnp.asarray(repeat, jnp.int32))

    def reset(self, key: Array) -> tuple[SwingupState, Array]:
        """At rest at an angle within pi, uniform."""
        theta = jax.random.uniform(key, minval=-jnp.pi, maxval=jnp.pi)
        state = SwingupState(theta, jnp.zeros(()), jnp.zeros((), jnp.int32))
        return state, pendulum_swingup.observe(jnp, state)

    def step(self, key: Array, state: SwingupState, action: Array) -> Step:
        """Turn the motor with ``action`` (1,); the reward is the sum of the steps it lasts."""

        def once(_: Array, carried: tuple[SwingupState, Array]) -> tuple[SwingupState, Array]:
            moved, reward = pendulum_swingup.move(jnp, carried[0], action[0])
            return moved, carried[1] + reward

        moved, reward = jax.lax.fori_loop(0, self.repeat, once, (state, jnp.zeros(())))
        return Step(
            state=moved,
            obs=pendulum_swingup.observe(jnp, moved),
            reward=reward,
            terminated=jnp.asarray(False),
            truncated=moved.steps >= self.limit,
        )
