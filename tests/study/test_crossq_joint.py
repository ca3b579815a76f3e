"""The crossq-joint study: its measure on known cases, its rules on made-up results, a real run."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchproof import BatchproofError, Plan, Slot
from batchproof.lab.agents import crossq
from batchproof.lab.loop import Result
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.passes import Batch
from batchproof.records import read_json, write_json
from batchproof.study import conditions as shared
from batchproof.study.claims import crossq_joint as study

SEEDS = 6
BY_KEY = {condition.key: condition for condition in study.CONDITIONS}
EXPECTED = {
    "joint-online": -150.0,
    "joint-target": -150.0,
    "te-online": -1000.0,
    "te-target": -150.0,
    "tt-online": -1000.0,
    "tt-target": -150.0,
    "ee-online": -150.0,
    "none-online": -400.0,
    "swingup-joint-online": 800.0,
    "swingup-te-online": 100.0,
    "swingup-tt-online": 100.0,
}
ERRORS = {"joint-online": 0.05, "tt-online": 0.95}


def outcome(returns, seeds=SEEDS):
    """An outcome in which every seed of a condition ends near one return."""
    spread = np.linspace(-9, 9, seeds)
    results = {}
    for key, value in returns.items():
        columns = {
            "seed": np.tile(np.arange(seeds), 8),
            "step": np.repeat(np.arange(1, 9), seeds),
            "return": np.concatenate([np.full(4 * seeds, -1500.0), np.tile(value + spread, 4)]),
        }
        results[key] = Result(columns, [], 1.0)
    return shared.Outcome(tuple(BY_KEY[key] for key in returns), seeds, results)


def biases(errors, seeds=SEEDS):
    """A gap of 10 that is off by a share."""
    return {
        key: {"gap": [10 - 10 * share] * seeds, "gap_reference": [10.0] * seeds}
        for key, share in errors.items()
    }


def verdicts(returns, errors=ERRORS, seeds=SEEDS):
    found = study.judge(outcome(returns, seeds), biases(errors, seeds))
    return {claim["id"]: claim["verdict"] for claim in found}


def test_expected_results_support_every_claim():
    assert set(verdicts(EXPECTED).values()) == {"supported"}


@pytest.mark.parametrize(
    ("claim", "returns", "errors", "verdict"),
    [
        ("J1", {"te-online": -150.0}, {}, "refuted"),
        ("J1", {"te-online": -400.0}, {}, "inconclusive"),
        ("J1", {"joint-online": -900.0}, {}, "inconclusive"),  # nothing works there
        ("J2", {"tt-online": -150.0}, {}, "refuted"),
        ("J2", {"tt-online": -250.0}, {}, "inconclusive"),
        ("J3", {"tt-online": -150.0}, {}, "refuted"),
        ("J3", {}, {"tt-online": 0.1}, "refuted"),
        ("J3", {}, {"tt-online": 0.4}, "inconclusive"),
        ("J3", {}, {"joint-online": 0.6}, "inconclusive"),
        ("J4", {"tt-target": -1000.0}, {}, "refuted"),
        ("J4", {"te-target": -250.0}, {}, "inconclusive"),
        ("J5", {"ee-online": -1000.0}, {}, "refuted"),
        ("J5", {"ee-online": -250.0}, {}, "inconclusive"),
        ("J6", {"none-online": -150.0}, {}, "refuted"),
        ("J7", {"swingup-te-online": 800.0}, {}, "refuted"),
        ("J7", {"swingup-te-online": 650.0}, {}, "inconclusive"),
        ("J7", {"swingup-joint-online": 300.0}, {}, "inconclusive"),  # it works nowhere
    ],
)
def test_each_rule_can_go_the_other_way(claim, returns, errors, verdict):
    assert verdicts(EXPECTED | returns, ERRORS | errors)[claim] == verdict


def test_no_verdict_on_few_seeds_or_without_the_conditions():
    assert set(verdicts(EXPECTED, seeds=4).values()) == {"inconclusive"}
    claims = study.judge(outcome({"joint-online": -150.0}), biases(ERRORS))
    assert {claim["verdict"] for claim in claims} == {"inconclusive"}
    assert "te-online" in claims[0]["why"]


def test_diverged_seed_counts_as_the_worst_return_and_the_most_error():
    made, measured = outcome(EXPECTED), biases(ERRORS)
    made.results["joint-online"].metrics["return"][-1] = np.nan
    measured["joint-online"]["gap"][-1] = None
    assert study.score(made, "joint-online")[-1] == study.TASKS["pendulum"].worst
    rows = {row["name"]: row for row in study.describe(made, measured)}
    assert rows["joint-online"]["diverged"] == 1
    np.testing.assert_allclose(rows["joint-online"]["gap_error"], [0.05] * 5 + [study.MOST])
    assert rows["tt-online"]["missed"] is False
    assert rows["none-online"]["gap_error"] is None


def test_conditions_differ_in_slots_3_to_5_and_in_the_target_network_alone():
    for network in study.NETWORKS:
        records = {
            forward: study.training(BY_KEY[f"{forward}-{network}"], 5, 10_000).record()
            for forward in study.FORWARDS
            if forward != "none"
        }
        plans = {key: Plan.parse(record["config"].pop("plan")) for key, record in records.items()}
        assert all(record == records["joint"] for record in records.values())
        assert {str(plan[Slot.POLICY_Q]) for key, plan in plans.items() if key != "ee"} == {"E"}
        assert len({(str(p[Slot.REPLAY_Q]), str(p[Slot.TARGET_Q])) for p in plans.values()}) == 5
    online, target = (study.training(BY_KEY[f"tt-{n}"], 5, 10_000).record() for n in study.NETWORKS)
    assert (online["config"].pop("target_network"), target["config"].pop("target_network")) == (
        False,
        True,
    )
    assert online == target


def agent_and_batch(plan, target=False, rows=64):
    """A linear critic on normalized inputs, and batches in which a' lies above a."""
    config = crossq.Config(
        actor=MLP(()),
        critic=MLP((), Norm("batch", "input", eps=1e-3)),
        plan=Plan.parse(plan),
        gamma=1.0,
        batch_size=rows,
        target_network=target,
    )
    agent = crossq.init(config, jax.random.key(1), 3, 2)
    noise = np.random.default_rng(0).normal(size=(4, rows, 3)).astype(np.float32)
    batch = Batch(
        obs=jnp.asarray(noise[0]),
        action=jnp.asarray(0.3 * np.tanh(noise[1][:, :2]) - 0.6),
        reward=jnp.asarray(noise[2][:, 0]),
        next_obs=jnp.asarray(noise[3] + 0.5),
        terminated=jnp.zeros(rows),
    )
    return config, agent, batch


