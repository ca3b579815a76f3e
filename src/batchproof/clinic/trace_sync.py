"""What reached the running statistics of target networks in one update."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_buffers()}


class Sync:
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
