"""A report in the forms that people and machines read: text, JSON, SARIF, JUnit and HTML.

Each form is a function from a report to the text of one file. What comes from the subject (names of
layers, messages) is made printable, or escaped, on the way: a model's file may hold anything.
"""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from batchproof import __version__, records
from batchproof.clinic.rules import FAMILIES, RULES, Finding, Outcome, Report, Rule, Status

DOCS = "https://github.com/batchproof/batchproof/blob/main/docs"
"""Where the rule pages are."""

_COLORS = {Status.FAIL: "31;1", Status.REVIEW: "33;1", Status.PASS: "32"}
_WORDS = {Status.NOT_APPLICABLE: "not applicable"}
_LEVELS = {Status.FAIL: "error", Status.REVIEW: "warning"}


def text(report: Report, *, color: bool = False, width: int = 100) -> str:
    """The report for a terminal.

    Args:
        report: of `batchproof.clinic.audit`.
        color: whether to write ANSI colours.
        width: columns.
    """

    def painted(word: str, status: Status) -> str:
        code = _COLORS.get(status)
        return f"\x1b[{code}m{word}\x1b[0m" if color and code else word

    def wrapped(line: str, indent: int) -> list[str]:
        pad = " " * indent
        return textwrap.wrap(
            line,
            max(width, 40),
            initial_indent=pad,
            subsequent_indent=pad,
            break_on_hyphens=False,
            break_long_words=False,
        )

    lines = [f"{printable(report.subject)}: {summary(report)}", ""]
    widest = max(map(len, FAMILIES.values())) + 2
    lines.append(" " * widest + "".join(f"  {word(status)}" for status in Status))
    for number, name in FAMILIES.items():
        counts = counted(outcome for _, outcome in of_family(report, number))
        cells = ""
        for status in Status:
            cell = str(counts[status] or "-").rjust(len(word(status)))
            cells += "  " + (painted(cell, status) if counts[status] else cell)
        lines.append(f"{number} {name}".ljust(widest) + cells)

    for status in (Status.FAIL, Status.REVIEW):
        for code, outcome in report.outcomes.items():
            if outcome.status is not status:
                continue
            rule = RULES[code]
            lines += [
                "",
                f"{painted(str(status).upper(), status)} {code} {rule.name}: {title(rule)}",
            ]
            for finding in outcome.findings:
                lines += ["", *wrapped(printable(finding.message), 2)]
                for label, value in facts(finding):
                    lines += wrapped(f"{label}: {printable(value)}", 4)
            for head, advice in (
                ("What to do", rule.mend),
                ("Fix", fix_in_words(rule, report.saves)),
            ):
                lines += ["", *wrapped(f"{head}: {advice}", 2)] if advice else []

    for status in (Status.SKIPPED, Status.NOT_APPLICABLE):
        reasons: dict[str, list[str]] = {}
        for code, outcome in report.outcomes.items():
            if outcome.status is status:
                reasons.setdefault(printable(outcome.reason), []).append(code)
        if reasons:
            told = "could not be checked" if status is Status.SKIPPED else "nothing to check"
            lines += ["", f"{word(status)} ({told}):"]
            for reason, codes in reasons.items():
                lines += wrapped(f"{', '.join(codes)}: {reason}", 2)
    if report.findings:
        lines += ["", "More on a rule: batchproof explain CODE"]
    return "\n".join(lines) + "\n"


def to_json(report: Report) -> str:
    """The report as strict JSON: what is not a finite number is null."""
    content = {
        "format": "batchproof-audit-1",
        "version": __version__,
        "subject": report.subject,
        "clean": report.clean,
        "seconds": report.seconds,
        "counts": {str(k): n for k, n in counted(report.outcomes.values()).items()},
        "rules": [
            {
                "code": code,
                "name": RULES[code].name,
                "title": RULES[code].title,
                "family": RULES[code].family,
                "status": str(outcome.status),
                "reason": outcome.reason,
                "seconds": outcome.seconds,
                "fix": RULES[code].fix or None,
                "fix_safe": RULES[code].safe if RULES[code].fix else None,
                "findings": [vars(finding) for finding in outcome.findings],
            }
            for code, outcome in report.outcomes.items()
        ],
        "layers": [
            {
                "network": fact.role,
                "path": fact.path,
                "kind": fact.kind,
                "couples_train": fact.couples_train,
                "couples_eval": fact.couples_eval,
                "moves_train": fact.moves_train,
                "moves_eval": fact.moves_eval,
                "random_train": fact.random_train,
                "random_eval": fact.random_eval,
                "mode_gap": fact.mode_gap,
                "momentum": fact.momentum,
            }
            for fact in report.facts
        ],
    }
    return json.dumps(records.to_json(content), indent=1, allow_nan=False) + "\n"


