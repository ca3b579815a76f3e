"""The report: well-formed, self-contained, and nothing from the data becomes markup."""

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from batchproof.study.report import FigureSection, write_report

# A PNG of one pixel.
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)
VOID = {"meta", "img", "br", "hr", "input", "link", "circle", "line"}

STUDY = {
    "study": "constant-reward",
    "claims": [
        {
            "id": "D1",
            "statement": "Without batch norm both reach about 30",
            "source": "a blog post, https://example.org/post",
            "decision_rule": "supported if the lower end of the interval is above 25",
            "verdict": "supported",
            "effect": 29.8,
            "ci": [29.5, 30.0],
            "n": 5,
            "why": "All five seeds of both agents end above 26.",
        },
        {
            "id": "D4",
            "statement": "Do not use batch norm in RL",
            "source": "a blog post",
            "decision_rule": "refuted if one plan with batch norm reaches 25",
            "verdict": "refuted",
            "effect": -31.4,
            "ci": [-33.25, -28.0],
            "n": 10,
            "why": "",
        },
        {
            "id": "D5",
            "statement": "Why?",
            "source": "a blog post",
            "decision_rule": "-",
            "verdict": "inconclusive",
            "effect": None,
            "ci": None,
            "n": 1,
            "why": "One seed.",
        },
    ],
    "conditions": [
        {
            "name": "td3-none",
            "label": "No batch norm",
            "row": 1,
            "algo": "TD3",
            "norm": "none",
            "modes": "",
            "ending": "terminated",
            "returns": [30.0, 29.9, 30.0],
            "kappa": 1.0,
            "prediction": "30.0",
            "missed": False,
            "diverged": 0,
        },
        {
            "name": "sac-bn-t",
            "label": "BN in the critic",
            "row": 4,
            "algo": "SAC",
            "norm": "batch",
            "modes": "TTTTE",
            "ending": "truncated",
            "returns": [9.4, None, -7.7],
            "kappa": 2.1e-8,
            "prediction": "erratic",
            "missed": True,
            "diverged": 1,
        },
        {
            "name": "sac-lost",
            "label": "All lost",
            "row": 5,
            "algo": "SAC",
            "norm": "batch",
            "modes": "TEEJJ",
            "ending": "truncated",
            "returns": [None, None],
            "kappa": None,
            "prediction": None,
            "missed": None,
            "diverged": 2,
        },
    ],
    "wall_s": 192.4,
    "versions": {"python": "3.11.7", "jax": "0.6.0"},
    "command": "batchproof study constant-reward --out results",
    "seeds": 5,
    "steps": 3000,
    "machine": "2 cores",
}


class Page(HTMLParser):
    """Parses strictly: every element is closed in order; keeps elements and visible words."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
            self.open.pop()

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag):
        return [attrs for name, attrs, _ in self.elements if name == tag]


@pytest.fixture
def figures(tmp_path):
    png = tmp_path / "answer.png"
    png.write_bytes(PIXEL)
    svg = tmp_path / "curves.svg"
    svg.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", encoding="utf-8")
    return [
        FigureSection("The answer", "Two agents, three conditions.", png, alt="Lines rise or stay"),
        FigureSection("The curves", "Every seed.", png, svg=svg),
    ]


@pytest.fixture
def report(tmp_path, figures):
    def write(study=STUDY, explanation="<p>Because of <em>one</em> pass.</p>", **options):
        path = write_report(
            tmp_path / "out" / "report.html", study, figures, explanation, **options
        )
        return path.read_text(encoding="utf-8")

    return write


def rows(text):
    """The table's rows as (cell text, sort key) lists."""
    body = re.search(r"<tbody>(.*?)</tbody>", text, re.S).group(1)
    found = []
    for row in re.findall(r"<tr>(.*?)</tr>", body, re.S):
        cells = re.findall(r"<(t[dh])([^>]*)>(.*?)</\1>", row, re.S)
        keys = [re.search(r'data-sort="([^"]*)"', attrs) for _, attrs, _ in cells]
        words = [re.sub(r"<[^>]*>", "", content) for _, _, content in cells]
        found.append([(w, k.group(1) if k else w) for w, k in zip(words, keys, strict=True)])
    return found


def test_is_well_formed_and_has_every_section(report):
    page = Page(report())
    heads = {attrs["id"] for attrs in page.all("section")}
    assert heads == {"answer", "verdicts", "figures", "conditions", "run"}
    identifiers = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    targets = {attrs["href"] for attrs in page.all("a")}
    assert targets == {f"#{name}" for name in heads}
    for attrs in page.all("section"):
        assert attrs["aria-labelledby"] in identifiers
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"


