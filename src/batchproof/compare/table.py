"""Tables: what would be run, and the one that follows a comparison along."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Sequence
from functools import cache
from typing import TextIO

from batchproof.compare.conditions import Spec
from batchproof.compare.populations import Cell, Population, cell_state

REDRAW_S = 0.2


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0, 1, 8)) -> list[str]:
    """Columns of equal width, two spaces apart; those of text on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is one."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


class Table:
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
            self.say(f"{self.title(cell, population)}: running")

    def end(self, cell: Cell, population: Population) -> None:
        """A population ended, in whatever way."""
        if self.live:
            self.draw(now=True)
            return
        last = "" if math.isnan(population.last) else f", return {population.last:.4g}"
        speed = "" if math.isnan(population.speed) else f", {population.speed:,.0f} steps/s"
        how = population.state + (f": {population.error}" if population.error else "")
        self.say(f"{self.title(cell, population)}: {how}{last}{speed}")

    def title(self, cell: Cell, population: Population) -> str:
        """What a population is called in lines."""
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
                    cell_state(cell),
                )
            )
        return aligned(rows, left=(0, 1, 6))

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
