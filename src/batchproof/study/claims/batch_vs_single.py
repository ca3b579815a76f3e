"""batch-vs-single: with batch norm the same state acts differently in a batch and alone.

Two texts say so: a question-and-answer article on batch norm in reinforcement learning, and a
notebook of a course project (DDPG and MADDPG, two agents that play tennis) that skips batch norm
where a single state comes in. This file holds their claims A1 to A6 and B1 to B3 (B4 is the study
`maddpg-batchnorm`), the predictions and the decision rules; all were written before the full run.

What is run: DDPG on Pendulum-v1, trained with transitions from a batch of vectorized environments.
The conditions differ in the norm and in how the actor normalizes when acting (slot 0): alone by
running statistics (``E``), by the statistics of the batch of environments (``T``), or not at all
(``B``). The trained actors are then measured: in one pass, as policies, and in the TD error.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.stats import wasserstein_distance
from tqdm import tqdm

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.lab import checkpoint, nets, norms, population, replay
from batchproof.lab.agents import ddpg
from batchproof.lab.envs.pendulum import Pendulum
from batchproof.lab.loop import read_metrics
from batchproof.lab.nets import MLP, Network, Tree
from batchproof.lab.norms import Norm
from batchproof.lab.passes import Batch
from batchproof.modes import B, E, Mode, Plan, T
from batchproof.study import plots, report
from batchproof.study.statistics import Interval, mean_interval, paired_difference_interval
from batchproof.study.study import study_record, write_all_metrics

NAME = "batch-vs-single"
ARTICLE = "question-and-answer article on batch norm in reinforcement learning"
NOTEBOOK = "course-project notebook (DDPG and MADDPG, tennis)"

# What is run.
HIDDEN = (64, 64)
BATCH_SIZE = 128
PLAN = "TTETT"  # MA-BN's (arXiv 2509.23750), which learns this task; slot 0 is the condition's
STARTS = 256  # environment steps with uniform actions
EVALUATIONS = 10
EPISODES = 64  # episodes of each measurement of a policy
GROUPS = (1, 2, 8, 32)  # environments in a batch, for trained actors that act in T
SIZES = (2, 8, 32, 128, 512)  # rows of a batch, for the gap of one pass
POPULATION = 4096  # visited states that stand for all of them
PROBES, DRAWS = 64, 16  # states whose gap is measured, and batches for each
SYNC_SIZES = (8, 32, 128)  # rows in both processes together

# Decision rules.
FLOORS = {"float32": 1e-5, "float64": 1e-13}  # rounding of an action in [-1, 1], with room
SEEN = 100.0  # a gap is one of normalization, not rounding, above this many times the floor
EXPONENT = (-0.6, -0.4)  # "about 1 / sqrt(N)"
REMOVED, KEPT = 0.1, 0.5  # SyncBN removed the gap, or left it: share of the gap without it
WRONG_TD = 0.1  # measurable: share of the TD error's own size
FEWEST_SEEDS = 5
FULL_SEEDS = 10
# Classes of a return on Pendulum-v1, for predictions: about -150 is the best, -1200 is hanging.
LEARNED, FAILED = -250.0, -700.0


@dataclass(frozen=True)
class Condition:
    """One way to normalize and to act while training.

    Attributes:
        key: its name.
        label: what a reader sees.
        norm: of actor and critic, before each activation.
        act: the mode of slot 0.
        num_envs: environments stepped together; in ``T`` they share one batch.
        predicted: final return of the policy deployed alone in ``E``, written before the run.
    """

    key: str
    label: str
    norm: Norm
    act: Mode
    num_envs: int
    predicted: float


BATCH, LAYER, NONE = Norm("batch"), Norm("layer"), Norm()
CONDITIONS = (
    Condition("act-E", "batch norm, acts alone in E", BATCH, E, 8, -160.0),
    Condition("act-T", "batch norm, acts in T in a batch of 8", BATCH, T, 8, -170.0),
    Condition("act-T-2", "batch norm, acts in T in a batch of 2", BATCH, T, 2, -400.0),
    Condition("act-T-32", "batch norm, acts in T in a batch of 32", BATCH, T, 32, -165.0),
    Condition("act-T-1", "batch norm, acts in T, a batch of one", BATCH, T, 1, -1100.0),
    Condition("act-B", "batch norm, skipped when acting", BATCH, B, 8, -300.0),
    Condition("layer", "layer norm", LAYER, E, 8, -160.0),
    Condition("none", "no norm", NONE, E, 8, -160.0),
)
DEFAULT = ("act-E", "act-T", "layer")
# Return of a trained actor of act-E that acts in T in a batch of N, or in B: written before.
PREDICTED_ACTING = {"T1": -1200.0, "T2": -800.0, "T8": -300.0, "T32": -180.0, "B": -400.0}


def run(
    out: Path,
    *,
    seeds: int | None = None,
    steps: int | None = None,
    quick: bool = False,
    conditions: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Run the study and write ``study.json``, ``report.html``, pictures and metrics into ``out``.

    Args:
        out: the study's folder. A stopped study finds its finished cells there.
        seeds: for each condition, default 5.
        steps: environment steps of each seed, default 10,000.
        quick: 5 seeds of 3,000 steps.
        conditions: names from `CONDITIONS` with commas between, or ``all``; default `DEFAULT`.
            ``act-E`` is always run: its actors are the ones that are measured.
        progress: show bars.
        command: what a user typed, for the record.

    Returns:
        The content of ``study.json``.
    """
    chosen = _chosen(conditions)
    seeds = seeds if seeds is not None else 5
    steps = steps if steps is not None else (3000 if quick else 10_000)
    if not 1 <= seeds <= 1000:
        raise BatchproofError(f"seeds must be from 1 to 1000, got {seeds}")
    if steps < 2 * STARTS:
        raise BatchproofError(
            f"steps must be at least {2 * STARTS}, got {steps}: the first {STARTS} are random"
        )
    began = time.perf_counter()
    with records.locked(out):
        cells = {}
        for i, condition in enumerate(chosen):
            label = f"{i + 1}/{len(chosen)} {condition.key}"
            cells[condition.key] = train_cell(condition, seeds, steps, out, progress, label)
        measuring = time.perf_counter()
        found = measure(cells["act-E"], cells, progress)
        # Cells that an earlier call finished count with the time that they took.
        spent = sum(cell.wall_s for cell in cells.values()) + time.perf_counter() - measuring
        study = study_record(
            NAME, judge(found, cells, seeds), describe(found, cells),
            seeds=seeds, steps=steps, wall_s=max(spent, time.perf_counter() - began),
            command=command,
        )  # fmt: skip
        study["measures"] = found
        write_all_metrics(out / "metrics.parquet", [_columns(cell) for cell in cells.values()])
        records.write_json(out / "study.json", study)
        _render(found, cells, study, out)
    return study


