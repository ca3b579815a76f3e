"""The best-plan study: its plans, its rules on made-up results, and a small real run."""

from pathlib import Path

import numpy as np
import pytest

from batchproof import BatchproofError, Plan, Slot
from batchproof.lab.envs import JAX_ENVS
from batchproof.records import read_json
from batchproof.study import STUDIES
from batchproof.study.claims import best_plan as study

SEEDS = 6
TASKS = ("toy", "pendulum", "mass", "linear")
FINALISTS = ("TTEJJ", "TESTE", "TEMTE")
RANDOM = dict.fromkeys(TASKS, -100.0)
EVEN = {"none": 0.9, "TEEJJ": 0.9, "TTETT": 0.9, "TTEJJ": 0.9, "TESTE": 0.9, "TEMTE": 0.9}
FULL = dict.fromkeys(study.PLANS, 0.9)


def outcome(means, seeds=SEEDS, screen=FULL):
    """Every seed of a condition ends near one return, alike on all tasks: from -100 (random) up."""
    spread = np.linspace(-1, 1, seeds)
    finals = {
        ("sac", task, plan): 100 * value - 100 + (1 + i) * spread
        for task in TASKS
        for i, (plan, value) in enumerate((EVEN | means).items())
    }
    screens = {
        (task, plan): np.array([value - 0.01, value + 0.01]) * 100 - 100
        for task in TASKS[:3]
        for plan, value in screen.items()
    }
    return study.Outcome(TASKS, ("sac",), FINALISTS, RANDOM, screens, finals)


def verdicts(made):
    return {claim["id"]: claim["verdict"] for claim in study.judge(made)}


# --- plans ----------------------------------------------------------------------------------------


def test_the_plans_are_those_of_the_stated_rules():
    assert len(set(study.PLANS)) == len(study.PLANS) == 2 * 4 * 3
    assert set(study.NAMED) == {"TEEJJ", "TTETT"} <= set(study.PLANS)
    for text in study.PLANS:
        plan = Plan.parse(text)
        assert str(plan) == text
        assert plan[Slot.ACT].kind == "E"
        # Both networks' running statistics move while they learn.
        assert plan[Slot.ACTOR_UPDATE].updates
        assert plan[Slot.REPLAY_Q].updates
        config = study.training("sac", "pendulum", text, (0,), 100).config
        assert config.target_network != plan.joint
        assert (str(config.plan), config.actor, config.critic.norm) == (
            text, config.critic, study.NORM,
        )  # fmt: skip
    bare = study.training("td3", "pendulum", "none", (0,), 100).config
    assert bare.actor.norm.kind == bare.critic.norm.kind == "none"
    assert set(study.DEFAULT) <= set(study.PLANS) - set(study.NAMED)
    assert STUDIES[study.NAME].module == study.__name__


def test_every_task_but_those_on_request_is_in_both_stages_and_runs_in_jax():
    usual = [task for name, task in study.TASKS.items() if name not in study.ON_REQUEST]
    assert len(usual) == 4
    assert all(task.screen and task.env_id in JAX_ENVS for task in usual)


def test_screen_and_final_share_no_seed():
    assert study.FRESH > study.SCREEN_SEEDS


@pytest.mark.parametrize(
    ("names", "candidates", "more"),
    [
        (None, study.DEFAULT, ()),
        ("TEMTE,TEEJJ", ("TEMTE",), ()),
        ("td3", study.DEFAULT, ("td3",)),
        ("all,halfcheetah", set(study.PLANS) - set(study.NAMED), ("halfcheetah",)),
    ],
)
def test_what_conditions_names(names, candidates, more):
    found = study._chosen(names)
    assert (set(found[0]), found[1]) == (set(candidates), more)


# --- scores and the choice of finalists -----------------------------------------------------------


def test_scores_run_from_the_random_policy_to_the_best_mean():
    returns = {"a": np.array([0.0, 100.0]), "b": np.array([-50.0, np.nan])}
    found, best = study.scores(returns, random=-50.0)
    assert best == 50
    np.testing.assert_allclose(found["a"], [0.5, 1.5])
    np.testing.assert_allclose(found["b"], [0, 0])  # a diverged seed is a random policy
    nothing, _ = study.scores({"a": np.array([-60.0, -70.0])}, random=-50.0)
    assert not nothing["a"].any()


