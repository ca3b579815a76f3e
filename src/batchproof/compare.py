"""Comparisons: algorithms x environments x norms x placements x mode plans x seeds, in one folder.

A *condition* is what is compared: everything but environment and seeds. It is written as options of
``batchproof train``, so that all that `train` can do can be compared, and what it refuses is left
out with its own reason. A *cell* is a condition on an environment. Its seeds train in one or more
*populations*, each a run folder of its own: ``OUT/cells/ENVIRONMENT/CONDITION/SEEDS``.

Populations are found again by what they hold, not by their name. So a comparison that was stopped
continues, and one that gets more conditions or seeds runs only those. All conditions have the same
seeds, so comparisons are paired.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from batchproof import records
from batchproof.errors import BatchproofError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from batchproof.lab.loop import Result
    from batchproof.lab.training import Training

DEFAULT = "default"
"""As a norm or a mode plan: the algorithm's own."""

Option = tuple[str, ...]
"""An option of ``batchproof train`` and its value, if it has one."""

Build = Callable[[Sequence[str]], "Training"]
"""What ``batchproof train`` would train, from the words after ``train``; raises `BatchproofError`
where it would refuse. ``--out`` may be missing."""

FORMAT = 1
REDRAW_S = 0.2
LAB = ("jax", "jaxlib", "optax", "numpy", "scipy", "gymnasium", "mujoco")
"""Packages whose versions a comparison writes down."""

