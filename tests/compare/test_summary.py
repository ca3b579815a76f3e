"""What is said of a comparison, and the table that follows it along."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest

from batchproof import compare
from batchproof.compare.summary import cell_record, compared_pairs, tables_and_sentences
from batchproof.compare.table import Table
from batchproof.lab import loop
from batchproof.study import statistics


def cell(env: str, name: str, finals: list[float]) -> compare.Cell:
    """A finished cell with seeds 0, 1, ... and two evaluations, at 0 and its final return."""
    count = len(finals)
    columns = {
        "seed": np.tile(np.arange(count), 2),
        "step": np.repeat([10, 20], count),
        "return": np.array([0.0] * count + finals),
    }
    training = SimpleTraining(tuple(range(count)))
    population = compare.Population(training, Path("out/cells/x"), "finished")  # type: ignore[arg-type]
    seeds = [{"seed": i, "final_return": value} for i, value in enumerate(finals)]
    population.result = loop.Result(columns, seeds, 1.0)
    return compare.Cell(env, condition(name), [population])


class SimpleTraining:
    def __init__(self, seeds: tuple[int, ...]) -> None:
        self.seeds, self.steps = seeds, 20


def condition(name: str) -> compare.Condition:
    return compare.Condition(name, name.split("-")[0], name, (), name.endswith("none"), 1.0)


def test_each_condition_is_compared_with_its_own_algorithm_unnormalized() -> None:
    held = [condition(n) for n in ("sac-batch", "sac-none", "td3-batch", "td3-none", "wn-default")]
    assert compared_pairs(held, None) == [
        ("sac-batch", "sac-none"),
        ("td3-batch", "td3-none"),
        ("td3-none", "sac-none"),
        ("wn-default", "sac-none"),
    ]
    assert compared_pairs(held, "td3-batch") == [
        (c.name, "td3-batch") for c in held if c.name != "td3-batch"
    ]


def test_statistics_are_those_of_the_study_module_with_one_correction_for_all() -> None:
    rng = np.random.default_rng(0)
    finals = {
        (env, name): (rng.normal(size=6) + shift).tolist()
        for env in ("A", "B")
        for name, shift in (("td3-none", 0.0), ("td3-batch", 5.0), ("td3-layer", 0.1))
    }
    found = [cell(env, name, values) for (env, name), values in finals.items()]
    conditions = [condition(name) for name in ("td3-none", "td3-batch", "td3-layer")]
    spec = compare.Spec(("td3",), ("A", "B"), seeds=tuple(range(6)))
    tables, lines = tables_and_sentences(spec, conditions, found)
    raw = []
    for table in tables:
        env = table["environment"]
        for row in table["rows"]:
            values = finals[env, row["condition"]]
            assert row["mean"]["value"] == pytest.approx(np.mean(values))
            assert row["iqm"]["value"] == pytest.approx(statistics.iqm(values))
            assert row["n"] == 6
        assert table["ranking"][0]["condition"] == "td3-batch"
        for made in table["comparisons"]:
            p = statistics.paired_test(finals[env, made["a"]], finals[env, made["b"]])
            assert made["p"] == pytest.approx(p)
            raw.append(made)
    # Four comparisons were made, so all four are corrected together.
    corrected = statistics.holm([made["p"] for made in raw])
    np.testing.assert_allclose([made["p_holm"] for made in raw], corrected)
    assert raw[0]["verdict"] == "higher"
    assert sum("Over all 2 environments a run of td3-batch beats one of td3-none in 100%" in line
               for line in lines) == 1  # fmt: skip


def test_a_seed_that_diverged_counts_as_the_lowest_return(tmp_path: Path) -> None:
    found = [
        cell("A", "td3-none", [1.0, 2.0, 3.0, 4.0, -7.0]),
        cell("A", "td3-wild", [5.0, math.nan, math.nan, 5.0, 5.0]),
    ]
    spec = compare.Spec(("td3",), ("A",), seeds=tuple(range(5)))
    (table,), lines = tables_and_sentences(spec, [one.condition for one in found], found)
    assert table["floor"] == -7.0
    row = table["rows"][1]
    assert row["mean"]["value"] == pytest.approx((5 - 7 - 7 + 5 + 5) / 5)
    assert (row["diverged"], row["min"], row["max"]) == (2, -7.0, 5.0)
    assert lines[0].startswith("Seeds diverged (td3-wild: 2); each counts as the lowest return")
    record = cell_record(found[1], spec.seeds, Path("out"))
    assert record["diverged"] == [1, 2]
    assert math.isnan(record["final_returns"]["1"])


def test_seeds_are_paired_by_their_number() -> None:
    low = cell("A", "td3-none", [0.0, 10.0, 20.0, 30.0, 40.0, 50.0])
    high = cell("A", "td3-batch", [1.1, 11.0, 21.2, 31.0, 41.1, 51.0])
    population = high.populations[0]
    assert population.result is not None
    turned = {name: values[::-1] for name, values in population.result.metrics.items()}
    order = turned["step"].argsort(kind="stable")
    population.result = population.result._replace(
        metrics={name: values[order] for name, values in turned.items()}
    )
    spec = compare.Spec(("td3",), ("A",), seeds=tuple(range(6)))
    tables, _ = tables_and_sentences(spec, [low.condition, high.condition], [low, high])
    (made,) = tables[0]["comparisons"]
    # Unpaired, a difference of 1 is nothing beside a spread of 50.
    assert made["difference"]["value"] == pytest.approx(np.mean([1.1, 1, 1.2, 1, 1.1, 1]))
    assert made["verdict"] == "higher"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_table_on_a_terminal_is_drawn_over_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "8")
    found = [cell("A", f"td3-{i}", [1.0, 3.0]) for i in range(20)]
    for one in found:
        one.populations[0].last = 2.0
    running = found[11].populations[0]
    running.state, running.step, running.last = "running", 5, math.nan
    queue = compare.ordered(found)
    screen = Terminal()
    table = Table(found, queue, compare.Spec((), ("A",)), 0.0, True, screen)
    table.say("a note")
    table.draw(now=True)
    first = screen.getvalue()
    assert first.startswith("a note\n")
    shown = first.splitlines()[1:]
    assert len(shown) <= 8
    assert max(map(len, shown)) < 80
    assert any("td3-11" in line and "running at 5 of 20" in line for line in shown)
    assert "19 of 20 finished" in shown[-1]
    table.draw(now=True)
    second = screen.getvalue()[len(first) :]
    assert second.startswith(f"\x1b[{len(shown)}A\x1b[J")
    table.close()
    assert screen.getvalue().endswith("\x1b[J")


def test_without_a_terminal_there_are_lines() -> None:
    found = [cell("A", "td3-none", [1.0, 3.0])]
    stream = io.StringIO()
    table = Table(found, compare.ordered(found), compare.Spec((), ("A",)), 0.0, True, stream)
    population = found[0].populations[0]
    table.start(found[0], population)
    table.draw(now=True)
    population.last = 2.0
    table.end(found[0], population)
    table.close()
    assert stream.getvalue() == (
        "[1/1] A td3-none: running\n[1/1] A td3-none: finished, return 2\n"
    )
