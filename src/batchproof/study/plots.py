"""The pictures of a study: arrays in, PNG (or SVG) out.

Every function draws on a `matplotlib.figure.Figure` of its own, never through pyplot, so that
drawing changes no global state and needs no display. Matplotlib is imported inside the functions:
the rest of the package works without it. Sizes are in inches; at the default 200 dots per inch a
picture is 2400 pixels wide, which stays sharp at a page width of 1200.

Colours are from the palette of Okabe and Ito, which people with any common colour blindness can
tell apart; every line carries its name beside it, so that none needs a legend.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from batchproof.records import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

BLACK, GREY, BLUE, VERMILLION = "#1b1b1b", "#6b6b6b", "#0072b2", "#d55e00"
GREEN, ORANGE, PINK, SKY = "#009e73", "#e69f00", "#cc79a7", "#56b4e9"
PALETTE = (BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, BLACK)

_WIDTH = 12.0
_DPI = 200
_MISSED = "#c1272d"
_RULE, _GRID, _STRIPE = "#b5b5b5", "#ebebeb", "#f6f6f6"
_HEADLINE, _TITLE, _TEXT, _SMALL = 20.0, 16.0, 13.0, 12.0
_LINE = 1.22 / 72.0  # height of a line of text in inches, for each point of its size


@dataclass(frozen=True)
class Curve:
    """One condition over training.

    Attributes:
        label: the name drawn beside the line.
        steps: environment steps, shape (T,).
        values: shape (n_seeds, T), in the unit of the axis. NaN from where a seed diverged.
        color: any Matplotlib colour.
        style: Matplotlib line style; differ it where two lines may lie on each other.
    """

    label: str
    steps: NDArray[Any]
    values: NDArray[Any]
    color: str = BLUE
    style: str = "-"

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit together."""
        steps, values = np.asarray(self.steps), np.asarray(self.values)
        if steps.ndim != 1 or values.ndim != 2 or values.shape[1] != steps.size:
            raise ValueError(
                f"curve {self.label!r}: steps must be (T,) and values (n_seeds, T), "
                f"not {steps.shape} and {values.shape}"
            )
        if values.size == 0:
            raise ValueError(f"curve {self.label!r} has no values")
        if not np.isfinite(steps).all():
            raise ValueError(f"curve {self.label!r}: steps must be finite")


@dataclass(frozen=True)
class Panel:
    """One set of axes: a title and the curves in it, drawn in order (the last one on top)."""

    title: str
    curves: Sequence[Curve]


@dataclass(frozen=True)
class AgentAnswer:
    """One row of `answer_picture`.

    Attributes:
        name: the agent's, such as "TD3".
        returns: learning curves, deterministic return per episode.
        kappa: |sum_i dQ/da_i| / sum_i |dQ/da_i| of the actor's loss during training, in [0, 1], NaN
            where it is undefined; its curves may carry shorter labels than those of `returns`.
    """

    name: str
    returns: Sequence[Curve]
    kappa: Sequence[Curve]


@dataclass(frozen=True)
class ForestRow:
    """One condition of `condition_table_plot`.

    Attributes:
        label: the condition in words.
        detail: short technical name under it, such as the mode plan "TETTE".
        returns: agent -> final returns, one per seed; None or NaN for a diverged seed. An agent
            that did not run this condition is left out.
        prediction: agent -> the return predicted before the run; left out or None where nothing
            was predicted.
        missed: agents whose prediction failed, as the study's decision rule has it.
    """

    label: str
    returns: Mapping[str, Sequence[float | None]]
    prediction: Mapping[str, float | None] = field(default_factory=dict)
    detail: str = ""
    missed: frozenset[str] = frozenset()


