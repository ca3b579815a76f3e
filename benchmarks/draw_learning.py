"""Draw docs/images/halfcheetah.png from the runs in results/learning.

python benchmarks/draw_learning.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet

from batchproof.study import plots

ROOT = Path(__file__).resolve().parents[1]
LEARNING = ROOT / "results" / "learning"
SHOWN = (
    ("halfcheetah-sac", "SAC, no norm", plots.GREY, "-"),
    ("halfcheetah-crossq-256", "CrossQ 2x256", plots.BLUE, "-"),
)
"""Folder, label, colour and line of each curve."""


def curve(folder: str, label: str, color: str, style: str) -> plots.Curve:
    """The returns of a run, (seeds, evaluations)."""
    table = pyarrow.parquet.read_table(LEARNING / folder / "metrics.parquet").to_pydict()
    steps = sorted(set(table["step"]))
    seeds = sorted(set(table["seed"]))
    returns = np.full((len(seeds), len(steps)), np.nan)
    rows = zip(table["seed"], table["step"], table["return"], strict=True)
    for seed, step, value in rows:
        returns[seeds.index(seed), steps.index(step)] = value
    return plots.Curve(label, np.array(steps), returns, color, style)


def headline(sac: plots.Curve, crossq: plots.Curve) -> str:
    """When CrossQ's mean reaches the one that SAC ends with."""
    reached = crossq.steps[crossq.values.mean(0) >= sac.values[:, -1].mean()]
    if not len(reached):
        return f"CrossQ has not reached SAC's return after {crossq.steps[-1]:,} steps"
    return f"CrossQ has after {reached[0]:,} steps what SAC has after {sac.steps[-1]:,}"


def main() -> None:
    curves = [curve(*shown) for shown in SHOWN]
    count = " and ".join(f"{len(c.values)} of {c.label.split(',')[0]}" for c in curves)
    plots.learning_curves(
        [plots.Panel(f"HalfCheetah-v5, seeds: {count}", curves)],
        ROOT / "docs" / "images" / "halfcheetah.png",
        headline=headline(*curves),
        best=None,
        each_seed=True,
    )


if __name__ == "__main__":
    main()