_NO_EFFECT = re.compile(r"(--[a-z-]+) has no effect")


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
    """

    name: str
    algo: str
    key: str
    words: tuple[str, ...]
    plain: bool
    cost: float


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
        lines = [f"left out: {_listed(names)}: {why}" for why, names in self.left_out.items()]
        return lines + [
            f"{note} ({_listed(names)})" if names else note for note, names in self.notes.items()
        ]


@dataclass
class Population:
    """Seeds of a cell that train at once.

    Attributes:
        training: what to run.
        folder: of the run.
        state: ``waiting``, ``running``, ``finished``, ``stopped`` or ``failed``.
        step: environment steps done by each seed.
        last: mean return over the seeds at the last evaluation.
        result: once it has finished.
        wall_s: time that it took, in this call and earlier ones.
        speed: environment steps of all seeds per second, NaN where unknown.
        error: why it failed, in one line.
    """

    training: Training
    folder: Path
    state: str = "waiting"
    step: int = 0
    last: float = math.nan
    result: Result | None = None
    wall_s: float = 0.0
    speed: float = math.nan
    error: str = ""


@dataclass
class Cell:
    """A condition on an environment."""

    env: str
    condition: Condition
    populations: list[Population] = field(default_factory=list)


# --- the grid -----------------------------------------------------------------------------------


def grid(spec: Spec, build: Build) -> Grid:
    """Every condition that can be trained, once.

    Raises:
        BatchproofError: nothing can be trained, an option has no effect anywhere, two conditions
            have one name, or the baseline is none of them.
    """
    conditions: dict[str, Condition] = {}
    names: dict[str, str] = {}  # by what the condition is
    left_out: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    useful: set[str] = set()
    useless: dict[str, BatchproofError] = {}
    for parts, algo, wanted in _candidates(spec):
        name = "-".join(part for part, _ in parts)
        try:
            options, dropped, training = _fitting(spec, algo, wanted, build)
        except BatchproofError as error:
            left_out.setdefault(str(error), []).append(name)
            continue
        useful.update(option[0] for option in options)
        useless = dropped | useless
        name = "-".join(part for part, option in parts if option not in dropped)
        key = _key(training, env=False)
        known = names.setdefault(key, name)
        for refusal in dropped.values():
            notes.setdefault(re.sub(r": (add|leave) .*", "", str(refusal)), []).append(known)
        if known != name:
            notes.setdefault(f"{name} is the same as {known}", [])
        elif name not in conditions:
            words = (algo.partition(":")[0], *itertools.chain(*options))
            conditions[name] = Condition(
                name, words[0], key, words, _is_plain(training), _cost(training)
            )
        elif conditions[name].key != key:
            raise BatchproofError(f"two conditions are called {name}: give one another name")
    for option, refusal in useless.items():
        if option not in useful:
            raise refusal
    if not conditions:
        raise BatchproofError(f"nothing is left to compare: {next(iter(left_out))}")
    if spec.baseline is not None and spec.baseline not in conditions:
        raise BatchproofError(
            f"--baseline {spec.baseline} is no condition: use one of {', '.join(conditions)}"
        )
    notes = {note: list(dict.fromkeys(held)) for note, held in notes.items()}
    return Grid(tuple(conditions.values()), left_out, notes)


def _listed(names: Sequence[str], most: int = 5) -> str:
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
        yield [(name, None)], algo, own


def _fitting(
    spec: Spec, algo: str, own: Sequence[Option], build: Build
) -> tuple[list[Option], dict[str, BatchproofError], Training]:
    """The options that have an effect, why the others have none, and the training."""
    bare, _, preset = algo.partition(":")
    options = [*([("--preset", preset)] if preset else []), *own]
    given = {option[0] for option in options}
    # A condition's own setting stands before the one for all.
    options += [option for option in spec.shared if option[0] not in given]
    dropped: dict[str, BatchproofError] = {}
    while True:
        words = [bare, *itertools.chain(*options)]
        try:
            return (
                options,
                dropped,
                build([*words, "--env", spec.envs[0], *_seed_words(spec.seeds)]),
            )
        except BatchproofError as error:
            found = _NO_EFFECT.match(str(error))
            kept = [option for option in options if not found or option[0] != found[1]]
            if found is None or len(kept) == len(options):
                raise
            dropped[found[1]] = error
            options = kept


def _norm_options(norm: str) -> list[Option]:
    if norm == DEFAULT:
        return []
    if ":" not in norm:
        return [("--norm", norm)]
    kinds = dict.fromkeys(("actor", "critic"), "none")
    kinds |= dict(part.split(":") for part in norm.split("+"))
    return [(f"--{network}-norm", kind) for network, kind in kinds.items()]


def _seed_words(seeds: Sequence[int]) -> tuple[str, str]:
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


def _key(training: Training, *, env: bool = True) -> str:
    """What a run is but for its seeds; runs with one key belong to one cell."""
    record = records.to_json(training.record())
    return _record_key(record, ("seeds",) if env else ("seeds", "env_id"))


def _record_key(record: Mapping[str, Any], without: Iterable[str] = ("seeds",)) -> str:
    kept = {name: value for name, value in record.items() if name not in without}
    return json.dumps(kept, sort_keys=True)


def listing(spec: Spec, build: Build) -> str:
    """What a comparison would run, and what not, in words."""
    chosen = grid(spec, build)
    rows = [
        ("condition", "what it trains"),
        *((c.name, shlex.join(c.words)) for c in chosen.conditions),
    ]
    parts = ["\n".join(_aligned(rows, left=(0, 1)))]
    parts.append("\n".join(chosen.lines()))
    count = len(chosen.conditions) * len(spec.envs)
    parts.append(
        f"{len(chosen.conditions)} conditions on {', '.join(spec.envs)}: {count} cells of "
        f"{len(spec.seeds)} seeds"
    )
    return "\n\n".join(part for part in parts if part)


def heads(conditions: Sequence[Condition]) -> dict[str, Condition]:
    """The baseline of each algorithm: its first condition without a norm, or else its first."""
    found: dict[str, Condition] = {}
    for condition in sorted(conditions, key=lambda c: not c.plain):
        found.setdefault(condition.algo, condition)
    return {c.algo: found[c.algo] for c in conditions}


# --- the file -----------------------------------------------------------------------------------


def read_file(
    path: Path, options: Mapping[str, bool], train: Mapping[str, bool]
) -> tuple[list[str], list[tuple[str, str, tuple[Option, ...]]]]:
    """The words that a TOML file stands for, and the conditions that it lists.

    A key is an option without its dashes, a list is joined with commas, a table is one KEY=VALUE
    for each of its entries.

    Args:
        path: the file.
        options: what may stand in it; True for those without a value.
        train: the same for a ``[[condition]]``.

    Raises:
        BatchproofError: it cannot be read, or holds what is no option.
    """
    try:
        held = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BatchproofError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BatchproofError(f"{path}: not a TOML file ({error})") from None
    listed = held.pop("condition", [])
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise BatchproofError(f"{path}: write [[condition]] with two brackets, one for each")
    words = list(itertools.chain(*_file_options(path, held, options)))
    conditions = []
    for item in listed:
        algo, name = item.pop("algo", None), item.pop("name", None)
        if not isinstance(algo, str) or not isinstance(name, str) or not name:
            raise BatchproofError(f"{path}: each [[condition]] needs algo = ... and name = ...")
        conditions.append((name, algo, tuple(_file_options(path, item, train))))
    return words, conditions


def _file_options(
    path: Path, table: Mapping[str, Any], known: Mapping[str, bool]
) -> Iterator[Option]:
    for key, value in table.items():
        name = key.replace("_", "-")
        if name not in known:
            raise BatchproofError(f"{path}: unknown key {key}: use some of {', '.join(known)}")
        option = f"--{name}"
        if known[name] != isinstance(value, bool):
            wanted = "true or false" if known[name] else "a value"
            raise BatchproofError(f"{path}: {key} = {json.dumps(value)}: expected {wanted}")
        if value is True:
            yield (option,)
        elif isinstance(value, dict):
            for entry, item in value.items():
                yield option, f"{entry}={json.dumps(item)}"
        elif isinstance(value, list):
            # One number of seeds would be their count.
            end = "," if name == "seeds" and len(value) == 1 else ""
            yield option, ",".join(map(str, value)) + end
        elif value is not False:
            yield option, str(value)


# --- cells --------------------------------------------------------------------------------------


def cells(spec: Spec, conditions: Sequence[Condition], out: Path, build: Build) -> list[Cell]:
    """Every condition on every environment, with the populations in ``out`` that already hold it.

    Raises:
        BatchproofError: ``out`` holds a condition of the same name with other settings.
    """
    held: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    places: dict[Path, dict[str, Any]] = {}
    for path in sorted(out.glob("cells/*/*/*/run.json")):
        try:
            run = records.read_json(path)
            record = run["training"]
            held.setdefault(_record_key(record), []).append((path.parent, run))
        except (BatchproofError, TypeError, KeyError):
            continue  # training there will say what is wrong with it
        places[path.parent.parent] = record
    found = []
    for env, condition in itertools.product(spec.envs, conditions):
        cell = Cell(env, condition)
        words = [*condition.words, "--env", env]
        training = build([*words, *_seed_words(spec.seeds)])
        missing = set(spec.seeds)
        # Finished ones first: they may hold seeds that an unfinished one has as well.
        for folder, run in sorted(
            held.get(_key(training), []), key=lambda item: item[1].get("status") != "finished"
        ):
            seeds = tuple(run["training"]["seeds"])
            if missing & set(seeds):
                missing -= set(seeds)
                cell.populations.append(Population(replace(training, seeds=seeds), folder))
        place = out / "cells" / _slug(env) / _slug(condition.name)
        other = places.get(place)
        if missing and other is not None and _record_key(other) != _key(training):
            wanted = records.to_json(training.record())
            names = sorted(n for n in wanted.keys() | other.keys() if wanted.get(n) != other.get(n))
            raise BatchproofError(
                f"{place} holds other runs (they differ in {', '.join(names)}): "
                "choose another --out, or another name"
            )
        rest = [seed for seed in spec.seeds if seed in missing]
        for first in range(0, len(rest), spec.at_once or len(rest) or 1):
            seeds = tuple(rest[first : first + (spec.at_once or len(rest))])
            cell.populations.append(
                Population(replace(training, seeds=seeds), place / _seeds_name(seeds))
            )
        found.append(cell)
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]", "-", name)


def _seeds_name(seeds: Sequence[int]) -> str:
    first, last = seeds[0], seeds[-1]
    if tuple(seeds) == tuple(range(first, first + len(seeds))):
        return f"seeds-{first}-{last}" if len(seeds) > 1 else f"seed-{first}"
    listed = "_".join(map(str, seeds))
    if len(listed) > 40:
        listed = f"{len(seeds)}_{hashlib.sha256(listed.encode()).hexdigest()[:12]}"
    return f"seeds-{listed}"


def ordered(found: Sequence[Cell], baseline: str | None = None) -> list[tuple[Cell, Population]]:
    """The order to run in: every cell's first population before any second one.

    Within that one environment after the other, there the baselines, then what costs least.
    """
    conditions = [cell.condition for cell in found]
    first = {baseline} if baseline else {head.name for head in heads(conditions).values()}
    envs = list(dict.fromkeys(cell.env for cell in found))
    keyed = [
        ((turn, envs.index(cell.env), cell.condition.name not in first, cell.condition.cost, i),
         (cell, population))
        for i, cell in enumerate(found)
        for turn, population in enumerate(cell.populations)
    ]  # fmt: skip
    return [item for _, item in sorted(keyed, key=lambda pair: pair[0])]


# --- running ------------------------------------------------------------------------------------


def run(
    spec: Spec,
    out: Path,
    build: Build,
    *,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Run what is missing of a comparison and write ``out/compare.json``.

    A cell that fails is marked, and the others go on. Ctrl-C stops at the next evaluation, a second
    one at once (what is lost is at most a minute); the record then says ``interrupted``.

    Args:
        spec: what to compare.
        out: the comparison's folder.
        build: turns words into a training.
        progress: show a table on standard error that follows along, or lines where that is no
            terminal.
        command: what a user typed, for the record.

    Returns:
        The content of ``compare.json``.

    Raises:
        BatchproofError: nothing can be trained, ``out`` holds another comparison or is in use, or
            every cell failed.
    """
    began = time.monotonic()
    deadline = None if spec.budget_s is None else began + spec.budget_s
    chosen = grid(spec, build)
    broken = _broken(spec, build, chosen.conditions[0])
    found = cells(spec, chosen.conditions, out, build)
    queue = ordered(found, spec.baseline)
    with records.locked(out):
        past = _past(out)
        show = _Show(found, queue, spec, began, progress)
        for line in chosen.lines():
            show.say(line)
        status = "finished"
        try:
            for cell, population in queue:
                _recall(population, past.get(_relative(population.folder, out), {}))
                if cell.env in broken:
                    population.state, population.error = "failed", broken[cell.env]
            clock = _Clock(deadline)
            with _first_interrupt(clock, show):
                for cell, population in queue:
                    if population.state != "waiting":
                        continue
                    if clock.has_time():
                        _run_one(cell, population, clock, show)
                    if population.state in ("waiting", "stopped"):
                        status = "interrupted" if clock.asked else "stopped"
                        break
        except KeyboardInterrupt:
            status = "interrupted"
            for _, population in queue:
                if population.state == "running":
                    population.state, population.step = "stopped", _saved_step(population)
        finally:
            show.close()
        if all(population.state == "failed" for _, population in queue):
            raise BatchproofError(f"every cell failed, the first with: {queue[0][1].error}")
        record = _record(spec, chosen, found, out)
        record |= {"status": status, "wall_s": time.monotonic() - began, "command": command}
        records.write_json(out / "compare.json", record)
    return records.to_json(record)


