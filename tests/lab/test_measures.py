"""The common-mode theorem, and the other measures on critics where the answer is known.

Theorem: let batch statistics with gradient stand on the first affine layer that the action enters,
or on its input. A shift of all the batch's actions by one vector then moves every row of that layer
alike and is subtracted again, so the critic's values do not change and the actor's gradient has no
component along it.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchproof.lab import measures, nets
from batchproof.lab.agents import AGENTS
from batchproof.lab.nets import MLP, Network
from batchproof.lab.norms import Norm
from batchproof.lab.passes import Batch, policy_q
from batchproof.lab.recalibrate import recalibrate, recalibrate_critics
from batchproof.modes import B as BYPASS
from batchproof.modes import E, Mode, S, T

O, A, B = 3, 2, 32  # noqa: E741
M = Mode("M")


@pytest.fixture(autouse=True, scope="module")
def _float64():
    # Nearly all the time goes into compiling, so compile fast.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def draw_critics(mlp, seed):
    """Two critics whose running statistics are those of another batch than the test's."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(rng.uniform(0.1, 0.9, x.shape) * rng.choice([-1, 1], x.shape))

    def init(key):
        return nets.init_critics(key, mlp, O, A, 2)

    critics = Network(*jax.tree.map(leaf, jax.eval_shape(init, jax.random.key(0))))
    if mlp.norm.kind not in ("batch", "renorm"):
        return critics
    only_this_batch = replace(mlp, norm=replace(mlp.norm, kind="batch", momentum=1.0))
    obs, action = jnp.asarray(rng.normal(size=(B, O))), jnp.asarray(rng.uniform(-1, 1, (B, A)))
    _, stats = nets.q_values(only_this_batch, critics, obs, action, T)
    return Network(critics.params, stats)


def draw_batch(states, seed):
    """A batch whose actions are the replayed ones, and the policy's actions."""
    rng = np.random.default_rng(100 + seed)
    obs = jnp.asarray(rng.normal(size=(B, O)) if states == "random" else np.full((B, O), 0.3))
    replayed, action = (jnp.asarray(rng.uniform(-1, 1, (B, A))) for _ in range(2))
    return Batch(obs, replayed, jnp.zeros(B), obs, jnp.zeros(B)), action


def lesser_value(mlp, mode, critics, batch, action):
    """The lesser of two critics' values as a function of the actions.

    The critics are levelled at ``action``, so that each is the lesser one for some rows.
    """
    level = policy_q(mlp, critics, batch, action, mode)[0].mean(1, keepdims=True)
    return lambda action: (policy_q(mlp, critics, batch, action, mode)[0] - level).min(0)


def actors_gradient(q, action):
    return jax.grad(lambda a: q(a).mean())(action)


@cache
def compiled_kappa(mlp, mode):
    """Size of the actor's gradient and kappa, compiled once for all states."""

    @jax.jit
    def kappa(critics, batch, action):
        q = lesser_value(mlp, mode, critics, batch, action)
        return jnp.abs(actors_gradient(q, action)).sum(), measures.kappa(q, action)

    return kappa


def network(norm):
    return MLP((8, 8) if "before-action" in norm.placement else (8,), norm)


def kappa(norm, mode, states):
    mlp = network(norm)
    return compiled_kappa(mlp, mode)(draw_critics(mlp, 0), *draw_batch(states, 0))


def response_ratio(norm, mode, seed=0):
    mlp = network(norm)
    batch, action = draw_batch("random", seed)
    return measures.response_ratio(
        lesser_value(mlp, mode, draw_critics(mlp, seed), batch, action), action
    )


STATES = ["random", "constant"]


@pytest.mark.parametrize(
    "norm",
    [
        Norm("batch", "pre"),
        Norm("batch", "pre", eps=0.1),
        Norm("batch", "input"),
        Norm("batch", "input+post", eps=1e-3),
        Norm("batch", "pre+post"),
        Norm("renorm", "pre"),
        Norm("renorm", "pre", eps=0.1),
        Norm("renorm", "pre", eps=1e-3, formula="folded"),
        Norm("renorm", "input+post", eps=1e-3, formula="folded"),
    ],
    ids=lambda norm: f"{norm.kind}-{norm.placement}-{norm.eps}-{norm.formula}",
)
def test_in_t_the_actor_sees_no_common_mode(norm):
    for states in STATES:
        gradient, share = kappa(norm, T, states)
        assert gradient > 1e-3  # there is a gradient, but none in common
        assert share <= 1e-12


