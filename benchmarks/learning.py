"""What the runs in results/learning learned: tables for the pages, and a picture.

    python benchmarks/learning.py

draws docs/images/halfcheetah.png and hopper.png; `benchmarks/fill_docs.py` writes the tables.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from batchproof.lab.agents import sac
from batchproof.lab.load import training_from_record
from batchproof.study import plots
from batchproof.study.statistics import difference_interval

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "results" / "learning"
SPEED = ROOT / "results" / "benchmarks"

REFERENCES = {
    ("Pendulum-v1", "td3"): "-152 at 20k",
    ("Pendulum-v1", "sac"): "-157 at 20k",
    ("HalfCheetah-v5", "sac"): "6156 +- 738 at 100k (v4, ten seeds)",
    ("HalfCheetah-v5", "crossq"): "8112 +- 944 at 100k (v4, ten seeds, 2x2048)",
    ("Hopper-v5", "sac"): "1103 +- 388 at 100k (v4, ten seeds)",
    ("Hopper-v5", "crossq"): "2764 +- 823 at 100k (v4, ten seeds, 2x2048)",
}
"""Published returns: mean and standard deviation over seeds."""
TASKS = {"HalfCheetah-v5": "halfcheetah", "Hopper-v5": "hopper"}
"""Tasks of the comparison, and what their benchmark and picture are called."""
MINUTE_S = 60.0


@dataclass(frozen=True)
class Learned:
    """The runs of one agent on one task, pooled over their seeds.

    Attributes:
        training: the runs' settings, but for the seeds.
        final: return at the end, one per seed.
        steps: of each evaluation, (T,).
        returns: of each evaluation, (n_seeds, T).
        wall_s: of all runs together.
        processors: that they ran on.
        commands: that made them.
    """

    training: dict[str, Any]
    final: list[float]
    steps: NDArray[Any]
    returns: NDArray[Any]
    wall_s: float
    processors: set[str]
    commands: list[str]

    @property
    def critic(self) -> str:
        """Widths, and what its products are computed in where that is not float32."""
        settings = self.training["config"]["critic"]
        widths = "x".join(map(str, settings["hidden"]))
        return widths if settings["precision"] == "float32" else f"{widths} {settings['precision']}"

    @property
    def learning_rate(self) -> float:
        """Of Adam, of actor and critics alike."""
        return float(self.training["config"]["learning_rate"])

    @property
    def is_for(self) -> tuple[str, str]:
        """Task and algorithm."""
        return self.training["env_id"], self.training["algo"]

    @property
    def late(self) -> NDArray[Any]:
        """Mean return of each seed over the evaluations of the last fifth, (n_seeds,)."""
        return self.returns[:, self.steps > 0.8 * self.training["steps"]].mean(1)

    def reached(self, goal: float) -> int | None:
        """The evaluation from which on the mean over seeds is never below the goal again."""
        below = np.flatnonzero(~(self.returns.mean(0) >= goal))
        first = int(below[-1]) + 1 if len(below) else 0
        return first if first < len(self.steps) else None

    def minutes_to(self, evaluation: int) -> float:
        """Of one seed up to that evaluation: wall time over the seeds trained at once."""
        share = self.steps[evaluation] / self.training["steps"]
        return self.wall_s / MINUTE_S * share / len(self.final)


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read(folder: Path) -> Learned | None:
    """The run in a folder, None while it is not finished."""
    run = _load(folder / "run.json")
    if run["status"] != "finished":
        return None
    metrics = pyarrow.parquet.read_table(folder / "metrics.parquet").to_pydict()
    steps = sorted(set(metrics["step"]))
    seeds: list[int] = run["training"]["seeds"]
    returns = np.full((len(seeds), len(steps)), np.nan)
    rows = zip(metrics["seed"], metrics["step"], metrics["return"], strict=True)
    for seed, step, value in rows:
        returns[seeds.index(seed), steps.index(step)] = value
    # A setting that is newer than the record has its default there.
    held = training_from_record(run["training"], folder / "run.json").record()
    training = {name: value for name, value in held.items() if name != "seeds"}
    final = [seed["final_return"] for seed in run["seeds"]]
    return Learned(
        training,
        final,
        np.array(steps),
        returns,
        run["wall_s"],
        {run["machine"]["processor"]},
        [run["command"]],
    )


def pooled() -> list[Learned]:
    """All finished runs; those that differ in their seeds alone are one."""
    found: list[Learned] = []
    for path in sorted(RUNS.glob("*/run.json")):
        run = _read(path.parent)
        if run is None:
            continue
        same = next((i for i, one in enumerate(found) if one.training == run.training), None)
        if same is None:
            found.append(run)
            continue
        one = found[same]
        found[same] = replace(
            one,
            final=one.final + run.final,
            returns=np.concatenate([one.returns, run.returns]),
            wall_s=one.wall_s + run.wall_s,
            processors=one.processors | run.processors,
            commands=one.commands + run.commands,
        )
    return found


def sacs(runs: list[Learned], env: str) -> list[Learned]:
    """SAC's runs on a task, the one with the library's learning rate first."""
    found = [run for run in runs if run.is_for == (env, "sac")]
    return sorted(found, key=lambda run: run.learning_rate != sac.Config().learning_rate)


def table() -> str:
    """Each agent and task, with its reference and the commands."""
    lines = [
        "| task | agent | critic | learning rate | steps | seeds | mean final return | per seed "
        "| last fifth | wall time | reference |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    runs = pooled()
    for run in runs:
        env, algo = run.is_for
        lines.append(
            f"| {env} | {algo.upper()} | {run.critic} | {run.learning_rate:g} "
            f"| {run.training['steps']} | {len(run.final)} | {statistics.fmean(run.final):.0f} "
            f"| {' '.join(f'{value:.0f}' for value in run.final)} | {run.late.mean():.0f} "
            f"| {run.wall_s / MINUTE_S:.0f} min | {REFERENCES.get((env, algo), '-')} |"
        )
    commands = [f"    {command}" for run in runs for command in run.commands]
    return "\n".join([*lines, "", *commands])


def sb3_minutes(task: str, steps: int, processors: set[str]) -> float | None:
    """Of Stable-Baselines3's SAC for so many steps, at the rate measured on the same processor.

    None where it was not measured on it, or the runs are of several.
    """
    for path in sorted(SPEED.rglob(f"{task}.json")):
        record = _load(path)
        rates = {row["algo"]: row["sb3_steps_per_s"] for row in record["rows"]}
        if processors == {record["machine"]["processor"]} and "sac" in rates:
            return steps / float(rates["sac"]) / MINUTE_S
    return None


def time_to_return() -> str:
    """When CrossQ reaches what SAC has after 100k steps, against one run of SB3's SAC."""
    lines = [
        "| task | agent | goal: SAC's return at 100k steps | steps to it | minutes a seed "
        "| SB3's SAC, 100k steps | share of SB3's time | processor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs = pooled()
    for env, name in TASKS.items():
        found = sacs(runs, env)
        if not found:
            continue
        usual = found[0]
        goals = {
            "our SAC's mean": statistics.fmean(usual.final),
            **{
                f"our SAC's at {run.learning_rate:g}": statistics.fmean(run.final)
                for run in found[1:]
            },
            "the reference's": float(REFERENCES[env, "sac"].split()[0]),
        }
        for run in (run for run in runs if run.is_for == (env, "crossq")):
            whole = sb3_minutes(name, usual.training["steps"], run.processors)
            for whose, goal in goals.items():
                reached = run.reached(goal)
                minutes = None if reached is None else run.minutes_to(reached)
                share = minutes / whole if minutes and whole else None
                cells = (
                    env,
                    f"CrossQ {run.critic}",
                    f"{goal:.0f} ({whose})",
                    "not reached" if reached is None else str(run.steps[reached]),
                    "-" if minutes is None else f"{minutes:.1f} min",
                    "not measured" if whole is None else f"{whole:.0f} min",
                    "-" if share is None else f"{share:.2f}",
                    " and ".join(sorted(run.processors)),
                )
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def crossq_minus_sac() -> str:
    """What CrossQ earns more than SAC over the last fifth, at each of SAC's learning rates."""
    lines = [
        "| task | critics | CrossQ, last fifth | SAC at | SAC, last fifth | difference |",
        "|---|---|---|---|---|---|",
    ]
    runs = pooled()
    for env in TASKS:
        for run in (run for run in runs if run.is_for == (env, "crossq")):
            for other in sacs(runs, env):
                gap = difference_interval(run.late, other.late)
                lines.append(
                    f"| {env} | {run.critic} | {run.late.mean():.0f} | {other.learning_rate:g} "
                    f"| {other.late.mean():.0f} | {gap.mean:.0f} [{gap.lo:.0f}, {gap.hi:.0f}] |"
                )
    return "\n".join(lines)


def draw(env: str, sac_runs: list[Learned], crossq: list[Learned]) -> None:
    """Both agents' curves on one task, CrossQ's from the narrowest critics to the widest."""
    crossq = sorted(crossq, key=lambda run: run.training["config"]["critic"]["hidden"])
    first = crossq[0]
    # Against the better learning rate: the headline must not live on a badly tuned SAC.
    best = max(sac_runs, key=lambda run: statistics.fmean(run.final))
    reached = first.reached(statistics.fmean(best.final))
    headline = f"CrossQ has not reached SAC's return after {first.steps[-1]:,} steps"
    if reached is not None:
        steps = int(first.steps[reached])
        headline = f"CrossQ has after {steps:,} steps what SAC has after {best.steps[-1]:,}"
    greys = (plots.GREY, plots.BLACK)
    labelled = [
        *(
            (f"SAC at {run.learning_rate:g}", run, c)
            for run, c in zip(sac_runs, greys, strict=False)
        ),
        *((f"CrossQ {run.critic}", run, c) for run, c in zip(crossq, plots.PALETTE, strict=False)),
    ]
    curves = [plots.Curve(label, run.steps, run.returns, colour) for label, run, colour in labelled]
    counts = ", ".join(f"{len(run.final)} of {label}" for label, run, _ in labelled)
    plots.learning_curves(
        [plots.Panel(f"{env}, seeds: {counts}", curves)],
        ROOT / "docs" / "images" / f"{TASKS[env]}.png",
        headline=headline,
        best=None,
        each_seed=True,
    )


def main() -> None:
    runs = pooled()
    for env in TASKS:
        found = sacs(runs, env)
        crossq = [run for run in runs if run.is_for == (env, "crossq")]
        if found and crossq:
            draw(env, found, crossq)


if __name__ == "__main__":
    main()
