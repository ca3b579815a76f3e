"""constant-reward: why TD3 and SAC with batch norm cannot learn that the reward is the action.

A blog post trains TD3 and SAC where the observation is always [0, 0, 0] and the reward is the
action. Without batch norm both solve it; with batch norm in the critics both fail. The post says
that it cannot be the data's shifting statistics, advises against batch norm in RL, and ends by
asking why. This file holds the conditions, the predictions and the decision rules; all were
written before the runs.

The answer that is put to the test: a critic that normalizes by the batch's statistics gives the
same values when all actions of the batch are shifted together, because the batch's mean shifts as
well. So the actor's gradient has no component along a common shift. Here the actor has one
state, so a common shift is all that it can do. One switch decides: slot 3, the critic's pass in
the actor's loss, on running statistics (``E``) instead of the batch's (``T``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from batchproof import records
from batchproof.envs.constant_reward import ENDINGS
from batchproof.errors import BatchproofError
from batchproof.lab.agents import AGENTS
from batchproof.lab.loop import Result
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import Plan
from batchproof.study import plots, report
from batchproof.study.conditions import choose, curve
from batchproof.study.judging import (
    FEWEST_SEEDS,
    Finding,
    Judge,
    missed,
    verdict_above,
    verdict_below,
)
from batchproof.study.statistics import Interval, difference_interval, mean_interval
from batchproof.study.study import Cell, run_cells, write_study

NAME = "constant-reward"
SOURCE = "blog post on batch norm in TD3 and SAC (constant-reward environment)"
ALGOS = ("td3", "sac")
BEST_RETURN = 30.0
WORST_RETURN = -30.0  # what a diverged seed counts as

# Decision rules, in units of return; each holds for TD3 and SAC alike or not at all.
SOLVED = 24.0  # "about 30": the interval of the mean lies above 80 % of the best
FAILED = 15.0  # failed: the interval of the mean lies below half of the best
MARGIN = 3.0  # not worse: the interval of the difference lies above - 10 % of the best
FLIP = 10.0  # flipped: the interval of the difference lies above a third of the best
ZERO_KAPPA = 1e-4  # zero to the rounding of float32, with room: the seeds' largest mean is below
SEEN_KAPPA = 1e-2  # seen: the seeds' smallest mean is above
FULL_SEEDS = 10  # what the published verdicts stand on
# Seeds of the truncated variant are the others plus this, so that one population holds both.
TRUNCATED_OFFSET = 1000


@dataclass(frozen=True)
class Condition:
    """One way to normalize, for one algorithm.

    Attributes:
        key: its name, the algorithm apart.
        row: its row in the table of predictions; 16 is this study's own.
        label: what a reader sees.
        plan: mode plan, None without a norm.
        critic: the critics' norm.
        actor: the actor's norm.
        overrides: other fields of the agent's configuration.
        random_behaviour: learn from uniformly random actions throughout.
        td3: predicted final return of TD3, from a small NumPy simulation.
        sac: the same of SAC; None where nothing was predicted.
    """

    key: str
    row: str
    label: str
    plan: str | None
    critic: Norm
    actor: Norm
    overrides: tuple[tuple[str, Any], ...] = ()
    random_behaviour: bool = False
    td3: float | None = None
    sac: float | None = None


NONE = Norm()
BATCH = Norm("batch")
RENORM = Norm("renorm")
BEFORE_ACTION = Norm("batch", placement="before-action")
ONLINE = (("target_network", False),)

CONDITIONS = (
    Condition("none", "1", "no batch norm", None, NONE, NONE, td3=30.0, sac=26.6),
    Condition(
        "both-TTTTT", "2", "BN in both, TTTTT", "TTTTT", BATCH, BATCH, td3=-1.0, sac=18.0
    ),
    Condition("both-TETTE", "3", "BN in both, TETTE", "TETTE", BATCH, BATCH, td3=-1.0),
    Condition(
        "slot3-T", "4", "BN in critics, slot 3 in T", "TETTE", BATCH, NONE, td3=-2.0, sac=7.6
    ),
    Condition(
        "slot3-E", "5", "BN in critics, slot 3 in E", "TEETE", BATCH, NONE, td3=30.0, sac=26.6
    ),
    Condition(
        "renorm-T", "6", "Batch Renorm in critics, slot 3 in T", "TETTE", RENORM, NONE,
        td3=-0.6, sac=5.4,
    ),
    Condition(
        "slot3-S", "7", "BN in critics, slot 3 in S", "TESTE", BATCH, NONE, td3=29.9, sac=27.3
    ),
    Condition(
        "slot3-M", "8", "BN in critics, slot 3 in M", "TEMTE", BATCH, NONE, td3=30.0, sac=24.3
    ),
    Condition(
        "joint-T", "9", "BN in critics, joint, no target network, slot 3 in T", "TETJJ",
        BATCH, NONE, ONLINE, td3=-1.6,
    ),
    Condition(
        "eps-T", "10", "BN in critics, eps 0.1, slot 3 in T", "TETTE",
        Norm("batch", eps=0.1), NONE, td3=-1.7,
    ),
    Condition("actor-only", "11", "BN in the actor only", "TETTE", NONE, BATCH, td3=29.8, sac=29.8),
    Condition(
        "before-action", "12", "BN before the action, all T", "TTTTT", BEFORE_ACTION, NONE,
        td3=30.0, sac=26.1,
    ),
    Condition(
        "before-action-actor", "12", "the same, and BN in the actor", "TTTTT",
        BEFORE_ACTION, BATCH, td3=25.7, sac=28.9,
    ),
    Condition("ma-bn", "13", "BN in both, TTETT", "TTETT", BATCH, BATCH, td3=19.0, sac=27.1),
    Condition(
        "crossq", "14", "BN in both, TEEJJ, no target network", "TEEJJ",
        Norm("batch", momentum=0.01, eps=1e-3), Norm("batch", momentum=0.01, eps=1e-3),
        ONLINE, td3=14.5, sac=28.5,
    ),
    Condition(
        "stale-E", "15", "BN in critics, slot 3 in E, target statistics never synced", "TEETE",
        BATCH, NONE, (("target_stats", "stale"),), td3=30.0,
    ),
    Condition(
        "fixed-data-T", "16", "BN in critics, slot 3 in T, data that never shifts", "TETTE",
        BATCH, NONE, random_behaviour=True,
    ),
)  # fmt: skip
DEFAULT = ("none", "slot3-T", "slot3-E")


def library_plan(algo: str, plan: str) -> str:
    """The plan for an algorithm: SAC's target action comes from the actor itself, mode T as in SB3.

    It shows only where the actor is normalized.
    """
    return "TT" + plan[2:] if algo == "sac" and plan in ("TETTE", "TEETE") else plan


def run(
    out: Path,
    *,
    seeds: int | None = None,
    steps: int | None = None,
    quick: bool = False,
    conditions: str | None = None,
    ending: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Run the study and write ``study.json``, ``report.html``, pictures and metrics into ``out``.

    Args:
        out: the study's folder.
        seeds: for each condition, default 5 as in the post.
        steps: environment steps of each seed, default 3000.
        quick: 5 seeds of 1000 steps.
        conditions: names from `CONDITIONS` with commas between, or ``all``; default `DEFAULT`.
        ending: ``terminated`` (the post's, default), ``truncated`` or ``both``.
        progress: show bars.
        command: what a user typed, for the record.

    Returns:
        The content of ``study.json``.
    """
    chosen = choose(CONDITIONS, DEFAULT, conditions)
    endings = _endings(ending)
    seeds = seeds if seeds is not None else 5
    steps = steps if steps is not None else (1000 if quick else 3000)
    if not 1 <= seeds <= TRUNCATED_OFFSET:
        raise BatchproofError(f"seeds must be from 1 to {TRUNCATED_OFFSET}, got {seeds}")
    began = time.perf_counter()
    cells = [
        Cell(f"{algo}-{c.key}", training(algo, c, seeds, steps, endings))
        for algo in ALGOS
        for c in chosen
    ]
    with records.locked(out):
        results = run_cells(cells, out, progress, command)
        outcome = _Outcome(chosen, endings, seeds, steps, results)
        study = write_study(
            out, NAME, judge(outcome), describe(outcome), [outcome.columns(c.name) for c in cells],
            seeds=seeds, steps=steps, began=began,
            spent_s=sum(result.wall_s for result in results.values()), command=command,
        )  # fmt: skip
        _render(outcome, study, out)
    return study