@pytest.mark.parametrize("mode", [E, S, M, BYPASS])
@pytest.mark.parametrize(
    "norm", [Norm("batch"), Norm("renorm"), Norm("batch", "input+post")], ids=["bn", "brn", "post"]
)
def test_the_other_modes_show_the_common_mode(norm, mode):
    for states in STATES:
        gradient, share = kappa(norm, mode, states)
        assert gradient > 1e-3
        assert share > 1e-3


@pytest.mark.parametrize("placement", ["before-action", "post"])
@pytest.mark.parametrize("kind", ["batch", "renorm"])
def test_in_t_the_common_mode_survives_these_placements(kind, placement):
    """Before the action there is nothing to subtract; after a ReLU a shift is no longer common."""
    for states in STATES:
        gradient, share = kappa(Norm(kind, placement), T, states)
        assert gradient > 1e-3
        assert share > 1e-3


def test_in_t_right_before_the_last_layer_one_critics_mean_value_has_no_gradient():
    """TD3's actor learns nothing there: each row's value moves, their mean is the last bias."""
    mlp = MLP((8,), Norm("batch", "post"))
    critics = draw_critics(mlp, 0)
    rng = np.random.default_rng(1)
    obs, action = jnp.asarray(rng.normal(size=(B, O))), jnp.asarray(rng.uniform(-1, 1, (B, A)))

    def q(action):
        return nets.q_values(mlp, critics, obs, action, T)[0][0]

    np.testing.assert_allclose(actors_gradient(q, action), 0, atol=1e-14)
    assert np.abs(q(action + 0.5) - q(action)).max() > 1e-2
    np.testing.assert_allclose(q(action).mean(), q(-action).mean(), rtol=1e-12)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_one_state_and_one_action_for_all_leave_no_gradient(placement):
    """A deterministic actor in a constant state: T tells it nothing at all."""
    mlp = MLP((8,), Norm("batch", placement))
    batch, action = draw_batch("constant", 0)
    q = lesser_value(mlp, T, draw_critics(mlp, 0), batch, action)
    same = jnp.broadcast_to(action[:1], action.shape)
    np.testing.assert_allclose(actors_gradient(q, same), 0, atol=1e-14)


def linear_q(weights):
    return lambda action: action @ jnp.asarray(weights)


def test_kappa_and_slope_by_hand():
    """Qbar = mean of w_i a_i: the gradients are w_i / B."""
    action = jnp.zeros((4, 1))
    weights = jnp.array([3.0, -1.0, 1.0, -1.0])

    def q(action):
        return weights * action[:, 0]

    assert measures.kappa(q, action) == pytest.approx(2 / 6)
    assert measures.common_slope(q, action) == pytest.approx(2 / 4)


def test_kappa_averages_over_action_dimensions():
    """One dimension wants a common move (1), the other cancels out (0)."""
    signs = jnp.array([1.0, -1.0, 1.0, -1.0])

    def q(action):
        return action[:, 0] + signs * action[:, 1]

    assert measures.kappa(q, jnp.zeros((4, 2))) == pytest.approx(0.5)
    assert measures.common_slope(q, jnp.zeros((4, 2))) == pytest.approx(0.5)


def test_kappa_is_one_where_all_rows_agree_and_zero_where_none_has_a_gradient():
    action = jnp.zeros((4, 2))
    assert measures.kappa(linear_q([2.0, -1.0]), action) == pytest.approx(1)
    assert measures.kappa(lambda a: jnp.ones(len(a)), action) == 0


@pytest.mark.parametrize(
    ("norm", "mode"),
    [
        (Norm("batch"), E),
        (Norm("renorm"), E),
        (Norm("batch"), BYPASS),
        (Norm("layer"), T),
        (Norm("none"), T),
    ],
)
def test_response_ratio_is_one_without_coupling(norm, mode):
    assert response_ratio(norm, mode) == pytest.approx(1, abs=1e-9)


