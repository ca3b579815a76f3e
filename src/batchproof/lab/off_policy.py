"""Off-policy stepping: act, step, store, learn, for all seeds at once.

Two ways to step, the same two functions inside. An environment written in JAX runs within the
compiled loop, from one evaluation to the next without coming back to Python. A Gymnasium
environment steps on the host, with one compiled call per environment step for all seeds.

Counting is Stable-Baselines3's: actions are uniform for the first ``learning_starts`` environment
steps; each later step, or each later multiple of ``update_every``, is followed by
``gradient_steps`` updates.

Several agents in one environment are here one agent with the observations and actions of all side
by side, and a vector of rewards (`batchproof.lab.envs.layout`).

Shapes: ``P`` population, ``O`` obs, ``A`` action, ``R`` rewards, ``N`` replay capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchproof.errors import BatchproofError
from batchproof.lab import checkpoint, obs_norm, population, replay
from batchproof.lab.envs import JAX_ENVS, host
from batchproof.lab.envs.host import EVALUATE, TRAIN, HostEnvs
from batchproof.lab.envs.jax_env import make, stacked
from batchproof.lab.envs.layout import Layout, layout_of
from batchproof.lab.passes import Batch
from batchproof.lab.training import NOT_DIVERGED, Training, check_agents

KEPT = 1024  # transitions of each seed's replay that a finished run keeps, for audits
DIVERGED_Q = 1e9  # a value beyond this, in units of return, is divergence


class Seed(NamedTuple):
    """All that one seed's run carries from step to step."""

    key: Array  # never changes: each step derives its own
    agent: Any
    layout: Layout | None  # of several agents; not an array
    rows: Array  # (N, 2 O + A + R + 1), see `batchproof.lab.replay`
    env: Any  # the JAX environment's parameters, () on the host
    env_state: Any
    obs: Array  # (O,), as the environment gave it
    obs_moments: obs_norm.Moments | None  # None unless observations are normalized
    action: Array  # (A,), the one chosen last
    sums: dict[str, Array]  # of each metric since the last evaluation
    counts: dict[str, Array]
    diverged_at: Array  # () environment step, or NOT_DIVERGED


class StepKeys(NamedTuple):
    """Independent keys of one environment step of one seed."""

    uniform: Array
    explore: Array
    learn: Array
    env: Array
    reset: Array


def step_keys(key: Array, step: Array) -> StepKeys:
    """The keys of environment step ``step``."""
    return StepKeys(*jax.random.split(jax.random.fold_in(key, step), 5))


def choose(training: Training, seed: Seed, step: Array) -> Seed:
    """Put the action of environment step ``step`` (from 0) into the seed."""
    keys = step_keys(seed.key, step)
    uniform = jax.random.uniform(keys.uniform, seed.action.shape, minval=-1, maxval=1)
    action, agent = training.agent.act(
        training.config, seed.agent, seen(seed, seed.obs), keys.explore, explore=True
    )
    at_random = jnp.asarray(training.random_behaviour) | (step < training.learning_starts)
    agent = jax.tree.map(lambda old, new: jnp.where(at_random, old, new), seed.agent, agent)
    # A diverged seed must not hand NaN to its environment.
    action = jnp.nan_to_num(jnp.where(at_random, uniform, action))
    return seed._replace(agent=agent, action=action)


def seen(seed: Seed, obs: Array) -> Array:
    """What the networks see of observations (..., O)."""
    return obs if seed.obs_moments is None else obs_norm.normalize(seed.obs_moments, obs)


def look(seed: Seed, obs: Array) -> Seed:
    """Move to ``obs``, the next to act on, and count it in the statistics."""
    moments = seed.obs_moments
    if moments is not None:
        moments = obs_norm.update(moments, obs[None])
    return seed._replace(obs=obs, obs_moments=moments)


