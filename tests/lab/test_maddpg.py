"""MADDPG against a plain reference in torch, written from the paper's equations (1706.02275)."""

from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from batchproof.errors import BatchproofError
from batchproof.lab.agents import AGENTS, maddpg
from batchproof.lab.envs.layout import Layout
from batchproof.lab.nets import MLP, Network
from batchproof.lab.norms import Norm
from batchproof.lab.passes import Batch
from batchproof.modes import Plan

B = 32
HIDDEN = (8, 8)
UNEQUAL = Layout(("a", "b", "c"), (3, 5, 2), (2, 1, 3), "sum")
PAIR = Layout(("a", "b"), (3, 5), (2, 1), "sum")
EQUAL = Layout(("a", "b", "c"), (4, 4, 4), (2, 2, 2), "sum")
LEARNING_RATE, GAMMA, TAU, CLIP, PENALTY = 1e-3, 0.9, 0.05, 0.5, 1e-2


def config(norm="none", placement="pre", plan="TETTE", **options):
    mlp = MLP(HIDDEN, Norm(norm, placement))
    return maddpg.Config(
        actor=mlp,
        critic=mlp,
        plan=Plan.parse(plan),
        learning_rate=LEARNING_RATE,
        gamma=GAMMA,
        tau=TAU,
        max_grad_norm=CLIP,
        action_penalty=PENALTY,
        **options,
    )


# The reference: torch modules with train() and eval(), nothing of ours


class ReferenceMADDPG:
    """Several agents' networks; ``members[k]`` are the agents that pair k of networks serves."""

    def __init__(self, actors, critics, members, centralized, one_hot):
        self.actors, self.critics, self.members = actors, critics, members
        self.centralized, self.one_hot = centralized, one_hot
        self.target_actors, self.target_critics = deepcopy(actors), deepcopy(critics)
        self.actor_optimizers = [torch.optim.Adam(a.parameters(), LEARNING_RATE) for a in actors]
        self.critic_optimizers = [torch.optim.Adam(c.parameters(), LEARNING_RATE) for c in critics]

    def told(self, i, obs):
        return torch.cat([obs, torch.eye(3)[i].expand(len(obs), 3)], 1) if self.one_hot else obs

    def actions(self, actor, members, obs):
        """Every member's action and output before tanh, all rows in one pass."""
        mean = actor(torch.cat([self.told(i, obs[i]) for i in members]))
        return mean.tanh().chunk(len(members)), mean

    def values(self, critic, members, obs, actions_for):
        """Q_i of every member i in one pass; ``actions_for(i)`` are the actions it is asked."""
        rows = []
        for i in members:
            seen = torch.cat(obs, 1) if self.centralized else obs[i]
            actions = actions_for(i)
            action = torch.cat(actions, 1) if self.centralized else actions[i]
            rows.append(torch.cat([self.told(i, seen), action], 1))
        return critic(torch.cat(rows))[:, 0]

    def update(self, obs, actions, rewards, next_obs, terminated):
        next_actions = [None] * len(obs)
        for actor, members in zip(self.target_actors, self.members, strict=True):
            actor.eval()
            with torch.no_grad():
                found, _ = self.actions(actor, members, next_obs)
            for i, action in zip(members, found, strict=True):
                next_actions[i] = action
        losses = []
        for k, members in enumerate(self.members):
            actor, critic, target = self.actors[k], self.critics[k], self.target_critics[k]
            with torch.no_grad():
                target.eval()
                next_q = self.values(target, members, next_obs, lambda i: next_actions)
                reward = torch.cat([rewards[i] for i in members])
                ended = torch.cat([terminated for _ in members])
                y = reward + GAMMA * (1 - ended) * next_q
            critic.train()
            q = self.values(critic, members, obs, lambda i: actions)
            loss = (q - y).pow(2).mean()
            losses.append(loss.item())
            descend(self.critic_optimizers[k], critic, loss)

            actor.train()
            own, mean = self.actions(actor, members, obs)
            own = dict(zip(members, own, strict=True))

            def deviating(i, own=own):
                return [own[i] if j == i else actions[j] for j in range(len(actions))]

            q = self.values(critic, members, obs, deviating)
            descend(self.actor_optimizers[k], actor, PENALTY * mean.pow(2).mean() - q.mean())
        for targets, networks in (
            (self.target_actors, self.actors),
            (self.target_critics, self.critics),
        ):
            for target, network in zip(targets, networks, strict=True):
                follow(target, network)
        return np.mean(losses)


