"""An audit's report as one HTML page: opens offline, holds everything, runs no script.

Every value is escaped, and the page's own policy forbids scripts and anything from elsewhere: what
is shown may come from a file that nobody has vouched for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from batchproof import __version__
from batchproof.clinic import formats
from batchproof.clinic.probe import LayerFacts
from batchproof.clinic.rules import FAMILIES, RULES, Finding, Outcome, Report, Status
from batchproof.modes import Plan, Slot
from batchproof.study.report import STYLE as HOUSE_STYLE  # one look for every page

if TYPE_CHECKING:
    from batchproof.clinic.trace import Trace

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_MARKS = {
    Status.FAIL: ("refuted", "✗"),
    Status.REVIEW: ("review", "!"),
    Status.PASS: ("supported", "✓"),
    Status.NOT_APPLICABLE: ("inconclusive", "–"),
    Status.SKIPPED: ("inconclusive", "?"),
}


def html(report: Report, trace: Trace | None = None) -> str:
    """The report as one self-contained page.

    Args:
        report: of `batchproof.clinic.audit`.
        trace: of one update of the same subject, shown where it is given.
    """
    sections = [
        ("findings", "What was found", _findings(report)),
        ("layers", "Layer by layer", _networks(report)),
        ("update", "What one update used", _trace(trace)),
        ("rules", "Every rule", _rules(report)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{key}">{head}</a></li>' for key, head, _ in shown)
    body = "\n".join(
        f'<section id="{key}" aria-labelledby="{key}-head"><h2 id="{key}-head">{head}</h2>\n'
        f"{content}\n</section>"
        for key, head, content in shown
    )
    name = _text(report.subject)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Audit of {name}</title>
<style>{HOUSE_STYLE}{_STYLE}</style>
</head>
<body>
<header>
<p class="kicker">Batchproof {escape(__version__)} audit</p>
<h1>{name}</h1>
<p class="tally">{_tally(report)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _text(value: object) -> str:
    return escape(formats.printable(str(value)))


def _prose(value: str) -> str:
    """Escaped text, with what stands in backticks as code."""
    parts = _text(value).split("`")
    return "".join(f"<code>{p}</code>" if index % 2 else p for index, p in enumerate(parts))


def _badge(status: Status, text: str) -> str:
    css, mark = _MARKS[status]
    # The mark says it without colour; the word does so for screen readers.
    return f'<span class="badge {css}"><span aria-hidden="true">{mark}</span> {_text(text)}</span>'


def _tally(report: Report) -> str:
    counts = formats.counted(report.outcomes.values())
    badges = [
        _badge(status, f"{count} {formats.word(status)}")
        for status, count in counts.items()
        if count
    ]
    return " ".join([*badges, f"<span>{report.seconds:.1f} s</span>"])


def _findings(report: Report) -> str:
    found = [
        (code, outcome)
        for status in (Status.FAIL, Status.REVIEW)
        for code, outcome in report.outcomes.items()
        if outcome.status is status
    ]
    if not found:
        return "<p>No rule failed, and there is nothing to review.</p>"
    return "\n".join(_finding_card(code, outcome, report.saves) for code, outcome in found)


def _finding_card(code: str, outcome: Outcome, saves: bool) -> str:
    rule = RULES[code]
    css, _ = _MARKS[outcome.status]
    items = "".join(
        f"<li><p>{_text(finding.message)}</p>{_facts(finding)}</li>" for finding in outcome.findings
    )
    parts = (
        ("Why it matters", rule.why),
        ("How it is detected", rule.detected),
    )
    more = "".join(f"<h4>{head}</h4><p>{_prose(told)}</p>" for head, told in parts if told)
    mend = f"<p><strong>What to do:</strong> {_prose(rule.mend)}</p>" if rule.mend else ""
    command = formats.fix_command(rule, saves)
    if command:
        kept = "outputs as deployed stay as they are" if rule.safe else "outputs or learning change"
        mend += f'<p><code>{_text(command)}</code> <span class="quiet">({kept})</span></p>'
    return f"""<article class="card {css}" id="{_text(code)}">