def store(
    training: Training,
    seed: Seed,
    step: Array,
    next_obs: Array,
    reward: Array,
    terminated: Array,
    ended: Array,
    obs: Array,
) -> Seed:
    """Keep the transition of environment step ``step`` (from 0) and move to ``obs``."""
    rows = replay.insert(seed.rows, step, seed.obs, seed.action, reward, next_obs, terminated)
    agent = seed.agent
    if hasattr(training.agent, "observe"):
        agent = training.agent.observe(training.config, agent, reward, ended)
    return look(seed._replace(rows=rows, agent=agent), obs)


def sample(training: Training, seed: Seed, key: Array, filled: Array) -> Batch:
    """A minibatch of the first ``filled`` rows, as the networks see it."""
    batch = replay.sample(
        seed.rows,
        key,
        filled,
        training.config.batch_size,
        seed.obs.shape[0],
        len(seed.layout.names) if seed.layout else None,
    )
    return batch._replace(obs=seen(seed, batch.obs), next_obs=seen(seed, batch.next_obs))


def learn(training: Training, seed: Seed, step: Array) -> Seed:
    """The gradient steps that follow environment step ``step`` (from 0)."""
    agent, sums, counts, diverged_at = seed.agent, seed.sums, seed.counts, seed.diverged_at
    learn_key = step_keys(seed.key, step).learn
    filled = jnp.minimum(step + 1, len(seed.rows))
    for i in range(training.gradient_steps):
        number = training.blocks_before(step) * training.gradient_steps + i + 1
        sample_key, update_key = jax.random.split(jax.random.fold_in(learn_key, i))
        batch = sample(training, seed, sample_key, filled)
        agent, metrics = training.agent.update(training.config, agent, batch, update_key, number)
        sound = jnp.isfinite(metrics["critic_loss"]) & (jnp.abs(metrics["q"]) < DIVERGED_Q)
        newly = (diverged_at == NOT_DIVERGED) & ~sound
        diverged_at = jnp.where(newly, step + 1, diverged_at)
        # NaN means "not computed in this step" (a delayed actor) and does not count.
        known = {name: ~jnp.isnan(value) for name, value in metrics.items()}
        sums = {n: sums[n] + jnp.where(known[n], metrics[n], 0) for n in metrics}
        counts = {n: counts[n] + known[n] for n in metrics}
    return seed._replace(agent=agent, sums=sums, counts=counts, diverged_at=diverged_at)


def run_in_jax(training: Training, seed: Seed, first: Array, last: Array) -> Seed:
    """Environment steps ``first`` up to but not including ``last``, in two compiled loops.

    One before learning starts and one after: a branch inside one loop would copy what it returns.
    """

    def interact(step: Array, seed: Seed) -> Seed:
        seed = choose(training, seed, step)
        keys = step_keys(seed.key, step)
        result = seed.env.step(keys.env, seed.env_state, seed.action)
        ended = result.terminated | result.truncated
        fresh_state, fresh_obs = seed.env.reset(keys.reset)
        env_state = jax.tree.map(
            lambda fresh, old: jnp.where(ended, fresh, old), fresh_state, result.state
        )
        obs = jnp.where(ended, fresh_obs, result.obs)
        seed = seed._replace(env_state=env_state)
        return store(training, seed, step, result.obs, result.reward, result.terminated, ended, obs)

    def interact_and_learn(step: Array, seed: Seed) -> Seed:
        seed = interact(step, seed)
        if training.update_every == 1:
            return learn(training, seed, step)
        # A loop of no or one turn: it changes the seed in place.
        due = (step + 1) % training.update_every == 0
        return jax.lax.fori_loop(0, due * 1, lambda _, seed: learn(training, seed, step), seed)

    starts = jnp.clip(training.learning_starts, first, last)
    seed = jax.lax.fori_loop(first, starts, interact, seed)
    return jax.lax.fori_loop(starts, last, interact_and_learn, seed)


