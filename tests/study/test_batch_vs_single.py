"""The study batch-vs-single: its measures on cases known beforehand, and its decision rules."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchproof.errors import BatchproofError
from batchproof.lab import nets, population
from batchproof.lab.agents import ddpg
from batchproof.lab.nets import Network
from batchproof.lab.passes import Batch
from batchproof.modes import B, E, Mode, T
from batchproof.study import STUDIES, statistics
from batchproof.study.claims import batch_vs_single as study
from batchproof.study.claims.batch_vs_single import (
    conditions,
    gaps,
    measures,
    other_actors,
    page,
    training,
    verdicts,
)
from batchproof.study.claims.batch_vs_single.conditions import (
    CONDITIONS,
    DEFAULT,
    DRAWS,
    GROUPS,
    POPULATION,
    PROBES,
    SIZES,
    STARTS,
    SYNC_SIZES,
    TD_PLANS,
    chosen,
    config_of,
)

KEY = jax.random.key(0)
BY_KEY = {condition.key: condition for condition in CONDITIONS}
ACT_E = BY_KEY["act-E"]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch):
    """Compile fast, and resample seldom: the intervals' ends move a little."""
    jax.config.update("jax_disable_most_optimizations", True)
    monkeypatch.setattr(statistics, "RESAMPLES", 199)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def agent() -> ddpg.State:
    """An agent of act-E with scattered norms and statistics, targets that lag."""
    init = jax.jit(partial(ddpg.init, config_of(ACT_E)), static_argnums=(1, 2))
    rng = np.random.default_rng(0)

    def scatter(leaf: Any) -> Any:
        if leaf.dtype == jnp.int32:
            return leaf
        return leaf + jnp.asarray(rng.uniform(-0.2, 0.2, leaf.shape), jnp.float32)

    return jax.tree.map(scatter, init(KEY, 3, 1))


