"""Trace: which statistics each pass of one real update of the lab's agents uses.

The agent's own ``act`` and ``update`` run once, compiled, on a made-up batch of the configured
size. Each norm that a pass comes to reports itself while it runs, with the network whose statistics
it was given; a branch that is not taken reports nothing. What a norm does in the mode that it was
handed is measured (`behaviour`), not read from the letter, and ``J`` and ``M`` are told by the rows
of the pass. The networks before and after the update say what moved and what the targets received.

The report has the form of `batchproof.clinic.trace`. Shapes: ``B`` batch, ``F`` features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchproof.lab import nets, norms
from batchproof.lab.agents import maddpg
from batchproof.lab.agents.reinforce import Episodes
from batchproof.lab.envs import JAX_ENVS, host
from batchproof.lab.envs.layout import Layout, layout_of
from batchproof.lab.load import Run
from batchproof.lab.nets import Network, Tree
from batchproof.lab.norms import Norm
from batchproof.lab.passes import Batch
from batchproof.lab.training import Training
from batchproof.modes import Mode, Plan, Slot

ROLES = {
    "actor": "actor",
    "critic": "critic",
    "target_actor": "actor_target",
    "target_critic": "critic_target",
}
"""The clinic's name for each network of an agent's state."""

NO_LETTER = "-"  # of a slot in which nothing normalizes, and of a norm of single rows

_MARK = "network"  # beside the layers in a network's statistics: which network they belong to


@dataclass(frozen=True)
class LayerCall:
    """One norm in one pass, or a pass without any.

    Attributes:
        slots: the slots that the pass fills; ``(4, 5)`` for one joint pass.
        network: the role, with the agent behind it where there are several: ``actor/agent_0``.
        layer: the norm's name in the network, '' where the pass has none.
        norm: its kind, '' where the pass has none.
        rows: rows of its batch.
        mode: letter of the statistics that it used; ``-`` where a norm of single rows has none.
        moved: whether the call moves running statistics.
        gradient: whether a gradient runs through the batch's statistics.
    """

    slots: tuple[int, ...]
    network: str
    layer: str
    norm: str
    rows: int
    mode: str
    moved: bool
    gradient: bool

    @property
    def label(self) -> str:
        """The slots, as reports print them."""
        return "+".join(map(str, self.slots))


@dataclass(frozen=True)
class Trace:
    """Which statistics the passes of one update used.

    Attributes:
        asked: the plan that was configured.
        plan: the letters that were found, slots 1 to 5, with slot 0 in front unless it is ``E``;
            ``-`` where nothing normalizes with a batch's or with running statistics.
        calls: every norm of every pass, each once, by slot.
        moved: each network's layers whose running statistics another value after the update.
        synced: for each target network, what became of each of its running statistics:
            ``synced``, ``polyak RHO``, ``never``, ``moved``, ``moved by its own passes``, ``equal,
            nothing moved``.
        notes: what the table does not say.
        batch_size: rows of the replay batch, or of a batch of whole episodes.
    """

    asked: str
    plan: str
    calls: tuple[LayerCall, ...]
    moved: dict[str, tuple[str, ...]]
    synced: dict[str, dict[str, str]]
    notes: tuple[str, ...]
    batch_size: int

    def to_json(self) -> dict[str, Any]:
        """The same as plain dictionaries and lists."""
        return {
            "asked": self.asked,
            "plan": self.plan,
            "batch_size": self.batch_size,
            "calls": [asdict(call) | {"slots": list(call.slots)} for call in self.calls],
            "moved": {network: list(layers) for network, layers in self.moved.items()},
            "synced": {target: dict(found) for target, found in self.synced.items()},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"plan {self.plan} (configured: {self.asked})"]
        lines += [f"batch: {self.batch_size} rows", ""]
        header = ("slot", "network", "layer", "norm", "rows", "mode", "moved", "gradient")
        lines += _columns([header, *(_table_row(call) for call in self.calls)])
        lines += ["", "running statistics moved by the update:"]
        lines += _columns(
            [(f"  {name}", ", ".join(layers) or "none") for name, layers in self.moved.items()]
        )
        for target, found in self.synced.items():
            if found:
                lines += ["", f"running statistics of {target} after the update:"]
                lines += _columns([(f"  {name}", status) for name, status in found.items()])
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)


def _table_row(call: LayerCall) -> tuple[str, ...]:
    if not call.layer:
        return (call.label, call.network, "-", "-", str(call.rows), "-", "-", "-")
    told = [call.label, call.network, call.layer, call.norm, str(call.rows), call.mode]
    return (*told, "yes" if call.moved else "no", "yes" if call.gradient else "no")


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = (("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))) for row in rows)
    return [line.rstrip() for line in cells]


def trace(what: Run | Training, seed: int | None = None) -> Trace:
    """Run one update of an agent and say which statistics each of its passes used.

    Of the updates of a delayed actor it is one that includes the actor's. Neither a run nor its
    files are changed.

    Args:
        what: a run that was trained (`batchproof.lab.load.load_run`), or a training before its
            first step.
        seed: whose networks; None is the first one's.

    Raises:
        BatchproofError: no such seed, or an environment that cannot be made.
    """
    training = what if isinstance(what, Training) else what.training
    key = jax.random.key(training.seeds[0] if seed is None else seed)
    layout, obs_size, action_size = _sizes(what)
    agent, config = training.agent, training.config
    if isinstance(what, Run):
        state = what.of_seed(training.seeds[0] if seed is None else seed)
    else:
        sizes = (obs_size, action_size) if layout is None else (layout,)
        state = _compiled(lambda key: agent.init(config, key, *sizes))(key)
    tagged = replace(config, plan=_tagged(config.plan))
    before = _networks(state)
    shape: tuple[int, ...]
    batch: Any
    if training.agent.STEPPER == "off_policy":
        state = _marked(state, before)
        batch, shape = _batch(training, layout, obs_size, action_size), (obs_size,)
        size = config.batch_size
    else:
        episodes = config.episodes_per_update
        batch, shape = _episodes(training, obs_size, action_size), (episodes, obs_size)
        size = batch.alive.size
    obs = _normal(np.random.default_rng(1), *shape)
    step = getattr(config, "policy_delay", 1)

    def act_and_update(state: Any, batch: Any, obs: Array, key: Array, step: Array) -> Any:
        acted = agent.act(tagged, state, obs, key, explore=True)[-1]
        return acted, agent.update(tagged, state, batch, key, step)[0]

    with _recording() as records:
        _, updated = _compiled(act_and_update)(state, batch, obs, key, step)
        jax.block_until_ready(updated)
        jax.effects_barrier()
    after = _networks(updated)
    rows = {name: size * _served(state, name) for name in before}
    calls = _calls(records, list(before), rows)
    plan, notes = _letters(calls)
    notes.append("the batch is made up: standard normal observations, uniform actions")
    return Trace(
        asked=str(config.plan),
        plan=plan,
        calls=tuple(calls),
        moved={name: _moved(before[name], after[name]) for name in before},
        synced=_synced(before, after, calls),
        notes=tuple(notes),
        batch_size=size,
    )


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # What runs once is compiled fast, not to be fast.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


# --- what goes in ------------------------------------------------------------------------------


def _sizes(what: Run | Training) -> tuple[Layout | None, int, int]:
    if isinstance(what, Run):
        return what.layout, what.obs_size, what.action_size
    env = None if what.host_env else JAX_ENVS.get(what.env_id)
    if env is not None:
        return layout_of(env), env.obs_size, env.action_size
    made = host.make(what.env_id, what.options_of(0))
    sizes = [int(np.prod(s.shape or ())) for s in (made.observation_space, made.action_space)]
    made.close()
    return layout_of(made), sizes[0], sizes[1]


def _batch(training: Training, layout: Layout | None, obs_size: int, action_size: int) -> Batch:
    draw, rows = np.random.default_rng(0), training.config.batch_size
    agents = (len(layout.names),) if layout else ()
    actions = draw.uniform(-1, 1, (rows, action_size))
    return Batch(
        obs=_normal(draw, rows, obs_size),
        action=jnp.asarray(actions, jnp.float32),
        reward=_normal(draw, rows, *agents),
        next_obs=_normal(draw, rows, obs_size),
        terminated=jnp.zeros(rows),
    )


def _normal(draw: np.random.Generator, *shape: int) -> Any:
    return draw.normal(size=shape).astype(np.float32)


def _episodes(training: Training, obs_size: int, action_size: int) -> Episodes:
    """Whole episodes, each as long as the longest that the environment has."""
    env = JAX_ENVS.get(training.env_id)
    if env is not None:
        steps = env.make(**training.options_of(0)).max_steps
    else:
        made = host.make(training.env_id, training.options_of(0))
        steps = (made.spec.max_episode_steps if made.spec else None) or 1
        made.close()
    shape = (steps, training.config.episodes_per_update)
    draw = np.random.default_rng(0)
    return Episodes(
        obs=_normal(draw, *shape, obs_size),
        action=_normal(draw, *shape, action_size),
        mean=_normal(draw, *shape, action_size),
        reward=_normal(draw, *shape),
        alive=jnp.ones(shape),
    )


# --- recording ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tagged(Mode):
    """A mode that says which slot it came from."""

    slot: int = -1


def _tagged(plan: Plan) -> Plan:
    modes = tuple(_Tagged(plan[slot].letter, int(slot)) for slot in Slot)
    return Plan(modes)  # type: ignore[arg-type]


class _Record(NamedTuple):
    """One norm of one pass, as it was compiled."""

    slot: int
    layer: str
    norm: Norm
    mode: Mode
    rows: int
    networks: set[int]  # that it ran for: none where its branch was not taken


@contextmanager
def _recording() -> Iterator[list[_Record]]:
    records: list[_Record] = []

    def watch(layer: str, norm: Norm, x: Array, mode: Mode, stats: Tree) -> None:
        if not isinstance(mode, _Tagged):
            return  # a measurement beside the update
        record = _Record(mode.slot, layer, norm, Mode(mode.letter), len(x), set())
        records.append(record)
        network = jnp.asarray(stats.get(_MARK, 0))
        jax.debug.callback(lambda index: record.networks.add(int(index)), network)

    nets.WATCHERS.append(watch)
    try:
        yield records
    finally:
        nets.WATCHERS.remove(watch)


def _networks(state: Any) -> dict[str, Network]:
    """Every network of an agent's state, by role, and by agent where there are several."""
    found = {}
    for field, role in ROLES.items():
        one, several = getattr(state, field, None), getattr(state, f"{field}s", None) or ()
        if one is not None:
            found[role] = _unmarked(one)
        for i, network in enumerate(several):
            name = role if len(several) == 1 else f"{role}/{state.layout.names[i]}"
            found[name] = _unmarked(network)
    return found