def learning_curves(
    panels: Sequence[Panel],
    path: str | Path,
    *,
    headline: str = "",
    best: float | None = 30.0,
    each_seed: bool = False,
    band: bool = True,
    y_label: str = "Return per episode of the deterministic policy",
    columns: int = 2,
    same_scale: bool = True,
    dpi: int = _DPI,
) -> Figure:
    """Learning curves: each condition's mean over seeds and band from lowest to highest seed.

    Mean and band are over the seeds that are finite at that step; a label says how many diverged.

    Args:
        panels: drawn left to right, top to bottom.
        path: where to write; the suffix (.png, .svg, .pdf) decides the format.
        headline: one sentence on top that says what the picture shows.
        best: the best possible return, a dashed reference line; None for no line.
        each_seed: also draw each seed as a thin line.
        band: draw the band; without it many seeds that end far apart stay visible.
        y_label: what y is, with its unit.
        columns: at most this many panels side by side.
        same_scale: whether all panels share the limits of y.
        dpi: dots per inch of a PNG.

    Returns:
        The figure that was written.

    Raises:
        ValueError: no panels, a panel without curves, or `columns` below 1.
    """
    if not panels or any(not panel.curves for panel in panels):
        raise ValueError("learning_curves needs at least one panel, each with at least one curve")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure()
    panels = [Panel(panel.title, _counted(panel.curves)) for panel in panels]
    most = min(3.6, 4.5 / columns)
    gutter = max(_gutter(figure, panel.curves, most) for panel in panels)
    left, right = 0.75, 0.15
    width = (_WIDTH - right) / columns - left - gutter
    room = left + width + gutter - 0.45
    titles = [_wrap(figure, panel.title, room, _TITLE, "bold") for panel in panels]
    unit = _wrap(figure, y_label, room, _SMALL)
    title_height = 0.07 + max(_height(text, _TITLE) for text in titles)
    head = title_height + _height(unit, _SMALL) + 0.14
    cell = head + 3.42
    top = _header(figure, headline, "") if headline else 0.25
    figure.set_size_inches(_WIDTH, top + rows * cell + 0.45)
    together = _limits([c.values for p in panels for c in p.curves], best)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        x = left + column * (left + width + gutter)
        y = top + row * cell
        _say(figure, x - 0.5, y, titles[index], _TITLE, BLACK, weight="bold")
        _say(figure, x - 0.5, y + title_height, unit, _SMALL, GREY)
        axes = _axes(figure, x, y + head, width, 2.68)
        alone = _limits([c.values for c in panel.curves], best)
        axes.set_ylim(*(together if same_scale else alone))
        if best is not None:
            _best_line(axes, best)
        _curves(axes, panel.curves, gutter, each_seed, band)
        _step_axis(axes, panel.curves)
    parts = ["Line: mean over seeds"]
    parts += ["band: lowest to highest seed"] * band + ["thin line: one seed"] * each_seed
    note = "; ".join(parts) + "."
    _say(figure, left - 0.5, top + rows * cell, note, _SMALL, GREY)
    save(figure, path, dpi)
    return figure


