"""Conditions by name and what became of them.

For studies whose cells are one condition each, all with the same seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from batchproof.errors import BatchproofError
from batchproof.study.study import write_study

if TYPE_CHECKING:
    from batchproof.lab.loop import Result


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


def curve(metrics: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) and a metric's values (seeds, T) of a run, whose rows are those of all seeds."""
    steps = np.unique(metrics["step"])
    return steps, metrics[name].reshape(len(steps), -1).T.astype(float)


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
        return curve(self.results[key].metrics, name)

    def last(self, key: str, evaluations: int, worst: float) -> np.ndarray:
        """Each seed's mean return (seeds,) of the last evaluations, ``worst`` where it diverged."""
        return np.nan_to_num(self.curve(key)[1][:, -evaluations:].mean(axis=1), nan=worst)

    def diverged(self, key: str) -> int:
        """How many seeds diverged."""
        return int(np.isnan(self.curve(key)[1][:, -1]).sum())


def write_outcome(
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
    """As `batchproof.study.study.write_study`, for an outcome."""
    columns = [
        {"condition": np.full(len(result.metrics["seed"]), key), **result.metrics}
        for key, result in outcome.results.items()
    ]
    return write_study(
        out, name, claims, conditions, columns, seeds=outcome.seeds, steps=steps, began=began,
        spent_s=sum(result.wall_s for result in outcome.results.values()), command=command,
    )  # fmt: skip
