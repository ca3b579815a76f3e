"""Rally in JAX: two agents keep a ball in play over a net.

The rules are those of `batchproof.envs.rally`, the very same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.envs import rally
from batchproof.envs.rally import RallyState
from batchproof.lab.envs.jax_env import Step
from batchproof.lab.envs.layout import Layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rally:
    """Observations (48,), actions (4,) and rewards (2,), the left agent's first.

    The score is the better agent's return, .1 for each ball that it hit over the net.
    """

    limit: Array  # () int, steps of an episode

    layout: ClassVar[Layout] = Layout(
        rally.NAMES, (rally.OBS_SIZE,) * 2, (rally.ACTION_SIZE,) * 2, "max"
    )
    obs_size: ClassVar[int] = 2 * rally.OBS_SIZE
    action_size: ClassVar[int] = 2 * rally.ACTION_SIZE
    max_steps: ClassVar[int] = rally.EPISODE_STEPS

    @classmethod
    def make(cls, max_steps: int = rally.EPISODE_STEPS) -> Rally:
        """Build it with episodes of at most ``max_steps`` environment steps."""
        rally.check_max_steps(max_steps)
        return cls(jnp.asarray(max_steps, jnp.int32))

    def reset(self, key: Array) -> tuple[RallyState, Array]:
        """Serve."""
        state = rally.serve(jnp, jax.random.uniform(key, (6,)))
        return state, rally.observe(state).reshape(-1)

    def step(self, key: Array, state: RallyState, action: Array) -> Step:
        """Play one environment step."""
        joint = action.reshape(2, rally.ACTION_SIZE)
        state, reward, over = rally.play(jnp, state, joint, _repeat)
        return Step(
            state=state,
            obs=rally.observe(state).reshape(-1),
            reward=reward,
            terminated=over,
            truncated=~over & (state.steps >= self.limit),
        )


def _repeat(count: int, body: Callable[[Any], Any], value: Any) -> Any:
    return jax.lax.fori_loop(0, count, lambda _, value: body(value), value)