def _chosen(names: str | None) -> tuple[Condition, ...]:
    known = {condition.key: condition for condition in CONDITIONS}
    keys = tuple(known) if names == "all" else DEFAULT if names is None else names.split(",")
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise BatchproofError(
            f"unknown condition {unknown[0]!r}: use all, or some of {', '.join(known)}"
        )
    return tuple(c for c in CONDITIONS if c.key in keys or c.key == "act-E")


# --- training: DDPG with a batch of environments ----------------------------------------------


def config_of(condition: Condition) -> ddpg.Config:
    """DDPG as every condition runs it."""
    mlp = MLP(HIDDEN, condition.norm)
    plan = Plan.parse(condition.act.letter + PLAN)
    return ddpg.Config(actor=mlp, critic=mlp, plan=plan, batch_size=BATCH_SIZE)


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
            "condition": condition.key, "seeds": seeds, "steps": steps, "hidden": HIDDEN,
            "batch_size": BATCH_SIZE, "plan": str(config_of(condition).plan),
            "num_envs": condition.num_envs, "starts": STARTS, "norm": condition.norm.kind,
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
        metrics = read_metrics(folder / "metrics.parquet")
        at = np.unique(metrics["step"])
        returns = metrics["return"].reshape(len(at), seeds).T
        return Trained(condition, agents, rows, at, returns, held["wall_s"])

    began = time.perf_counter()
    advance = population.over_seeds(partial(learn, condition), mesh, shared=(1, 2), donate=True)
    evaluate = population.over_seeds(partial(deployed_return, condition), mesh, rare=True)
    start = population.over_seeds(init, mesh, rare=True)
    learner = population.place(start(population.keys(numbers)), mesh)
    times = [round(vector_steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)]
    curve, done = [], 0
    with tqdm(total=steps, desc=label, unit=" steps", disable=not progress) as bar:
        for due in times:
            learner = advance(learner, done, due)
            curve.append(np.asarray(evaluate(learner))[:seeds])
            bar.set_postfix_str(f"return {curve[-1].mean():.4g}", refresh=False)
            bar.update((due - done) * condition.num_envs)
            done = due
    agents, rows = jax.tree.map(
        lambda leaf: np.asarray(leaf)[:seeds], (learner.agent, learner.rows)
    )
    wall_s = time.perf_counter() - began
    env_steps = np.asarray(times) * condition.num_envs
    returns = np.stack(curve, axis=1)
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
    return act_out(condition, learner.agent.actor, keys, E, 1)[1].mean()


def act_out(
    condition: Condition, actor: Network, keys: Array, mode: Mode, group: int
) -> tuple[Array, Array]:
    """Whole episodes without noise, ``group`` environments in each of the actor's passes.

    Args:
        condition: whose networks these are.
        actor: the actor; its running statistics stay.
        keys: one an episode, (L,); ``group`` divides L.
        mode: of the actor's passes.
        group: environments that share a pass.

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


# --- what is measured --------------------------------------------------------------------------


@cache
def _compiled(function: Callable[..., Any], *fixed: Any) -> Callable[..., Any]:
    return jax.jit(partial(function, *fixed))


def _acted(
    condition: Condition, mode: Mode, group: int, actor: Network, keys: Array
) -> tuple[Array, Array]:
    return act_out(condition, actor, keys, mode, group)


def _together(condition: Condition, mode: Mode, actor: Network, obs: Array) -> Array:
    """Actions (B,) of one pass over ``obs`` (B, O)."""
    return ddpg.policy(config_of(condition), actor, obs, mode)[0][:, 0]


def _alone(condition: Condition, mode: Mode, actor: Network, obs: Array) -> Array:
    """Actions (B,), each from a pass of its own."""
    return jax.lax.map(lambda row: _together(condition, mode, actor, row[None])[0], obs)


def _batch_gap(
    condition: Condition, size: int, actor: Network, states: Array, key: Array
) -> tuple[Array, Array]:
    """Actions (DRAWS, PROBES) in T among ``size`` - 1 companions: the first states are probes."""

    def draw(key: Array) -> Array:
        index = jax.random.randint(key, (PROBES, size - 1), 0, len(states))

        def one(probe: Array, companions: Array) -> Array:
            batch = jnp.concatenate([probe[None], states[companions]])
            return _together(condition, T, actor, batch)[0]

        return jax.vmap(one)(states[:PROBES], index)

    return jax.lax.map(draw, jax.random.split(key, DRAWS))


def measure(trained: Trained, cells: dict[str, Trained], progress: bool) -> dict[str, Any]:
    """Every measure of the study, each a list with one number a seed."""
    seeds = len(trained.returns)
    per_seed: list[dict[str, Any]] = []
    populations, actors = [], []
    for seed in tqdm(range(seeds), desc="measure", unit=" seeds", disable=not progress):
        agent, key = trained.agent(seed), jax.random.key(10_000 + seed)
        acted = acting(trained.condition, agent.actor, key)
        states = acted.pop("states")
        per_seed.append(
            acted
            | one_pass(trained.condition, agent.actor, states)
            | layer_norm_gap(cells.get("layer"), seed, key, states)
            | gap_by_size(trained.condition, agent.actor, states, key)
            | identical_weights(trained.condition, agent.actor, states)
            | td_errors(trained.condition, agent, trained.rows[seed], key)
            | notebook_gaps(seed)
            | dropout_gaps(seed, states)
        )
        populations.append(np.asarray(states, np.float64))
        actors.append(jax.tree.map(np.asarray, agent.actor))
    found: dict[str, Any] = {name: [one[name] for one in per_seed] for name in per_seed[0]}
    found |= collected_data(cells)
    if importlib.util.find_spec("torch") is not None:
        found |= synchronized_gaps(actors, populations)
    return found


def acting(condition: Condition, actor: Network, key: Array) -> dict[str, Any]:
    """A trained actor as a policy: returns and visited states, by mode and batch."""
    keys_a, keys_b = (jax.random.split(k, EPISODES) for k in jax.random.split(key))

    def acted(mode: Mode, group: int, keys: Array) -> tuple[np.ndarray, float]:
        seen, returns = _compiled(_acted, condition, mode, group)(actor, keys)
        return np.asarray(seen).reshape(-1, seen.shape[-1]), float(returns.mean())

    reference, _ = acted(E, 1, keys_a)
    alone, alone_return = acted(E, 1, keys_b)
    found: dict[str, Any] = {"return E": alone_return, "shift E": shift(alone, reference)}
    for group in GROUPS:
        states, mean = acted(Mode("t"), group, keys_b)
        found |= {f"return T{group}": mean, f"shift T{group}": shift(states, reference)}
    states, mean = acted(B, 1, keys_b)
    found |= {"return B": mean, "shift B": shift(states, reference)}
    chosen = np.random.default_rng(0).choice(len(reference), POPULATION, replace=False)
    return found | {"states": jnp.asarray(reference[chosen])}


def shift(states: np.ndarray, reference: np.ndarray) -> float:
    """Wasserstein-1 distance in each coordinate, in its standard deviations, averaged."""
    scale = reference.std(0)
    return float(
        np.mean(
            [
                wasserstein_distance(states[:, i], reference[:, i]) / scale[i]
                for i in range(reference.shape[1])
            ]
        )
    )


def one_pass(condition: Condition, actor: Network, states: Array) -> dict[str, float]:
    """The same states in a batch and alone, in E, T and B, in two precisions."""
    obs = states[:BATCH_SIZE]
    found = {}
    for precision in FLOORS:
        with jax.enable_x64(precision == "float64"):
            # With x64 off, 64-bit input is cast down.
            net, x = _cast((actor, obs), precision)
            together = {m: _run(_together, condition, m, net, x) for m in (E, T, B)}
            alone = {m: _run(_alone, condition, m, net, x) for m in (E, T, B)}
        found[f"floor {precision}"] = float(np.abs(together[E] - alone[E]).max())
        if precision == "float32":
            found["gap T in a batch, E alone"] = _mean_gap(together[T], alone[E])
            found["gap T in a batch, T alone"] = _mean_gap(together[T], alone[T])
            found["spread of T alone"] = float(np.ptp(alone[T]))
            found["gap B, E"] = _mean_gap(alone[B], alone[E])
    return found


def _run(function: Any, condition: Condition, mode: Mode, actor: Any, obs: Any) -> np.ndarray:
    return np.asarray(_compiled(function, condition, mode)(actor, obs))


def _cast(tree: Any, precision: str) -> Any:
    def leaf(x: Any) -> Array:
        x = np.asarray(x)
        return jnp.asarray(x.astype(precision) if x.dtype.kind == "f" else x)

    return jax.tree.map(leaf, tree)


def _mean_gap(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).mean())


def layer_norm_gap(layer: Trained | None, seed: int, key: Array, states: Array) -> dict[str, float]:
    """Largest gap of a layer-norm actor between a train-mode batch and alone."""
    condition = next(c for c in CONDITIONS if c.key == "layer")
    if layer is not None:
        actor = layer.agent(seed).actor
    else:
        actor = nets.init(key, MLP(HIDDEN, LAYER), states.shape[1], 1)
    found = {}
    for precision in FLOORS:
        with jax.enable_x64(precision == "float64"):
            net, x = _cast((actor, states[:BATCH_SIZE]), precision)
            gap = _run(_together, condition, T, net, x) - _run(_alone, condition, E, net, x)
        found[f"layer {precision}"] = float(np.abs(gap).max())
    return found


def gap_by_size(
    condition: Condition, actor: Network, states: Array, key: Array
) -> dict[str, float]:
    """Mean gap of an action in T among N rows, from all states' statistics and from E."""
    everyone = np.asarray(_compiled(_together, condition, T)(actor, states))[:PROBES]
    alone = np.asarray(_compiled(_together, condition, E)(actor, states))[:PROBES]
    found = {}
    for size in SIZES:
        actions = np.asarray(_compiled(_batch_gap, condition, size)(actor, states, key))
        found[f"gap {size}"] = _mean_gap(actions, everyone)
        found[f"gap from E {size}"] = _mean_gap(actions, alone)
    return found


