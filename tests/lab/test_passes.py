"""The critic's passes: concatenated forwards made by hand, who moves which statistics, targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchproof.errors import BatchproofError
from batchproof.lab import nets, passes
from batchproof.lab.agents import crossq, sac, td3, xqc
from batchproof.lab.nets import MLP, Network, q_values
from batchproof.lab.norms import Norm
from batchproof.lab.passes import Batch
from batchproof.modes import E, Mode, Plan, Slot, T

O, A, B, C = 3, 2, 8, 2  # noqa: E741
MLP_ = MLP((6, 5), Norm("batch", momentum=0.25))


@pytest.fixture(autouse=True, scope="module")
def _float64():
    # Nearly all the time goes into compiling, so compile fast.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def draw_critic(seed):
    """Critics with statistics away from their initial values."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(rng.uniform(0.1, 0.9, x.shape) * rng.choice([-1, 1], x.shape))

    init = jax.eval_shape(lambda key: nets.init_critics(key, MLP_, O, A, C), jax.random.key(0))
    params, stats = jax.tree.map(leaf, init)
    return Network(params, {n: {**s, "var": jnp.abs(s["var"])} for n, s in stats.items()})


def draw_batch(seed):
    rng = np.random.default_rng(seed)
    return Batch(
        obs=jnp.asarray(rng.normal(size=(B, O))),
        action=jnp.asarray(rng.uniform(-1, 1, (B, A))),
        reward=jnp.asarray(rng.normal(size=B)),
        next_obs=jnp.asarray(rng.normal(1, 2, (B, O))),
        terminated=jnp.asarray(rng.integers(0, 2, B), float),
    )


@pytest.fixture
def critic():
    return draw_critic(0)


@pytest.fixture
def target():
    return draw_critic(1)


@pytest.fixture
def batch():
    return draw_batch(2)


@pytest.fixture
def actions():
    """The policy's actions on s or on s'."""
    return jnp.asarray(np.random.default_rng(3).uniform(-1, 1, (B, A)))


