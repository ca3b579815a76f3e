"""The pendulum-swingup study: its rules on made-up results, and a small real run."""

from pathlib import Path

import jax
import numpy as np
import pytest

from batchproof import BatchproofError
from batchproof.lab.loop import Result
from batchproof.records import read_json
from batchproof.study import conditions as shared
from batchproof.study.claims import pendulum_swingup as study

SEEDS = 6
BY_KEY = {condition.key: condition for condition in study.CONDITIONS}
CURES = ("raw-rewards", "wide-atoms", "scalar")
EXPECTED = {key: 100.0 for key in BY_KEY} | {"sac": 800.0} | dict.fromkeys(CURES, 700.0)


def outcome(returns, seeds=SEEDS):
    """An outcome in which every seed of a condition ends near one return."""
    spread = np.linspace(-30, 30, seeds)
    results = {}
    for key, value in returns.items():
        columns = {
            "seed": np.tile(np.arange(seeds), 8),
            "step": np.repeat(np.arange(1, 9), seeds),
            "return": np.concatenate([np.zeros(4 * seeds), np.tile(value + spread, 4)]),
        }
        results[key] = Result(columns, [], 1.0)
    return shared.Outcome(tuple(BY_KEY[key] for key in returns), seeds, results)


def verdicts(made):
    return {claim["id"]: claim["verdict"] for claim in study.judge(made)}


def test_expected_results_blame_the_atoms_and_nothing_else():
    found = verdicts(outcome(EXPECTED))
    assert found.pop("S1") == found.pop("S3") == found.pop("S4") == "supported"
    cures = {id_.removeprefix("S2-") for id_, verdict in found.items() if verdict == "supported"}
    assert cures == set(CURES)
    assert {verdict for id_, verdict in found.items() if id_.removeprefix("S2-") not in cures} == {
        "refuted"
    }


@pytest.mark.parametrize(
    ("claim", "returns", "verdict"),
    [
        ("S1", {"xqc": 800.0}, "refuted"),
        ("S1", {"xqc": 600.0}, "inconclusive"),
        ("S1", {"sac": 550.0}, "inconclusive"),  # SAC does not solve it either
        ("S2-raw-rewards", {"raw-rewards": 300.0}, "inconclusive"),
        ("S2-raw-rewards", {"xqc": 800.0}, "inconclusive"),  # nothing to cure
        ("S3", {"scalar": 100.0}, "refuted"),
        ("S3", {"scalar": 300.0}, "inconclusive"),
        ("S3", {"xqc": 800.0}, "inconclusive"),
        ("S4", {"sac-raw": 800.0}, "refuted"),
        ("S4", {"sac-raw": 600.0}, "inconclusive"),
    ],
)
def test_each_rule_can_go_the_other_way(claim, returns, verdict):
    assert verdicts(outcome(EXPECTED | returns))[claim] == verdict


def test_no_verdict_on_few_seeds_or_without_the_conditions():
    assert set(verdicts(outcome(EXPECTED, seeds=4)).values()) == {"inconclusive"}
    claims = {claim["id"]: claim for claim in study.judge(outcome({"sac": 800.0, "xqc": 100.0}))}
    assert claims["S1"]["verdict"] == "supported"
    assert claims["S2-no-delay"]["why"].endswith("sac,xqc,no-delay.")


def test_score_is_the_last_evaluations_and_a_diverged_seed_earns_nothing():
    made = outcome(EXPECTED)
    assert study.score(made, "sac").mean() == pytest.approx(800)
    made.results["sac"].metrics["return"][-1] = np.nan
    assert study.score(made, "sac")[-1] == 0
    row = study.describe(made)[0]
    assert (row["name"], row["diverged"], row["solved"]) == ("sac", 1, SEEDS - 1)
    rows = {row["name"]: row for row in study.describe(outcome(EXPECTED | {"no-delay": 700.0}))}
    assert rows["no-delay"]["missed"] is True
    assert rows["xqc"]["missed"] is False


def flat(record, prefix=""):
    pairs = {}
    for key, value in record.items():
        pairs |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return pairs


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("no-norm", {"actor.norm.kind", "actor.norm.placement", "actor.norm.momentum",
                     "actor.norm.eps", "actor.norm.running_variance", "actor.bias"}),
        ("layer-norm", {"actor.norm.kind", "actor.norm.momentum", "actor.norm.eps",
                        "actor.norm.running_variance"}),
        ("no-projection", {"actor.project"}),
        ("raw-rewards", {"normalize_rewards", "low", "high"}),
        ("wide-atoms", {"low", "high"}),
        ("one-update", set()),
        ("no-delay", {"policy_delay"}),
        ("alpha-1", {"initial_alpha"}),
        ("entropy-1", {"entropy_per_dimension"}),
    ],
)  # fmt: skip
def test_each_switch_changes_what_it_says_alone(key, changed):
    base, other = (flat(study.training(BY_KEY[name], 5, 20_000).record()) for name in ("xqc", key))
    found = {name for name in base if base[name] != other[name]}
    if key == "one-update":
        assert found == {"gradient_steps"}
        return
    both = {name.replace("actor", "critic") for name in changed} | changed
    assert found == {f"config.{name}" for name in both}


def test_raw_observations_are_all_that_sac_raw_changes():
    base, raw = (flat(study.training(BY_KEY[k], 5, 20_000).record()) for k in ("sac", "sac-raw"))
    assert {name for name in base if base[name] != raw[name]} == {"normalize_obs"}


def test_regression_shares_all_that_crossq_s_agent_has_with_xqc_s():
    scalar, base = (
        flat(study.training(BY_KEY[name], 5, 20_000).record()) for name in ("scalar", "xqc")
    )
    shared_names = (scalar.keys() & base.keys()) - {"algo"}
    assert {name for name in shared_names if scalar[name] != base[name]} == set()
    assert {name.removeprefix("config.") for name in base.keys() - scalar.keys()} == {
        "atoms", "low", "high", "normalize_rewards",
    }  # fmt: skip
    assert scalar["config.target_network"] is True


@pytest.mark.parametrize(
    ("options", "words"), [({"conditions": "xqc,never"}, "never"), ({"seeds": 0}, "seeds")]
)
def test_bad_options_raise_one_line(tmp_path: Path, options, words):
    with pytest.raises(BatchproofError, match=words) as caught:
        study.run(tmp_path / "out", progress=False, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.full
def test_small_run_writes_everything_and_resumes_its_cells(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(study, "EVALUATIONS", 2)
    options = {"seeds": 2, "steps": 20, "conditions": "sac,xqc,scalar"}
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        made = study.run(tmp_path, progress=False, command="batchproof study", **options)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    for name in ("study.json", "report.html", "curves.png", "conditions.png", "values.png",
                 "metrics.parquet"):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 1000
    written = read_json(tmp_path / "study.json")
    assert [row["algo"] for row in written["conditions"]] == ["sac", "xqc", "crossq"]
    assert {claim["verdict"] for claim in written["claims"]} == {"inconclusive"}
    before = (tmp_path / "cells" / "xqc" / "run.json").stat().st_mtime_ns
    again = study.run(tmp_path, progress=False, command="batchproof study", **options)
    assert (tmp_path / "cells" / "xqc" / "run.json").stat().st_mtime_ns == before
    assert again["conditions"] == made["conditions"]
