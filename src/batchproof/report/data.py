"""Run and study folders in, conditions on tasks out.

A *task* is an environment with its options; a *condition* is everything else that was chosen; a
*cell* is a condition on a task, with its seeds. Conditions are named by what differs between them.
"""

from __future__ import annotations

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchproof import records, run_record
from batchproof.errors import BatchproofError

RETURNS = ("return", "score")
"""Columns that can hold the return; pixel studies write the game's score."""

SEPARATOR = " · "
"""Between the parts of a condition's name: parts and lists of names have commas."""

_NOT_METRICS = ("seed", "step", "diverged")
_NO_NORM = "no norm"
_FACTS = {
    "status": str,
    "wall_s": int | float,
    "command": str,
    "git_sha": str,
    "versions": dict,
}

_LENGTHS = ("steps", "learning starts", "eval every", "eval episodes", "buffer size")
"""Settings that tasks need of their own: named where they differ on one task."""


@dataclass(frozen=True)
class Cell:
    """One condition on one task.

    Attributes:
        condition: its name in the report.
        task: the environment, in words.
        plan: letters of the mode plan (`batchproof.modes.Plan`), None where no layer has modes.
        seeds: their numbers.
        steps: environment steps of the evaluations, shape (T,).
        metrics: by name, shape (seeds, T); ``return`` is always there. NaN after a divergence.
        source: the folder, as given.
        facts: what its record says besides: ``status``, ``wall_s``, ``command``, ``git_sha``,
            ``versions``; of joined runs also ``seconds_per_step``. What is unknown is missing.
        settings: what was chosen, flat, for naming.
        environment: the environment's id and options, flat, for naming.
        root: the folder that was named, of which this is one run or the only one.
        title: what a comparison calls the condition, "" where it is of none.
        versus: what the comparison calls that which it compares this one with, "" for nothing.
    """

    condition: str
    task: str
    plan: str | None
    seeds: tuple[int, ...]
    steps: NDArray[np.float64]
    metrics: Mapping[str, NDArray[np.float64]]
    source: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    root: str = ""
    title: str = ""
    versus: str = ""


class _NotEvaluated(BatchproofError):
    """A run that has no evaluation yet."""


class _Found(NamedTuple):
    """A run or study, and what a comparison calls it and compares it with."""

    folder: Path
    title: str = ""
    versus: str = ""


def read(folders: Sequence[Path], notes: list[str] | None = None) -> list[Cell]:
    """Every cell in the folders, named, in the order given.

    Args:
        folders: of runs and studies, or that hold such.
        notes: gets a line for each thing that is left out: runs below a folder that have no
            evaluation yet, and unfinished runs of a condition that has finished ones.

    Raises:
        BatchproofError: no folder, or one that is no run or study, is damaged or has no evaluation.
    """
    if not folders:
        raise BatchproofError("give at least one run or study folder")
    notes = [] if notes is None else notes
    cells: list[Cell] = []
    seen: set[Path] = set()
    empty: list[_NotEvaluated] = []
    for root in folders:
        for folder, title, versus in _found(root):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            try:
                own = _read_run(folder) if (folder / "run.json").exists() else _read_study(folder)
            except _NotEvaluated as error:
                if folder == root:
                    raise
                empty.append(error)
                notes.append(f"Left out: {folder} has no evaluation yet.")
                continue
            cells += [replace(cell, root=str(root), title=title, versus=versus) for cell in own]
    if not cells:
        raise empty[0]
    return _distinct(_named(cells), notes)


def _found(folder: Path) -> list[_Found]:
    """The folder itself if it is a run or a study, else those below it."""
    if not folder.is_dir():
        raise BatchproofError(f"{folder}: no such folder; give one that holds run.json")
    if (folder / "run.json").exists() or (folder / "study.json").exists():
        return [_Found(folder)]
    below = sorted(path.parent for path in folder.rglob("run.json"))
    if not below:
        raise BatchproofError(
            f"{folder}: neither a run (run.json) nor a study (study.json), and none below it; "
            "give folders that batchproof train or batchproof study wrote"
        )
    return _as_compared(folder, below)


def _as_compared(folder: Path, runs: Sequence[Path]) -> list[_Found]:
    """A comparison's runs in its own order, its baseline first; other folders' as they are."""
    path = folder / "compare.json"
    if not path.exists():
        return [_Found(run) for run in runs]
    record = records.read_json(path)
    try:
        baseline = record.get("baseline")
        versus = dict(record.get("pairs", []))  # older ones have none
        cells = sorted(record["cells"], key=lambda cell: cell["condition"] != baseline)
        known = [
            _Found(folder / each["folder"], cell["condition"], versus.get(cell["condition"], ""))
            for cell in cells
            for each in cell["populations"]
        ]
        held = {one.folder for one in known}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BatchproofError(
            f"{path}: not the record of a comparison; name the folders of its runs instead"
        ) from None
    others = [_Found(run) for run in runs if run not in held]
    return [one for one in known if one.folder in runs] + others


