"""Norms by keyword: where they sit, and that `none` is the library's own policy."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from torch import nn

from batchproof.errors import BatchproofError
from batchproof.sb3.policies import (
    NormActorCriticPolicy,
    NormDQNPolicy,
    NormSACPolicy,
    NormTD3Policy,
)

NORMS = ["batch", "renorm", "layer", "group", "rms"]


class Noise(gymnasium.Env):
    """Observations at random; the reward is the action."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        over = bool(self.np_random.random() < 0.1)
        return obs, float(np.sum(action)), over, False, {}


class DiscreteNoise(Noise):
    action_space = spaces.Discrete(3)


AGENTS = {
    "TD3": (TD3, NormTD3Policy, Noise, {"learning_starts": 20}),
    "DDPG": (DDPG, NormTD3Policy, Noise, {"learning_starts": 20}),
    "SAC": (SAC, NormSACPolicy, Noise, {"learning_starts": 20}),
    "DQN": (DQN, NormDQNPolicy, DiscreteNoise, {"learning_starts": 20}),
    "PPO": (PPO, NormActorCriticPolicy, Noise, {"n_steps": 32, "batch_size": 32}),
}


def make(agent, policy=None, **norms):
    kind, norm_policy, env, settings = AGENTS[agent]
    torch.set_num_threads(1)
    if agent != "PPO":
        settings = settings | {"buffer_size": 200, "batch_size": 16}
    policy_kwargs = {"net_arch": [32, 16], **norms}
    chosen = norm_policy if policy is None else policy
    return kind(chosen, env(), policy_kwargs=policy_kwargs, seed=0, device="cpu", **settings)


def kinds(net):
    return [type(layer).__name__ for layer in net]


@pytest.mark.parametrize("agent", AGENTS)
def test_none_is_the_librarys_policy_bit_for_bit(agent):
    stock = make(agent, "MlpPolicy").learn(64).policy.state_dict()
    found = make(agent).learn(64).policy.state_dict()
    assert stock.keys() == found.keys()
    assert all(torch.equal(found[key], stock[key]) for key in stock)


@pytest.mark.parametrize("agent", AGENTS)
def test_none_may_be_written_as_python_does(agent):
    policy = make(agent, norm=None).policy
    assert policy.state_dict().keys() == make(agent, "MlpPolicy").policy.state_dict().keys()
    policy.load_state_dict(make(agent, norm="none").policy.state_dict())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("agent", AGENTS)
def test_trains_saves_and_loads(agent, norm, tmp_path):
    kind, _, env, _ = AGENTS[agent]
    model = make(agent, norm=norm).learn(40)
    model.save(tmp_path / "model.zip")
    loaded = kind.load(tmp_path / "model.zip", env=env(), device="cpu")
    assert type(loaded.policy) is type(model.policy)
    expected = model.policy.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.policy.state_dict().items())
    obs = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0]
    )
    model.policy.save(tmp_path / "policy.pth")
    policy = type(model.policy).load(tmp_path / "policy.pth", device="cpu")
    assert all(torch.equal(v, expected[k]) for k, v in policy.state_dict().items())


def test_norms_sit_after_each_hidden_layer():
    policy = make("TD3", norm="layer").policy
    hidden = ["Linear", "LayerNorm", "ReLU"] * 2
    assert kinds(policy.actor.mu) == [*hidden, "Linear", "Tanh"]
    for critic in (policy.critic, policy.critic_target):
        assert kinds(critic.qf0) == kinds(critic.qf1) == [*hidden, "Linear"]
        assert critic.q_networks[0] is critic.qf0
        assert critic.q_networks[1] is critic.qf1
    assert kinds(make("SAC", norm="layer").policy.actor.latent_pi) == hidden
    assert kinds(make("DQN", norm="layer").policy.q_net.q_net) == [*hidden, "Linear"]
    extractor = make("PPO", norm="layer").policy.mlp_extractor
    assert kinds(extractor.policy_net) == ["Linear", "LayerNorm", "Tanh"] * 2
    assert kinds(extractor.value_net) == ["Linear", "LayerNorm", "Tanh"] * 2


def test_networks_are_chosen_apart():
    policy = make("TD3", norm="layer", critic_norm="batch", actor_norm="none").policy
    assert kinds(policy.actor.mu) == ["Linear", "ReLU"] * 2 + ["Linear", "Tanh"]
    assert kinds(policy.critic.qf0)[1].startswith("BatchNorm")
    extractor = make("PPO", critic_norm="layer").policy.mlp_extractor
    assert kinds(extractor.policy_net) == ["Linear", "Tanh"] * 2
    assert "LayerNorm" in kinds(extractor.value_net)


def test_targets_start_as_copies_and_the_optimizers_hold_the_norms():
    model = make("TD3", norm="batch")
    critic, target = model.critic.state_dict(), model.critic_target.state_dict()
    assert all(torch.equal(critic[key], target[key]) for key in critic)
    held = {id(p) for group in model.critic.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.critic.parameters()}
    assert len(model.critic_batch_norm_stats) == 8  # two critics, two layers, mean and variance


def test_options_reach_the_layers():
    model = make("TD3", norm="batch", norm_options={"momentum": 0.01, "eps": 1e-3})
    layer = model.critic.qf0[1]
    assert (layer.momentum, layer.eps) == (0.01, 1e-3)


def test_mistakes_raise_one_line():
    for norms in ({"norm": "bach"}, {"critic_norm": "bach"}, {"actor_norm": "bach"}):
        with pytest.raises(BatchproofError, match="bach") as caught:
            make("TD3", **norms)
        assert "\n" not in str(caught.value)
    with pytest.raises(BatchproofError, match="net_arch"):
        make("TD3", norm="batch", net_arch=[])
    with pytest.raises(BatchproofError, match="typo"):
        make("TD3", norm="batch", norm_options={"typo": 1})


@pytest.mark.parametrize("agent", AGENTS)
def test_options_of_no_norm_are_refused(agent):
    for norms in ({}, {"norm": None}, {"norm": "none"}):
        with pytest.raises(BatchproofError, match="norm_options are for a norm") as caught:
            make(agent, norm_options={"momentum": 0.01}, **norms)
        assert "\n" not in str(caught.value)
        make(agent, norm_options={}, **norms)
    if agent != "DQN":
        make(agent, critic_norm="batch", norm_options={"momentum": 0.01})


def test_output_layers_are_untouched_by_the_norm():
    # A shift of a hidden layer's output is what batch norm takes out; the output layer's bias
    # must stay visible in the action.
    model = make("TD3", norm="batch")
    obs = torch.rand(8, 3)
    model.policy.set_training_mode(True)
    before = model.actor(obs).detach()
    with torch.no_grad():
        model.actor.mu[0].bias += 1.0
    assert torch.allclose(model.actor(obs), before, atol=1e-5)
    last = next(layer for layer in reversed(model.actor.mu) if isinstance(layer, nn.Linear))
    with torch.no_grad():
        last.bias += 1.0
    assert float((model.actor(obs).detach() - before).abs().min()) > 0.01
