"""kappa-predicts: does the common-mode share of the actor's gradient decide who fails?

The study constant-reward ends with an explanation: a critic that is normalized by the batch's
statistics (slot 3 in ``T``) hides from the actor any shift that all actions share. The measure of
that is kappa, the share of the actor's gradient that is common to the batch: 0 to rounding in
``T``. On that task the actor has one state, so a common shift is all that it can do. Here the same
measure is put to the test where states differ: is an agent whose kappa is zero early in
training one that fails?

This file holds the conditions, the predictions and the decision rules; all were written before
the full run. What the theorem does not say: an actor that sees different states can still learn
to act differently in each, and where good actions already average to about the right value no
common shift is missing. So a failure is not implied, and these predictions say where none is
expected.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.lab.agents import AGENTS
from batchproof.lab.loop import Result
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import Plan
from batchproof.study import plots, report
from batchproof.study.conditions import curve
from batchproof.study.judging import Finding, claim_row, not_run
from batchproof.study.random_policy import random_returns
from batchproof.study.statistics import Interval, mean_interval, paired_difference_interval
from batchproof.study.study import Cell, run_cells, write_study

NAME = "kappa-predicts"
SOURCE = "open question F1: the explanation of constant-reward, beyond its toy"
ALGOS = ("td3", "sac")
BATCH_SIZE = 128
EVALUATIONS = 20  # in a run

# Decision rules. A score is 0 for what a random policy gets and 1 for what the same algorithm gets
# without norm, mean over seeds.
BLIND = 1e-2  # an early kappa below this predicts failure
LINE = 0.5  # a run below this score has failed
EARLY = 0.25  # share of training, after learning starts, over which kappa is averaged
LATE = 0.25  # share of training over which the return is averaged
DECIDES = 0.8  # share of runs that end as predicted, the mean of both predictions' shares
RANKED = 0.3  # Kendall's tau
HARM = 0.1  # what counts as a loss of score
RESAMPLES = 1000


@dataclass(frozen=True)
class Task:
    """A task and how long it is trained.

    Attributes:
        env_id: as `Training.env_id`.
        steps: environment steps of each seed.
        learning_starts: as `Training.learning_starts`.
        eval_episodes: as `Training.eval_episodes`.
        seeds: of each condition; two cores share even numbers.
        fewest: seeds that a verdict takes.
        random_episodes: from which the random policy's return is measured.
    """

    env_id: str
    steps: int
    learning_starts: int = 100
    eval_episodes: int = 10
    seeds: int = 6
    fewest: int = 5
    random_episodes: int = 1000


TASKS = {
    "toy": Task("batchproof/ConstantReward-v0", 1500, eval_episodes=1),
    # Chosen by the runs without norm: after 5000 steps TD3 gets -950, a random policy -1200.
    "pendulum": Task("Pendulum-v1", 12_000),
    "cheetah": Task("HalfCheetah-v5", 20_000, 1000, 2, 4, 3, 10),
    "hopper": Task("Hopper-v5", 20_000, 1000, 5, 4, 3, 100),
}
JAX_TASKS = ("toy", "pendulum")


@dataclass(frozen=True)
class Condition:
    """One way to normalize the critics; the actor has no norm.

    Attributes:
        key: its name.
        label: what a reader sees.
        plan: mode plan, None without a norm that has modes.
        critic: the critics' norm.
        fails: what the theorem predicts from the plan: True where kappa is zero by construction.
    """

    key: str
    label: str
    plan: str | None
    critic: Norm
    fails: bool


BATCH = Norm("batch")

CONDITIONS = (
    Condition("none", "no norm", None, Norm(), False),
    Condition("slot3-T", "BN, slot 3 in T", "TETTE", BATCH, True),
    Condition("slot3-E", "BN, slot 3 in E", "TEETE", BATCH, False),
    Condition("slot3-S", "BN, slot 3 in S", "TESTE", BATCH, False),
    Condition("slot3-M", "BN, slot 3 in M", "TEMTE", BATCH, False),
    Condition("renorm-T", "Batch Renorm, slot 3 in T", "TETTE", Norm("renorm"), True),
    Condition(
        "before-action", "BN before the action, slot 3 in T", "TETTE",
        Norm("batch", placement="before-action"), False,
    ),
    Condition("layer", "layer norm", None, Norm("layer"), False),
)  # fmt: skip
BY_KEY = {condition.key: condition for condition in CONDITIONS}
DEFAULT = ("none", "slot3-T", "slot3-E")
ON_HOST = ("none", "slot3-T", "slot3-E", "slot3-M")  # what runs on the tasks outside JAX

# Verdicts that were expected before the full run, by the mechanism: on the toy a common shift is
# all that matters; on Pendulum good actions average to zero by symmetry; where the states of a
# batch differ the actor can move in other ways. So kappa as a detector of failure is expected to
# fail beyond the toy, and its size to say nothing.
PREDICTED = {
    "F1-toy": "supported",
    "F1-pendulum": "refuted",
    "F1-cheetah": "refuted",
    "F1-hopper": "refuted",
    "F1": "refuted",
    "F1-size": "refuted",
    "F1-harm": "refuted",
}


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
        out: the study's folder.
        seeds: for each condition, default the task's.
        steps: environment steps of each seed, default the task's.
        quick: a third of the steps.
        conditions: names from `CONDITIONS` with commas between, and ``cheetah`` and ``hopper`` for
            those tasks as well; or ``all``. Default `DEFAULT`; ``none`` is always run.
        progress: show bars.
        command: what a user typed, for the record.

    Returns:
        The content of ``study.json``.
    """
    chosen, tasks = _chosen(conditions)
    counts = {task: TASKS[task].seeds if seeds is None else seeds for task in tasks}
    if min(counts.values()) < 1:
        raise BatchproofError(f"seeds must be at least 1, got {seeds}")
    lengths = {
        task: steps if steps is not None else TASKS[task].steps // (3 if quick else 1)
        for task in tasks
    }
    began = time.perf_counter()
    cells = [
        Cell(f"{task}-{algo}-{key}", training(task, algo, BY_KEY[key], counts[task], lengths[task]))
        for task in tasks
        for algo in ALGOS
        for key in on_task(task, chosen)
    ]
    with records.locked(out):
        results = run_cells(cells, out, progress, command)
        random = {
            task: float(random_returns(TASKS[task].env_id, TASKS[task].random_episodes).mean())
            for task in tasks
        }
        starts = {task: _learning_starts(task, lengths[task]) for task in tasks}
        outcome = _Outcome(chosen, tasks, random, starts, results)
        described = {
            task: {
                "env": TASKS[task].env_id,
                "steps": lengths[task],
                "seeds": counts[task],
                "random": random[task],
            }
            for task in tasks
        }
        study = write_study(
            out, NAME, judge(outcome), describe(outcome), [outcome.columns(c.name) for c in cells],
            seeds=max(counts.values()), steps=max(lengths.values()), began=began,
            spent_s=sum(result.wall_s for result in results.values()), command=command,
            more={"tasks": described},
        )  # fmt: skip
        _render(outcome, study, out)
    return study


