"""A study's report: one HTML file that opens offline and holds everything, images included.

Nothing is fetched: no fonts, scripts or styles from elsewhere, and the page's own policy forbids
them. Without JavaScript all of it reads the same; with it, the table of conditions sorts by click
or key.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Real
from pathlib import Path
from typing import Any

from batchproof.records import replacing

VERDICTS = ("supported", "refuted", "inconclusive")

_MARKS = {"supported": "✓", "refuted": "✗", "inconclusive": "?"}
_STUDY_KEYS = ("study", "claims", "conditions", "wall_s", "versions", "command", "seeds", "steps")
_CLAIM_KEYS = ("id", "statement", "source", "decision_rule", "verdict", "effect", "ci", "n")
_NONE = "–"


@dataclass(frozen=True)
class FigureSection:
    """A picture with its words.

    Attributes:
        title: heading over the picture.
        caption: what to see in it; plain text.
        png: the image file, embedded.
        alt: the picture in words for those who cannot see it; the caption says it if this is empty.
        svg: a sharper version, embedded in place of the PNG if given.
    """

    title: str
    caption: str
    png: str | Path
    alt: str = ""
    svg: str | Path | None = None


def write_report(
    path: str | Path,
    study: Mapping[str, Any],
    figures: Sequence[FigureSection],
    explanation_html: str,
    *,
    title: str = "",
    language: str = "en",
) -> Path:
    """Write the report of a study as one self-contained HTML file.

    Everything in `study` and `figures` is escaped; `explanation_html` is the only text that goes
    in as it is, so it must come from the study's own code.

    Args:
        path: the file to write; its folder is made if missing.
        study: what `study.json` holds: `study`, `claims`, `conditions`, `wall_s` (seconds),
            `versions`, `command`, `seeds`, `steps` (environment steps) and optionally `machine`.
            A missing return (None, NaN) is a diverged seed.
        figures: shown in this order.
        explanation_html: the answer in one minute: paragraphs, lists, emphasis.
        title: the page's heading; the study's name if empty.
        language: of the text, for screen readers (BCP 47).

    Returns:
        The path written.

    Raises:
        ValueError: `study` lacks a key, or a verdict is none of `VERDICTS`.
        OSError: an image cannot be read.
        BatchproofError: the report cannot be written.
    """
    _check(study)
    page = _page(study, figures, explanation_html, title or str(study["study"]), language)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(page.encode())
    return path


def _check(study: Mapping[str, Any]) -> None:
    missing = [key for key in _STUDY_KEYS if key not in study]
    if missing:
        raise ValueError(f"study lacks {', '.join(missing)}")
    for index, claim in enumerate(study["claims"]):
        missing = [key for key in _CLAIM_KEYS if key not in claim]
        if missing:
            raise ValueError(f"claim {claim.get('id', index)!r} lacks {', '.join(missing)}")
        if claim["verdict"] not in VERDICTS:
            raise ValueError(
                f"claim {claim['id']!r} has the verdict {claim['verdict']!r}; "
                f"write one of {', '.join(VERDICTS)}"
            )
    for index, condition in enumerate(study["conditions"]):
        missing = [key for key in ("name", "returns") if key not in condition]
        if missing:
            raise ValueError(
                f"condition {condition.get('name', index)!r} lacks {', '.join(missing)}"
            )


def _page(
    study: Mapping[str, Any],
    figures: Sequence[FigureSection],
    explanation_html: str,
    title: str,
    language: str,
) -> str:
    # Only the script whose hash stands here may run, so that nothing in the data ever can.
    script_hash = base64.b64encode(hashlib.sha256(SORT_SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{script_hash}'; base-uri 'none'; form-action 'none'"
    )
    returns_are = str(study.get("returns_are") or "Final deterministic return")
    table = _table(study["conditions"], returns_are)
    sections = [
        ("answer", "The answer in one minute", explanation_html),
        ("verdicts", "Verdicts", _cards(study["claims"])),
        ("figures", "Figures", "".join(_figure(figure) for figure in figures)),
        ("conditions", "All conditions", table),
        ("run", "How it was run", _run(study)),
    ]
    shown = [section for section in sections if section[2].strip()]
    links = "".join(f'<li><a href="#{name}">{escape(head)}</a></li>' for name, head, _ in shown)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-head">'
        f'<h2 id="{name}-head">{escape(head)}</h2>\n{content}\n</section>'
        for name, head, content in shown
    )
    return f"""<!doctype html>
