"""The monitor's figures against numbers worked out here, and that it changes nothing."""

import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import ARS, QRDQN, TQC, CrossQ, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from batchproof.errors import BatchproofError
from batchproof.sb3 import NatureCNN
from batchproof.sb3.callback import MonitorCallback, measure
from batchproof.sb3.modes import set_modes
from batchproof.sb3.policies import (
    NormActorCriticPolicy,
    NormDQNPolicy,
    NormSACPolicy,
    NormTD3Policy,
)


class Noise(gymnasium.Env):
    """Observations at random; the reward is the action."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Box(-2, 2, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        over = bool(self.np_random.random() < 0.1)
        return obs, float(np.sum(action)), over, False, {}


class DiscreteNoise(Noise):
    action_space = spaces.Discrete(3)


class Kept(KVWriter):
    """A writer that keeps what it is given."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append((step, dict(key_values)))

    def close(self):
        pass


def make(kind=TD3, policy=NormTD3Policy, env=Noise, **norms):
    torch.set_num_threads(1)
    policy_kwargs = {"net_arch": [8, 8], **norms}
    settings = {"n_steps": 32} | ({"batch_size": 32} if kind is PPO else {})
    if kind not in (PPO, A2C):
        settings = {"learning_starts": 40, "batch_size": 32, "buffer_size": 500}
    return kind(policy, env(), policy_kwargs=policy_kwargs, seed=0, device="cpu", **settings)


def learn(model, steps, callback=None):
    """Rows that reached the logger."""
    kept = Kept()
    model.set_logger(Logger(None, [kept]))
    model.learn(steps, callback=callback, log_interval=1)
    model.logger.dump(steps)
    return kept.rows


def state(model):
    return {key: value.clone() for key, value in model.policy.state_dict().items()}


AGENTS = {
    "TD3": (TD3, NormTD3Policy, Noise, {"norm": "renorm"}),
    "SAC": (SAC, NormSACPolicy, Noise, {"norm": "batch"}),
    "TQC": (TQC, "MlpPolicy", Noise, {}),
    "CrossQ": (CrossQ, "MlpPolicy", Noise, {}),
    "PPO": (PPO, NormActorCriticPolicy, Noise, {"norm": "batch"}),
    "DQN": (DQN, NormDQNPolicy, DiscreteNoise, {"norm": "batch"}),
    "QRDQN": (QRDQN, "MlpPolicy", DiscreteNoise, {}),
}
STATISTICS = {"mean_error", "var_error", "outlier_share"}
EXPECTED = {
    "TD3": STATISTICS | {"action_gap", "kappa", "r_clipped", "d_clipped"},
    "SAC": STATISTICS | {"action_gap", "kappa"},
    "TQC": {"kappa"},
    "CrossQ": STATISTICS | {"action_gap", "kappa", "r_clipped", "d_clipped"},
    "PPO": STATISTICS | {"action_gap"},
    "DQN": STATISTICS,
    "QRDQN": set(),
}


@pytest.mark.parametrize("agent", AGENTS)
def test_training_is_the_same_with_and_without(agent):
    kind, policy, env, norms = AGENTS[agent]
    bare = make(kind, policy, env, **norms)
    learn(bare, 100)
    watched = make(kind, policy, env, **norms)
    rows = learn(watched, 100, MonitorCallback(every=10, batch_size=16, per_layer=True))
    expected = state(bare)
    assert all(torch.equal(value, expected[key]) for key, value in state(watched).items())
    keys = {key for _, row in rows for key in row if key.startswith("batchproof/")}
    assert {key for key in keys if key.count("/") == 1} == {
        f"batchproof/{key}" for key in EXPECTED[agent]
    }
    assert all(np.isfinite(row[key]) for _, row in rows for key in keys if key in row)


@pytest.mark.parametrize("plan", ["TEMJJ", "TTEETE"])
def test_training_under_a_plan_is_the_same_with_and_without(plan):
    models = []
    for callback in (None, MonitorCallback(every=10)):
        model = make(norm="batch")
        set_modes(model, plan)
        learn(model, 80, callback)
        models.append(state(model))
    assert all(torch.equal(value, models[0][key]) for key, value in models[1].items())


def test_measuring_leaves_everything_as_it_was():
    model = make(norm="renorm")
    learn(model, 60)
    model.policy.set_training_mode(True)
    before = state(model)
    grads = {k: None if p.grad is None else p.grad.clone() for k, p in named(model)}
    flags = [module.training for module in model.policy.modules()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.policy.modules()]
    first = measure(model)
    assert measure(model) == first
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())
    for key, parameter in named(model):
        assert (parameter.grad is None) == (grads[key] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[key])
    assert [module.training for module in model.policy.modules()] == flags
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(
        np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True)
    )
    assert hooks == [
        len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.policy.modules()
    ]


