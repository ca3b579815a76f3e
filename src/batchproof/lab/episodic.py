"""Episodic stepping: collect a batch of whole episodes, learn from it once, for all seeds at once.

The ``episodes_per_update`` episodes of a batch run side by side, each in an environment of its
own, for as many steps as the longest possible episode has. Where one ends early, its environment
starts anew: those further steps fill the batch that a norm may take statistics from, and no loss
counts them. So a batch always costs ``episodes_per_update`` times the longest episode in
environment steps, and this is what is counted: exact where all episodes are equally long. A run's
``steps``, and the steps between evaluations, are rounded up to whole batches.

With an environment written in JAX everything from one evaluation to the next is one compiled call;
a Gymnasium environment takes one compiled call per step for all episodes of all seeds.

Every batch starts at fresh environments, so a checkpoint between two batches holds no episode.

Shapes: ``P`` population, ``S`` steps, ``N`` episodes of a batch, ``O`` obs, ``A`` action.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchproof.errors import BatchproofError
from batchproof.lab import checkpoint, population
from batchproof.lab.agents.reinforce import Episodes
from batchproof.lab.envs import JAX_ENVS, host
from batchproof.lab.envs.host import EVALUATE, TRAIN, HostEnvs
from batchproof.lab.envs.jax_env import make, stacked
from batchproof.lab.envs.layout import layout_of
from batchproof.lab.training import NOT_DIVERGED, Training, check_agents
from batchproof.modes import E, Mode, Plan, Slot

EVALUATION = 2**31 - 1  # keys of updates are smaller
INIT = 2**31 - 2


class Seed(NamedTuple):
    """All that one seed's run carries from batch to batch."""

    key: Array  # never changes: each batch derives its own
    agent: Any
    env: Any  # the JAX environment's parameters, () on the host
    sums: dict[str, Array]  # of each metric since the last evaluation
    counts: Array  # () updates since then
    diverged_at: Array  # () environment step, or NOT_DIVERGED


def alone(training: Training) -> Training:
    """The same agent acting alone: in mode ``E``, on one observation, as a deployed policy does.

    Where slot 0 skips the norm it stays skipped.
    """
    return _acting(training, training.config.plan[Slot.ACT] if _bypass(training) else E)


def together(training: Training) -> Training:
    """The same agent acting in slot 0's own mode, with the running statistics left alone."""
    mode = training.config.plan[Slot.ACT]
    return _acting(training, Mode(mode.letter.lower()) if mode.updates else mode)


def _bypass(training: Training) -> bool:
    return training.config.plan[Slot.ACT].bypass


def _acting(training: Training, mode: Mode) -> Training:
    plan = Plan((mode, *training.config.plan.modes[1:]))
    return replace(training, config=replace(training.config, plan=plan))


def to_env(action: Array) -> Array:
    """What an environment gets for a sampled action: it is clipped, and a NaN becomes 0."""
    return jnp.clip(jnp.nan_to_num(action), -1, 1)


def collect(training: Training, env: Any, agent: Any, key: Array) -> tuple[Any, Episodes]:
    """A batch of episodes in a JAX environment, and the agent after acting in it."""
    reset_key, act_key, step_key = jax.random.split(key, 3)
    count = training.config.episodes_per_update
    first_state, first_obs = jax.vmap(env.reset)(jax.random.split(reset_key, count))

    def step(carry: Any, t: Array) -> Any:
        agent, env_state, obs, alive = carry
        action, mean, agent = training.agent.act(
            training.config, agent, obs, jax.random.fold_in(act_key, t), explore=True
        )
        keys = jax.random.split(jax.random.fold_in(step_key, t), count)
        result = jax.vmap(env.step)(keys, env_state, to_env(action))
        row = Episodes(obs, action, mean, result.reward, alive)
        ended = result.terminated | result.truncated

        def start_over(first: Array, reached: Array) -> Array:
            return jnp.where(ended.reshape(-1, *[1] * (reached.ndim - 1)), first, reached)

        env_state = jax.tree.map(start_over, first_state, result.state)
        return (agent, env_state, start_over(first_obs, result.obs), alive * ~ended), row

    start: Any = (agent, first_state, first_obs, jnp.ones(count))
    (agent, *_), episodes = jax.lax.scan(step, start, jnp.arange(env.max_steps))
    return agent, episodes