def answer_picture(
    agents: Sequence[AgentAnswer],
    path: str | Path,
    *,
    headline: str,
    subtitle: str = "",
    best: float | None = 30.0,
    rounding: float = 1e-6,
    kappa_floor: float = 1e-9,
    dpi: int = _DPI,
) -> Figure:
    """The study in one picture: what each agent learns, beside the gradient that explains it.

    One row per agent. Left: learning curves. Right: kappa on a logarithmic axis, where everything
    below `rounding` is shaded and named "zero to rounding".

    Args:
        agents: one row each, usually TD3 and SAC.
        path: where to write; the suffix decides the format.
        headline: the answer in one sentence, for a reader who knows nothing of the study.
        subtitle: what was run, in a sentence or two.
        best: the best possible return, a dashed line; None for no line.
        rounding: kappa below this is zero to rounding in float32, where sums over a batch of 256
            are off by about 1e-7.
        kappa_floor: the bottom of the axis; smaller values, 0 included, are drawn there.
        dpi: dots per inch of a PNG.

    Returns:
        The figure that was written.

    Raises:
        ValueError: no agents, an agent without curves, or not 0 < kappa_floor < rounding < 1.
    """
    if not agents or any(not agent.returns or not agent.kappa for agent in agents):
        raise ValueError("answer_picture needs at least one agent, each with returns and kappa")
    if not 0.0 < kappa_floor < rounding < 1.0:
        raise ValueError("answer_picture needs 0 < kappa_floor < rounding < 1")
    figure = _figure()
    left, between, right, cell = 0.75, 0.75, 0.15, 3.55
    agents = [AgentAnswer(a.name, _counted(a.returns), a.kappa) for a in agents]
    gutters = (
        max(_gutter(figure, agent.returns, 2.25) for agent in agents),
        max(_gutter(figure, agent.kappa, 2.25) for agent in agents),
    )
    width = (_WIDTH - left - between - right - sum(gutters)) / 2
    starts = (left, left + width + gutters[0] + between)
    top = _header(figure, headline, subtitle)
    column_titles = (
        ("What is learned", "return per episode of the deterministic policy"),
        ("What the actor is told", "κ: share of its gradient common to the whole batch"),
    )
    for x, (title, unit) in zip(starts, column_titles, strict=True):
        _say(figure, x - 0.5, top, title, _TITLE, BLACK, weight="bold")
        _say(figure, x - 0.5, top + 0.34, unit, _SMALL, GREY)
    top += 0.75
    figure.set_size_inches(_WIDTH, top + len(agents) * cell + 0.35)
    limits = _limits([c.values for a in agents for c in a.returns], best)
    for row, agent in enumerate(agents):
        y = top + row * cell
        for x in starts:
            _say(figure, x, y, agent.name, _TITLE, BLACK, weight="bold")
        axes = _axes(figure, starts[0], y + 0.36, width, cell - 1.15)
        axes.set_ylim(*limits)
        if best is not None:
            _best_line(axes, best)
        _curves(axes, agent.returns, gutters[0])
        _step_axis(axes, agent.returns)

        axes = _axes(figure, starts[1], y + 0.36, width, cell - 1.15)
        _kappa_axis(axes, rounding, kappa_floor)
        clipped = [replace(c, values=np.maximum(c.values, kappa_floor)) for c in agent.kappa]
        _curves(axes, clipped, gutters[1])
        _step_axis(axes, clipped)
    note = "Line: mean over seeds; band: lowest to highest seed."
    _say(figure, left - 0.5, top + len(agents) * cell - 0.05, note, _SMALL, GREY)
    save(figure, path, dpi)
    return figure


def condition_table_plot(
    rows: Sequence[ForestRow],
    path: str | Path,
    *,
    headline: str = "",
    best: float | None = 30.0,
    x_label: str = "final return of the deterministic policy",
    dpi: int = _DPI,
) -> Figure:
    """Every condition in a line: a dot per seed, their mean and range, and what was predicted.

    One column of axes per agent, in the order in which the rows first name them, all on one scale.
    At the right of each stands the mean. A missed prediction is red, with the word under the mean.

    Args:
        rows: one per condition, top to bottom.
        path: where to write; the suffix decides the format.
        headline: one sentence on top that says what the picture shows.
        best: the best possible return, a dashed line; None for no line.
        x_label: what x is, with its unit.
        dpi: dots per inch of a PNG.

    Returns:
        The figure that was written.

    Raises:
        ValueError: no rows, or rows in which no agent ran.
    """
    agents = list(dict.fromkeys(agent for row in rows for agent in row.returns))
    if not rows or not agents:
        raise ValueError("condition_table_plot needs at least one row with the returns of an agent")
    figure = _figure()
    labels = [_wrap(figure, row.label, 3.4, _TEXT) for row in rows]
    lines = max(label.count("\n") + 1 for label in labels)
    lines += any(row.detail for row in rows)
    pitch = max(0.46, 0.13 + 0.2 * lines)
    left = 0.45 + max(
        _width(figure, text, _TEXT)
        for row, label in zip(rows, labels, strict=True)
        for text in (label, row.detail)
    )
    number, right = 1.15, 0.05
    width = (_WIDTH - left - right) / len(agents) - number
    top = _header(figure, headline, "") if headline else 0.25
    height = pitch * len(rows)
    unit = _wrap(figure, x_label, width + number - 0.2, _SMALL)
    foot = 0.46 + _height(unit, _SMALL)
    figure.set_size_inches(_WIDTH, top + height + foot + 0.84)
    drawn = [_numbers(values) for row in rows for values in row.returns.values()]
    drawn += [_numbers(list(row.prediction.values())) for row in rows]
    limits = _limits(drawn, best)
    for column, agent in enumerate(agents):
        x = left + column * (width + number)
        _say(figure, x, top, agent, _TITLE, BLACK, weight="bold")
        _say(figure, x + width + 0.16, top + 0.05, "mean", _SMALL, GREY)
        axes = _axes(figure, x, top + 0.4, width, height)
        axes.set_xlim(*limits)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=_GRID, linewidth=1.0)
        _round_ticks(axes.xaxis)
        axes.set_xlabel(unit, fontsize=_SMALL, color=GREY, loc="left")
        if best is not None:
            axes.axvline(best, color=GREY, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1.5)
            axes.annotate(
                f"best {_short(best)}",
                (best, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 5),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=_SMALL,
                color=GREY,
            )
        for index, row in enumerate(rows):
            _forest_row(axes, index, row, agent, column)
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        block = _height(label, _TEXT) + (_height(row.detail, _SMALL) if row.detail else 0.0)
        y = top + 0.4 + pitch * (index + 0.5) - block / 2
        _say(figure, 0.25, y, label, _TEXT, BLACK)
        if row.detail:
            _say(
                figure,
                0.25,
                y + _height(label, _TEXT),
                row.detail,
                _SMALL,
                GREY,
                family="monospace",
            )
        if index % 2 == 0:
            _stripe(figure, top + 0.4 + pitch * index, pitch)
    _forest_key(figure, top + 0.4 + height + foot, rows)
    save(figure, path, dpi)
    return figure


