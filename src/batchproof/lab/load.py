"""Runs on disk back in memory: what was trained, the agents that came of it, and how they act.

Shapes: ``P`` seeds, ``N`` rows, ``O`` obs, ``A`` action, ``n`` agents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchproof import records, run_record
from batchproof.errors import BatchproofError
from batchproof.lab import checkpoint, episodic, obs_norm
from batchproof.lab.agents import AGENTS
from batchproof.lab.envs import host
from batchproof.lab.envs.host import EVALUATE, HostEnvs
from batchproof.lab.envs.layout import Layout
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import Plan


class Run(NamedTuple):
    """A run that was trained, as far as its last checkpoint.

    Attributes:
        training: what was trained.
        layout: who is who among several agents; None for one.
        obs_size: O.
        action_size: A.
        step: environment steps done.
        agent: the agents' state, every leaf with a leading axis P, one entry for each seed.
        obs_moments: what observations are normalized by, likewise; None where they are not.
    """

    training: Training
    layout: Layout | None
    obs_size: int
    action_size: int
    step: int
    agent: Any
    obs_moments: obs_norm.Moments | None

    def of_seed(self, seed: int) -> Any:
        """The state of one seed's agent.

        Raises:
            BatchproofError: no such seed in the run.
        """
        index = self._index(seed)
        return jax.tree.map(lambda leaf: leaf[index], self.agent)

    def moments_of_seed(self, seed: int) -> obs_norm.Moments | None:
        """What one seed's observations are normalized by.

        Raises:
            BatchproofError: no such seed in the run.
        """
        index = self._index(seed)
        return jax.tree.map(lambda leaf: leaf[index], self.obs_moments)

    def _index(self, seed: int) -> int:
        if seed not in self.training.seeds:
            known = ", ".join(map(str, self.training.seeds))
            raise BatchproofError(f"seed {seed} was not trained in this run: it has {known}")
        return self.training.seeds.index(seed)


def load_run(folder: Path) -> Run:
    """Read ``run.json`` and the agents of ``checkpoint/`` in a run's folder.

    Raises:
        BatchproofError: missing, damaged, or made by a version with other settings.
    """
    path = folder / "run.json"
    run = run_record.read(folder)
    with run_record.reading(path):
        training = training_from_record(run["training"], path)
    spaces = run["spaces"]
    agents = spaces["agents"]
    layout = None
    if agents is not None:
        layout = Layout(
            tuple(agents["names"]),
            tuple(agents["obs_sizes"]),
            tuple(agents["action_sizes"]),
            agents["score"],
        )
    sizes = (spaces["obs_size"], spaces["action_size"])
    agent = training.agent
    arguments = sizes if layout is None else (layout,)

    def fresh(key: Array) -> dict[str, Any]:
        moments = obs_norm.init((sizes[0],)) if training.normalize_obs else None
        return {"agent": agent.init(training.config, key, *arguments), "obs_moments": moments}

    # The last seed is repeated where the devices of the machine that trained had more room.
    count = len(training.seeds) + -len(training.seeds) % run["devices"]
    keys = jax.vmap(jax.random.key)(jnp.arange(count))
    with run_record.reading(path):  # sizes and layers that no network can have
        like = jax.eval_shape(jax.vmap(fresh), keys)
    step, tree, _ = checkpoint.load_checkpoint(folder / "checkpoint", like)
    return Run(training, layout, *sizes, step, **tree)


def actions(run: Run, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A seed's deterministic policy as the lab's evaluations run it, on one observation at a time.

    Returns:
        A function from observations (N, O) to actions (N, A) in [-1, 1]; those of all agents side
        by side where there are several.
    """
    act = _compiled(jax.vmap(_policy(run, seed, explore=False), in_axes=(None, 0, None)))
    agent, key = run.of_seed(seed), jax.random.key(0)  # the key is not used
    return lambda obs: np.asarray(act(agent, jnp.asarray(obs, jnp.float32), key)[0])


class Collected(NamedTuple):
    """What acting in an environment gave."""

    obs: np.ndarray  # (N, O)
    action: np.ndarray  # (N, A), in [-1, 1]
    reward: np.ndarray  # (N,), or (N, n) with several agents
    next_obs: np.ndarray  # (N, O)
    terminated: np.ndarray  # (N,), 1 where the episode truly ended


