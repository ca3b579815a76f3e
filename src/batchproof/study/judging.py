"""Claims and their verdicts, as ``study.json`` holds them.

A claim is ``supported``, ``refuted`` or ``inconclusive`` by a rule that was written before the run.
One that needs a condition which was not run, or more seeds than there are, is inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from batchproof.study.statistics import Interval

FEWEST_SEEDS = 5  # fewer give no verdict


class Finding(NamedTuple):
    """What a claim's rule found: the verdict, its number if any, and both in words."""

    verdict: str
    interval: Interval | None
    why: str

    def on(self, seeds: int, fewest: int = FEWEST_SEEDS) -> Finding:
        """The same, but no verdict where ``seeds`` are fewer than ``fewest``."""
        return self if seeds >= fewest else self.open(f"No verdict on fewer than {fewest} seeds.")

    def open(self, why: str) -> Finding:
        """The same without a verdict, and why."""
        return Finding("inconclusive", self.interval, f"{self.why} {why}".lstrip())


def outcome_class(value: float, solved: float, failed: float) -> str:
    """``solved`` from ``solved`` up, ``failed`` below ``failed``, ``partly`` between."""
    return "solved" if value >= solved else "failed" if value < failed else "partly"


def missed(predicted: float, scores: np.ndarray, solved: float, failed: float) -> bool:
    """A prediction missed when it named another class than the mean of the seeds."""
    mean = float(scores.mean())
    return outcome_class(predicted, solved, failed) != outcome_class(mean, solved, failed)


def not_run(needs: Sequence[str]) -> Finding:
    """What is found where the conditions that a claim needs are missing."""
    why = f"Not run: add --conditions all, or {','.join(needs)}."
    return Finding("inconclusive", None, why)


def claim_row(
    id_: str,
    source: str,
    statement: str,
    rule: str,
    found: Finding,
    *,
    n: int,
    level: float = 0.95,
    prediction: str | None = None,
) -> dict[str, Any]:
    """A claim as ``study.json`` holds it.

    Args:
        id_: the claim's name.
        source: who said so.
        statement: the claim.
        rule: what supports and what refutes it.
        found: what became of it.
        n: seeds, or runs, behind it.
        level: of the interval.
        prediction: the verdict that was expected, where one was written down.
    """
    effect = found.interval
    missed = found.verdict not in ("inconclusive", prediction)
    return {
        "id": id_,
        "statement": statement,
        "source": source,
        "decision_rule": rule,
        **({} if prediction is None else {"prediction": prediction, "missed": missed}),
        "verdict": found.verdict,
        "effect": None if effect is None else _known(effect.mean),
        "ci": None if effect is None else [_known(effect.lo), _known(effect.hi)],
        "level": level,
        "n": n,
        "why": found.why,
    }


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


class Seeded(Protocol):
    """What conditions gave, each with the same seeds."""

    @property
    def seeds(self) -> int:
        """How many."""
        ...

    def has(self, *keys: str) -> bool:
        """Whether all of these conditions were run."""
        ...


class Judge:
    """Judges claims in turn; `claims` is what ``study.json`` holds of them."""

    def __init__(self, outcome: Seeded, source: str, fewest: int = FEWEST_SEEDS) -> None:
        """Claims on ``outcome`` that come from ``source``; ``fewest`` seeds give a verdict."""
        self.claims: list[dict[str, Any]] = []
        self._outcome, self._source, self._fewest = outcome, source, fewest

    def claim(
        self,
        id_: str,
        statement: str,
        rule: str,
        needs: Sequence[str],
        find: Callable[[], Finding],
    ) -> None:
        """Judge one claim by ``find``, if all conditions that it needs were run."""
        seeds = self._outcome.seeds
        found = find().on(seeds, self._fewest) if self._outcome.has(*needs) else not_run(needs)
        self.claims.append(claim_row(id_, self._source, statement, rule, found, n=seeds))


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
