"""pendulum-swingup: which part of XQC keeps it from swinging a pendulum up, where SAC does?

XQC (arXiv 2509.25174) reports 85 +- 268 on dm_control's pendulum-swingup after 100k steps and 608
+- 379 after a million, where SAC has 818 after 100k. Between the two lie a dozen differences. This
file starts from XQC and turns them off or replaces them one at a time; conditions,
predictions and decision rules were written before the runs.

Scaled down so that it runs in minutes on two cores, XQC and SAC alike: two layers of 64 (XQC has
four of 256 and 512), batches of 128 (256), a learning rate of 1e-3 (3e-4), fewer steps; and 51
atoms (101). XQC's norms, projection, updates per step, delay, temperature and target entropy are
the paper's, SAC's are its own. The task is `batchproof.envs.pendulum_swingup`, dm_control's.

Two settings were chosen after tries in which SAC failed, for a cure needs an ill XQC beside a
healthy SAC: an action lasts for four steps, and every condition gets observations normalized by
running statistics (the speed spreads much wider than the rest). ``sac-raw`` is SAC without.

The guess that is put to the test: rewards are 0 nearly everywhere at first, so the standard
deviation of the returns, by which XQC divides rewards, is small, and what a good policy would
earn lies far above the largest atom, 5. Above it the critic cannot tell good from better.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.lab.agents import crossq, sac, xqc
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.study import plots, report
from batchproof.study.conditions import Outcome, choose, write_outcome
from batchproof.study.judging import Finding, Judge, missed, verdict_above, words
from batchproof.study.statistics import Interval, difference_interval, mean_interval
from batchproof.study.study import Cell, run_cells

NAME = "pendulum-swingup"
SOURCE = "XQC (arXiv 2509.25174), returns on DMC pendulum-swingup"
ENV = "batchproof/PendulumSwingup-v0"
ENV_OPTIONS = {"repeat": 4}
SEEDS = 6  # two cores share them evenly
STEPS = 40_000  # decisions; SAC needs 100 000 until all but one seed in twelve solve the task
LEARNING_STARTS = 1000
EVALUATIONS = 20  # in a run
LAST = 3  # evaluations whose mean is a seed's score
UPDATES = 2  # XQC's, per environment step
SMALL: dict[str, Any] = {"batch_size": 128, "learning_rate": 1e-3}
FALLING: dict[str, Any] = {"learning_rate_end": 1e-4}  # over XQC's two million updates
ATOMS = 51

# Decision rules, in units of return: steps of 1000 within 8 degrees of upright.
SOLVED = 600.0
FAILED = 400.0
MARGIN = 200.0  # what counts as a difference


@dataclass(frozen=True)
class Condition:
    """SAC, XQC, or XQC with one difference.

    Attributes:
        key: its name.
        label: what a reader sees.
        config: the agent's configuration.
        updates: per environment step.
        predicted: final return.
        normalize_obs: whether observations are normalized by running statistics.
    """

    key: str
    label: str
    config: sac.Config | crossq.Config | xqc.Config
    updates: int
    predicted: float
    normalize_obs: bool = True

    @property
    def algo(self) -> str:
        """The agent's name."""
        return type(self.config).__module__.rsplit(".", 1)[-1]


def _xqc(norm: Norm = xqc.BATCH_NORM, project: str = "all", **changes: Any) -> xqc.Config:
    # Without batch norm nothing stands in for the biases that XQC leaves out.
    mlp = MLP((64, 64), norm, bias=norm.kind == "none", project=project)
    return xqc.Config(actor=mlp, critic=mlp, atoms=ATOMS, **SMALL, **FALLING, **changes)


def _scalar() -> crossq.Config:
    """XQC with a critic that regresses raw returns: CrossQ with all else as in XQC."""
    base = _xqc()
    return crossq.Config(
        actor=base.actor,
        critic=base.critic,
        **SMALL,
        **FALLING,
        schedule_steps=base.schedule_steps,
        adam_b1=0.9,
        initial_alpha=base.initial_alpha,
        entropy_per_dimension=base.entropy_per_dimension,
        target_network=True,
    )


_SAC = sac.Config(actor=MLP((64, 64)), critic=MLP((64, 64)), **SMALL)
LAYER = Norm("layer", "input+pre")

