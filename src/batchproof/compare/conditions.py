"""What is compared: the conditions that a grid of flags stands for."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchproof import records
from batchproof.errors import BatchproofError

if TYPE_CHECKING:
    from batchproof.lab.training import Training

DEFAULT = "default"
"""As a norm or a mode plan: the algorithm's own."""

Option = tuple[str, ...]
"""An option of ``batchproof train`` and its value, if it has one."""

Build = Callable[[Sequence[str]], "Training"]
"""What ``batchproof train`` would train, from the words after ``train``; raises `BatchproofError`
where it would refuse. ``--out`` may be missing."""

_NO_EFFECT = re.compile(r"(--[a-z-]+) has no effect|(--set \S+): \S+ has no such setting")
_HINT = r": (add|leave|did you mean|it has) .*"
_KEYED = ("--set", "--env-option")


@dataclass(frozen=True)
class Spec:
    """What to compare.

    Attributes:
        algos: each ``ALGO`` or ``ALGO:PRESET``.
        envs: environment ids.
        norms: each `DEFAULT`, a kind, ``critic:KIND``, ``actor:KIND`` (the other network has none)
            or ``actor:KIND+critic:KIND``.
        placements: where the norms sit; none leaves it to the algorithm.
        modes: mode plans, `DEFAULT` for the algorithm's own.
        shared: options of every condition; where one has no effect it is left away.
        extra: conditions outside the grid: a name, the algorithm and its options.
        of_env: options of an environment alone, such as its length; they stand before all others.
        seeds: of every condition.
        at_once: the most seeds in one population; all conditions get their first ones before any
            gets more. None trains all at once.
        baseline: name of the condition that all are compared with; None compares each with the
            unnormalized one of its algorithm, and those with each other.
        budget_s: seconds after which no more is begun and what runs is stopped at an evaluation.
    """

    algos: tuple[str, ...]
    envs: tuple[str, ...]
    norms: tuple[str, ...] = (DEFAULT,)
    placements: tuple[str, ...] = ()
    modes: tuple[str, ...] = (DEFAULT,)
    shared: tuple[Option, ...] = ()
    extra: tuple[tuple[str, str, tuple[Option, ...]], ...] = ()
    of_env: Mapping[str, tuple[Option, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    at_once: int | None = None
    baseline: str | None = None
    budget_s: float | None = None


@dataclass(frozen=True)
class Condition:
    """One thing to compare.

    Attributes:
        name: in tables, and of its folder.
        algo: without a preset.
        key: what it is, as text: two conditions with one key are the same.
        words: of ``batchproof train``, without environment, seeds and folder.
        plain: whether no network of it is normalized.
        cost: of an environment step, in multiplications of weights; it decides the order alone.
        options: the words after the algorithm, one by one.
    """

    name: str
    algo: str
    key: str
    words: tuple[str, ...]
    plain: bool
    cost: float
    options: tuple[Option, ...] = ()


@dataclass(frozen=True)
class Grid:
    """The conditions of a comparison, and what is not among them.

    Attributes:
        conditions: each once.
        left_out: why combinations cannot be trained, with their names.
        notes: where options have no effect and conditions are the same, with their names.
    """

    conditions: tuple[Condition, ...]
    left_out: dict[str, list[str]]
    notes: dict[str, list[str]]

    def lines(self) -> list[str]:
        """One line for each reason."""
        lines = [f"left out: {listed(names)}: {why}" for why, names in self.left_out.items()]
        return lines + [
            f"{note} ({listed(names)})" if names else note for note, names in self.notes.items()
        ]


def grid(spec: Spec, build: Build) -> Grid:
    """Every condition that can be trained, once.

    Raises:
        BatchproofError: nothing can be trained, a condition that was written out cannot, an option
            has no effect anywhere, two conditions have one name or one folder, or the baseline is
            none of them.
    """
    conditions: dict[str, Condition] = {}
    names: dict[str, str] = {}  # by what the condition is
    left_out: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    useful: set[str] = set()
    useless: dict[str, BatchproofError] = {}
    written = {name for name, *_ in spec.extra}
    for parts, algo, wanted in _candidates(spec):
        name = "-".join(part for part, _ in parts)
        try:
            options, dropped, training = _fitting(spec, algo, wanted, build)
        except BatchproofError as error:
            if name in written:  # not one of many that a grid makes: somebody asked for it
                raise BatchproofError(f"condition {name}: {error}") from None
            left_out.setdefault(str(error), []).append(name)
            continue
        useful.update(map(_label, options))
        useless = dropped | useless
        name = "-".join(part for part, option in parts if option not in dropped)
        key = run_key(training, env=False)
        known = names.setdefault(key, name)
        for refusal in dropped.values():
            notes.setdefault(re.sub(_HINT, "", str(refusal)), []).append(known)
        if known != name:
            notes.setdefault(f"{name} is the same as {known}", [])
        elif name not in conditions:
            words = (algo.partition(":")[0], *itertools.chain(*options))
            conditions[name] = Condition(
                name, words[0], key, words, _is_plain(training), _cost(training), tuple(options)
            )
        elif conditions[name].key != key:
            raise BatchproofError(f"two conditions are called {name}: give one another name")
    for option, refusal in useless.items():
        if option not in useful:
            raise refusal
    if not conditions:
        raise BatchproofError(f"nothing is left to compare: {next(iter(left_out))}")
    folders: dict[str, str] = {}
    for name in conditions:
        other = folders.setdefault(slug(name), name)
        if other != name:
            raise BatchproofError(
                f"conditions {other} and {name} would have one folder, {slug(name)}: give one "
                "another name"
            )
    if spec.baseline is not None and spec.baseline not in conditions:
        raise BatchproofError(
            f"--baseline {spec.baseline} is no condition: use one of {', '.join(conditions)}"
        )
    notes = {note: list(dict.fromkeys(held)) for note, held in notes.items()}
    return Grid(tuple(conditions.values()), left_out, notes)


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first ones by name, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _candidates(
    spec: Spec,
) -> Iterator[tuple[list[tuple[str, str | None]], str, tuple[Option, ...]]]:
    """Every combination: parts of its name (each with its option), algorithm and options."""
    places: tuple[str | None, ...] = spec.placements or (None,)
    for algo, norm, place, modes in itertools.product(spec.algos, spec.norms, places, spec.modes):
        parts: list[tuple[str, str | None]] = [(algo, None)]
        options = _norm_options(norm)
        if norm != DEFAULT:
            parts.append((norm, None))
        if place is not None:
            one = norm.partition(":")[0] if ":" in norm and "+" not in norm else None
            option = f"--{one}-placement" if one else "--placement"
            options.append((option, place))
            parts.append((place, option))
        if modes != DEFAULT:
            options.append(("--modes", modes))
            parts.append((modes, "--modes"))
        yield parts, algo, tuple(options)
    for name, algo, own in spec.extra:
        # --norm critic:batch is of the grid alone.
        spread = [_norm_options(o[1]) if o[0] == "--norm" and ":" in o[1] else [o] for o in own]
        yield [(name, None)], algo, tuple(itertools.chain(*spread))


def _fitting(
    spec: Spec, algo: str, own: Sequence[Option], build: Build
) -> tuple[list[Option], dict[str, BatchproofError], Training]:
    """The options that have an effect, why the others have none, and the training."""
    bare, _, preset = algo.partition(":")
    options = [*([("--preset", preset)] if preset else []), *own]
    given = set(map(_label, options))
    # A condition's own setting stands before the one for all.
    options += [option for option in spec.shared if _label(option) not in given]
    dropped: dict[str, BatchproofError] = {}
    while True:
        words = _words_on(bare, options, spec, spec.envs[0])
        try:
            return options, dropped, build([*words, *seed_words(spec.seeds)])
        except BatchproofError as error:
            found = _NO_EFFECT.match(str(error))
            label = found and (found[1] or found[2])
            kept = [option for option in options if _label(option) != label]
            if label is None or len(kept) == len(options):
                raise
            dropped[label] = error
            options = kept


def words_on(condition: Condition, spec: Spec, env: str) -> list[str]:
    """Words of ``batchproof train`` for a condition on an environment, without seeds and folder."""
    return _words_on(condition.algo, condition.options, spec, env)


def _words_on(algo: str, options: Sequence[Option], spec: Spec, env: str) -> list[str]:
    own = spec.of_env.get(env, ())
    given = set(map(_label, own))
    kept = [option for option in options if _label(option) not in given]
    return [algo, *itertools.chain(*kept), "--env", env, *itertools.chain(*own)]


def _label(option: Option) -> str:
    """What an option sets: of those that are given once for each key, the key as well."""
    name, *value = option
    return f"{name} {value[0].partition('=')[0]}" if name in _KEYED else name


def slug(name: str) -> str:
    """A name as a folder, never a hidden one or the one above."""
    found = re.sub(r"[^\w.+-]", "-", name)
    return re.sub(r"^\.+", lambda dots: "-" * len(dots[0]), found)


def _norm_options(norm: str) -> list[Option]:
    if norm == DEFAULT:
        return []
    if ":" not in norm:
        return [("--norm", norm)]
    kinds = dict.fromkeys(("actor", "critic"), "none")
    for part in norm.split("+"):
        network, _, kind = part.partition(":")
        if network not in kinds:
            raise BatchproofError(f"norm {norm!r}: unknown network {network!r}: use actor, critic")
        kinds[network] = kind
    return [(f"--{network}-norm", kind) for network, kind in kinds.items()]


def seed_words(seeds: Sequence[int]) -> tuple[str, str]:
    """Seeds as an option of ``batchproof train``."""
    if tuple(seeds) == tuple(range(len(seeds))):
        return "--seeds", str(len(seeds))
    return "--seeds", ",".join(map(str, seeds)) + ("," if len(seeds) == 1 else "")


def _is_plain(training: Training) -> bool:
    nets = [getattr(training.config, name, None) for name in ("actor", "critic")]
    return all(net.norm.kind == "none" for net in nets if net is not None)


def _cost(training: Training) -> float:
    cost = 0.0
    for name, copies in (("actor", 1), ("critic", getattr(training.config, "critics", 1))):
        net = getattr(training.config, name, None)
        widths = (16, *net.hidden, 1) if net is not None else ()  # 16: of some input
        cost += copies * sum(a * b for a, b in itertools.pairwise(widths))
    return cost * training.gradient_steps / training.update_every


def run_key(training: Training, *, env: bool = True) -> str:
    """What a run is but for its seeds; runs with one key belong to one cell."""
    record = records.to_json(training.record())
    return record_key(record, ("seeds",) if env else ("seeds", "env_id"))


def record_key(record: Mapping[str, Any], without: Iterable[str] = ("seeds",)) -> str:
    """`run_key` of a run's record on disk."""
    kept = {name: value for name, value in record.items() if name not in without}
    return json.dumps(kept, sort_keys=True)


def heads(conditions: Sequence[Condition]) -> dict[str, Condition]:
    """The baseline of each algorithm: its first condition without a norm, or else its first."""
    found: dict[str, Condition] = {}
    for condition in sorted(conditions, key=lambda c: not c.plain):
        found.setdefault(condition.algo, condition)
    return {c.algo: found[c.algo] for c in conditions}
