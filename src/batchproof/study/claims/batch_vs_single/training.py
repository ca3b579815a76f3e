"""Training: DDPG with a batch of environments, one population of seeds for each condition."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.lab import checkpoint, population, replay
from batchproof.lab.agents import ddpg
from batchproof.lab.envs.pendulum import Pendulum
from batchproof.lab.loop import read_metrics
from batchproof.lab.nets import Network
from batchproof.lab.training import plain
from batchproof.modes import E, Mode
from batchproof.study.claims.batch_vs_single.conditions import (
    BATCH_SIZE,
    EVALUATIONS,
    STARTS,
    Condition,
    config_of,
)
from batchproof.study.conditions import curve


class Learner(NamedTuple):
    """All that one seed carries from step to step; ``L`` environments."""

    key: Array
    agent: ddpg.State
    rows: Array
    env_state: Any  # leaves have a leading axis L
    obs: Array  # (L, O)


@dataclass(frozen=True)
class Trained:
    """A finished condition.

    Attributes:
        condition: which one.
        agents: a `ddpg.State` whose leaves have a leading axis for the seeds.
        rows: the replays, (seeds, steps, 9).
        steps: environment steps at each evaluation, (T,).
        returns: of the policy deployed alone in E, (seeds, T).
        wall_s: how long it took.
    """

    condition: Condition
    agents: Any
    rows: np.ndarray
    steps: np.ndarray
    returns: np.ndarray
    wall_s: float

    def agent(self, seed: int) -> ddpg.State:
        """One seed's agent."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[seed]), self.agents)

    def columns(self) -> dict[str, np.ndarray]:
        """Its rows of the study's metrics, one an evaluation and seed."""
        seeds = len(self.returns)
        return {
            "condition": np.full(self.returns.size, self.condition.key),
            "seed": np.tile(np.arange(seeds), len(self.steps)),
            "step": np.repeat(self.steps, seeds),
            "return": self.returns.T.ravel(),
        }


def init_learner(condition: Condition, steps: int, key: Array) -> Learner:
    """A seed before its first step."""
    env = Pendulum.make()
    agent_key, reset_key = jax.random.split(jax.random.fold_in(key, 2**31 - 2))
    agent = ddpg.init(config_of(condition), agent_key, env.obs_size, env.action_size)
    env_state, obs = jax.vmap(env.reset)(jax.random.split(reset_key, condition.num_envs))
    return Learner(key, agent, replay.init(steps, env.obs_size, env.action_size), env_state, obs)


def learn(condition: Condition, learner: Learner, first: Array, last: Array) -> Learner:
    """Vector steps ``first`` up to but not including ``last``: one update a transition."""
    env, config, count = Pendulum.make(), config_of(condition), condition.num_envs

    def body(step: Array, learner: Learner) -> Learner:
        act_key, random_key, reset_key, learn_key = jax.random.split(
            jax.random.fold_in(learner.key, step), 4
        )
        agent = learner.agent
        action, stats = ddpg.policy(config, agent.actor, learner.obs, condition.act)
        at_random = step * count < STARTS
        # In T the pass moves the actor's running statistics, as train mode does.
        stats = jax.tree.map(
            lambda old, new: jnp.where(at_random, old, new), agent.actor.stats, stats
        )
        agent = agent._replace(actor=Network(agent.actor.params, stats))
        noise = config.exploration_noise * jax.random.normal(act_key, action.shape)
        uniform = jax.random.uniform(random_key, action.shape, minval=-1, maxval=1)
        action = jnp.where(at_random, uniform, jnp.clip(action + noise, -1, 1))

        result = jax.vmap(env.step)(jax.random.split(reset_key, count), learner.env_state, action)
        ended = result.terminated | result.truncated
        fresh_state, fresh_obs = jax.vmap(env.reset)(jax.random.split(reset_key, count))
        env_state = jax.tree.map(
            lambda fresh, old: jnp.where(ended, fresh, old), fresh_state, result.state
        )
        obs = jnp.where(ended[:, None], fresh_obs, result.obs)

        def keep(i: Array, rows: Array) -> Array:
            return replay.insert(
                rows, step * count + i, learner.obs[i], action[i], result.reward[i],
                result.obs[i], result.terminated[i],
            )  # fmt: skip

        rows = jax.lax.fori_loop(0, count, keep, learner.rows)

        def improve(i: Array, agent: ddpg.State) -> ddpg.State:
            sample_key, update_key = jax.random.split(jax.random.fold_in(learn_key, i))
            batch = replay.sample(rows, sample_key, (step + 1) * count, BATCH_SIZE, env.obs_size)
            return ddpg.update(config, agent, batch, update_key, 1)[0]

        # No updates among the random actions; a loop of no turns costs nothing.
        agent = jax.lax.fori_loop(0, jnp.where(at_random, 0, count), improve, agent)
        return Learner(learner.key, agent, rows, env_state, obs)

    return jax.lax.fori_loop(first, last, body, learner)