def exponent(sizes: Any, gaps: Any) -> float:
    """k in gap ~ N^k, by least squares in the logarithms."""
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(gaps), 1)[0])


def identical_weights(condition: Condition, actor: Network, states: Array) -> dict[str, float]:
    """Gap between a local and a target actor of identical weights, on the same states."""
    obs = states[:BATCH_SIZE]
    fresh = jax.tree.map(jnp.zeros_like, actor.stats)
    stale = {name: {**stats, "var": jnp.ones_like(stats["var"])} for name, stats in fresh.items()}
    local_t = _run(_together, condition, T, actor, obs)
    local_b = _run(_together, condition, B, actor, obs)
    target_e = _run(_together, condition, E, actor, obs)
    target_stale = _run(_together, condition, E, Network(actor.params, stale), obs)
    return {
        "twin T, E": _mean_gap(local_t, target_e),
        "twin E, E": _mean_gap(_run(_together, condition, E, actor, obs), target_e),
        "twin E, E never synced": _mean_gap(target_e, target_stale),
        "twin B, T": _mean_gap(local_b, local_t),
    }


# The TD error at fixed weights, against one with the statistics of all the data.
TD_PLANS = {
    "EEE": "E in slots 2, 4, 5",
    "ETE": "Stable-Baselines3: slot 4 in T",
    "TTT": "train mode everywhere",
    "BTB": "skipped in the targets",
}


def _td_split(
    condition: Condition, letters: str, agent: ddpg.State, true: ddpg.State, batch: Batch
) -> tuple[Array, Array, Array, Array, Array]:
    """TD errors (B,) as `letters` (slots 2, 4, 5) have them and true, and the three parts."""
    config = config_of(condition)
    action_mode, replay_mode, target_mode = (Mode(letter) for letter in letters)
    assert agent.target_actor is not None
    assert agent.target_critic is not None
    assert true.target_actor is not None
    assert true.target_critic is not None

    def q(critic: Network, obs: Array, action: Array, mode: Mode) -> Array:
        return nets.q_values(config.critic, critic, obs, action, mode)[0][0]

    next_action, _ = ddpg.policy(config, agent.target_actor, batch.next_obs, action_mode)
    true_action, _ = ddpg.policy(config, true.target_actor, batch.next_obs, E)
    discount = config.gamma * (1 - batch.terminated)
    next_q = q(agent.target_critic, batch.next_obs, next_action, target_mode)
    q_now = q(agent.critic, batch.obs, batch.action, replay_mode)
    true_next_q = q(true.target_critic, batch.next_obs, next_action, E)
    true_q = q(true.critic, batch.obs, batch.action, E)
    best_q = q(true.target_critic, batch.next_obs, true_action, E)
    error = batch.reward + discount * next_q - q_now
    true_error = batch.reward + discount * best_q - true_q
    b_target = discount * (next_q - true_next_q)
    b_current = true_q - q_now
    b_action = discount * (true_next_q - best_q)
    return error, true_error, b_target, b_current, b_action


def with_true_statistics(condition: Condition, agent: ddpg.State, data: Batch) -> ddpg.State:
    """The agent with every running statistic that of ``data``: (s, a) and (s', pi'(s')) pooled."""
    config = config_of(condition)
    norm = replace(condition.norm, momentum=1.0, running_variance="biased")
    actor_mlp, critic_mlp = (replace(mlp, norm=norm) for mlp in (config.actor, config.critic))
    obs = jnp.concatenate([data.obs, data.next_obs])

    def actor(network: Network) -> Network:
        return Network(network.params, nets.apply(actor_mlp, network, obs, T)[1])

    assert agent.target_actor is not None
    assert agent.target_critic is not None
    target_actor = actor(agent.target_actor)
    next_action, _ = ddpg.policy(config, target_actor, data.next_obs, E)
    action = jnp.concatenate([data.action, next_action])

    def critic(network: Network) -> Network:
        return Network(network.params, nets.q_values(critic_mlp, network, obs, action, T)[1])

    return agent._replace(
        actor=actor(agent.actor),
        target_actor=target_actor,
        critic=critic(agent.critic),
        target_critic=critic(agent.target_critic),
    )