def on_task(task: str, chosen: tuple[str, ...]) -> list[str]:
    """The conditions that run on a task."""
    return [key for key in chosen if task in JAX_TASKS or key in ON_HOST]


def training(task: str, algo: str, condition: Condition, seeds: int, steps: int) -> Training:
    """One condition as a run of the lab: networks 64x64, learning rate 1e-3."""
    made = TASKS[task]
    config = AGENTS[algo].Config(
        actor=MLP((64, 64)),
        critic=MLP((64, 64), condition.critic),
        learning_rate=1e-3,
        batch_size=BATCH_SIZE,
    )
    plan = condition.plan and Plan.parse(condition.plan)
    return Training(
        algo=algo,
        config=replace(config, plan=plan) if plan else config,
        env_id=made.env_id,
        seeds=tuple(range(seeds)),
        steps=steps,
        learning_starts=_learning_starts(task, steps),
        eval_every=max(1, steps // EVALUATIONS),
        eval_episodes=made.eval_episodes,
    )


def _learning_starts(task: str, steps: int) -> int:
    return min(TASKS[task].learning_starts, steps // 2)


def _chosen(names: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The conditions and the tasks that a user named."""
    if names == "all":
        return tuple(BY_KEY), tuple(TASKS)
    asked = DEFAULT if names is None else tuple(dict.fromkeys(names.split(",")))
    hosts = tuple(task for task in TASKS if task not in JAX_TASKS)
    unknown = [name for name in asked if name not in BY_KEY and name not in hosts]
    if unknown:
        raise BatchproofError(
            f"unknown condition {unknown[0]!r}: use all, or some of {', '.join((*BY_KEY, *hosts))}"
        )
    keys = [name for name in asked if name in BY_KEY] or list(DEFAULT)
    tasks = JAX_TASKS + tuple(task for task in hosts if task in asked)
    return tuple(key for key in BY_KEY if key in (*keys, "none")), tasks


class Runs(NamedTuple):
    """Every run of a task: G conditions (each with an algorithm) by N seeds."""

    groups: tuple[tuple[str, str], ...]  # (algorithm, condition)
    kappa: np.ndarray  # (G, N), early; NaN where it is not known
    score: np.ndarray  # (G, N)


@dataclass(frozen=True)
class _Outcome:
    """The results, by task, algorithm and condition."""

    chosen: tuple[str, ...]
    tasks: tuple[str, ...]
    random: dict[str, float]  # a random policy's mean return
    starts: dict[str, int]  # environment steps before learning
    results: dict[str, Result]

    def columns(self, cell: str) -> dict[str, np.ndarray]:
        """A cell's metrics with what tells its rows apart in the study's file."""
        task, algo, key = cell.split("-", 2)
        metrics = self.results[cell].metrics
        rows = len(metrics["seed"])
        names = {"task": task, "algo": algo, "condition": key}
        return {name: np.full(rows, value) for name, value in names.items()} | metrics

    def curve(self, task: str, algo: str, key: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (T,) and a metric's values (seeds, T)."""
        return curve(self.results[f"{task}-{algo}-{key}"].metrics, name)

    def returns(self, task: str, algo: str, key: str) -> np.ndarray:
        """Returns late in training (seeds,), NaN where a seed diverged."""
        steps, values = self.curve(task, algo, key, "return")
        return values[:, steps > (1 - LATE) * steps[-1]].mean(axis=1)

    def counted(self, task: str, algo: str, key: str) -> np.ndarray:
        """The same, where a diverged seed counts as a random policy."""
        return np.nan_to_num(self.returns(task, algo, key), nan=self.random[task])

    def scores(self, task: str, algo: str, key: str) -> np.ndarray:
        """Scores (seeds,): 0 for a random policy, 1 for the same algorithm without norm."""
        zero = self.random[task]
        one = float(self.counted(task, algo, "none").mean())
        # No scale where no norm is no better than that; such a task gets no verdict.
        return (self.counted(task, algo, key) - zero) / (one - zero if one > zero else math.inf)

    def kappa(self, task: str, algo: str, key: str) -> np.ndarray:
        """Each seed's early kappa (seeds,), NaN where none of it is known."""
        steps, values = self.curve(task, algo, key, "kappa")
        learning = steps > self.starts[task]
        # The first evaluation of them counts in any case: short runs have few.
        early = learning & (steps <= max(EARLY * steps[-1], steps[learning][0]))
        return np.ma.masked_invalid(values[:, early]).mean(axis=1).filled(np.nan)

    def runs(self, task: str) -> Runs:
        """Every run of a task."""
        groups = tuple((algo, key) for algo in ALGOS for key in on_task(task, self.chosen))
        return Runs(
            groups,
            np.stack([self.kappa(task, *group) for group in groups]),
            np.stack([self.scores(task, *group) for group in groups]),
        )

    def learnable(self, task: str) -> list[str]:
        """The algorithms that beat the random policy without norm: only then is there a scale."""
        found = {algo: mean_interval(self.counted(task, algo, "none")) for algo in ALGOS}
        return [algo for algo, interval in found.items() if interval.lo > self.random[task]]


# --- statistics of runs ---------------------------------------------------------------------------


def agreement(kappa: np.ndarray, score: np.ndarray) -> float:
    """Mean of two shares: of the blind runs that failed, and of the others that did not.

    1 when kappa decides, 0.5 when it says nothing. NaN where all runs are blind, or none is.
    """
    blind, seeing, failed = kappa < BLIND, kappa >= BLIND, score < LINE
    if not blind.any() or not seeing.any():
        return math.nan
    return float((failed[blind].mean() + (~failed)[seeing].mean()) / 2)


def auc(kappa: np.ndarray, score: np.ndarray) -> float:
    """Chance that a run that learned had a higher kappa than one that failed; ties count half.

    NaN where all failed, or none.
    """
    known = np.isfinite(kappa)
    kappa, failed = kappa[known], score[known] < LINE
    if failed.all() or not failed.any():
        return math.nan
    ranks = stats.rankdata(kappa)
    learned = ~failed
    wins = ranks[learned].sum() - learned.sum() * (learned.sum() + 1) / 2
    return float(wins / (learned.sum() * failed.sum()))


def tau(kappa: np.ndarray, score: np.ndarray) -> float:
    """Kendall's tau-b of kappa and score, NaN where one of them is constant."""
    known = np.isfinite(kappa)
    if min(np.unique(kappa[known]).size, np.unique(score[known]).size) < 2:
        return math.nan
    return float(stats.kendalltau(kappa[known], score[known]).statistic)


def seeing_tau(kappa: np.ndarray, score: np.ndarray) -> float:
    """`tau` among the runs that are not blind."""
    return tau(np.where(kappa >= BLIND, kappa, np.nan), score)


def resampled(runs: Runs, statistic: Callable[[np.ndarray, np.ndarray], float]) -> Interval:
    """A statistic of all runs with its bootstrap interval, seeds drawn within each condition."""
    estimate = statistic(runs.kappa.ravel(), runs.score.ravel())
    groups, seeds = runs.score.shape
    rng = np.random.default_rng(0)
    which = np.arange(groups)[:, None]
    draws = []
    for _ in range(RESAMPLES):
        rows = rng.integers(seeds, size=(groups, seeds))
        draws.append(statistic(runs.kappa[which, rows].ravel(), runs.score[which, rows].ravel()))
    known = np.array(draws)[np.isfinite(draws)]
    if seeds < 2 or not np.isfinite(estimate) or len(known) < RESAMPLES / 2:
        return Interval(estimate, math.nan, math.nan)
    lo, hi = np.quantile(known, [0.025, 0.975]).tolist()
    return Interval(estimate, lo, hi)


# --- verdicts -------------------------------------------------------------------------------------


def judge(outcome: _Outcome) -> list[dict[str, Any]]:
    """Verdicts on F1 by the rules above, a task at a time and beyond the toy."""
    claims = []
    beyond = [task for task in outcome.tasks if task != "toy"]
    every = {task: outcome.runs(task) for task in outcome.tasks}

    def claim(
        id_: str, statement: str, rule: str, tasks: list[str], settle: Callable[[], Finding]
    ) -> None:
        few = [task for task in tasks if every[task].score.shape[1] < TASKS[task].fewest]
        dead = [task for task in tasks if set(outcome.learnable(task)) != set(ALGOS)]
        runs = sum(every[task].score.size for task in tasks)
        found = settle()
        if few:
            found = found.open(f"No verdict on fewer than {TASKS[few[0]].fewest} seeds.")
        if dead:
            found = found.open(
                "No verdict where an algorithm does not beat a random policy without norm "
                f"({', '.join(TASKS[task].env_id for task in dead)})."
            )
        claims.append(
            claim_row(id_, SOURCE, statement, rule, found, n=runs, prediction=PREDICTED[id_])
        )

    def decided(task: str) -> tuple[str, Interval]:
        found = resampled(every[task], agreement)
        verdict = (
            "supported" if found.lo > DECIDES
            else "refuted" if found.hi < DECIDES else "inconclusive"
        )  # fmt: skip
        return verdict, found

    def on(task: str) -> Finding:
        verdict, found = decided(task)
        return Finding(verdict, found, _shares(every[task]))

    rule = (
        f"a run is blind when its kappa, averaged over the first {EARLY:.0%} of training, is below "
        f"{BLIND:g}; it has failed when its score is below {LINE:g}. Effect: the mean of the share "
        "of blind runs that failed and of the share of the others that did not; supported when its "
        f"95 % interval (seeds resampled within each condition) lies above {DECIDES:g}, refuted "
        "when it lies below"
    )
    for task in outcome.tasks:
        statement = f"On {TASKS[task].env_id} kappa, early in training, tells who fails."
        claim(f"F1-{task}", statement, rule, [task], partial(on, task))

    def overall() -> Finding:
        found = {task: decided(task) for task in beyond}
        verdicts = [verdict for verdict, _ in found.values()]
        verdict = (
            "refuted" if "refuted" in verdicts
            else "supported" if set(verdicts) == {"supported"} else "inconclusive"
        )  # fmt: skip
        worst = min((interval for _, interval in found.values()), key=lambda i: i.mean)
        return Finding(verdict, worst, _words({t: i for t, (_, i) in found.items()}))

    claim(
        "F1",
        "Beyond the toy too, kappa tells early in training who fails.",
        "supported when the rule above supports it on every task beyond the toy that was run, "
        "refuted when it refutes it on one. Effect: the lowest of them",
        beyond,
        overall,
    )

    def size() -> Finding:
        found = {task: resampled(every[task], seeing_tau) for task in beyond}
        verdict = (
            "supported" if all(i.lo > RANKED for i in found.values())
            else "refuted" if any(i.hi < RANKED for i in found.values())
            else "inconclusive"
        )  # fmt: skip
        lowest = min(found.values(), key=lambda i: i.mean)
        everyone = {task: resampled(every[task], tau) for task in beyond}
        areas = {task: resampled(every[task], auc) for task in beyond}
        why = (
            f"Kendall's tau among runs that are not blind: {_words(found)}. Among all runs: "
            f"{_words(everyone)}. Chance that a run that learned had the higher kappa: "
            f"{_words(areas)}."
        )
        return Finding(verdict, lowest, why)

    claim(
        "F1-size",
        "Where kappa is not zero, a larger one early in training means a better score later.",
        f"Kendall's tau of kappa and score among the runs with kappa of at least {BLIND:g}; "
        f"supported when its 95 % interval lies above {RANKED:g} on every task beyond the toy, "
        "refuted when it lies below on one",
        beyond,
        size,
    )

    def harm() -> Finding:
        if not {"slot3-T", "slot3-E"} <= set(outcome.chosen):
            return not_run(("slot3-T", "slot3-E"))
        found = {
            (task, algo): paired_difference_interval(
                outcome.scores(task, algo, "slot3-T"), outcome.scores(task, algo, "slot3-E")
            )
            for task in beyond
            for algo in ALGOS
        }
        verdict = (
            "supported" if all(i.hi < -HARM for i in found.values())
            else "refuted" if any(i.lo > -HARM for i in found.values())
            else "inconclusive"
        )  # fmt: skip
        weakest = max(found.values(), key=lambda i: i.hi)
        why = "Score in T minus score in E: " + ", ".join(
            f"{algo.upper()} on {TASKS[task].env_id} {_brackets(i)}"
            for (task, algo), i in found.items()
        )
        return Finding(verdict, weakest, why + ".")

    claim(
        "F1-harm",
        "Beyond the toy too, slot 3 in T instead of E costs part of the score.",
        "supported when the 95 % interval of the difference in score, paired by seed, lies below "
        f"-{HARM:g} for both algorithms on every task beyond the toy; refuted when one lies above",
        beyond,
        harm,
    )
    return claims


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _brackets(found: Interval) -> str:
    if math.isnan(found.mean):
        return "not defined"
    if math.isnan(found.lo):
        return f"{found.mean:.2f}"
    return f"{found.mean:.2f} [{found.lo:.2f}, {found.hi:.2f}]"


def _words(found: dict[str, Interval]) -> str:
    return ", ".join(f"{TASKS[task].env_id} {_brackets(i)}" for task, i in found.items())


def _shares(runs: Runs) -> str:
    """How many runs ended as kappa predicts, in words."""
    blind, seeing, failed = runs.kappa < BLIND, runs.kappa >= BLIND, runs.score < LINE
    unknown = int(np.isnan(runs.kappa).sum())
    words = (
        f"{int((blind & failed).sum())} of {int(blind.sum())} blind runs failed, "
        f"{int((seeing & ~failed).sum())} of {int(seeing.sum())} others learned."
    )
    return words + (f" Of {unknown} runs kappa is not known." if unknown else "")


def describe(outcome: _Outcome) -> list[dict[str, Any]]:
    """The conditions of ``study.json``, one for each task, algorithm and condition."""
    rows = []
    for task in outcome.tasks:
        for algo in ALGOS:
            for key in on_task(task, outcome.chosen):
                condition = BY_KEY[key]
                returns = outcome.returns(task, algo, key)
                scores, kappa = outcome.scores(task, algo, key), outcome.kappa(task, algo, key)
                norm = condition.critic
                rows.append(
                    {
                        "name": f"{task}-{algo}-{key}",
                        "label": f"{TASKS[task].env_id}: {condition.label}",
                        "task": task,
                        "algo": algo,
                        "condition": key,
                        "norm": f"critic {norm.kind} {norm.placement}" if key != "none" else "none",
                        "modes": condition.plan,
                        "returns": returns.tolist(),
                        "scores": scores.tolist(),
                        "kappa": _known(float(np.median(kappa))),
                        "kappas": [_known(value) for value in kappa.tolist()],
                        "failed": int((scores < LINE).sum()),
                        "prediction": "fails" if condition.fails else "learns",
                        "missed": bool((np.median(scores) < LINE) != condition.fails),
                        "diverged": int(np.isnan(returns).sum()),
                        "wall_s": outcome.results[f"{task}-{algo}-{key}"].wall_s,
                    }
                )
    return rows


# --- pictures -------------------------------------------------------------------------------------

_COLORS = dict(
    zip(
        BY_KEY,
        (
            plots.BLACK, plots.VERMILLION, plots.BLUE, plots.SKY,
            plots.GREEN, plots.ORANGE, plots.PINK, plots.GREY,
        ),
        strict=True,
    )
)  # fmt: skip
_FLOOR = 1e-9  # the left end of the axis of kappa


def _render(outcome: _Outcome, study: dict[str, Any], out: Path) -> None:
    headline = _headline(outcome, study)
    _scatter(outcome, out / "kappa.png", headline)
    sections = [
        report.FigureSection(
            "Kappa and what became of the run",
            "A mark is a run: how much of the actor's gradient is common to the batch early in "
            "training, and the score at its end (0: a random policy, 1: the same algorithm without "
            "norm). If kappa decided, all runs would lie in the two shaded fields.",
            out / "kappa.png",
            alt="Scatter plot of early kappa against final score, a panel for each task",
        )
    ]
    for task in outcome.tasks:
        env = TASKS[task].env_id
        keys = on_task(task, outcome.chosen)
        panels = [
            plots.Panel(
                f"{algo.upper()} on {env}",
                [
                    plots.Curve(
                        BY_KEY[key].label, *outcome.curve(task, algo, key, "return"), _COLORS[key]
                    )
                    for key in keys
                ],
            )
            for algo in ALGOS
        ]
        path = out / f"curves-{task}.png"
        plots.learning_curves(panels, path, headline=f"Learning on {env}", best=None)
        sections.append(
            report.FigureSection(
                f"Learning curves on {env}",
                "Return of the deterministic policy: mean over seeds and the band from the lowest "
                "to the highest.",
                path,
                alt=f"Learning curves of TD3 and SAC on {env}",
            )
        )
        rows = [
            plots.ForestRow(
                BY_KEY[key].label,
                {algo.upper(): outcome.scores(task, algo, key).tolist() for algo in ALGOS},
                detail=BY_KEY[key].plan or "",
            )
            for key in keys
        ]
        path = out / f"conditions-{task}.png"
        plots.condition_table_plot(
            rows,
            path,
            headline=f"Every condition on {env}; failed below {LINE:g}",
            best=None,
            x_label="score: 0 random policy, 1 no norm",
        )
        sections.append(
            report.FigureSection(
                f"Every condition on {env}",
                "Dots are seeds, the bar runs from the lowest to the highest.",
                path,
                alt=f"Scores of every condition on {env}, a row each",
            )
        )
    report.write_report(
        out / "report.html", study, sections, explanation(study, headline),
        title="Does kappa tell who fails?",
    )  # fmt: skip


def _headline(outcome: _Outcome, study: dict[str, Any]) -> str:
    """What the picture shows beyond the toy; a refuted F1 says which half of it did not hold."""
    verdicts = {claim["id"]: claim["verdict"] for claim in study["claims"]}
    verdict = verdicts["F1"]
    if verdict != "refuted":
        return {
            "supported": "A blind critic early in training is an agent that fails",
            "inconclusive": "Does a blind critic early in training mean failure?",
        }[verdict]
    against = [t for t in outcome.tasks if t != "toy" and verdicts[f"F1-{t}"] == "refuted"]
    where = f"On {' and '.join(TASKS[task].env_id for task in against)}"
    every = [outcome.runs(task) for task in against]
    kappa = np.concatenate([runs.kappa.ravel() for runs in every])
    failed = np.concatenate([runs.score.ravel() for runs in every]) < LINE
    if (~failed)[kappa >= BLIND].mean() >= DECIDES:
        return f"{where}, agents learn with a blind critic too"
    if failed[kappa < BLIND].mean() >= DECIDES:
        return f"{where}, agents with a critic that sees fail too"
    return f"{where}, a blind critic does not tell who fails"


def _scatter(outcome: _Outcome, path: Path, headline: str) -> None:
    """Early kappa against score, a panel for each task, the two predicted fields shaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    count = len(outcome.tasks)
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(12, 1.9 + 4.4 * rows), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    every = {task: outcome.runs(task) for task in outcome.tasks}
    for axes, task in zip(grid.flat, outcome.tasks, strict=False):
        runs = every[task]
        # A run far below the random policy would flatten all others: it is drawn at the edge.
        low = float(max(-1.0, min(-0.2, runs.score.min() - 0.1)))
        high = float(max(1.3, runs.score.max() + 0.1))
        high += 0.15 * (high - low)  # room for words
        axes.fill_between([_FLOOR / 2, BLIND], low, LINE, color=plots.VERMILLION, alpha=0.09, lw=0)
        axes.fill_between([BLIND, 2], LINE, high, color=plots.BLUE, alpha=0.09, lw=0)
        axes.axhline(LINE, color=plots.GREY, lw=1, ls="--")
        axes.axvline(BLIND, color=plots.GREY, lw=1, ls="--")
        for (algo, key), kappa, score in zip(*runs, strict=True):
            axes.plot(
                np.maximum(kappa, _FLOOR),
                np.maximum(score, low + 0.03),
                "o" if algo == "td3" else "^",
                color=_COLORS[key],
                alpha=0.75,
                markersize=7,
                mew=0,
            )
        axes.set_xscale("log")
        axes.set_xlim(_FLOOR / 2, 2)
        axes.set_ylim(low, high)
        axes.set_title(TASKS[task].env_id, fontsize=14, fontweight="bold", loc="left")
        axes.set_xlabel("κ early in training", fontsize=12)
        axes.set_ylabel("score late in training", fontsize=12)
        axes.tick_params(labelsize=11)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.text(_FLOOR, LINE, "predicted\nto fail", fontsize=11, color=plots.VERMILLION, va="top")
        axes.text(BLIND * 1.2, high, "predicted\nto learn", fontsize=11, color=plots.BLUE, va="top")
    shown = [key for key in BY_KEY if key in outcome.chosen]
    marks = [
        Line2D([], [], marker="s", ls="", color=_COLORS[key], markersize=9, label=BY_KEY[key].label)
        for key in shown
    ] + [
        Line2D([], [], marker=shape, ls="", color=plots.GREY, markersize=8, label=name)
        for shape, name in (("o", "TD3"), ("^", "SAC"))
    ]
    figure.suptitle(headline, fontsize=19, fontweight="bold", x=0.02, ha="left")
    figure.legend(handles=marks, loc="lower center", ncols=4, fontsize=11, frameon=False)
    figure.tight_layout(rect=(0, 0.8 / figure.get_figheight(), 1, 0.99))
    plots.save(figure, path)


def explanation(study: dict[str, Any], headline: str) -> str:
    """The question in a minute, as HTML; its last paragraph follows the measured verdict."""
    verdicts = {claim["id"]: claim["verdict"] for claim in study["claims"]}
    told = [
        TASKS[task].env_id for task in TASKS
        if task != "toy" and verdicts.get(f"F1-{task}") == "supported"
    ]  # fmt: skip
    result = {
        "supported": "<p><strong>Here it was.</strong> On each task beyond the toy, runs with a "
        "blind critic failed and the others learned.</p>",
        "refuted": f"<p><strong>Not everywhere.</strong> {headline}: kappa does not sort the runs "
        "there into those that learn and those that fail."
        + (f" It does on {' and '.join(told)}." if told else "")
        + "</p>",
    }.get(verdicts["F1"], "<p><strong>This run does not settle it</strong>: see F1 below.</p>")
    return (
        "<p>A critic that is normalized by its batch (slot 3 in <code>T</code>) cannot tell the "
        "actor that all actions should go up: the batch's mean goes up with them. The measure of "
        "that is κ, the share of the actor's gradient that is common to the batch, 0 in "
        "<code>T</code>. Where there is one state only, such an actor cannot learn.</p>"
        "<p>With many states it can still act differently in each. So is a κ of zero early in "
        "training the mark of a run that will fail?</p>" + result
    )