@pytest.mark.parametrize("kind", [PPO, A2C])
def test_a_rollout_is_measured_in_training_and_after_it(kind):
    class Watched(MonitorCallback):
        def _look(self):
            looks.append(measure(self.model, 200))

    looks = []
    env = DummyVecEnv([Noise] * 4)
    model = make(kind, NormActorCriticPolicy, lambda: env, norm="batch")
    learn(model, 32 * 4, Watched(every=1))
    # The library has put steps and environments into one axis since.
    assert model.rollout_buffer.generator_ready
    obs = torch.as_tensor(model.rollout_buffer.observations)
    assert obs.shape == (32 * 4, 3)
    _, layers = measure(model, 200)
    assert set(layers) == set(looks[-1][1])
    layer = model.policy.mlp_extractor.policy_net[1]
    x = model.policy.mlp_extractor.policy_net[0](obs).detach()
    error = (layer.running_mean - x.mean(0)).abs() / (x.var(0, correction=0) + layer.eps).sqrt()
    found = layers["policy.mlp_extractor.policy_net.1"]["mean_error"]
    assert found == pytest.approx(float(error.mean()), rel=1e-4)


def test_a_rollout_of_images_is_measured_after_training():
    env = DummyVecEnv([lambda: FakeImageEnv(screen_height=40, screen_width=40, n_channels=1)] * 2)
    kwargs = {
        "features_extractor_class": NatureCNN,
        "features_extractor_kwargs": {"norm": "batch", "features_dim": 8},
    }
    settings = {"n_steps": 4, "batch_size": 4, "n_epochs": 1, "seed": 0, "device": "cpu"}
    model = PPO("CnnPolicy", env, policy_kwargs=kwargs, **settings)
    model.learn(8)
    figures, layers = measure(model)
    assert "policy.features_extractor.cnn.1" in layers
    assert figures["mean_error"] > 0


@pytest.mark.parametrize("agent", ["TD3", "DQN", "PPO"])
def test_a_model_without_observations_is_told_what_to_do(agent, tmp_path):
    kind, policy, env, norms = AGENTS[agent]
    model = make(kind, policy, env, **norms)
    learn(model, 64)
    model.save(tmp_path / "model.zip")
    loaded = kind.load(tmp_path / "model.zip", env=env(), device="cpu")
    what = "load_replay_buffer" if kind is not PPO else "rollout is not saved"
    with pytest.raises(
        BatchproofError, match=f"this {agent} holds no observations.*{what}"
    ) as told:
        measure(loaded)
    assert "\n" not in str(told.value)
    loaded.learn(64)
    measure(loaded)