def train_cell(
    condition: Condition, seeds: int, steps: int, out: Path, progress: bool, label: str
) -> Trained:
    """Train all seeds of a condition, or read it back from ``out/cells/KEY``."""
    vector_steps = steps // condition.num_envs
    mesh = population.mesh_for(seeds)
    numbers = population.padded(list(range(seeds)), mesh)
    init = partial(init_learner, condition, vector_steps * condition.num_envs)
    folder = out / "cells" / condition.key
    wanted = records.to_json(
        {
            "condition": condition.key, "seeds": seeds, "steps": steps, "starts": STARTS,
            "num_envs": condition.num_envs, "evaluations": EVALUATIONS,
            "config": plain(config_of(condition)),
        }
    )  # fmt: skip
    held = records.read_json(folder / "run.json") if (folder / "run.json").exists() else None
    if held is not None:
        if held.get("training") != wanted:
            raise BatchproofError(
                f"{folder} holds another run: choose another --out, or delete that folder"
            )
        like = jax.eval_shape(jax.vmap(init), population.keys(list(range(seeds))))
        _, (agents, rows), _ = checkpoint.load_checkpoint(
            folder / "checkpoint", (like.agent, like.rows)
        )
        at, returns = curve(read_metrics(folder / "metrics.parquet"), "return")
        return Trained(condition, agents, rows, at, returns, held["wall_s"])

    began = time.perf_counter()
    advance = population.over_seeds(partial(learn, condition), mesh, shared=(1, 2), donate=True)
    evaluate = population.over_seeds(partial(deployed_return, condition), mesh, rare=True)
    start = population.over_seeds(init, mesh, rare=True)
    learner = population.place(start(population.keys(numbers)), mesh)
    times = [round(vector_steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)]
    evaluated, done = [], 0
    with tqdm(total=steps, desc=label, unit=" steps", disable=not progress) as bar:
        for due in times:
            learner = advance(learner, done, due)
            evaluated.append(np.asarray(evaluate(learner))[:seeds])
            bar.set_postfix_str(f"return {evaluated[-1].mean():.4g}", refresh=False)
            bar.update((due - done) * condition.num_envs)
            done = due
    agents, rows = jax.tree.map(
        lambda leaf: np.asarray(leaf)[:seeds], (learner.agent, learner.rows)
    )
    wall_s = time.perf_counter() - began
    env_steps = np.asarray(times) * condition.num_envs
    returns = np.stack(evaluated, axis=1)
    checkpoint.save_checkpoint(folder / "checkpoint", steps, (agents, rows), {})
    records.write_columns(
        folder / "metrics.parquet",
        {
            "step": np.repeat(env_steps, seeds),
            "seed": np.tile(np.arange(seeds), len(times)),
            "return": returns.T.ravel(),
        },
    )
    records.write_json(folder / "run.json", {"training": wanted, "wall_s": wall_s})
    return Trained(condition, agents, rows, env_steps, returns, wall_s)


def deployed_return(condition: Condition, learner: Learner) -> Array:
    """Mean return of 16 episodes, each acted alone in E."""
    keys = jax.random.split(jax.random.fold_in(learner.key, 2**31 - 1), 16)
    return act_out(condition, E, 1, learner.agent.actor, keys)[1].mean()


def act_out(
    condition: Condition, mode: Mode, group: int, actor: Network, keys: Array
) -> tuple[Array, Array]:
    """Whole episodes without noise, ``group`` environments in each of the actor's passes.

    Args:
        condition: whose networks these are.
        mode: of the actor's passes.
        group: environments that share a pass.
        actor: the actor; its running statistics stay.
        keys: one an episode, (L,); ``group`` divides L.

    Returns:
        The observations acted on (steps, L, O) and the returns (L,).
    """
    env, config = Pendulum.make(), config_of(condition)
    state, obs = jax.vmap(env.reset)(keys)

    def body(carry: Any, _: None) -> Any:
        state, obs, total = carry
        groups = obs.reshape(-1, group, env.obs_size)
        action, _stats = jax.vmap(lambda x: ddpg.policy(config, actor, x, mode))(groups)
        result = jax.vmap(env.step)(keys, state, action.reshape(-1, env.action_size))
        return (result.state, result.obs, total + result.reward), obs

    last, seen = jax.lax.scan(body, (state, obs, jnp.zeros(len(keys))), length=env.max_steps)
    return seen, last[-1]
