"""Recalibration: PreciseBN's formula, and the clinic's result on equal weights."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO, TD3
from torch import nn

from batchproof import layers
from batchproof.clinic import precise
from batchproof.clinic.subject import Subject
from batchproof.clinic.subject import Transitions as TorchTransitions
from batchproof.errors import BatchproofError
from batchproof.lab import nets
from batchproof.lab.agents import sac, td3
from batchproof.lab.nets import MLP, Network
from batchproof.lab.norms import Norm
from batchproof.lab.passes import Batch
from batchproof.lab.recalibrate import recalibrate, recalibrate_agent, recalibrate_critics
from batchproof.modes import E, T
from batchproof.sb3.adapter import subject_from_model

torch.set_num_threads(1)
O, A, N = 4, 2, 300  # noqa: E741
NORMS = {
    "batch": Norm("batch", batch_variance="unbiased", momentum=0.01, estimator="chan"),
    "renorm": Norm("renorm", placement="input+post", estimator="huber"),
}


@pytest.fixture(autouse=True, scope="module")
def _float64():
    # Nearly all the time goes into compiling, so compile fast.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def equal(actual, desired, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=tolerance, atol=tolerance)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(seed, 1 + seed, shape))


def transitions():
    action = jnp.tanh(draw(1, N, A))
    return Batch(draw(0, N, O), action, jnp.zeros(N), draw(2, N, O), jnp.zeros(N))


def unsettled(network):
    """A network whose statistics are not the initial ones."""
    stats = jax.tree.map(lambda leaf: leaf + 1, network.stats)
    params = jax.tree.map(lambda leaf: leaf + 0.1, network.params)
    return Network(params, stats)


@pytest.mark.parametrize("name", NORMS)
def test_eval_mode_then_normalizes_the_data_as_one_batch(name):
    mlp = MLP((8, 7), NORMS[name])
    network = unsettled(nets.init(jax.random.key(0), mlp, O, A))
    obs = draw(3, N, O)
    done = recalibrate(mlp, network, obs)
    plain = MLP((8, 7), Norm("batch", placement=mlp.norm.placement))
    equal(nets.apply(mlp, done, obs, E)[0], nets.apply(plain, network, obs, T)[0])


def test_it_is_precise_bns_formula_over_k_batches():
    mlp = MLP((8,), Norm("batch"))
    network = unsettled(nets.init(jax.random.key(0), mlp, O, A))
    obs = draw(3, N, O)
    linear = network.params["linear_0"]
    batches = np.split(np.asarray(obs @ linear["weight"] + linear["bias"]), 6)
    means = np.array([x.mean(0) for x in batches])
    variances = np.array([x.var(0) for x in batches])
    mean = means.mean(0)
    stats = recalibrate(mlp, network, obs).stats["norm_pre_0"]
    equal(stats["mean"], mean)
    equal(stats["var"], (means**2 + variances).mean(0) - mean**2)


def test_only_means_and_variances_change():
    mlp = MLP((8,), NORMS["renorm"])
    network = unsettled(nets.init(jax.random.key(0), mlp, O, A))
    done = recalibrate(mlp, network, draw(3, N, O))
    assert done.params is network.params
    for layer, stats in done.stats.items():
        assert stats["count"] == network.stats[layer]["count"]
        assert jax.tree.map(jnp.shape, stats) == jax.tree.map(jnp.shape, network.stats[layer])
        assert not np.allclose(stats["mean"], network.stats[layer]["mean"])


def test_nothing_to_do_and_too_few_rows():
    mlp = MLP((8,), Norm("layer"))
    network = nets.init(jax.random.key(0), mlp, O, A)
    assert recalibrate(mlp, network, draw(0, N, O)) is network
    with pytest.raises(BatchproofError, match="at least 2 rows, got 1"):
        recalibrate(mlp, network, draw(0, 1, O))


def torch_linear(params, index=...):
    weight = torch.tensor(np.asarray(params["weight"][index]).T.copy())
    linear = nn.Linear(weight.shape[1], weight.shape[0]).double()
    linear.weight.data.copy_(weight)
    linear.bias.data.copy_(torch.tensor(np.asarray(params["bias"][index])))
    return linear


def torch_net(network, index=...):
    """The same network in torch: Linear, norm, ReLU, twice, and Linear."""
    modules = []
    for layer in (0, 1):
        linear = torch_linear(network.params[f"linear_{layer}"], index)
        norm = layers.BatchRenorm1d(linear.out_features).double()
        scale, bias = (network.params[f"norm_pre_{layer}"][key][index] for key in ("scale", "bias"))
        norm.weight.data.copy_(torch.tensor(np.asarray(scale)))
        norm.bias.data.copy_(torch.tensor(np.asarray(bias)))
        modules += [linear, norm, nn.ReLU()]
    return nn.Sequential(*modules, torch_linear(network.params["linear_out"], index))


class Critic(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, obs, action):
        return self.net(torch.cat([obs, action], 1))


def test_agents_get_what_the_clinic_gives_them():
    """TD3 with both targets: four networks, equal weights on both sides, equal statistics."""
    mlp = MLP((8, 7), Norm("renorm"))
    config = td3.Config(actor=mlp, critic=mlp, critics=1)
    agent = td3.init(config, jax.random.key(0), O, A)
    roles = ("actor", "critic", "target_actor", "target_critic")
    agent = agent._replace(**{role: unsettled(getattr(agent, role)) for role in roles})
    batch = transitions()
    done = recalibrate_agent(
        config, agent, batch, lambda actor, obs: td3.policy(config, actor, obs, E)[0]
    )

    networks = {
        "actor": nn.Sequential(torch_net(agent.actor), nn.Tanh()),
        "critic": Critic(torch_net(agent.critic, 0)),
        "actor_target": nn.Sequential(torch_net(agent.target_actor), nn.Tanh()),
        "critic_target": Critic(torch_net(agent.target_critic, 0)),
    }
    data = TorchTransitions(*(torch.tensor(np.asarray(part)) for part in batch))
    subject = Subject.from_networks(networks, data.obs, transitions=data)
    precise.recalibrate(subject, batch_size=77)

    found = {
        "actor": (networks["actor"][0], ...),
        "critic": (networks["critic"].net, 0),
        "target_actor": (networks["actor_target"][0], ...),
        "target_critic": (networks["critic_target"].net, 0),
    }
    for role, (net, index) in found.items():
        for layer in (0, 1):
            ours = getattr(done, role).stats[f"norm_pre_{layer}"]
            equal(ours["mean"][index], net[3 * layer + 1].running_mean)
            equal(ours["var"][index], net[3 * layer + 1].running_var)
    assert done.actor_optimizer is agent.actor_optimizer
    assert done.critic.params is agent.critic.params


def test_agents_without_targets():
    mlp = MLP((8,), Norm("batch"))
    config = sac.Config(actor=mlp, critic=mlp, target_network=False)
    agent = sac.init(config, jax.random.key(0), O, A)
    batch = transitions()

    def policy(actor, obs):
        return sac.policy(config, actor, obs, None, E)[0]

    done = recalibrate_agent(config, agent, batch, policy)
    assert done.target_critic is None
    obs = jnp.concatenate([batch.obs, batch.next_obs])
    action = jnp.concatenate([batch.action, policy(done.actor, batch.next_obs)])
    expected = recalibrate_critics(mlp, agent.critic, obs, action)
    jax.tree.map(equal, done.critic.stats, expected.stats)
    # The two critics have weights, and so statistics, of their own.
    mean = done.critic.stats["norm_pre_0"]["mean"]
    assert mean.shape == (2, 8)
    assert not np.allclose(mean[0], mean[1])


# The clinic's on Stable-Baselines3 models


class Normalized(nn.Module):
    """Batch norm in front of a network."""

    def __init__(self, size, net):
        super().__init__()
        self.norm, self.net = nn.BatchNorm1d(size), net

    def forward(self, x):
        return self.net(self.norm(x))


def test_sb3_models_from_replay_rollouts_or_given_data():
    env = gymnasium.make("Pendulum-v1")
    model = TD3("MlpPolicy", env, learning_starts=1000, buffer_size=400, policy_kwargs={
        "net_arch": [8]}, device="cpu", seed=0)  # fmt: skip
    model.actor.mu = Normalized(3, model.actor.mu)
    model.learn(400)
    (replayed,) = precise.recalibrate(subject_from_model(model, count=400))
    stored = torch.tensor(model.replay_buffer.observations[:400, 0])
    assert replayed.samples == 400
    equal(model.actor.mu.norm.running_mean, stored.mean(0), 1e-5)

    rollout = PPO("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, device="cpu", seed=0)
    rollout.policy.mlp_extractor.policy_net = Normalized(3, rollout.policy.mlp_extractor.policy_net)
    rollout.learn(64)
    (collected,) = precise.recalibrate(subject_from_model(rollout))
    assert collected.samples == 64
    buffered = torch.tensor(rollout.rollout_buffer.observations).reshape(-1, 3)
    norm = rollout.policy.mlp_extractor.policy_net.norm
    equal(norm.running_mean, buffered.mean(0), 1e-5)

    given = torch.randn(50, 3)
    precise.recalibrate(subject_from_model(rollout, given))
    equal(norm.running_mean, given.mean(0), 1e-5)
    env.close()