def _unmarked(network: Network) -> Network:
    return Network(network.params, {k: v for k, v in network.stats.items() if k != _MARK})


def _marked(state: Any, order: dict[str, Network]) -> Any:
    """The state with each network's number among its statistics, which a pass hands through."""
    number = {name: i for i, name in enumerate(order)}

    def mark(network: Network, name: str) -> Network:
        # A stacked critic has a leading axis, which its passes map over.
        lead = jax.tree.leaves(network.params)[0].shape[:1] if name.startswith("critic") else ()
        value = jnp.full(lead, number[name], jnp.int32)
        return Network(network.params, {**network.stats, _MARK: value})

    for field, role in ROLES.items():
        one, several = getattr(state, field, None), getattr(state, f"{field}s", None)
        if one is not None:
            state = state._replace(**{field: mark(one, role)})
        if several:
            names = [role] if len(several) == 1 else [f"{role}/{n}" for n in state.layout.names]
            marked = tuple(mark(net, name) for net, name in zip(several, names, strict=True))
            state = state._replace(**{f"{field}s": marked})
    return state


def _served(state: Any, name: str) -> int:
    """Agents whose rows go through one pass of a network together."""
    if isinstance(state, maddpg.State) and name in ROLES.values():
        return len(state.layout.names)
    return 1


