"""What is kept and said of a comparison: statistics, ``compare.json`` and its words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchproof import records
from batchproof.compare.conditions import Condition, Grid, Spec, heads, listed
from batchproof.compare.populations import Cell, cell_state
from batchproof.compare.table import aligned, counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = 1
PACKAGES = ("jax", "jaxlib", "optax", "numpy", "scipy", "gymnasium", "mujoco")
"""Packages whose versions a comparison writes down."""


def summarized(spec: Spec, chosen: Grid, found: Sequence[Cell], out: Path) -> dict[str, Any]:
    """The content of ``compare.json``, but for how the call ended."""
    statistics, sentences = tables_and_sentences(spec, chosen.conditions, found)
    return {
        "format": FORMAT,
        "conditions": [
            {"name": c.name, "algo": c.algo, "train": shlex.join(c.words)}
            for c in chosen.conditions
        ],
        "baseline": spec.baseline,
        "pairs": compared_pairs(chosen.conditions, spec.baseline),
        "environments": list(spec.envs),
        "of_environment": {
            env: shlex.join(word for option in spec.of_env[env] for word in option)
            for env in spec.envs
            if env in spec.of_env
        },
        "seeds": list(spec.seeds),
        "left_out": [
            {"condition": name, "reason": why}
            for why, names in chosen.left_out.items()
            for name in names
        ],
        "notes": [{"note": note, "conditions": names} for note, names in chosen.notes.items()],
        "cells": [cell_record(cell, spec.seeds, out) for cell in found],
        "others": _others(found, out),
        "statistics": statistics,
        "sentences": sentences,
        "versions": records.versions(*PACKAGES),
        "machine": records.machine(),
        "git_sha": records.git_sha(),
    }


def _others(found: Sequence[Cell], out: Path) -> list[str]:
    """Cells in ``out`` that this call did not name, by their folders."""
    mine = {population.folder.parent for cell in found for population in cell.populations}
    places = {path.parent.parent for path in out.glob("cells/*/*/*/run.json")}
    return sorted(place.relative_to(out / "cells").as_posix() for place in places - mine)


def cell_record(cell: Cell, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """What ``compare.json`` holds of a cell."""
    from batchproof.study.statistics import average_over_training

    steps, curves = _curves(cell, seeds)
    return {
        "environment": cell.env,
        "condition": cell.condition.name,
        "state": cell_state(cell),
        "final_returns": {str(seed): float(curve[-1]) for seed, curve in curves.items()},
        "return_over_training": {
            str(seed): float(average_over_training(steps, curve[None])[0])
            for seed, curve in curves.items()
        },
        "diverged": [seed for seed, curve in curves.items() if math.isnan(curve[-1])],
        "populations": [
            {
                "folder": population.folder.relative_to(out).as_posix(),
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


def tables_and_sentences(
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
            counts = ", ".join(f"{row['condition']}: {row['diverged']}" for row in lost)
            lines.append(
                f"{prefix}Seeds diverged ({counts}); each counts as the lowest return seen here, "
                f"{statistics.short(floor)}."
            )
        lines += [prefix + line] if line else []
    pairs = [
        (env, a, b)
        for env in spec.envs
        for a, b in compared_pairs(conditions, spec.baseline)
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


def compared_pairs(conditions: Sequence[Condition], baseline: str | None) -> list[tuple[str, str]]:
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
    for a, b in compared_pairs(conditions, spec.baseline):
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
    parts = ["\n".join(aligned([HEADER, *rows])), "\n".join(record["sentences"])]
    left: dict[str, list[str]] = {}
    for each in record["left_out"]:
        left.setdefault(each["reason"], []).append(each["condition"])
    parts.append("\n".join(f"left out: {listed(held)}: {why}" for why, held in left.items()))
    if record["others"]:
        them = counted(len(record["others"]), "cell")
        parts.append(
            f"The folder holds {them} that this call did not name "
            f"({listed(record['others'], 3)}); a report of the folder shows them too."
        )
    failed: dict[str, list[str]] = {}
    for cell in record["cells"]:
        for error in dict.fromkeys(p["error"] for p in cell["populations"] if p["error"]):
            failed.setdefault(error, []).append(f"{cell['environment']} {cell['condition']}")
    parts.append("\n".join(f"failed: {listed(held)}: {why}" for why, held in failed.items()))
    done = sum(cell["state"] == "finished" for cell in record["cells"])
    all_ = counted(len(record["cells"]), "cell")
    count = f"{done} of {all_} {'is' if len(record['cells']) == 1 else 'are'} finished"
    if record["status"] == "finished":
        if failed:
            parts.append(f"{count}; the same command tries those that failed again.")
    else:
        why = {"stopped": "Stopped by --budget", "interrupted": "Interrupted"}[record["status"]]
        parts.append(f"{why}: {count}; the same command continues.")
    return "\n\n".join(part for part in parts if part)