def learn(training: Training, seed: Seed, episodes: Episodes, done: Array) -> Seed:
    """One update; ``done`` environment steps are then behind this seed."""
    agent, metrics = training.agent.update(training.config, seed.agent, episodes, seed.key, 0)
    newly = (seed.diverged_at == NOT_DIVERGED) & ~jnp.isfinite(metrics["loss"])
    return seed._replace(
        agent=agent,
        sums={name: seed.sums[name] + value for name, value in metrics.items()},
        counts=seed.counts + 1,
        diverged_at=jnp.where(newly, done, seed.diverged_at),
    )


def run_in_jax(training: Training, seed: Seed, first: Array, last: Array) -> Seed:
    """Updates ``first`` up to but not including ``last``, in one compiled loop."""
    steps = training.config.episodes_per_update * seed.env.max_steps

    def batch(number: Array, seed: Seed) -> Seed:
        key = jax.random.fold_in(seed.key, number)
        agent, episodes = collect(training, seed.env, seed.agent, key)
        return learn(training, seed._replace(agent=agent), episodes, (number + 1) * steps)

    return jax.lax.fori_loop(first, last, batch, seed)


def evaluate_in_jax(training: Training, seed: Seed) -> Array:
    """Returns (eval_episodes,) of deterministic episodes side by side, the same ones every time."""
    reset_key, step_key = jax.random.split(jax.random.fold_in(seed.key, EVALUATION))
    count = training.eval_episodes
    env_state, obs = jax.vmap(seed.env.reset)(jax.random.split(reset_key, count))

    def body(t: Array, carry: Any) -> Any:
        env_state, obs, alive, total = carry
        action, _, _ = training.agent.act(training.config, seed.agent, obs, step_key, explore=False)
        keys = jax.random.split(jax.random.fold_in(step_key, t), count)
        result = jax.vmap(seed.env.step)(keys, env_state, to_env(action))
        ended = result.terminated | result.truncated
        return result.state, result.obs, alive * ~ended, total + alive * result.reward

    start = (env_state, obs, jnp.ones(count), jnp.zeros(count))
    return jax.lax.fori_loop(0, seed.env.max_steps, body, start)[-1]


def init_seed(training: Training, key: Array, env: Any, obs_size: int, action_size: int) -> Seed:
    """A seed before its first batch."""
    agent = training.agent.init(
        training.config, jax.random.fold_in(key, INIT), obs_size, action_size
    )
    shape = (1, training.config.episodes_per_update)
    actions = jnp.zeros((*shape, action_size))
    batch = Episodes(
        jnp.zeros((*shape, obs_size)), actions, actions, jnp.zeros(shape), jnp.ones(shape)
    )
    names = jax.eval_shape(lambda: training.agent.update(training.config, agent, batch, key, 0)[1])
    return Seed(
        key=key,
        agent=agent,
        env=env,
        sums={name: jnp.zeros(()) for name in names},
        counts=jnp.zeros((), jnp.int32),
        diverged_at=jnp.asarray(NOT_DIVERGED, jnp.int32),
    )