<html lang="{escape(language)}">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="kicker">Study {escape(str(study["study"]))}</p>
<h1>{escape(title)}</h1>
<p class="tally">{_tally(study)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<script>{SORT_SCRIPT}</script>
</body>
</html>
"""


def _tally(study: Mapping[str, Any]) -> str:
    verdicts = [claim["verdict"] for claim in study["claims"]]
    parts = [
        _badge(verdict, f"{verdicts.count(verdict)} {verdict}")
        for verdict in VERDICTS
        if verdict in verdicts
    ]
    runs = sum(len(condition["returns"]) for condition in study["conditions"])
    parts.append(
        f"<span>{_count(len(study['conditions']), 'condition')}, {_count(runs, 'run')}, "
        f"{escape(duration(study['wall_s']))}</span>"
    )
    return " ".join(parts)


def _badge(verdict: str, text: str) -> str:
    # The mark says it without colour; the word does so for screen readers.
    mark = f'<span aria-hidden="true">{_MARKS[verdict]}</span>'
    return f'<span class="badge {verdict}">{mark} {escape(text)}</span>'


def _cards(claims: Sequence[Mapping[str, Any]]) -> str:
    if not claims:
        return ""
    return f'<div class="cards">{"".join(_card(claim) for claim in claims)}</div>'


def _card(claim: Mapping[str, Any]) -> str:
    verdict = claim["verdict"]
    level = claim.get("level")
    interval = _NONE
    if claim["ci"] is not None:
        low, high = claim["ci"]
        if low is not None and high is not None:
            interval = f"{_number(low)} to {_number(high)}"
    facts = [
        ("Effect", _number(claim["effect"])),
        (f"{100 * level:g}% interval" if level else "Interval", interval),
        ("n", _number(claim["n"])),
    ]
    numbers = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    why = f"<p>{escape(str(claim['why']))}</p>" if claim.get("why") else ""
    return f"""
<article class="card {verdict}">
<p class="verdict">{_badge(verdict, verdict)}
<span class="id">{escape(str(claim["id"]))}</span></p>
<h3>{escape(str(claim["statement"]))}</h3>
{why}
<dl class="facts">{numbers}</dl>
<details><summary>Decision rule and source</summary>
<p>{escape(str(claim["decision_rule"]))}</p>
<p class="quiet">Source: {escape(str(claim["source"]))}</p>
</details>
</article>"""


def _figure(figure: FigureSection) -> str:
    kind, source = ("png", figure.png) if figure.svg is None else ("svg+xml", figure.svg)
    data = base64.b64encode(Path(source).read_bytes()).decode()
    alt = escape(figure.alt or figure.caption)
    return f"""
<figure>
<h3>{escape(figure.title)}</h3>
<img src="data:image/{kind};base64,{data}" alt="{alt}">
<figcaption>{escape(figure.caption)}</figcaption>
</figure>"""


_COLUMNS = (  # heading, kind for sorting, the condition's key; None is always shown
    ("#", "number", "row"),
    ("Condition", "text", None),
    ("Agent", "text", "algo"),
    ("Norm", "text", "norm"),
    ("Modes", "text", "modes"),
    ("Ending", "text", "ending"),
    ("Mean return", "number", None),
    ("Lowest to highest seed", "number", None),
    ("Seeds", "number", None),
    ("Diverged", "number", None),
    ("κ", "number", "kappa"),
    ("Predicted", "text", "prediction"),
    ("As predicted", "text", "missed"),
)


def _table(conditions: Sequence[Mapping[str, Any]], returns_are: str) -> str:
    if not conditions:
        return ""
    # A column that no condition fills says nothing.
    shown = [
        key is None or any(condition.get(key) is not None for condition in conditions)
        for _, _, key in _COLUMNS
    ]
    head = "".join(
        f'<th scope="col" data-kind="{kind}">{name}</th>'
        for (name, kind, _), show in zip(_COLUMNS, shown, strict=True)
        if show
    )
    finite = [
        value for c in conditions for value in map(_finite, c["returns"]) if value is not None
    ]
    scale = (min(finite), max(finite)) if finite else (0.0, 1.0)
    rows = "\n".join(_row(condition, scale, shown) for condition in conditions)
    kappa = any(key == "kappa" and show for (*_, key), show in zip(_COLUMNS, shown, strict=True))
    meaning = (
        " κ is the share of the actor's gradient that is common to the whole batch."
        if kappa
        else ""
    )
    return f"""<div class="scroll" role="region" aria-label="All conditions" tabindex="0">
<table>
<caption>{escape(returns_are)}, one dot per seed, from {_number(scale[0])} to
{_number(scale[1])}.{meaning}
<span class="hint" hidden>Choose a heading to sort by it.</span></caption>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>"""


def _row(condition: Mapping[str, Any], scale: tuple[float, float], shown: Sequence[bool]) -> str:
    values = [value for value in map(_finite, condition["returns"]) if value is not None]
    lost = condition.get("diverged")
    lost = len(condition["returns"]) - len(values) if lost is None else lost
    mean = math.fsum(values) / len(values) if values else None
    spread = f"{_number(min(values))} to {_number(max(values))}" if values else _NONE
    missed = condition.get("missed")
    as_predicted = None if missed is None else "missed" if missed else "yes"
    span = f'<span class="range">{escape(spread)}</span>{_strip(values, scale)}'
    width = max(values) - min(values) if values else None
    cells = [
        _cell(condition.get("row"), numeric=True),
        f'<th scope="row">{escape(str(condition.get("label") or condition["name"]))}</th>',
        *(_cell(condition.get(key)) for key in ("algo", "norm")),
        _cell(condition.get("modes"), code=True),
        _cell(condition.get("ending")),
        _cell(mean, numeric=True),
        f'<td class="number" data-sort="{_sort_key(width)}">{span}</td>',
        _cell(len(condition["returns"]), numeric=True),
        _cell(lost, numeric=True),
        _cell(condition.get("kappa"), numeric=True),
        _cell(condition.get("prediction")),
        _cell(as_predicted, css="missed" if missed else ""),
    ]
    return f"<tr>{''.join(c for c, show in zip(cells, shown, strict=True) if show)}</tr>"


def _cell(value: Any, *, numeric: bool = False, code: bool = False, css: str = "") -> str:
    if numeric and not isinstance(value, str):
        css, sort, text = "number", _sort_key(value), escape(_number(value))
    else:
        sort = "" if value is None else escape(str(value))
        text = sort or _NONE
    inner = f"<code>{text}</code>" if code and sort else text
    return f'<td class="{css}" data-sort="{sort}">{inner}</td>'


def _sort_key(value: Any) -> str:
    """Full precision for the sort; empty, which sorts last, where there is no number."""
    number = _finite(value)
    return "" if number is None else repr(number)


def _strip(values: Sequence[float], scale: tuple[float, float]) -> str:
    """A dot per seed on the scale that all rows share; the numbers beside it say the same."""
    low, high = scale
    width = (high - low) or 1.0
    dots = "".join(
        f'<circle cx="{5 + 110 * (value - low) / width:.1f}" cy="7" r="3.5"></circle>'
        for value in values
    )
    return (
        '<svg class="strip" viewBox="0 0 120 14" width="120" height="14" aria-hidden="true">'
        f'<line x1="0" y1="7" x2="120" y2="7"></line>{dots}</svg>'
    )


def _run(study: Mapping[str, Any]) -> str:
    seeds = study["seeds"]
    facts = [
        ("Command", f"<code>{escape(str(study['command']))}</code>"),
        ("Seeds", escape(_listed(seeds))),
        ("Environment steps per run", escape(_number(study["steps"]))),
        ("Wall time", escape(duration(study["wall_s"]))),
    ]
    if study.get("machine"):
        facts.append(("Machine", escape(_listed(study["machine"]))))
    versions = "".join(
        f"<li>{escape(str(name))} <code>{escape(str(version))}</code></li>"
        for name, version in study["versions"].items()
    )
    if versions:
        facts.append(("Versions", f'<ul class="versions">{versions}</ul>'))
    return (
        '<dl class="run">'
        + "".join(f"<dt>{name}</dt><dd>{content}</dd>" for name, content in facts)
        + "</dl>"
    )


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def _finite(value: Any) -> float | None:
    """`value` as a float, or None if it is not a finite number."""
    if not isinstance(value, Real):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _number(value: Any) -> str:
    """A number to read: 30, 29.8, 0.031, 12,893, 2.1×10⁻⁸; a dash where there is none."""
    number = _finite(value)
    if number is None:
        return _NONE if value is None or isinstance(value, Real) else str(value)
    if number == 0:
        return "0"
    size = abs(number)
    if size < 1e-3 or size >= 1e7:
        mantissa, exponent = f"{number:.1e}".split("e")
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"{mantissa}×10{raised}"
    elif number.is_integer():
        text = f"{number:,.0f}"
    else:
        digits = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 0.1 else 4
        text = f"{number:,.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def duration(seconds: Any) -> str:
    """Seconds in words, such as ``3 min 20 s``."""
    number = _finite(seconds)
    if number is None:
        return "unknown time"
    if number < 60:
        return f"{number:.1f} s"
    minutes, rest = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


STYLE = """
:root {
  --page: #ffffff; --card: #f6f7f8; --ink: #1b1b1b; --quiet: #5c6166; --line: #d9dcdf;
  --link: #005a94; --good: #00694c; --good-soft: #e0f3ec; --bad: #a8381b; --bad-soft: #fbe8e0;
  --open: #54595e; --open-soft: #e9ebed;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1d2125; --ink: #e8eaec; --quiet: #a3a9af; --line: #373d43;
    --link: #7cc4f5; --good: #62d6ae; --good-soft: #10362b; --bad: #ff9d7a; --bad-soft: #43200f;
    --open: #c0c6cb; --open-soft: #30363b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--page);
  color: var(--ink); overflow-wrap: break-word;
  font: 1.0625rem/1.6 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
}
h1 { font-size: clamp(1.6rem, 1.1rem + 2.2vw, 2.4rem); line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.45rem; line-height: 1.3; margin: 3rem 0 1rem; }
h3 { font-size: 1.1rem; line-height: 1.4; margin: 0 0 .5rem; }
p { margin: 0 0 .9rem; }
#answer p, #answer ul, #answer ol { max-width: 44rem; }
a { color: var(--link); }
code {
  font: .9em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere;
}
.kicker, .quiet, figcaption, caption { color: var(--quiet); }
.kicker { margin: 0; letter-spacing: .02em; }
.tally {
  display: flex; flex-wrap: wrap; gap: .5rem .75rem; align-items: center; color: var(--quiet);
}
nav ul {
  display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: 0; padding: 0;
}
.badge {
  display: inline-block; padding: .1rem .7rem; border-radius: 1rem; font-weight: 650;
  font-size: .95rem; white-space: nowrap;
}
.badge.supported { color: var(--good); background: var(--good-soft); }
.badge.refuted { color: var(--bad); background: var(--bad-soft); }
.badge.inconclusive { color: var(--open); background: var(--open-soft); }
.cards {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
}
.card {
  display: flex; flex-direction: column; padding: 1.1rem 1.2rem; background: var(--card);
  border-radius: .6rem; border-top: .25rem solid var(--open);
}
.card.supported { border-top-color: var(--good); }
.card.refuted { border-top-color: var(--bad); }
.verdict { display: flex; justify-content: space-between; align-items: center; }
.id { color: var(--quiet); font-weight: 650; }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 1.75rem; margin: auto 0 .75rem; }
.facts dt { color: var(--quiet); font-size: .875rem; }
.facts dd { margin: 0; font-weight: 650; font-variant-numeric: tabular-nums; }
details p { margin: .5rem 0 0; font-size: .95rem; }
summary { cursor: pointer; color: var(--link); }
figure { margin: 0 0 2.5rem; }
figure img {
  display: block; width: 100%; height: auto; background: #ffffff; border-radius: .5rem;
  border: 1px solid var(--line);
}
figcaption { margin-top: .6rem; max-width: 50rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; line-height: 1.4; }
caption { text-align: left; padding: .7rem .8rem; }
th, td {
  padding: .5rem .8rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
}
thead th { white-space: nowrap; vertical-align: bottom; color: var(--quiet); font-weight: 600; }
tbody th { min-width: 13rem; font-weight: 600; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.missed { color: var(--bad); font-weight: 650; }
th button {
  all: unset; cursor: pointer; color: var(--link); font: inherit; white-space: nowrap;
}
th button:focus-visible, a:focus-visible, summary:focus-visible, .scroll:focus-visible {
  outline: 3px solid var(--link); outline-offset: 2px;
}
th[aria-sort="ascending"] button::after { content: " ▲"; }
th[aria-sort="descending"] button::after { content: " ▼"; }
.range { display: block; }
.strip { display: block; margin-top: .2rem; }
.strip line { stroke: var(--line); stroke-width: 1.5; }
.strip circle { fill: var(--link); fill-opacity: .65; }
.run { display: grid; grid-template-columns: max-content 1fr; gap: .5rem 1.5rem; margin: 0; }
.run dt { color: var(--quiet); }
.run dd { margin: 0; min-width: 0; }
.versions {
  display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; list-style: none; margin: 0; padding: 0;
}
@media (max-width: 34rem) {
  .run { grid-template-columns: 1fr; gap: 0; }
  .run dd { margin-bottom: .75rem; }
}
@media print { nav, .hint { display: none; } .card, figure { break-inside: avoid; } }
"""

# The headings become buttons here and not in the HTML: without JavaScript no dead button shows.
SORT_SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, index) => {
    const cell = row.cells[index];
    return cell.hasAttribute("data-sort") ? cell.dataset.sort : cell.textContent;
  };
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const sign = down ? -1 : 1;
      const compare = head.dataset.kind === "number"
        ? (a, b) => Number(a) - Number(b)
        : (a, b) => a.localeCompare(b, undefined, { numeric: true });
      const rows = [...body.rows].sort((first, second) => {
        const a = key(first, index), b = key(second, index);
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * compare(a, b);
      });
      body.append(...rows);
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  });
  for (const hint of table.querySelectorAll(".hint")) hint.hidden = false;
}
"""
