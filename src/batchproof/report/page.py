"""The page: statistics of the cells, and the HTML around them.

What is computed is computed here, once; the script of the page (``assets/report.js``) draws, hides
and sorts. The page forbids itself every connection, so that it can only work offline.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.modes import Plan, Slot
from batchproof.report.data import Cell
from batchproof.study import report as study_report
from batchproof.study import statistics
from batchproof.study.statistics import Comparison, Interval, short

ASSETS = Path(__file__).parent / "assets"
PLOTLY = "4.1.1"
"""Version of ``assets/plotly-basic.min.js``, npm's plotly.js-basic-dist-min."""

MOST_POINTS = 500
"""Evaluations drawn of one curve; longer ones are thinned evenly, the last one kept."""

_SLOT_NAMES = {
    Slot.ACT: "act",
    Slot.ACTOR_UPDATE: "actor update",
    Slot.TARGET_ACTION: "target action",
    Slot.POLICY_Q: "policy Q",
    Slot.REPLAY_Q: "replay Q",
    Slot.TARGET_Q: "target Q",
}
_PROFILE_POINTS = 61


@dataclass(frozen=True)
class _Scored:
    """A cell with what the page says of it. Diverged seeds count as the task's lowest return."""

    cell: Cell
    index: int  # of the condition, over all tasks
    returns: NDArray[np.float64]  # (seeds, T), no NaN
    final: NDArray[np.float64]  # (seeds,), at the task's horizon
    diverged: int
    iqm: Interval
    average: float
    crossing: statistics.Crossing


@dataclass(frozen=True)
class _Task:
    name: str
    horizon: float  # the last evaluation step that every condition reached
    threshold: float
    threshold_is: str  # where it comes from, in words
    cells: list[_Scored]
    floor: float


def write(
    cells: Sequence[Cell], out: Path, threshold: float | None = None, notes: Sequence[str] = ()
) -> list[str]:
    """Write the report of `cells`, `notes` below its opening; see `batchproof.report.write`."""
    conditions = list(dict.fromkeys(cell.condition for cell in cells))
    tasks = [
        _task(name, [cell for cell in cells if cell.task == name], conditions, threshold)
        for name in dict.fromkeys(cell.task for cell in cells)
    ]
    comparisons = _compare(tasks)
    paragraphs = _summary(tasks, comparisons) + list(notes)
    html = _html(tasks, conditions, comparisons, paragraphs)
    records.make_folder(out.parent)
    if out.is_dir():
        raise BatchproofError(f"{out} is a folder; name the HTML file to write")
    with records.replacing(out) as file:
        file.write(html.encode())
    return paragraphs


# --- statistics ---------------------------------------------------------------------------------


def _task(
    name: str, cells: Sequence[Cell], conditions: Sequence[str], threshold: float | None
) -> _Task:
    horizon = min(float(cell.steps[-1]) for cell in cells)
    finite = np.concatenate([cell.metrics["return"].ravel() for cell in cells])
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        raise BatchproofError(f"{cells[0].source}: every seed diverged before its first evaluation")
    floor = float(finite.min())
    until = {id(cell): cell.steps <= horizon for cell in cells}
    if not all(mine.any() for mine in until.values()):
        late = next(cell for cell in cells if not until[id(cell)].any())
        raise BatchproofError(
            f"{late.source}: its first evaluation ({late.steps[0]:g} steps) is after another run's "
            f"last ({horizon:g}); report them apart"
        )
    filled = {id(cell): np.nan_to_num(cell.metrics["return"], nan=floor) for cell in cells}
    finals = {key: filled[key][:, until[key].nonzero()[0][-1]] for key in filled}
    if threshold is None:
        aim = float(np.median([statistics.iqm(values) for values in finals.values()]))
        chosen = "the median of the conditions' final interquartile means"
    else:
        aim, chosen = threshold, "as chosen"
    scored = []
    for cell in cells:
        mine = until[id(cell)]
        steps, returns = cell.steps[mine], cell.metrics["return"][:, mine]
        full = filled[id(cell)][:, mine]
        scored.append(
            _Scored(
                cell,
                conditions.index(cell.condition),
                filled[id(cell)],
                finals[id(cell)],
                int(np.isnan(cell.metrics["return"][:, -1]).sum()),
                statistics.iqm_interval(finals[id(cell)]),
                float(statistics.average_over_training(steps, full).mean()),
                statistics.steps_to_threshold(steps, returns, aim),
            )
        )
    return _Task(name, horizon, aim, chosen, scored, floor)


