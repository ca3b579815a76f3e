"""Trace: which statistics each pass of each network really used in one update.

A layer is judged by what it did in the call itself, never by its class or its training flag: right
after the call it is run again from the state that it had, with one row replaced, with gradients,
with other buffers. A pass is judged by where its output comes from and whether a gradient came
back to it.

Shapes: ``N`` rows of the replay batch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchproof.clinic.probe import ROUNDING, _running_buffers, first_tensor
from batchproof.clinic.subject import Subject, unchanged
from batchproof.errors import BatchproofError
from batchproof.modes import Plan, Slot

FIRST_CALLS = 3
"""A module that showed no sign of normalizing in so many calls with the same attributes and plain
arguments is left alone in further such calls."""

SCREEN_ROWS = 8
"""Modules are screened on so many rows, and measured on all where these already show coupling."""


@dataclass(frozen=True)
class LayerCall:
    """One call of one normalizing layer, or one pass that went around it.

    Attributes:
        index: number of the pass within the run, from 0.
        network: the role of the network.
        slots: the slots that the pass fills: ``(3,)``, ``(4, 5)`` for one joint pass, ``()`` where
            it is none of the update's.
        label: the pass in reports: the slots, or ``act``, ``update``, ``target``, ``other``.
        layer: the layer's path in the network, '' for the network itself.
        kind: its class, for people to read; nothing depends on it.
        rows: rows of its batch.
        mode: letter of the statistics that it used; ``?`` where it could not be measured.
        training: its own flag at the call.
        moved: buffers that the call changed.
        gradient: whether the call recorded a gradient through the batch's statistics.
    """

    index: int
    network: str
    slots: tuple[int, ...]
    label: str
    layer: str
    kind: str
    rows: int
    mode: str
    training: bool
    moved: tuple[str, ...]
    gradient: bool

    @property
    def name(self) -> str:
        """Network and layer, as reports print it: ``critic.qf0.1``."""
        return f"{self.network}.{self.layer}" if self.layer else self.network


@dataclass(frozen=True)
class Trace:
    """Which statistics the passes of one update used.

    Attributes:
        plan: five letters, slots 1 to 5; '' where there is no such plan, with the ``reason``.
        calls: every call of every normalizing layer, in order.
        synced: for each target network, what became of each buffer of its normalizing layers:
            ``synced``, ``polyak RHO``, ``never``, ``moved``, ``moved by its own passes``, ``equal,
            nothing moved``, ``not in the online network``.
        reason: why there is no plan.
        notes: what the plan does not say.
        batch_size: rows of the replay batch, 0 where unknown.
        bare: label, network and rows of each pass in which no layer normalizes.
    """

    plan: str
    calls: tuple[LayerCall, ...]
    synced: dict[str, dict[str, str]]
    reason: str = ""
    notes: tuple[str, ...] = ()
    batch_size: int = 0
    bare: tuple[tuple[str, str, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as plain dictionaries and lists."""
        return {
            "plan": self.plan or None,
            "reason": self.reason,
            "batch_size": self.batch_size,
            "calls": [
                asdict(call) | {"slots": list(call.slots), "moved": list(call.moved)}
                for call in self.calls
            ],
            "bare": [{"label": a, "network": b, "rows": c} for a, b, c in self.bare],
            "synced": {target: dict(buffers) for target, buffers in self.synced.items()},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"plan {self.plan}" if self.plan else f"no plan: {self.reason}"]
        if self.batch_size:
            lines.append(f"replay batch: {self.batch_size} rows")
        table = Counter(_table_row(call) for call in self.calls)
        table.update((a, b, "-", "-", str(c), "-", "-", "-") for a, b, c in self.bare)
        if table:
            rows = [(*row, str(n)) for row, n in sorted(table.items(), key=_by_slot)]
            lines += ["", *_columns([_HEADER, *rows])]
        for target, buffers in self.synced.items():
            if not buffers:
                continue
            lines += ["", f"running statistics of {target} after the update:"]
            lines += _columns([(f"  {name}", status) for name, status in buffers.items()])
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)


_HEADER = ("slot", "network", "layer", "class", "rows", "mode", "moved", "gradient", "calls")


def _table_row(call: LayerCall) -> tuple[str, ...]:
    return (
        call.label,
        call.network,
        call.layer or "(itself)",
        call.kind,
        str(call.rows),
        call.mode,
        "yes" if call.moved else "no",
        "yes" if call.gradient else "no",
    )