def test_response_ratio_of_batch_norm_is_zero_in_t():
    for eps in (1e-5, 0.1):
        assert response_ratio(Norm("batch", eps=eps), T) <= 1e-9


def test_batch_renorm_answers_a_common_shift_that_its_gradient_does_not_see():
    """r and d put the values back to those of the running statistics, without gradient."""
    assert response_ratio(Norm("renorm"), T) > 0.5
    assert kappa(Norm("renorm"), T, "random")[1] <= 1e-12


def test_response_ratio_is_about_half_in_m():
    for seed in range(3):
        assert 0.3 < response_ratio(Norm("batch"), M, seed) < 0.7


def test_response_ratio_by_hand():
    """Values with half their batch mean taken off: 1/2 for all, 1 - 1/(2 B) for one row."""

    def q(action):
        return action[:, 0] - 0.5 * action[:, 0].mean()

    action = jnp.asarray(np.random.default_rng(0).normal(size=(8, 1)))
    by_hand = 0.5 / (1 - 1 / 16)
    assert measures.response_ratio(q, action) == pytest.approx(by_hand)
    assert measures.response_ratio(q, action, delta=1.0, rows=3) == pytest.approx(by_hand)


def test_advantage_is_erased_in_t():
    """Through BN before a last linear layer the batch's mean value does not know the actions."""
    mlp = MLP((8,), Norm("batch", "post"))
    critics = draw_critics(mlp, 0)
    rng = np.random.default_rng(1)
    obs = jnp.asarray(rng.normal(size=(B, O)))
    good, bad = (jnp.asarray(rng.normal(shift, 0.1, (B, A))) for shift in (2, -2))

    def q(mode, action):
        return nets.q_values(mlp, critics, obs, action, mode)[0][0]

    assert abs(measures.seen_advantage(q(E, good), q(E, bad))) > 0.1
    assert abs(measures.seen_advantage(q(T, good), q(T, bad))) < 1e-12


def test_report_asks_in_the_modes_of_the_plan():
    """Kappa, slope, ratio and the seen advantage in the plan's modes, the running one in E."""
    values = {"T": 1.0, "E": 10.0, "M": 100.0}
    asked = set()

    def q_in(mode, action):
        asked.add(mode.letter)
        return values[mode.letter] * action[:, 0]

    key, ours, replayed = jax.random.key(0), jnp.full((4, 1), 2.0), jnp.full((4, 1), 0.5)
    report = measures.report(key, q_in, ours, replayed, M, T)
    assert report["kappa"] == pytest.approx(1)
    assert report["common_slope"] == pytest.approx(100)
    assert report["response_ratio"] == pytest.approx(1)
    assert report["advantage_seen"] == pytest.approx(100 * 2 - 0.5)
    assert report["advantage_running"] == pytest.approx(10 * 1.5)
    # A joint forward is taken as T.
    joint = measures.report(key, q_in, ours, replayed, E, Mode("J"))
    assert joint["advantage_seen"] == pytest.approx(10 * 2 - 0.5)
    assert asked == {"T", "E", "M"}


def test_report_is_taken_near_equal_actions_not_at_them():
    """At equal actions in a constant state T leaves no gradient; near them kappa is 0, in S not."""
    mlp = MLP((8,), Norm("batch"))
    critics = draw_critics(mlp, 0)
    obs, same = jnp.zeros((B, O)), jnp.zeros((B, A))
    replayed = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (B, A)))

    def q_in(mode, action):
        return nets.q_values(mlp, critics, obs, action, mode)[0][0]

    in_t = measures.report(jax.random.key(0), q_in, same, replayed, T, T)
    in_s = measures.report(jax.random.key(0), q_in, same, replayed, S, T)
    assert in_t["kappa"] <= 1e-12
    assert in_t["response_ratio"] <= 1e-9
    assert in_s["kappa"] > 1e-3


def with_statistics(network, **shifts):
    """The network with running statistics moved from those that it holds."""
    stats = {
        layer: held
        | {"mean": held["mean"] + shifts.get("mean", 0), "var": held["var"] * shifts.get("var", 1)}
        for layer, held in network.stats.items()
    }
    return Network(network.params, stats)


