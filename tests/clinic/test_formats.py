"""Reports made by hand, in every form, read back by independent parsers."""

import json
import math
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from batchproof.clinic import formats, page, rules
from batchproof.clinic.rules import Finding, Report, Rule, Status, Subject, audit

EVIL = "<script>alert('x')</script>\x1b[31m\x00\n&\"]]>"


@pytest.fixture(autouse=True)
def hand_made_rules(monkeypatch):
    """Five rules in the registry, as codes that no real rule has."""
    mine = {
        code: Rule(
            code,
            name,
            f"title of {code}",
            check=lambda exam: rules.passed(),
            what="What it does.",
            detected="value > 2 floor",
            why="Why it matters.",
            mend="Do that.",
            fix=fix,
            safe=False,
            references=("https://example.org/1",),
        )
        for code, name, fix in (
            ("BP191", "rows-depend", "recalibrate"),
            ("BP291", "modes-differ", ""),
            ("BP391", "slot-blind", ""),
            ("BP491", "never-run", ""),
            ("BP591", "no-normalizer", ""),
        )
    }
    # Before the names are replaced: modules imported after that would keep `mine` for good.
    rules.all_rules()
    monkeypatch.setattr(rules, "RULES", mine)
    monkeypatch.setattr(formats, "RULES", mine)
    monkeypatch.setattr(page, "RULES", mine)


def outcome(status, *findings, reason="", code=""):
    return rules.Outcome(status, reason, findings, code, 0.25)


FOUND = Finding(
    "row 0 moves the action of row 1",
    network="actor",
    first="mu.1",
    largest="mu.4",
    site="act",
    value=0.5,
    floor=1e-7,
    threshold=6.4e-6,
    effect="0.5 action units, 12.50% of the range",
)
LOOK = Finding("may be meant", network="critic", value=math.inf, threshold=math.nan)


@pytest.fixture
def report():
    return Report(
        "td3.zip",
        {
            "BP191": outcome(Status.FAIL, FOUND, FOUND),
            "BP291": outcome(Status.REVIEW, LOOK),
            "BP391": outcome(Status.PASS),
            "BP491": outcome(Status.SKIPPED, reason="could not run: no buffer"),
            "BP591": outcome(Status.NOT_APPLICABLE, reason="no normalizer is known"),
        },
        1.5,
        facts(),
    )