def _broken(spec: Spec, build: Build, condition: Condition) -> dict[str, str]:
    """Environments that cannot be made, with the reason."""
    from batchproof.lab.envs import JAX_ENVS, host

    found = {}
    for env in spec.envs:
        training = build([*condition.words, "--env", env, *_seed_words(spec.seeds)])
        if training.host_env or env not in JAX_ENVS:
            try:
                host.make(env, training.options_of(0)).close()
            except BatchproofError as error:
                found[env] = str(error)
    if len(found) == len(spec.envs):
        raise BatchproofError(next(iter(found.values())))
    return found


def _past(out: Path) -> dict[str, dict[str, Any]]:
    """What an earlier call knew of each population, by its folder."""
    try:
        record = records.read_json(out / "compare.json")
        return {item["folder"]: item for cell in record["cells"] for item in cell["populations"]}
    except (BatchproofError, TypeError, KeyError):
        return {}  # it is only about times


def _recall(population: Population, past: Mapping[str, Any]) -> None:
    """Read a finished population back; for another, how long it has taken so far."""
    from batchproof.lab.loop import train

    population.wall_s = past.get("wall_s") or 0.0
    population.last = math.nan if past.get("last_return") is None else past["last_return"]
    population.step = _saved_step(population)
    try:
        if records.read_json(population.folder / "run.json").get("status") != "finished":
            return
        result = train(population.training, population.folder, progress=False)
    except (BatchproofError, AttributeError):
        return  # running it will say what is wrong
    _finish(population, result)
    if past.get("state") == "finished" and past.get("steps_per_s"):
        population.wall_s, population.speed = past["wall_s"], past["steps_per_s"]
    else:
        population.wall_s += result.wall_s
        population.speed = _speed(population, population.training.steps, population.wall_s)


