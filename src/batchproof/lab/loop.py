"""The training loop: act, step, store, learn, for all seeds at once; evaluate; save.

Two ways to step, the same two functions inside. An environment written in JAX runs within the
compiled loop, from one evaluation to the next without coming back to Python. A Gymnasium
environment steps on the host, with one compiled call per environment step for all seeds.

Counting is Stable-Baselines3's: actions are uniform for the first ``learning_starts`` environment
steps; each later step is followed by ``gradient_steps`` updates.

Shapes: ``P`` population, ``O`` obs, ``A`` action, ``N`` replay capacity.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax import Array
from tqdm import tqdm

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.lab import checkpoint, population, replay
from batchproof.lab.agents import AGENTS
from batchproof.lab.envs import JAX_ENVS, host
from batchproof.lab.envs.host import EVALUATE, TRAIN, HostEnvs
from batchproof.lab.envs.jax_env import JaxEnv
from batchproof.modes import Plan

DIVERGED_Q = 1e9  # a value beyond this, in units of return, is divergence
NOT_DIVERGED = -1


@dataclass(frozen=True)
class Training:
    """One run: an agent, an environment, seeds and lengths.

    Attributes:
        algo: a name in `batchproof.lab.agents.AGENTS`.
        config: that agent's configuration.
        env_id: a Gymnasium id.
        env_options: keyword arguments of `gymnasium.make`: one dictionary for all seeds, or one
            for each.
        seeds: distinct, not negative.
        steps: environment steps of each seed.
        learning_starts: environment steps with uniform actions and no learning.
        random_behaviour: keep acting uniformly: learning from data that never shifts.
        buffer_size: replay capacity in transitions; never more than ``steps`` are allocated.
        gradient_steps: updates per environment step.
        eval_every: environment steps between evaluations; None is a fortieth of ``steps``.
        eval_episodes: deterministic episodes per evaluation and seed.
        host_env: step on the host even where the environment also exists in JAX.
    """

    algo: str
    config: Any
    env_id: str
    env_options: Any = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    steps: int = 3000
    learning_starts: int = 100
    random_behaviour: bool = False
    buffer_size: int = 1_000_000
    gradient_steps: int = 1
    eval_every: int | None = None
    eval_episodes: int = 1
    host_env: bool = False

    def __post_init__(self) -> None:
        if self.algo not in AGENTS:
            raise BatchproofError(
                f"unknown algorithm {self.algo!r}: use one of {', '.join(AGENTS)}"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise BatchproofError(
                f"seeds must be distinct and not negative, at least one, got {list(self.seeds)}"
            )
        if max(self.seeds) >= 2**32:
            raise BatchproofError(f"seeds must be less than 2**32, got {max(self.seeds)}")
        for name in ("steps", "buffer_size", "gradient_steps", "eval_episodes"):
            if getattr(self, name) < 1:
                raise BatchproofError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_every is not None and self.eval_every < 1:
            raise BatchproofError(f"eval_every must be at least 1, got {self.eval_every}")
        if not 0 <= self.learning_starts < self.steps:
            raise BatchproofError(
                f"learning_starts must be at least 0 and less than steps ({self.steps}), "
                f"got {self.learning_starts}: nothing would be learned"
            )
        if not isinstance(self.env_options, dict) and len(self.env_options) != len(self.seeds):
            raise BatchproofError(
                f"env_options needs one dictionary, or one for each of the {len(self.seeds)} "
                f"seeds, got {len(self.env_options)}"
            )

    @property
    def agent(self) -> ModuleType:
        """The agent's module."""
        return AGENTS[self.algo]

    @property
    def capacity(self) -> int:
        """Rows of the replay that can ever be filled."""
        return min(self.buffer_size, self.steps)

    @property
    def evaluation_interval(self) -> int:
        """Environment steps between evaluations."""
        return self.eval_every or max(1, self.steps // 40)

    def options_of(self, seed_index: int) -> dict[str, Any]:
        """The environment options of one seed."""
        if isinstance(self.env_options, dict):
            return self.env_options
        return self.env_options[seed_index]

    def record(self) -> dict[str, Any]:
        """The run as JSON values; two runs with equal records give equal results."""

        def plain(value: Any) -> Any:
            if isinstance(value, Plan):
                return str(value)
            if is_dataclass(value):
                return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [plain(item) for item in value]
            return value

        return plain(self)


class Seed(NamedTuple):
    """All that one seed's run carries from step to step."""

    key: Array  # never changes: each step derives its own
    agent: Any
    rows: Array  # (N, 2 O + A + 2), see `batchproof.lab.replay`
    env: Any  # the JAX environment's parameters, () on the host
    env_state: Any
    obs: Array  # (O,)
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
        training.config, seed.agent, seed.obs, keys.explore, explore=True
    )
    at_random = jnp.asarray(training.random_behaviour) | (step < training.learning_starts)
    agent = jax.tree.map(lambda old, new: jnp.where(at_random, old, new), seed.agent, agent)
    # A diverged seed must not hand NaN to its environment.
    action = jnp.nan_to_num(jnp.where(at_random, uniform, action))
    return seed._replace(agent=agent, action=action)