def test_heading_levels_never_skip(report):
    levels = [int(tag[1]) for tag, _, _ in Page(report()).elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_reaches_for_nothing_outside(report):
    text = report()
    page = Page(text)
    for tag, attrs, _ in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attrs.get(name, "#")
            assert value.startswith(("#", "data:image/")), f"<{tag} {name}={value[:40]}>"
    assert page.all("link") == []
    assert "@import" not in text
    assert "url(" not in text


def test_images_are_embedded_with_words(report):
    png, svg = Page(report()).all("img")
    assert base64.b64decode(png["src"].removeprefix("data:image/png;base64,")) == PIXEL
    assert png["alt"] == "Lines rise or stay"
    assert svg["src"].startswith("data:image/svg+xml;base64,")
    assert svg["alt"] == "Every seed."


def test_markup_in_the_data_is_shown_and_not_run(report, figures, tmp_path):
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"

    def poison(value):
        if isinstance(value, dict):
            return {k: v if k == "verdict" else poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return attack if isinstance(value, str) else value

    study = poison(STUDY)
    study["machine"] = study["versions"] = {attack: attack}
    study["claims"][0]["effect"] = study["claims"][0]["n"] = attack
    study["seeds"] = [attack]
    study["steps"] = study["conditions"][0]["row"] = study["conditions"][0]["kappa"] = attack
    hurt = [FigureSection(attack, attack, f.png, alt=attack) for f in figures]
    path = write_report(tmp_path / "r.html", study, hurt, "<p>x</p>", title=attack)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1
    assert len(page.all("img")) == len(hurt)
    assert not any(name.startswith("on") for _, attrs, _ in page.elements for name in attrs)
    assert page.text.count("alert(1)</script>") > 30
    assert "<script>alert" not in text
    assert "&amp;lt;" not in text, "escaped twice"


def test_only_its_own_script_may_run(report):
    text = report()
    script = re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [m["content"] for m in Page(text).all("meta") if "http-equiv" in m]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_cards_say_verdict_effect_interval_and_rule(report):
    text = report()
    cards = re.findall(r"<article.*?</article>", text, re.S)
    said = [Page(card).text for card in cards]
    assert [next(v for v in ("supported", "refuted", "inconclusive") if v in s) for s in said] == [
        "supported",
        "refuted",
        "inconclusive",
    ]
    assert "29.8" in said[0]
    assert "29.5 to 30" in said[0]
    assert "All five seeds of both agents end above 26." in said[0]
    assert "\N{MINUS SIGN}33.2 to \N{MINUS SIGN}28" in said[1]
    assert "Effect – Interval –" in re.sub(r"\s+", " ", said[2])
    for card, claim in zip(cards, STUDY["claims"], strict=True):
        inside = re.search(r"<details>.*</details>", card, re.S).group(0)
        assert claim["decision_rule"] in inside


def test_the_interval_says_its_level_if_known(report):
    study = copy.deepcopy(STUDY)
    study["claims"][0]["level"] = 0.95
    assert "95% interval" in Page(report(study)).text


def test_the_interval_of_one_seed_is_a_dash(report):
    study = copy.deepcopy(STUDY)
    study["claims"][0]["ci"] = [None, None]
    assert "None" not in Page(report(study)).text


def test_the_table_has_every_condition_with_its_sort_keys(report):
    text = report()
    columns = re.findall(r'<th scope="col" data-kind="(\w+)">([^<]*)</th>', text)
    table = rows(text)
    assert len(table) == len(STUDY["conditions"])
    assert all(len(row) == len(columns) for row in table)
    by_name = [{name: cell for (_, name), cell in zip(columns, row, strict=True)} for row in table]
    assert by_name[0]["Mean return"] == ("30.0", repr(89.9 / 3))
    assert by_name[1]["Mean return"][1] == repr((9.4 - 7.7) / 2)
    assert by_name[1]["Lowest to highest seed"][0] == "\N{MINUS SIGN}7.70 to 9.40"
    assert by_name[1]["κ"] == ("2.1×10⁻⁸", "2.1e-08")
    assert by_name[1]["As predicted"] == ("missed", "missed")
    assert by_name[2]["Mean return"] == ("–", "")
    assert by_name[2]["Predicted"] == ("–", "")
    # What a numeric column sorts by must be a number or empty.
    for kind, name in columns:
        for row in by_name:
            if kind == "number" and row[name][1]:
                float(row[name][1])


def test_each_finite_seed_is_a_dot_within_its_strip(report):
    strips = re.findall(r'<svg class="strip".*?</svg>', report(), re.S)
    assert [strip.count("<circle") for strip in strips] == [3, 2, 0]
    places = [float(x) for strip in strips for x in re.findall(r'cx="([^"]*)"', strip)]
    assert min(places) == 5.0
    assert max(places) == 115.0


def test_how_it_was_run(report):
    said = Page(report()).text
    for fact in (
        "batchproof study constant-reward --out results",
        "3,000",
        "3 min 12 s",
        "2 cores",
        "0.6.0",
    ):
        assert fact in said


def test_the_explanation_goes_in_as_html(report):
    text = report(explanation="<p>Because of <em>one</em> pass.</p>")
    assert "<em>one</em>" in text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_reads_what_json_gives_and_does_without_the_optional(report, tmp_path):
    study = json.loads(json.dumps(STUDY))
    del study["machine"]
    study["claims"] = []
    study["conditions"] = [{"name": "a", "returns": [1.0, float("nan")]}]
    text = report(study)
    page = Page(text)
    assert {attrs["id"] for attrs in page.all("section")} == {
        "answer",
        "figures",
        "conditions",
        "run",
    }
    assert "nan" not in " ".join(cell for row in rows(text) for pair in row for cell in pair)


def test_what_is_missing_or_unknown_is_named(tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(ValueError, match="study lacks wall_s"):
        write_report(path, {k: v for k, v in STUDY.items() if k != "wall_s"}, [], "")
    study = copy.deepcopy(STUDY)
    study["claims"][1]["verdict"] = "maybe"
    with pytest.raises(ValueError, match="'D4' has the verdict 'maybe'"):
        write_report(path, study, [], "")
    study = copy.deepcopy(STUDY)
    del study["claims"][0]["decision_rule"]
    with pytest.raises(ValueError, match="'D1' lacks decision_rule"):
        write_report(path, study, [], "")
    study = copy.deepcopy(STUDY)
    del study["conditions"][0]["returns"]
    with pytest.raises(ValueError, match="'td3-none' lacks returns"):
        write_report(path, study, [], "")
    with pytest.raises(FileNotFoundError):
        write_report(path, STUDY, [FigureSection("a", "b", tmp_path / "none.png")], "")
    assert not path.exists()
