"""From the calls that were seen to passes, slots, letters and a mode plan.

A pass is judged by where its output comes from and whether a gradient came back to it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from batchproof.clinic.trace_layer import Event, Seen
from batchproof.clinic.trace_watch import Watch, network_kind
from batchproof.errors import BatchproofError
from batchproof.modes import Plan, Slot


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


@dataclass
class _Pass:
    """The calls in a row that make up one pass of one network."""

    role: str
    kind: str
    target: bool
    events: list[Event]
    whole: bool
    shared: bool
    layers: list[tuple[str, Seen | None]] = field(default_factory=list)
    slots: tuple[int, ...] = ()
    label: str = ""
    twice: bool = False

    @property
    def main(self) -> Event:
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


def passes_of(watch: Watch) -> list[_Pass]:
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
        passes.append(
            _Pass(role, network_kind(role), role in watch.targets, [event], whole, shared)
        )
    _add_layers(watch, passes)
    return passes


def _add_layers(watch: Watch, passes: list[_Pass]) -> None:
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


def _weighted(watch: Watch, one: _Pass, paths: list[str], layers: set[str]) -> set[str]:
    """Innermost modules with parameters, other than normalizing layers and their insides."""
    network = watch.networks[one.role]
    found = set()
    for path in set(paths):
        module = network.get_submodule(path)
        inside = any(path == layer or path.startswith(f"{layer}.") for layer in layers)
        if not inside and next(module.children(), None) is None:
            found |= {path} if next(module.parameters(), None) is not None else set()
    return found


class Reading:
    """From passes to slots, letters and the plan."""

    def __init__(self, watch: Watch, passes: list[_Pass], targets: dict[str, str]) -> None:
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

    def _letter(self, one: _Pass, seen: Seen | None) -> str:
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
