"""maddpg-batchnorm: does skipping batch norm when acting keep agents from solving their task?

The notebook of a course project trains DDPG and MADDPG on two-player tennis. Its actor has batch
norm, which it applies only where the input is a batch: with a single observation, as when
acting, the layer is skipped. A text on the same code warns that this "may lead to agents not able
to solve the environment". This file holds the conditions, the predictions and the decision
rules; all were written before the full run.

What is put to the test: the actor that learns (slots 1 and 2) is normalized by its batch's
statistics, mode ``T``. The actor that acts (slot 0) is the same network in mode ``B`` (the
notebook's: skipped), ``E`` (running statistics) or ``T`` (the statistics of one row, which is
its own mean). Only slot 0 differs between the three. The critics have no norm there, so that
what batch norm does to critics (see constant-reward) does not mix in.

Tasks: rally, our own in the shape of the course's tennis (`batchproof.envs.rally`), and two of
the particle tasks of MADDPG's paper.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.lab.agents import maddpg
from batchproof.lab.loop import Result
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import Plan
from batchproof.study import plots, report
from batchproof.study.conditions import choose, curve
from batchproof.study.judging import Finding, Judge, missed, verdict_above, verdict_below
from batchproof.study.statistics import Interval, difference_interval, mean_interval
from batchproof.study.study import Cell, run_cells, write_study

NAME = "maddpg-batchnorm"
SOURCE = "notebook of a course project on DDPG and MADDPG (two agents playing tennis)"
ALGOS = {"maddpg": "MADDPG", "ddpg": "DDPG"}  # centralized critics, and independent ones
SEEDS = 6  # two cores share them evenly
EVALUATIONS = 16  # in a run

# Decision rules.
SOLVED = 0.5  # the course's: mean over 100 episodes of the better agent's return
FAILED = 0.25  # half of it
MARGIN = 0.1  # one ball over the net: what counts as a difference on rally
PARTICLE_MARGIN = 0.05  # share of the return without norm that counts as a difference elsewhere


@dataclass(frozen=True)
class Task:
    """A task and how it is trained.

    Attributes:
        env_id: as `Training.env_id`.
        title: what a reader sees.
        steps: environment steps of each seed.
        training: other fields of `Training`.
        config: fields of MADDPG's configuration.
        worst: score of a seed that diverged.
    """

    env_id: str
    title: str
    steps: int
    training: dict[str, Any]
    config: dict[str, Any]
    worst: float


# Chosen on MADDPG without norm alone, before any run with one: on rally five settings were tried
# with two seeds each, and the number of steps after six seeds of the chosen one; on the listener's
# task one setting with two seeds, which simple_spread takes over untried.
TASKS = {
    "rally": Task(
        "batchproof/Rally-v0",
        "rally",
        24_000,
        {"learning_starts": 2000, "update_every": 2, "eval_episodes": 100},
        {
            "learning_rate": 1e-3,
            "gamma": 0.97,
            "batch_size": 128,
            "exploration_noise": 0.2,
            "max_grad_norm": None,
            "action_penalty": 0.01,
        },
        0.0,
    ),
    "listener": Task(
        "mpe2/simple_speaker_listener",
        "simple_speaker_listener",
        80_000,
        {"learning_starts": 5000, "update_every": 25, "eval_episodes": 100},
        {"batch_size": 256, "exploration_noise": 0.2},
        -400.0,
    ),
    "spread": Task(
        "mpe2/simple_spread",
        "simple_spread",
        80_000,
        {"learning_starts": 5000, "update_every": 25, "eval_episodes": 100},
        {"batch_size": 256, "exploration_noise": 0.2},
        -400.0,
    ),
}


@dataclass(frozen=True)
class Condition:
    """One way to normalize, on one task.

    Attributes:
        key: its name.
        task: a name in `TASKS`.
        label: what a reader sees.
        plan: mode plan of six letters, slot 0 first; None without a norm.
        actor: the actors' norm.
        critic: the critics' norm.
        predicted: score by algorithm, which says where it runs too; None where nothing was
            predicted.
    """

    key: str
    task: str
    label: str
    plan: str | None
    actor: Norm
    critic: Norm
    predicted: dict[str, float | None] = field(hash=False)


NONE = Norm()
BATCH = Norm("batch")
BEFORE_ACTION = Norm("batch", placement="before-action")

CONDITIONS = (
    Condition(
        "none", "rally", "no batch norm", None, NONE, NONE, {"maddpg": 0.8, "ddpg": 0.8}
    ),
    Condition(
        "bypass", "rally", "BN in actors, skipped when acting (B)", "BTTTTT", BATCH, NONE,
        {"maddpg": 0.1, "ddpg": 0.1},
    ),
    Condition(
        "eval", "rally", "BN in actors, running statistics when acting (E)", "ETTTTT", BATCH, NONE,
        {"maddpg": 0.8, "ddpg": 0.8},
    ),
    Condition(
        "train", "rally", "BN in actors, statistics of the one row when acting (T)", "TTTTTT",
        BATCH, NONE, {"maddpg": 0.03, "ddpg": 0.03},
    ),
    Condition(
        "ddpg-placement", "rally", "DDPG's placement: actors, and critics before the action",
        "ETTTTT", BEFORE_ACTION, BEFORE_ACTION, {"maddpg": 0.8, "ddpg": 0.8},
    ),
    Condition(
        "listener-none", "listener", "no batch norm", None, NONE, NONE, {"maddpg": None}
    ),
    Condition(
        "listener-bypass", "listener", "BN in actors, skipped when acting (B)", "BTTTTT", BATCH,
        NONE, {"maddpg": None},
    ),
    Condition(
        "listener-eval", "listener", "BN in actors, running statistics when acting (E)", "ETTTTT",
        BATCH, NONE, {"maddpg": None},
    ),
    Condition("spread-none", "spread", "no batch norm", None, NONE, NONE, {"maddpg": None}),
    Condition(
        "spread-bypass", "spread", "BN in actors, skipped when acting (B)", "BTTTTT", BATCH, NONE,
        {"maddpg": None},
    ),
    Condition(
        "spread-eval", "spread", "BN in actors, running statistics when acting (E)", "ETTTTT",
        BATCH, NONE, {"maddpg": None},
    ),
)  # fmt: skip
DEFAULT = ("none", "bypass", "eval")
PARTICLES = ("listener", "spread")


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
        seeds: for each condition, default `SEEDS`.
        steps: environment steps of each seed, default the task's.
        quick: a quarter of the steps.
        conditions: names from `CONDITIONS` with commas between, or ``all``; default `DEFAULT`.
        progress: show bars.
        command: what a user typed, for the record.

    Returns:
        The content of ``study.json``.
    """
    chosen = choose(CONDITIONS, DEFAULT, conditions)
    seeds = seeds if seeds is not None else SEEDS
    if seeds < 1:
        raise BatchproofError(f"seeds must be at least 1, got {seeds}")
    length = {
        name: steps if steps is not None else task.steps // (4 if quick else 1)
        for name, task in TASKS.items()
    }
    began = time.perf_counter()
    cells = [
        Cell(f"{algo}-{c.key}", training(algo, c, seeds, length[c.task]))
        for c in chosen
        for algo in c.predicted
    ]
    with records.locked(out):
        results = run_cells(cells, out, progress, command)
        outcome = _Outcome(chosen, seeds, results)
        study = write_study(
            out, NAME, judge(outcome), describe(outcome), [outcome.columns(c.name) for c in cells],
            seeds=seeds, steps=max(length[c.task] for c in chosen), began=began,
            spent_s=sum(result.wall_s for result in results.values()), command=command,
        )  # fmt: skip
        _render(outcome, study, out)
    return study