def _saved_step(population: Population) -> int:
    """Environment steps at its checkpoint, where it would continue."""
    from batchproof.lab import checkpoint

    try:
        state = checkpoint.read_state(population.folder / "checkpoint")
    except BatchproofError:
        return 0
    return int(state["step"]) if state else 0


def _finish(population: Population, result: Result) -> None:
    import numpy as np

    finals = [seed["final_return"] for seed in result.seeds]
    population.result, population.state = result, "finished"
    population.step = population.training.steps
    known = [value for value in finals if not math.isnan(value)]
    population.last = float(np.mean(known)) if known else math.nan


def _speed(population: Population, steps: int, wall_s: float) -> float:
    return steps * len(population.training.seeds) / wall_s if wall_s > 0 else math.nan


@contextmanager
def _first_interrupt(clock: _Clock, show: _Show) -> Iterator[None]:
    """Let the first Ctrl-C stop at the next evaluation; a second one is Python's own."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as under nohup: keep it so
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: Any) -> None:
        clock.asked = True
        signal.signal(signal.SIGINT, before)
        show.say("stopping at the next evaluation; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run_one(cell: Cell, population: Population, clock: _Clock, show: _Show) -> None:
    """Train a population as far as time allows; what goes wrong is written into it."""
    from batchproof.lab.loop import train

    words = [*cell.condition.words, "--env", cell.env, *_seed_words(population.training.seeds)]
    command = shlex.join(["batchproof", "train", *words, "--out", str(population.folder)])
    began = time.monotonic()
    population.state = "running"
    show.start(cell, population)
    try:
        first = population.step = _saved_step(population)
        clock.start()

        def stop(step: int, returns: Sequence[float]) -> bool:
            known = [value for value in returns if not math.isnan(value)]
            population.last = sum(known) / len(known) if known else math.nan
            population.step = step
            population.speed = _speed(population, step - first, time.monotonic() - began)
            show.draw()
            return clock.is_over()

        result = train(
            population.training, population.folder, progress=False, command=command, stop=stop
        )
        if len(result.metrics["step"]) and result.metrics["step"][-1] < population.training.steps:
            population.state = "stopped"
        else:
            _finish(population, result)
        population.speed = _speed(population, population.step - first, time.monotonic() - began)
    except BatchproofError as error:
        population.state, population.error = "failed", str(error)
    except Exception as error:  # whatever an environment or a compiler raises
        line = " ".join(str(error).split())
        population.state = "failed"
        population.error = f"{type(error).__name__}: {line[:300]}"
        if population.folder.is_dir():
            (population.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    population.wall_s += time.monotonic() - began
    show.end(cell, population)


class _Clock:
    """Tells whether there is time for one more evaluation, from what the last one took."""

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self.asked = False  # to stop, by a user
        self.quickest_start = 0.0  # from the beginning of a population to its first evaluation
        self._last = 0.0
        self._first = False

    def has_time(self) -> bool:
        """Whether to begin another population."""
        in_time = self.deadline is None or time.monotonic() + self.quickest_start < self.deadline
        return in_time and not self.asked

    def start(self) -> None:
        """A population begins."""
        self._last, self._first = time.monotonic(), True

    def is_over(self) -> bool:
        """Asked after an evaluation: whether the next one would come too late."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        if self._first:
            self.quickest_start = min(self.quickest_start or took, took)
            self._first = False
        return self.asked or (self.deadline is not None and now + took > self.deadline)


