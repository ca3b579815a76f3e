"""The page as text: what it says, that it escapes, and that it holds everything it needs."""

import json
import re
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest

from batchproof import report
from batchproof.errors import BatchproofError
from batchproof.records import write_json
from batchproof.report import page
from batchproof.study import statistics

NORM = {"kind": "batch", "placement": "pre"}


class Reader(HTMLParser):
    """Tables by name, and every address that a tag refers to."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.links, self.tags, self._rows, self._cell = {}, [], [], None, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [attrs[name] for name in ("src", "href", "action") if name in attrs]
        if tag == "table":
            self._rows = self.tables.setdefault(attrs["aria-label"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, text):
        if self._cell:
            self._rows[-1][-1] += text.strip()

    def column(self, table, name):
        head, *rows = self.tables[table]
        return [row[head.index(name)] for row in rows]


def embedded(text):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found.group(1))


@pytest.fixture
def runs(tmp_path, training, write_run):
    """Two conditions on one task, 6 seeds; b ends about 10 above a."""
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 5, 6)
    found = {}
    for name, norm, gain in (("a", None, 0.0), ("b", NORM, 10.0)):
        ends = shared + gain + rng.normal(0, 1, 6)
        curves = ends[:, None] * [0.2, 0.6, 1.0]
        found[name] = ends
        write_run(tmp_path / name, training(norm=norm, seeds=range(6)), returns=curves)
    return tmp_path, found


def test_the_tables_hold_what_the_statistics_say(runs):
    folder, ends = runs
    out = folder / "report.html"
    paragraphs = report.write([folder / "a", folder / "b"], out)
    read = Reader(out.read_text())
    a, b = ends["a"], ends["b"]
    assert read.column("Conditions", "Condition") == ["td3 · no norm", "td3 · batch pre"]
    short = statistics.short
    assert read.column("Conditions", "Mean") == [short(a.mean()), short(b.mean())]
    assert read.column("Conditions", "Interquartile mean")[1] == short(statistics.iqm(b))
    interval = statistics.iqm_interval(b)
    assert read.column("Conditions", "95% interval")[1] == (
        f"{short(interval.lo)} to {short(interval.hi)}"
    )
    [found] = statistics.compare(
        [("td3 · batch pre", dict(enumerate(b)), "td3 · no norm", dict(enumerate(a)))]
    )
    assert read.column("Comparisons", "p, Holm") == [short(found.p_holm)]
    assert read.column("Comparisons", "Verdict") == ["higher"]
    assert escape(found.sentence) in out.read_text()
    assert "The highest final return is that of td3 · batch pre" in paragraphs[0]
    assert "Against td3 · no norm: 1 higher (td3 · batch pre)." in paragraphs[0]


def test_conditions_of_a_comparison_are_compared_as_it_does(runs, training, write_run):
    folder, _ = runs
    rng = np.random.default_rng(1)
    for name, norm in (("c", None), ("d", NORM)):
        curves = rng.normal(5, 1, (6, 3))
        write_run(folder / name, training("sac", norm=norm, seeds=range(6)), returns=curves)
    cells = [{"condition": f"my {n}", "populations": [{"folder": n}]} for n in "abcd"]
    pairs = [["my b", "my a"], ["my d", "my c"], ["my c", "my a"]]
    record = {"baseline": None, "pairs": pairs, "cells": cells}
    write_json(folder / "compare.json", record)
    [paragraph] = report.write([folder], folder / "r.html")
    read = Reader((folder / "r.html").read_text())
    assert read.column("Conditions", "Condition") == ["my a", "my b", "my c", "my d"]
    found = zip(
        *(read.column("Comparisons", name) for name in ("Condition", "Against")), strict=True
    )
    assert sorted(found) == sorted(map(tuple, pairs))
    assert "Against my a: " in paragraph
    assert "Against my c: 1 not told apart from it (my d)." in paragraph


def test_what_has_not_finished_is_not_called_final(runs, training, write_run):
    folder, _ = runs
    short = training("sac", seeds=range(6))
    write_run(folder / "c", short, status="running", steps=(10, 20))
    [paragraph] = report.write([folder / n for n in "abc"], folder / "r.html")
    assert "compared at 20 environment steps, as far as sac · no norm has come." in paragraph
    assert "The highest return there is" in paragraph
    assert "final" not in paragraph


def test_the_average_over_training_and_the_threshold(runs):
    folder, ends = runs
    report.write([folder / "a"], folder / "r.html", threshold=-1e9)
    read = Reader((folder / "r.html").read_text())
    # 0.2, 0.6 and 1.0 of the end, evenly spaced: 0.6 of it on average.
    assert read.column("Conditions", "Average over training") == [
        statistics.short(0.6 * ends["a"].mean())
    ]
    assert read.column("Conditions", "Steps to threshold")[0].startswith("10 (6 of 6 seeds")
    # Of 60 s for 30 steps.
    assert read.column("Conditions", "Time to threshold") == ["20.0 s"]
    report.write([folder / "a"], folder / "r.html", threshold=1e9)
    read = Reader((folder / "r.html").read_text())
    assert read.column("Conditions", "Steps to threshold") == ["not reached by half (0 of 6 seeds)"]


def test_too_few_seeds_are_not_ranked(tmp_path, training, write_run):
    runs = [
        write_run(tmp_path / "a", training(seeds=range(4))),
        write_run(tmp_path / "b", training("sac", seeds=range(4))),
    ]
    [said] = report.write(runs, tmp_path / "r.html")
    assert "No ranking: a ranking needs 5 seeds of every condition" in said
    assert "highest" not in said
    assert "1 not tested, for too few seeds (sac)" in said


def test_conditions_without_a_common_seed_are_said_not_to_be_compared(
    tmp_path, training, write_run
):
    runs = [
        write_run(tmp_path / "a", training(seeds=range(5))),
        write_run(tmp_path / "b", training("sac", seeds=range(5, 10))),
    ]
    [said] = report.write(runs, tmp_path / "r.html")
    assert "Not compared, for want of a seed that td3 has too: sac." in said
    assert "Comparisons" not in Reader((tmp_path / "r.html").read_text()).tables


def test_equal_ends_are_said_to_be_equal(tmp_path, training, write_run):
    curves = [[1, 2, 30 + 1e-6 * seed] for seed in range(5)]
    runs = [
        write_run(tmp_path / algo, training(algo, seeds=range(5)), returns=curves)
        for algo in ("td3", "sac")
    ]
    [said] = report.write(runs, tmp_path / "r.html")
    assert "The two are equal to four digits." in said


def test_a_diverged_seed_counts_as_the_lowest_return_seen(tmp_path, training, write_run):
    nan = float("nan")
    gone = [[-7, 5, 9], [1, nan, nan], [1, 2, 8], [1, 2, 8], [1, 2, 8]]
    run = write_run(tmp_path / "a", training(seeds=range(5)), returns=gone)
    [said] = report.write([run], tmp_path / "r.html")
    assert "Seeds diverged (td3: 1); from there on each counts as the lowest return seen" in said
    text = (tmp_path / "r.html").read_text()
    assert Reader(text).column("Conditions", "Mean") == [statistics.short((9 - 7 + 24) / 5)]
    [cell] = embedded(text)["tasks"][0]["cells"]
    assert cell["returns"][1] == [1, None, None]
    assert cell["filled"][1] == [1, -7, -7]


@pytest.mark.parametrize("status", ["running", "stopped"])
def test_runs_of_unequal_length_are_compared_where_both_have_been(
    tmp_path, training, write_run, status
):
    runs = [
        write_run(tmp_path / "a", training(), status=status, steps=(10, 20)),
        write_run(tmp_path / "b", training("sac"), steps=(10, 20, 30)),
    ]
    [said] = report.write(runs, tmp_path / "r.html")
    assert "compared at 20 environment steps" in said
    read = Reader((tmp_path / "r.html").read_text())
    assert read.column("Conditions", "Mean") == ["70", "70"]
    assert read.column("Runs", "State") == ["unfinished", "finished"]
    # Each took a minute, one for 20 steps and the other for 30.
    assert read.column("Conditions", "Time to threshold") == ["30.0 s", "20.0 s"]
    late = write_run(tmp_path / "c", training("ddpg"), steps=(500,))
    with pytest.raises(BatchproofError, match="report them apart"):
        report.write([*runs, late], tmp_path / "r.html")


def test_the_time_to_a_threshold_of_joined_runs_is_the_sum_of_theirs(tmp_path, training, write_run):
    runs = [
        write_run(tmp_path / "a", training(seeds=(0,)), status="stopped", steps=(10, 20)),
        write_run(tmp_path / "b", training(seeds=(1,)), status="stopped", steps=(10, 20, 30)),
    ]
    report.write(runs, tmp_path / "r.html", threshold=-1e9)
    # A minute each, for 20 steps and for 30; both are there at the first evaluation.
    found = Reader((tmp_path / "r.html").read_text()).column("Conditions", "Time to threshold")
    assert found == ["50.0 s"]


def test_scores_across_tasks_are_scaled_within_each(tmp_path, training, write_run):
    for env, top in (("A-v0", 10.0), ("B-v0", 1000.0)):
        for algo, share in (("td3", 0.0), ("sac", 1.0)):
            ends = top * (share + np.linspace(0, 0.1, 5))
            curves = np.repeat(ends[:, None], 3, axis=1)
            record = training(algo, env=env, seeds=range(5))
            write_run(tmp_path / f"{env}-{algo}", record, returns=curves)
    report.write([tmp_path], tmp_path / "r.html")
    read = Reader((tmp_path / "r.html").read_text())
    scores = [float(text) for text in read.column("Across tasks", "Interquartile mean")]
    assert scores == pytest.approx([1.05 / 1.1, 0.05 / 1.1], rel=1e-3)
    assert read.column("Across tasks", "Condition") == ["sac", "td3"]
    assert read.column("Across tasks", "Chance to beat sac") == ["–", "0"]


def test_the_file_needs_nothing_from_elsewhere(runs):
    folder, _ = runs
    out = folder / "deep" / "report.html"
    report.write([folder / "a", folder / "b"], out)
    read = Reader(out.read_text())
    assert all(link.startswith("#") for link in read.links)
    assert not {"link", "img", "iframe", "object", "embed", "form"} & set(read.tags)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', out.read_text()).group(1)
    assert policy.startswith("default-src &#x27;none&#x27;; img-src data: blob:;")


def test_what_users_wrote_is_escaped(tmp_path, training, write_run):
    evil = '</script><img src=x onerror="alert(1)">&'
    record = training(evil, env=f"env{evil}")
    run = write_run(tmp_path / "a<b>", record, **{"metric<i>": [[1, 2, 3]] * 2})
    report.write([run, write_run(tmp_path / "b", training())], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    read = Reader(text)
    assert not {"img", "i", "b"} & set(read.tags)
    assert read.tags.count("script") == 4
    assert embedded(text)["conditions"][0] == evil
    assert read.column("Runs", "Folder")[0].endswith("a<b>")


def test_metrics_are_summed_up_over_the_seeds_that_have_them(tmp_path, training, write_run):
    nan = float("nan")
    kappa = [[0.2, nan, nan], [0.4, 0.5, nan]]
    run = write_run(tmp_path / "a", training(), kappa=kappa, unknown=[[nan] * 3] * 2)
    report.write([run], tmp_path / "r.html")
    [cell] = embedded((tmp_path / "r.html").read_text())["tasks"][0]["cells"]
    assert cell["metrics"] == {"kappa": [[0.3, 0.5, None], [0.2, 0.5, None], [0.4, 0.5, None]]}


def test_long_curves_are_thinned_and_keep_their_end(tmp_path, training, write_run):
    steps = np.arange(1, 1202)
    run = write_run(tmp_path / "a", training(), steps=steps)
    report.write([run], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    [cell] = embedded(text)["tasks"][0]["cells"]
    assert len(cell["steps"]) <= page.MOST_POINTS
    assert cell["steps"][-1] == 1201
    assert cell["returns"][1][-1] == 1301
    assert "Of curves with more than 500 evaluations" in text


def test_plans_are_drawn_once_with_their_conditions(tmp_path, training, write_run):
    runs = [
        write_run(tmp_path / "a", training(norm=NORM, plan="TEEJJ")),
        write_run(tmp_path / "b", training(norm=NORM, plan="TEEJJ", config={"gamma": 0.9})),
        write_run(tmp_path / "c", training(norm=NORM, plan="TTTTE")),
        write_run(tmp_path / "d", training()),
    ]
    report.write(runs, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    drawn = re.findall(r'aria-label="Mode plan (\w+): ([^"]+)"', text)
    assert [plan for plan, _ in drawn] == ["TEEJJ", "TTTTE"]
    assert "slot 5, target Q: the statistics of slots 4 and 5 in one" in drawn[0][1]
    letters = re.findall(r'<text class="(?:batch|running)[^"]*" [^>]*>(\w)</text>', text)
    assert "".join(letters) == "ETEEJJETTTTE"


def test_nothing_to_say_and_nowhere_to_write_are_refused(tmp_path, training, write_run):
    nan = float("nan")
    dead = write_run(tmp_path / "dead", training(), returns=[[nan] * 3] * 2)
    with pytest.raises(BatchproofError, match="every seed diverged before"):
        report.write([dead], tmp_path / "r.html")
    run = write_run(tmp_path / "a", training())
    with pytest.raises(BatchproofError, match="is a folder"):
        report.write([run], tmp_path)


def test_the_chart_library_is_the_version_that_is_said_with_its_license():
    head = (page.ASSETS / "plotly-basic.min.js").read_text(encoding="utf-8")[:300]
    assert f"v{page.PLOTLY}" in head
    assert "MIT License" in (page.ASSETS / "plotly-LICENSE.txt").read_text(encoding="utf-8")
    bundle = (page.ASSETS / "plotly-basic.min.js").read_text(encoding="utf-8")
    assert "</script" not in bundle.lower()
    assert "<!--" not in bundle


def test_statistics_of_layers_are_a_group_of_their_own(tmp_path, training, write_run):
    metrics = {"kappa": [[1, 2, 3]] * 2, "mean_gap/actor/norm_pre_0": [[1, 2, 3]] * 2}
    run = write_run(tmp_path / "run", training(seeds=(0, 1)), **metrics)
    report.write([run], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    group = page.split('<optgroup label="statistics of each layer">')[1].split("</optgroup>")[0]
    assert 'value="mean_gap/actor/norm_pre_0">mean gap/actor/norm pre 0<' in group
    assert "kappa" not in group
    assert '<option value="kappa">' in page