def td_errors(
    condition: Condition, agent: ddpg.State, rows: np.ndarray, key: Array
) -> dict[str, Any]:
    """How wrong the TD error is by normalization, by mode: mean size, and the three mean parts."""
    data = replay.sample(jnp.asarray(rows), key, jnp.asarray(len(rows)), POPULATION, 3)
    true = _compiled(with_true_statistics, condition)(agent, data)
    found: dict[str, float] = {}
    for letters in TD_PLANS:
        split = _compiled(_td_split, condition, letters)
        parts = []
        for start in range(0, POPULATION, BATCH_SIZE):
            batch = jax.tree.map(lambda leaf, s=start: leaf[s : s + BATCH_SIZE], data)
            parts.append(np.stack(split(agent, true, batch)))
        error, true_error, *biases = np.concatenate(parts, axis=1).astype(np.float64)
        found[f"td {letters} wrong"] = float(
            np.abs(error - true_error).mean() / np.abs(true_error).mean()
        )
        found[f"td {letters} bias"] = float((error - true_error).mean())
        for name, bias in zip(("target", "current", "action"), biases, strict=True):
            found[f"td {letters} {name}"] = float(bias.mean())
        found["td size"] = float(np.abs(true_error).mean())
    return found


# --- the notebook's actor -----------------------------------------------------------------------


def notebook_actor(key: Array) -> Network:
    """Linear(24, 256), BN(256), ReLU, Linear(256, 128), ReLU, Linear(128, 2), tanh.

    Started as the notebook does: hidden weights uniform in +-1/sqrt(rows of the weight matrix),
    which torch lays out as (out, in), so by the width that comes out; the last layer's within
    3e-3; biases as PyTorch's.
    """
    params: dict[str, Any] = {}
    sizes = ((24, 256), (256, 128), (128, 2))
    for i, (size, width) in enumerate(sizes):
        bound = 3e-3 if i == 2 else width**-0.5
        weight_key, bias_key = jax.random.split(jax.random.fold_in(key, i))
        params[f"linear_{i}"] = {
            "weight": jax.random.uniform(weight_key, (size, width), minval=-bound, maxval=bound),
            "bias": jax.random.uniform(bias_key, (width,), minval=-1, maxval=1) * size**-0.5,
        }
    params["norm"], stats = norms.init(BATCH, 256)
    return Network(params, stats)


def notebook_policy(network: Network, obs: Array, mode: Mode) -> tuple[Array, Tree]:
    """The notebook's action (B, 2) and the statistics after the pass."""
    params = network.params

    def linear(i: int, x: Array) -> Array:
        return x @ params[f"linear_{i}"]["weight"] + params[f"linear_{i}"]["bias"]

    x, stats = norms.apply(BATCH, params["norm"], network.stats, linear(0, obs), mode)
    return jnp.tanh(linear(2, jax.nn.relu(linear(1, jax.nn.relu(x))))), stats


def _notebook(seed_key: Array) -> dict[str, Array]:
    """Gaps of the notebook's actor for one state: fresh, and after 200 train-mode batches."""
    keys = jax.random.split(seed_key, 4)
    actor = notebook_actor(keys[0])
    # Positions and velocities on scales of their own, three frames of eight numbers.
    mean = jnp.tile(jax.random.uniform(keys[1], (8,), minval=-5, maxval=5), 3)
    scale = jnp.tile(jax.random.uniform(keys[2], (8,), minval=0.1, maxval=5), 3)
    states = mean + scale * jax.random.normal(keys[3], (200, BATCH_SIZE, 24))

    def move(stats: Tree, batch: Array) -> tuple[Tree, None]:
        return notebook_policy(Network(actor.params, stats), batch, T)[1], None

    moved, _ = jax.lax.scan(move, actor.stats, states)
    found: dict[str, Array] = {}
    for name, stats in (("fresh", actor.stats), ("moved", moved)):
        network = Network(actor.params, stats)

        def single(mode: Mode, network: Network = network) -> Array:
            return jax.lax.map(
                lambda row: notebook_policy(network, row[None], mode)[0][0], states[0]
            )

        bypass, evaluated = single(B), single(E)
        in_batch, _ = notebook_policy(network, states[0], E)
        threes = states[0][: BATCH_SIZE // 3 * 3].reshape(-1, 3, 24)
        trained = jax.vmap(lambda x, n=network: notebook_policy(n, x, T)[0])(threes)[:, 0]
        first = slice(0, len(threes) * 3, 3)
        found |= {
            f"notebook {name} B, E": jnp.abs(bypass - evaluated).mean(),
            f"notebook {name} T of three, E": jnp.abs(trained - evaluated[first]).mean(),
            f"notebook {name} T of three, B": jnp.abs(trained - bypass[first]).mean(),
            f"notebook {name} floor": jnp.abs(in_batch - evaluated).max(),
            f"notebook {name} size": jnp.abs(evaluated).mean(),
        }
    return found


def notebook_gaps(seed: int) -> dict[str, float]:
    """The notebook's actor in three modes on one state at a time."""
    gaps = _compiled(_notebook)(jax.random.key(20_000 + seed))
    return {name: float(value) for name, value in gaps.items()}


# --- dropout ------------------------------------------------------------------------------------

DROPOUT = 0.5


def dropout_policy(params: Tree, obs: np.ndarray, masks: list[np.ndarray] | None) -> np.ndarray:
    """Actions (B,) of an MLP with inverted dropout after each ReLU, in float64 NumPy.

    Args:
        params: linear layers, as `batchproof.lab.nets` names them.
        obs: (B, O).
        masks: for each hidden layer, 1 where a unit stays: (width,) or (B, width). None is eval.
    """
    x = obs
    for i in range(len(params) - 1):
        layer = params[f"linear_{i}"]
        x = np.maximum(x @ layer["weight"] + layer["bias"], 0)
        if masks is not None:
            x = x * masks[i] / (1 - DROPOUT)
    return np.tanh(x @ params["linear_out"]["weight"] + params["linear_out"]["bias"])[:, 0]


def sub_network(params: Tree, masks: list[np.ndarray]) -> Tree:
    """The smaller network that is left when dropped units are cut out, kept ones scaled up."""
    cut: Tree = {}
    kept: np.ndarray | slice = slice(None)
    scale = 1.0
    names = [f"linear_{i}" for i in range(len(masks))] + ["linear_out"]
    for name, mask in zip(names, [*masks, None], strict=True):
        out = slice(None) if mask is None else np.flatnonzero(mask)
        cut[name] = {
            "weight": scale * params[name]["weight"][kept][:, out],
            "bias": params[name]["bias"][out],
        }
        kept, scale = out, 1 / (1 - DROPOUT)
    return cut


def dropout_gaps(seed: int, states: Array) -> dict[str, float]:
    """Dropout by mode: in eval, in train, and against the sub-network that a mask leaves."""
    rng = np.random.default_rng(seed)
    network = nets.init(jax.random.key(30_000 + seed), MLP(HIDDEN), states.shape[1], 1)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), network.params)
    obs = np.asarray(states[:BATCH_SIZE], np.float64)
    evaluated = dropout_policy(params, obs, None)
    alone = np.concatenate([dropout_policy(params, row[None], None) for row in obs])
    per_row = [rng.random((len(obs), width)) >= DROPOUT for width in HIDDEN]
    trained = dropout_policy(params, obs, per_row)
    one_by_one = np.concatenate(
        [dropout_policy(params, obs[[i]], [m[[i]] for m in per_row]) for i in range(len(obs))]
    )
    cuts = []
    for _ in range(16):
        masks = [rng.random(width) >= DROPOUT for width in HIDDEN]
        whole = dropout_policy(params, obs, masks)
        cuts.append(np.abs(whole - dropout_policy(sub_network(params, masks), obs, None)).max())
    return {
        "dropout eval floor": float(np.abs(evaluated - alone).max()),
        "dropout train, eval": _mean_gap(trained, evaluated),
        "dropout companions": float(np.abs(trained - one_by_one).max()),
        "dropout sub-network": float(np.max(cuts)),
    }