<p class="verdict">{_badge(outcome.status, formats.word(outcome.status))}
<span class="id">{_text(code)} {_text(rule.name)}</span></p>
<h3>{_text(formats.title(rule))}</h3>
<ul class="finds">{items}</ul>
{mend}
<details><summary>Why, and how it was measured</summary>{more}
<p><a href="{formats.DOCS}/rules/{_text(code)}.md">The rule's page</a></p></details>
</article>"""


def _facts(finding: Finding) -> str:
    pairs = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>"
        for label, value in formats.facts(finding)
    )
    return f'<dl class="facts">{pairs}</dl>' if pairs else ""


def _networks(report: Report) -> str:
    """Every network's layers in the order of its forward pass, with what each does to a batch."""
    networks: dict[str, list[LayerFacts]] = {}
    for fact in report.facts:
        networks.setdefault(fact.role, []).append(fact)
    if not networks:
        return (
            "<p>No layer couples the rows of a batch, moves statistics or draws at random: in "
            "train and in eval mode every network does the same to each row.</p>"
        )
    finite = [f.mode_gap for f in report.facts if math.isfinite(f.mode_gap)]
    widest = max(finite, default=0.0)
    columns = "".join(_network(role, facts, report, widest) for role, facts in networks.items())
    return (
        "<p>Only layers that couple the rows of a batch, move statistics or draw at random, from "
        "input to output. The bar is the mode gap: the largest difference between the layer's "
        f"output in train and in eval mode on one batch.</p>\n<div class='networks'>{columns}</div>"
    )


def _network(role: str, layers: list[LayerFacts], report: Report, widest: float) -> str:
    items = "".join(_layer(fact, report, widest) for fact in layers)
    return (
        f'<article class="network"><h3>{_text(role)}</h3>'
        f'<ol><li class="end">input</li>{items}<li class="end">output</li></ol></article>'
    )


def _layer(fact: LayerFacts, report: Report, widest: float) -> str:
    blamed = [
        code
        for code, outcome in report.outcomes.items()
        if outcome.status in (Status.FAIL, Status.REVIEW)
        and any(
            finding.network == fact.role and fact.path in (finding.first, finding.largest)
            for finding in outcome.findings
        )
    ]
    status = min(
        (report.outcomes[code].status for code in blamed), key=list(Status).index, default=None
    )
    links = " ".join(
        f'<a class="blame" href="#{_text(code)}" title="{_text(RULES[code].title)}">'
        f"{_text(code)} {_text(RULES[code].name)}</a>"
        for code in blamed
    )
    rows = "".join(
        f"<tr><th scope='row'>{mode}</th><td>{_does(couples, moves, draws)}</td></tr>"
        for mode, couples, moves, draws in (
            ("train", fact.couples_train, fact.moves_train, fact.random_train),
            ("eval", fact.couples_eval, fact.moves_eval, fact.random_eval),
        )
    )
    css = _MARKS[status][0] if status is not None else ""
    return (
        f'<li class="layer {css}"><p class="path"><code>{_text(fact.path or fact.role)}</code> '
        f'<span class="quiet">{_text(fact.kind)}</span></p>'
        f'<table class="does">{rows}</table>{_bar(fact.mode_gap, widest)}'
        + (f'<p class="blames">{links}</p>' if links else "")
        + "</li>"
    )


def _does(couples: bool, moves: Iterable[str], draws: bool) -> str:
    buffers = ", ".join(_text(name) for name in moves)
    said = [
        "<b>couples rows</b>" if couples else "",
        f"<b>moves</b> {buffers}" if buffers else "",
        "<b>random</b>" if draws else "",
    ]
    return "; ".join(part for part in said if part) or "each row alone, nothing moves"


def _bar(gap: float, widest: float) -> str:
    if not math.isfinite(gap):
        return '<p class="gap">mode gap: not finite</p>'
    width = 100 * gap / widest if widest > 0 else 0.0
    return (
        f'<p class="gap"><span>mode gap {formats.number(gap)}</span>'
        '<svg viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="6"></rect>'
        f'<rect class="fill" width="{width:.1f}" height="6"></rect></svg></p>'
    )