def descend(optimizer, network, loss):
    network.zero_grad()
    loss.backward()
    for parameter in network.parameters():
        norm = parameter.grad.norm()
        if norm > CLIP:
            parameter.grad *= CLIP / norm
    optimizer.step()


def follow(target, network):
    with torch.no_grad():
        for t, o in zip(target.parameters(), network.parameters(), strict=True):
            t += TAU * (o - t)
        for t, o in zip(target.buffers(), network.buffers(), strict=True):
            t.copy_(o)


def torch_network(network):
    """A torch module with our weights: Linear [BatchNorm] ReLU twice, then Linear."""
    layers = []
    for name in ("linear_0", "linear_1", "linear_out"):
        weight = torch.tensor(np.asarray(network.params[name]["weight"]))
        linear = nn.Linear(*weight.shape)
        linear.weight.data = weight.T.contiguous()
        linear.bias.data = torch.tensor(np.asarray(network.params[name]["bias"]))
        layers.append(linear)
        norm = network.params.get(f"norm_pre_{name[-1]}")
        if norm is not None:
            stats = network.stats[f"norm_pre_{name[-1]}"]
            batch_norm = nn.BatchNorm1d(len(norm["scale"]))
            batch_norm.weight.data = torch.tensor(np.asarray(norm["scale"]))
            batch_norm.bias.data = torch.tensor(np.asarray(norm["bias"]))
            batch_norm.running_mean = torch.tensor(np.asarray(stats["mean"]))
            batch_norm.running_var = torch.tensor(np.asarray(stats["var"]))
            layers.append(batch_norm)
        if name != "linear_out":
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def first(critic):
    return jax.tree.map(lambda leaf: leaf[0], critic)


def leaves_of(module):
    """Weights, biases and running statistics, in the order of our layers."""
    found = []
    for layer in module:
        if isinstance(layer, nn.Linear):
            found += [layer.weight.T, layer.bias]
        elif isinstance(layer, nn.BatchNorm1d):
            found += [layer.weight, layer.bias, layer.running_mean, layer.running_var]
    return [x.detach().numpy() for x in found]


def our_leaves(network):
    found = []
    for name in ("linear_0", "linear_1", "linear_out"):
        linear = network.params[name]
        found += [linear["weight"], linear["bias"]]
        norm = f"norm_pre_{name[-1]}"
        if norm in network.params:
            params, stats = network.params[norm], network.stats[norm]
            found += [params["scale"], params["bias"], stats["mean"], stats["var"]]
    return [np.asarray(x) for x in found]


# Problems


def draw_batch(rng, layout):
    """Transitions of which about a quarter ended."""
    return Batch(
        obs=rng.normal(size=(B, sum(layout.obs_sizes))),
        action=np.tanh(rng.normal(size=(B, sum(layout.action_sizes)))),
        reward=rng.normal(size=(B, len(layout.names))),
        next_obs=rng.normal(size=(B, sum(layout.obs_sizes))),
        terminated=(rng.uniform(size=B) < 0.25).astype(float),
    )


@cache
def compiled_init(made, layout):
    return jax.jit(partial(maddpg.init, made, layout=layout))


def fresh(made, layout):
    """A new agent; one compiled function, because single operations take longer to compile."""
    return compiled_init(made, layout)(jax.random.key(0))


@cache
def compiled_act(made, explore=False):
    return jax.jit(partial(maddpg.act, made, explore=explore))


