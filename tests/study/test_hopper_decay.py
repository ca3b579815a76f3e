"""The hopper-decay study: its measure, its rules on made-up results, and a small real run."""

from pathlib import Path

import jax
import numpy as np
import pytest

from batchproof import BatchproofError
from batchproof.lab.loop import Result
from batchproof.records import read_json
from batchproof.study import conditions as shared
from batchproof.study.claims import hopper_decay as study

SEEDS = 6
BY_KEY = {condition.key: condition for condition in study.CONDITIONS}
LOST = {key: 200.0 for key in BY_KEY} | {"crossq": 1200.0}
INTERVAL = 10_000


def returns_that_lose(lost, steps, seeds=SEEDS):
    """(seeds, T): up to 3000 in the first fifth, then a last window that is ``lost`` lower."""
    count, wide = steps // INTERVAL, study.WINDOW // INTERVAL
    values = np.full((seeds, count), 3000.0)
    values[:, : count // 5] = np.linspace(0, 3000, count // 5)
    values[:, -wide:] -= lost
    return values + np.linspace(-30, 30, seeds)[:, None]


def outcome(lost, steps=400_000, seeds=SEEDS):
    """An outcome in which the seeds of a condition lose about so much at the end."""
    results = {}
    for key, value in lost.items():
        # Decay differs a little from seed to seed.
        values = returns_that_lose(value + np.linspace(-20, 20, seeds)[:, None], steps, seeds)
        columns = {
            "seed": np.tile(np.arange(seeds), values.shape[1]),
            "step": np.repeat(np.arange(1, values.shape[1] + 1) * INTERVAL, seeds),
            "return": values.T.ravel(),
            # Both layers double, from 1 and from 3.
            "weight_length/critic/linear_0": np.repeat(np.linspace(1, 2, values.shape[1]), seeds),
            "weight_length/critic/linear_1": np.repeat(np.linspace(3, 6, values.shape[1]), seeds),
        }
        results[key] = Result(columns, [], 1.0)
    return shared.Outcome(tuple(BY_KEY[key] for key in lost), seeds, results)


def verdicts(made):
    return {claim["id"]: claim["verdict"] for claim in study.judge(made)}


def test_decay_is_the_best_window_minus_the_last():
    steps = np.arange(1, 41) * INTERVAL
    np.testing.assert_allclose(study.decay(steps, returns_that_lose(800.0, 400_000)), 800)
    rising = np.linspace(0, 3000, 40)[None]
    assert study.decay(steps, rising) == 0
    # One lucky evaluation counts with the share of the window that it fills.
    lucky = np.zeros((1, 40))
    lucky[0, 10] = 500
    assert study.decay(steps, lucky) == pytest.approx(100)
    lost = np.full((1, 40), 1000.0)
    lost[0, 30:] = np.nan
    assert study.decay(steps, lost) == 1000
    # A run shorter than the window is cut into three.
    assert study.decay(np.array([10, 20, 30]), np.array([[3.0, 5.0, 1.0]])) == 4


def test_the_fall_is_from_a_window_named_beforehand():
    steps = np.arange(1, 41) * INTERVAL
    returns = np.zeros((2, 40))
    returns[:, 7:12] = [[3000.0], [1000.0]]  # the evaluations at 80k to 120k
    returns[:, 20] = 9000.0  # luck between the two windows counts for nothing
    returns[:, -5:] = 2000.0
    np.testing.assert_allclose(study.fall(steps, returns), [1000, -1000])
    returns[0, -3:] = np.nan
    assert study.fall(steps, returns)[0] == pytest.approx(3000 - 2 * 2000 / 5)
    assert study.fall(steps[:17], returns[:, :17]).tolist() == [0, 0]  # too short


def test_weights_stand_beside_the_returns():
    made = outcome(LOST)
    steps, lengths = study.weight_lengths(made, "crossq")
    assert lengths.shape == (SEEDS, len(steps))
    assert lengths[0, 0] == 2
    rows = study.describe(made)
    assert rows[0]["weight_growth"] == pytest.approx([2] * SEEDS)
    rows[1]["weight_growth"][0] = None  # a seed that diverged
    text = study.explanation({"claims": study.judge(made), "conditions": rows})
    assert "weights grew by: CrossQ 2, SAC 2," in text
    assert "That it falls is supported." in text
    for name in list(made.results["crossq"].metrics):
        if name.startswith("weight_length"):  # cells of an earlier version
            del made.results["crossq"].metrics[name]
    assert np.isnan(study.weight_lengths(made, "crossq")[1]).all()


def test_expected_results_support_every_claim():
    assert set(verdicts(outcome(LOST)).values()) == {"supported"}


@pytest.mark.parametrize(
    ("claim", "lost", "verdict"),
    [
        ("H1", {"sac": 1200.0}, "refuted"),
        ("H1", {"sac": 1000.0}, "inconclusive"),
        ("H3", {"crossq": 100.0}, "refuted"),
        ("H3", {"crossq": 200.0}, "inconclusive"),
        ("H2-projected", {"projected": 1200.0}, "refuted"),
        ("H2-projected", {"projected": 1000.0}, "inconclusive"),
        ("H2-projected", {"crossq": 100.0, "projected": 100.0}, "inconclusive"),  # no decay
    ],
)
def test_each_rule_can_go_the_other_way(claim, lost, verdict):
    assert verdicts(outcome(LOST | lost))[claim] == verdict


def test_no_verdict_on_few_seeds_or_short_runs_and_the_text_says_why():
    assert set(verdicts(outcome(LOST, seeds=4)).values()) == {"inconclusive"}
    short = study.judge(outcome(LOST, steps=290_000))
    assert {claim["verdict"] for claim in short} == {"inconclusive"}
    assert all("No verdict before 300000 steps" in claim["why"] for claim in short)
    rows = {row["name"]: row for row in study.describe(outcome(LOST, steps=290_000))}
    assert rows["crossq"]["missed"] is None
    rows = {row["name"]: row for row in study.describe(outcome(LOST | {"sac": 900.0}))}
    assert (rows["crossq"]["missed"], rows["sac"]["missed"]) == (False, True)


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
        ("projected", {"actor.project", "critic.project"}),
        ("target", {"target_network"}),
        ("slow", {"actor.norm.momentum", "critic.norm.momentum"}),
        ("falling", {"learning_rate_end", "schedule_steps"}),
        ("b1", {"adam_b1"}),
        ("wn", {"actor.project", "critic.project", "target_network"}),
    ],
)
def test_each_switch_changes_what_it_says_alone(key, changed):
    base, other = (flat(study.training(BY_KEY[n], 5, 300_000).record()) for n in ("crossq", key))
    assert {n.removeprefix("config.") for n in base if base[n] != other[n]} == changed


