"""Hooks on every module of every network while an update runs."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from batchproof.clinic.handback import CONTAINERS, Attributes
from batchproof.clinic.trace_layer import (
    FIRST_CALLS,
    Event,
    Frame,
    Seen,
    State,
    floats_in,
    measure_call,
    random_states,
    tensors_in,
)
from batchproof.clinic.trace_sync import Sync


class Watch:
    """Hooks on every module of every network, for the length of a ``with`` block."""

    def __init__(self, networks: dict[str, nn.Module], targets: dict[str, str]) -> None:
        self.networks = networks
        self.targets = targets
        self.modules: dict[int, nn.Module] = {}
        self.paths = _paths(networks)
        for network in networks.values():
            self.modules |= {id(module): module for module in network.modules()}
        self.events: list[Event] = []
        self.sync = Sync(networks, targets)
        self.normalizing: set[int] = set()
        self._stack: list[Frame] = []
        self._measured: Counter[int] = Counter()
        self._plain: dict[int, tuple[Any, int]] = {}
        self._last: dict[int, Seen] = {}
        self._rest = {key: _plain_attributes(module) for key, module in self.modules.items()}
        self.unseen: set[str] = set()
        self._handles: list[Any] = []
        self._busy = False
        actors: set[int] = set()
        others: set[int] = set()
        for role, network in networks.items():
            (actors if network_kind(role) == "actor" else others).update(
                map(id, network.parameters())
            )
        # A features extractor that both use says nothing about where an action came from.
        self._actor_only = actors - others

    def __enter__(self) -> Watch:
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
            parts = floats_in((args, kwargs)) or tensors_in((args, kwargs))
            rows = len(parts[0]) if parts and parts[0].ndim else 0
            event = Event(roles, key, rows, torch.is_grad_enabled(), module.training)
            self.sync.look()
            self.events.append(event)
        else:
            event = around.event
        frame = Frame(module, event, around is None, torch.is_grad_enabled())
        self._stack.append(frame)
        floats = floats_in((args, kwargs))
        if torch._C._functorch.peek_interpreter_stack() is not None:
            # Within a torch.func transform tensors have no values to look at.
            self.unseen.add(event.roles[0])
        elif floats and self._worth_measuring(module, args, kwargs):
            frame.args, frame.kwargs = _kept((args, kwargs))
            frame.state, frame.draws = State(module), random_states()
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
                seen = measure_call(frame, output, known, first)
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

    def _follow(self, event: Event, output: Any) -> None:
        """Where the output came from, and, later, whether a gradient comes back to it."""

        def received(_: Tensor) -> None:
            event.received = True

        for tensor in tensors_in(output):
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
        if Attributes.keeps(name)
        and name != "training"
        and not isinstance(value, Tensor | nn.Module)
        and type(value) not in CONTAINERS
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


def network_kind(role: str) -> str:
    """``actor``, ``critic`` or '', by the beginning of a role."""
    name = role.lower().replace("target", "").strip("_- ")
    if name.startswith(("actor", "policy", "pi")):
        return "actor"
    return "critic" if name.startswith(("critic", "q")) else ""