def equal(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(
        lambda a, d: np.testing.assert_allclose(a, d, rtol=1e-12, atol=1e-13), actual, desired
    )


def differ(actual, desired):
    assert np.abs(actual - desired).max() > 1e-3


def first_moments(critic, obs, action):
    """Mean and unbiased variance of the first layer's output over all rows, (C, F) each."""
    rows = np.concatenate([obs, action], axis=1)
    linear = critic.params["linear_0"]
    z = np.einsum("bi,cif->cbf", rows, linear["weight"]) + linear["bias"][:, None]
    return z.mean(1), z.var(1, ddof=1)


def both(*arrays):
    return np.concatenate(arrays)


# Slot 3


@pytest.mark.parametrize("mode", [T, E, Mode("t")])
def test_policy_q_is_the_critic_on_the_policys_actions(critic, batch, actions, mode):
    q, stats = passes.policy_q(MLP_, critic, batch, actions, mode)
    equal((q, stats), q_values(MLP_, critic, batch.obs, actions, mode))


def test_m_is_t_on_the_concatenation_of_policy_and_replay_batch(critic, batch, actions):
    q, stats = passes.policy_q(MLP_, critic, batch, actions, Mode("M"))
    obs, action = jnp.concatenate([batch.obs] * 2), jnp.concatenate([actions, batch.action])
    by_hand, stats_by_hand = q_values(MLP_, critic, obs, action, T)
    equal(q, by_hand[:, :B])
    equal(stats, stats_by_hand)
    alone, _ = q_values(MLP_, critic, batch.obs, actions, T)
    differ(q, alone)

    mean, var = first_moments(critic, obs, action)
    old = critic.stats["norm_pre_0"]
    equal(stats["norm_pre_0"]["mean"], 0.75 * old["mean"] + 0.25 * mean)
    equal(stats["norm_pre_0"]["var"], 0.75 * old["var"] + 0.25 * var)


def test_m_lets_the_gradient_through_the_mixture(critic, batch, actions):
    def in_m(actions):
        return passes.policy_q(MLP_, critic, batch, actions, Mode("M"))[0].sum()

    def by_hand(actions):
        obs, action = jnp.concatenate([batch.obs] * 2), jnp.concatenate([actions, batch.action])
        return q_values(MLP_, critic, obs, action, T)[0][:, :B].sum()

    equal(jax.grad(in_m)(actions), jax.grad(by_hand)(actions))


def test_lower_case_m_leaves_the_statistics(critic, batch, actions):
    q, stats = passes.policy_q(MLP_, critic, batch, actions, Mode("m"))
    equal(q, passes.policy_q(MLP_, critic, batch, actions, Mode("M"))[0])
    equal(stats, critic.stats)


# Slots 4 and 5


def test_separate_passes_with_a_target_network(critic, target, batch, actions):
    plan = Plan.parse("TETTE")
    result = passes.replay_and_target_q(MLP_, critic, target, batch, actions, plan)
    equal((result.q, result.stats), q_values(MLP_, critic, batch.obs, batch.action, T))
    equal((result.next_q, result.target_stats), q_values(MLP_, target, batch.next_obs, actions, E))
    equal(result.target_stats, target.stats)


def test_a_target_network_in_t_moves_its_own_statistics(critic, target, batch, actions):
    plan = Plan.parse("TETET")
    result = passes.replay_and_target_q(MLP_, critic, target, batch, actions, plan)
    equal((result.next_q, result.target_stats), q_values(MLP_, target, batch.next_obs, actions, T))
    equal(result.stats, critic.stats)


def test_j_is_t_on_the_concatenation_of_replay_and_next_batch(critic, batch, actions):
    plan = Plan.parse("crossq")
    result = passes.replay_and_target_q(MLP_, critic, None, batch, actions, plan)
    obs = jnp.concatenate([batch.obs, batch.next_obs])
    action = jnp.concatenate([batch.action, actions])
    by_hand, stats = q_values(MLP_, critic, obs, action, T)
    equal(result.q, by_hand[:, :B])
    equal(result.next_q, by_hand[:, B:])
    equal(result.stats, stats)
    equal(result.target_stats, stats)
    differ(result.q, q_values(MLP_, critic, batch.obs, batch.action, T)[0])


def test_j_moves_the_statistics_once_towards_the_mixture(critic, batch, actions):
    plan = Plan.parse("crossq")
    result = passes.replay_and_target_q(MLP_, critic, None, batch, actions, plan)
    mean, var = first_moments(critic, both(batch.obs, batch.next_obs), both(batch.action, actions))
    old, new = critic.stats["norm_pre_0"], result.stats["norm_pre_0"]
    equal(new["mean"], 0.75 * old["mean"] + 0.25 * mean)
    equal(new["var"], 0.75 * old["var"] + 0.25 * var)
    for layer in result.stats:
        np.testing.assert_array_equal(
            result.stats[layer]["count"] - critic.stats[layer]["count"], [1] * C
        )


def test_j_with_a_target_network_runs_it_on_the_same_mixture(critic, target, batch, actions):
    plan = Plan.parse("crossq")
    result = passes.replay_and_target_q(MLP_, critic, target, batch, actions, plan)
    obs = jnp.concatenate([batch.obs, batch.next_obs])
    action = jnp.concatenate([batch.action, actions])
    online, stats = q_values(MLP_, critic, obs, action, T)
    behind, target_stats = q_values(MLP_, target, obs, action, T)
    equal(result.q, online[:, :B])
    equal(result.next_q, behind[:, B:])
    equal(result.stats, stats)
    equal(result.target_stats, target_stats)


def test_lower_case_j_leaves_the_statistics(critic, target, batch, actions):
    upper = passes.replay_and_target_q(MLP_, critic, target, batch, actions, Plan.parse("TEEJJ"))
    lower = passes.replay_and_target_q(MLP_, critic, target, batch, actions, Plan.parse("TEEjj"))
    equal((lower.q, lower.next_q), (upper.q, upper.next_q))
    equal((lower.stats, lower.target_stats), (critic.stats, target.stats))


def test_without_a_target_network_slot_5_moves_the_statistics_before_slot_4(critic, batch, actions):
    result = passes.replay_and_target_q(MLP_, critic, None, batch, actions, Plan.parse("TETTT"))
    next_q, between = q_values(MLP_, critic, batch.next_obs, actions, T)
    q, after = q_values(MLP_, Network(critic.params, between), batch.obs, batch.action, T)
    equal((result.q, result.next_q), (q, next_q))
    equal((result.stats, result.target_stats), (after, after))
    np.testing.assert_array_equal(after["norm_pre_0"]["count"], [2] * C)


def test_without_a_target_network_slot_4_in_e_sees_what_slot_5_moved(critic, batch, actions):
    result = passes.replay_and_target_q(MLP_, critic, None, batch, actions, Plan.parse("TETET"))
    _, between = q_values(MLP_, critic, batch.next_obs, actions, T)
    moved = Network(critic.params, between)
    equal(result.q, q_values(MLP_, moved, batch.obs, batch.action, E)[0])
    differ(result.q, q_values(MLP_, critic, batch.obs, batch.action, E)[0])


@pytest.mark.parametrize("letters", ["TETTT", "TEEJJ"])
def test_the_bootstrapped_value_has_no_gradient(critic, batch, actions, letters):
    """None in the parameters; with J the gradient of q still runs through the mixture."""
    plan = Plan.parse(letters)

    def total(params, of):
        network = Network(params, critic.stats)
        result = passes.replay_and_target_q(MLP_, network, None, batch, actions, plan)
        return getattr(result, of).sum()

    grad = jax.jit(jax.grad(total), static_argnums=1)
    assert all(
        (np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(grad(critic.params, "next_q"))
    )
    assert np.abs(grad(critic.params, "q")["linear_out"]["weight"]).max() > 1e-3


@pytest.mark.parametrize("letters", ["TEMJJ", "TEETE"])
def test_distributional_critics_take_the_same_passes(critic, target, batch, actions, letters):
    """`critic_outputs` has the outputs behind the batch; its only one here is Q."""
    plan = Plan.parse(letters)

    def both_ways(outputs):
        q, stats = passes.policy_q(MLP_, critic, batch, actions, plan[Slot.POLICY_Q], outputs)
        slots_4_and_5 = passes.replay_and_target_q(
            MLP_, critic, target, batch, actions, plan, outputs
        )
        return (q, slots_4_and_5.q, slots_4_and_5.next_q), (stats, slots_4_and_5[2:])

    values, stats = both_ways(nets.critic_outputs)
    assert [v.shape for v in values] == [(C, B, 1)] * 3
    expected, expected_stats = both_ways(q_values)
    equal([v[..., 0] for v in values], list(expected))
    equal(stats, expected_stats)


# Targets


def trees(*networks):
    return [jax.tree.map(np.asarray, network) for network in networks]


@pytest.mark.parametrize("tau", [0.005, 0.5, 1.0])
@pytest.mark.parametrize("target_stats", passes.TARGET_STATS)
def test_follow(critic, target, batch, tau, target_stats):
    # One pass in T, so that the counters differ.
    _, stats = q_values(MLP_, critic, batch.obs, batch.action, T)
    online = Network(critic.params, stats)
    result = passes.follow(target, online, tau, target_stats)
    before, goal = trees(target, online)
    equal(
        result.params,
        jax.tree.map(lambda t, o: (1 - tau) * t + tau * o, before.params, goal.params),
    )
    for layer, after in result.stats.items():
        if target_stats == "copy":
            equal(after, goal.stats[layer])
        elif target_stats == "stale":
            equal(after, before.stats[layer])
        else:
            for name in ("mean", "var"):
                by_hand = (1 - tau) * before.stats[layer][name] + tau * goal.stats[layer][name]
                equal(after[name], by_hand)
            # A counter is not averaged.
            np.testing.assert_array_equal(after["count"], [1] * C)
            assert after["count"].dtype == before.stats[layer]["count"].dtype


@pytest.mark.parametrize(
    "use",
    [
        lambda name: td3.Config(target_stats=name),
        lambda name: sac.Config(target_stats=name),
    ],
    ids=["td3", "sac"],
)
def test_unknown_target_statistics_say_what_to_write(use):
    with pytest.raises(BatchproofError, match="'copied': use one of copy, polyak, stale"):
        use("copied")


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (td3.Config, {"policy_delay": 0}),
        (td3.Config, {"noise_clip": -1.0}),
        (td3.Config, {"target_noise": -0.2}),
        (td3.Config, {"exploration_noise": float("nan")}),
        (crossq.Config, {"policy_delay": 0}),
        (crossq.Config, {"schedule_steps": -5, "learning_rate_end": 1e-4}),
        (crossq.Config, {"schedule_steps": 5, "learning_rate_end": -1e-4}),
        (xqc.Config, {"schedule_steps": -5}),
    ],
)
def test_settings_with_which_nothing_can_learn_are_refused(make, changes):
    with pytest.raises(BatchproofError, match="|".join(changes)) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)
