"""Which layer makes two runs of a policy differ, and by how much each one does so on its own.

Two runs are recorded call by call in float64 and compared on the rows that should agree. A module
is a *source* when it gives other outputs for the same inputs: it saw other companions, was in
another mode, had another state, drew at random, or ran in one of the two runs only. Modules that
merely pass a difference on are no sources.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchproof.clinic import probe
from batchproof.clinic.probe import Call
from batchproof.clinic.subject import Obs, Subject, unchanged

RELATIVE = 1e-9
"""In float64, a difference above this share of the scale has a meaning: rounding is near 1e-15."""


def tolerance(*values: Tensor, eps: float = 0.0) -> float:
    """Below this a difference of values that were computed in float64 is rounding.

    ``max(1e-9, 16 eps) * max|value|``, with eps of the least precise of the values' types, or
    ``eps`` where that is larger: code that casts to float32 on its way rounds as float32 does.
    """
    eps = max([eps, *(torch.finfo(v.dtype).eps for v in values if v.is_floating_point())])
    finite = [v[v.isfinite()] for v in values]
    largest = max((float(v.abs().max()) for v in finite if v.numel()), default=0.0)
    return max(RELATIVE, 16 * eps) * largest


@dataclass(frozen=True)
class Located:
    """Where two runs part.

    Attributes:
        first: path of the first source in the order of the forward, '' where none was found. A
            network that is itself the source goes by its role.
        largest: path of the source that moves the result most, all others left as they are.
        network: the role of the network that ``first`` belongs to.
        effects: by path, largest change of the result when that source alone behaves as in the
            second run; relative to the module's own output where the result cannot be had.
    """

    first: str = ""
    largest: str = ""
    network: str = ""
    effects: dict[str, float] = field(default_factory=dict)


@contextmanager
def forced_mode(subject: Subject, training: bool | Mapping[int, bool]) -> Iterator[None]:
    """Every module runs in the given mode, whatever the code around it sets.

    Args:
        subject: flags come back as they were at the end.
        training: one mode for all, or a mode for each module by ``id``; modules not named there
            keep the mode that they have now.
    """

    def set_flag(flag: bool, module: nn.Module, args: Any) -> None:
        module.training = flag

    before = [(module, module.training) for _, _, module in subject.modules()]
    handles = []
    for module, now in before:
        flag = training if isinstance(training, bool) else training.get(id(module), now)
        module.training = flag
        handles.append(module.register_forward_pre_hook(partial(set_flag, flag)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, now in before:
            module.training = now


@contextmanager
def in_precision(subject: Subject) -> Iterator[None]:
    """Networks in float64 without gradients; the subject comes back as it was."""
    with unchanged(subject), probe.in_float64(subject), torch.no_grad():
        yield


def once(subject: Subject, run: Callable[[], Tensor], seed: int = 0) -> Tensor:
    """The result of a run from the state that the subject has now, and from a fixed random state.

    Buffers and modes are put back afterwards, so that runs may be compared in any order; call it
    inside `subject.unchanged`, as every rule is.
    """
    with unchanged(subject, parameters=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for example of a variance of one row: measured anyway
        reseed(seed)
        return run().detach().clone()


def reseed(seed: int) -> None:
    """Set the random state of torch, NumPy and Python, inside `subject.unchanged`."""
    # torch.manual_seed would also seed a CUDA that starts only after the audit.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)
    random.seed(seed)


def acting_calls(subject: Subject, batch: Obs) -> list[Call]:
    """Every module's first call while the subject acts on a batch as deployed."""
    calls: list[Call] = []

    def acting() -> Tensor:
        with probe.recorded(subject.networks, keep=1) as found:
            result = subject.act(batch)
        calls.extend(found)
        return result

    once(subject, acting)
    return calls


def acting_modes(calls: list[Call]) -> dict[int, bool]:
    """The mode of each module that ran, by ``id``, as `forced_mode` takes it."""
    return {id(call.module): call.training for call in calls}


def gap(a: Tensor, b: Tensor) -> Tensor:
    """``a - b`` in float64, 0 where both are the same infinity or both are not a number."""
    a, b = a.double(), b.double()
    return torch.where((a == b) | (a.isnan() & b.isnan()), torch.zeros_like(a), a - b)


def locate(
    subject: Subject,
    run_a: Callable[[], Any],
    run_b: Callable[[], Any],
    rows_a: Any,
    rows_b: Any,
) -> Located:
    """Find the modules that make the matching rows of two runs differ.

    Args:
        subject: handed back as it was.
        run_a: runs the networks once, for example on a row alone. Where it gives a tensor, the
            effects are measured on it.
        run_b: runs them the other way, for example on the batch.
        rows_a: index (an integer, a slice, an index tensor) of the rows to compare in ``run_a``.
        rows_b: index of the same rows in ``run_b``.
    """
    with in_precision(subject):
        calls_a, result_a = _record(subject, run_a)
        calls_b, _ = _record(subject, run_b)
        sources = _sources(calls_a, calls_b, rows_a, rows_b)
        if not sources:
            return Located()
        effects: dict[str, float] = {}
        for source in sources:
            effect = _effect(subject, run_a, result_a, rows_a, source)
            effects[_path(source.call)] = max(effect, effects.get(_path(source.call), 0.0))
    first = sources[0].call
    return Located(_path(first), max(effects, key=effects.__getitem__), first.role, effects)