def collect(run: Run, seed: int, count: int, env_id: str | None = None) -> Collected:
    """Act for ``count`` steps, exploring as in training, in the run's environment or another.

    Raises:
        BatchproofError: an environment that cannot be made or that has other sizes.
    """
    name = env_id or run.training.env_id
    index = run.training.seeds.index(seed)
    options = run.training.options_of(index) if env_id in (None, run.training.env_id) else {}
    envs = HostEnvs(name, [options], [seed], EVALUATE)
    try:
        sizes = envs.obs_size, envs.action_size
        if sizes != (run.obs_size, run.action_size):
            raise BatchproofError(
                f"{name} does not fit this run: it has observations and actions of sizes "
                f"{sizes[0]} and {sizes[1]}, the run {run.obs_size} and {run.action_size}"
            )
        act = _compiled(_policy(run, seed, explore=True))
        agent, obs, rows = run.of_seed(seed), envs.reset(), []
        for step in range(count):
            key = jax.random.fold_in(jax.random.key(seed), step)
            action, agent = act(agent, jnp.asarray(obs[0]), key)
            done = envs.step(np.asarray(action)[None])
            ended = done.terminated[0].astype(np.float32)
            rows.append((obs[0], np.asarray(action), done.reward[0], done.next_obs[0], ended))
            obs = done.obs
    finally:
        envs.close()
    # In no order of time, for rules look at the first rows: else at the start of an episode.
    order = np.random.default_rng(seed).permutation(count)
    return Collected(*(np.stack(column)[order] for column in zip(*rows, strict=True)))


def bounds(run: Run, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest actions (A,) of the run's environment, to which [-1, 1] is scaled.

    Raises:
        BatchproofError: it cannot be made.
    """
    env = host.make(run.training.env_id, run.training.options_of(run.training.seeds.index(seed)))
    space: Any = env.action_space
    env.close()
    return space.low.reshape(-1), space.high.reshape(-1)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # What runs for some hundred observations is compiled fast, not to be fast.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def _policy(run: Run, seed: int, *, explore: bool) -> Callable[..., tuple[Array, Any]]:
    """From an agent, an observation (O,) and a key to an action (A,) and the agent after it."""
    training, moments = run.training, run.moments_of_seed(seed)

    def act(agent: Any, obs: Array, key: Array) -> tuple[Array, Any]:
        if training.agent.STEPPER == "episodic":
            acting = episodic.alone(training)
            rows, _, agent = acting.agent.act(acting.config, agent, obs[None], key, explore=explore)
            return episodic.to_env(rows[0]), agent
        obs = obs if moments is None else obs_norm.normalize(moments, obs)
        action, agent = training.agent.act(training.config, agent, obs, key, explore=explore)
        return jnp.nan_to_num(action), agent

    return act


def training_from_record(record: dict[str, Any], path: Path) -> Training:
    """`Training.record` read back; ``path`` is where it came from, for messages.

    A setting that is not in the record is newer than it and has its default.

    Raises:
        BatchproofError: an unknown algorithm or setting.
    """
    values = dict(record)
    known = {field.name for field in fields(Training)}
    algo = values.get("algo")
    if algo not in AGENTS or not values.keys() <= known:
        odd = ", ".join(sorted(values.keys() - known)) or f"algorithm {algo}"
        raise BatchproofError(f"{path}: made by another version of batchproof ({odd})")
    values["config"] = _config(AGENTS[algo].Config, values["config"], path)
    values["seeds"] = tuple(values["seeds"])
    if isinstance(values["env_options"], list):
        values["env_options"] = tuple(values["env_options"])
    return Training(**values)


def up_to_date(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run's record as this version writes it: a setting newer than it has its default there.

    Raises:
        BatchproofError: as `training_from_record`.
    """
    written: dict[str, Any] = records.to_json(training_from_record(record, path).record())
    return written


def _config(kind: Any, record: dict[str, Any], path: Path) -> Any:
    names = {field.name for field in fields(kind)}
    if not record.keys() <= names:
        odd = ", ".join(sorted(record.keys() - names))
        raise BatchproofError(f"{path}: made by another version of batchproof ({odd})")
    return kind(**{name: _value(name, value, path) for name, value in record.items()})


def _value(name: str, value: Any, path: Path) -> Any:
    if name == "plan":
        return Plan.parse(value)
    if isinstance(value, dict):
        return _config(MLP if "norm" in value else Norm, value, path)
    return tuple(value) if isinstance(value, list) else value
