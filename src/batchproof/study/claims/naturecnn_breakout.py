"""naturecnn-breakout: what batch norm in NatureCNN is worth to PPO on Breakout.

A feature request to Stable-Baselines3 asks for a batch-norm switch in NatureCNN and reports PPO on
Breakout at 18.4 +- 6.5 by 200K steps: faster early and higher at the end than without, better than
LayerNorm and GroupNorm, less sensitive to hyperparameters. It names no seeds, no learning-rate
schedule and no unit of steps. This file holds the conditions, the predictions and the decision
rules; all were written before the full run.

Everything runs inside Stable-Baselines3's own PPO with the public zoo's settings (8 environments,
128 steps, 4 epochs, minibatches of 256). Two schedules: learning rate and clip range fall to 0 over
10M agent steps, as in the zoo, or over the run. An agent step is 4 frames.

The library collects in eval mode and updates in train mode, so with batch norm the policy that is
updated is not the one that acted. Each cure of that is a condition (`batchproof.sb3.on_policy`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchproof import cpu, records
from batchproof.errors import BatchproofError
from batchproof.study import plots, report
from batchproof.study.conditions import choose
from batchproof.study.judging import Finding, claim_row
from batchproof.study.pixels import FRAMES, PACKAGES, Cell, Result, run_cells
from batchproof.study.statistics import (
    Interval,
    difference_interval,
    mean_interval,
)
from batchproof.study.study import write_study

NAME = "naturecnn-breakout"
SOURCE = "feature request: optional batch norm in NatureCNN (Stable-Baselines3 issue 2131)"
STEPS = 200_000
QUICK_STEPS = 24_576
FEWEST_STEPS = 2048  # a claim asks what was scored in the first half, and a rollout takes 1024
ZOO_HORIZON = 10_000_000
ZOO = {200_000: (9.1, 4.2), 500_000: (15.3, None), 1_000_000: (25.7, None)}
"""Agent steps: mean score of the zoo's one public run without batch norm, and sd over games."""

# Decision rules. Scores are raw scores of whole games, actions drawn from the policy.
CLAIMED, CLAIMED_SPREAD = 18.4, 6.5
REACHED = CLAIMED - CLAIMED_SPREAD  # the low end of what was reported
SIMILAR = 1.25  # similar runtime: within this factor
ALL_GAMES = 100  # a learning-curve point counts once it is the mean of so many games
ONE_SCHEDULE = " Only one schedule ran."
FEWEST_SEEDS = {"E1": 5, "E2": 5, "E3": 3, "E4": 3, "E5": 3}
PREDICTED = {
    "E1": "refuted",
    "E2": "refuted",
    "E3": "refuted",
    "E4": "supported",
    "E5": "refuted",
}
"""Of `judge`, before the full run."""


@dataclass(frozen=True)
class Condition:
    """One way to normalize and to train.

    Attributes:
        key: its name.
        label: what a reader sees.
        norm: of the convolutions.
        how: how modes are used, of `batchproof.sb3.on_policy.HOW`.
        seeds: in a full run.
        short: whether the schedules fall over the run instead of over 10M agent steps.
        factor: of the learning rate.
        autocast: what the network computes in, of `batchproof.sb3.NatureCNN`.
    """

    key: str
    label: str
    norm: str
    how: str = "library"
    seeds: int = 3
    short: bool = False
    factor: float = 1.0
    autocast: str | None = None


CONDITIONS = (
    Condition("none", "no norm", "none", seeds=5),
    Condition("bn", "BN as the library runs it", "batch", seeds=5),
    Condition("bn-train", "BN, train mode throughout", "batch", "train"),
    Condition("bn-eval-after", "BN, eval mode after 10 updates", "batch", "eval-after"),
    Condition("bn-frozen", "BN, statistics frozen per rollout", "batch", "frozen"),
    # Added when the first seed of bn-frozen, which was to have five as the predicted best, had
    # failed, before any of its own was run; five when three of each had shown it to be the best.
    Condition(
        "bn-preserved", "BN, statistics anew, function preserved", "batch", "preserved", seeds=5
    ),
    Condition("renorm", "Batch Renorm", "renorm", "renorm"),
    Condition("bn-mdr", "BN, half of the epochs in eval mode (MDR)", "batch", "mdr"),
    Condition("layer", "layer norm", "layer"),
    Condition("group", "group norm", "group"),
    Condition("none-short", "no norm, schedule over the run", "none", seeds=5, short=True),
    Condition("bn-short", "BN as the library, schedule over the run", "batch", seeds=5, short=True),
    Condition("none-lr4", "no norm, 4 x learning rate", "none", factor=4.0),
    Condition("bn-lr4", "BN as the library, 4 x learning rate", "batch", factor=4.0),
    # No claim: whether what is faster still learns the same.
    Condition("none-bf16", "no norm, computed in bfloat16", "none", seeds=5, autocast="bfloat16"),
)
DEFAULT = ("none", "bn", "bn-preserved")
CURES = ("bn-train", "bn-eval-after", "bn-frozen", "bn-preserved", "renorm", "bn-mdr")