# --- data collected, and processes ----------------------------------------------------------------


def collected_data(cells: dict[str, Trained]) -> dict[str, list[float]]:
    """Shift of the replayed states of act-T from act-E's, and of other seeds of act-E.

    Floor and shift compare replays of different seeds, so that both hold what seeds differ by.
    """
    if "act-T" not in cells:
        return {}
    obs = {key: cells[key].rows[:, STARTS:, :3] for key in ("act-E", "act-T")}
    seeds = len(obs["act-E"])
    if seeds < 2:
        return {}
    pairs = [(i, (i + 1) % seeds) for i in range(seeds)]
    return {
        "collected floor": [shift(obs["act-E"][j], obs["act-E"][i]) for i, j in pairs],
        "collected shift": [shift(obs["act-T"][j], obs["act-E"][i]) for i, j in pairs],
    }


def synchronized_gaps(actors: list[Network], populations: list[np.ndarray]) -> dict[str, list[Any]]:
    """Gaps when two processes share their batch's statistics over gloo, as SyncBN does.

    torch's own SyncBatchNorm runs on GPUs alone, so the sums are added by `all_reduce` here.
    """
    import torch.multiprocessing as processes

    arrays: dict[str, np.ndarray] = {}
    for seed, (actor, states) in enumerate(zip(actors, populations, strict=True)):
        rng = np.random.default_rng(seed)
        arrays[f"{seed} states"] = states
        for layer, params in actor.params.items():
            arrays |= {f"{seed} {layer} {name}": np.asarray(v) for name, v in params.items()}
        for size in SYNC_SIZES:
            index = rng.integers(0, len(states), (PROBES * DRAWS, size))
            index[:, 0] = np.tile(np.arange(PROBES), DRAWS)
            arrays[f"{seed} index {size}"] = index
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "in.npz", **arrays)  # type: ignore[arg-type]
        processes.spawn(synchronized_rank, (folder, len(actors)), nprocs=2)
        with np.load(Path(folder) / "out.npz") as results:
            return {name: results[name].tolist() for name in results.files}


def synchronized_rank(rank: int, folder: str, seeds: int) -> None:
    """One of two processes: half of every batch, with and without the other half's statistics."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    with np.load(Path(folder) / "in.npz") as arrays:
        data = {name: torch.as_tensor(arrays[name]).double() for name in arrays.files}
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        net = {
            name.removeprefix(f"{seed} "): value
            for name, value in data.items()
            if name.startswith(f"{seed} ")
        }

        def policy(x: torch.Tensor, shared: bool, net: dict[str, Any] = net) -> torch.Tensor:
            """Actions (D, N) in T of ``x`` (D, N, O), each of the D batches by its own sums."""
            for i in range(len(HIDDEN)):
                z = x @ net[f"linear_{i} weight"] + net[f"linear_{i} bias"]
                sums = [z.sum(1), z.square().sum(1), torch.tensor(float(z.shape[1]))]
                if shared:
                    for part in sums:
                        distributed.all_reduce(part)
                mean = sums[0] / sums[2]
                std = (sums[1] / sums[2] - mean.square() + BATCH.eps).sqrt()
                z = (z - mean[:, None]) / std[:, None]
                x = torch.relu(z * net[f"norm_pre_{i} scale"] + net[f"norm_pre_{i} bias"])
            return torch.tanh(x @ net["linear_out weight"] + net["linear_out bias"])[..., 0]

        states = net["states"]
        reference = policy(states[None], shared=False)[0, :PROBES].tile(DRAWS)
        for size in SYNC_SIZES:
            batches = states[net[f"index {size}"].long()]
            half = batches[:, : size // 2] if rank == 0 else batches[:, size // 2 :]
            gaps = {
                "sync": policy(half, shared=True)[:, 0] - reference,
                "half": policy(half, shared=False)[:, 0] - reference,
                "whole": policy(batches, shared=False)[:, 0] - reference,
            }
            for name, gap in gaps.items():
                found.setdefault(f"{name} {size}", []).append(float(gap.abs().mean()))
            error = (gaps["sync"] - gaps["whole"]).abs().max()
            found.setdefault(f"sync error {size}", []).append(float(error))
    if rank == 0:
        np.savez(Path(folder) / "out.npz", **found)  # type: ignore[arg-type]
    distributed.destroy_process_group()


# --- verdicts -----------------------------------------------------------------------------------


def outcome_class(mean: float) -> str:
    """``learned`` from `LEARNED` up, ``failed`` below `FAILED`, ``partly`` between."""
    return "learned" if mean >= LEARNED else "failed" if mean < FAILED else "partly"


def describe(found: dict[str, Any], cells: dict[str, Trained]) -> list[dict[str, Any]]:
    """The conditions of ``study.json``: what was trained, and how act-E's actors acted after."""
    rows = []

    def add(name: str, label: str, returns: Any, predicted: float | None, **more: Any) -> None:
        missed = predicted is not None and (
            outcome_class(predicted) != outcome_class(float(np.mean(returns)))
        )
        rows.append(
            {
                "name": name,
                "label": label,
                "algo": "ddpg",
                **more,
                "returns": [float(value) for value in returns],
                "prediction": None if predicted is None else f"{predicted:g}",
                "missed": None if predicted is None else missed,
            }
        )

    for key, cell in cells.items():
        c = cell.condition
        add(
            key, c.label, cell.returns[:, -1], c.predicted,
            norm=c.norm.kind, modes=str(config_of(c).plan), wall_s=cell.wall_s,
        )  # fmt: skip
    for way, label in _WAYS.items():
        add(
            f"acting-{way}", f"trained act-E, then acts {label}", found[f"return {way}"],
            PREDICTED_ACTING.get(way), norm="batch", modes=way[0], wall_s=0.0,
        )  # fmt: skip
    return rows


_WAYS = {
    "E": "alone in E",
    "T1": "in T alone",
    "T2": "in T, a batch of 2",
    "T8": "in T, a batch of 8",
    "T32": "in T, a batch of 32",
    "B": "alone in B",
}