# --- what the pictures share ---


def _figure() -> Figure:
    """An empty white figure with its own canvas, 12 inches wide; the caller sets its height."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 1.0), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path, dpi: int | None = None) -> None:
    """Write a figure in one move, a PNG with few colours; ``dpi`` is the figure's own unless given.

    Raises:
        BatchproofError: it cannot be written.
    """
    from PIL import Image  # comes with matplotlib

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    if path.suffix == ".png":
        figure.savefig(drawn, dpi=dpi or "figure", facecolor="white")
        # 256 colours are plenty for a chart and make the file a third as large.
        small = Image.open(drawn).convert("RGB").quantize(256)
        drawn = io.BytesIO()
        small.save(drawn, "png", optimize=True)
    else:
        figure.savefig(drawn, format=path.suffix[1:], facecolor="white")
    with replacing(path) as file:
        file.write(drawn.getvalue())


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Bare axes at a place in inches from the figure's upper left corner."""
    total = figure.get_figheight()
    axes = figure.add_axes(
        (left / _WIDTH, 1.0 - (top + height) / total, width / _WIDTH, height / total)
    )
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_RULE)
    axes.tick_params(colors=GREY, labelsize=_SMALL, length=0, pad=6)
    axes.grid(axis="y", color=_GRID, linewidth=1.0)
    axes.set_axisbelow(True)
    return axes


def _inches(figure: Figure) -> Transform:
    """Inches from the figure's upper left corner, y negative downwards, whatever its height."""
    from matplotlib.transforms import ScaledTranslation

    page: Any = figure.transFigure  # affine, though declared as any transform
    return figure.dpi_scale_trans + ScaledTranslation(0.0, 1.0, page)


def _say(
    figure: Figure, x: float, y: float, text: str, size: float, color: str, **style: Any
) -> None:
    """Text whose upper left corner lies `x`, `y` inches from that of the figure."""
    figure.text(
        x,
        -y,
        text.replace("$", r"\$"),
        transform=_inches(figure),
        fontsize=size,
        color=color,
        va="top",
        ha="left",
        linespacing=1.22,
        **style,
    )


def _header(figure: Figure, headline: str, subtitle: str) -> float:
    """Write the headline and what is under it; return where they end, in inches from the top."""
    y = 0.25
    for text, size, color, weight in (
        (headline, _HEADLINE, BLACK, "bold"),
        (subtitle, _TEXT, GREY, "normal"),
    ):
        if text:
            wrapped = _wrap(figure, text, _WIDTH - 0.5, size, weight)
            _say(figure, 0.25, y, wrapped, size, color, weight=weight)
            y += _height(wrapped, size) + 0.1
    return y + 0.22