def sarif(report: Report, *, artifact: str | PurePath | None = None) -> str:
    """The report as SARIF 2.1.0, for code scanning.

    A rule that could not run is a notification of the invocation, so that it cannot be read as
    passed.

    Args:
        report: of `batchproof.clinic.audit`.
        artifact: the audited file, relative to the repository, for viewers that show findings
            only where they have a file.
    """
    codes = list(report.outcomes)
    run = {
        "tool": {
            "driver": {
                "name": "batchproof",
                "semanticVersion": __version__,
                "informationUri": DOCS.rsplit("/blob/", 1)[0],
                "rules": [_sarif_rule(RULES[code]) for code in codes],
            }
        },
        "invocations": [
            {
                "executionSuccessful": True,
                "toolExecutionNotifications": [
                    {
                        "level": "warning" if outcome.status is Status.SKIPPED else "note",
                        "message": {"text": f"{code} {word(outcome.status)}: {outcome.reason}"},
                        "associatedRule": {"id": code, "index": codes.index(code)},
                    }
                    for code, outcome in report.outcomes.items()
                    if outcome.status in (Status.SKIPPED, Status.NOT_APPLICABLE)
                ],
            }
        ],
        "results": list(_sarif_results(report, codes, artifact)),
        "properties": {"subject": report.subject, "seconds": report.seconds},
    }
    content = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [run],
    }
    return json.dumps(records.to_json(content), indent=1, allow_nan=False) + "\n"


def _sarif_rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": "".join(part.capitalize() for part in rule.name.split("-")),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": " ".join(filter(None, (rule.what, rule.why))) or rule.title},
        "help": {"text": rule.mend or rule.title},
        "helpUri": f"{DOCS}/rules/{rule.code}.md",
        "defaultConfiguration": {"level": "error"},
        "properties": {"tags": [rule.family]},
    }


def _sarif_results(
    report: Report, codes: list[str], artifact: str | PurePath | None
) -> Iterator[dict[str, Any]]:
    seen: dict[str, int] = {}
    for code, outcome in report.outcomes.items():
        if outcome.status not in _LEVELS:
            continue
        for finding in outcome.findings:
            # The place and not the numbers, so that a finding stays the same one in the next run.
            place = "\0".join((code, finding.network, finding.first, finding.largest, finding.site))
            seen[place] = seen.get(place, 0) + 1
            key = hashlib.sha256(f"{place}\0{seen[place]}".encode()).hexdigest()
            location: dict[str, Any] = {}
            if layers := modules(finding):
                location["logicalLocations"] = [
                    {"fullyQualifiedName": name, "kind": "member"} for name in layers
                ]
            if artifact is not None:
                path = PurePath(artifact)
                uri = path.as_uri() if path.is_absolute() else quote(path.as_posix())
                location["physicalLocation"] = {"artifactLocation": {"uri": uri}}
            said = "; ".join(f"{label}: {value}" for label, value in facts(finding))
            yield {
                "ruleId": code,
                "ruleIndex": codes.index(code),
                "level": _LEVELS[outcome.status],
                "message": {"text": finding.message + (f" ({said})" if said else "")},
                "locations": [location] if location else [],
                "partialFingerprints": {"batchproofPlace/v1": key},
                "properties": {
                    "site": finding.site,
                    "value": finding.value,
                    "floor": finding.floor,
                    "threshold": finding.threshold,
                    "effect": finding.effect,
                },
            }