class Stepper:
    """All seeds of a run in memory: compiled functions, environments, and how far they are.

    Attributes:
        step: environment steps done by each seed, whole batches.
        seed: a `Seed` whose leaves have a leading axis P.
        steps_per_update: environment steps of a batch.
        layout: None, for these agents are alone.
    """

    layout = None  # one agent

    def __init__(self, training: Training) -> None:
        """Build environments and policies; nothing is compiled yet.

        Raises:
            BatchproofError: the environment has no longest episode, or several agents.
        """
        self.training = training
        self.mesh = population.mesh_for(len(training.seeds))
        # Padding copies the last seed; its rows are dropped wherever results are read.
        self.seeds = population.padded(list(training.seeds), self.mesh)
        last = len(training.seeds) - 1
        options = [training.options_of(min(i, last)) for i in range(len(self.seeds))]
        self._envs: HostEnvs | None = None
        self._eval_envs: HostEnvs | None = None
        jax_env = None if training.host_env else JAX_ENVS.get(training.env_id)
        if jax_env is not None:
            env: Any = stacked([make(jax_env, option) for option in options])
            check_agents(training, layout_of(jax_env))
            self.obs_size, self.action_size = env.obs_size, env.action_size
            self.max_steps = env.max_steps
        else:
            env = ()
            self.max_steps = _longest_episode(training.env_id, options)
            count = training.config.episodes_per_update
            self._envs = self._host(options, count, TRAIN)
            self._eval_envs = self._host(options, training.eval_episodes, EVALUATE)
            self.obs_size, self.action_size = self._envs.obs_size, self._envs.action_size
            check_agents(training, self._envs.layout)
        self.steps_per_update = training.config.episodes_per_update * self.max_steps
        self._compile()
        self.step = 0
        self.seed = population.place(self._init(population.keys(self.seeds), env), self.mesh)

    def _host(self, options: list[dict[str, Any]], count: int, purpose: int) -> HostEnvs:
        """``count`` environments a seed, side by side, each with a seed of its own."""
        return HostEnvs(
            self.training.env_id,
            [option for option in options for _ in range(count)],
            [seed + (i << 32) for seed in self.seeds for i in range(count)],
            purpose,
        )

    def _compile(self) -> None:
        training, mesh = self.training, self.mesh
        over_seeds = population.over_seeds
        self._has_together = training.config.plan[Slot.ACT].uses_batch and (
            training.eval_episodes > 1
        )

        def act(acting: Training, explore: bool) -> Callable[..., Any]:
            def choose(agent: Any, obs: Array, key: Array, update: Array, t: Array) -> Any:
                key = jax.random.fold_in(jax.random.fold_in(key, update), t)
                action, mean, agent = acting.agent.act(
                    acting.config, agent, obs, key, explore=explore
                )
                return agent, action, mean, to_env(action)

            return over_seeds(choose, mesh, shared=(3, 4))

        self._init = over_seeds(
            lambda key, env: init_seed(training, key, env, self.obs_size, self.action_size),
            mesh,
            rare=True,
        )
        self._run_in_jax = over_seeds(
            lambda seed, first, last: run_in_jax(training, seed, first, last),
            mesh,
            shared=(1, 2),
            donate=True,
        )
        self._learn = over_seeds(
            lambda seed, episodes, done: learn(training, seed, episodes, done), mesh, shared=(2,)
        )
        self._act = act(training, True)
        self._evaluate_in_jax = {
            kind: over_seeds(
                lambda seed, acting=acting: evaluate_in_jax(acting, seed), mesh, rare=True
            )
            for kind, acting in (("alone", alone(training)), ("together", together(training)))
        }
        self._evaluate_act = {
            "alone": act(alone(training), False),
            "together": act(together(training), False),
        }

    def close(self) -> None:
        """Close the host's environments."""
        for envs in (self._envs, self._eval_envs):
            if envs is not None:
                envs.close()

    def advance(self, last: int, done: Callable[[int], Any] = lambda steps: None) -> None:
        """Run whole batches until at least ``last`` environment steps are done.

        ``done`` is told how many just were.
        """
        first = self.step // self.steps_per_update
        updates = math.ceil(last / self.steps_per_update)
        if self._envs is None:
            self.seed = self._run_in_jax(self.seed, first, updates)
            jax.block_until_ready(self.seed.diverged_at)
            done((updates - first) * self.steps_per_update)
        else:
            for number in range(first, updates):
                episodes = self._collect_on_host(number)
                steps = (number + 1) * self.steps_per_update
                self.seed = self._learn(self.seed, episodes, steps)
                done(self.steps_per_update)
        self.step = updates * self.steps_per_update

    def _collect_on_host(self, number: int) -> Episodes:
        """The episodes of update ``number``, (P, S, N, ...) each."""
        assert self._envs is not None
        seeds, count = len(self.seeds), self.training.config.episodes_per_update
        # No two updates share an episode's number: an episode has at least one step.
        obs = self._envs.reset(number * self.max_steps)
        agent, alive = self.seed.agent, np.ones(seeds * count, np.float32)
        rows = []
        for t in range(self.max_steps):
            shaped = obs.reshape(seeds, count, -1)
            agent, action, mean, sent = self._act(agent, shaped, self.seed.key, number, t)
            result = self._envs.step(np.asarray(sent).reshape(seeds * count, -1))
            reward, running = result.reward.reshape(seeds, count), alive.reshape(seeds, count)
            rows.append((shaped, np.asarray(action), np.asarray(mean), reward, running))
            alive = alive * ~result.ended
            obs = result.obs
        self.seed = self.seed._replace(agent=agent)
        columns: Any = (np.stack(column, axis=1) for column in zip(*rows, strict=True))
        return Episodes(*columns)

    def evaluate(self) -> np.ndarray:
        """Returns (P, eval_episodes) of deterministic episodes, the policy acting `alone`."""
        return self._returns("alone")

    def _returns(self, kind: str) -> np.ndarray:
        if self._eval_envs is None:
            return np.asarray(self._evaluate_in_jax[kind](self.seed))
        shape = len(self.seeds), self.training.eval_episodes
        obs = self._eval_envs.reset(0)
        alive, returns = np.ones(math.prod(shape)), np.zeros(math.prod(shape))
        while alive.any():
            shaped = obs.reshape(*shape, -1)
            *_, sent = self._evaluate_act[kind](self.seed.agent, shaped, self.seed.key, 0, 0)
            result = self._eval_envs.step(np.asarray(sent).reshape(len(alive), -1))
            returns += alive * result.reward
            alive = alive * ~result.ended
            obs = result.obs
        return returns.reshape(shape)

    def measure(self) -> dict[str, np.ndarray]:
        """Means of the updates' metrics since the last call: (P,) each.

        Where slot 0 uses the batch, also ``return_together``: the mean return of the evaluation's
        episodes when they act side by side in slot 0's mode.
        """
        counts = np.asarray(self.seed.counts)
        with np.errstate(invalid="ignore"):  # no update yet: 0 / 0 is NaN
            measured = {name: np.asarray(v) / counts for name, v in self.seed.sums.items()}
        if self._has_together:
            measured["return_together"] = self._returns("together").mean(1)
        zeros = jax.tree.map(jnp.zeros_like, (self.seed.sums, self.seed.counts))
        self.seed = self.seed._replace(sums=zeros[0], counts=zeros[1])
        return measured

    def diverged_at(self) -> np.ndarray:
        """The environment step of each seed's divergence or `NOT_DIVERGED`, (P,)."""
        return np.asarray(self.seed.diverged_at)

    def save(self, folder: Path) -> None:
        """Write a checkpoint from which `restore` continues exactly."""
        checkpoint.save_checkpoint(folder, self.step, self.seed, {})

    def save_agents(self, folder: Path) -> None:
        """Write a checkpoint of the agents alone: a finished run has nothing to resume."""
        tree = {"agent": self.seed.agent, "diverged_at": self.seed.diverged_at}
        checkpoint.save_checkpoint(folder, self.step, tree, {})

    def restore(self, folder: Path) -> None:
        """Continue at the checkpoint in ``folder``.

        Raises:
            BatchproofError: it is damaged or another run's.
        """
        state = checkpoint.read_state(folder)
        if state is not None and state["step"] >= self.training.steps:
            # A finished run, or one killed just before its record said so.
            last = {"agent": self.seed.agent, "diverged_at": self.seed.diverged_at}
            self.step, loaded, _ = checkpoint.load_checkpoint(folder, last)
            self.seed = self.seed._replace(**population.place(loaded, self.mesh))
            return
        self.step, loaded, _ = checkpoint.load_checkpoint(folder, self.seed)
        self.seed = population.place(loaded, self.mesh)


def _longest_episode(env_id: str, options: list[dict[str, Any]]) -> int:
    """The time limit of a Gymnasium environment, the largest over its ``options``.

    Raises:
        BatchproofError: it has none.
    """
    longest = 0
    # An option's value may be a list, which has no hash.
    for option in {json.dumps(o, sort_keys=True, default=str): o for o in options}.values():
        env: gymnasium.Env = host.make(env_id, option)
        limit = env.spec.max_episode_steps if env.spec else None
        if limit is None and env_id in JAX_ENVS:
            limit = JAX_ENVS[env_id].max_steps
        env.close()
        if limit is None:
            raise BatchproofError(
                f"{env_id} has no time limit, and REINFORCE needs episodes that end: "
                "add --env-option max_episode_steps=N"
            )
        longest = max(longest, limit)
    return longest