def _read_run(folder: Path) -> list[Cell]:
    run = records.read_json(folder / "run.json")
    training = run.get("training") if isinstance(run, dict) else None
    if not isinstance(training, dict) or not {"algo", "env_id", "seeds"} <= training.keys():
        raise BatchproofError(f"{folder / 'run.json'}: not a run record; give another folder")
    run_record.check_training(training, folder / "run.json")
    columns = _columns(folder)
    # One dictionary for all seeds, or one for each: each set of options is a task of its own.
    options = training.get("env_options") or {}
    by_task: dict[str, list[int]] = defaultdict(list)
    for i, seed in enumerate(training["seeds"]):
        mine = options if isinstance(options, dict) else options[i]
        by_task[json.dumps(mine, sort_keys=True)].append(seed)
    facts = _facts(run, folder / "run.json")
    settings = _settings(training)
    found = []
    for text, seeds in by_task.items():
        mine = np.isin(columns["seed"], seeds)
        if mine.any():
            found.append(
                _cell(
                    {name: values[mine] for name, values in columns.items()},
                    folder,
                    plan=settings.get("plan"),
                    facts=facts,
                    settings=settings,
                    environment={"env_id": training["env_id"]} | json.loads(text),
                )
            )
    if not found:
        raise _NotEvaluated(f"{folder / 'metrics.parquet'}: no evaluation of any seed yet")
    return found


def _read_study(folder: Path) -> list[Cell]:
    """A study's cells: rows of its metrics that agree in every column of text."""
    path = folder / "study.json"
    study = records.read_json(path)
    if not isinstance(study, dict) or not isinstance(study.get("conditions"), list):
        raise BatchproofError(f"{path}: not a study record; give another folder")
    columns = _columns(folder)
    words = [name for name, values in columns.items() if values.dtype.kind in "OUS"]
    keys = list(zip(*(columns[name].tolist() for name in words), strict=True))
    keys = keys or [()] * len(columns["seed"])
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    numbers = np.array([number[key] for key in keys])
    facts = _facts(study, path, ("command", "versions"))
    found = []
    for key in number:
        mine = numbers == number[key]
        row = _study_row(study["conditions"], key)
        named = {name: value for name, value in zip(words, key, strict=True) if value is not None}
        if row.get("label"):
            named["condition"] = row["label"]
        cell = _cell(
            {name: values[mine] for name, values in columns.items() if name not in words},
            folder,
            plan=row.get("modes"),
            facts=facts | _facts(row, path, ("wall_s",) if row.get("wall_s") else ()),
            environment={"env_id": f"study {study.get('study', folder.name)}"},
        )
        first = named.pop("algo", None)
        name = SEPARATOR.join(map(str, ([first] if first else []) + list(named.values())))
        found.append(replace(cell, condition=name or str(study.get("study", folder.name))))
    if len({cell.condition for cell in found}) < len(
        found
    ):  # labels that do not tell the rows apart
        found = [
            replace(cell, condition=SEPARATOR.join(map(str, key)))
            for cell, key in zip(found, number, strict=True)
        ]
    return found


def _facts(
    record: Mapping[str, Any], path: Path, names: Sequence[str] = tuple(_FACTS)
) -> dict[str, Any]:
    """What a record says besides its results; what it leaves out or has as null is missing."""
    found = {name: record[name] for name in names if record.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, _FACTS[name]):
            raise BatchproofError(
                f"{path}: {name} cannot be {json.dumps(value)[:40]}; it was edited: give another "
                "folder"
            )
    return found


def _study_row(conditions: Sequence[Any], key: Sequence[Any]) -> Mapping[str, Any]:
    """The study's record of a condition: its name is made of the same words, in some order."""
    words = sorted("-".join(map(str, key)).split("-"))
    for row in conditions:
        if isinstance(row, dict) and sorted(str(row.get("name")).split("-")) == words:
            return row
    return {}


def _columns(folder: Path) -> dict[str, NDArray[Any]]:
    path = folder / "metrics.parquet"
    if not path.exists():
        raise _NotEvaluated(
            f"{path}: no such file; the run has no evaluation yet, or its folder was moved in part"
        )
    columns = records.read_columns(path)
    missing = [name for name in ("seed", "step") if name not in columns]
    if not any(name in columns for name in RETURNS):
        missing.append("return")
    if missing:
        raise BatchproofError(
            f"{path}: no column {', '.join(missing)}, so there is no learning curve to draw; "
            "a study without one has its own report.html"
        )
    return columns