def store(
    seed: Seed,
    step: Array,
    next_obs: Array,
    reward: Array,
    terminated: Array,
    obs: Array,
) -> Seed:
    """Keep the transition of environment step ``step`` (from 0) and move to ``obs``."""
    rows = replay.insert(seed.rows, step, seed.obs, seed.action, reward, next_obs, terminated)
    return seed._replace(rows=rows, obs=obs)


def learn(training: Training, seed: Seed, step: Array) -> Seed:
    """The gradient steps that follow environment step ``step`` (from 0)."""
    agent, sums, counts, diverged_at = seed.agent, seed.sums, seed.counts, seed.diverged_at
    learn_key = step_keys(seed.key, step).learn
    filled = jnp.minimum(step + 1, len(seed.rows))
    for i in range(training.gradient_steps):
        number = (step - training.learning_starts) * training.gradient_steps + i + 1
        sample_key, update_key = jax.random.split(jax.random.fold_in(learn_key, i))
        batch = replay.sample(
            seed.rows, sample_key, filled, training.config.batch_size, seed.obs.shape[0]
        )
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
        return store(seed, step, result.obs, result.reward, result.terminated, obs)

    starts = jnp.clip(training.learning_starts, first, last)
    seed = jax.lax.fori_loop(first, starts, interact, seed)
    return jax.lax.fori_loop(
        starts, last, lambda step, seed: learn(training, interact(step, seed), step), seed
    )


def evaluate_in_jax(training: Training, seed: Seed) -> Array:
    """Returns (eval_episodes,) of deterministic episodes in fresh environments."""

    def episode(key: Array) -> Array:
        reset_key, step_key = jax.random.split(key)
        env_state, obs = seed.env.reset(reset_key)

        def body(i: Array, carry: Any) -> Any:
            env_state, obs, over, total = carry
            action, _ = training.agent.act(
                training.config, seed.agent, obs, step_key, explore=False
            )
            result = seed.env.step(
                jax.random.fold_in(step_key, i), env_state, jnp.nan_to_num(action)
            )
            total = total + jnp.where(over, 0, result.reward)
            return result.state, result.obs, over | result.terminated | result.truncated, total

        start = (env_state, obs, jnp.asarray(False), jnp.zeros(()))
        return jax.lax.fori_loop(0, seed.env.max_steps, body, start)[-1]

    # The same episodes at each evaluation; training uses the keys of steps, which are smaller.
    keys = jax.random.split(jax.random.fold_in(seed.key, 2**31 - 1), training.eval_episodes)
    return jax.vmap(episode)(keys)


def measure(training: Training, seed: Seed, step: Array) -> dict[str, Array]:
    """The metrics since the last evaluation and the agent's measures on a replayed batch."""
    keys = jax.random.split(jax.random.fold_in(step_keys(seed.key, step).learn, 2**31 - 1))
    batch = replay.sample(
        seed.rows,
        keys[0],
        jnp.minimum(step, len(seed.rows)),
        training.config.batch_size,
        seed.obs.shape[0],
    )
    means = {
        name: jnp.where(seed.counts[name] > 0, seed.sums[name] / seed.counts[name], jnp.nan)
        for name in seed.sums
    }
    return means | training.agent.measure(training.config, seed.agent, batch, keys[1])