def test_gaps_are_distances_in_true_standard_deviations_and_log_ratios():
    mlp = MLP((4,), Norm("batch", "input+pre", eps=0.0))
    true = nets.init(jax.random.key(0), mlp, O, 1)
    true = with_statistics(true, mean=0.5, var=4.0)
    held = with_statistics(true, mean=-3.0, var=0.25)
    gaps = measures.statistics_gaps("actor", mlp, held, true)
    assert gaps.keys() == {
        f"{name}/actor/{layer}"
        for name in ("mean_gap", "log_var_gap")
        for layer in ("norm_input", "norm_pre_0")
    }
    for name, gap in gaps.items():
        np.testing.assert_allclose(gap, 1.5 if name.startswith("mean") else np.log(0.25), rtol=1e-6)


NORMED = MLP((5,), Norm("batch", "input+pre", running_variance="biased"))


def replayed():
    rng = np.random.default_rng(0)
    return Batch(
        obs=jnp.asarray(rng.normal(2, 3, (B, O))),
        action=jnp.asarray(rng.uniform(-1, 1, (B, A))),
        reward=jnp.zeros(B),
        next_obs=jnp.zeros((B, O)),
        terminated=jnp.zeros(B),
    )


def test_statistics_of_the_replayed_batch_itself_have_no_gap():
    config = AGENTS["sac"].Config(actor=NORMED, critic=NORMED)
    batch = replayed()
    actor = nets.init(jax.random.key(0), NORMED, O, A)
    critic = nets.init_critics(jax.random.key(1), NORMED, O, A, 2)
    fresh = measures.networks(config, actor, critic, batch.obs, batch.obs, batch.action)
    # Running statistics start at mean 0 and variance 1.
    log_var = np.log(np.var(np.asarray(batch.obs), 0)).mean()
    np.testing.assert_allclose(fresh["log_var_gap/actor/norm_input"], -log_var, rtol=1e-4)
    actor = recalibrate(NORMED, actor, batch.obs)
    critic = recalibrate_critics(NORMED, critic, batch.obs, batch.action)
    found = measures.networks(config, actor, critic, batch.obs, batch.obs, batch.action)
    gaps = {name: float(gap) for name, gap in found.items() if "_gap/" in name}
    assert len(gaps) == 2 * 2 * 2
    assert max(map(abs, gaps.values())) < 1e-9
    # One row has no variance: nothing is said of gaps.
    one = batch.obs[:1], batch.obs[:1], batch.action[:1]
    alone = measures.networks(config, actor, critic, *one)
    assert alone.keys() == found.keys() - gaps.keys()


def test_weight_lengths_are_those_of_the_units_and_1_when_projected():
    mlp = MLP((5, 4), Norm("batch"))
    critic = nets.init_critics(jax.random.key(1), mlp, O, A, 2)
    found = measures.weight_lengths("critic", critic)
    assert found.keys() == {f"weight_length/critic/linear_{i}" for i in (0, 1)}
    for name, length in found.items():
        layer = critic.params[name.rsplit("/", 1)[1]]
        units = np.concatenate([layer["weight"], np.asarray(layer["bias"])[:, None]], axis=1)
        np.testing.assert_allclose(length, np.linalg.norm(units, axis=1).mean(), rtol=1e-6)
    projected = replace(mlp, project="hidden")
    critic = nets.init_critics(jax.random.key(1), projected, O, A, 2)
    for length in measures.weight_lengths("critic", critic).values():
        np.testing.assert_allclose(length, 1, rtol=1e-6)


@pytest.mark.parametrize("algo", ["ddpg", "td3", "sac", "crossq", "xqc"])
def test_every_agent_tells_of_its_layers(algo):
    agent = AGENTS[algo]
    config = replace(agent.Config(), actor=NORMED, critic=NORMED)

    def told(key):
        return agent.measure(config, agent.init(config, key, O, A), replayed(), key)

    layers = {name for name in jax.eval_shape(told, jax.random.key(0)) if "_gap/" in name}
    assert layers == {
        f"{name}/{role}/{layer}"
        for name in ("mean_gap", "log_var_gap")
        for role in ("actor", "critic")
        for layer in ("norm_input", "norm_pre_0")
    }