def facts():
    """Layers of a real network, found by a real audit."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    exam = rules.Examination(Subject.from_module(net.eval(), torch.randn(16, 3)))
    return tuple(exam.layers)


def evil_report():
    finding = Finding(EVIL, network=EVIL, first=EVIL, largest="b", site=EVIL, effect=EVIL)
    return Report(
        EVIL,
        {
            "BP191": outcome(Status.FAIL, finding),
            "BP491": outcome(Status.SKIPPED, reason=EVIL),
        },
        0.0,
    )


def test_text_says_everything_once(report):
    shown = formats.text(report)
    assert "1 failed, 1 to review, 1 passed, 1 not applicable, 1 skipped (1.5 s)" in shown
    assert "FAIL BP191 rows-depend: Title of BP191" in shown
    assert "where: actor.mu.1 first, actor.mu.4 most, act" in shown
    assert "value: 0.5, floor 1e-07, threshold 6.4e-06" in shown
    assert "effect: 0.5 action units, 12.50% of the range" in shown
    assert shown.count("What to do: Do that.") == 2
    assert "--only BP191 --unsafe" in shown
    assert "BP491: could not run: no buffer" in shown
    assert "BP591: no normalizer is known" in shown
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 104


def test_text_counts_each_family(report):
    row = next(line for line in formats.text(report).splitlines() if line.startswith("1 alone"))
    assert row.removeprefix("1 alone vs batch").split() == ["1", "-", "-", "-", "-"]


def test_text_has_colours_only_where_asked(report):
    assert "\x1b[31;1mFAIL\x1b[0m" in formats.text(report, color=True)


def test_nothing_in_a_report_steers_the_terminal():
    shown = formats.text(evil_report())
    assert "\x1b" not in shown
    assert "\x00" not in shown


def test_json_is_strict_and_complete(report):
    def refuse(token):
        raise AssertionError(token)

    content = json.loads(formats.to_json(report), parse_constant=refuse)
    assert content["clean"] is False
    assert content["counts"] == {
        "fail": 1, "review": 1, "pass": 1, "not_applicable": 1, "skipped": 1,
    }  # fmt: skip
    assert [rule["code"] for rule in content["rules"]] == list(report.outcomes)
    first = content["rules"][0]["findings"][0]
    assert (first["network"], first["largest"], first["value"]) == ("actor", "mu.4", 0.5)
    assert content["rules"][1]["findings"][0]["value"] is None
    assert [layer["kind"] for layer in content["layers"]] == ["BatchNorm1d", "Dropout"]
    json.loads(formats.to_json(evil_report()), parse_constant=refuse)


def test_sarif_has_what_the_standard_requires(report):
    content = json.loads(formats.sarif(report, artifact="my models/td3.zip"))
    assert content["version"] == "2.1.0"
    assert content["$schema"].endswith("sarif-2.1.0.json")
    (run,) = content["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "batchproof"
    ids = [rule["id"] for rule in driver["rules"]]
    assert ids == list(report.outcomes)
    for rule in driver["rules"]:
        assert rule["helpUri"].endswith(f"/docs/rules/{rule['id']}.md")
        assert rule["fullDescription"]["text"]
        assert rule["shortDescription"]["text"]
    assert [result["level"] for result in run["results"]] == ["error", "error", "warning"]
    for result in run["results"]:
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["message"]["text"]
        (location,) = result["locations"]
        assert location["physicalLocation"]["artifactLocation"]["uri"] == "my%20models/td3.zip"
    names = [
        place["fullyQualifiedName"]
        for place in run["results"][0]["locations"][0]["logicalLocations"]
    ]
    assert names == ["actor.mu.1", "actor.mu.4"]


def test_sarif_tells_what_could_not_run_apart_from_what_passed(report):
    (run,) = json.loads(formats.sarif(report))["runs"]
    told = run["invocations"][0]["toolExecutionNotifications"]
    assert {(note["associatedRule"]["id"], note["level"]) for note in told} == {
        ("BP491", "warning"),
        ("BP591", "note"),
    }


def test_sarif_fingerprints_differ_by_place_and_not_by_number(report):
    def keys(given):
        (run,) = json.loads(formats.sarif(given))["runs"]
        return [next(iter(result["partialFingerprints"].values())) for result in run["results"]]

    assert len(set(keys(report))) == 3
    louder = Finding(**(vars(FOUND) | {"value": 0.7, "message": "row 0 moves 0.7"}))
    other = Report(report.subject, report.outcomes | {"BP191": outcome(Status.FAIL, louder)}, 9.0)
    assert keys(other)[0] == keys(report)[0]


def test_junit_is_read_back(report):
    top = ElementTree.fromstring(formats.junit(report))
    assert top.tag == "testsuites"
    suite = top.find("testsuite")
    assert suite.get("tests") == "5"
    assert suite.get("failures") == "1"
    assert suite.get("skipped") == "2"
    cases = {case.get("name")[:5]: case for case in suite.iter("testcase")}
    assert list(cases) == list(report.outcomes)
    assert cases["BP191"].find("failure").get("type") == "BP191"
    assert "row 0 moves the action of row 1" in cases["BP191"].find("failure").text
    assert "may be meant" in cases["BP291"].find("system-out").text
    assert len(cases["BP391"]) == 0
    assert cases["BP491"].find("skipped").get("message") == "skipped: could not run: no buffer"


def test_junit_stays_xml_whatever_the_names_are():
    top = ElementTree.fromstring(formats.junit(evil_report()))
    assert "<script>" in top.find("testsuite").get("name")


class Page(HTMLParser):
    """Tags that are open, what they are, and the text."""

    VOID = ("meta", "rect", "link", "br", "img")

    def __init__(self, page):
        super().__init__()
        self.stack, self.tags, self.attributes, self.told = [], [], [], ""
        self.feed(page)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.told += data


def test_page_holds_everything_and_fetches_nothing(report):
    page = Page(formats.html(report))
    for part in ("row 0 moves the action of row 1", "Do that.", "could not run: no buffer"):
        assert part in page.told
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "onclick", "onload"} & {name for name, _ in page.attributes}
    assert "details" in page.tags
    assert "prefers-color-scheme: dark" in page.told


def test_page_escapes_everything():
    text = formats.html(evil_report())
    assert "<script" not in text
    assert "\x1b" not in text
    assert "alert" in Page(text).told


def test_page_draws_layers_in_forward_order_with_their_findings(report):
    found = Finding("here", network="policy", first="1", largest="1")
    given = Report("net", {"BP191": outcome(Status.FAIL, found)}, 0.1, report.facts)
    text = formats.html(given)
    picture = text[text.index('id="layers"') : text.index('id="rules"')]
    assert picture.index("BatchNorm1d") < picture.index("Dropout")
    batch_norm, dropout = picture.split("Dropout")
    assert "<b>couples rows</b>; <b>moves</b> running_mean" in batch_norm
    assert 'href="#BP191"' in batch_norm
    assert "<b>random</b>" in dropout
    assert 'href="#BP191"' not in dropout


def test_page_shows_the_plan_of_a_trace(report):
    class Traced(SimpleNamespace):
        def __str__(self):
            return EVIL

    text = formats.html(report, Traced(plan="TETTE"))
    page = Page(text)
    assert "TETTE" in page.told
    assert "critic on (s, pi(s)), in the actor's loss" in page.told
    assert "<script" not in text


def test_a_clean_report_says_so():
    clean = Report("net", {"BP391": outcome(Status.PASS)}, 0.1)
    assert "No rule failed" in Page(formats.html(clean)).told
    assert "1 passed" in formats.text(clean)
    assert json.loads(formats.sarif(clean))["runs"][0]["results"] == []


def test_a_real_audit_goes_through_every_form():
    def check(exam):
        layer = exam.layers[0]
        return rules.failed(Finding("found", network=layer.role, first=layer.path, value=1.0))

    rules.RULES.clear()
    rules.RULES["BP191"] = Rule("BP191", "rows-depend", "title", check)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "RULE_MODULES", ())
        found = audit(Subject.from_module(net, torch.randn(8, 3)))
    for form in formats.FORMATS.values():
        assert "BP191" in form(found)


def test_a_fix_that_cannot_act_is_not_offered():
    """`set-modes` is for a library's model: a module and a run of the lab take no plan."""
    blind = Rule("BP998", "blind", "a critic is blind", rules.passed, fix="set-modes", safe=False)
    assert "batchproof fix MODEL" in formats.fix_in_words(blind, saves=True)
    assert formats.fix_in_words(blind, saves=False) == ""
    stale = Rule("BP999", "stale", "statistics are stale", rules.passed, fix="recalibrate")
    assert "fix(subject, report" in formats.fix_in_words(stale, saves=False)
