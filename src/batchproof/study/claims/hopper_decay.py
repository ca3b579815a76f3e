"""hopper-decay: why CrossQ gets worse on Hopper after 300k steps, and which switch cures it.

CrossQ (arXiv 1902.05605) is at 2764 +- 823 on Hopper after 100k steps and at 2467 +- 988 after a
million, while SAC rises to 2787 and XQC to 3745. CrossQ+WN (arXiv 2502.07523) puts such decay down
to weights that grow, and with them the effective learning rate that falls, and adds projected
weights and a target network. This file starts from CrossQ and turns one switch at a time;
conditions, predictions and decision rules were written before the runs.

Decay is measured in each seed, on deterministic episodes: its best mean over a window of 50k steps
minus its mean over the last 50k. It is never negative, and noise alone makes it positive, so
conditions are compared with each other and CrossQ with SAC. What noise does not move is the fall
from a window that was named beforehand, that around 100k steps, to the last.

A verdict needs runs of 300k steps and more. On two cores that is hours: the default is a run of
minutes that shows the study working and leaves every claim open. Longer runs continue where they
were stopped.

Beside the returns stands how long the critics' weights are, at every evaluation: what is blamed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.lab.agents import crossq, sac
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.study import plots, report
from batchproof.study.conditions import Outcome, choose, write_outcome
from batchproof.study.judging import Finding, Judge, verdict_above, words
from batchproof.study.statistics import difference_interval, mean_interval
from batchproof.study.study import Cell, run_cells

NAME = "hopper-decay"
SOURCE = "returns of CrossQ on Hopper (arXiv 1902.05605, 2502.07523)"
ENV = "Hopper-v5"
SEEDS = 2  # of the default run; a verdict needs five
STEPS = 6000
FULL_STEPS = 500_000
WIDTH = 256  # of the critics' two layers; the paper's is 2048
EVAL_EVERY = 5000
WINDOW = 50_000  # environment steps
EARLY = 100_000  # middle of the window that the fall is measured from

# Decision rules, in units of return.
FEWEST_STEPS = 300_000  # shorter runs give no verdict
MARGIN = 200.0  # what counts as decay, and as a difference in it


@dataclass(frozen=True)
class Condition:
    """SAC, CrossQ, or CrossQ with one difference.

    Attributes:
        key: its name.
        label: what a reader sees.
        config: the agent's configuration; its critics get the width of the run.
        predicted: decay in units of return after `FULL_STEPS`.
    """

    key: str
    label: str
    config: sac.Config | crossq.Config
    predicted: float

    @property
    def algo(self) -> str:
        """The agent's name."""
        return type(self.config).__module__.rsplit(".", 1)[-1]


def _crossq(norm: Norm = crossq.RENORM, project: str = "none", **changes: Any) -> crossq.Config:
    mlp = MLP((256, 256), norm, project=project)
    return crossq.Config(actor=mlp, critic=mlp, **changes)


BATCH = Norm("batch", "input+post", momentum=0.01, eps=1e-3, running_variance="biased")
LAYER = Norm("layer", "input+post")

CONDITIONS = (
    Condition("crossq", "CrossQ", _crossq(), 800.0),
    Condition("sac", "SAC", sac.Config(), 300.0),
    Condition("projected", "CrossQ with projected weights", _crossq(project="hidden"), 300.0),
    Condition("target", "CrossQ with a target network", _crossq(target_network=True), 800.0),
    Condition("batch", "CrossQ with batch norm, not Batch Renorm", _crossq(BATCH), 800.0),
    Condition("layer", "CrossQ with layer norm", _crossq(LAYER), 800.0),
    Condition(
        "slow", "CrossQ with momentum 0.001", _crossq(replace(crossq.RENORM, momentum=0.001)), 800.0
    ),
    Condition(
        "falling", "CrossQ with a falling learning rate",
        _crossq(learning_rate_end=1e-4, schedule_steps=FULL_STEPS), 300.0,
    ),
    Condition(
        "b1", "CrossQ with Adam's own b1 of 0.9", _crossq(adam_b1=0.9), 800.0
    ),
    Condition(
        "wn", "projected weights and a target network",
        _crossq(project="hidden", target_network=True), 300.0,
    ),
)  # fmt: skip
SWITCHES = tuple(c.key for c in CONDITIONS if c.key not in ("crossq", "sac"))
DEFAULT = ("crossq", "projected")


