"""One population: what is known of it from earlier calls, and training it as time allows."""

from __future__ import annotations

import math
import shlex
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from batchproof import records
from batchproof.compare.conditions import seed_words
from batchproof.compare.populations import Cell, Population
from batchproof.errors import BatchproofError


class Clock:
    """Tells whether there is time for one more evaluation, from what the last one took.

    Attributes:
        deadline: on `time.monotonic`; None for no end.
        asked: whether a user asked to stop.
        quickest_start: seconds from the beginning of a population to its first evaluation.
    """

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self.asked = False
        self.quickest_start = 0.0
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
            self.started_in(took)
            self._first = False
        return self.asked or (self.deadline is not None and now + took > self.deadline)

    def started_in(self, seconds: float) -> None:
        """What a population took to its first evaluation."""
        self.quickest_start = min(self.quickest_start or seconds, seconds)


def saved_step(population: Population) -> int:
    """Environment steps at its checkpoint, where it would continue."""
    from batchproof.lab import checkpoint

    try:
        state = checkpoint.read_state(population.folder / "checkpoint")
    except BatchproofError:
        return 0
    return int(state["step"]) if state else 0


def recall(population: Population, past: Mapping[str, Any]) -> None:
    """Read a finished population back; for another, how long it has taken so far.

    Args:
        population: is filled in.
        past: what ``compare.json`` holds of it.
    """
    population.wall_s = past.get("wall_s") or 0.0
    population.last = math.nan if past.get("last_return") is None else past["last_return"]
    population.step = saved_step(population)
    if not read_back(population):
        return
    if past.get("state") == "finished" and past.get("steps_per_s"):
        population.wall_s, population.speed = past["wall_s"], past["steps_per_s"]
    elif population.result is not None:
        population.wall_s = population.result.wall_s
        population.speed = _speed(population, population.training.steps, population.wall_s)


def read_back(population: Population) -> bool:
    """Take over the result of a finished run; False where its folder holds none."""
    from batchproof.lab.loop import train

    try:
        if records.read_json(population.folder / "run.json").get("status") != "finished":
            return False
        result = train(population.training, population.folder, progress=False)
    except (BatchproofError, AttributeError):
        return False  # running it will say what is wrong
    _finish(population, result)
    return True


def train_command(cell: Cell, population: Population) -> str:
    """The command that trains this population alone."""
    words = [*cell.words, *seed_words(population.training.seeds)]
    return shlex.join(["batchproof", "train", *words, "--out", str(population.folder)])


def train_population(
    population: Population,
    command: str,
    clock: Clock,
    tell: Callable[[], None],
    checkpoint_seconds: float = 60.0,
) -> None:
    """Train a population as far as time allows; what goes wrong is written into it.

    Args:
        population: is filled in.
        command: that trains it alone, for its record.
        clock: says when to stop.
        tell: called after each evaluation, before the clock is asked.
        checkpoint_seconds: least time between two checkpoints.
    """
    from batchproof.lab.loop import train

    began = time.monotonic()
    try:
        first = population.step = saved_step(population)
        clock.start()

        def stop(step: int, returns: Sequence[float]) -> bool:
            known = [value for value in returns if not math.isnan(value)]
            population.last = sum(known) / len(known) if known else math.nan
            population.step = step
            population.speed = _speed(population, step - first, time.monotonic() - began)
            tell()
            return clock.is_over()

        result = train(
            population.training,
            population.folder,
            progress=False,
            command=command,
            checkpoint_seconds=checkpoint_seconds,
            stop=stop,
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


def _finish(population: Population, result: Any) -> None:
    import numpy as np

    finals = [seed["final_return"] for seed in result.seeds]
    population.result, population.state = result, "finished"
    population.step = population.training.steps
    known = [value for value in finals if not math.isnan(value)]
    population.last = float(np.mean(known)) if known else math.nan


def _speed(population: Population, steps: int, wall_s: float) -> float:
    return steps * len(population.training.seeds) / wall_s if wall_s > 0 else math.nan
