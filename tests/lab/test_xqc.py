"""XQC: its categorical target by brute force, its critic loss in torch, returns, and learning."""

from dataclasses import replace
from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.nn.functional import batch_norm, log_softmax

from batchproof.errors import BatchproofError
from batchproof.lab.agents import xqc
from batchproof.lab.nets import MLP
from batchproof.lab.passes import Batch

O, A, B, C = 4, 2, 16, 2  # noqa: E741
SMALL = xqc.Config(
    actor=MLP((8, 8), xqc.BATCH_NORM, bias=False, project="all"),
    critic=MLP((10, 10), xqc.BATCH_NORM, bias=False, project="all"),
    atoms=11,
    learning_rate=1e-2,
    schedule_steps=0,
)


@pytest.fixture(autouse=True, scope="module")
def _float64():
    # Nearly all the time goes into compiling, so compile fast.
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def draw_batch(seed):
    rng = np.random.default_rng(seed)
    return Batch(
        obs=jnp.asarray(rng.normal(size=(B, O))),
        action=jnp.asarray(rng.uniform(-1, 1, (B, A))),
        reward=jnp.asarray(rng.normal(size=B)),
        next_obs=jnp.asarray(rng.normal(1, 2, (B, O))),
        terminated=jnp.asarray(rng.integers(0, 2, B), float),
    )


@pytest.fixture(scope="module")
def start():
    """A new agent whose targets differ from its critics."""
    init = jax.jit(xqc.init, static_argnums=(0, 2, 3))
    state = init(SMALL, jax.random.key(0), O, A)
    other = init(SMALL, jax.random.key(1), O, A)
    return state._replace(target_critic=other.critic)


@pytest.fixture(scope="module")
def update():
    return jax.jit(partial(xqc.update, SMALL))


# The categorical target


def on_atoms(probabilities, values, low, high, atoms):
    """Algorithm 1 of arXiv 1707.06887, one mass at a time."""
    result = np.zeros((len(values), atoms))
    spacing = (high - low) / (atoms - 1)
    for row in range(len(values)):
        for mass, value in zip(probabilities[row], values[row], strict=True):
            place = (min(max(value, low), high) - low) / spacing
            below = int(np.floor(place))
            if below == atoms - 1:
                result[row, below] += mass
            else:
                result[row, below] += mass * (below + 1 - place)
                result[row, below + 1] += mass * (place - below)
    return result


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("atoms", [2, 11, 101])
def test_mass_is_put_onto_atoms_as_by_hand(monkeypatch, atoms, elsewhere):
    if elsewhere:  # as on a device that is no CPU
        monkeypatch.setattr(xqc, "_shared_in_turn", xqc._shared)
    config = xqc.Config(atoms=atoms, low=-2, high=3)
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(atoms), B)
    values = rng.uniform(-4, 5, (B, atoms))
    values[:2] = np.linspace(-2, 3, atoms)  # on the atoms themselves
    ours = xqc.projected(config, jnp.asarray(probabilities), jnp.asarray(values))
    np.testing.assert_allclose(ours, on_atoms(probabilities, values, -2, 3, atoms), atol=1e-12)
    np.testing.assert_allclose(ours[:2], probabilities[:2], atol=1e-12)
    np.testing.assert_allclose(ours.sum(1), 1, rtol=1e-12)
    means = ours @ xqc.atoms(config)
    np.testing.assert_allclose(means, (probabilities * values.clip(-2, 3)).sum(1), rtol=1e-9)


def test_target_is_the_lower_critics_distribution_moved():
    rng = np.random.default_rng(1)
    batch = draw_batch(1)
    logits = rng.normal(0, 2, (C, B, SMALL.atoms))
    reward, next_log_prob, alpha = rng.normal(size=B), rng.normal(size=B), 0.7
    ours = xqc.td_target(SMALL, batch, reward, jnp.asarray(logits), alpha, next_log_prob)
    z = np.linspace(-5, 5, SMALL.atoms)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    lower = (p @ z).argmin(0)
    assert 0 < lower.sum() < B
    for i in range(B):
        keep = 0.99 * (1 - float(batch.terminated[i]))
        values = reward[i] + keep * (z - alpha * next_log_prob[i])
        by_hand = on_atoms(p[lower[i], i][None], values[None], -5, 5, SMALL.atoms)[0]
        np.testing.assert_allclose(ours[i], by_hand, atol=1e-12)


# The critic's loss