# --- reading -----------------------------------------------------------------------------------


class Behaviour(NamedTuple):
    """What a norm does in one mode."""

    letter: str
    moved: bool
    gradient: bool


@lru_cache(maxsize=256)
def behaviour(norm: Norm, mode: Mode) -> Behaviour:
    """Measure a norm in one mode: are rows coupled, with gradient, and do its statistics move.

    Whether row 0 of a small batch is another when the last row is another, whether its gradient to
    the last row is exactly 0, whether it is another with other running statistics, and whether it
    comes out as it went in.
    """
    features = 2 * norm.groups
    params, stats = norms.init(norm, features)
    x = jax.random.normal(jax.random.key(0), (16, features))

    @_compiled
    def measured(x: Array, stats: Tree) -> Any:
        y, new_stats = norms.apply(norm, params, stats, x, mode)
        other, _ = norms.apply(norm, params, stats, x.at[-1].add(1.0), mode)
        poked = {k: v if k == "count" else v + 1 for k, v in stats.items()}
        elsewhere, _ = norms.apply(norm, params, poked, x, mode)

        def first_row(x: Array) -> Array:
            return norms.apply(norm, params, stats, x, mode)[0][0].sum()

        slope = jax.grad(first_row)(x)[-1]
        same = jax.tree.map(lambda a, b: (a == b).all(), stats, new_stats)
        moved = ~jnp.asarray(jax.tree.leaves(same), bool).all()
        return (y[0] != other[0]).any(), (slope != 0).any(), moved, (y != elsewhere).any(), y

    coupled, gradient, moved, reads, y = measured(x, stats)
    if bool(coupled):
        letter = "T" if bool(gradient) else "S"
        return Behaviour(letter if bool(moved) else letter.lower(), bool(moved), bool(gradient))
    if bool((y == x).all()):
        return Behaviour("B", bool(moved), False)
    return Behaviour("E" if bool(reads) else NO_LETTER, bool(moved), False)