def _by_seed(scored: _Scored) -> dict[int, float]:
    return dict(zip(scored.cell.seeds, scored.final.tolist(), strict=True))


def _compare(tasks: Sequence[_Task]) -> list[tuple[_Task, Comparison]]:
    """Each condition against another, corrected for all comparisons of the page."""
    pairs, of = [], []
    for task in tasks:
        for one, other in _pairs(task):
            if set(one.cell.seeds) & set(other.cell.seeds):
                names = one.cell.condition, other.cell.condition
                pairs.append((names[0], _by_seed(one), names[1], _by_seed(other)))
                of.append(task)
    return list(zip(of, statistics.compare(pairs), strict=True)) if pairs else []


def _pairs(task: _Task) -> list[tuple[_Scored, _Scored]]:
    """Whom each condition is compared with: as its comparison said, or the task's first."""
    by_title = {scored.cell.title: scored for scored in task.cells if scored.cell.title}
    first, *others = task.cells
    return [(other, by_title.get(other.cell.versus, first)) for other in others]


def _across(tasks: Sequence[_Task]) -> list[tuple[_Scored, NDArray[np.float64]]]:
    """Scores (seeds, tasks) of the conditions that ran on every task, 0 the lowest final return
    that any seed has on a task and 1 the highest."""
    by_condition: dict[int, list[tuple[_Task, _Scored]]] = defaultdict(list)
    for task in tasks:
        for scored in task.cells:
            by_condition[scored.index].append((task, scored))
    ends = {}
    for task in tasks:
        finals = np.concatenate([scored.final for scored in task.cells])
        ends[task.name] = finals.min(), np.ptp(finals) or 1.0
    found = []
    for held in by_condition.values():
        if len(held) == len(tasks):
            count = min(scored.final.size for _, scored in held)
            columns = [
                (scored.final[:count] - ends[task.name][0]) / ends[task.name][1]
                for task, scored in held
            ]
            found.append((held[0][1], np.stack(columns, axis=1)))
    return found


def _summary(tasks: Sequence[_Task], comparisons: Sequence[tuple[_Task, Comparison]]) -> list[str]:
    """One paragraph for each task."""
    paragraphs = []
    for task in tasks:
        counts = sorted({scored.final.size for scored in task.cells})
        seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        plural = "" if counts == [1] else "s"
        of_each = " each" if len(task.cells) > 1 else ""
        what = "condition" if len(task.cells) == 1 else "conditions"
        shortest = min(task.cells, key=lambda scored: float(scored.cell.steps[-1]))
        as_far = "" if _is_whole(task) else f", as far as {shortest.cell.condition} has come"
        sentences = [
            f"{task.name}: {len(task.cells)} {what} with {seeds} seed{plural}{of_each}, compared "
            f"at {task.horizon:,.0f} environment steps{as_far}."
        ]
        lost = [(s.cell.condition, s.diverged) for s in task.cells if s.diverged]
        if lost:
            listed = ", ".join(f"{name}: {count}" for name, count in lost)
            sentences.append(
                f"Seeds diverged ({listed}); from there on each counts as the lowest return seen "
                f"on this task, {short(task.floor)}."
            )
        sentences += _ranked(task)
        mine = [found for of, found in comparisons if of is task]
        for other in dict.fromkeys(found.b for found in mine):
            sentences.append(_tally([found for found in mine if found.b == other]))
        paired = {found.a for found in mine}
        alone: dict[str, list[str]] = {}
        for one, versus in _pairs(task):
            if one.cell.condition not in paired:
                alone.setdefault(versus.cell.condition, []).append(one.cell.condition)
        sentences += [
            f"Not compared, for want of a seed that {versus} has too: {', '.join(names)}."
            for versus, names in alone.items()
        ]
        paragraphs.append(" ".join(sentences))
    return paragraphs