def training(
    algo: str, condition: Condition, seeds: int, steps: int, endings: tuple[str, ...]
) -> Training:
    """One condition as a run of the lab: networks 64x64, learning rate 1e-3, batches of 256."""
    numbers = tuple(
        seed + (TRUNCATED_OFFSET if ending == "truncated" else 0)
        for ending in endings
        for seed in range(seeds)
    )
    plan = Plan.parse(library_plan(algo, condition.plan)) if condition.plan else None
    config = AGENTS[algo].Config(
        actor=MLP((64, 64), condition.actor),
        critic=MLP((64, 64), condition.critic),
        learning_rate=1e-3,
        **dict(condition.overrides),
    )
    return Training(
        algo=algo,
        config=replace(config, plan=plan) if plan else config,
        env_id="batchproof/ConstantReward-v0",
        env_options=tuple({"ending": ending} for ending in endings for _ in range(seeds)),
        seeds=numbers,
        steps=steps,
        random_behaviour=condition.random_behaviour,
        learning_starts=min(100, steps // 2),
    )


def _endings(ending: str | None) -> tuple[str, ...]:
    if ending == "both":
        return ENDINGS
    if ending is None:
        return ENDINGS[:1]
    if ending not in ENDINGS:
        raise BatchproofError(f"unknown ending {ending!r}: use {', '.join(ENDINGS)} or both")
    return (ending,)


@dataclass(frozen=True)
class _Outcome:
    """The results, by algorithm, condition and ending."""

    conditions: tuple[Condition, ...]
    endings: tuple[str, ...]
    seeds: int
    steps: int
    results: dict[str, Result]

    def has(self, *keys: str) -> bool:
        return set(keys) <= {condition.key for condition in self.conditions}

    def columns(self, cell: str) -> dict[str, np.ndarray]:
        """A cell's metrics with what tells its rows apart in the study's file."""
        metrics = dict(self.results[cell].metrics)
        algo, key = cell.split("-", 1)
        rows = len(metrics["seed"])
        late = metrics["seed"] >= TRUNCATED_OFFSET
        return {
            "condition": np.full(rows, key),
            "algo": np.full(rows, algo),
            "ending": np.where(late, "truncated", "terminated"),
            **metrics,
            "seed": metrics["seed"] % TRUNCATED_OFFSET,
        }

    def curve(self, algo: str, key: str, ending: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (T,) and a metric's values (seeds, T)."""
        columns = self.columns(f"{algo}-{key}")
        mine = columns["ending"] == ending
        return curve({column: columns[column][mine] for column in ("step", name)}, name)

    def returns(self, algo: str, key: str, ending: str) -> np.ndarray:
        """Final returns (seeds,), NaN where a seed diverged."""
        return self.curve(algo, key, ending, "return")[1][:, -1]

    def counted(self, algo: str, key: str, ending: str) -> np.ndarray:
        """Final returns (seeds,) with the worst one for a seed that diverged."""
        return np.nan_to_num(self.returns(algo, key, ending), nan=WORST_RETURN)

    def kappa(self, algo: str, key: str, ending: str) -> np.ndarray:
        """Each seed's kappa (seeds,), the mean over training."""
        return np.nanmean(self.curve(algo, key, ending, "kappa")[1], axis=1)


def describe(outcome: _Outcome) -> list[dict[str, Any]]:
    """The conditions of ``study.json``, one for each algorithm, condition and ending."""
    rows = []
    for algo in ALGOS:
        for condition in outcome.conditions:
            for ending in outcome.endings:
                returns = outcome.returns(algo, condition.key, ending)
                counted = outcome.counted(algo, condition.key, ending)
                predicted = condition.td3 if algo == "td3" else condition.sac
                run = outcome.results[f"{algo}-{condition.key}"]
                rows.append(
                    {
                        "name": f"{algo}-{condition.key}-{ending}",
                        "label": condition.label,
                        "row": condition.row,
                        "algo": algo,
                        "norm": _norm_words(condition),
                        "modes": library_plan(algo, condition.plan) if condition.plan else None,
                        "ending": ending,
                        "returns": returns.tolist(),
                        "kappa": float(np.median(outcome.kappa(algo, condition.key, ending))),
                        "prediction": None if predicted is None else f"{predicted:g}",
                        "missed": None if predicted is None else _missed(predicted, counted),
                        "diverged": int(np.isnan(returns).sum()),
                        "wall_s": run.wall_s,
                    }
                )
    return rows


def _norm_words(condition: Condition) -> str:
    if condition.plan is None:
        return "none"
    parts = [
        f"{where} {norm.kind}"
        + (f" {norm.placement}" if norm.placement != "pre" else "")
        + (f" momentum {norm.momentum:g} eps {norm.eps:g}" if norm.eps != BATCH.eps else "")
        for where, norm in (("actor", condition.actor), ("critic", condition.critic))
        if norm.kind != "none"
    ]
    return ", ".join(parts + [f"{name} {value}" for name, value in condition.overrides])


_missed = partial(missed, solved=SOLVED, failed=FAILED)


def judge(outcome: _Outcome) -> list[dict[str, Any]]:
    """Verdicts on D1 to D5 by the rules above, for the post's ending where it was run."""
    ending = outcome.endings[0]
    judged = Judge(outcome, SOURCE)

    def claim(
        id_: str,
        statement: str,
        rule: str,
        needs: tuple[str, ...],
        settle: Callable[[str], Finding],
    ) -> None:
        """Judged on the post's ending; another one that was run is told beside it."""

        def find() -> Finding:
            found = settle(ending)
            others = [settle(other).verdict for other in outcome.endings[1:]]
            if not others or outcome.seeds < FEWEST_SEEDS:
                return found
            same = "the same" if others[0] == found.verdict else others[0]
            why = f"{found.why} With episodes that end as truncated: {same}."
            return Finding(found.verdict, found.interval, why)

        judged.claim(id_, statement, rule, needs, find)

    def means(key: str, ending: str) -> dict[str, Interval]:
        return {algo: mean_interval(outcome.counted(algo, key, ending)) for algo in ALGOS}

    def differences(key: str, other: str, ending: str) -> dict[str, Interval]:
        return {
            algo: difference_interval(
                outcome.counted(algo, key, ending), outcome.counted(algo, other, ending)
            )
            for algo in ALGOS
        }

    def words(found: dict[str, Interval]) -> str:
        return ", ".join(
            f"{algo.upper()} {i.mean:.1f} [{i.lo:.1f}, {i.hi:.1f}]" for algo, i in found.items()
        )

    def lowest(found: dict[str, Interval]) -> Interval:
        return min(found.values(), key=lambda i: i.lo)

    def highest(found: dict[str, Interval]) -> Interval:
        return max(found.values(), key=lambda i: i.hi)

    def d1(ending: str) -> Finding:
        found = means("none", ending)
        verdict = verdict_above([*found.values()], SOLVED)
        return Finding(verdict, lowest(found), f"Final return: {words(found)}.")

    def d2(ending: str) -> Finding:
        found = means("slot3-T", ending)
        verdict = verdict_below([*found.values()], FAILED)
        return Finding(verdict, highest(found), f"Final return: {words(found)}.")

    def d3(ending: str) -> Finding:
        fixed, shifting = means("fixed-data-T", ending), means("slot3-E", ending)
        fails = verdict_below([*fixed.values()], FAILED)
        learns = verdict_above([*shifting.values()], SOLVED)
        both = {fails, learns}
        verdict = (
            "supported" if both == {"supported"}
            else "refuted" if fails == "refuted" else "inconclusive"
        )  # fmt: skip
        why = (
            f"With BN, slot 3 in T, on data that never shifts: {words(fixed)}. With BN, slot 3 "
            f"in E, on data that shifts as usual: {words(shifting)}."
        )
        return Finding(verdict, highest(fixed), why)

    def d4(ending: str) -> Finding:
        found = differences("slot3-E", "none", ending)
        worse = all(i.hi < -MARGIN for i in found.values())
        fine = all(i.lo > -MARGIN for i in found.values())
        verdict = "refuted" if fine else "supported" if worse else "inconclusive"
        why = f"BN with slot 3 in E minus no BN, in return: {words(found)}."
        return Finding(verdict, lowest(found), why)

    def d5(ending: str) -> Finding:
        found = differences("slot3-E", "slot3-T", ending)
        blind = max(outcome.kappa(algo, "slot3-T", ending).max() for algo in ALGOS)
        seeing = min(outcome.kappa(algo, "slot3-E", ending).min() for algo in ALGOS)
        flips = verdict_above([*found.values()], FLIP)
        explained = blind < ZERO_KAPPA and seeing > SEEN_KAPPA
        verdict = (
            "supported" if flips == "supported" and explained
            else "refuted" if flips == "refuted" or blind >= ZERO_KAPPA else "inconclusive"
        )  # fmt: skip
        why = (
            f"Slot 3 in E minus slot 3 in T, in return: {words(found)}. The common share of the "
            f"actor's gradient, kappa, is at most {blind:.0e} in T and at least {seeing:.2f} in E."
        )
        return Finding(verdict, lowest(found), why)

    claim(
        "D1",
        "Without batch norm TD3 and SAC both reach about 30.",
        f"supported when the 95 % interval of each mean final return lies above {SOLVED:g}, "
        f"refuted when one lies below",
        ("none",),
        d1,
    )
    claim(
        "D2",
        "With batch norm in the critics both fail.",
        f"supported when the 95 % interval of each mean final return lies below {FAILED:g}, "
        "refuted when one lies above",
        ("slot3-T",),
        d2,
    )
    claim(
        "D3",
        "It is not the data's shifting statistics.",
        f"supported when BN still fails (interval below {FAILED:g}) on data that never shifts, "
        f"uniformly random actions throughout, and learns (interval above {SOLVED:g}) on shifting "
        "data with slot 3 in E; refuted when an agent on data that never shifts does not fail",
        ("fixed-data-T", "slot3-E"),
        d3,
    )
    claim(
        "D4",
        "Do not use batch norm in RL.",
        "refuted when BN with slot 3 in E is not worse than no BN: the 95 % interval of the "
        f"difference lies above -{MARGIN:g} for both; supported when it lies below for both",
        ("none", "slot3-E"),
        d4,
    )
    claim(
        "D5",
        "Why? A critic on the batch's own statistics cannot show the actor a shift that all "
        "actions share; slot 3 alone decides.",
        "supported when slot 3 in E instead of T, nothing else changed, raises the return of both "
        f"(interval of the difference above {FLIP:g}), and kappa, the mean over training, is "
        f"below {ZERO_KAPPA:g} for every seed in T and above {SEEN_KAPPA:g} for every seed in E; "
        "refuted when the return does not rise, or kappa in T is not zero",
        ("slot3-T", "slot3-E"),
        d5,
    )
    return judged.claims


_COLORS = {"none": plots.BLACK, "slot3-T": plots.VERMILLION, "slot3-E": plots.BLUE}
_SHORT = {
    "none": "no batch norm",
    "slot3-T": "batch norm, slot 3 in T",
    "slot3-E": "batch norm, slot 3 in E",
}


def _render(outcome: _Outcome, study: dict[str, Any], out: Path) -> None:
    sections = []
    ending = outcome.endings[0]
    verdicts = {claim["id"]: claim["verdict"] for claim in study["claims"]}
    if outcome.has("none", "slot3-T", "slot3-E"):
        answered = verdicts["D5"] == "supported"
        headline = (
            "Batch norm did not break TD3 and SAC: one forward pass did"
            if answered
            else "Does one forward pass decide whether batch norm breaks TD3 and SAC?"
        )
        subtitle = (
            "Slot 3 is the critic's pass in the actor's loss. In T it uses the batch's own "
            "statistics, in E the running ones; all else is equal."
        )
        agents = [
            plots.AgentAnswer(
                algo.upper(),
                [_curve(outcome, algo, key, ending, "return") for key in _SHORT],
                [_curve(outcome, algo, key, ending, "kappa") for key in ("slot3-T", "slot3-E")],
            )
            for algo in ALGOS
        ]
        plots.answer_picture(agents, out / "answer.png", headline=headline, subtitle=subtitle)
        sections.append(
            report.FigureSection(
                "The answer",
                "Left: return of the deterministic policy, mean over seeds with the band from the "
                "worst to the best. Right: kappa, the share of the actor's gradient that is common "
                "to all actions of the batch. In T it is zero to rounding: the actor never "
                "hears that all actions should go up.",
                out / "answer.png",
                alt="Learning curves and kappa of TD3 and SAC for three conditions",
            )
        )
    keys = [c.key for c in outcome.conditions]
    palette = dict(zip(keys, list(plots.PALETTE) * len(keys), strict=False)) | _COLORS
    shown = [key for key in keys if key in (*DEFAULT, "fixed-data-T")]
    panels = [
        plots.Panel(
            f"{algo.upper()}, episodes end as {which}",
            [_curve(outcome, algo, key, which, "return", palette[key]) for key in shown],
        )
        for which in outcome.endings
        for algo in ALGOS
    ]
    plots.learning_curves(panels, out / "curves.png", headline="Learning curves", each_seed=True)
    sections.append(
        report.FigureSection(
            "Learning curves, as in the post",
            f"{outcome.seeds} seeds: mean, minimum and maximum, and each seed as a thin line.",
            out / "curves.png",
            alt="Learning curves with mean, minimum and maximum over seeds",
        )
    )
    answering = [key for key in ("slot3-T", "slot3-E", "slot3-M", "renorm-T") if outcome.has(key)]
    if answering:
        panels = [
            plots.Panel(
                algo.upper(),
                [
                    _curve(outcome, algo, key, ending, "response_ratio", palette[key])
                    for key in answering
                ],
            )
            for algo in ALGOS
        ]
        plots.learning_curves(
            panels,
            out / "response.png",
            headline="Does the critic answer when all actions move?",
            best=None,
            y_label="Answer to a shift of all actions / to a shift of one (R)",
        )
        sections.append(
            report.FigureSection(
                "The response ratio R",
                "How much the critic's value of a row changes when every action of the batch moves "
                "by 0.1, over the change when that row's action moves alone: 1 without coupling "
                "between rows, 0 for batch norm in T.",
                out / "response.png",
                alt="Response ratio during training",
            )
        )
    if outcome.has("slot3-T"):
        panels = [
            plots.Panel(
                algo.upper(),
                [
                    replace(_curve(outcome, algo, "slot3-T", ending, name, color), label=label)
                    for name, label, color in (
                        ("advantage_running", "on running statistics", plots.BLUE),
                        ("advantage_seen", "as slots 3 and 4 see it in T", plots.VERMILLION),
                    )
                ],
            )
            for algo in ALGOS
        ]
        plots.learning_curves(
            panels,
            out / "advantage.png",
            headline="Batch norm, slot 3 in T: what the policy seems to gain",
            best=None,
            y_label="Value of the policy's actions above the replayed ones",
        )
        sections.append(
            report.FigureSection(
                "Advantage erasure",
                "The mean value of the policy's actions minus that of the replayed ones, by the "
                "same critic. In T the batch's mean is subtracted on either side, so the "
                "difference does not say whether the policy is better.",
                out / "advantage.png",
                alt="Seen advantage during training, on the batch's and on running statistics",
            )
        )
    for which in outcome.endings:
        rows = [
            plots.ForestRow(
                c.label,
                {a.upper(): outcome.counted(a, c.key, which).tolist() for a in ALGOS},
                {"TD3": c.td3, "SAC": c.sac},
                detail=f"row {c.row}" + (f" · {c.plan}" if c.plan else ""),
                missed=frozenset(
                    a.upper()
                    for a, predicted in (("td3", c.td3), ("sac", c.sac))
                    if predicted is not None
                    and _missed(predicted, outcome.counted(a, c.key, which))
                ),
            )
            for c in outcome.conditions
        ]
        path = out / f"conditions-{which}.png"
        plots.condition_table_plot(
            rows, path, headline=f"Every condition, episodes that end as {which}"
        )
        sections.append(
            report.FigureSection(
                f"Every condition ({which})",
                "Dots are seeds, the bar runs from the worst to the best, the hollow diamond is "
                "what a small simulation predicted before the runs. A diverged seed counts as "
                f"{WORST_RETURN:g}.",
                path,
                alt="Final returns of every condition, a row each, with predictions",
            )
        )
    report.write_report(
        out / "report.html", study, sections, explanation(study),
        title="Batch norm on a constant reward",
    )  # fmt: skip


def _curve(
    outcome: _Outcome, algo: str, key: str, ending: str, name: str, color: str | None = None
) -> plots.Curve:
    steps, values = outcome.curve(algo, key, ending, name)
    label = _SHORT.get(key) or next(c.label for c in outcome.conditions if c.key == key)
    return plots.Curve(label, steps, values, color or _COLORS[key])


def explanation(study: dict[str, Any]) -> str:
    """The answer in a minute, as HTML; its last paragraph follows the measured verdicts."""
    verdict = {claim["id"]: claim["verdict"] for claim in study["claims"]}
    if verdict["D5"] == "supported":
        result = (
            "<p><strong>Here the one switch decided.</strong> With slot 3 in <code>T</code> both "
            "agents failed; with slot 3 in <code>E</code>, and nothing else changed, both learned. "
            "So: keep the batch norm, and give the critic its running statistics when it advises "
            "the actor.</p>"
        )
    else:
        result = (
            "<p><strong>This run does not settle it</strong> (see D5 below): too few seeds or "
            "steps, or the prediction failed.</p>"
        )
    return (
        "<p>The task: whatever happens, the reward is the action. The agent only has to learn "
        "<em>push harder</em>. The actor learns by asking the critic: would you value these "
        "actions more if I moved them up a little?</p>"
        "<p>Batch norm subtracts the mean of the batch. Move <em>all</em> actions of the batch up "
        "by the same amount, and the mean moves up by just as much: after the subtraction nothing "
        "has changed. So a critic on the batch's own statistics (mode <code>T</code>) must answer "
        "&ldquo;no difference&rdquo;, however well it has learned the rewards. In this task the "
        "actor sees one state, so all that it can do is move all its actions together: the one "
        "thing that this critic cannot see.</p>"
        "<p>On running statistics (mode <code>E</code>) nothing is subtracted along, and the "
        "critic answers. <code>kappa</code> measures it: the share of the actor's gradient that "
        "all actions have in common, exactly 0 in <code>T</code>.</p>" + result
    )
