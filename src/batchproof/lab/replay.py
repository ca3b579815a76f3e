"""A replay buffer on the device: one array a seed, written and read inside the compiled step.

Shapes: ``N`` capacity, ``B`` batch, ``O`` obs, ``A`` action, ``R`` rewards: one for each agent. A
row packs obs, action, rewards, terminated and next_obs side by side, so that a batch is one gather.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.lab.passes import Batch


def init(capacity: int, obs_size: int, action_size: int, rewards: int = 1) -> Array:
    """An empty buffer (N, 2 O + A + R + 1)."""
    return jnp.zeros((capacity, 2 * obs_size + action_size + rewards + 1))


def insert(
    rows: Array,
    step: Array,
    obs: Array,
    action: Array,
    reward: Array,
    next_obs: Array,
    terminated: Array,
) -> Array:
    """Write the transition of environment step ``step`` (from 0), over the oldest when full.

    Every seed inserts at each step, so the place follows from the step and is shared by all.
    ``reward`` is a scalar, or (R,) with several agents; ``terminated`` is a scalar, False for a
    mere truncation.
    """
    row = jnp.concatenate(
        [obs, action, jnp.atleast_1d(reward), terminated.astype(rows.dtype)[None], next_obs]
    )
    return jax.lax.dynamic_update_index_in_dim(rows, row, step % len(rows), axis=0)


def sample(
    rows: Array,
    key: Array,
    filled: Array,
    batch_size: int,
    obs_size: int,
    agents: int | None = None,
) -> Batch:
    """``batch_size`` transitions, uniform with replacement among the first ``filled`` rows.

    The reward is (B, agents), or (B,) where ``agents`` is None.
    """
    index = jax.random.randint(key, (batch_size,), 0, filled)
    # The index is in range by construction: no clamping needed.
    picked = rows.at[index].get(mode="promise_in_bounds")
    reward_end = rows.shape[1] - obs_size - 1
    action_end = reward_end - (agents or 1)
    return Batch(
        obs=picked[:, :obs_size],
        action=picked[:, obs_size:action_end],
        reward=picked[:, action_end] if agents is None else picked[:, action_end:reward_end],
        next_obs=picked[:, reward_end + 1 :],
        terminated=picked[:, reward_end],
    )