# --- results ------------------------------------------------------------------------------------


def _relative(folder: Path, out: Path) -> str:
    return folder.relative_to(out).as_posix()


def _record(spec: Spec, chosen: Grid, found: Sequence[Cell], out: Path) -> dict[str, Any]:
    statistics, sentences = _statistics(spec, chosen.conditions, found)
    return {
        "format": FORMAT,
        "conditions": [
            {"name": c.name, "algo": c.algo, "train": shlex.join(c.words)}
            for c in chosen.conditions
        ],
        "environments": list(spec.envs),
        "seeds": list(spec.seeds),
        "left_out": [
            {"condition": name, "reason": why}
            for why, names in chosen.left_out.items()
            for name in names
        ],
        "notes": [{"note": note, "conditions": names} for note, names in chosen.notes.items()],
        "cells": [_cell_record(cell, spec.seeds, out) for cell in found],
        "statistics": statistics,
        "sentences": sentences,
        "versions": records.versions(*LAB),
        "machine": records.machine(),
        "git_sha": records.git_sha(),
    }


def _cell_record(cell: Cell, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    from batchproof.study.statistics import average_over_training

    steps, curves = _curves(cell, seeds)
    return {
        "environment": cell.env,
        "condition": cell.condition.name,
        "state": _state(cell),
        "final_returns": {str(seed): float(curve[-1]) for seed, curve in curves.items()},
        "return_over_training": {
            str(seed): float(average_over_training(steps, curve[None])[0])
            for seed, curve in curves.items()
        },
        "diverged": [seed for seed, curve in curves.items() if math.isnan(curve[-1])],
        "populations": [
            {
                "folder": _relative(population.folder, out),
                "seeds": list(population.training.seeds),
                "state": population.state,
                "step": population.step,
                "steps": population.training.steps,
                "last_return": population.last,
                "wall_s": population.wall_s,
                "steps_per_s": population.speed,
                "error": population.error or None,
            }
            for population in cell.populations
        ],
    }


def _state(cell: Cell) -> str:
    """A cell's state in words."""
    for population in cell.populations:
        state = "stopped" if population.state == "waiting" and population.step else population.state
        if state in ("running", "stopped"):
            return f"{state} at {population.step:,} of {population.training.steps:,}"
    states = [population.state for population in cell.populations]
    if len(set(states)) == 1:
        return states[0]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _curves(
    cell: Cell, seeds: Sequence[int]
) -> tuple[NDArray[np.float64], dict[int, NDArray[np.float64]]]:
    """Evaluation steps (T,) and each finished seed's returns (T,), NaN after a divergence."""
    import numpy as np

    steps = np.zeros(0)
    curves: dict[int, NDArray[np.float64]] = {}
    for population in cell.populations:
        if population.result is None:
            continue
        columns = population.result.metrics
        for seed in population.training.seeds:
            if seed in seeds:
                mine = columns["seed"] == seed
                steps = columns["step"][mine].astype(float)
                curves.setdefault(seed, columns["return"][mine].astype(float))
    return steps, {seed: curves[seed] for seed in seeds if seed in curves}


def _statistics(
    spec: Spec, conditions: Sequence[Condition], found: Sequence[Cell]
) -> tuple[list[dict[str, Any]], list[str]]:
    """For each environment a row for each condition that finished, and the comparisons in words."""
    import numpy as np

    from batchproof.study import statistics

    scores: dict[str, dict[str, dict[int, float]]] = {}
    tables: list[dict[str, Any]] = []
    lines: list[str] = []
    several = len(spec.envs) > 1
    for env in spec.envs:
        prefix = f"{env}: " if several else ""
        curves = {
            cell.condition.name: _curves(cell, spec.seeds) for cell in found if cell.env == env
        }
        curves = {name: held for name, held in curves.items() if held[1]}
        finite = [c[np.isfinite(c)] for _, held in curves.values() for c in held.values()]
        every = np.concatenate(finite) if finite else np.zeros(0)
        if not every.size:
            lines.append(f"{prefix}No condition has a result yet.")
            tables.append({"environment": env, "floor": None, "rows": [], "ranking": None})
            continue
        # A diverged seed counts as the lowest return that any condition had here.
        floor = float(every.min())
        rows = []
        scores[env] = {}
        for name, (steps, held) in curves.items():
            filled = np.nan_to_num(np.stack(list(held.values())), nan=floor)
            final, area = filled[:, -1], statistics.average_over_training(steps, filled)
            scores[env][name] = dict(zip(held, final.tolist(), strict=True))
            rows.append(
                {
                    "condition": name,
                    "n": len(held),
                    "diverged": int(sum(math.isnan(curve[-1]) for curve in held.values())),
                    "mean": _interval(statistics.mean_interval(final)),
                    "min": float(final.min()),
                    "max": float(final.max()),
                    "iqm": _interval(statistics.iqm_interval(final)),
                    "return_over_training": _interval(statistics.mean_interval(area)),
                }
            )
        order, line = _ranking(scores[env])
        tables.append({"environment": env, "floor": floor, "rows": rows, "ranking": order})
        lost = [row for row in rows if row["diverged"]]
        if lost:
            listed = ", ".join(f"{row['condition']}: {row['diverged']}" for row in lost)
            lines.append(
                f"{prefix}Seeds diverged ({listed}); each counts as the lowest return seen here, "
                f"{statistics.short(floor)}."
            )
        lines += [prefix + line] if line else []
    pairs = [
        (env, a, b)
        for env in spec.envs
        for a, b in _pairs(conditions, spec.baseline)
        if {a, b} <= scores.get(env, {}).keys() and scores[env][a].keys() & scores[env][b].keys()
    ]
    compared = statistics.compare([(a, scores[env][a], b, scores[env][b]) for env, a, b in pairs])
    for table in tables:
        mine = [c for (env, *_), c in zip(pairs, compared, strict=True)
                if env == table["environment"]]  # fmt: skip
        table["comparisons"] = [
            {
                "a": c.a,
                "b": c.b,
                "seeds": c.seeds,
                "difference": _interval(c.difference),
                "improvement": _interval(c.improvement),
                "p": c.p,
                "p_holm": c.p_holm,
                "verdict": c.verdict,
                "sentence": c.sentence,
            }
            for c in mine
        ]
    for (env, *_), comparison in zip(pairs, compared, strict=True):
        lines.append((f"{env}: " if several else "") + comparison.sentence)
    return tables, lines + _across(spec, conditions, scores)


def _interval(found: Any) -> dict[str, float]:
    return {"value": found.mean, "lo": found.lo, "hi": found.hi}


def _pairs(conditions: Sequence[Condition], baseline: str | None) -> list[tuple[str, str]]:
    """Who is compared with whom: the other, and the baseline."""
    if baseline is not None:
        return [(c.name, baseline) for c in conditions if c.name != baseline]
    head = heads(conditions)
    first, *others = head.values()
    within = [(c.name, head[c.algo].name) for c in conditions if c is not head[c.algo]]
    return within + [(other.name, first.name) for other in others]


def _ranking(scores: Mapping[str, Mapping[int, float]]) -> tuple[list[dict[str, Any]] | None, str]:
    """The conditions from the highest interquartile mean down, and a sentence; None if refused."""
    from batchproof.study import statistics

    if len(scores) < 2:
        return None, ""
    few = {name: len(held) for name, held in scores.items() if len(held) < statistics.MIN_SEEDS}
    if few:
        least = min(few.values())
        return None, (
            f"No ranking: that takes {statistics.MIN_SEEDS} seeds of every condition, and "
            f"{len(few)} of {len(scores)} have fewer (as few as {least})."
        )
    order = statistics.ranking({name: list(held.values()) for name, held in scores.items()})
    (first, best), (second, other) = order[:2]
    overlap = "overlap" if best.lo <= other.hi else "are apart"
    line = (
        f"The highest interquartile mean is {statistics.short(best.mean)}, of {first}; "
        f"next is {second} with {statistics.short(other.mean)}. Their intervals {overlap}."
    )
    return [{"condition": name, "iqm": _interval(iqm)} for name, iqm in order], line


def _across(
    spec: Spec,
    conditions: Sequence[Condition],
    scores: Mapping[str, Mapping[str, Mapping[int, float]]],
) -> list[str]:
    """How often a condition beats its baseline over all environments, which needs no scale."""
    import numpy as np

    from batchproof.study import statistics

    if len(spec.envs) < 2:
        return []
    lines = []
    for a, b in _pairs(conditions, spec.baseline):
        held = [(scores.get(env, {}).get(a, {}), scores.get(env, {}).get(b, {}))
                for env in spec.envs]  # fmt: skip
        shared = set(spec.seeds).intersection(*(side.keys() for pair in held for side in pair))
        if len(shared) < statistics.MIN_SEEDS:
            continue
        seeds = sorted(shared)
        first = np.array([[x[seed] for x, _ in held] for seed in seeds])
        second = np.array([[y[seed] for _, y in held] for seed in seeds])
        found = statistics.probability_of_improvement(first, second)
        lines.append(
            f"Over all {len(held)} environments a run of {a} beats one of {b} in "
            f"{found.mean:.0%} of the cases (95% interval {found.lo:.0%} to {found.hi:.0%})."
        )
    return lines


# --- words --------------------------------------------------------------------------------------


HEADER = ("environment", "condition", "seeds", "return", "95% interval", "IQM", "over training",
          "steps/s", "state")  # fmt: skip


def text(record: Mapping[str, Any]) -> str:
    """A comparison's table, sentences and what went wrong, from the content of ``compare.json``."""
    from batchproof.study.statistics import short

    rows = []
    found = {
        (table["environment"], row["condition"]): row
        for table in record["statistics"]
        for row in table["rows"]
    }

    def number(value: float | None) -> str:
        return "-" if value is None else short(value)

    for cell in record["cells"]:
        row = found.get((cell["environment"], cell["condition"]))
        speeds = [p["steps_per_s"] for p in cell["populations"] if p["steps_per_s"] is not None]
        speed = f"{max(speeds):,.0f}" if speeds else "-"
        start = (cell["environment"], cell["condition"])
        if row is None:
            last = next((p["last_return"] for p in cell["populations"]), None)
            rows.append((*start, "0", number(last), "-", "-", "-", speed, cell["state"]))
            continue
        mean = row["mean"]
        state = cell["state"] + (f", {row['diverged']} diverged" if row["diverged"] else "")
        between = "-" if mean["lo"] is None else f"{short(mean['lo'])} to {short(mean['hi'])}"
        rows.append(
            (*start, str(row["n"]), number(mean["value"]), between, number(row["iqm"]["value"]),
             number(row["return_over_training"]["value"]), speed, state)
        )  # fmt: skip
    parts = ["\n".join(_aligned([HEADER, *rows])), "\n".join(record["sentences"])]
    failed: dict[str, list[str]] = {}
    for cell in record["cells"]:
        for error in dict.fromkeys(p["error"] for p in cell["populations"] if p["error"]):
            failed.setdefault(error, []).append(f"{cell['environment']} {cell['condition']}")
    parts.append("\n".join(f"failed: {_listed(held)}: {why}" for why, held in failed.items()))
    done = sum(cell["state"] == "finished" for cell in record["cells"])
    count = f"{done} of {len(record['cells'])} cells are finished"
    if record["status"] == "finished":
        if failed:
            parts.append(f"{count}; the same command tries those that failed again.")
    else:
        why = {"stopped": "Stopped by --budget", "interrupted": "Interrupted"}[record["status"]]
        parts.append(f"{why}: {count}; the same command continues.")
    return "\n\n".join(part for part in parts if part)


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0, 1, 8)) -> list[str]:
    """Columns of equal width, two spaces apart; those of text on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


class _Show:
    """Follows a comparison on standard error: a table that is drawn anew, or lines."""

    def __init__(
        self,
        found: Sequence[Cell],
        queue: Sequence[tuple[Cell, Population]],
        spec: Spec,
        began: float,
        progress: bool,
        stream: TextIO | None = None,
    ) -> None:
        self.cells, self.queue, self.spec, self.began = found, queue, spec, began
        self.stream = stream or sys.stderr
        self.progress = progress
        self.live = progress and self.stream.isatty()
        self._height = 0
        self._drawn = 0.0

    def say(self, line: str) -> None:
        """One line that stays."""
        if self.progress:
            self._wipe()
            print(line, file=self.stream, flush=True)

    def start(self, cell: Cell, population: Population) -> None:
        """A population begins."""
        if self.live:
            self.draw(now=True)
        else:
            self.say(f"{self._title(cell, population)}: running")

    def end(self, cell: Cell, population: Population) -> None:
        """A population ended, in whatever way."""
        if self.live:
            self.draw(now=True)
            return
        last = "" if math.isnan(population.last) else f", return {population.last:.4g}"
        speed = "" if math.isnan(population.speed) else f", {population.speed:,.0f} steps/s"
        how = population.state + (f": {population.error}" if population.error else "")
        self.say(f"{self._title(cell, population)}: {how}{last}{speed}")

    def _title(self, cell: Cell, population: Population) -> str:
        number = 1 + next(i for i, (_, p) in enumerate(self.queue) if p is population)
        return f"[{number}/{len(self.queue)}] {cell.env} {cell.condition.name}"

    def draw(self, *, now: bool = False) -> None:
        """Draw the table over the last one."""
        if not self.live or (not now and time.monotonic() - self._drawn < REDRAW_S):
            return
        size = shutil.get_terminal_size()
        header, *lines = self.lines()
        room = max(size.lines - 4, 3)
        if len(lines) > room:  # what runs, and what is around it
            at = next(
                (i for i, c in enumerate(self.cells) if any(p.state == "running"
                 for p in c.populations)), 0,
            )  # fmt: skip
            first = min(max(at - room // 2, 0), len(lines) - room)
            lines = lines[first : first + room]
        done = sum(population.state == "finished" for _, population in self.queue)
        foot = f"{done} of {len(self.queue)} finished, {_clock(time.monotonic() - self.began)}"
        if self.spec.budget_s is not None:
            foot += f" of {_clock(self.spec.budget_s)}"
        foot += "; Ctrl-C stops, the same command resumes"
        self._wipe()
        shown = [line[: size.columns - 1] for line in (header, *lines, foot)]
        self.stream.write("\n".join(shown) + "\n")
        self.stream.flush()
        self._height, self._drawn = len(shown), time.monotonic()

    def lines(self) -> list[str]:
        """The table as it stands: a header and a line for each cell."""
        rows = [("environment", "condition", "seeds", "return", "interval", "steps/s", "state")]
        for cell in self.cells:
            known = [p for p in cell.populations if not math.isnan(p.last)]
            sizes = [len(p.training.seeds) for p in known]
            mean = sum(p.last * n for p, n in zip(known, sizes, strict=True)) / max(sum(sizes), 1)
            speeds = [p.speed for p in cell.populations if not math.isnan(p.speed)]
            seeds = sum(len(p.training.seeds) for p in cell.populations)
            rows.append(
                (
                    cell.env,
                    cell.condition.name,
                    str(seeds),
                    f"{mean:.4g}" if known else "-",
                    _interval_text(_finals(cell)),
                    f"{speeds[-1]:,.0f}" if speeds else "-",
                    _state(cell),
                )
            )
        return _aligned(rows, left=(0, 1, 6))

    def _wipe(self) -> None:
        if self._height:
            self.stream.write(f"\x1b[{self._height}A\x1b[J")
            self._height = 0

    def close(self) -> None:
        """Take the table away: the final one comes on standard output."""
        self._wipe()
        self.stream.flush()


def _finals(cell: Cell) -> tuple[float, ...]:
    """Final returns of the finished seeds that did not diverge."""
    results = [population.result for population in cell.populations if population.result]
    finals = [seed["final_return"] for result in results for seed in result.seeds]
    return tuple(value for value in finals if not math.isnan(value))


@cache
def _interval_text(finals: tuple[float, ...]) -> str:
    if len(finals) < 2:
        return "-"
    from batchproof.study.statistics import mean_interval

    found = mean_interval(finals)
    return f"{found.lo:.4g} to {found.hi:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