def torch_critic(params, c, obs, action):
    """A batch norm of the input, then twice Linear, batch norm, ReLU, on the batch's statistics."""

    def leaf(name, key):
        return params[name][key][c]

    def norm(name, x):
        scale, bias = leaf(name, "scale"), leaf(name, "bias")
        return batch_norm(x, None, None, scale, bias, training=True, eps=1e-3)

    x = norm("norm_input", torch.cat([obs, action], dim=1))
    for i in range(2):
        x = norm(f"norm_pre_{i}", x @ leaf(f"linear_{i}", "weight")).relu()
    return x @ leaf("linear_out", "weight") + leaf("linear_out", "bias")


def test_critic_loss_and_gradient_are_torchs(start):
    """Joint forward in critics and targets, cross-entropy to the projected target."""
    batch = draw_batch(2)
    rng = np.random.default_rng(2)
    next_action, next_log_prob = rng.uniform(-1, 1, (B, A)), rng.normal(size=B)
    moments = start.returns.moments._replace(var=jnp.asarray(4.0))
    state = start._replace(returns=start.returns._replace(moments=moments))
    (loss, (_, target)), grads = jax.value_and_grad(xqc.critic_loss, has_aux=True)(
        state.critic.params, SMALL, state, batch, jnp.asarray(next_action), next_log_prob
    )

    def tensors(tree, **kwargs):
        return jax.tree.map(lambda x: torch.tensor(np.asarray(x), **kwargs), tree)

    params = tensors(state.critic.params, requires_grad=True)
    targets = tensors(state.target_critic.params)
    obs = torch.tensor(np.concatenate([batch.obs, batch.next_obs]))
    action = torch.tensor(np.concatenate([batch.action, next_action]))
    z = np.linspace(-5, 5, SMALL.atoms)
    p = torch.stack(
        [torch.softmax(torch_critic(targets, c, obs, action)[B:], 1) for c in range(C)]
    ).numpy()
    lower = (p @ z).argmin(0)
    keep = 0.99 * (1 - np.asarray(batch.terminated))[:, None]
    values = np.asarray(batch.reward)[:, None] / 2 + keep * (z - 0.01 * next_log_prob[:, None])
    goal = on_atoms(p[lower, np.arange(B)], values, -5, 5, SMALL.atoms)
    np.testing.assert_allclose(target, goal, atol=1e-8)
    theirs = sum(
        -(torch.tensor(goal) * log_softmax(torch_critic(params, c, obs, action)[:B], 1))
        .sum(1)
        .mean()
        for c in range(C)
    )
    theirs.backward()
    np.testing.assert_allclose(loss, theirs.detach(), rtol=1e-7)
    for ours, other in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, other.grad, rtol=1e-6, atol=1e-8)


def test_the_gradient_of_cross_entropy_is_bounded(start):
    """At most sqrt(2) per row and critic in the logits, however large the reward."""
    logits = jnp.asarray(np.random.default_rng(3).normal(0, 5, (B, SMALL.atoms)))
    target = xqc.projected(SMALL, jax.nn.softmax(logits[::-1]), jnp.full(logits.shape, 1e9))
    grad = jax.grad(lambda x: -(target * jax.nn.log_softmax(x)).sum())(logits)
    assert np.linalg.norm(grad, axis=1).max() <= np.sqrt(2)


# An update


def test_weights_have_length_one_after_updates(start, update):
    """Of every unit, the output layer's too, its bias left out; nothing else is scaled."""
    state = start
    for step in range(1, 4):
        state, metrics = update(state, draw_batch(step), jax.random.key(step), step)
        assert np.isnan(metrics["actor_loss"]) == (step < 3)
    for network in (state.actor, state.critic):
        for name in ("linear_0", "linear_1", "linear_out"):
            lengths = jnp.linalg.norm(network.params[name]["weight"], axis=-2)
            np.testing.assert_allclose(lengths, 1, rtol=1e-12)
            assert ("bias" in network.params[name]) == (name == "linear_out")
    for before, after in ((start.actor, state.actor), (start.critic, state.critic)):
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before.params, after.params)
        assert min(jax.tree.leaves(moved)) > 0
    assert state.log_alpha != start.log_alpha


def test_targets_move_a_step_tau(start, update):
    state, _ = update(start, draw_batch(1), jax.random.key(1), 1)
    jax.tree.map(
        lambda old, online, new: np.testing.assert_allclose(
            new, 0.995 * old + 0.005 * online, rtol=1e-9
        ),
        start.target_critic.params,
        state.critic.params,
        state.target_critic.params,
    )


def test_rewards_count_in_units_of_their_returns(start, update):
    """Ten times the rewards with ten times the spread of returns: the same update."""
    batch = draw_batch(1)

    def moved(factor):
        returns = start.returns.moments._replace(var=jnp.asarray(9.0 * factor**2))
        state = start._replace(returns=start.returns._replace(moments=returns))
        scaled = batch._replace(reward=factor * batch.reward)
        return update(state, scaled, jax.random.key(1), 1)

    (one, metrics), (ten, metrics_of_ten) = moved(1.0), moved(10.0)
    assert metrics["reward_scale"] == pytest.approx(3)
    assert metrics_of_ten["reward_scale"] == pytest.approx(30)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        one.critic.params,
        ten.critic.params,
    )


