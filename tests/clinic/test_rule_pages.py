"""The rules' pages say what the rules say, and every rule has all that a page needs."""

import importlib.util
import re
from pathlib import Path

import pytest

from batchproof.clinic.rules import FAMILIES, all_rules

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("rule_pages", ROOT / "benchmarks" / "rule_pages.py")
rule_pages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rule_pages)
RULES = all_rules()


def test_pages_are_not_stale():
    docs = ROOT / "docs"
    found = {
        str(path.relative_to(docs)): path.read_text(encoding="utf-8")
        for path in [docs / "rules.md", *(docs / "rules").glob("*.md")]
    }
    assert found == rule_pages.pages(), "run: python benchmarks/rule_pages.py"


def test_every_family_has_rules():
    assert {rule.family for rule in RULES.values()} == set(FAMILIES.values())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_says_all_that_its_page_needs(rule):
    assert re.fullmatch(r"BP[1-6]\d\d", rule.code)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", rule.name)
    for told in (rule.what, rule.detected, rule.why, rule.mend):
        assert told.endswith("."), told
    assert len(rule.title) < 90
    assert not rule.title.endswith(".")


def test_names_are_not_shared():
    assert len({rule.name for rule in RULES.values()}) == len(RULES)


def test_every_fix_exists_and_is_as_safe_as_its_rule_says():
    from batchproof.clinic.fix import FIXES

    named = {rule.fix: rule.safe for rule in RULES.values() if rule.fix}
    assert {name: FIXES[name].safe for name in named} == named


def test_markup_in_a_field_is_shown_and_not_obeyed():
    assert rule_pages.text("a*b|c <d> `x*y`") == r"a\*b\|c \<d\> `x*y`"
