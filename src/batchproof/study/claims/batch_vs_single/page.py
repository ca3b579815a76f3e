"""The report of the study and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from batchproof.study import plots, report
from batchproof.study.claims.batch_vs_single.conditions import (
    FAILED,
    LEARNED,
    SIZES,
    SYNC_SIZES,
    TD_PLANS,
    WAYS,
)
from batchproof.study.claims.batch_vs_single.training import Trained


def render(
    found: dict[str, Any], cells: dict[str, Trained], study: dict[str, Any], out: Path
) -> None:
    """Draw the pictures and write ``report.html`` into ``out``."""
    _gap_picture(found, out / "gap.png")
    _acting_picture(found, out / "acting.png")
    _td_picture(found, out / "td.png")
    _curves_picture(cells, out / "curves.png")
    _conditions_picture(study, out / "conditions.png")
    figures = [
        report.FigureSection(
            "One state, in a batch and alone",
            "The gap of an action in [-1, 1] between a train-mode batch of N rows and the "
            "statistics of all visited states, mean over seeds and each seed. Two processes that "
            "share their statistics lie on the same line: SyncBN is a larger N.",
            out / "gap.png",
            alt="Gap of the action against the batch size, both logarithmic",
        ),
        report.FigureSection(
            "The same actors, acting in other modes",
            "Actors trained with batch norm, acting in E: what becomes of their return and of the "
            "states that they visit when they act by the statistics of a batch of environments "
            "(T), or with the layers skipped (B). A dot is a seed.",
            out / "acting.png",
            alt="Return and shift of the state distribution by mode and batch size",
        ),
        report.FigureSection(
            "The TD error",
            "How far normalization moves the mean TD error, in units of return, split into the "
            "target's, the current value's and the next action's part.",
            out / "td.png",
            alt="Mean TD bias by mode and by part",
        ),
        report.FigureSection(
            "Learning",
            "Return of the policy deployed alone in E: mean over seeds, and from the worst to the "
            "best.",
            out / "curves.png",
            alt="Learning curves of every condition",
        ),
        report.FigureSection(
            "Every condition",
            "Dots are seeds; the hollow diamond is what was predicted before the run. A "
            f"prediction is missed when it names another class: learned from {LEARNED:g} up, "
            f"failed below {FAILED:g}.",
            out / "conditions.png",
            alt="Final returns of every condition with predictions",
        ),
    ]
    report.write_report(
        out / "report.html", study, figures, explanation(study),
        title="Alone and in a batch",
    )  # fmt: skip


def explanation(study: dict[str, Any]) -> str:
    """The answer in a minute, as HTML."""
    words = ", ".join(f"{claim['id']} {claim['verdict']}" for claim in study["claims"])
    return (
        "<p>Batch norm in train mode normalizes a state by the states beside it. Alone it has no "
        "company, so the same state with the same weights acts differently: in a batch of N the "
        "statistics carry noise of about 1/sqrt(N), and alone the input is its own mean and "
        "nothing of it is left.</p>"
        "<p>In eval mode the running statistics stand in for the company, and a state acts the "
        "same alone and in a batch. Skipping the layer for a single state, as the notebook does, "
        "is a third thing: another network than the one that was trained.</p>"
        "<p>SyncBN shares the batch between processes, which makes N larger; layer norm looks at "
        "one state only and has no gap.</p>"
        f"<p><strong>Verdicts:</strong> {words}.</p>"
    )


def _figure(width: float, height: float, columns: int = 1) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=12)
        one.grid(axis="y", color="#e4e4e4")
        one.set_axisbelow(True)
    return figure, axes


def _gap_picture(found: dict[str, Any], path: Path) -> None:
    figure, (axes,) = _figure(9, 6)
    gaps = np.array([found[f"gap {size}"] for size in SIZES]).T
    for one in gaps:
        axes.loglog(SIZES, one, color=plots.BLUE, alpha=0.3, linewidth=0.8)
    axes.loglog(SIZES, gaps.mean(0), "o-", color=plots.BLUE, linewidth=2.5, label="batch norm in T")
    line = gaps.mean(0)[-1] * (np.array(SIZES) / SIZES[-1]) ** -0.5
    axes.loglog(SIZES, line, "--", color=plots.BLACK, label="slope of 1/sqrt(N)")
    from_e = [np.mean(found[f"gap from E {size}"]) for size in SIZES]
    axes.loglog(SIZES, from_e, ":", color=plots.GREY, linewidth=2, label="the same, against E")
    if f"sync {SYNC_SIZES[0]}" in found:
        synced = [np.mean(found[f"sync {size}"]) for size in SYNC_SIZES]
        axes.loglog(
            SYNC_SIZES, synced, "D", color=plots.VERMILLION, markersize=10, markerfacecolor="none",
            markeredgewidth=2, label="two processes with shared statistics, N in both",
        )  # fmt: skip
    axes.loglog(
        SIZES, [np.max(found["layer float32"])] * len(SIZES), color=plots.PALETTE[2],
        linewidth=2.5, label="layer norm (rounding)",
    )  # fmt: skip
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.minorticks_off()
    axes.set_xlabel("rows N in the batch", fontsize=13)
    axes.set_ylabel("mean gap of an action in [\u22121, 1]", fontsize=13)
    axes.set_title("The gap shrinks with N; it does not go away", loc="left", weight="bold")
    axes.legend(fontsize=11, frameon=False)
    plots.save(figure, path)


def _acting_picture(found: dict[str, Any], path: Path) -> None:
    figure, axes = _figure(12, 5.2, 2)
    labels = ["E", "T, 1", "T, 2", "T, 8", "T, 32", "B"]
    panels = (("return", "return per episode"), ("shift", "shift of visited states, in sd"))
    for one, (kind, name) in zip(axes, panels, strict=True):
        for i, way in enumerate(WAYS):
            values = np.asarray(found[f"{kind} {way}"])
            color = plots.BLUE if way == "E" else plots.VERMILLION
            fan = i + 0.05 * (np.arange(len(values)) % 5 - 2)
            one.plot(fan, values, "o", color=color, alpha=0.5, markersize=6, markeredgewidth=0)
            one.plot([i - 0.28, i + 0.28], [values.mean()] * 2, color=color, linewidth=3)
        one.set_xticks(range(len(labels)), labels)
        one.set_ylabel(name, fontsize=13)
        one.set_xlabel("mode of slot 0, environments in the batch", fontsize=13)
    axes[0].set_title("Trained actors, acting in another mode", loc="left", weight="bold")
    plots.save(figure, path)


def _td_picture(found: dict[str, Any], path: Path) -> None:
    figure, (axes,) = _figure(10, 5.2)
    parts = {"target": "target Q (slot 5)", "current": "Q(s, a) (slot 4)", "action": "next action"}
    # BTB is off any scale that shows the others.
    drawn = {letters: words for letters, words in TD_PLANS.items() if "B" not in letters}
    for j, (part, label) in enumerate(parts.items()):
        for i, letters in enumerate(drawn):
            values = np.asarray(found[f"td {letters} {part}"])
            x = i + 0.25 * (j - 1)
            color = plots.PALETTE[j]
            axes.bar(x, values.mean(), 0.22, color=color, label=None if i else label)
            axes.plot([x] * len(values), values, ".", color=plots.BLACK, alpha=0.5)
    axes.axhline(0, color=plots.BLACK, linewidth=0.8)
    axes.set_xticks(range(len(drawn)), [f"{k}\n{v}" for k, v in drawn.items()])
    axes.set_ylabel("mean TD bias, in units of return", fontsize=13)
    axes.set_title(
        "How normalization moves the TD error, at fixed weights", loc="left", weight="bold"
    )
    axes.legend(fontsize=11, frameon=False)
    plots.save(figure, path)


_PANELS = (
    (
        "By how the actor normalized while it collected its data",
        ("act-E", "act-T", "act-T-2", "act-T-32", "act-T-1", "act-B"),
    ),
    ("By norm", ("act-E", "layer", "none")),
)


def _curves_picture(cells: dict[str, Trained], path: Path) -> None:
    panels = []
    for title, keys in _PANELS:
        shown = [cells[key] for key in keys if key in cells]
        curves = [
            plots.Curve(cell.condition.label, cell.steps, cell.returns, color)
            for cell, color in zip(shown, plots.PALETTE, strict=False)
        ]
        panels.append(plots.Panel(title, curves))
    headline = "DDPG on Pendulum-v1, deployed alone in E"
    plots.learning_curves(panels, path, headline=headline, best=None, columns=1)


def _conditions_picture(study: dict[str, Any], path: Path) -> None:
    rows = [
        plots.ForestRow(
            row["label"],
            {"DDPG": row["returns"]},
            {"DDPG": float(row["prediction"]) if row["prediction"] else None},
            detail=row["name"],
            missed=frozenset({"DDPG"} if row["missed"] else ()),
        )
        for row in study["conditions"]
    ]
    plots.condition_table_plot(rows, path, headline="Every condition", best=None)
