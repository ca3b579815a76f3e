"""The constant-reward study: its rules on made-up results, and a small real run."""

from pathlib import Path

import numpy as np
import pytest

from batchproof import BatchproofError, Plan, Slot
from batchproof.lab.loop import Result
from batchproof.records import read_json
from batchproof.study.claims import constant_reward as study

SEEDS = 6
BY_KEY = {condition.key: condition for condition in study.CONDITIONS}


def outcome(returns: dict[str, float], kappa: dict[str, float], seeds: int = SEEDS):
    """An outcome in which every seed of a condition ends near one return; TD3 and SAC alike."""
    results = {}
    spread = np.linspace(-0.5, 0.5, seeds)
    for algo in study.ALGOS:
        for key, value in returns.items():
            columns = {
                "seed": np.tile(np.arange(seeds), 2),
                "step": np.repeat([100, 200], seeds),
                "return": np.concatenate([np.zeros(seeds), value + spread]),
                "kappa": np.full(2 * seeds, kappa.get(key, 0.5)),
            }
            results[f"{algo}-{key}"] = Result(columns, [], 1.0)
    conditions = tuple(BY_KEY[key] for key in returns)
    return study._Outcome(conditions, ("terminated",), seeds, 200, results)


def verdicts(made) -> dict[str, str]:
    return {claim["id"]: claim["verdict"] for claim in study.judge(made)}


PREDICTED = {"none": 29.0, "slot3-T": 2.0, "slot3-E": 29.0, "fixed-data-T": 2.0}
BLIND = {"slot3-T": 1e-7, "fixed-data-T": 1e-7}


def test_predicted_results_support_the_explanation_and_refute_the_advice():
    assert verdicts(outcome(PREDICTED, BLIND)) == {
        "D1": "supported",
        "D2": "supported",
        "D3": "supported",
        "D4": "refuted",
        "D5": "supported",
    }


@pytest.mark.parametrize(
    ("claim", "returns", "kappa", "verdict"),
    [
        ("D1", {"none": 10.0}, {}, "refuted"),
        ("D1", {"none": 24.0}, {}, "inconclusive"),
        ("D2", {"slot3-T": 28.0}, {}, "refuted"),
        ("D3", {"fixed-data-T": 28.0}, {}, "refuted"),
        ("D3", {"slot3-E": 2.0}, {}, "inconclusive"),
        ("D4", {"slot3-E": 10.0}, {}, "supported"),
        ("D5", {"slot3-E": 2.0}, {}, "refuted"),
        ("D5", {}, {"slot3-T": 0.1}, "refuted"),
        ("D5", {}, {"slot3-E": 1e-3}, "inconclusive"),
    ],
)
def test_each_rule_can_go_the_other_way(claim, returns, kappa, verdict):
    assert verdicts(outcome(PREDICTED | returns, BLIND | kappa))[claim] == verdict


def test_no_verdict_on_few_seeds():
    assert set(verdicts(outcome(PREDICTED, BLIND, seeds=4)).values()) == {"inconclusive"}


def test_claim_without_its_conditions_says_what_it_needs():
    claims = study.judge(outcome({"none": 29.0}, {}))
    assert claims[0]["verdict"] == "supported"
    assert claims[1]["verdict"] == "inconclusive"
    assert "slot3-T" in claims[1]["why"]


def test_diverged_seed_counts_as_the_worst_return():
    made = outcome(PREDICTED, BLIND)
    made.results["td3-none"].metrics["return"][-1] = np.nan
    assert made.counted("td3", "none", "terminated")[-1] == study.WORST_RETURN
    assert study.describe(made)[0]["diverged"] == 1


def test_prediction_misses_by_class():
    rows = {row["name"]: row for row in study.describe(outcome({"slot3-T": 29.0}, {}))}
    assert rows["td3-slot3-T-terminated"]["missed"] is True


def test_conditions_cover_every_row_of_the_table_and_differ():
    assert {c.row for c in study.CONDITIONS} == {str(row) for row in range(1, 17)}
    assert len(BY_KEY) == len(study.CONDITIONS)
    records = [
        str(study.training("td3", c, 5, 3000, ("terminated",)).record()) for c in study.CONDITIONS
    ]
    assert len(set(records)) == len(records)


def test_the_cure_differs_from_the_failure_in_slot_3_alone():
    for algo in study.ALGOS:
        failing, cured = (
            study.training(algo, BY_KEY[key], 5, 3000, ("terminated",)).record()
            for key in ("slot3-T", "slot3-E")
        )
        plans = [Plan.parse(record["config"].pop("plan")) for record in (failing, cured)]
        assert [slot for slot in Slot if plans[0][slot] != plans[1][slot]] == [Slot.POLICY_Q]
        assert failing == cured


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conditions": "none,slot4-T"}, "slot4-T"),
        ({"ending": "never"}, "never"),
        ({"seeds": 0}, "seeds"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_options_raise_one_line(tmp_path: Path, options, words):
    with pytest.raises(BatchproofError, match=words) as caught:
        study.run(tmp_path / "out", progress=False, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.full
def test_small_run_writes_everything_and_resumes_its_cells(tmp_path: Path):
    options = {"seeds": 2, "steps": 150, "conditions": "none,slot3-T,slot3-E", "ending": "both"}
    made = study.run(tmp_path, progress=False, command="batchproof study", **options)
    for name in ("study.json", "report.html", "answer.png", "curves.png", "metrics.parquet"):
        assert (tmp_path / name).stat().st_size > 1000
    written = read_json(tmp_path / "study.json")
    assert len(written["conditions"]) == 2 * 3 * 2
    assert {claim["verdict"] for claim in written["claims"]} == {"inconclusive"}
    kappa = {row["name"]: row["kappa"] for row in written["conditions"]}
    assert kappa["td3-slot3-T-terminated"] < 1e-5 < 0.1 < kappa["td3-slot3-E-terminated"]
    # Finished cells are read back: the same numbers, and no training.
    before = (tmp_path / "cells" / "sac-slot3-E" / "run.json").stat().st_mtime_ns
    again = study.run(tmp_path, progress=False, command="batchproof study", **options)
    assert (tmp_path / "cells" / "sac-slot3-E" / "run.json").stat().st_mtime_ns == before
    assert again["conditions"] == made["conditions"]
    with pytest.raises(BatchproofError, match="another run"):
        study.run(tmp_path, progress=False, **(options | {"steps": 160}))
