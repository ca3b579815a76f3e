"""Hand a subject back as it was, with all that one update of it can reach."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchproof.clinic.subject import Subject, unchanged

_NO_ATTRIBUTES = {"_parameters", "_buffers", "_modules"}


class Attributes:
    """An object's own attributes, and what tensors and plain containers among them hold."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing
        self.values = {k: v for k, v in vars(thing).items() if self.keeps(k)}
        self.contents = [_Content(v) for v in self.values.values() if _Content.fits(v)]

    @staticmethod
    def keeps(name: str) -> bool:
        """Whether an attribute of this name is kept here."""
        # A module's tensors have their own way back, and hooks come and go with their handles.
        return name not in _NO_ATTRIBUTES and "hooks" not in name

    def restore(self) -> None:
        """Put every attribute and its content back."""
        holder = vars(self.thing)
        for name in [n for n in holder if n not in self.values and self.keeps(n)]:
            del holder[name]
        for name, value in self.values.items():
            if name not in holder or holder[name] is not value:
                holder[name] = value
        for content in self.contents:
            content.restore()


CONTAINERS = (dict, list, set, deque, defaultdict, OrderedDict)


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
        return isinstance(thing, randoms) or type(thing) in CONTAINERS

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


@contextmanager
def handed_back(subject: Subject) -> Iterator[None]:
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
        attributes = [Attributes(t) for t in things if hasattr(t, "__dict__") and _is_object(t)]
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
        names = [name for name in vars(thing) if Attributes.keeps(name)]
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