def init_seed(training: Training, key: Array, env: Any, obs_size: int, action_size: int) -> Seed:
    """A seed before its first step."""
    init_key, reset_key = jax.random.split(jax.random.fold_in(key, 2**31 - 2))
    agent = training.agent.init(training.config, init_key, obs_size, action_size)
    env_state, obs = env.reset(reset_key) if env else ((), jnp.zeros(obs_size))
    rows = replay.init(training.capacity, obs_size, action_size)
    batch = replay.sample(rows, key, jnp.asarray(1), 2, obs_size)
    names = jax.eval_shape(lambda: training.agent.update(training.config, agent, batch, key, 1)[1])
    return Seed(
        key=key,
        agent=agent,
        rows=rows,
        env=env,
        env_state=env_state,
        obs=obs,
        action=jnp.zeros(action_size),
        sums={name: jnp.zeros(()) for name in names},
        counts={name: jnp.zeros((), jnp.int32) for name in names},
        diverged_at=jnp.asarray(NOT_DIVERGED, jnp.int32),
    )


class Result(NamedTuple):
    """What a run gave."""

    metrics: dict[str, np.ndarray]  # columns, a row for each evaluation and seed
    seeds: list[dict[str, Any]]  # for each: seed, status, diverged_at, final_return
    wall_s: float  # of this process; a resumed run counts from the resume


def train(
    training: Training,
    out: Path,
    *,
    progress: bool = True,
    label: str = "",
    tensorboard: bool = False,
    checkpoint_seconds: float = 60.0,
    command: str = "",
) -> Result:
    """Train every seed and leave ``run.json``, ``metrics.parquet`` and ``checkpoint/`` in ``out``.

    A run that was stopped, by any means, continues at its last checkpoint and gives the same
    result as if it never stopped. A finished one is read back.

    Args:
        training: what to run.
        out: the run's folder.
        progress: show a bar on standard error.
        label: what the bar is called.
        tensorboard: also write event files into ``out/tensorboard``.
        checkpoint_seconds: least time between two checkpoints; they are made at evaluations.
        command: what a user typed, for the record.

    Raises:
        BatchproofError: ``out`` holds another run, or is in use, or is damaged.
    """
    if training.host_env or training.env_id not in JAX_ENVS:
        # A wrong name must not leave an empty folder behind.
        for i in range(len(training.seeds)) if not isinstance(training.env_options, dict) else [0]:
            host.make(training.env_id, training.options_of(i)).close()
    with records.locked(out):
        finished = _check_folder(training, out)
        if finished is not None:
            return finished
        run = _Run(training, out, tensorboard, checkpoint_seconds, command)
        try:
            return run.run(progress, label or training.algo)
        finally:
            run.close()


def _check_folder(training: Training, out: Path) -> Result | None:
    """The result in ``out`` if it holds this very run, finished."""
    path = out / "run.json"
    if not path.exists():
        return None
    run = records.read_json(path)
    wanted = records.to_json(training.record())
    held = run.get("training") if isinstance(run, dict) else None
    if not isinstance(held, dict):
        raise BatchproofError(f"{path}: not a run record; delete it or choose another --out")
    if held != wanted:
        names = sorted(k for k in wanted.keys() | held.keys() if held.get(k) != wanted.get(k))
        raise BatchproofError(
            f"{out} holds another run (it differs in {', '.join(names)}): "
            "choose another --out, or delete that folder"
        )
    if run.get("status") != "finished":
        return None
    # JSON has no NaN: the return of a seed that diverged was written as null.
    seeds = [
        seed | {"final_return": math.nan if seed["final_return"] is None else seed["final_return"]}
        for seed in run["seeds"]
    ]
    return Result(read_metrics(out / "metrics.parquet"), seeds, run["wall_s"])


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of a metrics file.

    Raises:
        BatchproofError: missing or damaged.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise BatchproofError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        line = " ".join(str(error).split())
        raise BatchproofError(f"{path}: not a readable Parquet file ({line})") from None
    return {name: table[name].to_numpy() for name in table.column_names}