def draw(rows: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    shapes = {"obs": (rows, 3), "action": (rows, 1), "reward": (rows,), "next_obs": (rows, 3)}
    parts = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    return Batch(**parts, terminated=jnp.asarray(rng.uniform(size=rows) < 0.2, jnp.float32))


# --- training and acting --------------------------------------------------------------------------


def test_a_batch_of_environments_is_stored_in_order_and_learned_from() -> None:
    """Rows of one environment follow each other; nothing is learned until `STARTS`."""
    condition = BY_KEY["act-T"]
    count, vector_steps = condition.num_envs, 40
    learner = training.init_learner(condition, count * vector_steps, KEY)
    fresh = np.asarray(learner.agent.actor.params["linear_0"]["weight"])
    run = jax.jit(partial(training.learn, condition))
    early = run(learner, 0, STARTS // count)
    np.testing.assert_array_equal(early.agent.actor.params["linear_0"]["weight"], fresh)
    assert int(early.agent.actor.stats["norm_pre_0"]["count"]) == 0
    learner = run(early, STARTS // count, vector_steps)
    assert np.abs(learner.agent.actor.params["linear_0"]["weight"] - fresh).max() > 0

    rows = np.asarray(learner.rows).reshape(vector_steps, count, 9)
    np.testing.assert_array_equal(rows[:-1, :, 6:], rows[1:, :, :3])  # next_obs is the next obs
    physics = gymnasium.make("Pendulum-v1").unwrapped
    for obs, action, reward, next_obs in (
        (row[:3], row[3], row[4], row[6:]) for row in rows[::7].reshape(-1, 9)[::5]
    ):
        physics.state = np.array([np.arctan2(obs[1], obs[0]), obs[2]], np.float64)
        wanted, wanted_reward, *_ = physics.step(np.array([2 * action]))
        np.testing.assert_allclose(next_obs, wanted, atol=1e-5)
        np.testing.assert_allclose(reward, wanted_reward, atol=1e-4)
    # Once learning starts: a pass in T for each vector step, and slot 1's for each update.
    learned = vector_steps - STARTS // count
    counted = int(learner.agent.actor.stats["norm_pre_0"]["count"])
    assert counted == learned * (1 + count)


def test_environments_share_a_pass_in_t_alone(agent: ddpg.State) -> None:
    """In E the group does not matter; in T a group of one acts the same whatever it sees."""
    keys = jax.random.split(KEY, 4)

    def acted(mode: Mode, group: int) -> tuple[np.ndarray, np.ndarray]:
        run = jax.jit(partial(training.act_out, ACT_E, mode, group))
        seen, returns = run(agent.actor, keys)
        return np.asarray(seen), np.asarray(returns)

    alone, together = acted(E, 1), acted(E, 4)
    assert alone[0].shape == (200, 4, 3)
    np.testing.assert_allclose(alone[0][:30], together[0][:30], atol=1e-4)
    batch = acted(Mode("t"), 4)
    assert np.abs(batch[0][:30] - alone[0][:30]).max() > 0.01
    np.testing.assert_array_equal(batch[0][0], alone[0][0])  # the same starts

    # Replayed by Gymnasium: in T alone every action is the same number.
    seen, returns = acted(Mode("t"), 1)
    action = float(gaps.together(ACT_E, T, agent.actor, jnp.ones((1, 3)))[0])
    physics = gymnasium.make("Pendulum-v1").unwrapped
    for lane in range(4):
        first = seen[0, lane]
        physics.state = np.array([np.arctan2(first[1], first[0]), first[2]], np.float64)
        rewards = [physics.step(np.array([2 * action]))[1] for _ in range(200)]
        np.testing.assert_allclose(returns[lane], np.sum(rewards), rtol=2e-3)


# --- measures on known cases ----------------------------------------------------------------------


def test_a_shift_is_counted_in_standard_deviations() -> None:
    x = np.random.default_rng(0).normal(size=(5000, 3)) * [1, 10, 100]
    np.testing.assert_allclose(measures.shift(x + 0.5 * x.std(0), x), 0.5)
    assert measures.shift(x, x) == 0


def test_the_exponent_of_a_power_law_is_found() -> None:
    sizes = np.array(SIZES)
    np.testing.assert_allclose(verdicts.exponent(sizes, 3 * sizes**-0.5), -0.5)


def test_the_parts_of_the_td_error_add_up(agent: ddpg.State) -> None:
    """And they are zero where the modes use the very statistics that the reference has."""
    batch, data = draw(32), draw(400, seed=1)
    true = measures.with_true_statistics(ACT_E, agent, data)
    for letters in TD_PLANS:
        error, true_error, *parts = measures.td_split(ACT_E, letters, agent, true, batch)
        np.testing.assert_allclose(error - true_error, np.sum(parts, axis=0), atol=2e-4)
        assert np.abs(error - true_error).max() > 0.01
    *_, target, current, action = measures.td_split(ACT_E, "EEE", true, true, batch)
    assert not np.any([target, current, action])


def test_true_statistics_make_eval_equal_to_train_on_all_the_data(agent: ddpg.State) -> None:
    data = draw(300)
    true = measures.with_true_statistics(ACT_E, agent, data)
    obs = jnp.concatenate([data.obs, data.next_obs])
    assert true.target_actor is not None
    for network in (true.actor, true.target_actor):
        in_e, in_t = (gaps.together(ACT_E, mode, network, obs) for mode in (E, T))
        np.testing.assert_allclose(in_e, in_t, atol=1e-5)
    next_action, _ = ddpg.policy(config_of(ACT_E), true.target_actor, data.next_obs, E)
    action = jnp.concatenate([data.action, next_action])
    mlp = config_of(ACT_E).critic
    in_e, in_t = (nets.q_values(mlp, true.critic, obs, action, mode)[0] for mode in (E, T))
    np.testing.assert_allclose(in_e, in_t, atol=1e-4)


def test_equal_weights_act_differently_by_statistics_alone(agent: ddpg.State) -> None:
    found = gaps.identical_weights(ACT_E, agent.actor, draw(128).obs)
    assert found["twin E, E"] == 0
    assert min(value for name, value in found.items() if name != "twin E, E") > 0.01


def test_the_notebook_s_actor_starts_as_stated_and_its_modes_differ() -> None:
    network = other_actors.notebook_actor(KEY)
    bounds = {"linear_0": 256**-0.5, "linear_1": 128**-0.5, "linear_2": 3e-3}
    for name, bound in bounds.items():
        most = np.abs(network.params[name]["weight"]).max()
        assert 0.98 * bound < most <= bound
    states = jax.random.normal(KEY, (3, 24))
    together = {mode: other_actors.notebook_policy(network, states, mode)[0] for mode in (B, E, T)}
    np.testing.assert_allclose(together[B], together[E], atol=1e-6)  # fresh: 1 / sqrt(1 + 1e-5)
    assert np.abs(together[T] - together[E]).max() > 1e-4
    plain = network.params
    x = jax.nn.relu(states @ plain["linear_0"]["weight"] + plain["linear_0"]["bias"])
    x = jax.nn.relu(x @ plain["linear_1"]["weight"] + plain["linear_1"]["bias"])
    x = jnp.tanh(x @ plain["linear_2"]["weight"] + plain["linear_2"]["bias"])
    np.testing.assert_allclose(together[B], x, atol=1e-7)


def test_a_dropped_unit_is_cut_out() -> None:
    """By hand: one hidden unit of two is kept and counts double."""
    params = {
        "linear_0": {"weight": np.array([[1.0, 2.0]]), "bias": np.array([0.5, 0.0])},
        "linear_out": {"weight": np.array([[0.1], [0.3]]), "bias": np.array([0.05])},
    }
    obs, mask = np.array([[1.0]]), [np.array([True, False])]
    wanted = np.tanh(2 * 1.5 * 0.1 + 0.05)
    np.testing.assert_allclose(other_actors.dropout_policy(params, obs, mask), [wanted])
    cut = other_actors.sub_network(params, mask)
    assert cut["linear_0"]["weight"].shape == (1, 1)
    np.testing.assert_allclose(other_actors.dropout_policy(cut, obs, None), [wanted])
    np.testing.assert_allclose(
        other_actors.dropout_policy(params, obs, None), np.tanh(0.1 * 1.5 + 0.3 * 2 + 0.05)
    )


@pytest.mark.full
def test_two_processes_have_the_gap_of_one_with_the_whole_batch(agent: ddpg.State) -> None:
    """Over gloo in torch, against the lab's own pass on the same rows."""
    states = np.random.default_rng(1).normal(size=(POPULATION, 3))
    actor = jax.tree.map(np.asarray, agent.actor)
    found = gaps.synchronized_gaps([actor], [states])
    size = SYNC_SIZES[0]
    index = np.random.default_rng(0).integers(0, len(states), (PROBES * DRAWS, size))
    index[:, 0] = np.tile(np.arange(PROBES), DRAWS)
    pass_in_t = jax.jit(jax.vmap(partial(gaps.together, ACT_E, T, agent.actor)))
    wanted = (
        np.asarray(pass_in_t(states[index]))[:, 0]
        - np.asarray(pass_in_t(states[None]))[0][index[:, 0]]
    )
    np.testing.assert_allclose(found[f"whole {size}"], np.abs(wanted).mean(), rtol=1e-4)
    np.testing.assert_allclose(found[f"sync {size}"], np.abs(wanted).mean(), rtol=1e-4)
    assert found[f"half {size}"][0] > 1.2 * found[f"sync {size}"][0]
    assert max(found[f"sync error {n}"][0] for n in SYNC_SIZES) < 1e-9


# --- decision rules -------------------------------------------------------------------------------

SEEDS = 5
JITTER = 1 + 0.01 * np.arange(SEEDS)


def measured(**changes: float) -> dict[str, Any]:
    """Measures under which every prediction holds, but for those given."""
    values: dict[str, float] = {
        "gap T in a batch, E alone": 0.2,
        "spread of T alone": 0.0,
        "gap B, E": 0.3,
        "floor float32": 1e-7,
        "floor float64": 1e-16,
        "layer float32": 1e-7,
        "layer float64": 1e-16,
        "return E": -160.0,
        "shift E": 0.02,
        "shift B": 0.3,
        "return B": -400.0,
        "collected floor": 0.05,
        "collected shift": 0.2,
        "dropout eval floor": 1e-16,
        "dropout train, eval": 0.1,
        "dropout companions": 1e-16,
        "dropout sub-network": 1e-16,
        "twin T, E": 0.2,
        "twin E, E": 0.0,
        "twin E, E never synced": 0.2,
        "twin B, T": 0.2,
        "td size": 1.0,
    }
    values |= {f"gap {n}": n**-0.5 for n in SIZES}
    values |= {f"gap from E {n}": 0.1 + n**-0.5 for n in SIZES}
    values |= {f"return T{n}": -300.0 for n in GROUPS}
    values |= {f"shift T{n}": 0.2 for n in GROUPS}
    values |= {f"td {p} wrong": 0.5 for p in TD_PLANS}
    for n in SYNC_SIZES:
        values |= {f"sync {n}": 0.07, f"half {n}": 0.1, f"sync error {n}": 1e-12}
    for when in ("fresh", "moved"):
        names = ("B, E", "T of three, E", "T of three, B", "size")
        values |= {f"notebook {when} {name}": 0.01 for name in names}
        values[f"notebook {when} floor"] = 1e-8
    return {name: list(value * JITTER) for name, value in (values | changes).items()}


def verdicts_on(found: dict[str, Any], seeds: int = SEEDS) -> dict[str, str]:
    cell = training.Trained(ACT_E, None, np.zeros(0), np.arange(2), np.zeros((seeds, 2)), 0.0)
    return {c["id"]: c["verdict"] for c in verdicts.judge(found, {"act-E": cell}, seeds)}


EXPECTED = dict.fromkeys(("A1", "A2", "A4", "A5", "A6", "B2", "B3"), "supported") | dict.fromkeys(
    ("A3", "B1"), "refuted"
)


def test_when_every_prediction_holds() -> None:
    assert verdicts_on(measured()) == EXPECTED


@pytest.mark.parametrize(
    ("changes", "id_", "verdict"),
    [
        ({"gap T in a batch, E alone": 1e-6}, "A1", "refuted"),
        ({"floor float32": 1e-3}, "A1", "refuted"),
        ({"floor float64": 1e-9}, "A1", "refuted"),
        ({f"gap {n}": 1 / n for n in SIZES}, "A2", "refuted"),
        ({f"gap {n}": n**-0.2 for n in SIZES}, "A2", "refuted"),
        ({f"sync {n}": 1e-6 for n in SYNC_SIZES}, "A3", "supported"),
        ({f"sync {n}": 0.03 for n in SYNC_SIZES}, "A3", "inconclusive"),
        ({f"sync error {n}": 1e-3 for n in SYNC_SIZES}, "A3", "inconclusive"),
        ({"layer float32": 0.1}, "A4", "refuted"),
        ({"layer float64": 1e-9}, "A4", "inconclusive"),
        ({"return T8": -160.0}, "A5", "inconclusive"),
        ({"collected shift": 0.05}, "A5", "inconclusive"),
        ({"return T8": -160.0, "shift T8": 0.02, "collected shift": 0.05}, "A5", "refuted"),
        ({"dropout train, eval": 1e-6}, "A6", "refuted"),
        ({"dropout sub-network": 0.1}, "A6", "refuted"),
        ({"gap B, E": 1e-7, "notebook moved B, E": 1e-7}, "B1", "supported"),
        ({"notebook moved floor": 1e-3}, "B1", "inconclusive"),
        ({"twin T, E": 1e-7}, "B2", "refuted"),
        ({"twin E, E": 0.1}, "B2", "inconclusive"),
        ({"td ETE wrong": 0.01}, "B3", "refuted"),
        ({"td ETE wrong": 0.0985}, "B3", "inconclusive"),
    ],
)
def test_each_rule_can_fail(changes: dict[str, float], id_: str, verdict: str) -> None:
    found = verdicts_on(measured(**changes))
    assert found.pop(id_) == verdict
    if changes.keys() == {"floor float32"}:  # what B1 rests on, too
        assert found.pop("B1") == "inconclusive"
    assert found.items() <= EXPECTED.items()


def test_few_seeds_give_no_verdict_and_missing_measures_are_said() -> None:
    few = {name: values[:4] for name, values in measured().items()}
    assert set(verdicts_on(few, seeds=4).values()) == {"inconclusive"}
    found = measured()
    gone = [name for name in found if name.startswith(("sync", "half", "collected"))]
    for name in gone:
        del found[name]
    assert verdicts_on(found) == EXPECTED | {"A3": "inconclusive", "A5": "inconclusive"}


@pytest.mark.parametrize(
    ("mean", "name"), [(-160, "learned"), (-250, "learned"), (-251, "partly"), (-701, "failed")]
)
def test_classes_of_returns(mean: float, name: str) -> None:
    assert verdicts.outcome_class(mean) == name


def set_everywhere(monkeypatch: pytest.MonkeyPatch, **constants: Any) -> None:
    """Change constants in every module of the study that reads them."""
    for module in (conditions, training, gaps, other_actors, measures, verdicts, page):
        for name in constants.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, constants[name])


# --- the command ----------------------------------------------------------------------------------


def test_the_table_names_it() -> None:
    assert STUDIES[study.NAME].module == study.__name__
    assert [c.key for c in chosen(None)] == list(DEFAULT)
    assert chosen("all") == CONDITIONS
    assert [c.key for c in chosen("none")] == ["act-E", "none"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"conditions": "act-X"}, "unknown condition 'act-X'"),
        ({"seeds": 0}, "seeds must be"),
        ({"steps": 300}, "steps must be at least"),
    ],
)
def test_options_that_make_no_sense_raise(
    options: dict[str, Any], part: str, tmp_path: Path
) -> None:
    with pytest.raises(BatchproofError, match=part):
        study.run(tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_a_finished_condition_is_read_back_and_another_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_everywhere(monkeypatch, HIDDEN=(4, 4), EVALUATIONS=2)
    monkeypatch.setattr(training, "deployed_return", lambda condition, learner: learner.obs.sum())
    monkeypatch.setattr(training, "learn", lambda condition, learner, first, last: learner)
    monkeypatch.setattr(
        population, "over_seeds",
        lambda function, mesh, shared=(), **kwargs: jax.jit(
            jax.vmap(function, in_axes=(0, None, None) if shared else 0)
        ),
    )  # fmt: skip
    first = training.train_cell(ACT_E, 2, 512, tmp_path, False, "")
    monkeypatch.setattr(population, "place", None)  # nothing is trained again
    again = training.train_cell(ACT_E, 2, 512, tmp_path, False, "")
    for one, two in zip(jax.tree.leaves(first.agents), jax.tree.leaves(again.agents), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(first.returns, again.returns)
    np.testing.assert_array_equal(first.steps, again.steps)
    assert again.steps.tolist() == [256, 512]
    with pytest.raises(BatchproofError, match="holds another run"):
        training.train_cell(ACT_E, 3, 512, tmp_path, False, "")


@pytest.mark.full
def test_a_small_study_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_everywhere(monkeypatch, HIDDEN=(8, 8), EPISODES=32, SIZES=(2, 8, 32))
    made = study.run(tmp_path, seeds=2, steps=512, conditions="act-T", progress=False, command="x")
    written = json.loads((tmp_path / "study.json").read_text())
    assert written["study"] == made["study"] == "batch-vs-single"
    assert [claim["id"] for claim in written["claims"]] == sorted(EXPECTED)
    assert {claim["verdict"] for claim in written["claims"]} == {"inconclusive"}  # two seeds
    names = [condition["name"] for condition in written["conditions"]]
    assert names[:2] == ["act-E", "act-T"]
    assert all(len(condition["returns"]) == 2 for condition in written["conditions"])
    for name in ("gap", "acting", "td", "curves", "conditions"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert (tmp_path / "report.html").read_text().count("<img") == 5
    actor = Network(*training.init_learner(ACT_E, 8, KEY).agent.actor)
    assert set(actor.params) == {"linear_0", "linear_1", "linear_out", "norm_pre_0", "norm_pre_1"}