def judge(found: dict[str, Any], cells: dict[str, Trained], seeds: int) -> list[dict[str, Any]]:
    """Verdicts on A1 to A6 and B1 to B3 by the rules above."""
    claims = []

    def claim(id_: str, source: str, statement: str, rule: str, settle: Any) -> None:
        verdict, interval, why = settle()
        if seeds < FEWEST_SEEDS:
            verdict = "inconclusive"
            why += f" No verdict on fewer than {FEWEST_SEEDS} seeds."
        claims.append(
            {
                "id": id_,
                "statement": statement,
                "source": source,
                "decision_rule": rule,
                "verdict": verdict,
                "effect": None if interval is None else interval.mean,
                "ci": None if interval is None else [interval.lo, interval.hi],
                "level": 0.95,
                "n": seeds,
                "why": why,
            }
        )

    def mean(name: str) -> Interval:
        return mean_interval(found[name])

    def most(name: str) -> float:
        return float(np.max(found[name]))

    floor = FLOORS["float32"]
    seen = SEEN * floor

    def a1() -> Any:
        gap = mean("gap T in a batch, E alone")
        agree = all(most(f"floor {p}") < bound for p, bound in FLOORS.items())
        verdict = (
            "refuted" if not agree or gap.hi < seen
            else "supported" if gap.lo > seen else "inconclusive"
        )  # fmt: skip
        why = (
            f"Mean gap of an action in [-1, 1], T in a batch of {BATCH_SIZE} against E alone: "
            f"{_words(gap)}. In E, batch and alone differ by at most {most('floor float32'):.0e} "
            f"in float32 and {most('floor float64'):.0e} in float64: rounding. In T a state alone "
            f"is no state at all: over {BATCH_SIZE} states the action varies by "
            f"{most('spread of T alone'):.0e}."
        )
        return verdict, gap, why

    def a2() -> Any:
        gaps = np.array([found[f"gap {size}"] for size in SIZES[1:]])
        slopes = [exponent(SIZES[1:], one) for one in gaps.T]
        k = mean_interval(slopes)
        low, high = EXPONENT
        verdict = (
            "supported" if k.lo > low and k.hi < high
            else "refuted" if k.hi < low or k.lo > high else "inconclusive"
        )  # fmt: skip
        why = (
            f"gap ~ N^k from N = {SIZES[1]} to {SIZES[-1]}, against the statistics of all "
            f"{POPULATION} visited states: k = {_words(k)}. Against E it does not vanish: "
            f"{_words(mean(f'gap from E {SIZES[-1]}'))} is left at {SIZES[-1]}, for the running "
            "statistics are the replay's, not those of the states that this policy visits."
        )
        return verdict, k, why

    def a3() -> Any:
        if f"sync {SYNC_SIZES[0]}" not in found:
            return "inconclusive", None, "Not run: it needs PyTorch."
        ratios = np.mean(
            [np.divide(found[f"sync {n}"], found[f"half {n}"]) for n in SYNC_SIZES], axis=0
        )
        ratio = mean_interval(ratios)
        exact = max(most(f"sync error {n}") for n in SYNC_SIZES)
        verdict = (
            "supported" if ratio.hi < REMOVED
            else "refuted" if ratio.lo > KEPT and exact < 1e-9 else "inconclusive"
        )  # fmt: skip
        why = (
            f"Two processes on gloo. Gap with shared statistics over the gap without: "
            f"{_words(ratio)} (predicted {0.5**0.5:.2f}, a batch twice as large). It equals one "
            f"process with the whole batch to {exact:.0e}: SyncBN makes N larger, no more."
        )
        return verdict, ratio, why

    def a4() -> Any:
        worst = {p: most(f"layer {p}") for p in FLOORS}
        none = all(worst[p] < bound for p, bound in FLOORS.items())
        verdict = (
            "supported" if none
            else "refuted" if worst["float32"] > seen else "inconclusive"
        )  # fmt: skip
        which = "trained" if "layer" in cells else "fresh"
        why = (
            f"Largest gap of a {which} layer-norm actor, train mode in a batch against eval alone: "
            f"{worst['float32']:.0e} in float32, {worst['float64']:.0e} in float64."
        )
        return verdict, mean("layer float32"), why

    def a5() -> Any:
        change = paired_difference_interval(found["return T8"], found["return E"])
        moved = paired_difference_interval(found["shift T8"], found["shift E"])
        data = None
        if "collected shift" in found:
            data = paired_difference_interval(found["collected shift"], found["collected floor"])
        returns = change.lo > 0 or change.hi < 0
        parts = [returns, moved.lo > 0, data is not None and data.lo > 0]
        verdict = (
            "supported" if all(parts)
            else "refuted" if not any(parts) and data is not None else "inconclusive"
        )  # fmt: skip
        why = (
            f"Trained actors that act in T in a batch of 8 environments instead of alone in E: "
            f"return {_words(change)}, state distribution (Wasserstein-1 in standard deviations, "
            f"above that of other episodes) {_words(moved)}. "
        )
        more = paired_difference_interval(found["return T32"], found["return E"])
        why += f"With 32 environments the return changes by {_words(more)}. "
        why += "Data collected: not run (add --conditions act-T)." if data is None else (
            f"Data collected when acting so throughout training: {_words(data)} above that of "
            "other seeds."
        )  # fmt: skip
        for key in ("act-T-1", "act-T-2", "act-T", "act-T-32", "act-B"):
            if key in cells:
                gain = paired_difference_interval(
                    cells[key].returns[:, -1], cells["act-E"].returns[:, -1]
                )
                why += f" Final return, {key} minus act-E, both deployed in E: {_words(gain)}."
        return verdict, change, why

    def a6() -> Any:
        gap = mean("dropout train, eval")
        exact = max(most("dropout eval floor"), most("dropout sub-network"))
        verdict = (
            "refuted" if exact > SEEN * FLOORS["float64"] or gap.hi < seen
            else "supported" if gap.lo > seen and exact < FLOORS["float64"] else "inconclusive"
        )  # fmt: skip
        why = (
            f"Dropout .5 in a 64-64 actor, float64. Train against eval: {_words(gap)}. Eval in a "
            f"batch against alone: {most('dropout eval floor'):.0e}. A mask's output against the "
            f"network with the dropped units cut out: {most('dropout sub-network'):.0e}. Unlike "
            f"batch norm, companions do not matter: {most('dropout companions'):.0e}."
        )
        return verdict, gap, why

    def b1() -> Any:
        own = mean("gap B, E")
        moved, fresh = mean("notebook moved B, E"), mean("notebook fresh B, E")
        size = mean("notebook moved size")
        agree = most("notebook moved floor") < floor and most("floor float32") < floor
        verdict = (
            "refuted" if agree and own.lo > seen and moved.lo > SEEN * most("notebook moved floor")
            else "supported" if own.hi < floor and moved.hi < floor else "inconclusive"
        )  # fmt: skip
        why = (
            f"Eval mode takes a single state and gives what it gives in a batch (to "
            f"{most('notebook moved floor'):.0e}); the notebook skips the layer instead. Its "
            f"actor, bypass against eval: {_words(fresh)} when fresh, {_words(moved)} once the "
            f"statistics moved, where actions are {size.mean:.3f} in size; train in a batch of "
            f"three against eval {_words(mean('notebook moved T of three, E'))}. Trained actors "
            f"of act-E, bypass against eval: {_words(own)}; their return in B is "
            f"{_words(mean('return B'))}, in E {_words(mean('return E'))}."
        )
        return verdict, own, why

    def b2() -> Any:
        gap = mean("twin T, E")
        same = most("twin E, E") < floor
        verdict = (
            "supported" if gap.lo > seen and same
            else "refuted" if gap.hi < floor else "inconclusive"
        )  # fmt: skip
        why = (
            f"Equal weights, equal states: local in T, target in E {_words(gap)}; local skipped, "
            f"target in T {_words(mean('twin B, T'))}; both in E, target statistics never synced "
            f"{_words(mean('twin E, E never synced'))}; both in E, synced: "
            f"{most('twin E, E'):.0e}."
        )
        return verdict, gap, why

    def b3() -> Any:
        wrong = mean("td ETE wrong")
        verdict = (
            "supported" if wrong.lo > WRONG_TD
            else "refuted" if wrong.hi < WRONG_TD else "inconclusive"
        )  # fmt: skip
        sizes = ", ".join(f"{p} {_words(mean(f'td {p} wrong'))}" for p in TD_PLANS)
        why = (
            "Mean error of the TD error by normalization, as a share of the TD error's own mean "
            f"size; the letters are slots 2, 4 and 5: {sizes}. The TD error's size is "
            f"{mean('td size').mean:.2f}."
        )
        return verdict, wrong, why

    claim(
        "A1", ARTICLE,
        "The same state acts differently in a train-mode batch and alone in eval mode; in eval "
        "mode, batch and alone agree.",
        f"supported when the 95 % interval of the mean gap of an action lies above {seen:g} and "
        f"in E batch and alone agree to {FLOORS['float32']:g} in float32 and "
        f"{FLOORS['float64']:g} in float64 for every seed; refuted when they do not, or the gap "
        "is smaller",
        a1,
    )  # fmt: skip
    claim(
        "A2", ARTICLE,
        "The gap shrinks with the batch size N as about 1/sqrt(N).",
        f"supported when the interval of the fitted exponent lies within {EXPONENT[0]:g} to "
        f"{EXPONENT[1]:g}, refuted when it lies outside",
        a2,
    )  # fmt: skip
    claim(
        "A3", ARTICLE,
        "SyncBN removes the gap.",
        f"supported when the interval of the gap with SyncBN, as a share of the gap without, lies "
        f"below {REMOVED:g}; refuted when it lies above {KEPT:g} and SyncBN equals one process "
        "with the whole batch to 1e-9",
        a3,
    )  # fmt: skip
    claim(
        "A4", ARTICLE,
        "LayerNorm has no gap.",
        f"supported when the largest gap is below {FLOORS['float32']:g} in float32 and "
        f"{FLOORS['float64']:g} in float64 for every seed, refuted when it is above {seen:g}",
        a4,
    )  # fmt: skip
    claim(
        "A5", ARTICLE,
        "Acting in a batch of vectorized environments in train mode shifts the state distribution, "
        "the return and the data collected.",
        "supported when the intervals of all three changes, with 8 environments, exclude zero: "
        "return of trained actors (paired by seed and start), their states' shift above that of "
        "other episodes, and the replay's shift above that of other seeds when trained so; "
        "refuted when none does",
        a5,
    )  # fmt: skip
    claim(
        "A6", ARTICLE,
        "Dropout does the same, by mode; train-mode policies are sub-networks.",
        f"supported when the interval of the train-eval gap lies above {seen:g}, and eval in batch "
        f"and alone, and a mask and its sub-network, agree to {FLOORS['float64']:g} in float64; "
        "refuted when one of these does not hold",
        a6,
    )  # fmt: skip
    claim(
        "B1", NOTEBOOK,
        "Batch norm does not apply to a single input.",
        f"refuted when eval on a single state equals eval in a batch to {floor:g} and the "
        f"interval of its gap from a skipped layer lies above {seen:g} for trained actors, and "
        f"above {SEEN:g} times the rounding for the notebook's; supported when eval and skipping "
        "agree",
        b1,
    )  # fmt: skip
    claim(
        "B2", NOTEBOOK,
        "Local and target actor with identical weights pick different actions.",
        f"supported when the interval of the mean gap, local in T and target in E, lies above "
        f"{seen:g}, and with both in E there is none; refuted when it is below {floor:g}",
        b2,
    )  # fmt: skip
    claim(
        "B3", NOTEBOOK,
        "The TD error is wrong by a measurable amount.",
        f"supported when the interval of its mean absolute error in Stable-Baselines3's modes, "
        f"against the statistics of all the data, lies above {WRONG_TD:g} of the TD error's own "
        "mean size; refuted when it lies below",
        b3,
    )  # fmt: skip
    return claims


