"""Trace: which statistics each pass of each network really used in one update.

A layer is judged by what it did in the call itself, never by its class or its training flag: right
after the call it is run again from the state that it had, with one row replaced, with gradients,
with other buffers. A pass is judged by where its output comes from and whether a gradient came
back to it.

Shapes: ``N`` rows of the replay batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from batchproof.clinic.handback import handed_back
from batchproof.clinic.subject import Subject
from batchproof.clinic.trace_plan import LayerCall, Reading, passes_of
from batchproof.clinic.trace_watch import Watch
from batchproof.errors import BatchproofError


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
        with handed_back(fn):
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
    watch = Watch(networks, targets)
    with watch:
        fn()
    watch.sync.look()
    watch.add_kin()
    passes = passes_of(watch)
    reading = Reading(watch, passes, targets)
    size, plan, reason = reading.plan(batch_size)
    calls = reading.calls()
    reading.notes += [
        f"{role} ran within torch.func, where its layers cannot be measured"
        for role in sorted(watch.unseen)
    ]
    synced = watch.sync.result(watch.layers())
    bare = tuple((p.label, p.role, p.rows) for p in passes if not p.layers)
    return Trace(plan, calls, synced, reason, tuple(reading.notes), size, bare)
