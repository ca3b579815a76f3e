"""The constant-reward environment in JAX: nothing to see, and the reward is the action.

Equal to `batchproof.envs.ConstantRewardEnv` step by step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.envs.constant_reward import EPISODE_STEPS, check_ending
from batchproof.lab.envs.jax_env import Step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConstantReward:
    """Thirty steps of reward = action from the observation [0, 0, 0]; the best return is 30."""

    terminates: Array  # () bool: the last step is a termination, else a truncation

    obs_size: ClassVar[int] = 3
    action_size: ClassVar[int] = 1
    max_steps: ClassVar[int] = EPISODE_STEPS

    @classmethod
    def make(cls, ending: str = "terminated") -> ConstantReward:
        """Build it with episodes that end as ``terminated`` or as ``truncated``."""
        check_ending(ending)
        return cls(jnp.asarray(ending == "terminated"))

    def reset(self, key: Array) -> tuple[Array, Array]:
        """No steps done, and the only observation there is."""
        return jnp.zeros((), jnp.int32), jnp.zeros(self.obs_size)

    def step(self, key: Array, state: Any, action: Array) -> Step:
        """Pay the action."""
        steps = state + 1
        over = steps >= EPISODE_STEPS
        return Step(
            state=steps,
            obs=jnp.zeros(self.obs_size),
            reward=action[0],
            terminated=over & self.terminates,
            truncated=over & ~self.terminates,
        )