def _width(figure: Figure, text: str, size: float, weight: str = "normal") -> float:
    """Width in inches of the longest line of `text`."""
    from matplotlib.text import Text

    canvas: Any = figure.canvas
    probe = Text(0, 0, text.replace("$", r"\$"), fontsize=size, fontweight=weight, figure=figure)
    return float(probe.get_window_extent(canvas.get_renderer()).width / figure.dpi)


def _height(text: str, size: float) -> float:
    """Height in inches of the lines of `text`."""
    return (text.count("\n") + 1) * size * _LINE


def _wrap(figure: Figure, text: str, width: float, size: float, weight: str = "normal") -> str:
    """`text` with line breaks added, so that no line of several words exceeds `width` inches."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if line and _width(figure, longer, size, weight) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return "\n".join(lines)


def _gutter(figure: Figure, curves: Sequence[Curve], most: float) -> float:
    """Inches to leave at the right of the axes for the labels of the curves, `most` at the most."""
    widths = [_width(figure, _wrap(figure, c.label, most - 0.4, _TEXT), _TEXT) for c in curves]
    return max(widths) + 0.4


def _counted(curves: Sequence[Curve]) -> list[Curve]:
    """The same curves, where the label of one with diverged seeds says how many."""
    counted = []
    for curve in curves:
        ends = np.asarray(curve.values, dtype=float)[:, -1]
        lost = int((~np.isfinite(ends)).sum())
        label = f"{curve.label}\n({lost} of {ends.size} diverged)" if lost else curve.label
        counted.append(replace(curve, label=label))
    return counted


def _numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    """As float64, with NaN for None and for infinities."""
    array = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _limits(drawn: Sequence[NDArray[Any]], best: float | None) -> tuple[float, float]:
    """Limits that hold every finite number and `best`, with some air."""
    finite = [np.asarray(values, dtype=float).ravel() for values in drawn]
    finite = [values[np.isfinite(values)] for values in finite]
    every = np.concatenate([*finite, [] if best is None else [best]])
    if every.size == 0:
        return -1.0, 1.0
    low, high = float(every.min()), float(every.max())
    air = 0.07 * (high - low) or 1.0
    return low - air, high + air


def _short(value: float) -> str:
    """A number for an axis or a margin: 30, 12.4, 0.031, 12,893; a true minus sign."""
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 1 else 3
    text = f"{value:,.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text.replace("-", "\N{MINUS SIGN}")


def _round_ticks(axis: Axis, count: int = 6) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _best_line(axes: Axes, best: float) -> None:
    axes.axhline(best, color=GREY, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1.5)
    axes.annotate(
        f"best {_short(best)}",
        (0.0, best),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        ha="left",
        va="bottom",
        fontsize=_SMALL,
        color=GREY,
    )


def _step_axis(axes: Axes, curves: Sequence[Curve]) -> None:
    steps = np.concatenate([np.asarray(curve.steps, dtype=float) for curve in curves])
    low, high = float(steps.min()), float(steps.max())
    axes.set_xlim(min(low, 0.0) if low < 0.25 * high else low, high if high > low else low + 1.0)
    axes.set_xlabel("environment steps", fontsize=_SMALL, color=GREY, loc="left")


def _kappa_axis(axes: Axes, rounding: float, floor: float) -> None:
    """A logarithmic axis from `floor` to 1; the part that is only rounding is shaded and named."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(floor, 4.0)
    lowest = math.ceil(math.log10(floor) - 1e-9)
    powers = [p for p in range(0, lowest - 1, -1) if p % 2 == 0]
    axes.yaxis.set_major_locator(FixedLocator([10.0**p for p in powers]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticklabels([_power(p) for p in powers])
    axes.axhspan(floor, rounding, color="#e8e8e8", linewidth=0.0, zorder=0.5)
    axes.annotate(
        "zero to rounding",
        (0.0, floor),
        xycoords=("axes fraction", "data"),
        xytext=(6, 4),
        textcoords="offset points",
        ha="left",
        va="bottom",
        fontsize=_SMALL,
        color="#4a4a4a",
        zorder=6,
    )


def _power(exponent: int) -> str:
    if exponent > -3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _curves(
    axes: Axes,
    curves: Sequence[Curve],
    gutter: float,
    each_seed: bool = False,
    band: bool = True,
) -> None:
    """Mean, band and name of each curve. Names are placed by the limits of y: set them first."""
    _round_ticks(axes.xaxis, 4)
    if axes.get_yscale() == "linear":
        _round_ticks(axes.yaxis)
    ends = []
    for order, curve in enumerate(curves):
        steps = np.asarray(curve.steps, dtype=np.float64)
        values = np.asarray(curve.values, dtype=np.float64)
        # A masked mean: where every seed has diverged the line ends, without NumPy's warning.
        alive = np.ma.masked_invalid(values)
        mean = alive.mean(axis=0).filled(np.nan)
        if band:
            low, high = alive.min(axis=0).filled(np.nan), alive.max(axis=0).filled(np.nan)
            axes.fill_between(steps, low, high, color=curve.color, alpha=0.16, lw=0, zorder=2)
        if each_seed:
            for seed in values:
                axes.plot(steps, seed, color=curve.color, alpha=0.35, linewidth=0.8, zorder=2.5)
        axes.plot(
            steps,
            mean,
            color=curve.color,
            linestyle=curve.style,
            linewidth=2.6,
            solid_capstyle="round",
            zorder=3 + 0.01 * order,
        )
        last = np.flatnonzero(np.isfinite(mean))
        ends.append(mean[last[-1]] if last.size else np.nan)
    _labels(axes, curves, np.array(ends), gutter)


def _labels(axes: Axes, curves: Sequence[Curve], ends: NDArray[np.float64], gutter: float) -> None:
    """Each curve's name at the height of its end, moved by as little as keeps names apart."""
    figure: Any = axes.figure
    width = axes.get_position().width * figure.get_figwidth()
    height = axes.get_position().height * figure.get_figheight()
    texts = [_wrap(figure, curve.label, gutter - 0.4, _TEXT) for curve in curves]
    tall = np.array([_height(text, _TEXT) + 0.06 for text in texts])
    middle = np.mean(axes.get_ylim()) if axes.get_yscale() == "linear" else axes.get_ylim()[0]
    heights = np.where(np.isfinite(ends), ends, middle)
    points = axes.transData.transform(np.column_stack([np.ones_like(heights), heights]))
    wanted = axes.transAxes.inverted().transform(points)[:, 1] * height
    # Below the axis stands the last tick.
    placed = _spread(wanted, tall, -0.05, height + 0.2)
    for curve, text, end, want, y in zip(curves, texts, ends, wanted, placed, strict=True):
        if np.isfinite(end):
            axes.plot(
                [1.0 + 0.04 / width, 1.0 + 0.14 / width],
                [want / height, y / height],
                transform=axes.transAxes,
                color=curve.color,
                linewidth=1.2,
                clip_on=False,
                label="_leader",
            )
        axes.annotate(
            text.replace("$", r"\$"),
            (1.0, y / height),
            xycoords="axes fraction",
            xytext=(14, 0),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=_TEXT,
            color=curve.color,
            linespacing=1.15,
            annotation_clip=False,
        )


def _spread(
    wanted: NDArray[np.float64], tall: NDArray[np.float64], low: float, high: float
) -> NDArray[np.float64]:
    """Centres of intervals of lengths `tall` that do not overlap, nearest to `wanted`.

    Nearest by least squares: with the lengths of those below taken off, "no overlap" reads "in
    order", and the answer is an isotonic regression. Ties keep the order given, first on top. What
    fits is kept within [low, high].
    """
    from scipy.optimize import isotonic_regression

    order = np.lexsort((-np.arange(wanted.size), wanted))
    sizes = tall[order]
    below = np.concatenate([[0.0], np.cumsum((sizes[:-1] + sizes[1:]) / 2)])
    centres = isotonic_regression(wanted[order] - below).x
    first, last = low + sizes[0] / 2, high - sizes[-1] / 2 - below[-1]
    placed = np.empty_like(centres)
    placed[order] = np.clip(centres, first, max(first, last)) + below
    return placed


def _forest_row(axes: Axes, index: int, row: ForestRow, agent: str, column: int) -> None:
    """One condition of one agent: range, seeds, mean, prediction, and the mean in figures."""
    color = PALETTE[column % len(PALETTE)]
    missed = agent in row.missed
    predicted = _numbers([row.prediction.get(agent)])[0]
    if agent in row.returns:
        values = _numbers(row.returns[agent])
        finite = values[np.isfinite(values)]
        lost = values.size - finite.size
        if finite.size:
            # Seeds fan out by a fixed pattern, so that equal returns stay countable.
            fan = index + 0.09 * (np.arange(finite.size) % 5 - 2)
            mean = float(finite.mean())
            axes.plot(
                [finite.min(), finite.max()], [index, index], color=color, linewidth=2, alpha=0.45
            )
            axes.plot(finite, fan, "o", color=color, alpha=0.55, markersize=5.5, mew=0, zorder=3)
            axes.plot([mean, mean], [index - 0.3, index + 0.3], color=color, linewidth=3, zorder=4)
            low, high = axes.get_xlim()
            digits = max(0, 3 - math.ceil(math.log10(high - low)))
            note = f"{round(mean, digits) + 0.0:,.{digits}f}".replace("-", "\N{MINUS SIGN}")
        else:
            note = "–"
        small = "\n".join(["missed"] * missed + [f"{lost} diverged"] * (lost > 0))
    else:
        note, small = "not run", ""
    if np.isfinite(predicted):
        axes.plot(
            [predicted],
            [index],
            "D",
            markerfacecolor="white",
            markeredgecolor=_MISSED if missed else BLACK,
            markersize=8.5,
            markeredgewidth=1.6,
            zorder=2.8,
            clip_on=False,
        )
    for text, size, tint, shift in (
        (
            note,
            _TEXT,
            BLACK if agent in row.returns else GREY,
            7 * (small.count("\n") + bool(small)),
        ),
        (small, _SMALL - 1, _MISSED, -8),
    ):
        if text:
            axes.annotate(
                text,
                (1.0, index),
                xycoords=("axes fraction", "data"),
                xytext=(12, shift),
                textcoords="offset points",
                ha="left",
                va="center",
                fontsize=size,
                color=tint,
                annotation_clip=False,
            )


def _forest_key(figure: Figure, y: float, rows: Sequence[ForestRow]) -> None:
    """What dot, bar, tick and diamond stand for, drawn as themselves; only what ``rows`` have."""
    axes = _axes(figure, 0.25, y, _WIDTH - 0.5, 0.3)
    axes.set_axis_off()
    axes.set_xlim(0.0, _WIDTH - 0.5)
    axes.set_ylim(-0.5, 0.5)
    axes.set_gid("key")
    items: list[tuple[str, dict[str, Any], str]] = [
        ("o", {"color": GREY, "alpha": 0.7, "markersize": 5.5, "mew": 0}, "one seed"),
        ("|", {"color": GREY, "markersize": 14, "mew": 3}, "mean"),
        ("-", {"color": GREY, "linewidth": 2, "alpha": 0.6}, "lowest to highest seed"),
    ]
    diamond = {"mfc": "white", "markersize": 8.5, "mew": 1.6}
    if any(value is not None for row in rows for value in row.prediction.values()):
        items.append(("D", {**diamond, "mec": BLACK}, "predicted before"))
    if any(row.missed & row.prediction.keys() for row in rows):
        items.append(("D", {**diamond, "mec": _MISSED}, "predicted, missed"))
    x = 0.1
    for marker, style, text in items:
        span = [x - 0.1, x + 0.1] if marker == "-" else [x]
        axes.plot(span, [0.0] * len(span), marker, **style)
        axes.text(x + 0.2, 0.0, text, fontsize=_SMALL, color=GREY, va="center_baseline")
        x += _width(figure, text, _SMALL) + 0.6


def _stripe(figure: Figure, y: float, height: float) -> None:
    """A pale band across the whole figure that leads the eye along a row."""
    from matplotlib.patches import Rectangle

    figure.add_artist(
        Rectangle(
            (0.12, -y - height),
            _WIDTH - 0.24,
            height,
            transform=_inches(figure),
            facecolor=_STRIPE,
            edgecolor="none",
            zorder=-1,
        )
    )
