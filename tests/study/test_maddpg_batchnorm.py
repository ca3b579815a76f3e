"""The maddpg-batchnorm study: its rules on made-up results, and a small real run."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from batchproof import BatchproofError, Plan, Slot
from batchproof.lab.loop import Result
from batchproof.records import read_json
from batchproof.study.claims import maddpg_batchnorm as study

SEEDS = 6
BY_KEY = {condition.key: condition for condition in study.CONDITIONS}
EXPECTED = {
    "none": 0.9,
    "bypass": 0.1,
    "eval": 0.9,
    "train": 0.02,
    "ddpg-placement": 0.9,
    "listener-none": -30.0,
    "listener-bypass": -60.0,
    "listener-eval": -30.0,
    "spread-none": -70.0,
    "spread-bypass": -70.0,
    "spread-eval": -70.0,
}


def outcome(returns, seeds=SEEDS):
    """An outcome in which every seed of a condition ends near one return, from 0."""
    results = {}
    spread = np.linspace(-0.04, 0.04, seeds)
    for key, value in returns.items():
        for algo in BY_KEY[key].predicted:
            both = value if isinstance(value, dict) else dict.fromkeys(study.ALGOS, value)
            columns = {
                "seed": np.tile(np.arange(seeds), 2),
                "step": np.repeat([100, 200], seeds),
                "return": np.concatenate([np.full(seeds, -500.0), both[algo] + spread]),
            }
            results[f"{algo}-{key}"] = Result(columns, [], 1.0)
    return study._Outcome(tuple(BY_KEY[key] for key in returns), seeds, results)


def verdicts(made):
    return {claim["id"]: claim["verdict"] for claim in study.judge(made)}


def test_expected_results_support_the_warning_and_the_cure():
    assert verdicts(outcome(EXPECTED)) == {
        "B4": "supported",
        "B4-eval": "supported",
        "B4-train": "supported",
        "B4-ddpg": "supported",
        "B4-particles": "supported",
    }


@pytest.mark.parametrize(
    ("claim", "returns", "verdict"),
    [
        ("B4", {"bypass": 0.9}, "refuted"),
        ("B4", {"bypass": {"maddpg": 0.9, "ddpg": 0.1}}, "supported"),
        # An agent that does not solve the task anyway says nothing about what stopped it.
        ("B4", {"bypass": {"maddpg": 0.9, "ddpg": 0.1}, "none": {"maddpg": 0.9, "ddpg": 0.1}},
         "refuted"),
        ("B4", {"none": 0.1}, "inconclusive"),
        ("B4", {"bypass": 0.5}, "inconclusive"),
        ("B4-eval", {"eval": 0.1}, "refuted"),
        ("B4-eval", {"eval": 0.2}, "inconclusive"),
        ("B4-train", {"train": 0.9}, "refuted"),
        ("B4-train", {"train": 0.5}, "inconclusive"),
        ("B4-ddpg", {"ddpg-placement": 0.3}, "refuted"),
        ("B4-ddpg", {"ddpg-placement": 0.8}, "inconclusive"),
        ("B4-particles", {"listener-bypass": -30.0}, "refuted"),
    ],
)  # fmt: skip
def test_each_rule_can_go_the_other_way(claim, returns, verdict):
    assert verdicts(outcome(EXPECTED | returns))[claim] == verdict


def test_no_verdict_on_few_seeds():
    assert set(verdicts(outcome(EXPECTED, seeds=4)).values()) == {"inconclusive"}


def test_claim_without_its_conditions_says_what_it_needs():
    claims = {claim["id"]: claim for claim in study.judge(outcome({"none": 0.9, "bypass": 0.1}))}
    assert claims["B4"]["verdict"] == "supported"
    assert claims["B4-train"]["verdict"] == "inconclusive"
    assert "train" in claims["B4-train"]["why"]


def test_score_on_rally_is_the_best_evaluation_and_elsewhere_the_last():
    made = outcome(EXPECTED)
    for key in ("none", "listener-none"):
        made.results[f"maddpg-{key}"].metrics["return"][:SEEDS] = 5.0
    assert (made.scores("maddpg", BY_KEY["none"]) == 5.0).all()
    assert made.scores("maddpg", BY_KEY["listener-none"]).mean() == pytest.approx(-30.0)
    rows = {row["name"]: row for row in study.describe(made)}
    assert rows["maddpg-none"]["solved_at"] == [100] * SEEDS
    assert rows["ddpg-none"]["solved_at"] == [200] * SEEDS
    assert rows["ddpg-train"]["solved_at"] == [None] * SEEDS


def test_diverged_seed_counts_as_the_worst_return():
    made = outcome(EXPECTED)
    made.results["maddpg-none"].metrics["return"][-1] = np.nan
    assert made.scores("maddpg", BY_KEY["none"])[-1] == study.TASKS["rally"].worst
    assert study.describe(made)[0]["diverged"] == 1


def test_prediction_misses_by_class():
    rows = {row["name"]: row for row in study.describe(outcome({"none": 0.9, "bypass": 0.9}))}
    assert rows["maddpg-none"]["missed"] is False
    assert rows["maddpg-bypass"]["missed"] is True


def test_ways_to_act_differ_in_slot_0_alone():
    for task in ("", "listener-", "spread-"):
        keys = [f"{task}{way}" for way in ("bypass", "eval", "train") if f"{task}{way}" in BY_KEY]
        records = [study.training("maddpg", BY_KEY[key], 5, 60_000).record() for key in keys]
        plans = [Plan.parse(record["config"].pop("plan")) for record in records]
        assert len({plan[Slot.ACT] for plan in plans}) == len(keys) >= 2
        assert len({plan.modes[1:] for plan in plans}) == 1
        assert all(record == records[0] for record in records)


def test_algorithms_differ_in_what_critics_see_alone():
    maddpg, ddpg = (
        study.training(algo, BY_KEY["eval"], 5, 60_000).record() for algo in ("maddpg", "ddpg")
    )
    assert maddpg["config"].pop("centralized") is True
    assert ddpg["config"].pop("centralized") is False
    assert maddpg == ddpg


@pytest.mark.parametrize(
    ("options", "words"),
    [({"conditions": "none,skip"}, "skip"), ({"seeds": 0}, "seeds"), ({"steps": 0}, "steps")],
)
def test_bad_options_raise_one_line(tmp_path: Path, options, words):
    with pytest.raises(BatchproofError, match=words) as caught:
        study.run(tmp_path / "out", progress=False, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.full
def test_small_run_writes_everything_and_resumes_its_cells(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(study, "EVALUATIONS", 2)
    rally = study.TASKS["rally"]
    monkeypatch.setitem(
        study.TASKS,
        "rally",
        replace(
            rally,
            training=rally.training | {"eval_episodes": 2, "env_options": {"max_steps": 10}},
            config=rally.config | {"batch_size": 8},
        ),
    )
    options = {"seeds": 2, "steps": 40, "conditions": "bypass"}
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        made = study.run(tmp_path, progress=False, command="batchproof study", **options)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    for name in ("study.json", "report.html", "rally.png", "conditions.png", "metrics.parquet"):
        assert (tmp_path / name).stat().st_size > 1000
    written = read_json(tmp_path / "study.json")
    assert [row["name"] for row in written["conditions"]] == ["maddpg-bypass", "ddpg-bypass"]
    assert {claim["verdict"] for claim in written["claims"]} == {"inconclusive"}
    # Finished cells are read back: the same numbers, and no training.
    before = (tmp_path / "cells" / "ddpg-bypass" / "run.json").stat().st_mtime_ns
    again = study.run(tmp_path, progress=False, command="batchproof study", **options)
    assert (tmp_path / "cells" / "ddpg-bypass" / "run.json").stat().st_mtime_ns == before
    assert again["conditions"] == made["conditions"]
