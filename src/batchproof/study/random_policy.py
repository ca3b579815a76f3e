"""What a policy that acts at random gets: the lower end of a study's scale."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchproof.lab.envs import JAX_ENVS
from batchproof.lab.envs.host import EVALUATE, HostEnvs
from batchproof.lab.envs.jax_env import make


def random_returns(
    env_id: str, episodes: int, seed: int = 0, options: dict[str, Any] | None = None
) -> np.ndarray:
    """Returns (episodes,) of uniformly random actions, the same ones for the same seed.

    Args:
        env_id: as `batchproof.lab.training.Training.env_id`, of one agent.
        episodes: how many.
        seed: of episodes and actions.
        options: as `Training.env_options`, equal for all seeds; default none.
    """
    known = JAX_ENVS.get(env_id)
    if known is None:
        return _on_host(env_id, episodes, seed, options or {})
    env = make(known, options or {})
    keys = jax.random.split(jax.random.key(seed), episodes)
    # Run once: compiling fast matters more than running fast.
    quick = {"xla_backend_optimization_level": 0}
    run = jax.jit(jax.vmap(lambda key: _episode(env, key)), compiler_options=quick)
    return np.asarray(run(keys))


def _episode(env: Any, key: Array) -> Array:
    reset_key, step_key = jax.random.split(key)
    state, _ = env.reset(reset_key)

    def body(i: Array, carry: Any) -> Any:
        state, over, total = carry
        act_key, env_key = jax.random.split(jax.random.fold_in(step_key, i))
        action = jax.random.uniform(act_key, (env.action_size,), minval=-1, maxval=1)
        result = env.step(env_key, state, action)
        total = total + jnp.where(over, 0, result.reward)
        return result.state, over | result.terminated | result.truncated, total

    first = (state, jnp.asarray(False), jnp.zeros(()))
    return jax.lax.fori_loop(0, env.max_steps, body, first)[-1]


def _on_host(env_id: str, episodes: int, seed: int, options: dict[str, Any]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    envs = HostEnvs(env_id, [options], [seed], EVALUATE)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        envs.reset(episode)
        over = False
        while not over:
            result = envs.step(rng.uniform(-1, 1, (1, envs.action_size)).astype(np.float32))
            returns[episode] += result.reward[0]
            over = bool(result.ended[0])
    envs.close()
    return returns
