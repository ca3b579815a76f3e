"""What has to be trained for a comparison: cells, their populations, and the order."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchproof import records
from batchproof.compare.conditions import (
    Build,
    Condition,
    Spec,
    heads,
    record_key,
    run_key,
    seed_words,
    slug,
    words_on,
)
from batchproof.errors import BatchproofError
from batchproof.run_record import differing

if TYPE_CHECKING:
    from batchproof.lab.loop import Result
    from batchproof.lab.training import Training


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
    """A condition on an environment; ``words`` of ``batchproof train`` without seeds and folder."""

    env: str
    condition: Condition
    populations: list[Population] = field(default_factory=list)
    words: tuple[str, ...] = ()


def cells(spec: Spec, conditions: Sequence[Condition], out: Path, build: Build) -> list[Cell]:
    """Every condition on every environment, with the populations in ``out`` that already hold it.

    Raises:
        BatchproofError: ``out`` holds a condition of the same name with other settings.
    """
    from batchproof.lab.load import up_to_date  # imports JAX

    held: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    places: dict[Path, dict[str, Any]] = {}
    for path in sorted(out.glob("cells/*/*/*/run.json")):
        try:
            run = records.read_json(path)
            record = up_to_date(run["training"], path)
            held.setdefault(record_key(record), []).append((path.parent, run))
        except (BatchproofError, TypeError, KeyError):
            continue  # training there will say what is wrong with it
        places[path.parent.parent] = record
    found = []
    for env, condition in itertools.product(spec.envs, conditions):
        cell = Cell(env, condition, words=tuple(words_on(condition, spec, env)))
        training = build([*cell.words, *seed_words(spec.seeds)])
        missing = set(spec.seeds)
        # Finished ones first: they may hold seeds that an unfinished one has as well.
        for folder, run in sorted(
            held.get(run_key(training), []), key=lambda item: item[1].get("status") != "finished"
        ):
            seeds = tuple(run["training"]["seeds"])
            if missing & set(seeds):
                missing -= set(seeds)
                cell.populations.append(Population(replace(training, seeds=seeds), folder))
        place = out / "cells" / slug(env) / slug(condition.name)
        other = places.get(place)
        if missing and other is not None and record_key(other) != run_key(training):
            wanted = records.to_json(training.record()) | {"seeds": other["seeds"]}
            raise BatchproofError(
                f"{place} holds other runs ({differing(other, wanted)}): choose another --out, or "
                "another name"
            )
        rest = [seed for seed in spec.seeds if seed in missing]
        for first in range(0, len(rest), spec.at_once or len(rest) or 1):
            seeds = tuple(rest[first : first + (spec.at_once or len(rest))])
            cell.populations.append(
                Population(replace(training, seeds=seeds), place / seeds_name(seeds))
            )
        found.append(cell)
    return found


def seeds_name(seeds: Sequence[int]) -> str:
    """A folder's name for these seeds, different for any others."""
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


def cell_state(cell: Cell) -> str:
    """A cell's state in words."""
    for population in cell.populations:
        state = "stopped" if population.state == "waiting" and population.step else population.state
        if state in ("running", "stopped"):
            return f"{state} at {population.step:,} of {population.training.steps:,}"
    states = [population.state for population in cell.populations]
    if len(set(states)) == 1:
        return states[0]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