def _calls(records: list[_Record], names: list[str], rows: dict[str, int]) -> list[LayerCall]:
    """The records of passes that ran, each once, by slot, network and place in the pass."""
    # A pass without norms is a row of its own; one with norms is told by them.
    norms_in = {(r.slot, index) for r in records if r.layer for index in r.networks}
    found: dict[LayerCall, tuple[int, ...]] = {}
    for order, record in enumerate(records):
        for index in record.networks:
            name = names[index]
            twice = record.rows == 2 * rows[name]
            joint = twice and record.slot == Slot.REPLAY_Q
            alone = not any(r.slot == Slot.TARGET_Q and r.networks for r in records)
            slots = (4, 5) if joint and alone else (record.slot,)
            if record.layer:
                did = behaviour(record.norm, record.mode)
                letter = _of_pass(did.letter, record.slot) if twice else did.letter
                call = LayerCall(
                    slots, name, record.layer, record.norm.kind, record.rows, letter, *did[1:]
                )
            elif (record.slot, index) in norms_in:
                continue
            else:
                call = LayerCall(slots, name, "", "", record.rows, NO_LETTER, False, False)
            found.setdefault(call, (slots[0], index, order))
    return sorted(found, key=lambda call: found[call])


def _of_pass(letter: str, slot: int) -> str:
    """The letter of a pass over two batches, of a layer that used both batches' statistics."""
    joined = "M" if slot == Slot.POLICY_Q else "J"
    return {"T": joined, "t": joined.lower()}.get(letter, letter)


def _letters(calls: list[LayerCall]) -> tuple[str, list[str]]:
    """A letter a slot, and notes where layers of one slot differ."""
    plan, notes = "", []
    for slot in Slot:
        modes = [c.mode for c in calls if slot in c.slots and c.mode != NO_LETTER]
        found = list(dict.fromkeys(modes))
        if len(found) > 1:
            notes.append(f"slot {int(slot)} has more than one mode: {', '.join(found)}")
        plan += found[0] if found else NO_LETTER
    if plan.strip(NO_LETTER) == "":
        notes.append("nothing here normalizes with a batch's or with running statistics")
    elif NO_LETTER in plan[1:]:
        notes.append(f"{NO_LETTER} in the plan: no norm with statistics of a batch in that slot")
    return plan[1:] if plan[0] in ("E", NO_LETTER) else plan, notes


def _moved(before: Network, after: Network) -> tuple[str, ...]:
    return tuple(
        layer
        for layer, held in before.stats.items()
        if any(not np.array_equal(value, after.stats[layer][k]) for k, value in held.items())
    )


def _synced(
    before: dict[str, Network], after: dict[str, Network], calls: list[LayerCall]
) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for target in (name for name in before if name.split("/")[0].endswith("_target")):
        online = target.replace("_target", "", 1)
        own = any(call.moved for call in calls if call.network == target)
        found[target] = {}
        for layer, held in before[target].stats.items():
            for key in held:
                old, new, online_old, online_new = (
                    np.asarray(networks[name].stats[layer][key], np.float64)
                    for name in (target, online)
                    for networks in (before, after)
                )
                status = _fate(old, new, online_old, online_new, own)
                found[target][f"{layer}.{key}"] = status
    return found


def _fate(
    old: np.ndarray, new: np.ndarray, online_old: np.ndarray, online: np.ndarray, own: bool
) -> str:
    """What a target's statistic received: ``old`` became ``new`` beside ``online``."""
    if np.array_equal(new, online):
        moved = not (np.array_equal(old, new) and np.array_equal(online_old, online))
        return "synced" if moved else "equal, nothing moved"
    if np.array_equal(old, new):
        return "never"
    gap, step = (online - old).ravel(), (new - old).ravel()
    rho = float(gap @ step / (gap @ gap)) if gap.any() else 0.0
    rounding = 4 * np.finfo(np.float32).eps * np.abs(new).max()
    if 0 < rho < 1 and np.abs(step - rho * gap).max() <= 1e-3 * np.abs(step).max() + rounding:
        return f"polyak {rho:.3g}"
    return "moved by its own passes" if own else "moved"