def _by_slot(item: tuple[tuple[str, ...], int]) -> tuple[bool, str]:
    label = item[0][0]
    return not label[0].isdigit(), label


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = (("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))) for row in rows)
    return [line.rstrip() for line in cells]


def trace(
    fn: Callable[[], Any] | Subject,
    networks: Mapping[str, nn.Module] | None = None,
    *,
    targets: Mapping[str, str] | None = None,
    batch_size: int | None = None,
) -> Trace:
    """Run one update and say which statistics each pass of each network really used.

    A function is really run, once, and what it does stays done: it computes, learns and draws the
    same numbers as it would without the trace. A `Subject` is handed back bit for bit as it was,
    its model's optimizers, counters and buffers included.

    Args:
        fn: runs one real update, the actor's included; or a subject with an ``update``.
        networks: by role: ``actor``, ``critic``, ``actor_target``, ``critic_target``; or
            ``policy``, ``q_net``... Several critics may have roles of their own (``critic1``).
        targets: each target network's online network, by role; without it the roles named
            ``X_target`` or ``target_X`` are paired with ``X``.
        batch_size: rows of the replay batch; without it the rows that the actor sees most often.

    Raises:
        BatchproofError: nothing to run, or roles that do not fit.
    """
    if isinstance(fn, Subject):
        if networks is not None or targets is not None:
            raise BatchproofError("a subject names its own networks and targets: trace(subject)")
        if fn.update is None:
            raise BatchproofError(
                f"{fn.name}: give the subject one training update: Subject(..., update=function)"
            )
        with _handed_back(fn):
            return _traced(fn.update, fn.networks, fn.targets, batch_size)
    if not callable(fn):
        raise BatchproofError(
            f"trace takes a function without arguments or a Subject, got {type(fn).__name__}"
        )
    if not networks:
        raise BatchproofError(
            "name the networks: trace(fn, networks={'actor': ..., 'critic': ...})"
        )
    for role, network in networks.items():
        if not isinstance(network, nn.Module):
            raise BatchproofError(
                f"networks[{role!r}] must be a torch.nn.Module, got {type(network).__name__}"
            )
    pairs = _named_targets(networks) if targets is None else dict(targets)
    missing = sorted({n for pair in pairs.items() for n in pair if n not in networks})
    if missing:
        raise BatchproofError(f"targets name networks that are not there: {', '.join(missing)}")
    return _traced(fn, dict(networks), pairs, batch_size)


def _named_targets(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    pairs = {}
    for role in networks:
        online = role.replace("target_", "", 1).replace("_target", "", 1)
        if online != role and online in networks:
            pairs[role] = online
    return pairs


def _traced(
    fn: Callable[[], Any],
    networks: dict[str, nn.Module],
    targets: dict[str, str],
    batch_size: int | None,
) -> Trace:
    watch = _Watch(networks, targets)
    with watch:
        fn()
    watch.sync.look()
    watch.add_kin()
    passes = _passes(watch)
    reading = _Reading(watch, passes, targets)
    size, plan, reason = reading.plan(batch_size)
    calls = reading.calls()
    reading.notes += [
        f"{role} ran within torch.func, where its layers cannot be measured"
        for role in sorted(watch.unseen)
    ]
    synced = watch.sync.result(watch.layers())
    bare = tuple((p.label, p.role, p.rows) for p in passes if not p.layers)
    return Trace(plan, calls, synced, reason, tuple(reading.notes), size, bare)


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_buffers()}


# ------------------------------------------------------------------------------------- one layer


_NO_ATTRIBUTES = {"_parameters", "_buffers", "_modules"}


class _Attributes:
    """An object's own attributes, and what tensors and plain containers among them hold."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing
        self.values = {k: v for k, v in vars(thing).items() if self.keeps(k)}
        self.contents = [_Content(v) for v in self.values.values() if _Content.fits(v)]

    @staticmethod
    def keeps(name: str) -> bool:
        # A module's tensors have their own way back, and hooks come and go with their handles.
        return name not in _NO_ATTRIBUTES and "hooks" not in name

    def restore(self) -> None:
        holder = vars(self.thing)
        for name in [n for n in holder if n not in self.values and self.keeps(n)]:
            del holder[name]
        for name, value in self.values.items():
            if name not in holder or holder[name] is not value:
                holder[name] = value
        for content in self.contents:
            content.restore()


_CONTAINERS = (dict, list, set, deque, defaultdict, OrderedDict)
_ARRAY_BYTES = 2**20  # larger arrays are replay data, which an update reads and does not write


class _Content:
    """What a tensor, a small array, a plain container or a random generator holds."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing
        self.grad: Tensor | None = None
        if isinstance(thing, Tensor):
            self.saved: Any = thing.detach().clone()
            self.requires_grad = thing.requires_grad
            if thing.is_leaf and thing.grad is not None:
                self.grad = thing.grad.detach().clone()
        elif isinstance(thing, torch.Generator):
            self.saved = thing.get_state()
        elif isinstance(thing, random.Random):
            self.saved = thing.getstate()
        elif isinstance(thing, np.random.Generator):
            self.saved = copy.deepcopy(thing.bit_generator.state)
        elif isinstance(thing, np.random.RandomState):
            self.saved = thing.get_state()
        else:
            self.saved = thing.copy()

    @staticmethod
    def fits(thing: Any) -> bool:
        if isinstance(thing, np.ndarray):
            return thing.nbytes <= _ARRAY_BYTES and thing.flags.writeable
        if isinstance(thing, Tensor):
            return not isinstance(thing, nn.Parameter)
        randoms = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
        return isinstance(thing, randoms) or type(thing) in _CONTAINERS

    def restore(self) -> None:
        thing, saved = self.thing, self.saved
        if isinstance(thing, Tensor):
            if thing.shape != saved.shape or thing.dtype != saved.dtype:
                thing.data = saved.clone()
            elif not torch.equal(thing.detach(), saved):
                thing.data.copy_(saved)  # through .data: autograd's version counter stays
            if thing.is_leaf:
                thing.requires_grad_(self.requires_grad)
                thing.grad = self.grad
        elif isinstance(thing, torch.Generator):
            thing.set_state(saved)
        elif isinstance(thing, random.Random):
            thing.setstate(saved)
        elif isinstance(thing, np.random.Generator):
            thing.bit_generator.state = saved
        elif isinstance(thing, np.random.RandomState):
            thing.set_state(saved)
        elif isinstance(thing, np.ndarray):
            thing[...] = saved
        elif isinstance(thing, dict):
            thing.clear()
            thing.update(saved)
        elif isinstance(thing, list):
            thing[:] = saved
        elif isinstance(thing, set):
            thing.clear()
            thing.update(saved)
        else:
            thing.clear()
            thing.extend(saved)


class _State:
    """Attributes and buffers of a module and those inside it; parameters are only read."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = [
            (path, part, _Attributes(part), [(k, v, _clone(v)) for k, v in part._buffers.items()])
            for path, part in module.named_modules()
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the buffers and of tensors kept as plain attributes, by name."""
        found: dict[str, Tensor] = {}
        for path, _, attributes, buffers in self.parts:
            start = f"{path}." if path else ""
            found |= {start + key: copied for key, _, copied in buffers if copied is not None}
            for key, value in attributes.values.items():
                for content in attributes.contents:
                    if isinstance(value, Tensor) and content.thing is value:
                        found[start + key] = content.saved
        return found

    def modes(self) -> list[tuple[nn.Module, dict[str, Any]]]:
        """Each module with its flag and, if it has one, the forward that was put on it."""
        names = ("training", "forward")
        return [
            (part, {n: attributes.values[n] for n in names if n in attributes.values})
            for _, part, attributes, _ in self.parts
        ]

    def lend(self) -> None:
        """Put the module in this state, on copies of its buffers."""
        for _, part, attributes, buffers in self.parts:
            attributes.restore()
            for key, _, copied in buffers:
                part._buffers[key] = _clone(copied)

    def restore(self) -> None:
        """Put back this state with its very buffers."""
        for _, part, attributes, buffers in self.parts:
            attributes.restore()
            part._buffers.clear()
            for key, value, copied in buffers:
                part._buffers[key] = value
                if value is not None and not torch.equal(value, copied):  # type: ignore[arg-type]
                    value.data.copy_(copied)


def _clone(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()


def _draws() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _set_draws(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])


@dataclass
class _Seen:
    """What one call of one module showed."""

    module: nn.Module
    rows: int
    letter: str
    training: bool
    moved: tuple[str, ...]
    gradient: bool
    normalizes: bool
    mixes: bool


class _Rerun:
    """One call again, in place and from the state before it, so that overrides take part.

    A copy of the module would not do: a forward that was put on the instance is a closure, and its
    copy would still work on the original.
    """

    def __init__(self, frame: _Frame, output: Tensor, rows: int) -> None:
        self.frame = frame
        self.module = frame.module
        self.output = output.detach()[:rows]
        self.rows = rows
        self.after = _State(frame.module)
        self.draws = _draws()
        # Hooks of others may have switched the mode after the frame began. They have not switched
        # it back yet; only a forward that switches for itself has.
        self.modes = self.after.modes()
        if not self._faithful():
            self.modes = frame.state.modes()
            if not self._faithful():
                raise ValueError("another output")

    def _faithful(self) -> bool:
        try:
            return not _differ(self()[0], self.output)
        except Exception:
            return False

    def __call__(
        self,
        *,
        change: bool = False,
        poke: tuple[str, ...] | None = None,
        training: bool | None = None,
        grad: bool | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Output, state afterwards and the floating inputs.

        With a ``training`` other than None it is the class's own forward that runs.

        Args:
            change: replace the last row of every floating input.
            poke: start from other values of these buffers.
            training: in this mode, with all modules inside, and otherwise as before the update.
            grad: whether gradients are recorded; None as in the call.
        """
        frame = self.frame
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(frame.grad if grad is None else grad),
        ):
            try:
                frame.state.lend()
                for part, mode in self.modes:
                    vars(part).pop("forward", None)
                    vars(part).update(mode)
                if training is not None:
                    for part in self.module.modules():
                        vars(part).update(frame.rest.get(id(part), {}))
                    self.module.train(training)
                self._poke(poke or ())
                inputs: list[Tensor] = []
                wanted = bool(grad)
                sizes = frame.rows, self.rows
                args = _given(frame.args, inputs, change, wanted, sizes)
                kwargs = _given(frame.kwargs, inputs, change, wanted, sizes)
                _set_draws(frame.draws)
                # The method itself: the call's own hooks have had their say.
                forward = self.module.forward
                # What was put over a whole network may count its calls.
                if training is not None or frame.children:
                    forward = functools.partial(type(self.module).forward, self.module)
                output = first_tensor(forward(*args, **kwargs))
                if output is None or output.shape != self.output.shape:
                    raise ValueError("another output")
                return output, _State(self.module).tensors(), inputs
            finally:
                self.after.restore()
                _set_draws(self.draws)

    def _poke(self, names: tuple[str, ...]) -> None:
        for name in names:
            path, _, key = name.rpartition(".")
            part = self.module.get_submodule(path)
            value = part._buffers.get(key)
            value = vars(part).get(key) if value is None else value
            if isinstance(value, Tensor):
                value.data.mul_(1.5).add_(0.25)  # a variance stays positive

    def through(self, training: bool | None = None) -> bool | None:
        """Whether rows 0 to N-2 of the output have a gradient to the last row of the input.

        None where the layer does something else once gradients are recorded.
        """
        try:
            output, _, inputs = self(grad=True, training=training)
        except Exception:
            return None
        if training is None and _differ(output, self.output):
            return None
        if not output.requires_grad:
            return False
        with torch.inference_mode(False), torch.enable_grad():
            rest = output[:-1]
            weights = torch.linspace(0.5, 1.5, rest.numel(), dtype=rest.dtype, device=rest.device)
            total = (rest * weights.reshape(rest.shape)).sum()
            grads = torch.autograd.grad(total, inputs, allow_unused=True)
        # Where a feature is constant some formulas have no derivative; the others tell.
        found = [g.nan_to_num(0.0, 0.0, 0.0) for g in grads if g is not None and g.numel()]
        largest = max((float(g.abs().max()) for g in found), default=0.0)
        other = max((float(g[-1].abs().max()) for g in found), default=0.0)
        return other > ROUNDING * torch.finfo(output.dtype).eps * largest


def _given(
    value: Any, found: list[Tensor], change: bool, grad: bool, sizes: tuple[int, int]
) -> Any:
    """Fresh copies of a call's arguments; collects the floating ones with a batch axis.

    ``sizes``: rows of the batch, and how many of them to take.
    """
    if isinstance(value, Tensor):
        batched = value.ndim > 0 and len(value) == sizes[0]
        fresh = (value.detach()[: sizes[1]] if batched else value.detach()).clone()
        if not fresh.is_floating_point():
            return fresh
        if batched and change:
            # Far enough that any mean and any variance over the rows moves well above rounding.
            fresh[-1] = fresh[-1] + (1.0 + float(fresh.abs().max())) * len(fresh) ** 0.5
        fresh.requires_grad_((grad and batched) or value.requires_grad)
        if batched:
            found.append(fresh)
        # A leaf that wants a gradient may not be changed in place, as some layers do.
        return fresh.clone() if torch.is_grad_enabled() else fresh
    if type(value) in (tuple, list):
        return type(value)(_given(item, found, change, grad, sizes) for item in value)
    if type(value) is dict:
        return {key: _given(item, found, change, grad, sizes) for key, item in value.items()}
    return value


def _differ(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    if not a.numel():
        return False
    scale = max(float(a.abs().max()), float(b.abs().max()))
    eps = torch.finfo(a.dtype).eps
    return float((a - b).abs().max()) > ROUNDING * eps * scale


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[str, ...]:
    return tuple(
        name
        for name, value in after.items()
        if name not in before
        or value.shape != before[name].shape
        or not torch.equal(value, before[name])
    )


def _floating(names: tuple[str, ...], tensors: dict[str, Tensor]) -> tuple[str, ...]:
    return tuple(name for name in names if tensors[name].is_floating_point())


def _measure(frame: _Frame, output: Any, known: bool, first: bool) -> _Seen | None:
    """What a call did with statistics, None where the module cannot be a normalizing layer.

    Args:
        frame: the call.
        output: what it gave.
        known: the module is known to normalize.
        first: the module's first call: also see what its other mode would do.
    """
    y = first_tensor(output)
    if y is None or not y.ndim or not frame.rows or len(y) != frame.rows:
        return None
    seen = _Seen(frame.module, frame.rows, "?", frame.module.training, (), False, False, False)
    few = min(SCREEN_ROWS, frame.rows)
    for rows in [frame.rows] if known or few == frame.rows else [few, frame.rows]:
        # A layer that couples rows gives another output for fewer of them: then all are taken.
        # A policy may hold anything; what cannot be run again has no letter.
        with contextlib.suppress(Exception):
            if bool(torch.isfinite(y.detach()).all()):
                _fill(seen, _Rerun(frame, y, rows), y, first and not known)
                break
    return seen


def _fill(seen: _Seen, run: _Rerun, y: Tensor, first: bool) -> None:
    frame, several = run.frame, run.rows > 1
    seen.training = run.modes[0][1]["training"]
    before, after = frame.state.tensors(), run.after.tensors()
    seen.moved = _changed(before, after)
    same, _, _ = run()
    changed, after_changed, _ = run(change=True)
    through = run.through() if several else False
    coupled = several and _differ(same[:-1], changed[:-1])
    seen.normalizes = bool(through) or coupled or _follows(frame, before, after)
    if first and not seen.normalizes:
        seen.normalizes = any(_would_normalize(run, training) for training in (True, False))
    state = _floating(tuple(before), before)
    reads = bool(state) and _differ(same, run(poke=state)[0])
    statistics = _floating(seen.moved, after)
    # Statistics that sit on the batch's already do not show that they are updated.
    updates = bool(statistics) or (
        bool(seen.moved) and bool(_floating(_changed(before, after_changed), after_changed))
    )
    if through or coupled:
        letter = "S" if through is False else "T"
        seen.mixes = letter == "S" and bool(statistics) and _differ(same, run(poke=statistics)[0])
    elif reads:
        letter = "E"
    elif updates:
        letter = "T"  # a statistic of each row, or of a single one
    elif not several:
        x = _floats((frame.args, frame.kwargs))[0]
        letter = "B" if x.shape == y.shape and not _differ(x, run.output) else "T"
    else:
        # A layer whose scale is zero hands nothing on; it is not skipped.
        letter = "B" if _differ(same[-1:], changed[-1:]) else "E"
    seen.letter = letter.lower() if letter in "TS" and not updates else letter
    seen.gradient = bool(through) and frame.grad and y.requires_grad


def _would_normalize(run: _Rerun, training: bool) -> bool:
    try:
        same, after, _ = run(training=training)
        changed, _, _ = run(training=training, change=True)
    except Exception:
        return False
    if run.rows > 1 and _differ(same[:-1], changed[:-1]):
        return True
    follows = _follows(run.frame, run.frame.state.tensors(), after, run.rows)
    return follows or bool(run.rows > 1 and run.through(training=training))


def _follows(
    frame: _Frame, before: dict[str, Tensor], after: dict[str, Tensor], rows: int | None = None
) -> bool:
    """Whether some buffer went towards the batch's mean."""
    x = _floats((frame.args, frame.kwargs))[0].detach()[:rows]
    return bool(_changed(before, after)) and bool(_running_buffers(x, before, after)[0])


def _floats(value: Any) -> list[Tensor]:
    return [t for t in _tensors(value) if t.is_floating_point() and t.ndim]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


# -------------------------------------------------------------------------------------- the watch


@dataclass
class _Event:
    """One call of a module that no module of the same network encloses, with all calls in it."""

    roles: tuple[str, ...]
    module: int
    rows: int
    grad: bool
    training: bool
    received: bool = False
    requires_grad: bool = False
    reaches: bool = False
    seen: list[_Seen] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)


@dataclass
class _Frame:
    """A call that is under way: what it was given and the state that it began in."""

    module: nn.Module
    event: _Event
    top: bool
    grad: bool
    rows: int = 0
    args: Any = ()
    kwargs: Any = None
    state: _State = None  # type: ignore[assignment]
    rest: dict[int, dict[str, Any]] = field(default_factory=dict)
    children: bool = False
    again: int = 0
    draws: tuple[Any, ...] = ()


class _Watch:
    """Hooks on every module of every network, for the length of a ``with`` block."""

    def __init__(self, networks: dict[str, nn.Module], targets: dict[str, str]) -> None:
        self.networks = networks
        self.targets = targets
        self.modules: dict[int, nn.Module] = {}
        self.paths = _paths(networks)
        for network in networks.values():
            self.modules |= {id(module): module for module in network.modules()}
        self.events: list[_Event] = []
        self.sync = _Sync(networks, targets)
        self.normalizing: set[int] = set()
        self._stack: list[_Frame] = []
        self._measured: Counter[int] = Counter()
        self._plain: dict[int, tuple[Any, int]] = {}
        self._last: dict[int, _Seen] = {}
        self._rest = {key: _plain_attributes(module) for key, module in self.modules.items()}
        self.unseen: set[str] = set()
        self._handles: list[Any] = []
        self._busy = False
        actors: set[int] = set()
        others: set[int] = set()
        for role, network in networks.items():
            (actors if _kind(role) == "actor" else others).update(map(id, network.parameters()))
        # A features extractor that both use says nothing about where an action came from.
        self._actor_only = actors - others

    def __enter__(self) -> _Watch:
        for module in self.modules.values():
            # Last before the forward and first after it: other people's hooks that switch
            # modes stay outside.
            self._handles += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(
                    self._leave, prepend=True, with_kwargs=True, always_call=True
                ),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def layers(self) -> dict[str, list[str]]:
        """Paths of the normalizing layers by network."""
        found: dict[str, list[str]] = {role: [] for role in self.networks}
        for key in self.paths:
            if self.is_layer(key):
                for role, path in self.paths[key].items():
                    found[role].append(path)
        return found

    def is_layer(self, key: int) -> bool:
        """Whether a module normalizes and no module within it explains that."""
        return key in self.normalizing and not self._explained(self.modules[key])

    def add_kin(self) -> None:
        """Layers that only ran in E, known by what another layer of their kind was seen to do."""
        kinds = {type(self.modules[key]) for key in self.normalizing if self.is_layer(key)}
        for key, module in self.modules.items():
            if type(module) in kinds and next(module.children(), None) is None:
                self.normalizing.add(key)

    def _explained(self, module: nn.Module) -> bool:
        return any(id(m) in self.normalizing for m in module.modules() if m is not module)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._busy:
            return
        key = id(module)
        roles = tuple(self.paths[key])
        around = next((f for f in reversed(self._stack) if set(f.event.roles) & set(roles)), None)
        if around is None:
            parts = _floats((args, kwargs)) or _tensors((args, kwargs))
            rows = len(parts[0]) if parts and parts[0].ndim else 0
            event = _Event(roles, key, rows, torch.is_grad_enabled(), module.training)
            self.sync.look()
            self.events.append(event)
        else:
            event = around.event
        frame = _Frame(module, event, around is None, torch.is_grad_enabled())
        self._stack.append(frame)
        floats = _floats((args, kwargs))
        if torch._C._functorch.peek_interpreter_stack() is not None:
            # Within a torch.func transform tensors have no values to look at.
            self.unseen.add(event.roles[0])
        elif floats and self._worth_measuring(module, args, kwargs):
            frame.args, frame.kwargs = _kept((args, kwargs))
            frame.state, frame.draws = _State(module), _draws()
            frame.rest, frame.rows = self._rest, len(floats[0])
            frame.children = next(module.children(), None) is not None
        elif floats:
            frame.again = len(floats[0])

    def _worth_measuring(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        key = id(module)
        if key in self.normalizing:
            return True
        # A parallel wrapper counts its forwards and may not be run once more.
        if type(module).__module__.startswith("torch.nn.parallel") or self._explained(module):
            return False
        given = [a for a in (*args, *kwargs.values()) if not isinstance(a, Tensor)]
        now = ([_plain_attributes(part) for part in module.modules()], list(map(repr, given)))
        known, times = self._plain.get(key, (None, 0))
        times = times + 1 if known is not None and _alike(known, now) else 1
        self._plain[key] = (now, times)
        return times <= FIRST_CALLS

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._busy:
            return
        frame = self._stack.pop()
        event = frame.event
        event.returned.append(id(module))
        if frame.top:
            self._follow(event, output)
            self.sync.look(event.roles)
        if frame.rows and not self._explained(module):
            self._busy = True
            try:
                known, first = id(module) in self.normalizing, not self._measured[id(module)]
                seen = _measure(frame, output, known, first)
            finally:
                self._busy = False
            self._measured[id(module)] += 1
            if seen is not None:
                self._last[id(module)] = seen
                event.seen.append(seen)
                if seen.normalizes:
                    self.normalizing.add(id(module))
        elif frame.again and id(module) in self._last:
            # Should a later call show that it normalizes after all, this one was like the last.
            last = self._last[id(module)]
            event.seen.append(replace(last, rows=frame.again, training=module.training))

    def _follow(self, event: _Event, output: Any) -> None:
        """Where the output came from, and, later, whether a gradient comes back to it."""

        def received(_: Tensor) -> None:
            event.received = True

        for tensor in _tensors(output):
            if tensor.requires_grad:
                event.requires_grad = True
                with contextlib.suppress(RuntimeError):  # within torch.func
                    tensor.register_hook(received)
                event.reaches = event.reaches or self._from_actor(tensor)

    def _from_actor(self, tensor: Tensor) -> bool:
        todo, visited = [tensor.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            if id(getattr(node, "variable", None)) in self._actor_only:
                return True
            todo += [following for following, _ in node.next_functions]
        return False


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What may choose what a module does, other than its flag: attributes without tensors."""
    return {
        name: value
        for name, value in vars(module).items()
        if _Attributes.keeps(name)
        and name != "training"
        and not isinstance(value, Tensor | nn.Module)
        and type(value) not in _CONTAINERS
    }


def _alike(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    if a[1] != b[1]:
        return False
    same = all(x.keys() == y.keys() for x, y in zip(a[0], b[0], strict=True))
    return same and all(
        value is y[name] for x, y in zip(a[0], b[0], strict=True) for name, value in x.items()
    )


def _kept(value: Any) -> Any:
    """A call's arguments as they are now; each tensor remembers whether it wants a gradient."""
    if isinstance(value, Tensor):
        kept = value.detach().clone()
        return kept.requires_grad_() if value.requires_grad else kept
    if type(value) in (tuple, list):
        return type(value)(_kept(item) for item in value)
    if type(value) is dict:
        return {key: _kept(item) for key, item in value.items()}
    return value


def _paths(networks: dict[str, nn.Module]) -> dict[int, dict[str, str]]:
    """For each module its path in each network; a network around another one gives way to it."""
    paths: dict[int, dict[str, str]] = {}
    for role, network in networks.items():
        for path, module in network.named_modules():
            paths.setdefault(id(module), {})[role] = path
    holders = {role: set(paths[id(network)]) - {role} for role, network in networks.items()}
    for roles in paths.values():
        for role in reversed(list(roles)):
            if any(role in holders[inner] for inner in roles if inner != role):
                del roles[role]
    return paths


def _kind(role: str) -> str:
    name = role.lower().replace("target", "").strip("_- ")
    if name.startswith(("actor", "policy", "pi")):
        return "actor"
    return "critic" if name.startswith(("critic", "q")) else ""


# ----------------------------------------------------------------------------- passes and slots


@dataclass
class _Pass:
    """The calls in a row that make up one pass of one network."""

    role: str
    kind: str
    target: bool
    events: list[_Event]
    whole: bool
    shared: bool
    layers: list[tuple[str, _Seen | None]] = field(default_factory=list)
    slots: tuple[int, ...] = ()
    label: str = ""
    twice: bool = False

    @property
    def main(self) -> _Event:
        """The last call, behind any shared features extractor."""
        return self.events[-1]

    @property
    def rows(self) -> int:
        """Rows that its layers see: a network may join batches within its call."""
        counts = Counter(seen.rows for _, seen in self.layers if seen is not None)
        return counts.most_common(1)[0][0] if counts else self.main.rows

    @property
    def received(self) -> bool:
        return any(event.received for event in self.events)

    @property
    def learns(self) -> bool:
        return any(event.requires_grad for event in self.events)

    @property
    def reaches(self) -> bool:
        return any(event.reaches for event in self.events)


def _passes(watch: _Watch) -> list[_Pass]:
    """Calls grouped into passes: of one network, in a row, none twice, of as many rows."""
    roles: list[str] = []
    for event in reversed(watch.events):
        # What two networks share belongs to the one that goes on from it.
        follows = roles[-1] if roles and roles[-1] in event.roles else event.roles[0]
        roles.append(follows)
    passes: list[_Pass] = []
    for event, role in zip(watch.events, reversed(roles), strict=True):
        whole, shared = not watch.paths[event.module][role], len(event.roles) > 1
        last = passes[-1] if passes else None
        if (
            last is not None
            and last.role == role
            and not last.whole
            and (last.shared or not whole)
            and last.main.rows == event.rows
            # Features taken without gradients go into a head with them; the reverse does not.
            and (last.shared or shared or last.main.grad <= event.grad)
            and all(event.module != other.module for other in last.events)
        ):
            last.events.append(event)
            last.whole, last.shared = whole, last.shared and shared
            continue
        passes.append(_Pass(role, _kind(role), role in watch.targets, [event], whole, shared))
    _add_layers(watch, passes)
    return passes


def _add_layers(watch: _Watch, passes: list[_Pass]) -> None:
    """The normalizing layers of each pass, with those that it went around as None."""
    around: dict[str, dict[str, list[str]]] = {}
    called: list[set[str]] = []
    for one in passes:
        paths = [
            watch.paths[key][one.role]
            for event in one.events
            for key in event.returned
            if one.role in watch.paths[key]
        ]
        called.append(set(paths))
        layers = [
            (watch.paths[id(seen.module)][one.role], seen)
            for event in one.events
            for seen in event.seen
            if watch.is_layer(id(seen.module)) and one.role in watch.paths[id(seen.module)]
        ]
        one.layers.extend(layers)
        names = {path for path, _ in layers}
        steps = _weighted(watch, one, paths, names)
        sides = around.setdefault(watch.targets.get(one.role, one.role), {})
        for i, path in enumerate(paths):
            if path in names and path not in sides:
                earlier = [p for p in paths[:i] if p in steps][-1:]
                later = [p for p in paths[i + 1 :] if p in steps][:1]
                sides[path] = earlier + later
    for one, paths_called in zip(passes, called, strict=True):
        sides = around[watch.targets.get(one.role, one.role)]
        for path, neighbours in sides.items():
            # Weights on both sides were used: the pass came by here, and not through the layer.
            if path not in paths_called and neighbours and set(neighbours) <= paths_called:
                one.layers.append((path, None))


def _weighted(watch: _Watch, one: _Pass, paths: list[str], layers: set[str]) -> set[str]:
    """Innermost modules with parameters, other than normalizing layers and their insides."""
    network = watch.networks[one.role]
    found = set()
    for path in set(paths):
        module = network.get_submodule(path)
        inside = any(path == layer or path.startswith(f"{layer}.") for layer in layers)
        if not inside and next(module.children(), None) is None:
            found |= {path} if next(module.parameters(), None) is not None else set()
    return found


class _Reading:
    """From passes to slots, letters and the plan."""

    def __init__(self, watch: _Watch, passes: list[_Pass], targets: dict[str, str]) -> None:
        self.watch = watch
        self.passes = passes
        self.targets = targets
        self.notes: list[str] = []

    def plan(self, batch_size: int | None) -> tuple[int, str, str]:
        """Rows of the replay batch, the plan and the reason where there is none."""
        if not self.passes:
            return batch_size or 0, "", "the update called none of the networks"
        kinds = {p.kind for p in self.passes}
        if not {"actor", "critic"} <= kinds:
            for one in self.passes:
                one.label = "target" if one.target else "update" if one.learns else "act"
            called = ", ".join(dict.fromkeys(p.role for p in self.passes))
            return (
                batch_size or 0,
                "",
                "the five slots need an actor and a critic as networks of their own, and the "
                f"update called {called}",
            )
        self._choose_slots()
        size = batch_size or self._rows()
        self._choose_others(size)
        self._choose_joint(size)
        for one in self.passes:
            if one.slots and one.slots != (0,):
                one.label = "+".join(map(str, one.slots))
        plan, reason = self._letters()
        return size, plan, reason

    def _choose_slots(self) -> None:
        learned = any(p.received for p in self.passes)
        if not learned:
            self.notes.append(
                "no gradient was taken in the update: slots are told by the graphs alone"
            )
        for one in self.passes:
            learns = one.learns and (one.received or not learned)
            if one.kind == "actor":
                one.slots = (1,) if learns and not one.target else (2,)
            elif one.kind == "critic":
                if one.target or not learns:
                    one.slots = (5,)
                else:
                    one.slots = (3,) if one.reaches else (4,)
                if one.target and one.received:
                    self.notes.append(f"a gradient came back to {one.role}: detach the TD target")

    def _rows(self) -> int:
        """Rows that actors see most often, in their loss before anywhere else."""
        for slot in ((1,), (2,)):
            rows = Counter(p.rows for p in self.passes if p.kind == "actor" and p.slots == slot)
            if rows:
                return rows.most_common(1)[0][0]
        return 0

    def _choose_others(self, size: int) -> None:
        """Passes without a gradient that are no part of the TD target."""
        for slot, label in ((2, "act"), (5, "other")):
            by_target = any(p.slots == (slot,) and p.target for p in self.passes)
            for one in self.passes:
                stray = by_target or (slot == 2 and one.rows != size)
                if one.slots == (slot,) and not one.target and stray:
                    one.slots, one.label = ((0,) if slot == 2 else ()), label
        for one in self.passes:
            if not one.kind:
                one.label = "other"

    def _choose_joint(self, size: int) -> None:
        """Passes over twice the rows: slots 4 and 5 in one forward, or slot 3 with replay rows."""
        at = {slot: [p for p in self.passes if p.slots == (slot,)] for slot in (3, 4, 5)}
        twice = {slot: bool(at[slot]) and all(p.rows == 2 * size for p in at[slot]) for slot in at}
        for one in at[3]:
            one.twice = one.rows == 2 * size
        if twice[4] and (twice[5] or not at[5]):
            for one in at[4] + at[5]:
                one.twice = True
                one.slots = one.slots if at[5] else (4, 5)
        for slot in (3, 4, 5):
            odd = sorted({p.rows for p in at[slot] if p.rows != size and not p.twice})
            if odd:
                rows = ", ".join(map(str, odd))
                self.notes.append(f"slot {slot} sees {rows} rows where the batch has {size}")

    def _letter(self, one: _Pass, seen: _Seen | None) -> str:
        if seen is None:
            return "B"
        if one.twice and seen.letter in "Tt":
            joined = "m" if one.slots == (3,) else "j"
            return joined.upper() if seen.letter == "T" else joined
        return seen.letter

    def _letters(self) -> tuple[str, str]:
        if not any(one.layers for one in self.passes):
            return "", "no layer in these networks normalizes with a batch's statistics"
        letters, missing = "", []
        for slot in list(Slot)[1:]:
            passes = [p for p in self.passes if int(slot) in p.slots]
            if not passes:
                missing.append(f"{int(slot)} ({slot.title})")
                continue
            letters += self._slot_letter(int(slot), passes)
        if missing:
            return "", (
                f"no pass filled slot {', '.join(missing)}: run an update that includes the "
                "actor's, or as many as its delay asks for"
            )
        if "?" in letters:
            return "", "a layer did something else when its call was run again: see the notes"
        try:
            return str(Plan.parse(letters)), ""
        except BatchproofError as error:
            return "", str(error)

    def _slot_letter(self, slot: int, passes: list[_Pass]) -> str:
        found: dict[str, list[str]] = {}
        for one in passes:
            for path, seen in one.layers:
                names = found.setdefault(self._letter(one, seen), [])
                name = f"{one.role}.{path}" if path else one.role
                if name not in names:
                    names.append(name)
                if seen is not None and seen.mixes:
                    self._note(f"slot {slot}: {name} mixes running statistics into the batch's")
        if "?" in found:
            self._note(f"slot {slot}: could not be measured: {', '.join(found['?'])}")
        if len(found) > 1:
            parts = "; ".join(f"{letter} in {', '.join(names)}" for letter, names in found.items())
            self._note(f"slot {slot} has more than one mode: {parts}")
        if found:
            return next(iter(found))
        # Nothing normalizes here: the letter is what a layer would have done.
        one = passes[0]
        letter = "T" if one.main.training else "E"
        if one.twice and letter == "T":
            letter = "M" if slot == 3 else "J"
        self._note(
            f"slot {slot}: no layer of {one.role} normalizes; its letter {letter} is that of its "
            "training flag"
        )
        return letter

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def calls(self) -> tuple[LayerCall, ...]:
        """One record for each call of a layer, and for each layer that a pass went around."""
        return tuple(
            LayerCall(
                index=index,
                network=one.role,
                slots=one.slots,
                label=one.label,
                layer=path,
                kind=type(self.watch.networks[one.role].get_submodule(path)).__name__,
                rows=one.rows if seen is None else seen.rows,
                mode=self._letter(one, seen),
                training=one.main.training if seen is None else seen.training,
                moved=() if seen is None else seen.moved,
                gradient=seen is not None and seen.gradient,
            )
            for index, one in enumerate(self.passes)
            for path, seen in one.layers
        )


# ---------------------------------------------------------------------------------- the targets


class _Sync:
    """What reaches the buffers of each target network, looked at between the passes."""

    def __init__(self, networks: dict[str, nn.Module], targets: dict[str, str]) -> None:
        self.networks = networks
        self.targets = targets
        self.old = {role: _buffers(networks[role]) for role in {*targets, *targets.values()}}
        self.first = dict(self.old)
        self.fates: dict[str, dict[str, str]] = {target: {} for target in targets}

    def look(self, within: tuple[str, ...] = ()) -> None:
        """Compare with the last look; ``within``: the networks that a pass just ran."""
        for target, online in self.targets.items():
            new, theirs = _buffers(self.networks[target]), _buffers(self.networks[online])
            for name, value in new.items():
                old = self.old[target].get(name)
                if old is None or torch.equal(old, value):
                    continue
                if target in within:
                    self.fates[target].setdefault(name, "moved by its own passes")
                else:
                    self.fates[target][name] = _fate(old, value, theirs.get(name))
            self.old[target] = new

    def result(self, layers: dict[str, list[str]]) -> dict[str, dict[str, str]]:
        """By target and buffer, for the buffers of normalizing layers."""
        found: dict[str, dict[str, str]] = {}
        for target, online in self.targets.items():
            paths = {*layers[target], *layers[online]}
            theirs = _buffers(self.networks[online])
            names = [
                n for n in self.old[target] if any(not p or n.startswith(f"{p}.") for p in paths)
            ]
            found[target] = {name: self._final(target, online, name, theirs) for name in names}
        return found

    def _final(self, target: str, online: str, name: str, theirs: dict[str, Tensor]) -> str:
        if name in self.fates[target]:
            return self.fates[target][name]
        if name not in theirs:
            return "not in the online network"
        equal = torch.equal(self.old[target][name], theirs[name])
        begun = self.first[online].get(name)
        if equal and begun is not None and torch.equal(begun, theirs[name]):
            return "equal, nothing moved"
        return "synced" if equal else "never"


def _fate(old: Tensor, new: Tensor, online: Tensor | None) -> str:
    if online is None or online.shape != new.shape:
        return "not in the online network"
    if torch.equal(new, online):
        return "synced"
    if new.is_floating_point() and old.shape == new.shape:
        gap, step = online.double() - old.double(), new.double() - old.double()
        rho = float((gap * step).sum() / (gap * gap).sum())
        rounding = 4 * torch.finfo(new.dtype).eps * float(new.abs().max())
        left = float((step - rho * gap).abs().max())
        if 0 < rho < 1 and left <= 1e-3 * float(step.abs().max()) + rounding:
            return f"polyak {rho:.3g}"
    return "moved"


# ---------------------------------------------------------------------------- the subject's state


@contextmanager
def _handed_back(subject: Subject) -> Iterator[None]:
    """Hand back the subject and all that its update can reach, as it was.

    Beyond `unchanged`: optimizers, counters, loggers, generators, tensors and modules that the
    model or the update function holds. Environments are left out: an update does not step them.
    """
    things = _reachable(subject)
    extra = [thing for thing in things if isinstance(thing, nn.Module)]
    networks = subject.networks | {f"reached {i}": module for i, module in enumerate(extra)}
    within = {id(t) for network in networks.values() for t in _owned(network)}
    with unchanged(replace(subject, networks=networks)):
        contents = [_Content(t) for t in things if _Content.fits(t) and id(t) not in within]
        contents += [
            _Content(t)
            for t in things
            if isinstance(t, nn.Parameter) and id(t) not in within  # a bare log_alpha
        ]
        attributes = [_Attributes(t) for t in things if hasattr(t, "__dict__") and _is_object(t)]
        try:
            yield
        finally:
            for content in contents:
                content.restore()
            for kept in attributes:
                kept.restore()


def _owned(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _is_object(thing: Any) -> bool:
    return not isinstance(thing, Tensor | types.FunctionType | types.MethodType | functools.partial)


def _reachable(subject: Subject) -> list[Any]:
    """Objects that the model and the update hold, networks and closures included."""
    found: dict[int, Any] = {}
    todo: list[tuple[Any, int]] = [(subject.model, 0), (subject.update, 0)]
    todo += [(network, 0) for network in subject.networks.values()]
    update: Any = subject.update
    if isinstance(update, types.FunctionType):
        held = (update.__globals__.get(name) for name in update.__code__.co_names)
        todo += [(thing, 0) for thing in held if not isinstance(thing, types.FunctionType)]
    atoms = (str, bytes, bool, int, float, complex, type, types.ModuleType, np.generic, torch.dtype)
    while todo:
        thing, depth = todo.pop()
        kind = type(thing)
        environment = hasattr(kind, "step") and hasattr(kind, "reset")
        if thing is None or isinstance(thing, atoms) or environment or id(thing) in found:
            continue
        found[id(thing)] = thing
        if depth < 8:
            todo += [(inner, depth + 1) for inner in _held(thing)]
    return list(found.values())


def _held(thing: Any) -> list[Any]:
    if isinstance(thing, Tensor | np.ndarray):
        return []
    if isinstance(thing, nn.Module):
        names = [name for name in vars(thing) if _Attributes.keeps(name)]
        return [*thing.children(), *(vars(thing)[name] for name in names)]
    if isinstance(thing, dict):
        return list(thing.values()) if len(thing) <= 10_000 else []
    if isinstance(thing, list | tuple | set | frozenset | deque):
        return list(thing) if len(thing) <= 10_000 else []
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.FunctionType):
        cells = []
        for cell in thing.__closure__ or ():
            with contextlib.suppress(ValueError):  # a name that was never bound
                cells.append(cell.cell_contents)
        return [*cells, *(thing.__defaults__ or ())]
    return list(vars(thing).values()) if hasattr(thing, "__dict__") else []