def _is_whole(task: _Task) -> bool:
    """Whether all conditions have come to their last evaluation where they are compared."""
    return all(float(scored.cell.steps[-1]) == task.horizon for scored in task.cells)


def _ranked(task: _Task) -> list[str]:
    """Who ends highest, or why that cannot be said."""
    if len(task.cells) == 1:
        only = task.cells[0]
        return [f"Its final return has {_interval_words(only.iqm)}."]
    try:
        order = statistics.ranking({s.cell.condition: s.final for s in task.cells})
    except BatchproofError:
        few = [s for s in task.cells if s.final.size < statistics.MIN_SEEDS]
        listed = ", ".join(f"{s.cell.condition} ({s.final.size})" for s in few[:4])
        more = f" and {len(few) - 4} more" if len(few) > 4 else ""
        return [
            f"No ranking: a ranking needs {statistics.MIN_SEEDS} seeds of every condition, and "
            f"these have fewer: {listed}{more}."
        ]
    (first, best), (second, runner_up) = order[:2]
    if short(best.mean) == short(runner_up.mean):
        overlap = " The two are equal to four digits."
    else:
        apart = best.lo > runner_up.hi
        overlap = " Their intervals are apart." if apart else " The two intervals overlap."
    which = "final return" if _is_whole(task) else "return there"
    return [
        f"The highest {which} is that of {first}, with {_interval_words(best)}; next is "
        f"{second}, with {_interval_words(runner_up)}.{overlap}"
    ]


def _interval_words(interval: Interval) -> str:
    if math.isnan(interval.lo):
        return f"an interquartile mean of {short(interval.mean)} (one seed, no interval)"
    return (
        f"an interquartile mean of {short(interval.mean)} (95% interval {short(interval.lo)} to "
        f"{short(interval.hi)})"
    )


def _tally(found: Sequence[Comparison]) -> str:
    words = ("higher", "lower", "not told apart", "too few seeds")
    said = {
        "higher": "higher",
        "lower": "lower",
        "not told apart": "not told apart from it",
        "too few seeds": "not tested, for too few seeds",
    }
    counts = {word: [c.a for c in found if c.verdict == word] for word in words}
    parts = []
    for word, names in counts.items():
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            parts.append(f"{len(names)} {said[word]} ({listed})")
    return f"Against {found[0].b}: {'; '.join(parts)}."


# --- what the script draws ----------------------------------------------------------------------


def _data(tasks: Sequence[_Task], conditions: Sequence[str]) -> dict[str, Any]:
    return {
        "conditions": list(conditions),
        "tasks": [
            {
                "name": task.name,
                "horizon": task.horizon,
                "threshold": task.threshold,
                "cells": [_drawn(scored) for scored in task.cells],
                "profile": _profile([(s, s.final[:, None]) for s in task.cells]),
            }
            for task in tasks
        ],
        "across": _profile(_across(tasks)) if len(tasks) > 1 else None,
    }


def _drawn(scored: _Scored) -> dict[str, Any]:
    cell = scored.cell
    count = cell.steps.size
    stride = max(1, math.ceil(count / MOST_POINTS))
    picks = np.arange(count)[::-1][::stride][::-1]  # counted from the end, which is kept
    raw = cell.metrics["return"][:, picks]
    metrics = {}
    for name, values in cell.metrics.items():
        if name == "return":
            continue
        # A metric may be undefined at some evaluations: a masked mean says nothing there.
        alive = np.ma.masked_invalid(values[:, picks])
        rows = [alive.mean(axis=0), alive.min(axis=0), alive.max(axis=0)]
        metrics[name] = [_rounded(row.filled(np.nan), 4) for row in rows]
    return {
        "condition": scored.index,
        "steps": [int(step) for step in cell.steps[picks]],
        "seeds": list(cell.seeds),
        "returns": [_rounded(row, 6) for row in raw],
        "filled": [_rounded(row, 6) for row in scored.returns[:, picks]]
        if np.isnan(raw).any()
        else None,
        "iqm": [_rounded(row, 5) for row in statistics.iqm_curve(scored.returns[:, picks])],
        "metrics": metrics,
        "final": _rounded(scored.final, 6),
        "interval": _rounded(np.array(scored.iqm), 6),
    }