def write_metrics(path: Path, columns: dict[str, Any]) -> None:
    """Write columns of equal length as Parquet, in one move."""
    with records.replacing(path) as file:
        pq.write_table(pa.table(columns), file, compression="zstd")


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
            env: Any = _stacked([_make(jax_env, option) for option in options])
            self.obs_size, self.action_size = jax_env.obs_size, jax_env.action_size
        else:
            env = ()
            self._envs = HostEnvs(training.env_id, options, self.seeds, TRAIN)
            self._eval_envs = HostEnvs(training.env_id, options, self.seeds, EVALUATE)
            self.obs_size, self.action_size = self._envs.obs_size, self._envs.action_size
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
            seed = store(seed, step, next_obs, rest[0], rest[1], obs)
            if learning:
                seed = learn(training, seed, step)
            seed = choose(training, seed, step + 1)
            return seed, seed.action

        def start(seed: Seed, obs: Array) -> tuple[Seed, Array]:
            seed = choose(training, seed._replace(obs=obs), jnp.asarray(0))
            return seed, seed.action

        def reset_sums(seed: Seed) -> Seed:
            sums, counts = jax.tree.map(jnp.zeros_like, (seed.sums, seed.counts))
            return seed._replace(sums=sums, counts=counts)

        def act(agent: Any, obs: Array) -> Array:
            key = jax.random.key(0)  # not used: no exploration
            action, _ = training.agent.act(training.config, agent, obs, key, explore=False)
            return jnp.nan_to_num(action)

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
                        result.reward[:, None],
                        result.terminated[:, None].astype(np.float32),
                    ],
                    axis=1,
                )
                learning = step >= self.training.learning_starts
                self.seed, actions = self._host_step[learning](self.seed, step, packed)
                self._actions = np.asarray(actions)
                done(1)
        self.step = last

    def evaluate(self) -> np.ndarray:
        """Returns (P, eval_episodes) of deterministic episodes, the same ones every time."""
        if self._eval_envs is None:
            return np.asarray(self._evaluate_in_jax(self.seed))
        count = len(self.seeds)
        returns = np.zeros((count, self.training.eval_episodes))
        for episode in range(self.training.eval_episodes):
            obs = self._eval_envs.reset(episode)
            over = np.zeros(count, bool)
            while not over.all():
                result = self._eval_envs.step(np.asarray(self._act(self.seed.agent, obs)))
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
        """Write a checkpoint of the agents alone: a finished run has nothing to resume."""
        tree = {"agent": self.seed.agent, "diverged_at": self.seed.diverged_at}
        checkpoint.save_checkpoint(folder, self.step, tree, {})

    def restore(self, folder: Path) -> None:
        """Continue at the checkpoint in ``folder``.

        Raises:
            BatchproofError: it is damaged or another run's, or the environment did not repeat
                itself from the same seed and actions.
        """
        state = checkpoint.read_state(folder)
        if state is not None and state["step"] == self.training.steps:
            # Killed after `save_agents` but before the record said that the run is finished.
            last = {"agent": self.seed.agent, "diverged_at": self.seed.diverged_at}
            self.step, loaded, _ = checkpoint.load_checkpoint(folder, last)
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