CONDITIONS = (
    Condition("sac", "SAC", _SAC, 1, 800.0),
    Condition("sac-raw", "SAC on raw observations", _SAC, 1, 300.0, normalize_obs=False),
    Condition("xqc", "XQC", _xqc(), UPDATES, 100.0),
    Condition("no-norm", "XQC without batch norm", _xqc(Norm()), UPDATES, 100.0),
    Condition("layer-norm", "XQC with layer norm", _xqc(LAYER), UPDATES, 100.0),
    Condition(
        "no-projection", "XQC without weight projection", _xqc(project="none"), UPDATES, 100.0
    ),
    Condition(
        "scalar", "XQC that regresses raw returns (CrossQ's critic)", _scalar(), UPDATES, 800.0
    ),
    Condition(
        "raw-rewards", "XQC with raw rewards, atoms from -20 to 420",
        _xqc(normalize_rewards=False, low=-20.0, high=420.0), UPDATES, 800.0,
    ),
    Condition(
        "wide-atoms", "XQC with atoms from -50 to 50", _xqc(low=-50.0, high=50.0), UPDATES, 800.0
    ),
    Condition("one-update", "XQC with one update per step", _xqc(), 1, 100.0),
    Condition("no-delay", "XQC without policy delay", _xqc(policy_delay=1), UPDATES, 100.0),
    Condition(
        "alpha-1", "XQC with temperature 1 at the start", _xqc(initial_alpha=1.0), UPDATES, 400.0
    ),
    Condition(
        "entropy-1", "XQC with SAC's target entropy", _xqc(entropy_per_dimension=-1.0), UPDATES,
        100.0,
    ),
)  # fmt: skip
SWITCHES = tuple(c.key for c in CONDITIONS if c.key not in ("sac", "sac-raw", "xqc"))
DEFAULT = ("sac", "sac-raw", "xqc")


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
        steps: decisions of each seed, default `STEPS`.
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
    if steps is None:
        steps = STEPS // (4 if quick else 1)
    began = time.perf_counter()
    cells = [Cell(c.key, training(c, seeds, steps)) for c in chosen]
    with records.locked(out):
        outcome = Outcome(chosen, seeds, run_cells(cells, out, progress, command))
        study = write_outcome(
            NAME, out, outcome, judge(outcome), describe(outcome),
            steps=steps, began=began, command=command,
        )  # fmt: skip
        _render(outcome, study, out)
    return study