def _profile(scores: Sequence[tuple[_Scored, NDArray[np.float64]]]) -> dict[str, Any] | None:
    if not scores:
        return None
    every = np.concatenate([values.ravel() for _, values in scores])
    low, high = float(every.min()), float(every.max())
    air = 0.02 * (high - low) or 1.0
    thresholds = np.linspace(low - air, high + air, _PROFILE_POINTS)
    return {
        "thresholds": _rounded(thresholds, 5),
        "conditions": [
            {
                "condition": scored.index,
                "share": [
                    _rounded(row, 4) for row in statistics.performance_profile(values, thresholds)
                ],
            }
            for scored, values in scores
        ],
    }


def _rounded(values: NDArray[np.float64], digits: int) -> list[float | int | None]:
    """To significant digits, as short as JSON can say it; None where there is no number."""
    found: list[float | int | None] = []
    for value in values.tolist():
        if not math.isfinite(value):
            found.append(None)
            continue
        number = float(f"{value:.{digits}g}")
        found.append(int(number) if number.is_integer() and abs(number) < 1e15 else number)
    return found


# --- the page -----------------------------------------------------------------------------------


def _html(
    tasks: Sequence[_Task],
    conditions: Sequence[str],
    comparisons: Sequence[tuple[_Task, Comparison]],
    paragraphs: Sequence[str],
) -> str:
    plotly = (ASSETS / "plotly-basic.min.js").read_text(encoding="utf-8")
    scripts = [plotly, study_report.SORT_SCRIPT, (ASSETS / "report.js").read_text("utf-8")]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    )
    policy = (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {hashes}; base-uri 'none'; form-action 'none'"
    )
    style = study_report.STYLE + (ASSETS / "report.css").read_text("utf-8")
    data = json.dumps(_data(tasks, conditions), separators=(",", ":"), allow_nan=False)
    title = _title(tasks, conditions)
    sections = [
        ("summary", "In short", _summary_html(paragraphs, comparisons)),
        ("curves", "Learning curves", _curves_html(tasks, conditions)),
        ("final", "Final returns", _final_html(tasks)),
        ("across", "Across tasks", _across_html(tasks)),
        ("conditions", "Conditions", _conditions_html(tasks)),
        ("comparisons", "Comparisons", _comparisons_html(tasks, comparisons)),
        ("plans", "Mode plans", _plans_html(tasks)),
        ("runs", "Runs", _runs_html(tasks)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{name}">{escape(head)}</a></li>' for name, head, _ in shown)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-head">'
        f'<h2 id="{name}-head">{escape(head)}</h2>\n{content}\n</section>'
        for name, head, content in shown
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header>
<p class="kicker">Report</p>
<h1>{escape(title)}</h1>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<script type="application/json" id="data">{data.replace("<", chr(92) + "u003c")}</script>
{"".join(f"<script>{text}</script>" for text in scripts)}
</body>
</html>
"""


def _title(tasks: Sequence[_Task], conditions: Sequence[str]) -> str:
    what = conditions[0] if len(conditions) == 1 else f"{len(conditions)} conditions"
    where = tasks[0].name if len(tasks) == 1 else f"{len(tasks)} tasks"
    return f"{what} on {where}"


def _summary_html(sentences: Sequence[str], comparisons: Sequence[tuple[_Task, Comparison]]) -> str:
    html = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    if not comparisons:
        return html
    several = len({id(task) for task, _ in comparisons}) > 1
    items = "".join(
        f"<li>{escape(f'{task.name}: ' if several else '')}{escape(found.sentence)}</li>"
        for task, found in comparisons
    )
    heading = f"Every comparison in words ({len(comparisons)})"
    return f"{html}<details><summary>{heading}</summary><ul>{items}</ul></details>"


def _options(values: Iterable[tuple[Any, str]]) -> str:
    return "".join(
        f'<option value="{escape(str(value))}">{escape(text)}</option>' for value, text in values
    )


def _curves_html(tasks: Sequence[_Task], conditions: Sequence[str]) -> str:
    names = sorted({name for t in tasks for s in t.cells for name in s.cell.metrics} - {"return"})
    picks = ""
    if len(tasks) > 1:
        options = _options((i, task.name) for i, task in enumerate(tasks))
        picks += f'<label>Task <select id="task">{options}</select></label>'
    # A slash is in the names that are told of each layer, such as mean_gap/actor/norm_pre_0.
    layers = [name for name in names if "/" in name]
    others = ["return", *(name for name in names if "/" not in name)]
    options = _options((name, name.replace("_", " ")) for name in others)
    if layers:
        of_layers = _options((name, name.replace("_", " ")) for name in layers)
        options += f'<optgroup label="statistics of each layer">{of_layers}</optgroup>'
    picks += f'<label>Metric <select id="metric">{options}</select></label>'
    bands = "".join(
        f'<label><input type="radio" name="band" value="{value}"{checked}> {text}</label>'
        for value, checked, text in (
            ("range", " checked", "mean, lowest to highest seed"),
            ("iqm", "", "interquartile mean, 95% interval"),
            ("seeds", "", "every seed"),
        )
    )
    boxes = "".join(
        f'<label><input type="checkbox" data-condition="{i}" checked> {_swatch(i)} '
        f"<span>{escape(name)}</span></label>"
        for i, name in enumerate(conditions)
    )
    thinned = any(s.cell.steps.size > MOST_POINTS for t in tasks for s in t.cells)
    note = (
        f"Of curves with more than {MOST_POINTS} evaluations every second one or fewer are kept."
        if thinned
        else ""
    )
    return f"""<div class="controls">{picks}
<fieldset class="bands"><legend>Line and band</legend>{bands}</fieldset></div>
{_figure("curves", "Learning curves", "", note)}
<fieldset id="toggles"><legend>Conditions shown, in all figures</legend>
<div class="boxes">{boxes}</div>
<p class="buttons"><button type="button" id="all">Show all</button>
<button type="button" id="none">Hide all</button></p></fieldset>"""


def _figure(name: str, title: str, caption: str, note: str = "") -> str:
    buttons = "".join(
        f'<button type="button" data-figure="{name}" data-format="{form}" '
        f'aria-label="Download {escape(title.lower())} as {form.upper()}">{form.upper()}</button>'
        for form in ("svg", "png", "csv")
    )
    return f"""<figure>
<div class="chart" id="chart-{name}" role="img" aria-label="{escape(title)}"></div>
<noscript><p>This figure needs JavaScript; the tables below do not.</p></noscript>
<figcaption><span><span id="caption-{name}">{escape(caption)}</span><span id="on-{name}"></span>
{escape(note)}</span>
<span class="buttons">Download {buttons}</span></figcaption>
</figure>"""


def _final_html(tasks: Sequence[_Task]) -> str:
    unfinished = any(s.cell.steps[-1] > t.horizon for t in tasks for s in t.cells)
    where = (
        " Runs are compared at the last step that all of them have reached." if unfinished else ""
    )
    return _figure(
        "final",
        "Final returns",
        "One dot per seed; the diamond is the interquartile mean with its 95% interval." + where,
    ) + _figure(
        "profile",
        "Performance profile",
        "Share of seeds whose final return is above a value: higher and further right is better. "
        "Bands are 95% intervals.",
    )


def _across_html(tasks: Sequence[_Task]) -> str:
    if len(tasks) == 1:
        return ""
    scores = _across(tasks)
    left_out = len({s.index for t in tasks for s in t.cells}) - len(scores)
    note = f" {left_out} conditions did not run on every task and are left out." * bool(left_out)
    intro = (
        "<p>Final returns, scaled within each task: 0 is the lowest that any seed of this report "
        f"has there and 1 the highest. A score says nothing outside this report.{note}</p>"
    )
    if not scores:
        return intro
    rows = []
    few = min(len(values) for _, values in scores) < statistics.MIN_SEEDS
    base = scores[0]
    for scored, values in scores:
        interval = statistics.iqm_interval(values)
        beats = statistics.probability_of_improvement(values, base[1])
        rows.append(
            [
                _head(scored),
                _number(len(values)),
                _number(interval.mean),
                _span(interval),
                *(
                    (_number(None), _number(None))
                    if scored is base[0]
                    else (_number(beats.mean), _span(beats))
                ),
            ]
        )
    refusal = (
        f"<p>No ranking: fewer than {statistics.MIN_SEEDS} seeds of a condition.</p>" if few else ""
    )
    columns = [
        ("Condition", "text"),
        ("Seeds", "number"),
        ("Interquartile mean", "number"),
        ("95% interval", "number"),
        (f"Chance to beat {base[0].cell.condition}", "number"),
        ("95% interval", "number"),
    ]
    caption = (
        f"Over {len(tasks)} tasks. Intervals resample the seeds within each task "
        "(arXiv 2108.13264)."
    )
    return (
        intro
        + refusal
        + _table("Across tasks", caption, columns, rows)
        + _figure(
            "across", "Performance profile across tasks", "Share of runs that score above a value."
        )
    )


def _conditions_html(tasks: Sequence[_Task]) -> str:
    several = len(tasks) > 1
    columns = [
        ("Condition", "text"),
        *([("Task", "text")] if several else []),
        ("Seeds", "number"),
        ("Diverged", "number"),
        ("Mean", "number"),
        ("Lowest to highest", "number"),
        ("Interquartile mean", "number"),
        ("95% interval", "number"),
        ("Average over training", "number"),
        ("Steps to threshold", "number"),
        ("Time to threshold", "number"),
        ("Wall time", "number"),
    ]
    rows = []
    for task in tasks:
        for s in task.cells:
            low, high = float(s.final.min()), float(s.final.max())
            wall = s.cell.facts.get("wall_s") or None  # 0 before the first checkpoint
            pace = s.cell.facts.get("seconds_per_step")
            if wall and pace is None:
                pace = wall / s.cell.steps[-1]  # a run under way, or stopped, ends here
            median = s.crossing.median
            seconds = median * pace if pace and math.isfinite(median) else None
            rows.append(
                [
                    _head(s),
                    *([_text(task.name)] if several else []),
                    _number(s.final.size),
                    _number(s.diverged),
                    _number(float(s.final.mean())),
                    _cell(f"{short(low)} to {short(high)}", high - low),
                    _number(s.iqm.mean),
                    _span(s.iqm),
                    _number(s.average),
                    _crossing(s),
                    _cell("–" if seconds is None else study_report.duration(seconds), seconds),
                    _cell("–" if wall is None else study_report.duration(wall), wall),
                ]
            )
    aims = "; ".join(
        (f"{task.name}: " if several else "") + short(task.threshold) for task in tasks
    )
    caption = (
        "Final return of the deterministic policy. Average over training is the area under the "
        f"learning curve divided by its length. The threshold is {aims} ({tasks[0].threshold_is}); "
        "steps are the median over "
        "seeds with its 95% interval, and seeds that never reach it count as late, not as missing. "
        "Time is the median's share of the wall time, which all seeds of a run share."
    )
    return _table("Conditions", caption, columns, rows)


def _crossing(scored: _Scored) -> str:
    found = scored.crossing
    reached = f"{found.reached} of {found.steps.size} seeds"
    if math.isinf(found.median):
        return _cell(f"not reached by half ({reached})", None)
    span = ""
    if not math.isnan(found.lo):
        high = f"to {short(found.hi)}" if math.isfinite(found.hi) else "or more"
        span = f", {short(found.lo)} {high}"
    return _cell(f"{short(found.median)} ({reached}{span})", found.median)


def _comparisons_html(
    tasks: Sequence[_Task], comparisons: Sequence[tuple[_Task, Comparison]]
) -> str:
    if not comparisons:
        return ""
    several = len(tasks) > 1
    columns = [
        ("Condition", "text"),
        ("Against", "text"),
        *([("Task", "text")] if several else []),
        ("Shared seeds", "number"),
        ("Difference", "number"),
        ("Its 95% interval", "number"),
        ("Chance to be higher", "number"),
        ("Its 95% interval", "number"),
        ("p", "number"),
        ("p, Holm", "number"),
        ("Verdict", "text"),
    ]
    rows = [
        [
            f'<th scope="row">{escape(found.a)}</th>',
            _text(found.b),
            *([_text(task.name)] if several else []),
            _number(found.seeds),
            _number(found.difference.mean),
            _span(found.difference),
            _number(found.improvement.mean),
            _span(found.improvement),
            _number(found.p),
            _number(found.p_holm),
            _text(found.verdict),
        ]
        for task, found in comparisons
    ]
    tested = sum(math.isfinite(found.p) for _, found in comparisons)
    caption = (
        "Final returns, paired by seed, each condition against the first one given. p is that of "
        f"the paired t-test; Holm's correction is for the {tested} tests of this page. Fewer than "
        f"{statistics.MIN_SEEDS} shared seeds are not tested. The chance to be higher is that a "
        "seed of the condition beats a seed of the other."
    )
    return _table("Comparisons", caption, columns, rows)


def _plans_html(tasks: Sequence[_Task]) -> str:
    plans: dict[str, list[_Scored]] = defaultdict(list)
    bare: list[_Scored] = []
    for task in tasks:
        for scored in task.cells:
            (plans[scored.cell.plan] if scored.cell.plan else bare).append(scored)
    drawn, letters = [], set()
    for text, held in plans.items():
        try:
            plan = Plan.parse(text)
        except BatchproofError:
            bare += held
            continue
        letters |= {str(mode) for mode in plan.modes}
        drawn.append(_plan_html(plan, held))
    if not drawn:
        return ""
    modes = {str(mode): mode for text in plans for mode in _modes(text) if str(mode) in letters}
    key = "".join(
        f"<dt><code>{letter}</code></dt><dd>{escape(mode.title)}</dd>"
        for letter, mode in sorted(modes.items())
    )
    slots = "".join(
        f"<dt>{slot.value}</dt><dd>{_SLOT_NAMES[slot]}: {escape(slot.title)}</dd>" for slot in Slot
    )
    without = ""
    if bare:
        without = f"<p>Without modes: {_names(bare)}.</p>"
    return f"""<p>Which statistics each forward pass of the normalized networks uses. Filled boxes
use the batch's, outlined ones the running ones.</p>
<div class="plans">{"".join(drawn)}</div>{without}
<details><summary>What slots and letters mean</summary>
<dl class="key">{slots}</dl><dl class="key">{key}</dl></details>"""


def _modes(text: str) -> tuple[Any, ...]:
    try:
        return Plan.parse(text).modes
    except BatchproofError:
        return ()


def _names(held: Iterable[_Scored]) -> str:
    named = {s.index: s.cell.condition for s in held}
    return "; ".join(f"{_swatch(index)} {escape(name)}" for index, name in named.items())


def _plan_html(plan: Plan, held: Sequence[_Scored]) -> str:
    boxes = []
    for slot in Slot:
        mode = plan[slot]
        x = 4 + 52 * slot.value
        kind = "bypass" if mode.bypass else "batch" if mode.uses_batch else "running"
        kind += " stopped" if mode.kind == "S" else ""
        boxes.append(
            f'<text class="slot" x="{x + 22}" y="12">{slot.value}</text>'
            f'<rect class="{kind}" x="{x}" y="18" width="44" height="34" rx="5"></rect>'
            f'<text class="{kind}" x="{x + 22}" y="42">{mode}</text>'
        )
    if plan.joint:  # one forward pass over both batches
        boxes.append('<path class="joint" d="M256 35h8"></path>')
    words = "; ".join(f"slot {s.value}, {_SLOT_NAMES[s]}: {plan[s].title}" for s in Slot)
    return f"""<figure class="plan">
<svg viewBox="0 0 316 56" role="img" aria-label="{escape(f"Mode plan {plan}: {words}")}">
{"".join(boxes)}</svg>
<figcaption><code>{escape(str(plan))}</code> {_names(held)}</figcaption></figure>"""


def _runs_html(tasks: Sequence[_Task]) -> str:
    columns = [
        ("Folder", "text"),
        ("Condition", "text"),
        *([("Task", "text")] if len(tasks) > 1 else []),
        ("Seeds", "text"),
        ("Last step", "number"),
        ("State", "text"),
        ("Versions", "text"),
        ("Commit", "text"),
        ("Command", "text"),
    ]
    rows = []
    for task in tasks:
        for s in task.cells:
            facts = s.cell.facts
            versions = facts.get("versions")
            listed = (
                ", ".join(f"{name} {version}" for name, version in versions.items())
                if isinstance(versions, Mapping)
                else ""
            )
            rows.append(
                [
                    f'<th scope="row">{escape(s.cell.source)}</th>',
                    _text(s.cell.condition),
                    *([_text(task.name)] if len(tasks) > 1 else []),
                    _text(_ranges(s.cell.seeds)),
                    _number(float(s.cell.steps[-1])),
                    _text(
                        "finished" if facts.get("status") in (None, "finished") else "unfinished"
                    ),
                    _text(listed),
                    _text(str(facts.get("git_sha") or "")[:10]),
                    _text(str(facts.get("command") or ""), code=True),
                ]
            )
    return _table("Runs", "Where the numbers come from.", columns, rows)


def _ranges(seeds: Sequence[int]) -> str:
    """0 to 9, 12: consecutive numbers as one range."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in parts)


# --- pieces -------------------------------------------------------------------------------------


def _swatch(index: int) -> str:
    """A condition's line, in its colour and dashes."""
    return (
        f'<svg class="swatch c{index % 7} d{index // 7 % 4}" viewBox="0 0 34 12" width="34" '
        'height="12" aria-hidden="true"><path d="M1 6h32"></path></svg>'
    )


def _table(
    name: str,
    caption: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[str]],
) -> str:
    head = "".join(
        f'<th scope="col" data-kind="{kind}">{escape(text)}</th>' for text, kind in columns
    )
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f"""<p class="note">{escape(caption)}
<span class="hint" hidden>Choose a heading to sort by it.</span></p>
<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0">
<table aria-label="{escape(name)}">
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>"""


def _head(scored: _Scored) -> str:
    name = escape(scored.cell.condition)
    return f'<th scope="row" data-sort="{name}">{_swatch(scored.index)} {name}</th>'


def _text(text: str, code: bool = False) -> str:
    inner = escape(text) or "–"
    css = ' class="long"' if len(text) > 60 else ""
    inner = f"<code>{inner}</code>" if code else inner
    return f'<td{css} data-sort="{escape(text)}">{inner}</td>'


def _cell(text: str, key: float | None) -> str:
    sort = "" if key is None or not math.isfinite(key) else repr(float(key))
    return f'<td class="number" data-sort="{sort}">{escape(text)}</td>'


def _number(value: float | None) -> str:
    missing = value is None or not math.isfinite(value)
    return _cell("–" if missing or value is None else short(float(value)), value)


def _span(interval: Interval) -> str:
    if math.isnan(interval.lo):
        return _cell("–", None)
    return _cell(f"{short(interval.lo)} to {short(interval.hi)}", interval.hi - interval.lo)