def _words(interval: Interval) -> str:
    mean, lo, hi = (f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}" for x in interval)
    return f"{mean} [{lo}, {hi}]"


# --- pictures -----------------------------------------------------------------------------------


def _columns(cell: Trained) -> dict[str, np.ndarray]:
    seeds = len(cell.returns)
    return {
        "condition": np.full(cell.returns.size, cell.condition.key),
        "seed": np.tile(np.arange(seeds), len(cell.steps)),
        "step": np.repeat(cell.steps, seeds),
        "return": cell.returns.T.ravel(),
    }


_PANELS = (
    (
        "By how the actor normalized while it collected its data",
        ("act-E", "act-T", "act-T-2", "act-T-32", "act-T-1", "act-B"),
    ),
    ("By norm", ("act-E", "layer", "none")),
)


def _render(
    found: dict[str, Any], cells: dict[str, Trained], study: dict[str, Any], out: Path
) -> None:
    _gap_picture(found, out / "gap.png")
    _acting_picture(found, out / "acting.png")
    _td_picture(found, out / "td.png")
    panels = []
    for title, keys in _PANELS:
        shown = [cells[key] for key in keys if key in cells]
        curves = [
            plots.Curve(cell.condition.label, cell.steps, cell.returns, color)
            for cell, color in zip(shown, plots.PALETTE, strict=False)
        ]
        panels.append(plots.Panel(title, curves))
    plots.learning_curves(
        panels, out / "curves.png", headline="DDPG on Pendulum-v1, deployed alone in E",
        best=None, columns=1,
    )  # fmt: skip
    rows = [
        plots.ForestRow(
            row["label"],
            {"DDPG": row["returns"]},
            {"DDPG": float(row["prediction"]) if row["prediction"] else None},
            detail=row["name"],
            missed=frozenset({"DDPG"} if row["missed"] else ()),
        )
        for row in study["conditions"]
    ]
    plots.condition_table_plot(rows, out / "conditions.png", headline="Every condition", best=None)
    figures = [
        report.FigureSection(
            "One state, in a batch and alone",
            "The gap of an action in [-1, 1] between a train-mode batch of N rows and the "
            "statistics of all visited states, mean over seeds and each seed. Two processes that "
            "share their statistics lie on the same line: SyncBN is a larger N.",
            out / "gap.png",
            alt="Gap of the action against the batch size, both logarithmic",
        ),
        report.FigureSection(
            "The same actors, acting in other modes",
            "Actors trained with batch norm, acting in E: what becomes of their return and of the "
            "states that they visit when they act by the statistics of a batch of environments "
            "(T), or with the layers skipped (B). A dot is a seed.",
            out / "acting.png",
            alt="Return and shift of the state distribution by mode and batch size",
        ),
        report.FigureSection(
            "The TD error",
            "How far normalization moves the mean TD error, in units of return, split into the "
            "target's, the current value's and the next action's part.",
            out / "td.png",
            alt="Mean TD bias by mode and by part",
        ),
        report.FigureSection(
            "Learning",
            "Return of the policy deployed alone in E: mean over seeds, and from the worst to the "
            "best.",
            out / "curves.png",
            alt="Learning curves of every condition",
        ),
        report.FigureSection(
            "Every condition",
            "Dots are seeds; the hollow diamond is what was predicted before the run. A "
            f"prediction is missed when it names another class: learned from {LEARNED:g} up, "
            f"failed below {FAILED:g}.",
            out / "conditions.png",
            alt="Final returns of every condition with predictions",
        ),
    ]
    report.write_report(
        out / "report.html", study, figures, explanation(study),
        title="Alone and in a batch",
    )  # fmt: skip


