"""best-plan: is there a mode plan that is better than CrossQ's and MA-BN's?

A mode plan says which statistics each of the five forward passes of an off-policy update uses.
CrossQ (arXiv 1902.05605) runs TEEJJ, MA-BN (arXiv 2509.23750) TTETT. This study lists the other
sensible plans by rule, lets them all try on a few tasks, and then runs the most promising ones
against the two with seeds that none of them has seen, so that a plan that was lucky in the first
stage gains nothing from its luck.

This file holds the plans, the predictions and the decision rules; all were written before the
full run.

Which plans are sensible:

- slot 0 in ``E``: what acts sees one observation;
- slot 1 in ``T``: an actor that learns on running statistics alone would never have any;
- slot 2 in ``T`` or ``E``;
- slot 3 in ``T``, ``E``, ``S`` or ``M``;
- slots 4 and 5 in ``TT``, ``TE`` or ``JJ``: a critic that learns in ``E`` would never have any;
- a target network with ``TT`` and ``TE``, none with ``JJ``: the joint pass is there to do without.

That makes 24, with CrossQ's and MA-BN's among them. All have batch norm in the actor and in both
critics, with CrossQ's momentum and eps, before each activation; all else is equal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.lab.agents import AGENTS
from batchproof.lab.loop import Result
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import PRESETS, Plan
from batchproof.study import plots, report
from batchproof.study.conditions import curve
from batchproof.study.judging import Finding, claim_row
from batchproof.study.random_policy import random_returns
from batchproof.study.statistics import (
    iqm_interval,
    mean_interval,
    paired_difference_interval,
)
from batchproof.study.study import Cell, run_cells, write_study

NAME = "best-plan"
SOURCE = "open question F3: plans beside CrossQ's (arXiv 1902.05605) and MA-BN's (arXiv 2509.23750)"
NAMED = {PRESETS["crossq"]: "CrossQ", PRESETS["ma-bn"]: "MA-BN"}
NO_NORM = "none"
NORM = Norm("batch", momentum=0.01, eps=1e-3)
BATCH_SIZE = 128
EVALUATIONS = 20  # in a run

PLANS = tuple(
    f"T{two}{three}{critic}"
    for two, three, critic in product("ET", "TESM", ("TT", "TE", "JJ"))
)  # fmt: skip
DEFAULT = ("TEETE", "TTEJJ")  # beside the named ones

# The rules. A score is 0 for what a random policy gets and 1 for the best mean of any condition of
# the same stage, task by task.
FINALISTS = 3  # plans that go on to the final, beside the named ones
MARGIN = 0.05  # what counts as better
LATE = 0.25  # share of training over which the return is averaged
SCREEN_SEEDS = 2
FINAL_SEEDS = 6
FRESH = 1000  # the first seed of the final
PREDICTED = {"F3": "refuted", "F3-td3": "refuted", "F3-none": "refuted", "F3-slot3": "supported"}


@dataclass(frozen=True)
class Task:
    """A task and how long it is trained.

    Attributes:
        env_id: as `Training.env_id`.
        title: what a reader sees.
        screen: environment steps of each seed in the first stage; 0 leaves the task out of it.
        final: environment steps of each seed in the final.
        eval_episodes: as `Training.eval_episodes`.
        random_episodes: from which the random policy's return is measured.
        learning_starts: as `Training.learning_starts`.
        env_options: as `Training.env_options`.
        normalize_obs: as `Training.normalize_obs`.
    """

    env_id: str
    title: str
    screen: int
    final: int
    eval_episodes: int = 10
    random_episodes: int = 1000
    learning_starts: int = 100
    env_options: dict[str, Any] = field(default_factory=dict)
    normalize_obs: bool = False


TASKS = {
    "toy": Task("batchproof/ConstantReward-v0", "constant reward", 1000, 1200, eval_episodes=1),
    "pendulum": Task("Pendulum-v1", "Pendulum", 4000, 4500),
    "mass": Task("batchproof/PointMass-v0", "point mass", 2500, 3000),
    "linear": Task("batchproof/LinearOutliers-v0", "badly scaled", 1200, 1500, 50),
    # SAC without norm fails there unless actions last and observations are normalized.
    "swingup": Task(
        "batchproof/PendulumSwingup-v0", "swing-up", 0, 60_000, 10, 200, 1000, {"repeat": 4}, True
    ),
    "halfcheetah": Task("HalfCheetah-v5", "HalfCheetah", 0, 30_000, 2, 10, 1000),
}
ON_REQUEST = ("swingup", "halfcheetah")  # run where they are asked for by name
MORE = (*ON_REQUEST, "td3")  # what ``conditions`` takes beside plans


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
        seeds: for each condition of the final, default `FINAL_SEEDS`.
        steps: environment steps of each seed, default the task's.
        quick: a third of the steps.
        conditions: plans from `PLANS` with commas between, or ``all`` of them; ``swingup`` and
            ``halfcheetah`` add those tasks to the final and ``td3`` that agent. Default `DEFAULT`.
            The two named plans and no norm are always run.
        progress: show bars.
        command: what a user typed, for the record.

    Returns:
        The content of ``study.json``.
    """
    candidates, more = _chosen(conditions)
    seeds = seeds if seeds is not None else FINAL_SEEDS
    if not 1 <= seeds <= FRESH:
        raise BatchproofError(f"seeds must be from 1 to {FRESH}, got {seeds}")
    if steps is not None and steps < 1:
        raise BatchproofError(f"steps must be at least 1, got {steps}")
    tasks = tuple(name for name in TASKS if name in more or name not in ON_REQUEST)
    algos = ("sac", "td3") if "td3" in more else ("sac",)

    def length(stage: str, task: str) -> int:
        whole: int = getattr(TASKS[task], stage)
        if steps is not None:
            return steps if whole else 0
        return whole // (3 if quick else 1)

    began = time.perf_counter()
    with records.locked(out):
        # No screen where nothing is to be chosen.
        screened = (*NAMED, *candidates) if len(candidates) > FINALISTS else ()
        early = tuple(range(min(SCREEN_SEEDS, seeds)))
        screen = {
            (task, plan): Cell(
                f"screen-{task}-{plan}", training("sac", task, plan, early, length("screen", task))
            )
            for plan in screened
            for task in tasks
            if TASKS[task].screen
        }
        ran = run_cells(list(screen.values()), out, progress, command)
        random = {task: _random(TASKS[task]) for task in tasks}
        screens = {key: late_returns(ran[cell.name]) for key, cell in screen.items()}
        finalists = pick(screens, random, candidates)
        fresh = tuple(range(FRESH, FRESH + seeds))
        final = {
            (algo, task, plan): Cell(
                f"final-{task}-{algo}-{plan}",
                training(algo, task, plan, fresh, length("final", task)),
            )
            for algo in algos
            for task in tasks
            for plan in (NO_NORM, *NAMED, *finalists)
        }
        ran |= run_cells(list(final.values()), out, progress, command)
        finals = {key: late_returns(ran[cell.name]) for key, cell in final.items()}
        outcome = Outcome(tasks, algos, finalists, random, screens, finals, ran)
        described = {
            task: {
                "env": TASKS[task].env_id,
                "screen_steps": length("screen", task) if screened else 0,
                "final_steps": length("final", task),
                "random": random[task],
            }
            for task in tasks
        }
        names = [cell.name for cell in (*screen.values(), *final.values())]
        study = write_study(
            out, NAME, judge(outcome), describe(outcome), [_columns(n, ran[n]) for n in names],
            seeds=seeds, steps=max(length("final", task) for task in tasks), began=began,
            spent_s=sum(result.wall_s for result in ran.values()), command=command,
            more={
                "returns_are": "Mean return in the last quarter of training",
                "finalists": list(finalists),
                "factors": factors(outcome),
                "differences": differences(outcome),
                "tasks": described,
            },
        )  # fmt: skip
        _render(outcome, study, out)
    return study


