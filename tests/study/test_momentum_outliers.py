"""The momentum-outliers study: its watchers, its rules on made-up results, a small real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchproof import BatchproofError
from batchproof.lab.agents import reinforce
from batchproof.lab.episodic import Stepper
from batchproof.lab.nets import Network
from batchproof.modes import Plan
from batchproof.records import read_json
from batchproof.study.claims import momentum_outliers as study
from batchproof.study.claims.momentum_outliers import WATCHERS, WINDOW, Watcher

SEEDS = 10


def outcome(scores: dict[tuple[str, str, str], float], seeds: int = SEEDS, **lab: float) -> Any:
    """Every seed of a condition has nearly the score given, by default .95; at all batches."""
    watched = {}
    spread = np.linspace(-0.02, 0.02, seeds)

    def cells(agent: str, statistics: str) -> np.ndarray:
        arms = [scores.get((agent, arm, statistics), 0.95) + spread for arm in study.ARMS]
        return study.BEST * np.concatenate(arms)

    for agent in study.AGENTS:
        eval_return = np.stack([cells(agent, w.name) for w in WATCHERS], -1)
        eval_return = np.repeat(eval_return[:, None], 2 * WINDOW, 1)
        for (name, arm, statistics), value in scores.items():
            if name == agent and statistics.endswith(" after"):
                watcher = [w.name for w in WATCHERS].index(statistics.removesuffix(" after"))
                rows = slice(seeds, None) if arm == "on" else slice(seeds)
                eval_return[rows, WINDOW:, watcher] = study.BEST * (value + spread)[:, None]
        train = np.repeat(cells(agent, "train mode")[:, None], 2 * WINDOW, 1)
        blank = np.zeros((2 * seeds, 2 * WINDOW))
        wide = np.ones(eval_return.shape)
        shown = np.zeros((2 * seeds, len(study.SHOWN), WINDOW))
        watched[agent] = study.Watched(
            blank, blank, train, blank + 1, eval_return, wide, wide, shown, 1.0
        )
    held = {"raw": lab.get("raw", 0.05), "standardized": lab.get("standardized", 0.97)}
    eval_only = {arm: study.BEST * (value + spread) for arm, value in held.items()}
    return study.Outcome(seeds, watched, {"eval-only": eval_only})


def verdicts(made: Any) -> dict[str, str]:
    return {claim["id"]: claim["verdict"] for claim in study.judge(made)}


BAD = {("linear", "on", f"ema {rho:g}"): 0.2 for rho in (0.01, 0.03, 0.1, 0.3, 0.5, 0.7)}


def test_outliers_as_the_cause() -> None:
    assert verdicts(outcome(BAD)) == {
        "C1": "refuted",
        "C1b": "supported",
        "C2": "supported",
        "C2b": "refuted",
        "C3": "refuted",
        "L": "refuted",
        "C4": "supported",
        "C4b": "refuted",
        "C5": "supported",
    }


@pytest.mark.parametrize(
    ("claim", "scores", "lab", "verdict"),
    [
        ("C1", {("linear", "on", "train mode"): 0.1}, {}, "supported"),
        ("C1b", {("linear", "on", "ema 0.7"): 0.9}, {}, "refuted"),
        ("C1b", {("linear", "on", "ema 0.99"): 0.1}, {}, "refuted"),
        ("C1b", {("linear", "on", "ema 0.9"): 0.1}, {}, "supported"),
        ("C1b", {("linear", "on", "ema 0.7"): 0.5}, {}, "inconclusive"),
        ("C2", {("linear", "on", "ema 0.1"): 0.9}, {}, "refuted"),
        ("C2", {("linear", "on", "train mode"): 0.1}, {}, "refuted"),
        ("C2b", {(a, "on", "ema 0.95"): 0.1 for a in ("linear", "mlp")}, {}, "supported"),
        ("C3", {("linear", "on", "ema 0.1 after"): 0.9}, {}, "supported"),
        (
            "L",
            {("mlp", "off", "ema 0.1"): 0.1, ("mlp", "off", "ema 0.1 after"): 0.9},
            {},
            "supported",
        ),
        ("L", {("mlp", "off", "ema 0.1"): 0.1}, {}, "refuted"),
        ("C4", {}, {"raw": 0.9}, "refuted"),
        ("C4b", {}, {"standardized": 0.1}, "supported"),
        ("C5", {("linear", "on", "huber 0.1"): 0.2}, {}, "refuted"),
        ("C5", {("linear", "off", "ema 0.1"): 0.3}, {}, "refuted"),
        ("C5", {("linear", "on", "median-of-means 0.1"): 0.5}, {}, "inconclusive"),
    ],
)
def test_each_rule_can_go_the_other_way(claim: str, scores: Any, lab: Any, verdict: str) -> None:
    assert verdicts(outcome(BAD | scores, **lab))[claim] == verdict


def test_no_verdict_on_few_seeds() -> None:
    assert set(verdicts(outcome(BAD, seeds=9)).values()) == {"inconclusive"}


def test_a_score_is_between_a_constant_action_and_perfect() -> None:
    returns = np.asarray([10.0, 4.0, -50.0, np.nan])
    np.testing.assert_allclose(study.score(returns), [1, 0.4, 0, 0])


def test_predictions_are_of_conditions_that_exist_and_miss_by_class() -> None:
    rows = {(r["group"], r["outliers"], r["statistics"]): r for r in study.describe(outcome(BAD))}
    watched = {key for key in study.PREDICTED if key[0] in study.AGENTS}
    assert watched <= rows.keys()
    assert rows["linear", "on", "ema 0.1"]["missed"] is False  # .2, as bad as predicted
    assert rows["linear", "off", "ema 0.01"]["missed"] is True  # .95 here, .3 predicted


@pytest.fixture
def few_watchers(monkeypatch: pytest.MonkeyPatch) -> tuple[Watcher, ...]:
    """All of them take long to compile."""
    few = (Watcher("ema", 0.1), Watcher("ema", 0.99))
    monkeypatch.setattr(study, "WATCHERS", few)
    return few


def test_watchers_see_what_the_network_s_own_norms_see(few_watchers: Any) -> None:
    """The agent's own statistics are one of the watchers', in every layer, over many batches."""
    rng = np.random.default_rng(0)
    config = study.training(study.AGENTS["mlp"], "tTEEEE", 1, 9600, (study.RAW,)).config
    state = reinforce.init(config, jax.random.key(0), 4, 1)
    watchers = study.fresh_watchers(state)
    move = jax.jit(study.move_watchers)
    for _ in range(5):
        rows = jnp.asarray(rng.normal(3, 2, (40, 4)), jnp.float32)
        watchers = move(watchers, study.layer_inputs(config, state.actor, rows))
        _, stats = reinforce.policy(config, state.actor, rows, Plan.parse("TEEEE")[1])
        state = state._replace(actor=Network(state.actor.params, stats))
    own, fast = watchers
    for layer, stats in state.actor.stats.items():
        for key, value in stats.items():
            np.testing.assert_allclose(own[layer][key], value, rtol=1e-4, atol=1e-5)
    # And they differ from each other where they should.
    assert (np.asarray(fast["norm_input"]["mean"]) != np.asarray(own["norm_input"]["mean"])).all()


def test_watching_trains_as_the_lab_does(few_watchers: Any) -> None:
    """The study's own loop gives the lab's agent, and frozen batches leave its weights alone."""
    steps = (WINDOW + 1) * study.UPDATE_STEPS
    made = study.training(study.AGENTS["linear"], "tTEEEE", 1, steps, (study.OUTLIERS,))
    stepper = Stepper(made)
    one = jax.tree.map(lambda leaf: leaf[0], stepper.seed)
    seed, watchers = jax.jit(
        lambda seed: study._train(made, seed, study.fresh_watchers(seed.agent), 2)
    )(one)
    stepper.advance(2 * study.UPDATE_STEPS)
    for a, b in zip(jax.tree.leaves(seed.agent), jax.tree.leaves(stepper.seed.agent), strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-4, atol=1e-5)
    frozen, *_ = jax.jit(lambda seed, w: study._batch(made, seed, w, 2, jnp.asarray(False)))(
        seed, watchers
    )
    for a, b in zip(*(jax.tree.leaves(s.agent.actor.params) for s in (seed, frozen)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert frozen.agent.actor.stats["norm_input"]["count"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conditions": "linear,quadratic"}, "quadratic"),
        ({"seeds": 0}, "seeds"),
        ({"steps": 10}, "steps must be at least"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BatchproofError, match=words):
        study.run(tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.full
def test_a_small_run_writes_everything_and_is_read_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "seeds": 2,
        "steps": (WINDOW + 1) * study.UPDATE_STEPS,
        "conditions": "linear",
        "progress": False,
    }
    first = study.run(tmp_path / "out", **options)
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} >= {
        "study.json",
        "report.html",
        "metrics.parquet",
        "switch.png",
        "rho.png",
        "frozen.png",
    }
    assert {claim["verdict"] for claim in first["claims"]} == {"inconclusive"}
    held = (tmp_path / "out" / "cells" / "linear" / "watched.npz").stat().st_mtime_ns
    again = study.run(tmp_path / "out", **options)
    assert (tmp_path / "out" / "cells" / "linear" / "watched.npz").stat().st_mtime_ns == held
    assert again["conditions"] == first["conditions"]
    assert read_json(tmp_path / "out" / "study.json")["study"] == study.NAME
    with pytest.raises(BatchproofError, match="another run"):
        study.run(tmp_path / "out", **(options | {"steps": (WINDOW + 3) * study.UPDATE_STEPS}))