def _figure(width: float, height: float, columns: int = 1) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=12)
        one.grid(axis="y", color="#e4e4e4")
        one.set_axisbelow(True)
    return figure, axes


def _gap_picture(found: dict[str, Any], path: Path) -> None:
    figure, (axes,) = _figure(9, 6)
    gaps = np.array([found[f"gap {size}"] for size in SIZES]).T
    for one in gaps:
        axes.loglog(SIZES, one, color=plots.BLUE, alpha=0.3, linewidth=0.8)
    axes.loglog(SIZES, gaps.mean(0), "o-", color=plots.BLUE, linewidth=2.5, label="batch norm in T")
    line = gaps.mean(0)[-1] * (np.array(SIZES) / SIZES[-1]) ** -0.5
    axes.loglog(SIZES, line, "--", color=plots.BLACK, label="slope of 1/sqrt(N)")
    from_e = [np.mean(found[f"gap from E {size}"]) for size in SIZES]
    axes.loglog(SIZES, from_e, ":", color=plots.GREY, linewidth=2, label="the same, against E")
    if f"sync {SYNC_SIZES[0]}" in found:
        synced = [np.mean(found[f"sync {size}"]) for size in SYNC_SIZES]
        axes.loglog(
            SYNC_SIZES, synced, "D", color=plots.VERMILLION, markersize=10, markerfacecolor="none",
            markeredgewidth=2, label="two processes with shared statistics, N in both",
        )  # fmt: skip
    axes.loglog(
        SIZES, [np.max(found["layer float32"])] * len(SIZES), color=plots.PALETTE[2],
        linewidth=2.5, label="layer norm (rounding)",
    )  # fmt: skip
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.minorticks_off()
    axes.set_xlabel("rows N in the batch", fontsize=13)
    axes.set_ylabel("mean gap of an action in [\u22121, 1]", fontsize=13)
    axes.set_title("The gap shrinks with N; it does not go away", loc="left", weight="bold")
    axes.legend(fontsize=11, frameon=False)
    plots.save(figure, path)


def _acting_picture(found: dict[str, Any], path: Path) -> None:
    figure, axes = _figure(12, 5.2, 2)
    labels = ["E", "T, 1", "T, 2", "T, 8", "T, 32", "B"]
    panels = (("return", "return per episode"), ("shift", "shift of visited states, in sd"))
    for one, (kind, name) in zip(axes, panels, strict=True):
        for i, way in enumerate(_WAYS):
            values = np.asarray(found[f"{kind} {way}"])
            color = plots.BLUE if way == "E" else plots.VERMILLION
            fan = i + 0.05 * (np.arange(len(values)) % 5 - 2)
            one.plot(fan, values, "o", color=color, alpha=0.5, markersize=6, markeredgewidth=0)
            one.plot([i - 0.28, i + 0.28], [values.mean()] * 2, color=color, linewidth=3)
        one.set_xticks(range(len(labels)), labels)
        one.set_ylabel(name, fontsize=13)
        one.set_xlabel("mode of slot 0, environments in the batch", fontsize=13)
    axes[0].set_title("Trained actors, acting in another mode", loc="left", weight="bold")
    plots.save(figure, path)


def _td_picture(found: dict[str, Any], path: Path) -> None:
    figure, (axes,) = _figure(10, 5.2)
    parts = {"target": "target Q (slot 5)", "current": "Q(s, a) (slot 4)", "action": "next action"}
    # BTB is off any scale that shows the others.
    drawn = {letters: words for letters, words in TD_PLANS.items() if "B" not in letters}
    for j, (part, label) in enumerate(parts.items()):
        for i, letters in enumerate(drawn):
            values = np.asarray(found[f"td {letters} {part}"])
            x = i + 0.25 * (j - 1)
            color = plots.PALETTE[j]
            axes.bar(x, values.mean(), 0.22, color=color, label=None if i else label)
            axes.plot([x] * len(values), values, ".", color=plots.BLACK, alpha=0.5)
    axes.axhline(0, color=plots.BLACK, linewidth=0.8)
    axes.set_xticks(range(len(drawn)), [f"{k}\n{v}" for k, v in drawn.items()])
    axes.set_ylabel("mean TD bias, in units of return", fontsize=13)
    axes.set_title(
        "How normalization moves the TD error, at fixed weights", loc="left", weight="bold"
    )
    axes.legend(fontsize=11, frameon=False)
    plots.save(figure, path)


def explanation(study: dict[str, Any]) -> str:
    """The answer in a minute, as HTML."""
    words = ", ".join(f"{claim['id']} {claim['verdict']}" for claim in study["claims"])
    return (
        "<p>Batch norm in train mode normalizes a state by the states beside it. Alone it has no "
        "company, so the same state with the same weights acts differently: in a batch of N the "
        "statistics carry noise of about 1/sqrt(N), and alone the input is its own mean and "
        "nothing of it is left.</p>"
        "<p>In eval mode the running statistics stand in for the company, and a state acts the "
        "same alone and in a batch. Skipping the layer for a single state, as the notebook does, "
        "is a third thing: another network than the one that was trained.</p>"
        "<p>SyncBN shares the batch between processes, which makes N larger; layer norm looks at "
        "one state only and has no gap.</p>"
        f"<p><strong>Verdicts:</strong> {words}.</p>"
    )