def training(algo: str, condition: Condition, seeds: int, steps: int) -> Training:
    """One condition as a run of the lab: networks 64x64, the task's hyperparameters."""
    task = TASKS[condition.task]
    config = maddpg.Config(
        actor=MLP((64, 64), condition.actor),
        critic=MLP((64, 64), condition.critic),
        plan=Plan.parse(condition.plan or "sb3-td3"),
        centralized=algo == "maddpg",
        **task.config,
    )
    options = dict(task.training)
    options["learning_starts"] = min(options["learning_starts"], steps // 2)
    return Training(
        algo="maddpg",
        config=config,
        env_id=task.env_id,
        seeds=tuple(range(seeds)),
        steps=steps,
        eval_every=max(1, steps // EVALUATIONS),
        **options,
    )


@dataclass(frozen=True)
class _Outcome:
    """The results, by algorithm and condition."""

    conditions: tuple[Condition, ...]
    seeds: int
    results: dict[str, Result]

    def has(self, *keys: str) -> bool:
        return set(keys) <= {condition.key for condition in self.conditions}

    def columns(self, cell: str) -> dict[str, np.ndarray]:
        """A cell's metrics with what tells its rows apart in the study's file."""
        algo, key = cell.split("-", 1)
        metrics = self.results[cell].metrics
        rows = len(metrics["seed"])
        return {"condition": np.full(rows, key), "algo": np.full(rows, algo), **metrics}

    def curve(self, algo: str, key: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (T,) and a metric's values (seeds, T)."""
        return curve(self.results[f"{algo}-{key}"].metrics, name)

    def scores(self, algo: str, condition: Condition) -> np.ndarray:
        """Each seed's score (seeds,), the task's worst for one that diverged.

        On rally the highest mean of 100 episodes at any evaluation, because the course calls
        the task solved where that once reaches the threshold. Elsewhere the last one.
        """
        returns = self.curve(algo, condition.key, "return")[1]
        score = returns.max(axis=1) if condition.task == "rally" else returns[:, -1]
        return np.nan_to_num(score, nan=TASKS[condition.task].worst)


def describe(outcome: _Outcome) -> list[dict[str, Any]]:
    """The conditions of ``study.json``, one for each algorithm and condition."""
    rows = []
    for condition in outcome.conditions:
        for algo, predicted in condition.predicted.items():
            steps, returns = outcome.curve(algo, condition.key, "return")
            scores = outcome.scores(algo, condition)
            run = outcome.results[f"{algo}-{condition.key}"]
            rally = condition.task == "rally"
            rows.append(
                {
                    "name": f"{algo}-{condition.key}",
                    "label": f"{TASKS[condition.task].title}: {condition.label}",
                    "algo": algo,
                    "task": condition.task,
                    "norm": _norm_words(condition),
                    "modes": condition.plan,
                    "returns": [None if np.isnan(value) else value for value in scores.tolist()],
                    "final_returns": returns[:, -1].tolist(),
                    "solved_at": [_solved_at(steps, row) for row in returns] if rally else None,
                    "prediction": None if predicted is None else f"{predicted:g}",
                    "missed": None if predicted is None else _missed(predicted, scores),
                    "diverged": int(np.isnan(returns[:, -1]).sum()),
                    "wall_s": run.wall_s,
                }
            )
    return rows


def _solved_at(steps: np.ndarray, returns: np.ndarray) -> int | None:
    """The environment step of the first evaluation that reached the threshold."""
    reached = np.flatnonzero(returns >= SOLVED)
    return int(steps[reached[0]]) if len(reached) else None


def _norm_words(condition: Condition) -> str:
    parts = [
        f"{where} {norm.kind} {norm.placement}"
        for where, norm in (("actor", condition.actor), ("critic", condition.critic))
        if norm.kind != "none"
    ]
    return ", ".join(parts) or "none"


_missed = partial(missed, solved=SOLVED, failed=FAILED)


def judge(outcome: _Outcome) -> list[dict[str, Any]]:
    """Verdicts on B4 and on what would mend it, by the rules above."""
    by_key = {condition.key: condition for condition in outcome.conditions}
    judged = Judge(outcome, SOURCE)
    claim = judged.claim

    def means(key: str) -> dict[str, Interval]:
        return {algo: mean_interval(outcome.scores(algo, by_key[key])) for algo in ALGOS}

    def difference(algo: str, key: str, other: str) -> Interval:
        return difference_interval(
            outcome.scores(algo, by_key[key]), outcome.scores(algo, by_key[other])
        )

    def words(found: dict[str, Interval], digits: int = 2) -> str:
        return ", ".join(
            f"{ALGOS.get(name, name)} {i.mean:.{digits}f} [{i.lo:.{digits}f}, {i.hi:.{digits}f}]"
            for name, i in found.items()
        )

    def lowest(found: dict[str, Interval]) -> Interval:
        return min(found.values(), key=lambda i: i.lo)

    def b4() -> Finding:
        skipped, without = means("bypass"), means("none")
        solvable = [algo for algo in ALGOS if without[algo].lo > SOLVED]
        fails = [algo for algo in solvable if skipped[algo].hi < SOLVED]
        verdict = (
            "supported" if fails
            else "refuted" if solvable and all(skipped[a].lo > SOLVED for a in solvable)
            else "inconclusive"
        )  # fmt: skip
        why = (
            f"Score with batch norm skipped when acting: {words(skipped)}. Without batch norm: "
            f"{words(without)}."
        )
        return Finding(verdict, lowest(skipped), why)

    def b4_eval() -> Finding:
        found = {algo: difference(algo, "eval", "bypass") for algo in ALGOS}
        verdict = verdict_above([*found.values()], MARGIN)
        return Finding(verdict, lowest(found), f"Score in E minus skipped: {words(found)}.")

    def b4_train() -> Finding:
        found = means("train")
        verdict = verdict_below([*found.values()], SOLVED)
        return Finding(verdict, lowest(found), f"Score: {words(found)}.")

    def b4_ddpg() -> Finding:
        found = {algo: difference(algo, "ddpg-placement", "none") for algo in ALGOS}
        verdict = verdict_above([*found.values()], -MARGIN)
        why = f"Score minus that without batch norm: {words(found)}."
        return Finding(verdict, lowest(found), why)

    def b4_particles() -> Finding:
        found, bounds = {}, {}
        for task in PARTICLES:
            found[TASKS[task].title] = difference("maddpg", f"{task}-bypass", f"{task}-eval")
            without = outcome.scores("maddpg", by_key[f"{task}-none"]).mean()
            bounds[TASKS[task].title] = -PARTICLE_MARGIN * abs(float(without))
        verdict = (
            "supported" if any(i.hi < bounds[name] for name, i in found.items())
            else "refuted" if all(i.lo > bounds[name] for name, i in found.items())
            else "inconclusive"
        )  # fmt: skip
        counts = ", ".join(f"{name} {-bound:.1f}" for name, bound in bounds.items())
        why = f"Return skipped minus in E: {words(found, 1)}. What counts as a loss: {counts}."
        return Finding(verdict, lowest(found), why)

    claim(
        "B4",
        "Batch norm that is skipped when acting may lead to agents not able to solve the "
        "environment.",
        f"a seed's score is its highest mean over 100 episodes of the better agent's return; "
        f"supported when for MADDPG or DDPG the 95 % interval of the mean score lies below "
        f"{SOLVED:g} with batch norm skipped and above it without batch norm; refuted when it lies "
        "above with batch norm skipped for each that solves the task without",
        ("none", "bypass"),
        b4,
    )
    claim(
        "B4-eval",
        "Acting on running statistics mends it.",
        "supported when the 95 % interval of the difference in score, in E minus skipped, lies "
        f"above {MARGIN:g} for MADDPG and DDPG; refuted when it lies below for either",
        ("bypass", "eval"),
        b4_eval,
    )
    claim(
        "B4-train",
        "Acting in train mode, one observation at a time, does not solve the environment either.",
        f"supported when the 95 % interval of the mean score lies below {SOLVED:g} for MADDPG and "
        "DDPG; refuted when it lies above for either",
        ("train",),
        b4_train,
    )
    claim(
        "B4-ddpg",
        "DDPG's own placement is as good as no batch norm.",
        "supported when the 95 % interval of the difference in score lies above "
        f"-{MARGIN:g} for MADDPG and DDPG; refuted when it lies below for either",
        ("none", "ddpg-placement"),
        b4_ddpg,
    )
    claim(
        "B4-particles",
        "On a particle task too, MADDPG with batch norm skipped when acting does worse.",
        "supported when on simple_speaker_listener or simple_spread the 95 % interval of the "
        "difference in final return, skipped minus in E, lies below "
        f"-{PARTICLE_MARGIN:.0%} of the return without batch norm; refuted when it lies above on "
        "both",
        tuple(f"{task}-{key}" for task in PARTICLES for key in ("none", "bypass", "eval")),
        b4_particles,
    )
    return judged.claims


_COLORS = {
    "none": plots.BLACK,
    "bypass": plots.VERMILLION,
    "eval": plots.BLUE,
    "train": plots.PINK,
    "ddpg-placement": plots.GREEN,
}
_SHORT = {
    "none": "no batch norm",
    "bypass": "skipped when acting (B)",
    "eval": "running statistics (E)",
    "train": "one row's own (T)",
    "ddpg-placement": "DDPG's placement",
}


def _render(outcome: _Outcome, study: dict[str, Any], out: Path) -> None:
    sections = []
    rally = [c for c in outcome.conditions if c.task == "rally"]
    if rally:
        verdict = {claim["id"]: claim["verdict"] for claim in study["claims"]}["B4"]
        headline = {
            "supported": "Batch norm skipped when acting: the agents do not learn to rally",
            "refuted": "Batch norm skipped when acting: the agents learn to rally all the same",
        }.get(verdict, "Do agents learn to rally when batch norm is skipped in acting?")
        panels = [
            plots.Panel(
                name,
                [*(_curve(outcome, algo, c) for c in rally), _threshold(outcome, algo, rally[0])],
            )
            for algo, name in ALGOS.items()
        ]
        plots.learning_curves(
            panels,
            out / "rally.png",
            headline=headline,
            best=None,
            y_label="Better agent's return, mean over 100 episodes",
        )
        sections.append(
            report.FigureSection(
                "The answer",
                "Score of the policies as they act, sixteen times in a run: mean over seeds with "
                f"the band from the lowest to the highest. At {SOLVED:g} the course calls the task "
                "solved. MADDPG has centralized critics, DDPG independent ones.",
                out / "rally.png",
                alt="Learning curves of MADDPG and DDPG on rally for each condition",
            )
        )
        rows = [
            plots.ForestRow(
                c.label,
                {ALGOS[a]: outcome.scores(a, c).tolist() for a in c.predicted},
                {ALGOS[a]: predicted for a, predicted in c.predicted.items()},
                detail=c.plan or "",
                missed=frozenset(
                    ALGOS[a]
                    for a, predicted in c.predicted.items()
                    if predicted is not None and _missed(predicted, outcome.scores(a, c))
                ),
            )
            for c in rally
        ]
        plots.condition_table_plot(
            rows,
            out / "conditions.png",
            headline=f"Every condition on rally; solved from {SOLVED:g} up",
            best=None,
            x_label="best mean over 100 episodes",
        )
        sections.append(
            report.FigureSection(
                "Every condition",
                "Dots are seeds, the bar runs from the worst to the best, the hollow diamond is "
                f"what was predicted. Predicted and found are compared by class: solved from "
                f"{SOLVED:g} up, failed below {FAILED:g}, partly between.",
                out / "conditions.png",
                alt="Scores of every condition, a row each, with predictions",
            )
        )
    tasks = [task for task in PARTICLES if any(c.task == task for c in outcome.conditions)]
    for task in tasks:
        panel = plots.Panel(
            TASKS[task].title,
            [_curve(outcome, "maddpg", c) for c in outcome.conditions if c.task == task],
        )
        path = out / f"{task}.png"
        plots.learning_curves(
            [panel],
            path,
            headline=f"MADDPG on {TASKS[task].title}",
            best=None,
            y_label="Return of all agents together, mean over 100 episodes",
        )
        sections.append(
            report.FigureSection(
                TASKS[task].title,
                f"{outcome.seeds} seeds: mean over seeds, and the band from the lowest to the "
                "highest.",
                path,
                alt=f"Learning curves of MADDPG on {TASKS[task].title}",
            )
        )
    report.write_report(
        out / "report.html", study, sections, explanation(study),
        title="Batch norm that is skipped when acting",
    )  # fmt: skip


def _curve(outcome: _Outcome, algo: str, condition: Condition) -> plots.Curve:
    kind = condition.key.removeprefix(f"{condition.task}-")
    steps, values = outcome.curve(algo, condition.key, "return")
    return plots.Curve(_SHORT[kind], steps, values, _COLORS[kind])


def _threshold(outcome: _Outcome, algo: str, condition: Condition) -> plots.Curve:
    steps, _ = outcome.curve(algo, condition.key, "return")
    return plots.Curve("solved", steps, np.full((1, len(steps)), SOLVED), plots.GREY, "--")


def explanation(study: dict[str, Any]) -> str:
    """The question in a minute, as HTML; its last paragraph follows the measured verdict."""
    verdict = {claim["id"]: claim["verdict"] for claim in study["claims"]}["B4"]
    result = {
        "supported": "<p><strong>Here it did.</strong> The same agents solve the task without "
        "batch norm, and do not where the layer is skipped when acting.</p>",
        "refuted": "<p><strong>Here it did not.</strong> The agents solve the task though the "
        "layer is skipped when acting.</p>",
    }.get(
        verdict,
        "<p><strong>This run does not settle it</strong>: see B4 below for what was found.</p>",
    )
    return (
        "<p>An actor with batch norm learns on batches: each feature is compared with the other "
        "rows of its batch. When it acts it sees one observation, and there is nothing to compare "
        "with. Code that then skips the layer runs another network than the one that "
        "learned.</p>"
        "<p>Three ways to act with the very same weights: <code>B</code> skips the layer, "
        "<code>E</code> uses the averages that learning kept, <code>T</code> takes the one "
        "observation as a batch, which is its own mean, so that every observation looks alike.</p>"
        + result
    )