def training(condition: Condition, seeds: int, steps: int) -> Training:
    """One condition as a run of the lab."""
    return Training(
        algo=condition.algo,
        config=condition.config,
        env_id=ENV,
        env_options=ENV_OPTIONS,
        seeds=tuple(range(seeds)),
        steps=steps,
        learning_starts=min(LEARNING_STARTS, steps // 2),
        gradient_steps=condition.updates,
        eval_every=max(1, steps // EVALUATIONS),
        eval_episodes=10,
        normalize_obs=condition.normalize_obs,
    )


def score(outcome: Outcome[Condition], key: str) -> np.ndarray:
    """Each seed's score (seeds,): its mean return in the last evaluations, 0 if it diverged."""
    return outcome.last(key, LAST, worst=0.0)


def describe(outcome: Outcome[Condition]) -> list[dict[str, Any]]:
    """The conditions of ``study.json``."""
    rows = []
    for c in outcome.conditions:
        scores = score(outcome, c.key)
        norm = c.config.critic.norm
        rows.append(
            {
                "name": c.key,
                "label": c.label,
                "algo": c.algo,
                "norm": "none" if norm.kind == "none" else f"{norm.kind} {norm.placement}",
                "modes": str(c.config.plan) if norm.kind in ("batch", "renorm") else None,
                "returns": scores.tolist(),
                "solved": int((scores >= SOLVED).sum()),
                "prediction": f"{c.predicted:g}",
                "missed": _missed(c.predicted, scores),
                "diverged": outcome.diverged(c.key),
                "wall_s": outcome.results[c.key].wall_s,
            }
        )
    return rows


_missed = partial(missed, solved=SOLVED, failed=FAILED)


def judge(outcome: Outcome[Condition]) -> list[dict[str, Any]]:
    """Verdicts: does XQC fail, and which switch cures it."""
    judge = Judge(outcome, SOURCE)
    labels = {condition.key: condition.label for condition in CONDITIONS}

    def mean(key: str) -> Interval:
        return mean_interval(score(outcome, key))

    def gain(key: str, other: str) -> Interval:
        return difference_interval(score(outcome, key), score(outcome, other))

    def fails() -> Finding:
        lost = gain("sac", "xqc")
        verdict = verdict_above([lost], MARGIN)
        if verdict == "supported" and mean("sac").lo < SOLVED:
            verdict = "inconclusive"  # SAC did not solve it either
        why = (
            f"Return of SAC {words(mean('sac'))}, of XQC {words(mean('xqc'))}; the difference is "
            f"{words(lost)}."
        )
        return Finding(verdict, lost, why)

    def cures(key: str) -> Finding:
        failed, found = fails(), gain(key, "xqc")
        why = f"Return {words(mean(key))}, {words(found)} above XQC's."
        if failed.verdict != "supported":
            return Finding("inconclusive", found, f"{why} XQC is not shown to fail (S1).")
        return Finding(verdict_above([found], MARGIN), found, why)

    def observed() -> Finding:
        found = gain("sac", "sac-raw")
        why = (
            f"Return of SAC {words(mean('sac'))}, on raw observations {words(mean('sac-raw'))}; "
            f"the difference is {words(found)}."
        )
        return Finding(verdict_above([found], MARGIN), found, why)

    judge.claim(
        "S1",
        "XQC fails to swing the pendulum up where SAC does.",
        f"a seed's score is its mean return in the last {LAST} of {EVALUATIONS} evaluations; "
        "supported when the 95 % interval of the difference in mean score, SAC minus XQC, lies "
        f"above {MARGIN:g} and SAC's own above {SOLVED:g}; refuted when the difference lies below "
        f"{MARGIN:g}",
        ("sac", "xqc"),
        fails,
    )
    for key in SWITCHES:
        judge.claim(
            f"S2-{key}",
            f"{labels[key]} does better.",
            "supported when S1 is and the 95 % interval of the difference in score to XQC lies "
            f"above {MARGIN:g}; refuted when S1 is supported and it lies below",
            ("sac", "xqc", key),
            lambda key=key: cures(key),  # type: ignore[misc]
        )
    judge.claim(
        "S3",
        "The largest atom is to blame: rewards are scaled so that good returns lie above it.",
        "supported when S1 is and raw rewards, wider atoms and a critic that regresses each do "
        f"better by more than {MARGIN:g} (95 % intervals); refuted when one of them lies below",
        ("sac", "xqc", "raw-rewards", "wide-atoms", "scalar"),
        lambda: _atoms(fails(), [gain(key, "xqc") for key in _ATOM_SWITCHES]),
    )
    judge.claim(
        "S4",
        "SAC swings the pendulum up because its observations are normalized.",
        "written after tries: supported when the 95 % interval of the difference in mean score, "
        f"SAC minus SAC on raw observations, lies above {MARGIN:g}; refuted when it lies below",
        ("sac", "sac-raw"),
        observed,
    )
    return judge.claims


_ATOM_SWITCHES = ("raw-rewards", "wide-atoms", "scalar")


def _atoms(failed: Finding, gains: list[Interval]) -> Finding:
    least = min(gains, key=lambda interval: interval.lo)
    why = "Return above XQC's: " + ", ".join(
        f"{key} {words(found)}" for key, found in zip(_ATOM_SWITCHES, gains, strict=True)
    )
    if failed.verdict != "supported":
        return Finding("inconclusive", least, f"{why}. XQC is not shown to fail (S1).")
    return Finding(verdict_above(gains, MARGIN), least, f"{why}.")


_COLORS = {
    "sac": plots.BLACK,
    "sac-raw": plots.BLUE,
    "xqc": plots.VERMILLION,
    "no-norm": plots.SKY,
    "layer-norm": plots.PINK,
    "no-projection": plots.ORANGE,
    "scalar": plots.BLUE,
    "raw-rewards": plots.GREEN,
    "wide-atoms": plots.PINK,
    "one-update": plots.BLUE,
    "no-delay": plots.GREEN,
    "alpha-1": plots.ORANGE,
    "entropy-1": plots.SKY,
}
_SHORT = {
    "sac": "SAC",
    "sac-raw": "SAC, raw obs",
    "xqc": "XQC",
    "no-norm": "no norm",
    "layer-norm": "layer norm",
    "no-projection": "no projection",
    "scalar": "regression",
    "raw-rewards": "raw rewards",
    "wide-atoms": "wide atoms",
    "one-update": "one update",
    "no-delay": "no delay",
    "alpha-1": "alpha 1",
    "entropy-1": "SAC's entropy",
}
_PANELS = (
    ("SAC and XQC", ("sac-raw",)),
    ("Norm and weights", ("no-norm", "layer-norm", "no-projection")),
    ("What the critic predicts", ("scalar", "raw-rewards", "wide-atoms")),
    ("Updates and exploration", ("one-update", "no-delay", "alpha-1", "entropy-1")),
)


def _render(outcome: Outcome[Condition], study: dict[str, Any], out: Path) -> None:
    sections = []
    verdicts = {claim["id"]: claim["verdict"] for claim in study["claims"]}
    base = [key for key in ("sac", "xqc") if outcome.has(key)]
    shown = [(title, [key for key in keys if outcome.has(key)]) for title, keys in _PANELS]
    panels = [
        plots.Panel(title, [_curve(outcome, key) for key in (*base, *keys)])
        for title, keys in shown
        if keys
    ]
    if not panels:
        panels = [plots.Panel("SAC and XQC", [_curve(outcome, c.key) for c in outcome.conditions])]
    headline = {
        "supported": "Which switch lets XQC swing the pendulum up?",
        "refuted": "This small XQC swings the pendulum up as SAC does",
    }.get(verdicts["S1"], "XQC and SAC on pendulum-swingup, one switch at a time")
    plots.learning_curves(
        panels,
        out / "curves.png",
        headline=headline,
        best=None,
        each_seed=True,
        band=False,  # most seeds either solve the task or get nothing
        y_label="Steps of 1000 upright, deterministic policy",
    )
    sections.append(
        report.FigureSection(
            "Learning curves",
            f"{outcome.seeds} seeds: their mean, and each seed as a thin line. SAC and XQC stand "
            "in each panel.",
            out / "curves.png",
            alt="Learning curves of SAC, XQC and XQC with one switch changed",
        )
    )
    rows = []
    for c in outcome.conditions:
        scores = score(outcome, c.key)
        rows.append(
            plots.ForestRow(
                c.label,
                {"return": scores.tolist()},
                {"return": c.predicted},
                missed=frozenset({"return"} if _missed(c.predicted, scores) else ()),
            )
        )
    plots.condition_table_plot(
        rows,
        out / "conditions.png",
        headline="Every condition on pendulum-swingup",
        best=None,
        x_label=f"steps of 1000 upright, mean of the last {LAST} evaluations",
    )
    sections.append(
        report.FigureSection(
            "Every condition",
            "Dots are seeds, the bar runs from the worst to the best, the hollow diamond is what "
            "was predicted. Predicted and found are compared by class: solved from "
            f"{SOLVED:g} up, failed below {FAILED:g}, partly between.",
            out / "conditions.png",
            alt="Scores of every condition, a row each, with predictions",
        )
    )
    told = [key for key in ("xqc", "wide-atoms") if outcome.has(key)]
    if told:
        panels = [
            plots.Panel(
                "Mean value of replayed actions, in normalized return",
                [_curve(outcome, key, "q") for key in told],
            ),
            plots.Panel(
                "What rewards are divided by",
                [_curve(outcome, key, "reward_scale") for key in told],
            ),
        ]
        plots.learning_curves(
            panels,
            out / "values.png",
            headline="Do the values meet the end of the atoms?",
            best=None,
            each_seed=True,
            band=False,
            same_scale=False,
            y_label="Mean over the updates since the last evaluation",
        )
        sections.append(
            report.FigureSection(
                "Values and the scale of rewards",
                "XQC's atoms end at 5. The scale is the standard deviation of the discounted "
                "returns so far.",
                out / "values.png",
                alt="Mean Q and reward scale of XQC during training",
            )
        )
    report.write_report(
        out / "report.html", study, sections, explanation(study),
        title="XQC on pendulum-swingup, one switch at a time",
    )  # fmt: skip


def _curve(outcome: Outcome[Condition], key: str, name: str = "return") -> plots.Curve:
    steps, values = outcome.curve(key, name)
    style = "-" if key in ("sac", "xqc") else "--"
    return plots.Curve(_SHORT[key], steps, values, _COLORS[key], style)


def explanation(study: dict[str, Any]) -> str:
    """The question in a minute, as HTML; its last paragraph follows the measured verdicts."""
    verdict = {claim["id"]: claim["verdict"] for claim in study["claims"]}
    cured = [
        id_.removeprefix("S2-")
        for id_, found in verdict.items()
        if id_.startswith("S2-") and found == "supported"
    ]
    result = {
        "supported": "<p><strong>Here XQC failed too.</strong> "
        + (f"Cured by: {', '.join(cured)}." if cured else "No switch that was run cured it.")
        + "</p>",
        "refuted": "<p><strong>Here XQC did not fail.</strong> Scaled down, it swings the pendulum "
        "up as SAC does, so there is nothing to cure; what the paper's larger networks or "
        "its way to repeat actions do is not settled by this.</p>",
    }.get(
        verdict["S1"],
        "<p><strong>This run does not settle it</strong>: see S1 below for what was found.</p>",
    )
    return (
        "<p>A pole hangs from a hinge, and the motor is too weak to lift it at once: it has to "
        "swing. The reward is 1 within 8 degrees of upright and 0 everywhere else, so at first "
        "there is almost nothing to learn from. XQC beats SAC on most tasks and loses badly on "
        "this one.</p>"
        "<p>XQC and SAC differ in a dozen ways. Here each is undone alone: batch norm, weights of "
        "length 1, the classified return with its scaled rewards, two updates per step, a "
        "delayed actor, a small temperature.</p>" + result
    )