def junit(report: Report) -> str:
    """The report as JUnit XML: one test case for each rule.

    What failed is a failure; what was skipped or not applicable is skipped with its reason; what
    should be reviewed passes, with its findings as output.
    """
    counts = counted(report.outcomes.values())
    numbers = {
        "tests": str(len(report.outcomes)),
        "failures": str(counts[Status.FAIL]),
        "errors": "0",
        "skipped": str(counts[Status.SKIPPED] + counts[Status.NOT_APPLICABLE]),
        "time": f"{report.seconds:.3f}",
    }
    top = ElementTree.Element("testsuites", {"name": "batchproof", **numbers})
    suite = ElementTree.SubElement(top, "testsuite", {"name": printable(report.subject), **numbers})
    for code, outcome in report.outcomes.items():
        rule = RULES[code]
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {
                "classname": f"batchproof.{rule.family}",
                "name": f"{code} {rule.name}",
                "time": f"{outcome.seconds:.3f}",
            },
        )
        told = "\n\n".join(
            "\n".join([f.message, *(f"{label}: {value}" for label, value in facts(f))])
            for f in outcome.findings
        )
        if outcome.status is Status.FAIL:
            failure = ElementTree.SubElement(
                case, "failure", {"type": code, "message": printable(rule.title)}
            )
            failure.text = printable(f"{told}\n\nWhat to do: {rule.mend}", keep="\n")
        elif outcome.status is Status.REVIEW:
            shown = ElementTree.SubElement(case, "system-out")
            shown.text = printable(f"to review: {rule.title}\n\n{told}", keep="\n")
        elif outcome.status is not Status.PASS:
            reason = printable(f"{word(outcome.status)}: {outcome.reason}")
            ElementTree.SubElement(case, "skipped", {"message": reason})
    ElementTree.indent(top)
    body = ElementTree.tostring(top, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'


def html(report: Report, trace: Any = None) -> str:
    """The report as one self-contained page, see `batchproof.clinic.page`."""
    from batchproof.clinic import page

    return page.html(report, trace)


FORMATS: dict[str, Callable[[Report], str]] = {
    "text": text,
    "json": to_json,
    "sarif": sarif,
    "junit": junit,
    "html": html,
}
"""Every form by the name that ``--format`` takes."""


def summary(report: Report) -> str:
    """The report in one line: how many rules failed, passed and so on."""
    counts = counted(report.outcomes.values())
    said = {
        Status.FAIL: "failed",
        Status.REVIEW: "to review",
        Status.PASS: "passed",
        Status.NOT_APPLICABLE: "not applicable",
        Status.SKIPPED: "skipped",
    }
    parts = [f"{counts[status]} {words}" for status, words in said.items() if counts[status]]
    return f"{', '.join(parts) or 'no rule ran'} ({report.seconds:.1f} s)"


def word(status: Status) -> str:
    """A status as people write it."""
    return _WORDS.get(status, str(status))


def counted(outcomes: Any) -> dict[Status, int]:
    """How many outcomes have each status; every status is there."""
    found = [outcome.status for outcome in outcomes]
    return {status: found.count(status) for status in Status}


def of_family(report: Report, number: int) -> Iterator[tuple[Rule, Outcome]]:
    """The rules of one family with what came of them."""
    for code, outcome in report.outcomes.items():
        if code[2] == str(number):
            yield RULES[code], outcome


def modules(finding: Finding) -> list[str]:
    """``network.path`` of the first and the largest diverging module, where known."""
    paths = dict.fromkeys(path for path in (finding.first, finding.largest) if path)
    names = [f"{finding.network}.{path}" if finding.network else path for path in paths]
    return names or ([finding.network] if finding.network else [])


def facts(finding: Finding) -> list[tuple[str, str]]:
    """Where and how much, as labels and values; what is unknown is left out."""
    names = modules(finding)
    where = names[0] if names else ""
    if len(names) > 1:
        where += f" first, {names[1]} most"
    numbers = [
        f"{label} {number(value)}"
        for label, value in (
            ("", finding.value),
            ("floor", finding.floor),
            ("threshold", finding.threshold),
        )
        if not math.isnan(value)
    ]
    told = [
        ("where", ", ".join(filter(None, (where, finding.site)))),
        ("value", ", ".join(numbers).strip()),
        ("effect", finding.effect),
    ]
    return [(label, value) for label, value in told if value]


def title(rule: Rule) -> str:
    """The rule's title as the beginning of a line."""
    return rule.title[:1].upper() + rule.title[1:]


def fix_command(rule: Rule, saves: bool = True) -> str:
    """The command or, where it cannot ``save``, the call that mends a finding, '' where none."""
    if rule.fix == "set-modes" and not saves:
        return ""  # modules and runs of the lab take no plan: the finding says what to do
    if rule.fix and not saves:
        more = "" if rule.safe else ", unsafe=True"
        return f'batchproof.clinic.fix.fix(subject, report, only=["{rule.code}"]{more})'
    flags = f"--only {rule.code}" + ("" if rule.safe else " --unsafe")
    return f"batchproof fix MODEL -o OUT {flags}" if rule.fix else ""


def fix_in_words(rule: Rule, saves: bool = True) -> str:
    """The fix, whether it is safe, and its `fix_command`, '' where there is none."""
    kind = "outputs as deployed stay as they are" if rule.safe else "outputs or learning change"
    command = fix_command(rule, saves)
    return f"`{rule.fix}` ({kind}): {command}" if command else ""


def number(value: float) -> str:
    """A number in four digits."""
    return f"{value:.4g}"


def printable(value: str, keep: str = "") -> str:
    """The text without control characters: a file's names must not steer a terminal or break XML.

    Args:
        value: any text.
        keep: characters to let through all the same.
    """
    return "".join(
        c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in value
    )
