"""What one call of one module did, found by running it again from the state that it had."""

from __future__ import annotations

import contextlib
import functools
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchproof.clinic.handback import Attributes
from batchproof.clinic.probe import ROUNDING, _running_buffers, first_tensor

FIRST_CALLS = 3
"""A module that showed no sign of normalizing in so many calls with the same attributes and plain
arguments is left alone in further such calls."""


SCREEN_ROWS = 8
"""Modules are screened on so many rows, and measured on all where these already show coupling."""


class State:
    """Attributes and buffers of a module and those inside it; parameters are only read."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = [
            (path, part, Attributes(part), [(k, v, _clone(v)) for k, v in part._buffers.items()])
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


def random_states() -> tuple[Any, ...]:
    """The states of torch's, NumPy's and Python's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _set_draws(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])


@dataclass
class Seen:
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

    def __init__(self, frame: Frame, output: Tensor, rows: int) -> None:
        self.frame = frame
        self.module = frame.module
        self.output = output.detach()[:rows]
        self.rows = rows
        self.after = State(frame.module)
        self.draws = random_states()
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
                return output, State(self.module).tensors(), inputs
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


def measure_call(frame: Frame, output: Any, known: bool, first: bool) -> Seen | None:
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
    seen = Seen(frame.module, frame.rows, "?", frame.module.training, (), False, False, False)
    few = min(SCREEN_ROWS, frame.rows)
    for rows in [frame.rows] if known or few == frame.rows else [few, frame.rows]:
        # A layer that couples rows gives another output for fewer of them: then all are taken.
        # A policy may hold anything; what cannot be run again has no letter.
        with contextlib.suppress(Exception):
            if bool(torch.isfinite(y.detach()).all()):
                _fill(seen, _Rerun(frame, y, rows), y, first and not known)
                break
    return seen


def _fill(seen: Seen, run: _Rerun, y: Tensor, first: bool) -> None:
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
        x = floats_in((frame.args, frame.kwargs))[0]
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
    frame: Frame, before: dict[str, Tensor], after: dict[str, Tensor], rows: int | None = None
) -> bool:
    """Whether some buffer went towards the batch's mean."""
    x = floats_in((frame.args, frame.kwargs))[0].detach()[:rows]
    return bool(_changed(before, after)) and bool(_running_buffers(x, before, after)[0])


def floats_in(value: Any) -> list[Tensor]:
    """Floating tensors with at least one axis among a call's arguments or outputs."""
    return [t for t in tensors_in(value) if t.is_floating_point() and t.ndim]


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor among a call's arguments or outputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


@dataclass
class Event:
    """One call of a module that no module of the same network encloses, with all calls in it."""

    roles: tuple[str, ...]
    module: int
    rows: int
    grad: bool
    training: bool
    received: bool = False
    requires_grad: bool = False
    reaches: bool = False
    seen: list[Seen] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)


@dataclass
class Frame:
    """A call that is under way: what it was given and the state that it began in."""

    module: nn.Module
    event: Event
    top: bool
    grad: bool
    rows: int = 0
    args: Any = ()
    kwargs: Any = None
    state: State = None  # type: ignore[assignment]
    rest: dict[int, dict[str, Any]] = field(default_factory=dict)
    children: bool = False
    again: int = 0
    draws: tuple[Any, ...] = ()