def _trace(trace: Trace | None) -> str:
    if trace is None:
        return ""
    told = ""
    if trace.plan:
        plan = Plan.parse(trace.plan)
        slots = [slot for slot in Slot if slot is not Slot.ACT or len(trace.plan) == 6]
        rows = "".join(
            f"<tr><td>{slot.value}</td><td><code>{plan[slot]}</code></td>"
            f"<th scope='row'>{_text(slot.title)}</th><td>{_text(plan[slot].title)}</td></tr>"
            for slot in slots
        )
        told = (
            f"<p>The plan of the update that was traced is <code>{_text(trace.plan)}</code>.</p>"
            '<div class="scroll" role="region" aria-label="Plan" tabindex="0"><table><thead><tr>'
            '<th scope="col">Slot</th><th scope="col">Mode</th><th scope="col">Pass</th>'
            f'<th scope="col">Statistics</th></tr></thead><tbody>{rows}</tbody></table></div>'
        )
    lines = escape("\n".join(formats.printable(line) for line in str(trace).splitlines()))
    return (
        f"{told}<details><summary>Every call</summary>"
        f'<pre class="scroll" tabindex="0">{lines}</pre></details>'
    )


def _rules(report: Report) -> str:
    groups = []
    for number, name in FAMILIES.items():
        ran = list(formats.of_family(report, number))
        if not ran:
            continue
        counts = formats.counted(outcome for _, outcome in ran)
        tally = ", ".join(f"{n} {formats.word(status)}" for status, n in counts.items() if n)
        rows = "".join(
            f"<tr><td>{_badge(outcome.status, formats.word(outcome.status))}</td>"
            f"<th scope='row'>{_text(rule.code)} {_text(rule.name)}</th>"
            f"<td>{_text(outcome.reason or formats.title(rule))}</td></tr>"
            for rule, outcome in ran
        )
        groups.append(
            f"<details><summary>{_text(name)}: {_text(tally)}</summary>"
            f'<div class="scroll" role="region" aria-label="{_text(name)}" tabindex="0">'
            f"<table><tbody>{rows}</tbody></table></div></details>"
        )
    return "\n".join(groups)


_STYLE = """
:root { --warn: #7a5200; --warn-soft: #fbefd5; }
@media (prefers-color-scheme: dark) { :root { --warn: #f0c263; --warn-soft: #3d2f10; } }
.badge.review { color: var(--warn); background: var(--warn-soft); }
.card { margin-bottom: 1rem; }
.card.review { border-top-color: var(--warn); }
.verdict { flex-wrap: wrap; gap: .25rem 1rem; }
.facts { margin: 0 0 .75rem; gap: .25rem 1.75rem; }
.facts div, .facts dd { min-width: 0; overflow-wrap: anywhere; }
.finds { margin: 0 0 .5rem; padding-left: 1.2rem; }
.finds p { margin-bottom: .35rem; }
h4 { margin: .9rem 0 0; font-size: 1rem; }
.networks {
  display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
}
.network { min-width: 0; }
.network ol { list-style: none; margin: 0; padding: 0; }
.network li { position: relative; margin: 0 0 1rem; }
.network li:not(:last-child)::after {
  content: ""; position: absolute; left: 1.5rem; top: 100%; height: 1rem;
  border-left: 2px solid var(--line);
}
.network .end { color: var(--quiet); padding-left: 1rem; }
.layer {
  padding: .7rem .9rem; background: var(--card); border-radius: .5rem;
  border-left: .3rem solid var(--line);
}
.layer.refuted { border-left-color: var(--bad); }
.layer.review { border-left-color: var(--warn); }
.layer p { margin: 0; }
.does { margin: .35rem 0; }
.does th, .does td { border: 0; padding: .05rem .6rem .05rem 0; overflow-wrap: anywhere; }
.does th { min-width: 0; width: 3.4rem; color: var(--quiet); font-weight: 400; }
.gap { font-size: .9rem; color: var(--quiet); }
.gap svg { display: block; width: 100%; height: .5rem; border-radius: .25rem; }
.gap .track { fill: var(--line); }
.gap .fill { fill: var(--link); }
.blames { padding-top: .4rem; }
.blame { display: inline-block; margin-right: .75rem; font-size: .92rem; }
#rules details { margin-bottom: .75rem; }
#rules details .scroll, #update details .scroll { margin-top: .5rem; }
pre { padding: .8rem; font-size: .85rem; }
pre:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
"""