def _cell(
    columns: Mapping[str, NDArray[Any]],
    folder: Path,
    *,
    plan: Any,
    facts: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any],
) -> Cell:
    """Rows of seeds and steps as arrays (seeds, T)."""
    step = columns["step"].astype(np.float64)
    seed = columns["seed"].astype(np.float64)
    kept = np.isfinite(step) & np.isfinite(seed)
    seeds, row = np.unique(seed[kept].astype(np.int64), return_inverse=True)
    steps, column = np.unique(step[kept], return_inverse=True)
    metrics = {}
    for name, values in columns.items():
        if name in _NOT_METRICS or values.dtype.kind not in "fiu":
            continue
        table = np.full((seeds.size, steps.size), np.nan)
        table[row, column] = values[kept]
        metrics[name] = np.where(np.isfinite(table), table, np.nan)
    key = next(name for name in RETURNS if name in columns)
    returns = metrics.pop(key, None)
    if returns is None or not steps.size:
        raise BatchproofError(f"{folder / 'metrics.parquet'}: the column {key} holds no numbers")
    # A seed that has no return yet has not diverged: leave those evaluations out. One that has
    # none from some evaluation on has.
    later = np.isfinite(returns)[:, ::-1].cumsum(axis=1, dtype=bool)[:, ::-1]
    sound = ~(np.isnan(returns) & later).any(axis=0)
    return Cell(
        condition="",
        task="",
        plan=plan if isinstance(plan, str) else None,
        seeds=tuple(seeds.tolist()),
        steps=steps[sound],
        metrics={
            "return": returns[:, sound],
            **{
                name: values[:, sound]
                for name, values in metrics.items()
                if np.isfinite(values[:, sound]).any()
            },
        },
        source=str(folder),
        facts=facts,
        settings=settings or {},
        environment=environment,
    )


