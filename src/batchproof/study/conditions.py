"""Conditions by name, what became of them, and claims judged on them.

For studies whose cells are one condition each, all with the same seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.study.statistics import Interval
from batchproof.study.study import study_record, write_all_metrics

if TYPE_CHECKING:
    from batchproof.lab.loop import Result

FEWEST_SEEDS = 5  # fewer give no verdict


class Named(Protocol):
    """A condition: its name is also its cell's."""

    @property
    def key(self) -> str:
        """The name."""
        ...


C = TypeVar("C", bound=Named)


def choose(known: Sequence[C], default: Sequence[str], names: str | None) -> tuple[C, ...]:
    """The conditions that ``--conditions`` names, ``all``, or the default ones.

    Raises:
        BatchproofError: an unknown name.
    """
    if names == "all":
        return tuple(known)
    by_key = {condition.key: condition for condition in known}
    keys = default if names is None else tuple(dict.fromkeys(names.split(",")))
    unknown = [key for key in keys if key not in by_key]
    if unknown:
        raise BatchproofError(
            f"unknown condition {unknown[0]!r}: use all, or some of {', '.join(by_key)}"
        )
    return tuple(by_key[key] for key in keys)


@dataclass(frozen=True)
class Outcome(Generic[C]):
    """The results of conditions, each of the same seeds."""

    conditions: tuple[C, ...]
    seeds: int
    results: Mapping[str, Result]

    def has(self, *keys: str) -> bool:
        """Whether all of these conditions were run."""
        return set(keys) <= self.results.keys()

    def curve(self, key: str, name: str = "return") -> tuple[np.ndarray, np.ndarray]:
        """Evaluation steps (T,) and a metric's values (seeds, T)."""
        metrics = self.results[key].metrics
        steps = np.unique(metrics["step"])
        return steps, metrics[name].reshape(len(steps), self.seeds).T.astype(float)

    def last(self, key: str, evaluations: int, worst: float) -> np.ndarray:
        """Each seed's mean return (seeds,) of the last evaluations, ``worst`` where it diverged."""
        return np.nan_to_num(self.curve(key)[1][:, -evaluations:].mean(axis=1), nan=worst)

    def diverged(self, key: str) -> int:
        """How many seeds diverged."""
        return int(np.isnan(self.curve(key)[1][:, -1]).sum())


def write_study(
    name: str,
    out: Path,
    outcome: Outcome[Any],
    claims: list[dict[str, Any]],
    conditions: list[dict[str, Any]],
    *,
    steps: int,
    began: float,
    command: str,
) -> dict[str, Any]:
    """Write ``metrics.parquet`` and ``study.json``, and give back the latter's content.

    ``began`` is when the study's cells were started, by `time.perf_counter`. Cells that an earlier
    call finished count with the time that they took.
    """
    wall_s = max(
        time.perf_counter() - began, sum(result.wall_s for result in outcome.results.values())
    )
    parts = [
        {"condition": np.full(len(result.metrics["seed"]), key), **result.metrics}
        for key, result in outcome.results.items()
    ]
    write_all_metrics(out / "metrics.parquet", parts)
    study = study_record(
        name, claims, conditions, seeds=outcome.seeds, steps=steps, wall_s=wall_s, command=command
    )
    records.write_json(out / "study.json", study)
    return study


class Finding(NamedTuple):
    """What a claim's rule found: the verdict, its number, and both in words."""

    verdict: str
    interval: Interval
    why: str


class Judge:
    """Judges claims in turn; `claims` is what ``study.json`` holds of them."""

    def __init__(self, outcome: Outcome[Any], source: str) -> None:
        """Claims on ``outcome`` that come from ``source``."""
        self.claims: list[dict[str, Any]] = []
        self._outcome, self._source = outcome, source

    def claim(
        self,
        id_: str,
        statement: str,
        rule: str,
        needs: Sequence[str],
        find: Callable[[], Finding],
    ) -> None:
        """Judge one claim by ``find``.

        It is inconclusive where a condition that it needs was not run, or on too few seeds.
        """
        verdict, interval, why = "inconclusive", None, ""
        if not self._outcome.has(*needs):
            why = f"Not run: add --conditions all, or {','.join(needs)}."
        else:
            verdict, interval, why = find()
            if self._outcome.seeds < FEWEST_SEEDS:
                verdict = "inconclusive"
                why += f" No verdict on fewer than {FEWEST_SEEDS} seeds."
        self.claims.append(
            {
                "id": id_,
                "statement": statement,
                "source": self._source,
                "decision_rule": rule,
                "verdict": verdict,
                "effect": None if interval is None else interval.mean,
                "ci": None if interval is None else [interval.lo, interval.hi],
                "level": 0.95,
                "n": self._outcome.seeds,
                "why": why,
            }
        )


def verdict_above(intervals: Sequence[Interval], bound: float) -> str:
    """``supported`` when every interval lies above ``bound``, ``refuted`` when one lies below."""
    if all(interval.lo > bound for interval in intervals):
        return "supported"
    return "refuted" if any(interval.hi < bound for interval in intervals) else "inconclusive"


def verdict_below(intervals: Sequence[Interval], bound: float) -> str:
    """``supported`` when every interval lies below ``bound``, ``refuted`` when one lies above."""
    return verdict_above([Interval(-i.mean, -i.hi, -i.lo) for i in intervals], -bound)


def words(interval: Interval, digits: int = 0) -> str:
    """An interval as ``mean [lo, hi]``."""
    return f"{interval.mean:.{digits}f} [{interval.lo:.{digits}f}, {interval.hi:.{digits}f}]"