def bias_of(config, agent, batch):
    measure = jax.jit(partial(study.td_bias, config))
    return measure(agent, batch, jax.random.key(2))


@pytest.fixture
def _quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("_quick_compilation")
def test_apart_in_t_erases_the_gap_and_a_joint_pass_keeps_it():
    """Of a linear critic on normalized inputs the mean in T is its bias, whatever goes in."""
    found = {}
    for plan in ("TEEJJ", "TEETT", "TEETE"):
        values = bias_of(*agent_and_batch(plan))
        found[plan] = {name: float(value) for name, value in values.items()}
        bias = found[plan]
        # With gamma 1 and no terminations both parts of the bias are the error of the gap.
        error = bias["gap"] - bias["gap_reference"]
        assert bias["current"] + bias["target"] == pytest.approx(error, abs=1e-5)
    reference = found["TEEJJ"]["gap_reference"]
    assert abs(reference) > 0.05
    assert found["TEETT"]["gap_reference"] == pytest.approx(reference, abs=1e-5)
    assert found["TEETT"]["gap"] == pytest.approx(0, abs=1e-5)
    assert found["TEEJJ"]["gap"] == pytest.approx(reference, abs=1e-5)
    errors = {
        plan: study.gap_error({name: [value] for name, value in bias.items()})
        for plan, bias in found.items()
    }
    assert errors["TEETT"] == pytest.approx(1, abs=1e-4)
    assert errors["TEEJJ"] == pytest.approx(0, abs=1e-4)
    assert errors["TEETE"] > 0.1  # fresh running statistics fit neither batch