def test_rewards_can_be_left_as_they_are(start):
    state = start._replace(
        returns=start.returns._replace(moments=start.returns.moments._replace(var=jnp.asarray(9.0)))
    )
    assert xqc.reward_scale(replace(SMALL, normalize_rewards=False), state) == 1


# Returns


class Scripted(gymnasium.Env):
    """Pays given rewards; episodes of 3 steps that terminate, then of 4 that are truncated."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    rewards = np.random.default_rng(0).normal(1, 3, 14)
    ends = (2, 6, 9, 13)

    def __init__(self):
        self.i = -1

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.i += 1
        terminated, truncated = self.i in self.ends[::2], self.i in self.ends[1::2]
        return np.zeros(1, np.float32), self.rewards[self.i], terminated, truncated, {}


def test_spread_of_returns_is_stable_baselines3s(start):
    """`VecNormalize` keeps the same discounted return and the same running variance."""
    theirs = VecNormalize(DummyVecEnv([Scripted]), gamma=0.99)
    theirs.reset()
    state = start
    for i, reward in enumerate(Scripted.rewards):
        theirs.step(np.zeros((1, 1)))
        # It hands rewards on in float32.
        reward = float(np.float32(reward))
        state = xqc.observe(SMALL, state, jnp.asarray(reward), jnp.asarray(i in Scripted.ends))
        np.testing.assert_allclose(state.returns.moments.var, theirs.ret_rms.var, rtol=1e-9)
        np.testing.assert_allclose(state.returns.value, theirs.returns[0], rtol=1e-9)
        scale = xqc.reward_scale(SMALL, state)
        np.testing.assert_allclose(scale, np.sqrt(theirs.ret_rms.var) + 1e-8, rtol=1e-9)


# Learning


def test_it_learns_constant_reward():
    """One state, the reward is the action, thirty steps to an episode."""
    config = replace(
        SMALL,
        actor=MLP((16,)),
        critic=MLP((32, 32), xqc.BATCH_NORM, bias=False, project="all"),
        atoms=51,
        batch_size=64,
        policy_delay=1,
    )
    steps, obs = 600, jnp.zeros(3)

    def interact(i, carry):
        state, rows = carry
        act_key, sample_key, update_key = jax.random.split(
            jax.random.fold_in(jax.random.key(1), i), 3
        )
        action, state = xqc.act(config, state, obs, act_key, explore=True)
        ended = (i + 1) % 30 == 0
        state = xqc.observe(config, state, action[0], ended)
        rows = rows.at[i].set(jnp.stack([action[0], ended.astype(action.dtype)]))
        picked = rows[jax.random.randint(sample_key, (config.batch_size,), 0, i + 1)]
        still = jnp.zeros((config.batch_size, 3))
        batch = Batch(still, picked[:, :1], picked[:, 0], still, picked[:, 1])
        state, _ = xqc.update(config, state, batch, update_key, i + 1)
        return state, rows

    @jax.jit
    def train(key):
        state = xqc.init(config, key, 3, 1)
        state, _ = jax.lax.fori_loop(0, steps, interact, (state, jnp.zeros((steps, 2))))
        return state

    key = jax.random.key(0)
    state = train(key)
    action, _ = xqc.act(config, state, obs, key, explore=False)
    assert 30 * float(action[0]) > 24


# Options


def test_defaults_hold_the_papers_numbers():
    config = xqc.Config()
    assert (config.actor.hidden, config.critic.hidden) == ((256,) * 4, (512,) * 4)
    for mlp in (config.actor, config.critic):
        norm = mlp.norm
        assert (norm.kind, norm.placement) == ("batch", "input+pre")
        assert (norm.momentum, norm.eps) == (0.01, 1e-3)
        assert (mlp.bias, mlp.project) == (False, "all")
    assert (config.atoms, config.low, config.high) == (101, -5, 5)
    assert (config.policy_delay, config.tau, config.batch_size) == (3, 0.005, 256)
    assert xqc.learning_rate(config, 1) == pytest.approx(3e-4)
    assert xqc.learning_rate(config, 2_000_001) == pytest.approx(3e-5)


@pytest.mark.parametrize("wrong", [{"atoms": 1}, {"low": 2.0, "high": 2.0}])
def test_a_support_without_width_says_what_to_write(wrong):
    with pytest.raises(BatchproofError, match="at least 2 atoms and low < high"):
        xqc.Config(**wrong)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(BatchproofError, match="initial_alpha must be positive"):
        xqc.Config(initial_alpha=0)