def run(
    out: Path,
    *,
    seeds: int | None = None,
    steps: int | None = None,
    quick: bool = False,
    conditions: str | None = None,
    width: int = WIDTH,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Run the study and write ``study.json``, ``report.html``, pictures and metrics into ``out``.

    Args:
        out: the study's folder.
        seeds: for each condition, default `SEEDS`; a verdict needs 5.
        steps: environment steps of each seed, default `STEPS`; a verdict needs `FEWEST_STEPS`.
        quick: half of the default steps.
        conditions: names from `CONDITIONS` with commas between, or ``all``; default `DEFAULT`.
        width: of the critics' two hidden layers.
        progress: show bars.
        command: what a user typed, for the record.

    Returns:
        The content of ``study.json``.
    """
    chosen = choose(CONDITIONS, DEFAULT, conditions)
    seeds = seeds if seeds is not None else SEEDS
    for name, value in (("seeds", seeds), ("width", width)):
        if value < 1:
            raise BatchproofError(f"{name} must be at least 1, got {value}")
    if steps is None:
        steps = STEPS // (2 if quick else 1)
    began = time.perf_counter()
    cells = [Cell(c.key, training(c, seeds, steps, width)) for c in chosen]
    with records.locked(out):
        outcome = Outcome(chosen, seeds, run_cells(cells, out, progress, command))
        study = write_outcome(
            NAME, out, outcome, judge(outcome), describe(outcome),
            steps=steps, began=began, command=command,
        )  # fmt: skip
        _render(outcome, study, out)
    return study


def training(condition: Condition, seeds: int, steps: int, width: int = WIDTH) -> Training:
    """One condition as a run of the lab."""
    config = condition.config
    critic = replace(config.critic, hidden=(width, width))
    return Training(
        algo=condition.algo,
        config=replace(config, critic=critic),
        env_id=ENV,
        seeds=tuple(range(seeds)),
        steps=steps,
        learning_starts=min(5000, steps // 2),
        eval_every=min(EVAL_EVERY, max(1, steps // 6)),
        eval_episodes=3,
    )


def decay(steps: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """Each seed's best window of `WINDOW` steps minus its last one, (seeds,), in units of return.

    A window is as many evaluations in a row as fit into `WINDOW`, at most a third of the run. A
    seed that diverged ends at 0.

    Args:
        steps: of the evaluations, (T,), evenly spread.
        returns: (seeds, T), NaN from where a seed diverged.
    """
    wide = max(1, min(int(WINDOW // steps[0]), len(steps) // 3))
    known = np.nan_to_num(returns, nan=0.0)
    windows = np.lib.stride_tricks.sliding_window_view(known, wide, axis=1).mean(-1)
    return np.asarray(windows.max(axis=1) - windows[:, -1])


def fall(steps: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """Each seed's mean over the `WINDOW` around `EARLY` minus that over the last, (seeds,).

    Negative where the return rose. A run that ends earlier has fallen by 0. Arguments are those of
    `decay`.
    """
    known = np.nan_to_num(returns, nan=0.0)
    early = (steps > EARLY - WINDOW / 2) & (steps <= EARLY + WINDOW / 2)
    if steps[-1] < EARLY + 1.5 * WINDOW:
        return np.zeros(len(known))
    late = steps > steps[-1] - WINDOW
    return np.asarray(known[:, early].mean(axis=1) - known[:, late].mean(axis=1))


def weight_lengths(outcome: Outcome[Condition], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) and the mean length of the critics' hidden units' weights, (seeds, T).

    NaN in cells that an earlier version trained, which did not measure it.
    """
    layers = [
        outcome.curve(key, name)
        for name in outcome.results[key].metrics
        if name.startswith("weight_length/critic/")
    ]
    steps, returns = outcome.curve(key)
    if not layers:
        return steps, np.full(returns.shape, np.nan)
    return steps, np.mean([values for _, values in layers], axis=0)


def describe(outcome: Outcome[Condition]) -> list[dict[str, Any]]:
    """The conditions of ``study.json``."""
    rows = []
    for c in outcome.conditions:
        steps, returns = outcome.curve(c.key)
        norm = c.config.critic.norm
        lost = decay(steps, returns)
        settled = steps[-1] >= FEWEST_STEPS
        lengths = weight_lengths(outcome, c.key)[1]
        rows.append(
            {
                "name": c.key,
                "label": c.label,
                "algo": c.algo,
                "norm": "none" if norm.kind == "none" else f"{norm.kind} {norm.placement}",
                "modes": str(c.config.plan) if norm.kind in ("batch", "renorm") else None,
                "returns": returns[:, -1].tolist(),
                "decay": lost.tolist(),
                "fall": fall(steps, returns).tolist(),
                "weight_growth": (lengths[:, -1] / lengths[:, 0]).tolist(),
                "prediction": f"decay {c.predicted:g}",
                "missed": _missed(c.predicted, lost) if settled else None,
                "diverged": outcome.diverged(c.key),
                "wall_s": outcome.results[c.key].wall_s,
            }
        )
    return rows


BORDER = 500.0  # decay above it is called decay, in predictions


def _missed(predicted: float, lost: np.ndarray) -> bool:
    """A prediction missed when it and the mean of the seeds lie on two sides of `BORDER`."""
    return bool((predicted > BORDER) != (lost.mean() > BORDER))


def judge(outcome: Outcome[Condition]) -> list[dict[str, Any]]:
    """Verdicts: does CrossQ decay, and which switch cures it."""
    judge = Judge(outcome, SOURCE)
    labels = {condition.key: condition.label for condition in CONDITIONS}

    def lost(key: str) -> np.ndarray:
        return decay(*outcome.curve(key))

    def long_enough(found: Finding) -> Finding:
        longest = max(int(result.metrics["step"].max()) for result in outcome.results.values())
        if longest >= FEWEST_STEPS:
            return found
        return found.open(f"No verdict before {FEWEST_STEPS} steps: this run has {longest}.")

    def decays() -> Finding:
        found, own = difference_interval(lost("crossq"), lost("sac")), mean_interval(lost("crossq"))
        why = f"Decay of CrossQ {words(own)}, of SAC {words(mean_interval(lost('sac')))}."
        return long_enough(Finding(verdict_above([found], MARGIN), found, why))

    def falls() -> Finding:
        found = mean_interval(fall(*outcome.curve("crossq")))
        why = f"Fall of CrossQ's return {words(found)}."
        if outcome.has("sac"):
            why += f" Of SAC's {words(mean_interval(fall(*outcome.curve('sac'))))}."
        return long_enough(Finding(verdict_above([found], MARGIN), found, why))

    def cures(key: str) -> Finding:
        found = difference_interval(lost("crossq"), lost(key))
        own = mean_interval(lost("crossq"))
        why = f"Decay {words(mean_interval(lost(key)))}, of CrossQ {words(own)}."
        if own.lo < MARGIN:
            why += f" CrossQ is not shown to decay by {MARGIN:g}."
            return long_enough(Finding("inconclusive", found, why))
        return long_enough(Finding(verdict_above([found], MARGIN), found, why))

    judge.claim(
        "H1",
        "CrossQ decays on Hopper, more than SAC does.",
        "decay of a seed is its best mean return over 50k steps minus that of its last 50k; "
        "supported when the 95 % interval of the difference in mean decay, CrossQ minus SAC, lies "
        f"above {MARGIN:g}; refuted when it lies below; open before {FEWEST_STEPS} steps",
        ("crossq", "sac"),
        decays,
    )
    judge.claim(
        "H3",
        "CrossQ's return on Hopper falls after 100k steps.",
        "mean return over the 50k steps around 100k minus that over the last 50k; supported when "
        f"its 95 % interval lies above {MARGIN:g}; refuted when it lies below; open before "
        f"{FEWEST_STEPS} steps",
        ("crossq",),
        falls,
    )
    for key in SWITCHES:
        judge.claim(
            f"H2-{key}",
            f"{labels[key][0].upper()}{labels[key][1:]}: less decay.",
            f"supported when CrossQ's own decay is above {MARGIN:g} and the 95 % interval of the "
            f"difference in mean decay lies above {MARGIN:g}; refuted when it lies below; open "
            f"before {FEWEST_STEPS} steps",
            ("crossq", key),
            lambda key=key: cures(key),  # type: ignore[misc]
        )
    return judge.claims


_COLORS = dict(zip((c.key for c in CONDITIONS), plots.PALETTE * 2, strict=False)) | {
    "crossq": plots.VERMILLION,
    "sac": plots.BLACK,
}
_SHORT = {
    "crossq": "CrossQ",
    "sac": "SAC",
    "projected": "projected",
    "target": "target network",
    "batch": "batch norm",
    "layer": "layer norm",
    "slow": "slow statistics",
    "falling": "falling rate",
    "b1": "b1 0.9",
    "wn": "projected, target",
}
_PANELS = (
    ("Beside SAC", ("sac",)),
    ("Weights and targets", ("projected", "target", "wn")),
    ("Norm", ("batch", "layer", "slow")),
    ("Optimizer", ("falling", "b1")),
)


def _render(outcome: Outcome[Condition], study: dict[str, Any], out: Path) -> None:
    first = ("crossq",) if outcome.has("crossq") else ()
    panels = [
        (title, (*first, *filter(outcome.has, keys)))
        for title, keys in _PANELS
        if any(map(outcome.has, keys))
    ] or [("CrossQ", first)]
    longest = max(int(result.metrics["step"].max()) for result in outcome.results.values())
    open_ = "" if longest >= FEWEST_STEPS else f" (too short for a verdict: {longest} steps)"
    plots.learning_curves(
        _drawn(panels, outcome.curve), out / "curves.png",
        headline=f"CrossQ on Hopper-v5{open_}", best=None,
    )  # fmt: skip
    plots.learning_curves(
        _drawn(panels, lambda key: weight_lengths(outcome, key)), out / "weights.png",
        headline="How long the critics' weights are", best=None,
        y_label="Length of a hidden unit's weights, mean over units and layers",
    )  # fmt: skip
    rows = [
        plots.ForestRow(c.label, {"decay": decay(*outcome.curve(c.key)).tolist()})
        for c in outcome.conditions
    ]
    plots.condition_table_plot(
        rows,
        out / "decay.png",
        headline=f"Decay on Hopper-v5{open_}",
        best=None,
        x_label="return: best window of 50k steps (of short runs, a third) minus the last",
    )
    sections = [
        report.FigureSection(
            "Learning curves",
            f"{outcome.seeds} seeds: mean over seeds with the band from the worst to the best.",
            out / "curves.png",
            alt="Learning curves of CrossQ on Hopper with one switch changed",
        ),
        report.FigureSection(
            "Decay",
            "For each seed its best mean over 50k steps minus its last one. Noise alone makes it "
            "positive.",
            out / "decay.png",
            alt="Decay of every condition, a row each",
        ),
        report.FigureSection(
            "Length of weights",
            "What is blamed. A norm cancels the length of a unit's weights, but the longer they "
            "are, the less a step of the optimizer turns them. SAC has no norm: there their length "
            "counts in what the network computes.",
            out / "weights.png",
            alt="Mean length of the critics' units' weights over training",
        ),
    ]
    report.write_report(
        out / "report.html", study, sections, explanation(study),
        title="Does CrossQ decay on Hopper, and what cures it?",
    )  # fmt: skip


def _drawn(
    panels: Iterable[tuple[str, Iterable[str]]],
    curve: Callable[[str], tuple[np.ndarray, np.ndarray]],
) -> list[plots.Panel]:
    """Panels of what ``curve`` gives of each condition's key."""
    return [
        plots.Panel(title, [plots.Curve(_SHORT[key], *curve(key), _COLORS[key]) for key in keys])
        for title, keys in panels
    ]


def explanation(study: dict[str, Any]) -> str:
    """The question in a minute, as HTML; its last paragraph follows the measured verdicts."""
    verdict = {claim["id"]: claim["verdict"] for claim in study["claims"]}
    cured = [
        _SHORT[id_.removeprefix("H2-")]
        for id_, found in verdict.items()
        if id_.startswith("H2-") and found == "supported"
    ]
    result = {
        "supported": "<p><strong>Here CrossQ decayed.</strong> "
        + (f"Less decay with: {', '.join(cured)}." if cured else "No switch that was run cured it.")
        + "</p>",
        "refuted": "<p><strong>Here CrossQ did not decay more than SAC.</strong></p>",
    }.get(
        verdict["H1"],
        "<p><strong>This run does not settle whether CrossQ decays more than SAC</strong>: that "
        f"takes five seeds of both, {FEWEST_STEPS} steps and hours. The command continues where "
        "it was stopped.</p>",
    )
    # What CrossQ's own return did does not wait for SAC.
    result += "".join(
        f"<p>From 100k steps to the end: {claim['why']} Below 0 it rose. "
        f"That it falls is {claim['verdict']}.</p>"
        for claim in study["claims"]
        if claim["id"] == "H3" and claim["ci"] is not None
    )
    return (
        "<p>In its paper CrossQ learns Hopper fast, in 100k steps, and then gets slowly worse, "
        "while slower agents pass it. Its networks have batch norm, so the length of their weights "
        "does not change what they compute, but it sets how far a step of the optimizer turns "
        "them: weights that grow learn ever less.</p>"
        "<p>Here one part of CrossQ is changed at a time: weights projected to length 1, a target "
        "network, another norm, slower statistics, another optimizer.</p>" + _growth(study) + result
    )


def _growth(study: dict[str, Any]) -> str:
    """How far the weights grew, as HTML."""
    parts = []
    for c in study["conditions"]:
        known = [x for x in c["weight_growth"] if x is not None and np.isfinite(x)]
        parts += [f"{_SHORT[c['name']]} {np.mean(known):.3g}"] if known else []
    return f"<p>From the first evaluation to the last weights grew by: {', '.join(parts)}.</p>"
