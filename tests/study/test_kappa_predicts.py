"""The kappa-predicts study: its rules on made-up results, and a small real run."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from batchproof import BatchproofError, Plan, Slot
from batchproof.lab.loop import Result
from batchproof.records import read_json
from batchproof.study import STUDIES
from batchproof.study.claims import kappa_predicts as study

SEEDS = 6
TASKS = ("toy", "pendulum")
KEYS = ("none", "slot3-T", "slot3-E", "renorm-T")
BLIND = {"slot3-T": 1e-7, "renorm-T": 1e-7}
FAILING = {"slot3-T": 0.1, "renorm-T": 0.1}


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    """Verdicts on made-up results need no fine intervals."""
    monkeypatch.setattr(study, "RESAMPLES", 100)


def outcome(scores, kappa=BLIND, seeds=SEEDS, keys=KEYS):
    """Every seed of a condition ends near one score, on the toy as predicted; TD3 as SAC.

    The random policy gets -50 and no norm 50, so a score s is a return of 100 s - 50.
    """
    results = {}
    spread = np.linspace(-3, 3, seeds)
    steps = np.array([50, 200, 800, 1000])
    for task in TASKS:
        for algo in study.ALGOS:
            for key in keys:
                score = {"none": 1.0, **(FAILING if task == "toy" else scores)}.get(key, 1.0)
                # Reversed for one, so that differences paired by seed have a spread.
                late = 100 * score - 50 + (-spread if key == "slot3-T" else spread)
                # Only kappa at 200 is early; what is measured before learning does not count.
                size = kappa.get(key, 0.3) * np.linspace(1, 2, seeds)
                columns = {
                    "seed": np.tile(np.arange(seeds), 4),
                    "step": np.repeat(steps, seeds),
                    "return": np.concatenate([spread, spread, late - 1, late + 1]),
                    "kappa": np.concatenate([np.ones(seeds), size, np.ones(2 * seeds)]),
                }
                results[f"{task}-{algo}-{key}"] = Result(columns, [], 1.0)
    random, starts = dict.fromkeys(TASKS, -50.0), dict.fromkeys(TASKS, 100)
    return study._Outcome(keys, TASKS, random, starts, results)


def verdicts(made):
    return {claim["id"]: claim["verdict"] for claim in study.judge(made)}


def test_blind_runs_that_fail_and_others_that_learn_support_it():
    # So does its size: from seed to seed it rises with the score.
    assert set(verdicts(outcome(FAILING)).values()) == {"supported"}


@pytest.mark.parametrize(
    ("scores", "kappa", "expected"),
    [
        # Blind, and it learns all the same.
        ({}, BLIND, {"F1": "refuted", "F1-pendulum": "refuted", "F1-harm": "refuted"}),
        # Blind and failing, but so does the one that sees.
        (FAILING | {"slot3-E": 0.1}, BLIND, {"F1": "refuted", "F1-harm": "refuted"}),
        # Four of ten blind runs end above the line.
        ({"slot3-T": 0.49, "renorm-T": 0.5}, BLIND, {"F1": "inconclusive", "F1-toy": "supported"}),
        # Nobody is blind: kappa says nothing.
        (FAILING, {}, {"F1": "inconclusive"}),
        # A loss within the margin.
        ({"slot3-T": 0.9}, BLIND, {"F1-harm": "inconclusive"}),
    ],
)
def test_each_rule_can_go_the_other_way(scores, kappa, expected):
    found = verdicts(outcome(scores, kappa))
    assert {claim: found[claim] for claim in expected} == expected


def test_size_counts_among_the_runs_that_see_only():
    """Kappa rises with the score from seed to seed, and conditions with more of it score more."""
    kappa = {"slot3-T": 1e-7, "slot3-E": 0.02, "renorm-T": 0.1}
    assert verdicts(outcome({"slot3-E": 0.2, "renorm-T": 0.6}, kappa))["F1-size"] == "supported"
    against = outcome({"slot3-E": 3.0, "renorm-T": 2.0}, kappa)
    assert verdicts(against)["F1-size"] == "refuted"


def test_no_verdict_on_few_seeds_or_where_nothing_learns():
    assert set(verdicts(outcome(FAILING, seeds=4)).values()) == {"inconclusive"}
    made = outcome(FAILING)
    made.results["pendulum-td3-none"].metrics["return"][:] = -50.0 + np.tile(
        np.linspace(-1, 1, SEEDS), 4
    )
    found = study.judge(made)
    assert {c["id"]: c["verdict"] for c in found}["F1"] == "inconclusive"
    assert "does not beat a random policy" in next(c for c in found if c["id"] == "F1")["why"]


def test_a_diverged_seed_scores_like_the_random_policy():
    made = outcome(FAILING)
    made.results["pendulum-sac-slot3-E"].metrics["return"][-1] = np.nan
    assert made.scores("pendulum", "sac", "slot3-E")[-1] == 0
    row = next(r for r in study.describe(made) if r["name"] == "pendulum-sac-slot3-E")
    assert (row["diverged"], row["failed"]) == (1, 1)


def test_statistics_against_references():
    rng = np.random.default_rng(0)
    kappa, score = 10 ** rng.uniform(-4, 0, 40), rng.uniform(0, 1, 40)
    kappa[:5] = np.nan
    known = ~np.isnan(kappa)
    low, high = kappa[known & (score < study.LINE)], kappa[known & (score >= study.LINE)]
    wanted = stats.mannwhitneyu(high, low).statistic / (low.size * high.size)
    assert study.auc(kappa, score) == pytest.approx(wanted)
    assert study.tau(kappa, score) == stats.kendalltau(kappa[known], score[known]).statistic
    assert study.agreement(np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.1, 0.9, 0.9, 0.9])) == 0.75
    assert np.isnan(study.agreement(np.ones(3), np.zeros(3)))
    assert np.isnan(study.auc(np.ones(3), np.zeros(3)))
    assert np.isnan(study.tau(np.ones(3), np.arange(3.0)))


def test_conditions_differ_as_their_names_say():
    assert STUDIES[study.NAME].module == study.__name__
    for algo in study.ALGOS:
        made = {
            c.key: study.training("pendulum", algo, c, 2, 100).record() for c in study.CONDITIONS
        }
        assert len({str(record) for record in made.values()}) == len(made)
        blind, seeing = (Plan.parse(made[k]["config"].pop("plan")) for k in ("slot3-T", "slot3-E"))
        assert [slot for slot in Slot if blind[slot] != seeing[slot]] == [Slot.POLICY_Q]
        assert made["slot3-T"] == made["slot3-E"]


@pytest.mark.parametrize(
    ("names", "chosen", "tasks"),
    [
        (None, study.DEFAULT, TASKS),
        ("slot3-M", ("none", "slot3-M"), TASKS),
        ("hopper", study.DEFAULT, (*TASKS, "hopper")),
        ("all", tuple(study.BY_KEY), tuple(study.TASKS)),
    ],
)
def test_what_conditions_names(names, chosen, tasks):
    assert tuple(map(set, study._chosen(names))) == (set(chosen), set(tasks))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"conditions": "slot4-T"}, "slot4-T"), ({"seeds": 0}, "seeds"), ({"steps": 0}, "steps")],
)
def test_bad_options_raise_one_line(tmp_path: Path, options, words):
    with pytest.raises(BatchproofError, match=words) as caught:
        study.run(tmp_path / "out", progress=False, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.full
def test_small_run_writes_everything_and_resumes_its_cells(tmp_path: Path):
    options = {"seeds": 2, "steps": 160, "conditions": "slot3-T,slot3-E"}
    made = study.run(tmp_path, progress=False, command="batchproof study", **options)
    pictures = [f"{kind}-{task}.png" for kind in ("curves", "conditions") for task in TASKS]
    for name in ("study.json", "report.html", "kappa.png", "metrics.parquet", *pictures):
        assert (tmp_path / name).stat().st_size > 1000
    written = read_json(tmp_path / "study.json")
    assert len(written["conditions"]) == 2 * 2 * 3
    assert {claim["verdict"] for claim in written["claims"]} == {"inconclusive"}
    kappa = {row["name"]: row["kappa"] for row in written["conditions"]}
    for task in TASKS:
        for algo in study.ALGOS:
            assert kappa[f"{task}-{algo}-slot3-T"] < 1e-4 < 1e-2 < kappa[f"{task}-{algo}-slot3-E"]
    before = (tmp_path / "cells" / "toy-sac-slot3-E" / "run.json").stat().st_mtime_ns
    again = study.run(tmp_path, progress=False, command="batchproof study", **options)
    assert (tmp_path / "cells" / "toy-sac-slot3-E" / "run.json").stat().st_mtime_ns == before
    assert again["conditions"] == made["conditions"]
