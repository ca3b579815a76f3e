"""A replay buffer on the device: one array a seed, written and read inside the compiled step.

Shapes: ``N`` capacity, ``B`` batch, ``O`` obs, ``A`` action. A row packs obs, action, reward,
next_obs and terminated side by side, so that a batch is one gather.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.lab.passes import Batch


def init(capacity: int, obs_size: int, action_size: int) -> Array:
    """An empty buffer (N, 2 O + A + 2)."""
    return jnp.zeros((capacity, 2 * obs_size + action_size + 2))


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
    ``reward`` and ``terminated`` are scalars, ``terminated`` False for a mere truncation.
    """
    row = jnp.concatenate(
        [obs, action, jnp.stack([reward, terminated.astype(rows.dtype)]), next_obs]
    )
    return jax.lax.dynamic_update_index_in_dim(rows, row, step % len(rows), axis=0)


def sample(rows: Array, key: Array, filled: Array, batch_size: int, obs_size: int) -> Batch:
    """``batch_size`` transitions, uniform with replacement among the first ``filled`` rows."""
    index = jax.random.randint(key, (batch_size,), 0, filled)
    # The index is in range by construction: no clamping needed.
    picked = rows.at[index].get(mode="promise_in_bounds")
    action_end = rows.shape[1] - obs_size - 2
    return Batch(
        obs=picked[:, :obs_size],
        action=picked[:, obs_size:action_end],
        reward=picked[:, action_end],
        next_obs=picked[:, action_end + 2 :],
        terminated=picked[:, action_end + 1],
    )