def test_the_best_of_the_screen_go_on_and_the_named_need_not():
    candidates = ("TEETE", "TESTE", "TEMTE", "TTEJJ")
    means = {"TEETE": 0.2, "TESTE": 0.9, "TEMTE": 0.4, "TTEJJ": 0.6, "TEEJJ": 1.0}
    screens = {("toy", plan): np.full(2, 100 * value) for plan, value in means.items()}
    # On the other task all are alike but one, which that does not bring into the final.
    screens |= {("mass", plan): np.full(2, 1.0 + (plan == "TEETE") / 10) for plan in means}
    random = {"toy": 0.0, "mass": 0.0}
    assert study.pick(screens, random, candidates) == ("TESTE", "TTEJJ", "TEMTE")
    assert study.pick({}, random, candidates[:2]) == candidates[:2]


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ({}, {"F3": "refuted", "F3-none": "refuted"}),
        ({"TESTE": 1.2}, {"F3": "supported", "F3-none": "supported"}),
        # Better than one of the two is not better than both.
        ({"TESTE": 1.2, "TTETT": 1.2}, {"F3": "refuted", "F3-none": "supported"}),
        ({"TESTE": 1.2, "none": 1.2}, {"F3": "supported", "F3-none": "refuted"}),
        # At the margin: 0.9 / 0.95 is 0.053 lower.
        ({"TESTE": 0.95}, {"F3": "inconclusive"}),
    ],
)
def test_each_verdict_can_be_reached(means, expected):
    found = verdicts(outcome(means))
    assert {claim: found[claim] for claim in expected} == expected


def test_that_there_is_no_better_plan_takes_the_screen_of_all():
    for screen in ({}, {"TESTE": 0.9, "TEMTE": 0.9}):
        found = verdicts(outcome({}, screen=screen))
        assert (found["F3"], found["F3-none"]) == ("inconclusive", "refuted")
        assert verdicts(outcome({"TESTE": 1.2}, screen=screen))["F3"] == "supported"
    assert verdicts(outcome({}, screen={}))["F3-slot3"] == "inconclusive"


@pytest.mark.parametrize(
    ("blind", "verdict"), [(0.3, "supported"), (0.9, "refuted"), (0.86, "inconclusive")]
)
def test_slot_3_is_judged_by_pairs_that_differ_in_it_alone(blind, verdict):
    rng = np.random.default_rng(0)
    screen = {
        plan: (blind if plan[2] == "T" else 0.9) + rng.normal(0, 0.03) for plan in study.PLANS
    }
    made = outcome({}, screen=screen)
    assert verdicts(made)["F3-slot3"] == verdict
    first, second = study._slot3_pairs(made)
    assert len(first) == len(second) == 6 * 3 * 2
    rows = {(row["slots"], row["modes"]): row["mean"] for row in study.factors(made)}
    assert len(rows) == 2 + 4 + 3
    gap = rows["slot 3", "T"] - rows["slot 3", "E"]
    assert gap == pytest.approx(first.mean() - second.mean())


def test_a_task_that_nothing_learns_is_left_out_and_named():
    made = outcome({"TESTE": 1.2})
    flat = -100 + np.linspace(-1, 1, SEEDS)
    finals = dict(made.finals) | {("sac", "linear", plan): flat for plan in EVEN}
    made = study.Outcome(TASKS, ("sac",), FINALISTS, RANDOM, {}, finals)
    assert made.learned("sac") == list(TASKS[:3])
    claim = study.judge(made)[0]
    assert (claim["verdict"], claim["n"]) == ("supported", 3 * SEEDS)
    assert "badly scaled" in claim["why"]
    none = study.Outcome(
        TASKS, ("sac",), FINALISTS, RANDOM, {}, {key: flat for key in finals}
    )  # fmt: skip
    assert set(verdicts(none).values()) == {"inconclusive"}


def test_no_verdict_on_few_seeds():
    few = outcome({"TESTE": 1.2}, seeds=4, screen={})
    assert set(verdicts(few).values()) == {"inconclusive"}


def test_intervals_widen_with_the_number_of_finalists():
    made = outcome({})
    assert study._level(made) == pytest.approx(1 - 0.05 / 3)
    assert {row["plan"] for row in study.differences(made)} == set(FINALISTS)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conditions": "TEEEE"}, "TEEEE"),
        ({"seeds": 0}, "seeds"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_options_raise_one_line(tmp_path: Path, options, words):
    with pytest.raises(BatchproofError, match=words) as caught:
        study.run(tmp_path / "out", progress=False, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.full
def test_small_run_screens_picks_writes_everything_and_resumes(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(study, "TASKS", {"mass": study.TASKS["mass"]})
    monkeypatch.setattr(study, "FINALISTS", 1)
    options = {"seeds": 2, "steps": 120, "conditions": "TEETE,TESTE"}
    made = study.run(tmp_path, progress=False, command="batchproof study", **options)
    pictures = ("finalists.png", "final-sac.png", "screen.png", "curves-sac.png")
    for name in ("study.json", "report.html", "metrics.parquet", *pictures):
        if name != "finalists.png" or made["differences"]:
            assert (tmp_path / name).stat().st_size > 1000
    written = read_json(tmp_path / "study.json")
    assert len(written["finalists"]) == 1
    stages = [row["stage"] for row in written["conditions"]]
    assert (stages.count("screen"), stages.count("final")) == (4, 4)
    assert {claim["verdict"] for claim in written["claims"][:2]} == {"inconclusive"}
    cell = tmp_path / "cells" / "final-mass-sac-none" / "run.json"
    before = cell.stat().st_mtime_ns
    again = study.run(tmp_path, progress=False, command="batchproof study", **options)
    assert cell.stat().st_mtime_ns == before
    assert again["conditions"] == made["conditions"]