def _path(call: Call) -> str:
    return call.path or call.role


def _record(subject: Subject, run: Callable[[], Any]) -> tuple[list[Call], Any]:
    calls: list[Call] = []

    def recording() -> Tensor:
        with probe.recorded(subject.networks) as found:
            result = run()
        calls.extend(found)
        return result if isinstance(result, Tensor) else torch.empty(0)

    return calls, once(subject, recording)


@dataclass(frozen=True)
class _Source:
    """A call of run a, and what it gives on the same inputs under the conditions of run b."""

    call: Call
    occurrence: int
    other: Tensor | None
    relative: float


def _numbered(calls: list[Call]) -> dict[tuple[int, int], Call]:
    """Calls by module and by how often it ran before, in their order."""
    counts: dict[int, int] = {}
    numbered = {}
    for call in calls:
        count = counts.get(id(call.module), 0)
        counts[id(call.module)] = count + 1
        numbered[id(call.module), count] = call
    return numbered


def _sources(calls_a: list[Call], calls_b: list[Call], rows_a: Any, rows_b: Any) -> list[_Source]:
    a, b = _numbered(calls_a), _numbered(calls_b)
    ran_a, ran_b = {key[0] for key in a}, {key[0] for key in b}
    # The run with more modules gives the order, so that those it has alone stand in their place.
    order = a if len(ran_a) > len(ran_b) else b
    sources: list[_Source] = []
    for key, call in order.items():
        if any(_contains(call, source.call) for source in sources):
            continue  # the source inside explains it
        if key[0] not in ran_a or key[0] not in ran_b:
            sources.append(_Source(call, key[1], None, float("inf")))
        elif key in a and key in b:
            source = _compare(a[key], b[key], key[1], rows_a, rows_b)
            if source is not None:
                sources.append(source)
    return sources


def _contains(outer: Call, inner: Call) -> bool:
    if outer.role != inner.role or outer.path == inner.path:
        return False
    return outer.path == "" or inner.path.startswith(outer.path + ".")


def _compare(a: Call, b: Call, occurrence: int, rows_a: Any, rows_b: Any) -> _Source | None:
    y_a, y_b = _at(probe.first_tensor(a.output), rows_a), _at(probe.first_tensor(b.output), rows_b)
    if y_a is None or y_b is None or not _differ(y_a, y_b):
        return None
    same, inputs, kwargs = _given(a, b, rows_a, rows_b)
    if same:
        other: Tensor | None = y_b
    else:
        try:
            output = probe.rerun(replace(b, inputs=inputs, kwargs=kwargs))
        # A module that cannot run outside its network is not blamed.
        except Exception:
            return None
        other = _at(probe.first_tensor(output), rows_b)
    if other is None or not _differ(y_a, other):
        return None
    scale = float(y_a.abs().max()) or 1.0
    return _Source(a, occurrence, other, probe.difference(y_a, other) / scale)


def _at(value: Tensor | None, rows: Any) -> Tensor | None:
    if value is None or value.ndim == 0:
        return value
    try:
        return value[rows]
    except IndexError:
        return None


def _differ(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False  # not the same rows: nothing can be said
    return not float(gap(a, b).abs().max()) <= tolerance(a, b) if a.numel() else False


def _given(
    a: Call, b: Call, rows_a: Any, rows_b: Any
) -> tuple[bool, tuple[Any, ...], dict[str, Any]]:
    """Whether both calls were given the same rows, and b's arguments with a's rows in them."""
    same = True

    def mixed(x_a: Any, x_b: Any) -> Any:
        nonlocal same
        if isinstance(x_b, dict) and isinstance(x_a, dict):
            return {key: mixed(x_a.get(key), value) for key, value in x_b.items()}
        if not isinstance(x_b, Tensor) or not isinstance(x_a, Tensor):
            return x_b
        part_a, part_b = _at(x_a, rows_a), _at(x_b, rows_b)
        if part_a is None or part_b is None or part_a.shape != part_b.shape:
            return x_b
        if part_a.is_floating_point():
            same = same and not _differ(part_a, part_b)
        else:
            same = same and bool(torch.equal(part_a, part_b))
        if x_b.ndim == 0:
            return part_a.clone()
        result = x_b.clone()
        result[rows_b] = part_a
        return result

    inputs = tuple(mixed(x_a, x_b) for x_a, x_b in zip(a.inputs, b.inputs, strict=False))
    kwargs = {key: mixed(a.kwargs.get(key), value) for key, value in b.kwargs.items()}
    return same, inputs + b.inputs[len(inputs) :], kwargs


def _effect(
    subject: Subject, run: Callable[[], Any], result: Tensor, rows: Any, source: _Source
) -> float:
    """Largest change of run a's result when the source alone behaves as in run b."""
    if source.other is None or not isinstance(source.call.output, Tensor) or not result.numel():
        return source.relative
    seen = 0

    def swap(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen - 1 != source.occurrence:
            return None
        changed = output.clone()
        changed[rows] = source.other
        return changed

    handle = source.call.module.register_forward_hook(swap)
    try:
        swapped = once(subject, run)
    finally:
        handle.remove()
    if swapped.shape != result.shape or not result.is_floating_point():
        return source.relative
    before, after = _at(result, rows), _at(swapped, rows)
    return source.relative if before is None or after is None else probe.difference(before, after)