def test_norm_switches_leave_all_but_the_norm():
    base = flat(study.training(BY_KEY["crossq"], 5, 300_000).record())
    for key in ("batch", "layer"):
        other = flat(study.training(BY_KEY[key], 5, 300_000).record())
        found = {name for name in base if base[name] != other[name]}
        assert "config.critic.norm.kind" in found
        assert all(".norm." in name for name in found)
        assert other["config.critic.norm.placement"] == base["config.critic.norm.placement"]


def test_width_is_the_critics_alone():
    narrow, wide = (study.training(BY_KEY["crossq"], 5, 300_000, width) for width in (256, 1024))
    assert wide.config.critic.hidden == (1024, 1024)
    assert wide.config.actor == narrow.config.actor


@pytest.mark.parametrize(
    ("options", "words"),
    [({"conditions": "never"}, "never"), ({"seeds": 0}, "seeds"), ({"width": 0}, "width")],
)
def test_bad_options_raise_one_line(tmp_path: Path, options, words):
    with pytest.raises(BatchproofError, match=words) as caught:
        study.run(tmp_path / "out", progress=False, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.full
def test_small_run_writes_everything_and_resumes_its_cells(tmp_path: Path):
    pytest.importorskip("mujoco")
    options = {"seeds": 1, "steps": 24, "conditions": "crossq,sac", "width": 8}
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        made = study.run(tmp_path, progress=False, command="batchproof study", **options)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    for name in ("study.json", "report.html", "curves.png", "decay.png", "metrics.parquet"):
        assert (tmp_path / name).stat().st_size > 1000
    written = read_json(tmp_path / "study.json")
    assert {claim["verdict"] for claim in written["claims"]} == {"inconclusive"}
    before = (tmp_path / "cells" / "sac" / "run.json").stat().st_mtime_ns
    again = study.run(tmp_path, progress=False, command="batchproof study", **options)
    assert (tmp_path / "cells" / "sac" / "run.json").stat().st_mtime_ns == before
    assert again["conditions"] == made["conditions"]