def test_what_cannot_be_measured_at_all():
    recurrent = RecurrentPPO("MlpLstmPolicy", Noise(), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(BatchproofError, match="recurrent"):
        measure(recurrent)
    with pytest.raises(BatchproofError, match="keeps no observations"):
        measure(ARS("MlpPolicy", Noise(), device="cpu"))


def named(model):
    return list(model.policy.named_parameters())


def measured_batch(model, rows):
    """The rows that `measure` draws."""
    numpy_state = np.random.get_state()
    batch = model.replay_buffer.sample(rows)
    np.random.set_state(numpy_state)
    return batch


def test_statistic_errors_by_hand():
    model = make(norm="batch", norm_options={"eps": 1e-3})
    learn(model, 60)
    batch = measured_batch(model, 64)
    linear, layer = model.actor.mu[0], model.actor.mu[1]
    x = linear(batch.observations).detach()
    x = x.double()
    mean, sigma = x.mean(0), (x.var(0, correction=0) + 1e-3).sqrt()
    with torch.no_grad():
        # Three and a half deviations off in every feature, and four times the variance.
        layer.running_mean.copy_((mean + 3.5 * sigma).float())
        layer.running_var.copy_((4 * sigma**2 - 1e-3).float())
    _, layers = measure(model, 64)
    found = layers["actor.mu.1"]
    assert found["mean_error"] == pytest.approx(3.5, rel=1e-4)
    assert found["var_error"] == pytest.approx(np.log(4), rel=1e-4)
    assert set(layers) == {
        *(f"actor.mu.{i}" for i in (1, 4)),
        *(f"critic.qf{c}.{i}" for c in (0, 1) for i in (1, 4)),
    }


def test_the_worst_layer_is_reported():
    model = make(norm="batch")
    learn(model, 60)
    with torch.no_grad():
        model.critic.qf1[4].running_mean += 1000
    figures, layers = measure(model)
    assert figures["mean_error"] == layers["critic.qf1.4"]["mean_error"] > 100


def test_outlier_share_counts_rows():
    model = make(norm="batch")
    learn(model, 80)
    obs = model.replay_buffer.observations
    obs[: model.replay_buffer.pos] = np.random.default_rng(0).uniform(
        -1, 1, (model.replay_buffer.pos, 1, 3)
    )
    first = "actor.mu.1"  # its input is linear in the observations
    assert measure(model, 200)[1][first]["outlier_share"] == 0
    obs[7] = 1e3
    share = float((measured_batch(model, 200).observations.amax(1) > 100).float().mean())
    assert 0 < share < 0.2
    assert measure(model, 200)[1][first]["outlier_share"] == pytest.approx(share)


def test_action_gap_is_in_action_units():
    model = make(norm="batch")
    learn(model, 60)
    obs = measured_batch(model, 64).observations.numpy()
    evaled, _ = model.predict(obs, deterministic=True)
    with torch.no_grad():
        actor = model.actor
        saved = {k: v.clone() for k, v in actor.state_dict().items()}
        actor.train()
        trained = actor(torch.as_tensor(obs)).numpy() * 2  # the space is [-2, 2]
        actor.eval()
        actor.load_state_dict(saved)
    expected = np.abs(evaled - trained).max(1).mean()
    assert expected > 1e-3
    assert measure(model, 64)[0]["action_gap"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("kind", "policy"), [(TD3, NormTD3Policy), (SAC, NormSACPolicy)])
def test_kappa_tells_slot_3(kind, policy):
    model = make(kind, policy, norm="batch")
    learn(model, 80)
    assert measure(model)[0]["kappa"] < 1e-5  # as the library runs it
    for plan, blind in {"TETTE": True, "TEETE": False, "TESTE": False, "TEMTE": False}.items():
        set_modes(model, plan)
        kappa = measure(model)[0]["kappa"]
        assert (kappa < 1e-5) is blind, plan


def test_clip_fractions_by_hand():
    model = make(norm="renorm")
    learn(model, 60)
    layer = model.actor.mu[1]
    x = model.actor.mu[0](measured_batch(model, 64).observations).detach()
    with torch.no_grad():
        layer.running_mean.copy_(x.mean(0))
        layer.running_var.copy_(x.var(0, correction=0))
        layer.running_var[:2] *= 100  # r = 1/10, below 1/3
        layer.running_mean[2] += 6 * x.std(0)[2]  # d = -6, below -5
    found = measure(model, 64)[1]["actor.mu.1"]
    assert found["r_clipped"] == pytest.approx(2 / 8)
    assert found["d_clipped"] == pytest.approx(1 / 8)


def test_looks_every_so_many_steps_and_not_before_learning_starts():
    looks = []

    class Noted(MonitorCallback):
        def _look(self):
            looks.append(self.model.num_timesteps)
            super()._look()

    learn(make(norm="batch"), 120, Noted(every=30))
    assert looks == [41, 71, 101]


def test_a_forgotten_plan_is_told(tmp_path):
    model = make(norm="batch")
    set_modes(model, "TEETE")
    model.save(tmp_path / "model.zip")
    loaded = TD3.load(tmp_path / "model.zip", env=Noise(), device="cpu")
    with pytest.raises(BatchproofError, match="TEETE"):
        loaded.learn(10, callback=MonitorCallback())
    set_modes(loaded)
    loaded.learn(10, callback=MonitorCallback())


def test_mistakes_raise_one_line():
    with pytest.raises(BatchproofError, match="every"):
        MonitorCallback(every=0)
    with pytest.raises(BatchproofError, match="batch_size"):
        MonitorCallback(batch_size=1)
    recurrent = RecurrentPPO("MlpLstmPolicy", Noise(), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(BatchproofError, match="RecurrentPPO"):
        recurrent.learn(8, callback=MonitorCallback())


def test_the_page_runs(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "sb3.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["get_modes"](names["model"]) == "TEETE"
    assert names["figures"]["kappa"] > 1e-5
    keys = {f"batchproof/{key}" for key in EXPECTED["TD3"]}
    assert (
        set(re.findall(r"^\| `(batchproof/\w+)`", page.read_text(encoding="utf-8"), re.M)) == keys
    )


def test_torchs_own_batch_norm_is_watched_too():
    class Own(NormTD3Policy):
        def make_critic(self, features_extractor=None):
            critic = super().make_critic(features_extractor)
            for net in critic.q_networks:
                net.insert(1, nn.BatchNorm1d(8))
            return critic

    model = make(policy=Own)
    learn(model, 80)
    _, layers = measure(model)
    assert set(layers) == {"critic.qf0.1", "critic.qf1.1"}