def run(
    out: Path,
    *,
    seeds: int | None = None,
    steps: int | None = None,
    quick: bool = False,
    conditions: str | None = None,
    budget: float | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Run the study and write ``study.json``, ``report.html``, pictures and metrics into ``out``.

    Args:
        out: the study's folder.
        seeds: for each condition; default as many as the condition says, 3 or 5.
        steps: agent steps of each seed, default 200,000.
        quick: 1 seed of 24,576 steps.
        conditions: names from `CONDITIONS` with commas between, or ``all`` (without bfloat16 on a
            CPU that would emulate it); default `DEFAULT`.
        budget: seconds after which no training begins; what is finished is judged.
        progress: show a bar.
        command: what a user typed, for the record.

    Returns:
        The content of ``study.json``.

    Raises:
        BatchproofError: an unknown condition, numbers below 1, a training that failed, or none
            that finished.
    """
    chosen = choose(CONDITIONS, DEFAULT, conditions)
    if conditions == "all" and cpu.has_bfloat16() is False:
        chosen = tuple(c for c in chosen if c.autocast is None)
    if seeds is None and quick:
        seeds = 1
    steps = steps if steps is not None else (QUICK_STEPS if quick else STEPS)
    if seeds is not None and seeds < 1:
        raise BatchproofError(f"seeds must be at least 1, got {seeds}")
    if steps < FEWEST_STEPS:
        raise BatchproofError(
            f"steps must be at least {FEWEST_STEPS}, two rollouts of all environments, got {steps}"
        )
    numbers = {c.key: c.seeds if seeds is None else seeds for c in chosen}
    began = time.perf_counter()
    # Seed by seed, so that a run that is stopped has something of every condition.
    cells = [
        cell_of(c, seed, steps)
        for seed in range(max(numbers.values()))
        for c in chosen
        if seed < numbers[c.key]
    ]
    with records.locked(out):
        results = run_cells(cells, out, progress=progress, budget_s=budget)
        outcome = finished(chosen, numbers, steps, results)
        if not outcome.seeds:
            raise BatchproofError("no training is finished: give --budget more time")
        spent = sum(result.record["wall_s"] for result in results.values())
        study = write_study(
            out, NAME, judge(outcome), describe(outcome),
            [outcome.columns(cell) for cell in outcome.cells()],
            seeds=max(outcome.seeds.values()), steps=steps, began=began,
            spent_s=spent / records.machine()["cores"],  # as many side by side
            command=command, packages=PACKAGES,
            more={
                "frames": steps * FRAMES,
                "cures": cures(outcome),
                "bfloat16": bfloat16(outcome),
                "returns_are": "Final raw game score, actions drawn",
                "trainings": {"asked": len(cells), "finished": sum(outcome.seeds.values())},
            },
        )  # fmt: skip
        _render(outcome, study, out)
    return study


def cell_of(condition: Condition, seed: int, steps: int) -> Cell:
    """One seed of a condition as a training."""
    return Cell(
        name=f"{condition.key}-seed{seed}",
        norm=condition.norm,
        how=condition.how,
        seed=seed,
        steps=steps,
        horizon=steps if condition.short else ZOO_HORIZON,
        learning_rate=2.5e-4 * condition.factor,
        audit=seed == 0,
        autocast=condition.autocast,
    )


@dataclass(frozen=True)
class Outcome:
    """The results, by condition and seed."""

    conditions: tuple[Condition, ...]
    seeds: dict[str, int]
    steps: int
    results: dict[str, Result]

    def has(self, *keys: str) -> bool:
        """Whether all of these conditions ran."""
        return set(keys) <= set(self.seeds)

    def of(self, key: str) -> list[Result]:
        """A condition's results, in the order of seeds."""
        return [self.results[f"{key}-seed{seed}"] for seed in range(self.seeds[key])]

    def cells(self) -> list[Cell]:
        """All of them, by condition and seed."""
        return [
            cell_of(c, seed, self.steps)
            for c in self.conditions
            for seed in range(self.seeds[c.key])
        ]

    def columns(self, cell: Cell) -> dict[str, np.ndarray]:
        """A cell's metrics with what tells its rows apart in the study's file."""
        metrics = self.results[cell.name].metrics
        rows = len(metrics["step"])
        return {
            "condition": np.full(rows, cell.name.rsplit("-seed", 1)[0]),
            "seed": np.full(rows, cell.seed),
            "frame": metrics["step"] * FRAMES,
            **metrics,
        }

    def curve(self, key: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Agent steps (T,) and a metric's values (seeds, T)."""
        found = self.of(key)
        values = np.stack([result.metrics[name] for result in found])
        return found[0].metrics["step"], values

    def final(self, key: str) -> np.ndarray:
        """Mean score of each seed's final games (seeds,)."""
        return np.array([result.record["score"] for result in self.of(key)])

    def early(self, key: str) -> np.ndarray:
        """Mean score of training games over the first half of the run (seeds,)."""
        steps, values = self.curve(key, "score")
        # Before the first game has ended nothing has been scored.
        return np.nan_to_num(values[:, steps <= self.steps / 2]).mean(axis=1)

    def at_frames(self, key: str) -> np.ndarray:
        """Score of training games where ``steps`` frames, not agent steps, have been seen."""
        steps, values = self.curve(key, "score")
        return np.nan_to_num(values[:, np.searchsorted(steps, self.steps / FRAMES)])

    def fall(self, key: str) -> np.ndarray:
        """Largest fall of a learning curve below its best so far, over its best (seeds,).

        NaN where a curve has no point that counts.
        """
        falls = []
        for result in self.of(key):
            score = result.metrics["score"][result.metrics["games"] >= ALL_GAMES]
            if not len(score) or not score.max() > 0:
                falls.append(np.nan)
                continue
            falls.append((np.maximum.accumulate(score) - score).max() / score.max())
        return np.array(falls)

    def seconds(self, key: str) -> np.ndarray:
        """Median processor seconds of an update (seeds,)."""
        return np.median(self.curve(key, "update_cpu_s")[1], axis=1)


def finished(
    chosen: tuple[Condition, ...], seeds: dict[str, int], steps: int, results: dict[str, Result]
) -> Outcome:
    """The outcome of what is there: of each condition the seeds from 0 on, none missing between."""
    there = {
        key: next((seed for seed in range(n) if f"{key}-seed{seed}" not in results), n)
        for key, n in seeds.items()
    }
    there = {key: n for key, n in there.items() if n}
    return Outcome(tuple(c for c in chosen if c.key in there), there, steps, results)


# --- verdicts --------------------------------------------------------------------------------


def judge(outcome: Outcome) -> list[dict[str, Any]]:
    """The claims with their verdicts, as ``study.json`` holds them."""
    claims: list[dict[str, Any]] = []

    def claim(
        id_: str,
        statement: str,
        rule: str,
        needs: tuple[tuple[str, ...], ...],
        decide: Callable[[list[tuple[str, ...]]], Finding],
    ) -> None:
        """``needs``: groups of conditions; those groups that ran are judged, one is enough."""
        ran = [group for group in needs if outcome.has(*group)]
        n = min((outcome.seeds[key] for group in ran for key in group), default=0)
        if ran:
            found = decide(ran).on(n, FEWEST_SEEDS[id_])
        else:
            groups = " or ".join(", ".join(group) for group in needs)
            found = Finding("inconclusive", None, f"Needs the conditions {groups}.")
        claims.append(
            claim_row(id_, SOURCE, statement, rule, found, n=n, prediction=PREDICTED[id_])
        )

    def schedule(key: str) -> str:
        return "schedule over the run" if key.endswith("-short") else "schedule over 10M steps"

    def both(ran: list[tuple[str, ...]]) -> bool:
        """Whether both schedules ran: one says nothing of "each" and "every"."""
        return len(ran) == 2

    def e1(ran: list[tuple[str, ...]]) -> Finding:
        found = {key: mean_interval(outcome.final(key)) for (key,) in ran}
        frames = {key: mean_interval(outcome.at_frames(key)) for (key,) in ran}
        verdict = (
            "supported" if any(i.lo > REACHED for i in found.values())
            else "refuted" if both(ran) and all(i.hi < REACHED for i in found.values())
            else "inconclusive"
        )  # fmt: skip
        best = max(found.values(), key=lambda i: i.mean)
        why = "; ".join(
            f"{schedule(key)}: {_words(i)} after {outcome.steps:,} agent steps, "
            f"{_words(frames[key])} after {outcome.steps:,} frames"
            for key, i in found.items()
        )
        why = f"Mean score, {why}.{'' if both(ran) else ONE_SCHEDULE}"
        return Finding(verdict, best, why)

    def e2(ran: list[tuple[str, ...]]) -> Finding:
        pairs = {
            bn: (
                difference_interval(outcome.early(bn), outcome.early(none)),
                difference_interval(outcome.final(bn), outcome.final(none)),
            )
            for bn, none in ran
        }
        verdict = (
            "inconclusive" if not both(ran)
            else "supported" if all(i.lo > 0 for pair in pairs.values() for i in pair)
            else "refuted" if all(any(i.hi < 0 for i in pair) for pair in pairs.values())
            else "inconclusive"
        )  # fmt: skip
        lowest = min((pair[1] for pair in pairs.values()), key=lambda i: i.mean)
        why = "; ".join(
            f"{schedule(bn)}: early {_words(early)}, final {_words(final)}"
            for bn, (early, final) in pairs.items()
        )
        why = f"BN minus none, {why}.{'' if both(ran) else ONE_SCHEDULE}"
        return Finding(verdict, lowest, why)

    def e3(ran: list[tuple[str, ...]]) -> Finding:
        found = difference_interval(outcome.early("layer"), outcome.early("bn"))
        why = f"Mean score over the first half, layer norm minus BN: {_words(found)}."
        return Finding(_sign(found, below=True), found, why)

    def e4(ran: list[tuple[str, ...]]) -> Finding:
        falls = outcome.fall("group"), outcome.fall("bn")
        times = [np.log(outcome.seconds(key)) for key in ("group", "bn")]
        factor = Interval(*np.exp(difference_interval(*times)))
        similar = factor.lo > 1 / SIMILAR and factor.hi < SIMILAR
        other = factor.lo > SIMILAR or factor.hi < 1 / SIMILAR
        runtime = f"An update of group norm takes {_words(factor, 2)} times that of BN."
        if not np.isfinite(np.concatenate(falls)).all():
            why = f"Too few games for the falls of the learning curves. {runtime}"
            return Finding("refuted" if other else "inconclusive", None, why)
        found = difference_interval(*falls)
        stabler = _sign(found, below=True)
        verdict = (
            "supported" if stabler == "supported" and similar
            else "refuted" if stabler == "refuted" or other else "inconclusive"
        )  # fmt: skip
        why = f"Largest fall of the learning curve, group norm minus BN: {_words(found, 2)}. "
        return Finding(verdict, found, why + runtime)

    def e5(ran: list[tuple[str, ...]]) -> Finding:
        def lost(key: str) -> np.ndarray:
            base, high = outcome.final(key), outcome.final(f"{key}-lr4")
            paired = min(len(base), len(high))  # the same seeds, at both learning rates
            return base[:paired] - high[:paired]

        found = difference_interval(lost("none"), lost("bn"))
        why = (
            f"Score lost by 4 x the learning rate: {_words(mean_interval(lost('none')))} without a "
            f"norm, {_words(mean_interval(lost('bn')))} with BN; difference {_words(found)}."
        )
        return Finding(_sign(found), found, why)

    claim(
        "E1",
        f"PPO on Breakout with BN in NatureCNN reaches {CLAIMED:g} +- {CLAIMED_SPREAD:g} by 200K "
        "steps.",
        "BN as the library runs it, mean score of the final games after 200,000 agent steps: "
        f"supported when with one of the schedules its 95 % interval lies above {REACHED:g}, the "
        "low end of the claim; refuted when with each it lies below",
        (("bn",), ("bn-short",)),
        e1,
    )
    claim(
        "E2",
        "It is faster early and higher at the end than without.",
        "BN minus no norm: supported when the 95 % intervals of the mean score over the first half "
        "of the run and of the final score lie above 0 with every schedule, refuted when with "
        "every schedule one of the two lies below 0",
        (("bn", "none"), ("bn-short", "none-short")),
        e2,
    )
    claim(
        "E3",
        "LayerNorm is slower to converge.",
        "mean score over the first half of the run, layer norm minus BN as the library runs it: "
        "supported when the 95 % interval lies below 0, refuted when above",
        (("layer", "bn"),),
        e3,
    )
    claim(
        "E4",
        "GroupNorm is stabler, at a similar runtime.",
        "group norm against BN as the library runs it: supported when the largest fall of the "
        "learning curve below its best so far, over its best, is smaller (95 % interval of the "
        "difference below 0) and the processor time of an update is within a factor "
        f"{SIMILAR:g} (the whole interval of the ratio); refuted when the fall is larger, or the "
        "time outside that factor",
        (("group", "bn"),),
        e4,
    )
    claim(
        "E5",
        "With BN training is less sensitive to hyperparameters and allows larger learning rates.",
        "final score lost when the learning rate is 4 times as high, paired by seed: supported "
        "when without a norm more is lost than with BN (95 % interval of the difference above 0), "
        "refuted when less",
        (("none", "none-lr4", "bn", "bn-lr4"),),
        e5,
    )
    return claims


def _sign(found: Interval, *, below: bool = False) -> str:
    low, high = (-found.hi, -found.lo) if below else (found.lo, found.hi)
    return "supported" if low > 0 else "refuted" if high < 0 else "inconclusive"


def _words(i: Interval, digits: int = 1) -> str:
    if not np.isfinite(i.lo):
        return f"{i.mean:.{digits}f} (one seed)"
    return f"{i.mean:.{digits}f} [{i.lo:.{digits}f}, {i.hi:.{digits}f}]"


def describe(outcome: Outcome) -> list[dict[str, Any]]:
    """The conditions of ``study.json``."""
    rows = []
    for condition in outcome.conditions:
        key = condition.key
        found = outcome.of(key)
        cells = [cell_of(condition, seed, outcome.steps) for seed in range(outcome.seeds[key])]
        zoo = ZOO.get(outcome.steps) if key == "none" else None
        final = outcome.final(key)
        rows.append(
            {
                "name": key,
                "label": condition.label,
                "algo": "PPO",
                "norm": condition.norm,
                "modes": condition.how if condition.norm in ("batch", "renorm") else None,
                "horizon": cells[0].horizon,
                "learning_rate": cells[0].learning_rate,
                "returns": final.tolist(),
                "early": outcome.early(key).tolist(),
                "at_frames": outcome.at_frames(key).tolist(),
                "fall": outcome.fall(key).tolist(),
                "update_cpu_s": outcome.seconds(key).tolist(),
                "prediction": None if zoo is None else f"{zoo[0]:g} (zoo)",
                "missed": None if zoo is None else bool(abs(final.mean() - zoo[0]) > zoo[1]),
                "diverged": 0,
                "wall_s": sum(result.record["wall_s"] for result in found),
                "clinic": found[0].record["clinic"],
            }
            | {
                name: float(np.median(outcome.curve(key, name)[1]))
                for name in ("first_kl", "first_clip_fraction", "first_ratio_error")
            }
        )
    return rows


def cures(outcome: Outcome) -> list[dict[str, Any]]:
    """The cures that ran, the best final score first, each against BN as the library runs it."""
    ran = [key for key in CURES if outcome.has(key)]
    rows = []
    for key in sorted(ran, key=lambda key: -outcome.final(key).mean()):
        row: dict[str, Any] = {"name": key, "score": outcome.final(key).mean()}
        for other in ("bn", "none"):
            if outcome.has(other):
                found = difference_interval(outcome.final(key), outcome.final(other))
                row[f"minus_{other}"] = [found.mean, found.lo, found.hi]
        rows.append(row)
    return rows


def bfloat16(outcome: Outcome) -> dict[str, list[float]] | None:
    """Computed in bfloat16 minus in float32, no norm: scores, and an update's processor time as
    a factor, each with its interval; None where one of them did not run.
    """
    if not outcome.has("none", "none-bf16"):
        return None
    found = {
        name: difference_interval(of("none-bf16"), of("none"))
        for name, of in (("final", outcome.final), ("early", outcome.early))
    }
    logs = (np.log(outcome.seconds(key)) for key in ("none-bf16", "none"))
    found["update_cpu_factor"] = Interval(*np.exp(difference_interval(*logs)))
    return {name: [i.mean, i.lo, i.hi] for name, i in found.items()}


# --- report ----------------------------------------------------------------------------------

_DRAWN = {
    "none": ("no norm", plots.BLACK),
    "bn": ("BN, library", plots.VERMILLION),
    "bn-train": ("train", plots.GREEN),
    "bn-eval-after": ("eval-after", plots.PINK),
    "bn-frozen": ("frozen", plots.BLUE),
    "bn-preserved": ("preserved", plots.GREY),
    "renorm": ("renorm", plots.ORANGE),
    "bn-mdr": ("mdr", plots.SKY),
    "layer": ("layer norm", plots.PINK),
    "group": ("group norm", plots.GREEN),
    "none-short": ("no norm", plots.BLACK),
    "bn-short": ("BN, library", plots.VERMILLION),
    "none-lr4": ("no norm", plots.BLACK),
    "bn-lr4": ("BN, library", plots.VERMILLION),
    "none-bf16": ("bfloat16", plots.BLUE),
}
"""The name beside a curve and its colour."""
_PANELS = (
    ("BN and its alternatives", ("none", "bn", "layer", "group")),
    ("Cures of the rollout/update mismatch", ("none", "bn", *CURES)),
    ("Schedule over the run", ("none-short", "bn-short")),
    ("4 x the learning rate", ("none-lr4", "bn-lr4")),
    ("Reduced precision", ("none", "none-bf16")),
)


def _render(outcome: Outcome, study: dict[str, Any], out: Path) -> None:
    sections = []
    panels = _panels(outcome, "score")
    if panels:
        plots.learning_curves(
            panels,
            out / "curves.png",
            headline=f"Breakout, {outcome.steps:,} agent steps = {outcome.steps * FRAMES:,} frames",
            best=None,
            each_seed=True,
            y_label="Raw score, mean of the last 100 training games",
        )
        sections.append(
            report.FigureSection(
                "Learning curves",
                "Mean over seeds, with the band from the lowest to the highest seed. The axis "
                f"counts agent steps of all 8 environments together; a step is {FRAMES} frames.",
                out / "curves.png",
                alt="Learning curves with mean, minimum and maximum over seeds",
            )
        )
    mismatched = [key for key in ("none", "bn", *CURES) if outcome.has(key)]
    for name, what, unit in (
        ("first_clip_fraction", "Rows that are clipped before any step", "Share of the minibatch"),
        ("first_kl", "KL before any step", "Nats"),
    ):
        if not mismatched:
            break
        path = out / f"{name.replace('_', '-')}.png"
        plots.learning_curves(
            [plots.Panel("", [_curve(outcome, key, name) for key in mismatched])],
            path,
            headline=f"{what}: the updated policy against the one that acted",
            best=None,
            y_label=f"{unit}, epoch 0, minibatch 0 of each update",
        )
        sections.append(
            report.FigureSection(
                what,
                "Measured at epoch 0, minibatch 0, before any gradient step. Where the policy that "
                "is updated is the one that acted, it is 0.",
                path,
                alt=f"{what}, during training, one line for each condition",
            )
        )
    for key in ("bn", "bn-frozen"):
        path = out / "cells" / f"{key}-seed0" / "channels.json"
        if outcome.has(key) and path.is_file():
            sections.append(_channel_section(outcome, key, path, out))
    report.write_report(
        out / "report.html", study, sections, explanation(outcome, study),
        title="Batch norm in NatureCNN: PPO on Breakout",
    )  # fmt: skip


def _panels(outcome: Outcome, name: str) -> list[plots.Panel]:
    panels = []
    drawn: set[str] = set()
    for title, keys in _PANELS:
        ran = [key for key in keys if outcome.has(key)]
        curves = [_curve(outcome, key, name) for key in ran]
        if drawn.issuperset(ran) or not any(np.isfinite(c.values).any() for c in curves):
            continue
        panels.append(plots.Panel(title, curves))
        drawn.update(ran)
    return panels


def _curve(outcome: Outcome, key: str, name: str) -> plots.Curve:
    steps, values = outcome.curve(key, name)
    label, color = _DRAWN[key]
    return plots.Curve(label, steps, values, color)


def _channel_section(outcome: Outcome, key: str, found: Path, out: Path) -> report.FigureSection:
    from batchproof.clinic.channels import Channels, channels_picture

    label = next(c.label for c in outcome.conditions if c.key == key)
    path = out / f"channels-{key}.png"
    channels_picture(
        [Channels.from_json(layer) for layer in records.read_json(found)],
        path,
        headline=f"{label}: statistics of each channel at the end",
    )
    return report.FigureSection(
        f"Channel by channel: {label}",
        "Each channel's mean on the last rollout with a bar of one standard deviation, and the "
        "running mean that eval mode uses as a dot; on the right the ratio of standard deviations. "
        "In another colour: off by more than half a standard deviation or a factor of 2.",
        path,
        alt="Running statistics beside those of the data, channel by channel",
    )


def explanation(outcome: Outcome, study: dict[str, Any]) -> str:
    """The answer in a minute, as HTML, from what was measured."""
    rows = "".join(
        f'<tr><th scope="row">{c.label}</th>'
        f'<td class="number"><strong>{outcome.final(c.key).mean():.1f}</strong></td>'
        f'<td class="number">{outcome.at_frames(c.key).mean():.1f}</td>'
        f'<td class="number">{_findings(outcome.of(c.key)[0].record["clinic"])}</td></tr>'
        for c in outcome.conditions
    )
    heads = "".join(
        f'<th scope="col" data-kind="{kind}">{name}</th>'
        for name, kind in (
            ("condition", "text"),
            (f"score after {outcome.steps:,} steps", "number"),
            (f"after {outcome.steps:,} frames", "number"),
            ("the clinic", "text"),
        )
    )
    best = ""
    if study["cures"]:
        first = study["cures"][0]
        label = next(c.label for c in outcome.conditions if c.key == first["name"])
        against = first.get("minus_bn")
        best = f"<p>The best cure here is <strong>{label}</strong>, {first['score']:.1f}"
        if against:
            best += f"; minus BN as the library runs it: {_words(Interval(*against))}"
        best += ".</p>"
    rounded = ""
    if study["bfloat16"]:
        final = Interval(*study["bfloat16"]["final"])
        rounded = f"<p>Final score in bfloat16 minus in float32, no norm: {_words(final)}.</p>"
    return (
        f"{_progress(study['trainings'])}"
        "<p>Batch norm after each convolution of NatureCNN, inside Stable-Baselines3's own PPO. "
        "The library collects in eval mode, on running statistics, and updates in train mode, on "
        "the minibatch's. So the first minibatch of every update is already another policy than "
        "the one that acted: its ratio is not 1 and rows may be clipped before anything was "
        "learned.</p>"
        "<p>Scores are raw scores of whole games, means over seeds: of the final policy after "
        f"{outcome.steps:,} agent steps ({outcome.steps * FRAMES:,} frames), and in training after "
        f"{outcome.steps:,} frames ({round(outcome.steps / FRAMES):,} agent steps). The clinic "
        "looked at the first seed's final policy as the library deploys it.</p>"
        f"{best}{rounded}"
        '<div class="scroll" role="region" aria-label="Scores" tabindex="0"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _progress(trainings: dict[str, int]) -> str:
    """What to know where not all trainings are finished, as HTML."""
    if trainings["finished"] == trainings["asked"]:
        return ""
    return (
        f"<p><strong>{trainings['finished']} of {trainings['asked']} trainings are finished"
        "</strong>; without <code>--budget</code> the command goes on with the others.</p>"
    )


def _findings(clinic: dict[str, Any]) -> str:
    """What an audit found, in a line."""
    if not clinic:
        return "not audited"
    parts = []
    for status in ("fail", "review"):
        codes = [code for code, found in clinic["outcomes"].items() if found == status]
        if codes:
            parts.append(f"{', '.join(codes)} {status}")
    if clinic["channels"]:
        off, count = (sum(clinic[name].values()) for name in ("channels_off", "channels"))
        parts.append(f"{off} of {count} channels off")
    return "; ".join(parts) or "nothing found"