@pytest.mark.usefixtures("_quick_compilation")
def test_a_target_network_is_valued_on_its_own_weights():
    config, agent, batch = agent_and_batch("TEEJJ", target=True)
    params = jax.tree.map(lambda leaf: 2 * leaf, agent.target_critic.params)
    agent = agent._replace(target_critic=agent.target_critic._replace(params=params))
    online = bias_of(config, agent._replace(target_critic=None), batch)
    bias = bias_of(config, agent, batch)
    assert float(bias["target"]) == pytest.approx(0, abs=1e-5)
    assert abs(float(bias["gap"] - online["gap"])) > 0.02


@pytest.mark.parametrize("steps", [6000, 100_000, 1000, 40])
def test_a_run_has_twelve_evaluations_whatever_its_length(steps: int) -> None:
    """It is stopped one interval before its end, and never runs longer than was asked for."""
    for condition in (BY_KEY["tt-online"], BY_KEY["swingup-tt-online"]):
        made = study.training(condition, 2, steps)
        end = made.steps - made.evaluation_interval
        assert end == study.EVALUATIONS * made.evaluation_interval
        assert steps - study.EVALUATIONS < end <= steps


@pytest.mark.parametrize(
    ("options", "words"),
    [({"conditions": "joint-online,never"}, "never"), ({"seeds": 0}, "seeds")],
)
def test_bad_options_raise_one_line(tmp_path: Path, options, words):
    with pytest.raises(BatchproofError, match=words) as caught:
        study.run(tmp_path / "out", progress=False, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.full
@pytest.mark.usefixtures("_quick_compilation")
def test_small_run_measures_the_bias_and_resumes_its_cells(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(study, "EVALUATIONS", 4)
    monkeypatch.setattr(study, "ROWS", 256)
    pendulum = study.TASKS["pendulum"]
    swingup = replace(study.TASKS["swingup"], env_options={"repeat": 4, "max_steps": 40})
    monkeypatch.setitem(study.TASKS, "pendulum", replace(pendulum, eval_episodes=1))
    monkeypatch.setitem(study.TASKS, "swingup", replace(swingup, eval_episodes=1))
    options = {"seeds": 2, "steps": 80, "conditions": "tt-online,none-target,swingup-tt-online"}
    made = study.run(tmp_path, progress=False, command="batchproof study", **options)
    for name in ("study.json", "report.html", "curves.png", "conditions.png", "gap.png",
                 "metrics.parquet"):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 1000
    written = read_json(tmp_path / "study.json")
    assert written["steps"] == 80
    rows = {row["name"]: row for row in written["conditions"]}
    assert rows["tt-online"]["bias"]["step"] == 80
    for key in ("tt-online", "swingup-tt-online"):
        assert np.isfinite(rows[key]["bias"]["target"]).all()
    assert rows["none-target"]["bias"] is None
    # Finished cells are read back, and one that was killed while its bias was measured goes on.
    cell = tmp_path / "cells" / "tt-online"
    before = (cell / "run.json").stat().st_mtime_ns
    (cell / "bias.json").unlink()
    # What was measured on another number of rows is measured anew.
    other = tmp_path / "cells" / "swingup-tt-online" / "bias.json"
    write_json(other, read_json(other) | {"rows": 128, "target": [9.0, 9.0]})
    again = study.run(tmp_path, progress=False, command="batchproof study", **options)
    assert (cell / "run.json").stat().st_mtime_ns == before
    assert again["conditions"] == made["conditions"]
    with pytest.raises(BatchproofError, match="other settings"):
        study.run(tmp_path, progress=False, **options | {"steps": 60})
