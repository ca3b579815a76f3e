"""One HTML file that compares runs: curves, statistics, mode plans and tables, offline.

`batchproof.report.data` reads run and study folders, `batchproof.report.page` computes the
statistics (`batchproof.study.statistics`) and writes the page. The charts are plotly.js's basic
bundle, kept in ``assets`` with its license (MIT); everything is inside the one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from batchproof.report import data, page


def write(runs: Sequence[Path], out: Path, threshold: float | None = None) -> list[str]:
    """Write the report of some runs.

    Args:
        runs: folders of ``batchproof train`` (``run.json``), of ``batchproof study``
            (``study.json``), or folders that hold such run folders. Conditions are compared with
            the first one read; those of one ``batchproof compare`` as it compares them.
        out: the HTML file.
        threshold: return that "steps to a threshold" asks for, on every task; by default the
            median of the conditions' final interquartile means, task by task.

    Returns:
        The report's opening in plain text, one paragraph for each task, and what was left out.

    Raises:
        BatchproofError: a folder is no run or study, is damaged, or holds nothing to draw; or `out`
            cannot be written.
    """
    notes: list[str] = []
    cells = data.read([Path(run) for run in runs], notes)
    return page.write(cells, Path(out), threshold, notes)