def scattered(state, seed):
    """The state with every weight and running statistic moved a little."""
    rng = np.random.default_rng(seed)

    def move(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return leaf
        return jnp.asarray(leaf + rng.uniform(0, 0.3, leaf.shape))

    names = ("actors", "critics")
    moved = {name: jax.tree.map(move, getattr(state, name)) for name in names}
    return state._replace(**moved, target_actors=moved["actors"], target_critics=moved["critics"])


@cache
def compiled_update(made):
    return jax.jit(partial(maddpg.update, made))


def pieces(joint, sizes):
    return [torch.tensor(part) for part in np.split(joint, np.cumsum(sizes)[:-1], axis=1)]


@pytest.fixture(autouse=True)
def _compile_fast():
    """Nearly all the time goes into compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def _float64(_compile_fast):
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("layout", "norm", "options"),
    [
        (PAIR, "none", {}),
        (UNEQUAL, "batch", {}),
        (PAIR, "batch", {"centralized": False}),
        (EQUAL, "batch", {"share_parameters": True}),
    ],
)
def test_updates_equal_the_reference(layout, norm, options):
    torch.set_num_threads(1)
    made = config(norm, **options)
    state = scattered(fresh(made, layout), seed=1)
    shared = made.share_parameters
    reference = ReferenceMADDPG(
        [torch_network(actor) for actor in state.actors],
        [torch_network(first(critic)) for critic in state.critics],
        [[0, 1, 2]] if shared else [[i] for i in range(len(layout.names))],
        made.centralized,
        one_hot=shared,
    )
    before = our_leaves(state.target_actors[0])
    rng = np.random.default_rng(2)
    for step in range(1, 5):
        batch = draw_batch(rng, layout)
        state, metrics = compiled_update(made)(state, batch, jax.random.key(step), step)
        loss = reference.update(
            pieces(batch.obs, layout.obs_sizes),
            pieces(batch.action, layout.action_sizes),
            torch.tensor(batch.reward).T,
            pieces(batch.next_obs, layout.obs_sizes),
            torch.tensor(batch.terminated),
        )
        assert metrics["critic_loss"] == pytest.approx(loss, abs=1e-9)
    for ours, theirs in (
        (state.actors, reference.actors),
        (state.target_actors, reference.target_actors),
        ([first(c) for c in state.critics], reference.critics),
        ([first(c) for c in state.target_critics], reference.target_critics),
    ):
        for network, module in zip(ours, theirs, strict=True):
            for mine, other in zip(our_leaves(network), leaves_of(module), strict=True):
                np.testing.assert_allclose(mine, other, rtol=0, atol=1e-9)
    assert all(
        (a != b).any() for a, b in zip(before, our_leaves(state.target_actors[0]), strict=True)
    )


@pytest.mark.usefixtures("_float64")
def test_agents_permuted_before_an_update_are_the_updated_agents_permuted():
    order = [1, 0]
    layout = Layout(("a", "b"), (4, 4), (2, 2), "sum")
    made = config("batch")
    state = scattered(fresh(made, layout), seed=1)
    batch = draw_batch(np.random.default_rng(0), layout)

    def columns(joint, size):
        return np.concatenate([joint[:, i * size : (i + 1) * size] for i in order], axis=1)

    permuted = Batch(
        columns(batch.obs, 4),
        columns(batch.action, 2),
        batch.reward[:, order],
        columns(batch.next_obs, 4),
        batch.terminated,
    )
    # A critic reads the agents side by side: the rows of its first layer follow them.
    rows = [i * 4 + r for i in order for r in range(4)]
    rows += [8 + i * 2 + r for i in order for r in range(2)]

    def critic(network):
        linear = network.params["linear_0"]
        moved = linear | {"weight": linear["weight"][:, jnp.asarray(rows)]}
        return Network(network.params | {"linear_0": moved}, network.stats)

    def permute(state):
        return state._replace(
            actors=tuple(state.actors[i] for i in order),
            critics=tuple(critic(state.critics[i]) for i in order),
            target_actors=tuple(state.target_actors[i] for i in order),
            target_critics=tuple(critic(state.target_critics[i]) for i in order),
        )

    update = compiled_update(made)
    after, _ = update(state, batch, jax.random.key(0), 1)
    other, _ = update(permute(state), permuted, jax.random.key(0), 1)
    expected = permute(after)
    for name in ("actors", "critics", "target_actors", "target_critics"):
        for mine, theirs in zip(
            jax.tree.leaves(getattr(other, name)),
            jax.tree.leaves(getattr(expected, name)),
            strict=True,
        ):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10)


def test_independent_critics_learn_from_their_own_agent_alone():
    batch = Batch(*(np.float32(leaf) for leaf in draw_batch(np.random.default_rng(0), PAIR)))
    obs, action, reward = batch.obs.copy(), batch.action.copy(), batch.reward.copy()
    obs[:, 3:], action[:, 2:], reward[:, 1] = 1.0, 0.5, 9.0
    changed = batch._replace(obs=obs, action=action, reward=reward)
    made = config(centralized=False)
    state, update = fresh(made, PAIR), compiled_update(made)
    one, other = (update(state, b, jax.random.key(0), 1)[0] for b in (batch, changed))
    for agent, same in enumerate((True, False)):
        networks = [(after.critics[agent], after.actors[agent]) for after in (one, other)]
        pairs = zip(*(jax.tree.leaves(network) for network in networks), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == same


def test_sizes_of_every_network():
    state = fresh(config("batch", "before-action"), UNEQUAL)
    for i, actor in enumerate(state.actors):
        assert actor.params["linear_0"]["weight"].shape == (UNEQUAL.obs_sizes[i], 8)
        assert actor.params["linear_out"]["weight"].shape == (8, UNEQUAL.action_sizes[i])
        assert "norm_input" in actor.params  # DDPG's placement: input and all layers
    for critic in state.critics:  # the actions of all agents enter at the second layer
        assert critic.params["linear_0"]["weight"].shape == (1, 10, 8)
        assert critic.params["linear_1"]["weight"].shape == (1, 8 + 6, 8)
        assert {"norm_input", "norm_pre_0"} == {n for n in critic.params if "norm" in n}
    shared = fresh(config(share_parameters=True), EQUAL)
    assert len(shared.actors) == len(shared.critics) == 1
    assert shared.actors[0].params["linear_0"]["weight"].shape == (4 + 3, 8)
    assert shared.critics[0].params["linear_0"]["weight"].shape == (1, 12 + 3 + 6, 8)


def test_an_agent_acts_on_its_own_observation():
    for options, layout in (({}, UNEQUAL), ({"share_parameters": True}, EQUAL)):
        made = config(**options)
        state = fresh(made, layout)
        obs = jnp.linspace(-1, 1, sum(layout.obs_sizes))
        key = jax.random.key(1)
        action, _ = compiled_act(made)(state, obs, key)
        assert action.shape == (6,)
        other, _ = compiled_act(made)(state, obs.at[-1].add(0.5), key)
        last = layout.action_sizes[2]
        assert (action[:-last] == other[:-last]).all()
        assert (action[-last:] != other[-last:]).all()
    # The one-hot tells agents apart that see the same.
    action, _ = compiled_act(made)(state, jnp.tile(jnp.arange(4.0), 3), key)
    assert len(set(action[::2].tolist())) == 3


def test_exploration_adds_noise_of_the_given_size_within_bounds():
    made = replace(config(), exploration_noise=0.3)
    state = fresh(made, UNEQUAL)
    obs = jnp.ones(10)

    def act(key, explore=True):
        return maddpg.act(made, state, obs, key, explore=explore)[0]

    noisy = jax.vmap(act)(jax.random.split(jax.random.key(1), 2000))
    quiet = act(jax.random.key(0), explore=False)
    assert jnp.abs(noisy).max() <= 1
    np.testing.assert_allclose(noisy.mean(0), quiet, atol=0.03)
    np.testing.assert_allclose(noisy.std(0), 0.3, atol=0.03)


def test_the_mode_of_acting():
    plain = config("none")
    obs = jnp.linspace(-1, 1, 8)
    key = jax.random.key(1)

    def act(plan):
        made = config("batch", plan=plan)
        state = scattered(fresh(made, PAIR), seed=3)
        action, after = compiled_act(made)(state, obs, key)
        moved = any(
            (a != b).any()
            for a, b in zip(
                jax.tree.leaves(after.actors), jax.tree.leaves(state.actors), strict=True
            )
        )
        return action, moved, state

    bypassed, moved, state = act("BTETTE")
    without = tuple(
        Network({n: p for n, p in a.params.items() if "norm" not in n}, {}) for a in state.actors
    )
    expected, _ = compiled_act(plain)(state._replace(actors=without), obs, key)
    np.testing.assert_allclose(bypassed, expected, atol=1e-6)
    assert not moved
    running, moved, _ = act("ETETTE")
    assert not moved
    assert not np.allclose(running, bypassed, atol=1e-3)
    alone, moved, state = act("TTETTE")
    assert moved
    # One row is its own mean: what the last norm gives is its bias, whatever the agent sees.
    constant = []
    for actor in state.actors:
        hidden = jax.nn.relu(actor.params["norm_pre_1"]["bias"])
        out = actor.params["linear_out"]
        constant.append(jnp.tanh(hidden @ out["weight"] + out["bias"]))
    np.testing.assert_allclose(alone, jnp.concatenate(constant), atol=1e-6)


def test_a_critic_in_mode_t_does_not_see_a_common_shift_of_one_agents_actions():
    def kappa(layout, **options):
        made = config("batch", **options)
        batch = Batch(*(np.float32(leaf) for leaf in draw_batch(np.random.default_rng(0), layout)))
        state = scattered(fresh(made, layout), seed=1)
        measured = jax.jit(partial(maddpg.measure, made))(state, batch, jax.random.key(0))
        assert all(value.shape == () and np.isfinite(value) for value in measured.values())
        return measured["kappa"]

    assert kappa(PAIR, plan="TETTE") < 1e-4
    # With a shared critic the rows of different agents move different inputs: not a common shift.
    assert kappa(EQUAL, plan="TETTE", share_parameters=True) > 1e-2


def test_two_agents_learn_to_add_up():
    """Both are paid for a_1 + a_2 = o, which both see."""
    layout = Layout(("a", "b"), (1, 1), (1, 1), "sum")
    made = maddpg.Config(
        actor=MLP((16, 16)), critic=MLP((16, 16)), learning_rate=5e-3, gamma=0.0, tau=0.1
    )
    state = fresh(made, layout)
    key = jax.random.key(0)
    act = jax.jit(jax.vmap(partial(maddpg.act, made, explore=False), in_axes=(None, 0, None)))
    rng = np.random.default_rng(0)
    for step in range(1, 301):
        seen = np.repeat(rng.uniform(-1, 1, (256, 1)), 2, axis=1).astype(np.float32)
        action = np.asarray(act(state, seen, key)[0])
        action = np.clip(action + rng.normal(0, 0.3, action.shape), -1, 1)
        reward = -np.repeat((action.sum(1, keepdims=True) - seen[:, :1]) ** 2, 2, axis=1)
        batch = Batch(*(np.float32(leaf) for leaf in (seen, action, reward, seen, np.ones(256))))
        state, _ = compiled_update(made)(state, batch, key, step)
    action = act(state, seen, key)[0]
    assert np.abs(action.sum(1) - seen[:, 0]).mean() < 0.15


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"exploration_noise": -1.0}, "exploration_noise"),
        ({"action_penalty": -1.0}, "action_penalty"),
        ({"gamma": 1.5}, "gamma"),
        ({"batch_size": 0}, "batch_size"),
        ({"target_stats": "lost"}, "target statistics"),
    ],
)
def test_wrong_settings_are_one_line(options, words):
    with pytest.raises(BatchproofError, match=words) as error:
        maddpg.Config(**options)
    assert "\n" not in str(error.value)


def test_unequal_agents_cannot_share():
    with pytest.raises(BatchproofError, match="equal sizes"):
        maddpg.init(config(share_parameters=True), jax.random.key(0), UNEQUAL)


def test_registered_for_several_agents_with_the_authors_settings():
    assert AGENTS["maddpg"] is maddpg
    assert maddpg.MULTI_AGENT
    preset = maddpg.PRESETS["openai"]
    assert (preset.learning_rate, preset.gamma, preset.tau) == (1e-2, 0.95, 0.01)
    assert (preset.batch_size, preset.max_grad_norm) == (1024, 0.5)
    assert maddpg.TRAINING == {"learning_starts": 25_600, "update_every": 100}
    assert preset.actor.hidden == preset.critic.hidden == (64, 64)