def _settings(training: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen, flat: the algorithm, the norm in words, the plan, and every other setting.

    What has no effect is left out: a plan where no layer has modes, the details of no norm.
    """
    config = training.get("config")
    config = dict(config) if isinstance(config, dict) else {}
    norms = {
        name: net["norm"]
        for name, net in config.items()
        if isinstance(net, dict) and isinstance(net.get("norm"), dict)
    }
    words = {name: _norm_words(norm) for name, norm in norms.items()}
    if len(set(words.values())) == 1:
        norm = next(iter(words.values()))
    else:
        norm = ", ".join(f"{name} {word}" for name, word in words.items())
    flat = {"algo": training["algo"], "norm": norm or _NO_NORM}
    plan = config.pop("plan", None)
    if plan is not None and any(norm.get("kind") in ("batch", "renorm") for norm in norms.values()):
        flat["plan"] = str(plan)
    skip = ("algo", "config", "env_id", "env_options", "seeds")
    rest = {key: value for key, value in training.items() if key not in skip}
    for key, value in _flat(config | rest):
        owner, _, name = key.rpartition(" norm ")
        if owner and (norms.get(owner, {}).get("kind") == "none" or name in ("kind", "placement")):
            continue
        flat[key] = value
    return flat


def _norm_words(norm: Mapping[str, Any]) -> str:
    kind = str(norm.get("kind"))
    return _NO_NORM if kind == "none" else f"{kind} {norm.get('placement', '')}".strip()


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(item, dict):
            yield from _flat(item, f"{name} ")
        else:
            yield name, item


def _named(cells: Sequence[Cell]) -> list[Cell]:
    """The same cells with the names of their conditions and tasks."""
    runs = [cell for cell in cells if cell.settings]
    shown = [
        key
        for key in ("norm", "plan")
        if len({cell.settings[key] for cell in runs if key in cell.settings}) > 1
    ]
    of_algo: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for cell in runs:
        algo, env_id = cell.settings["algo"], cell.environment["env_id"]
        of_algo[algo].append(cell.settings)
        of_algo[algo, env_id].append(cell.settings)
    of_env: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        of_env[cell.environment["env_id"]].append(cell.environment)
    named = []
    for cell in cells:
        env = cell.environment
        task = [str(env["env_id"])]
        task += _differing(env, of_env[env["env_id"]], skip=("env_id",))
        name = cell.condition
        if cell.settings:
            algo = cell.settings["algo"]
            parts = [str(algo)]
            parts += [str(cell.settings[key]) for key in shown if key in cell.settings]
            said = ("algo", "norm", "plan")
            parts += _differing(cell.settings, of_algo[algo], skip=(*said, *_LENGTHS))
            lengths = {key: cell.settings[key] for key in _LENGTHS if key in cell.settings}
            parts += _differing(lengths, of_algo[algo, env["env_id"]], skip=())
            name = SEPARATOR.join(parts)
        named.append(replace(cell, condition=name, task=", ".join(task)))
    # Where all are of comparisons they keep the names from there, if these tell them apart as well.
    both = {(cell.condition, cell.title) for cell in named}
    if len(both) == len(dict(both)) == len({title for _, title in both if title}):
        named = [replace(cell, condition=cell.title) for cell in named]
    return named


def _differing(
    mine: Mapping[str, Any], alike: Sequence[Mapping[str, Any]], skip: Sequence[str]
) -> list[str]:
    """Settings in which this one departs from most of `alike`, as words.

    Without a majority every value is said. A setting that one record has and another lacks tells
    versions apart, not conditions.
    """
    varying = {}
    for key, value in mine.items():
        counts = Counter(_text(other[key]) for other in alike if key in other)
        if key not in skip and 2 * counts[_text(value)] <= counts.total():
            varying[key] = _text(value)
    words = []
    for key, text in varying.items():
        owner, _, name = key.partition(" ")
        if owner == "critic" and varying.get(f"actor {name}") == text:
            continue  # said once for both
        both = owner == "actor" and varying.get(f"critic {name}") == text
        words.append(f"{name if both else key} {text}")
    return words


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "×".join(map(_text, value))
    return "none" if value is None else str(value)


def _distinct(cells: Sequence[Cell], notes: list[str]) -> list[Cell]:
    """One cell for each condition and task.

    Runs of the same condition with other seeds are joined. Runs with the same seeds (another
    version of the code, say) are told apart by their folders: the named ones, and where one of
    these holds a seed twice the runs' own. Seeds that have only begun would cut finished ones short
    and are left out.
    """
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.condition, cell.task].append(cell)
    found = []
    for group in groups.values():
        group = _finished(group, notes)
        if len(group) == 1 or _fit(group):
            found.append(_joined(group))
            continue
        by_root: dict[str, list[Cell]] = defaultdict(list)
        for cell in group:
            by_root[cell.root].append(cell)
        for root, own in by_root.items():
            parts = [(root, own)] if len(own) == 1 or _fit(own) else [(c.source, [c]) for c in own]
            found += [
                replace(_joined(held), condition=f"{held[0].condition} ({name})")
                for name, held in parts
            ]
    return found


def _finished(group: list[Cell], notes: list[str]) -> list[Cell]:
    """Those that have finished, if any have, or at least come as far."""
    ended = [cell for cell in group if cell.facts.get("status") in ("finished", None)]
    if not ended:
        return group
    length = min(cell.steps[-1] for cell in ended)
    kept = [cell for cell in group if cell.steps[-1] >= length]
    for cell in group:
        if cell.steps[-1] < length:
            seeds = ", ".join(map(str, cell.seeds))
            notes.append(
                f"Left out: seeds {seeds} of {cell.condition} on {cell.task}, at "
                f"{cell.steps[-1]:,.0f} of {length:,.0f} steps."
            )
    return kept


def _fit(group: Sequence[Cell]) -> bool:
    """Whether runs can be joined: no seed twice, and evaluations at the same steps."""
    counted = Counter(seed for cell in group for seed in cell.seeds)
    return max(counted.values()) == 1 and bool(_shared_steps(group).size)


def _shared_steps(group: Sequence[Cell]) -> NDArray[np.float64]:
    return functools.reduce(np.intersect1d, (cell.steps for cell in group))


def _joined(group: Sequence[Cell]) -> Cell:
    if len(group) == 1:
        return group[0]
    steps = _shared_steps(group)
    names = [name for name in group[0].metrics if all(name in cell.metrics for cell in group)]
    picks = [np.isin(cell.steps, steps) for cell in group]
    walls = [cell.facts["wall_s"] for cell in group if "wall_s" in cell.facts]
    states = {cell.facts.get("status") for cell in group}
    facts = dict(group[0].facts)
    if walls:
        facts["wall_s"] = sum(walls)
    if len(walls) == len(group):
        # Each over its own steps: the joined curve ends with the shortest of them.
        facts["seconds_per_step"] = sum(
            wall / cell.steps[-1] for wall, cell in zip(walls, group, strict=True)
        )
    if states - {"finished", None}:
        facts["status"] = "running"
    return replace(
        group[0],
        seeds=tuple(seed for cell in group for seed in cell.seeds),
        steps=steps,
        metrics={
            name: np.concatenate(
                [cell.metrics[name][:, pick] for cell, pick in zip(group, picks, strict=True)]
            )
            for name in names
        },
        source=", ".join(dict.fromkeys(cell.source for cell in group)),
        facts=facts,
    )