def evaluate_in_jax(training: Training, seed: Seed) -> Array:
    """Returns of deterministic episodes in fresh environments: (eval_episodes,), or (..., n)."""

    def episode(key: Array) -> Array:
        reset_key, step_key = jax.random.split(key)
        env_state, obs = seed.env.reset(reset_key)

        def body(i: Array, carry: Any) -> Any:
            env_state, obs, over, total = carry
            action, _ = training.agent.act(
                training.config, seed.agent, seen(seed, obs), step_key, explore=False
            )
            result = seed.env.step(
                jax.random.fold_in(step_key, i), env_state, jnp.nan_to_num(action)
            )
            total = total + jnp.where(over, 0, result.reward)
            return result.state, result.obs, over | result.terminated | result.truncated, total

        rewards = (len(seed.layout.names),) if seed.layout else ()
        start = (env_state, obs, jnp.asarray(False), jnp.zeros(rewards))
        return jax.lax.fori_loop(0, seed.env.max_steps, body, start)[-1]

    # The same episodes at each evaluation; training uses the keys of steps, which are smaller.
    keys = jax.random.split(jax.random.fold_in(seed.key, 2**31 - 1), training.eval_episodes)
    return jax.vmap(episode)(keys)


def measure(training: Training, seed: Seed, step: Array) -> dict[str, Array]:
    """The metrics since the last evaluation and the agent's measures on a replayed batch."""
    keys = jax.random.split(jax.random.fold_in(step_keys(seed.key, step).learn, 2**31 - 1))
    batch = sample(training, seed, keys[0], jnp.minimum(step, len(seed.rows)))
    means = {
        name: jnp.where(seed.counts[name] > 0, seed.sums[name] / seed.counts[name], jnp.nan)
        for name in seed.sums
    }
    return means | training.agent.measure(training.config, seed.agent, batch, keys[1])


def init_seed(
    training: Training,
    key: Array,
    env: Any,
    layout: Layout | None,
    obs_size: int,
    action_size: int,
) -> Seed:
    """A seed before its first step."""
    init_key, reset_key = jax.random.split(jax.random.fold_in(key, 2**31 - 2))
    sizes = (obs_size, action_size) if layout is None else (layout,)
    agent = training.agent.init(training.config, init_key, *sizes)
    env_state, obs = env.reset(reset_key) if env else ((), jnp.zeros(obs_size))
    agents = len(layout.names) if layout else None
    rows = replay.init(training.capacity, obs_size, action_size, agents or 1)
    batch = replay.sample(rows, key, jnp.asarray(1), 2, obs_size, agents)
    names = jax.eval_shape(lambda: training.agent.update(training.config, agent, batch, key, 1)[1])
    seed = Seed(
        key=key,
        agent=agent,
        layout=layout,
        rows=rows,
        env=env,
        env_state=env_state,
        obs=obs,
        obs_moments=obs_norm.init((obs_size,)) if training.normalize_obs else None,
        action=jnp.zeros(action_size),
        sums={name: jnp.zeros(()) for name in names},
        counts={name: jnp.zeros((), jnp.int32) for name in names},
        diverged_at=jnp.asarray(NOT_DIVERGED, jnp.int32),
    )
    return look(seed, obs) if env else seed


