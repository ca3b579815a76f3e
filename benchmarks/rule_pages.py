"""The pages of the rules: docs/rules.md and one file for each rule in docs/rules/.

    python benchmarks/rule_pages.py [DOCS]

They say what the rules' own fields say; a test compares the two.
"""

from __future__ import annotations

import sys
from pathlib import Path

from batchproof.clinic.formats import fix_command, title
from batchproof.clinic.rules import FAMILIES, Rule, all_rules

DOCS = Path(__file__).resolve().parents[1] / "docs"


def text(value: str) -> str:
    """Plain text as Markdown: nothing in it is markup, apart from code in backticks."""
    parts = value.split("`")
    for index in range(0, len(parts), 2):
        for char in "\\*_<>|[]":
            parts[index] = parts[index].replace(char, f"\\{char}")
    return "`".join(parts)


def page(rule: Rule) -> str:
    """One rule's page."""
    if rule.fix:
        kind = (
            "safe: outputs as deployed stay as they are"
            if rule.safe
            else "unsafe: outputs or learning change, so it must be asked for"
        )
        fix = f"`{rule.fix}`, {kind}.\n\n```\n{fix_command(rule)}\n```"
    else:
        fix = "None is automatic."
    sections = {
        "What it does": text(rule.what),
        "How it is detected": text(rule.detected),
        "Why it matters": text(rule.why),
        "How to mend it": text(rule.mend),
        "Fix": fix,
        "References": "\n".join(
            f"- <{ref}>" if ref.startswith("https://") and " " not in ref else f"- {text(ref)}"
            for ref in rule.references
        ),
    }
    body = "\n\n".join(f"## {head}\n\n{told}" for head, told in sections.items() if told)
    return (
        f"# {rule.code} {rule.name}\n\n{text(title(rule))}. "
        f"Family: [{rule.family}](../rules.md).\n\n{body}\n"
    )


def index(rules: dict[str, Rule]) -> str:
    """The list of all rules."""
    parts = [
        "# Rules\n\n"
        "What `batchproof audit` checks. A code is never given to another rule. "
        "`batchproof rules` prints this list, `batchproof explain CODE` one page; "
        "[Audit](audit.md) says how to read what comes of them.\n"
    ]
    for number, family in FAMILIES.items():
        rows = [
            f"| [{r.code}](rules/{r.code}.md) | `{r.name}` | {text(title(r))} | {safety(r)} |"
            for r in rules.values()
            if r.code[2] == str(number)
        ]
        head = (
            f"## {number}xx: {family}\n\n| code | name | what is wrong | fix |\n|---|---|---|---|\n"
        )
        parts.append(head + "\n".join(rows) + "\n")
    return "\n".join(parts)


def safety(rule: Rule) -> str:
    """The fix with its kind, in a cell."""
    return f"`{rule.fix}`, {'safe' if rule.safe else 'unsafe'}" if rule.fix else "-"


def pages() -> dict[str, str]:
    """Every file's text by its path under docs/."""
    rules = all_rules()
    return {"rules.md": index(rules)} | {f"rules/{r.code}.md": page(r) for r in rules.values()}


def main(docs: Path = DOCS) -> None:
    wanted = pages()
    (docs / "rules").mkdir(parents=True, exist_ok=True)
    for path in (docs / "rules").glob("BP*.md"):
        if f"rules/{path.name}" not in wanted:
            path.unlink()
    for name, told in wanted.items():
        (docs / name).write_text(told, encoding="utf-8")
    print(f"{docs}: {len(wanted)} pages")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