def training(algo: str, task: str, plan: str, seeds: tuple[int, ...], steps: int) -> Training:
    """One plan as a run of the lab: networks 64x64, learning rate 1e-3; `NO_NORM` is without."""
    norm = Norm() if plan == NO_NORM else NORM
    mlp = MLP((64, 64), norm)
    more: dict[str, Any] = {}
    if plan != NO_NORM:
        more = {"plan": Plan.parse(plan), "target_network": not Plan.parse(plan).joint}
    return Training(
        algo=algo,
        config=AGENTS[algo].Config(
            actor=mlp, critic=mlp, learning_rate=1e-3, batch_size=BATCH_SIZE, **more
        ),
        env_id=TASKS[task].env_id,
        env_options=TASKS[task].env_options,
        seeds=seeds,
        steps=steps,
        learning_starts=min(TASKS[task].learning_starts, steps // 2),
        normalize_obs=TASKS[task].normalize_obs,
        eval_every=max(1, steps // EVALUATIONS),
        eval_episodes=TASKS[task].eval_episodes,
    )


def _random(task: Task) -> float:
    """A random policy's mean return."""
    returns = random_returns(task.env_id, task.random_episodes, options=task.env_options)
    return float(returns.mean())


def _chosen(names: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The plans beside the named ones, and what else a user asked for."""
    asked = DEFAULT if names is None else tuple(dict.fromkeys(names.split(",")))
    unknown = [name for name in asked if name not in (*PLANS, *MORE, "all")]
    if unknown:
        raise BatchproofError(
            f"unknown condition {unknown[0]!r}: use all, some of {', '.join(MORE)}, or plans that "
            f"the study lists ({', '.join(PLANS)})"
        )
    plans = PLANS if "all" in asked else [p for p in PLANS if p in asked] or DEFAULT
    candidates = tuple(plan for plan in plans if plan not in NAMED)
    return candidates, tuple(name for name in MORE if name in asked)


def _columns(cell: str, result: Result) -> dict[str, np.ndarray]:
    stage, task, *rest = cell.split("-")
    algo, plan = ("sac", *rest)[-2:]
    rows = len(result.metrics["seed"])
    names = {"stage": stage, "task": task, "algo": algo, "plan": plan}
    # The verdicts and pictures need no more; all metrics stay in the cells' folders.
    kept = {name: result.metrics[name] for name in ("seed", "step", "return", "kappa")}
    return {name: np.full(rows, value) for name, value in names.items()} | kept


def late_returns(result: Result) -> np.ndarray:
    """Returns averaged over the last part of training (seeds,), NaN where a seed diverged."""
    steps, values = curve(result.metrics, "return")
    return values[:, steps > (1 - LATE) * steps[-1]].mean(axis=1)


def scores(returns: Mapping[str, np.ndarray], random: float) -> tuple[dict[str, np.ndarray], float]:
    """Scores on one task, and the return that counts as 1.

    Args:
        returns: for each condition (seeds,); NaN, a diverged seed, counts as the random policy.
        random: the random policy's mean return.

    Returns:
        For each condition (seeds,), with 0 for the random policy and 1 for the best condition's
        mean. All are 0 where no condition is better than the random policy.
    """
    counted = {name: np.nan_to_num(values, nan=random) for name, values in returns.items()}
    best = max(float(values.mean()) for values in counted.values())
    span = best - random if best > random else math.inf
    return {name: (values - random) / span for name, values in counted.items()}, best


def pick(
    screens: Mapping[tuple[str, str], np.ndarray],
    random: Mapping[str, float],
    candidates: Sequence[str],
) -> tuple[str, ...]:
    """The finalists: the best candidates of the screen by mean score, or all if it did not run."""
    if not screens:
        return tuple(candidates)
    table = screen_scores(screens, random)
    means = {plan: np.mean([row[plan].mean() for row in table.values()]) for plan in candidates}
    return tuple(sorted(candidates, key=lambda plan: -means[plan])[:FINALISTS])


def screen_scores(
    screens: Mapping[tuple[str, str], np.ndarray], random: Mapping[str, float]
) -> dict[str, dict[str, np.ndarray]]:
    """The screen's scores (seeds,) by task and plan."""
    table: dict[str, dict[str, np.ndarray]] = {}
    for task, plan in screens:
        table.setdefault(task, {})[plan] = screens[task, plan]
    return {task: scores(returns, random[task])[0] for task, returns in table.items()}


@dataclass(frozen=True)
class Outcome:
    """All results: late returns (seeds,), NaN where a seed diverged."""

    tasks: tuple[str, ...]
    algos: tuple[str, ...]
    finalists: tuple[str, ...]
    random: Mapping[str, float]  # a random policy's mean return, by task
    screens: Mapping[tuple[str, str], np.ndarray]  # by task and plan
    finals: Mapping[tuple[str, str, str], np.ndarray]  # by algorithm, task and plan
    runs: Mapping[str, Result] = field(default_factory=dict)  # by cell; for the pictures

    @property
    def conditions(self) -> tuple[str, ...]:
        """What the final compares."""
        return (NO_NORM, *NAMED, *self.finalists)

    def learned(self, algo: str) -> list[str]:
        """The tasks on which some condition is surely better than a random policy."""
        found = []
        for task in self.tasks:
            counted = [
                np.nan_to_num(self.finals[algo, task, plan], nan=self.random[task])
                for plan in self.conditions
            ]
            best = max(counted, key=lambda values: float(values.mean()))
            if mean_interval(best).lo > self.random[task]:
                found.append(task)
        return found

    def scores(self, algo: str) -> dict[str, np.ndarray]:
        """The final's scores (seeds, tasks that were learned) by condition."""
        columns = [
            scores({p: self.finals[algo, task, p] for p in self.conditions}, self.random[task])[0]
            for task in self.learned(algo)
        ]
        return {
            plan: np.stack([column[plan] for column in columns], axis=1)
            for plan in self.conditions
            if columns
        }


def _level(outcome: Outcome) -> float:
    """Of the intervals of the finalists: Bonferroni's for as many chances to win."""
    return 1 - 0.05 / max(1, len(outcome.finalists))


def differences(outcome: Outcome) -> list[dict[str, Any]]:
    """Every finalist against every named plan and no norm: IQM and mean of paired differences."""
    rows = []
    for algo in outcome.algos:
        table = outcome.scores(algo)
        if not table:
            continue
        for plan in outcome.finalists:
            for other in (*NAMED, NO_NORM):
                gap = table[plan] - table[other]
                found = iqm_interval(gap, _level(outcome))
                rows.append(
                    {
                        "algo": algo,
                        "plan": plan,
                        "other": other,
                        "iqm": found.mean,
                        "ci": [_known(found.lo), _known(found.hi)],
                        "mean": float(gap.mean()),
                        "by_task": dict(
                            zip(outcome.learned(algo), gap.mean(axis=0).tolist(), strict=True)
                        ),
                    }
                )
    return rows


def factors(outcome: Outcome) -> list[dict[str, Any]]:
    """What each slot's mode does in the screen: mean score of all plans with it, by task too."""
    table = screen_scores(outcome.screens, outcome.random)
    plans = sorted({plan for _, plan in outcome.screens})
    if set(plans) != set(PLANS):  # only the whole design tells slots apart
        return []
    rows = []
    for name, part, choices in (
        ("slot 2", slice(1, 2), "TE"),
        ("slot 3", slice(2, 3), "TESM"),
        ("slots 4 and 5", slice(3, 5), ("TT", "TE", "JJ")),
    ):
        for modes in choices:
            mine = [plan for plan in plans if plan[part] == modes]
            by_task = {
                task: float(np.mean([row[plan].mean() for plan in mine]))
                for task, row in table.items()
            }
            rows.append(
                {
                    "slots": name,
                    "modes": modes,
                    "mean": float(np.mean(list(by_task.values()))),
                    "by_task": by_task,
                }
            )
    return rows


def judge(outcome: Outcome) -> list[dict[str, Any]]:
    """Verdicts on F3 by the rules above, and on what the screen says of slot 3."""
    claims = []
    seeds = min(len(values) for values in outcome.finals.values())
    whole = {plan for _, plan in outcome.screens} == set(PLANS)

    def claim(id_: str, statement: str, rule: str, n: int, found: Finding) -> None:
        screened = id_ == "F3-slot3"  # has its own runs, and a level without correction
        claims.append(
            claim_row(
                id_, SOURCE, statement, rule, found if screened else found.on(seeds),
                n=n, level=0.95 if screened else _level(outcome), prediction=PREDICTED[id_],
            )
        )  # fmt: skip

    def compared(algo: str, others: tuple[str, ...]) -> Finding:
        """Whether a finalist beats all of ``others``."""
        table = outcome.scores(algo)
        if not table or not outcome.finalists:
            why = "No task was learned, or there is no finalist."
            return Finding("inconclusive", None, why)
        found = {
            plan: {
                other: iqm_interval(table[plan] - table[other], _level(outcome)) for other in others
            }
            for plan in outcome.finalists
        }
        # A finalist is as good as against the stronger of the others.
        hardest = {plan: min(row.values(), key=lambda i: i.lo) for plan, row in found.items()}
        wins = [all(i.lo > MARGIN for i in row.values()) for row in found.values()]
        loses = [any(i.hi < MARGIN for i in row.values()) for row in found.values()]
        verdict = "supported" if any(wins) else "refuted" if all(loses) else "inconclusive"
        best = max(hardest.values(), key=lambda i: i.lo)
        words = "; ".join(
            f"{plan} minus "
            + ", ".join(
                f"{NAMED.get(other, 'no norm')} {i.mean:+.2f} [{i.lo:+.2f}, {i.hi:+.2f}] "
                f"(mean {float((table[plan] - table[other]).mean()):+.2f})"
                for other, i in row.items()
            )
            for plan, row in found.items()
        )
        missing = [TASKS[task].title for task in outcome.tasks if task not in outcome.learned(algo)]
        why = f"{words}."
        if verdict == "refuted" and len(others) > 1 and not whole:
            verdict = "inconclusive"
            why += " That there is none takes the screen of all plans: --conditions all."
        if missing:
            why += f" Left out, for no condition beat a random policy: {', '.join(missing)}."
        return Finding(verdict, best, why)

    rule = (
        f"the screen's {FINALISTS} best plans by mean score meet the two with fresh seeds. "
        "Interquartile mean of the paired differences in score over tasks and seeds, with its "
        "stratified bootstrap interval at 1 - 0.05 / finalists; supported when the interval of one "
        f"finalist lies above {MARGIN:g} against both; refuted when all plans were screened "
        f"and that of every finalist lies below {MARGIN:g} against one of the two"
    )
    both = tuple(NAMED)
    for algo in outcome.algos:
        id_ = "F3" if algo == "sac" else f"F3-{algo}"
        runs = seeds * len(outcome.learned(algo))
        claim(
            id_,
            f"For {algo.upper()} there is a mode plan better than CrossQ's TEEJJ and MA-BN's "
            "TTETT.",
            rule,
            runs,
            compared(algo, both),
        )
    claim(
        "F3-none",
        "One of the finalists is better than no norm (SAC).",
        f"the same against no norm alone: supported when a finalist's interval lies above "
        f"{MARGIN:g}, refuted when all lie below",
        seeds * len(outcome.learned("sac")),
        compared("sac", (NO_NORM,)),
    )
    pairs = _slot3_pairs(outcome)
    statement = "All else equal, slot 3 in T scores lower than in E."
    rule = (
        "in the screen, plans that differ in slot 3 alone, paired by the other slots, task and "
        f"seed: supported when the 95 % interval of the mean difference lies below -{MARGIN:g}, "
        "refuted when it lies above"
    )
    if pairs is None:
        missing = Finding("inconclusive", None, "Not run: add --conditions all.")
        claim("F3-slot3", statement, rule, 0, missing)
    else:
        found = paired_difference_interval(*pairs)
        verdict = (
            "supported" if found.hi < -MARGIN
            else "refuted" if found.lo > -MARGIN else "inconclusive"
        )  # fmt: skip
        why = f"Score in T minus score in E: {found.mean:+.2f} [{found.lo:+.2f}, {found.hi:+.2f}]."
        claim("F3-slot3", statement, rule, len(pairs[0]), Finding(verdict, found, why))
    return claims


def _slot3_pairs(outcome: Outcome) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores of all screened plans with slot 3 in T, and of their twins in E."""
    table = screen_scores(outcome.screens, outcome.random)
    pairs = [
        (row[plan], row[plan[:2] + "E" + plan[3:]])
        for row in table.values()
        for plan in PLANS
        if plan[2] == "T" and plan in row and plan[:2] + "E" + plan[3:] in row
    ]
    if len(pairs) < 2:
        return None
    first, second = zip(*pairs, strict=True)
    return np.concatenate(first), np.concatenate(second)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def plan_words(plan: str) -> str:
    """A plan with its name, where it has one."""
    if plan == NO_NORM:
        return "no norm"
    return f"{plan} ({NAMED[plan]})" if plan in NAMED else plan


def describe(outcome: Outcome) -> list[dict[str, Any]]:
    """The conditions of ``study.json``: the screen's, then the final's."""
    rows = []
    screened = screen_scores(outcome.screens, outcome.random)
    for (task, plan), returns in outcome.screens.items():
        rows.append(_row("screen", "sac", task, plan, returns, screened[task][plan]))
    for (algo, task, plan), returns in outcome.finals.items():
        on_task = {p: outcome.finals[algo, task, p] for p in outcome.conditions}
        scored = scores(on_task, outcome.random[task])[0][plan]
        rows.append(_row("final", algo, task, plan, returns, scored))
    return rows


def _row(
    stage: str, algo: str, task: str, plan: str, returns: np.ndarray, scored: np.ndarray
) -> dict[str, Any]:
    return {
        "name": f"{stage}-{task}-{algo}-{plan}",
        "label": f"{stage}, {TASKS[task].title}: {plan_words(plan)}",
        "stage": stage,
        "algo": algo,
        "task": task,
        "norm": "none" if plan == NO_NORM else "actor batch, critic batch",
        "modes": None if plan == NO_NORM else plan,
        "returns": returns.tolist(),
        "scores": scored.tolist(),
        "diverged": int(np.isnan(returns).sum()),
    }


# --- pictures -------------------------------------------------------------------------------------


def _render(outcome: Outcome, study: dict[str, Any], out: Path) -> None:
    sections = []
    verdict = {claim["id"]: claim["verdict"] for claim in study["claims"]}["F3"]
    headline = {
        "supported": "A plan beats both CrossQ's and MA-BN's",
        "refuted": "No finalist beats both CrossQ's and MA-BN's plan",
    }.get(verdict, "Does a plan beat both CrossQ's and MA-BN's?")
    if study["differences"]:
        _forest(study["differences"], _level(outcome), out / "finalists.png", headline)
        sections.append(
            report.FigureSection(
                "The finalists against the two",
                "Interquartile mean of the difference in score over tasks and seeds, with its "
                f"interval at {_level(outcome):.1%}. A plan is better where the whole bar lies to "
                "the right of the dashed line.",
                out / "finalists.png",
                alt="Differences in score of each finalist to CrossQ's plan, MA-BN's and no norm",
            )
        )
    for algo in outcome.algos:
        table = {
            task: scores(
                {p: outcome.finals[algo, task, p] for p in outcome.conditions}, outcome.random[task]
            )[0]
            for task in outcome.tasks
        }
        path = out / f"final-{algo}.png"
        _heat_map(table, outcome.conditions, path, f"The final, {algo.upper()}, fresh seeds")
        sections.append(
            report.FigureSection(
                f"The final task by task ({algo.upper()})",
                "Mean score over seeds: 0 is a random policy, 1 the best condition on that task.",
                path,
                alt="Scores of the final's conditions on each task",
            )
        )
    if outcome.screens:
        table = screen_scores(outcome.screens, outcome.random)
        plans = tuple(plan for plan in PLANS if any(plan in row for row in table.values()))
        _heat_map(table, plans, out / "screen.png", "The screen: every plan, two seeds")
        sections.append(
            report.FigureSection(
                "The screen",
                f"Mean score over {SCREEN_SEEDS} seeds, the best plan on top. It chose the "
                "finalists and decides nothing else, but for the comparison of slot 3's modes.",
                out / "screen.png",
                alt="Scores of every plan on each task of the screen",
            )
        )
    for algo in outcome.algos:
        path = out / f"curves-{algo}.png"
        plots.learning_curves(
            _panels(outcome, algo),
            path,
            headline=f"Learning in the final, {algo.upper()}",
            best=None,
            y_label="Score: 0 a random policy, 1 the best condition",
        )
        sections.append(
            report.FigureSection(
                f"Learning curves ({algo.upper()})",
                "Mean over seeds, and the band from the lowest to the highest.",
                path,
                alt="Learning curves of the final's conditions on each task",
            )
        )
    report.write_report(
        out / "report.html", study, sections, explanation(study),
        title="Is there a better mode plan?",
    )  # fmt: skip


def _panels(outcome: Outcome, algo: str) -> list[plots.Panel]:
    panels = []
    for task in outcome.tasks:
        returns = {p: outcome.finals[algo, task, p] for p in outcome.conditions}
        zero = outcome.random[task]
        span = max(scores(returns, zero)[1] - zero, 1e-9)
        curves = []
        for plan, color in zip(outcome.conditions, (plots.BLACK, *plots.PALETTE), strict=False):
            steps, values = curve(outcome.runs[f"final-{task}-{algo}-{plan}"].metrics, "return")
            # The random policy's level is the floor: seeds below it say nothing more.
            score = np.clip((values - zero) / span, -0.5, None)
            curves.append(plots.Curve(plan_words(plan), steps, score, color))
        panels.append(plots.Panel(TASKS[task].title, curves))
    return panels


def _heat_map(
    table: Mapping[str, Mapping[str, np.ndarray]],
    conditions: Sequence[str],
    path: Path,
    headline: str,
) -> None:
    """Mean scores, a row for each condition and a column for each task, the best row on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = np.array(
        [
            [row[plan].mean() if plan in row else np.nan for row in table.values()]
            for plan in conditions
        ]
    )
    values = np.column_stack([values, values.mean(axis=1)])
    order = np.argsort(-values[:, -1], kind="stable")
    values = values[order]
    names = [*(TASKS[task].title for task in table), "mean"]
    figure = Figure(
        figsize=(3.2 + 1.7 * len(names), 1.7 + 0.36 * len(order)), dpi=150, facecolor="white",
        layout="constrained",
    )  # fmt: skip
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axes.axvline(len(names) - 1.5, color="white", lw=5)
    for (y, x), value in np.ndenumerate(values):
        axes.text(
            x, y, f"{value:.2f}", ha="center", va="center", fontsize=12,
            color="black" if value > 0.55 else "white",
        )  # fmt: skip
    axes.set_xticks(range(len(names)), names, fontsize=12)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(order)), [plan_words(conditions[i]) for i in order], fontsize=12)
    for label, i in zip(axes.get_yticklabels(), order, strict=True):
        label.set_fontfamily("monospace")
        label.set_fontweight("bold" if conditions[i] in (*NAMED, NO_NORM) else "normal")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.suptitle(headline, fontsize=16, fontweight="bold", x=0.02, ha="left")
    plots.save(figure, path)


def _forest(rows: Sequence[dict[str, Any]], level: float, path: Path, headline: str) -> None:
    """Differences of the finalists to each of what they are compared with."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(12, 1.9 + 0.42 * len(rows)), dpi=150, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = dict(zip((*NAMED, NO_NORM), (plots.BLUE, plots.VERMILLION, plots.GREY), strict=True))
    several = len({row["algo"] for row in rows}) > 1
    labels = []
    for y, row in enumerate(rows):
        color = colors[row["other"]]
        if None not in row["ci"]:
            axes.plot(row["ci"], [y, y], color=color, lw=3.5, alpha=0.5, solid_capstyle="round")
        axes.plot([row["iqm"]], [y], "o", color=color, markersize=9)
        axes.plot([row["mean"]], [y], "D", mfc="white", mec=color, markersize=6)
        agent = f"{row['algo'].upper()}: " if several else ""
        labels.append(f"{agent}{row['plan']} minus {plan_words(row['other'])}")
        if y % 2 == 0:
            axes.axhspan(y - 0.5, y + 0.5, color="#f6f6f6", lw=0, zorder=-1)
    axes.axvline(0, color=plots.GREY, lw=1)
    axes.axvline(MARGIN, color=plots.BLACK, lw=1.2, ls="--")
    axes.set_yticks(range(len(rows)), labels, fontsize=12)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(
        f"difference in score: dot and bar, interquartile mean and its {level:.1%} interval; "
        f"diamond, mean; dashed, the margin of {MARGIN:g}",
        fontsize=11,
    )
    axes.tick_params(labelsize=12, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.suptitle(headline, fontsize=18, fontweight="bold", x=0.02, ha="left")
    plots.save(figure, path)


def explanation(study: dict[str, Any]) -> str:
    """The question in a minute, as HTML; its last paragraph follows the measured verdict."""
    verdict = {claim["id"]: claim["verdict"] for claim in study["claims"]}["F3"]
    result = {
        "supported": "<p><strong>Here there is one.</strong> See F3 below for which, and by how "
        "much.</p>",
        "refuted": "<p><strong>Here there is none among the finalists</strong>: none of them beats "
        "both plans by the margin.</p>",
    }.get(verdict, "<p><strong>This run does not settle it</strong>: see F3 below.</p>")
    return (
        "<p>Each of the five forward passes of an update can normalize by its batch or by running "
        "statistics; CrossQ and MA-BN are two choices. This study lists the sensible ones by rule, "
        "screens them with few seeds, and runs the best against the two with fresh seeds: the "
        "luck that got a plan through the screen does not count again.</p>" + result
    )