class _Run:
    """A run and its folder: when to evaluate, what to write down."""

    def __init__(
        self,
        training: Training,
        out: Path,
        tensorboard: bool,
        checkpoint_seconds: float,
        command: str,
    ) -> None:
        self.training = training
        self.out = out
        self.command = command
        self.checkpoint_seconds = checkpoint_seconds
        self.stepper = Stepper(training)
        self.rows: list[dict[str, Any]] = []
        self.writer = _tensorboard_writer(out) if tensorboard else None

    def close(self) -> None:
        self.stepper.close()
        if self.writer is not None:
            self.writer.close()

    def run(self, progress: bool, label: str) -> Result:
        stepper, steps = self.stepper, self.training.steps
        began = time.perf_counter()
        folder = self.out / "checkpoint"
        if checkpoint.read_state(folder) is not None:
            stepper.restore(folder)
            columns = read_metrics(self.out / "metrics.parquet")
            self.rows = [row for row in _rows(columns) if row["step"] <= stepper.step]
        self._write_record("running", 0.0)
        saved = time.monotonic()
        with _bar(progress, label, steps, stepper.step) as bar:
            while stepper.step < steps:
                due = _next_multiple(stepper.step, self.training.evaluation_interval)
                stepper.advance(min(due, steps), bar.update)
                self._evaluate(bar)
                if stepper.step < steps and time.monotonic() - saved >= self.checkpoint_seconds:
                    # The rows first: no checkpoint stands for evaluations that are not on disk.
                    self._write_metrics()
                    stepper.save(folder)
                    saved = time.monotonic()
        wall_s = time.perf_counter() - began
        self._write_metrics()
        stepper.save_agents(folder)
        seeds = self._write_record("finished", wall_s)
        return Result(_columns(self.rows), seeds, wall_s)

    def _evaluate(self, bar: Any) -> None:
        returns, measures = self.stepper.evaluate(), self.stepper.measure()
        diverged_at = self.stepper.diverged_at()
        for i, number in enumerate(self.training.seeds):
            sound = diverged_at[i] == NOT_DIVERGED
            row = {
                "seed": number,
                "step": self.stepper.step,
                "return": float(returns[i].mean()) if sound else math.nan,
                "diverged": not sound,
            }
            row |= {name: float(values[i]) for name, values in measures.items()}
            self.rows.append(row)
            if self.writer is not None:
                for name, value in row.items():
                    if name not in ("seed", "step"):
                        self.writer.add_scalar(f"seed_{number}/{name}", float(value), row["step"])
        last = [row["return"] for row in self.rows[-len(self.training.seeds) :]]
        bar.set_postfix_str(_postfix(last), refresh=False)

    def _write_metrics(self) -> None:
        write_metrics(self.out / "metrics.parquet", _columns(self.rows))

    def _write_record(self, status: str, wall_s: float) -> list[dict[str, Any]]:
        diverged_at = self.stepper.diverged_at()
        final = {row["seed"]: row["return"] for row in self.rows}
        seeds = [
            {
                "seed": number,
                "status": "ok" if diverged_at[i] == NOT_DIVERGED else "diverged",
                "diverged_at": int(diverged_at[i]) if diverged_at[i] != NOT_DIVERGED else None,
                "final_return": final.get(number, math.nan),
            }
            for i, number in enumerate(self.training.seeds)
        ]
        records.write_json(
            self.out / "run.json",
            {
                "status": status,
                "training": self.training.record(),
                "seeds": seeds,
                "wall_s": wall_s,
                "command": self.command,
                "versions": records.versions("jax", "jaxlib", "optax", "numpy", "gymnasium"),
                "git_sha": records.git_sha(),
                "machine": records.machine(),
                "devices": self.stepper.mesh.size,
            },
        )
        return seeds


def _make(env: Any, options: dict[str, Any]) -> JaxEnv:
    try:
        return env.make(**options)
    except TypeError as error:
        raise BatchproofError(f"cannot make environment: {error}") from None


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _next_multiple(step: int, interval: int) -> int:
    return (step // interval + 1) * interval


def _postfix(returns: list[float]) -> str:
    known = [value for value in returns if not math.isnan(value)]
    text = f"return {np.mean(known):.4g}" if known else "all seeds diverged"
    lost = len(returns) - len(known)
    return text + (f", {lost} diverged" if lost and known else "")


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.asarray([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _rows(columns: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    names = list(columns)
    for values in zip(*(columns[name].tolist() for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


@contextmanager
def _bar(progress: bool, label: str, total: int, done: int) -> Iterator[Any]:
    with tqdm(
        total=total,
        initial=done,
        desc=label,
        unit=" steps",
        disable=not progress,
        dynamic_ncols=True,
        mininterval=0.2,
    ) as bar:
        yield bar


def _tensorboard_writer(out: Path) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"))