class Stepper:
    """All seeds of a run in memory: compiled functions, environments, and how far they are.

    Attributes:
        step: environment steps done by each seed.
        seed: a `Seed` whose leaves have a leading axis P.
    """

    def __init__(self, training: Training) -> None:
        """Build environments and networks; nothing is compiled yet."""
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
            self.layout = layout_of(jax_env)
            self.obs_size, self.action_size = jax_env.obs_size, jax_env.action_size
        else:
            env = ()
            self._envs = HostEnvs(training.env_id, options, self.seeds, TRAIN)
            self._eval_envs = HostEnvs(training.env_id, options, self.seeds, EVALUATE)
            self.layout = self._envs.layout
            self.obs_size, self.action_size = self._envs.obs_size, self._envs.action_size
        check_agents(training, self.layout)
        self._compile()
        self.step = 0
        self.seed = population.place(self._init(population.keys(self.seeds), env), self.mesh)
        # The actions of the next step, on the host only.
        self._actions: np.ndarray | None = None

    def _compile(self) -> None:
        training, mesh = self.training, self.mesh
        over_seeds = population.over_seeds

        def host_step(seed: Seed, step: Array, packed: Array, learning: bool) -> tuple[Seed, Array]:
            next_obs, obs, rest = jnp.split(packed, (self.obs_size, 2 * self.obs_size))
            reward = rest[0] if self.layout is None else rest[:-2]
            seed = store(training, seed, step, next_obs, reward, rest[-2], rest[-1] > 0, obs)
            if learning:
                seed = learn(training, seed, step)
            seed = choose(training, seed, step + 1)
            return seed, seed.action

        def start(seed: Seed, obs: Array) -> tuple[Seed, Array]:
            seed = choose(training, look(seed, obs), jnp.asarray(0))
            return seed, seed.action

        def reset_sums(seed: Seed) -> Seed:
            sums, counts = jax.tree.map(jnp.zeros_like, (seed.sums, seed.counts))
            return seed._replace(sums=sums, counts=counts)

        def act(agent: Any, moments: Any, obs: Array) -> Array:
            key = jax.random.key(0)  # not used: no exploration
            obs = obs if moments is None else obs_norm.normalize(moments, obs)
            action, _ = training.agent.act(training.config, agent, obs, key, explore=False)
            return jnp.nan_to_num(action)

        self._init = over_seeds(
            lambda key, env: init_seed(
                training, key, env, self.layout, self.obs_size, self.action_size
            ),
            mesh,
            rare=True,
        )
        self._run_in_jax = over_seeds(
            lambda seed, first, last: run_in_jax(training, seed, first, last),
            mesh,
            shared=(1, 2),
            donate=True,
        )
        self._evaluate_in_jax = over_seeds(
            lambda seed: evaluate_in_jax(training, seed), mesh, rare=True
        )
        # Two functions: a branch inside one would copy what it returns.
        self._host_step = {
            learning: over_seeds(
                partial(host_step, learning=learning), mesh, shared=(1,), donate=True
            )
            for learning in (False, True)
        }
        self._start = over_seeds(start, mesh, donate=True, rare=True)
        self._act = over_seeds(act, mesh)
        self._measure = over_seeds(
            lambda seed, step: measure(training, seed, step), mesh, shared=(1,), rare=True
        )
        self._reset_sums = over_seeds(reset_sums, mesh, donate=True, rare=True)

    def close(self) -> None:
        """Close the host's environments."""
        for envs in (self._envs, self._eval_envs):
            if envs is not None:
                envs.close()

    def advance(self, last: int, done: Callable[[int], Any] = lambda steps: None) -> None:
        """Run until ``last`` environment steps are done; tell ``done`` how many just were."""
        if self._envs is None:
            self.seed = self._run_in_jax(self.seed, self.step, last)
            jax.block_until_ready(self.seed.diverged_at)
            done(last - self.step)
        else:
            if self._actions is None:
                self.seed, actions = self._start(self.seed, self._envs.reset())
                self._actions = np.asarray(actions)
            for step in range(self.step, last):
                result = self._envs.step(self._actions)
                # One transfer to the device a step, not four.
                packed = np.concatenate(
                    [
                        result.next_obs,
                        result.obs,
                        result.reward.reshape(len(self.seeds), -1),
                        result.terminated[:, None].astype(np.float32),
                        result.ended[:, None].astype(np.float32),
                    ],
                    axis=1,
                )
                training = self.training
                due = (step + 1) % training.update_every == 0
                learning = due and step >= training.learning_starts
                self.seed, actions = self._host_step[learning](self.seed, step, packed)
                self._actions = np.asarray(actions)
                done(1)
        self.step = last

    def evaluate(self) -> np.ndarray:
        """Returns (P, eval_episodes) of deterministic episodes, the same ones every time.

        With several agents: their score (`Layout.score_of`).
        """
        returns = self._returns()
        return returns if self.layout is None else self.layout.score_of(returns)

    def _returns(self) -> np.ndarray:
        if self._eval_envs is None:
            return np.asarray(self._evaluate_in_jax(self.seed))
        count = len(self.seeds)
        rewards = (len(self.layout.names),) if self.layout else ()
        returns = np.zeros((count, self.training.eval_episodes, *rewards))
        for episode in range(self.training.eval_episodes):
            obs = self._eval_envs.reset(episode)
            over = np.zeros(count, bool)
            while not over.all():
                actions = self._act(self.seed.agent, self.seed.obs_moments, obs)
                result = self._eval_envs.step(np.asarray(actions))
                returns[~over, episode] += result.reward[~over]
                over |= result.ended
                obs = result.obs
        return returns

    def measure(self) -> dict[str, np.ndarray]:
        """Metrics since the last call, and the agent's measures: (P,) each."""
        measured = self._measure(self.seed, self.step)
        self.seed = self._reset_sums(self.seed)
        return {name: np.asarray(values) for name, values in measured.items()}

    def diverged_at(self) -> np.ndarray:
        """The environment step of each seed's divergence or `NOT_DIVERGED`, (P,)."""
        return np.asarray(self.seed.diverged_at)

    def save(self, folder: Path) -> None:
        """Write a checkpoint from which `restore` continues exactly."""
        rows = self.seed.rows[:, : min(self.step, self.training.capacity)]
        extra = {"envs": self._envs.state()} if self._envs is not None else {}
        checkpoint.save_checkpoint(folder, self.step, self.seed._replace(rows=rows), extra)

    def save_agents(self, folder: Path) -> None:
        """Write a checkpoint of the agents and a sample of the replay: nothing is to be resumed.

        The sample is what running statistics are compared with: states of the final policy have
        others.
        """
        filled = min(self.step, self.training.capacity)
        chosen = np.random.default_rng(0).choice(filled, min(KEPT, filled), replace=False)
        tree = self._outcome() | {"rows": self.seed.rows[:, np.sort(chosen)]}
        checkpoint.save_checkpoint(folder, self.step, tree, {})

    def _outcome(self) -> dict[str, Any]:
        names = ("agent", "obs_moments", "diverged_at")
        return {name: getattr(self.seed, name) for name in names}

    def restore(self, folder: Path) -> None:
        """Continue at the checkpoint in ``folder``.

        Raises:
            BatchproofError: it is damaged or another run's, or the environment did not repeat
                itself from the same seed and actions.
        """
        state = checkpoint.read_state(folder)
        if state is not None and state["step"] == self.training.steps:
            # Killed after `save_agents` but before the record said that the run is finished.
            self.step, loaded, _ = checkpoint.load_checkpoint(folder, self._outcome())
            self.seed = self.seed._replace(**population.place(loaded, self.mesh))
            return
        filled = min(state["step"] if state else 0, self.training.capacity)
        like = self.seed._replace(rows=self.seed.rows[:, :filled])
        self.step, loaded, extra = checkpoint.load_checkpoint(folder, like)
        missing = self.training.capacity - filled
        rows = np.pad(loaded.rows, ((0, 0), (0, missing), (0, 0)))
        self.seed = population.place(loaded._replace(rows=rows), self.mesh)
        if self._envs is not None:
            obs = self._envs.restore(extra["envs"])
            if not np.array_equal(obs, np.asarray(self.seed.obs)):
                raise BatchproofError(
                    f"{folder}: {self.training.env_id} did not repeat its episode from the same "
                    "seed and actions, so this run cannot be resumed exactly: "
                    "delete its folder to start over"
                )
            self._actions = np.asarray(self.seed.action)


def check_env(training: Training) -> None:
    """Raise unless the environment can be made with its options and fits the algorithm."""
    jax_env = None if training.host_env else JAX_ENVS.get(training.env_id)
    same = isinstance(training.env_options, dict)
    for i in range(1 if same else len(training.seeds)):
        options = training.options_of(i)
        if jax_env is not None:
            make(jax_env, options)
            layout = layout_of(jax_env)
        else:
            env = host.make(training.env_id, options)
            env.close()
            layout = host.layout_of(env)
        check_agents(training, layout)
