"""batch-vs-single: with batch norm the same state acts differently in a batch and alone.

Two texts say so: a question-and-answer article on batch norm in reinforcement learning, and a
notebook of a course project (DDPG and MADDPG, two agents that play tennis) that skips batch norm
where a single state comes in. This package holds their claims A1 to A6 and B1 to B3 (B4 is the
study `maddpg-batchnorm`), the predictions and the decision rules; all were written before the full
run.

What is run: DDPG on Pendulum-v1, trained with transitions from a batch of vectorized environments.
The conditions differ in the norm and in how the actor normalizes when acting (slot 0): alone by
running statistics (``E``), by the statistics of the batch of environments (``T``), or not at all
(``B``). The trained actors are then measured: in one pass, as policies, and in the TD error.

Read in this order: `conditions` (what is run, predictions, bounds of the rules), `training` (a
condition's seeds), `gaps` (one pass, of trained actors), `other_actors` (of the notebook's and with
dropout), `measures` (all that is measured), `verdicts` (claims and their rules), `page` (the
report).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.study.claims.batch_vs_single.conditions import STARTS, chosen
from batchproof.study.claims.batch_vs_single.measures import measure
from batchproof.study.claims.batch_vs_single.page import render
from batchproof.study.claims.batch_vs_single.training import train_cell
from batchproof.study.claims.batch_vs_single.verdicts import describe, judge
from batchproof.study.study import write_study

NAME = "batch-vs-single"


def run(
    out: Path,
    *,
    seeds: int | None = None,
    steps: int | None = None,
    quick: bool = False,
    conditions: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Run the study and write ``study.json``, ``report.html``, pictures and metrics into ``out``.

    Args:
        out: the study's folder. A stopped study finds its finished cells there.
        seeds: for each condition, default 5.
        steps: environment steps of each seed, default 10,000.
        quick: 5 seeds of 3,000 steps.
        conditions: names from `CONDITIONS` with commas between, or ``all``; default `DEFAULT`.
            ``act-E`` is always run: its actors are the ones that are measured.
        progress: show bars.
        command: what a user typed, for the record.

    Returns:
        The content of ``study.json``.
    """
    picked = chosen(conditions)
    seeds = seeds if seeds is not None else 5
    steps = steps if steps is not None else (3000 if quick else 10_000)
    if not 1 <= seeds <= 1000:
        raise BatchproofError(f"seeds must be from 1 to 1000, got {seeds}")
    if steps < 2 * STARTS:
        raise BatchproofError(
            f"steps must be at least {2 * STARTS}, got {steps}: the first {STARTS} are random"
        )
    began = time.perf_counter()
    with records.locked(out):
        cells = {}
        for i, condition in enumerate(picked):
            label = f"{i + 1}/{len(picked)} {condition.key}"
            cells[condition.key] = train_cell(condition, seeds, steps, out, progress, label)
        measuring = time.perf_counter()
        found = measure(cells["act-E"], cells, progress)
        spent = sum(cell.wall_s for cell in cells.values()) + time.perf_counter() - measuring
        study = write_study(
            out, NAME, judge(found, cells, seeds), describe(found, cells),
            [cell.columns() for cell in cells.values()],
            seeds=seeds, steps=steps, began=began, spent_s=spent, command=command,
            more={"measures": found},
        )  # fmt: skip
        render(found, cells, study, out)
    return study
