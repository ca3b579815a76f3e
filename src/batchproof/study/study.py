"""What every study shares: run cells one after another, and write down what they gave.

A cell is one run of the lab (all its seeds at once) in a folder of its own. A study that was
stopped runs again and finds its finished cells, and the last checkpoint of the unfinished one.
The lab is imported when cells of it run: studies on torch alone do not need JAX.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchproof import records

if TYPE_CHECKING:
    from batchproof.lab.loop import Result
    from batchproof.lab.training import Training

LAB = ("jax", "jaxlib", "optax", "numpy", "scipy", "matplotlib")
"""Packages whose versions a study on the lab writes down."""


@dataclass(frozen=True)
class Cell:
    """One run of a study: a name that is also its folder's, and what to train."""

    name: str
    training: Training


def run_cells(cells: Sequence[Cell], out: Path, progress: bool, command: str) -> dict[str, Result]:
    """Run the cells in order, each in ``out/cells/NAME``; finished ones are read back."""
    from batchproof.lab.loop import train

    results = {}
    for i, cell in enumerate(cells):
        results[cell.name] = train(
            cell.training,
            out / "cells" / cell.name,
            progress=progress,
            label=f"{i + 1}/{len(cells)} {cell.name}",
            command=command,
        )
    return results


def write_all_metrics(path: Path, parts: Sequence[dict[str, np.ndarray]]) -> None:
    """Stack the columns of several runs into one Parquet file; a column a part lacks is NaN."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    columns = {}
    for name in names:
        pieces = []
        for part in parts:
            rows = len(next(iter(part.values())))
            pieces.append(part.get(name, np.full(rows, np.nan)))
        columns[name] = np.concatenate(pieces)
    records.write_columns(path, columns)


def write_study(
    out: Path,
    name: str,
    claims: list[dict[str, Any]],
    conditions: list[dict[str, Any]],
    columns: Sequence[dict[str, np.ndarray]],
    *,
    seeds: int,
    steps: int,
    began: float,
    spent_s: float,
    command: str,
    packages: Sequence[str] = LAB,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``metrics.parquet`` and ``study.json``.

    Args:
        out: the study's folder.
        name: the study's.
        claims: with their verdicts.
        conditions: a row each.
        columns: the metrics of each cell.
        seeds: of a condition, the most.
        steps: of each seed, the most.
        began: when the study began, by `time.perf_counter`.
        spent_s: seconds that the cells took. Those that an earlier call finished count.
        command: what a user typed.
        packages: those whose versions matter.
        more: entries of this study alone.

    Returns:
        The content of ``study.json``.
    """
    study = {
        "study": name,
        "claims": claims,
        "conditions": conditions,
        "seeds": seeds,
        "steps": steps,
        "wall_s": max(time.perf_counter() - began, spent_s),
        "versions": records.versions(*packages),
        "machine": records.machine(),
        "command": command,
        **(more or {}),
    }
    write_all_metrics(out / "metrics.parquet", columns)
    records.write_json(out / "study.json", study)
    return study
