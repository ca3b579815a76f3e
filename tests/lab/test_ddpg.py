"""DDPG: each update is Stable-Baselines3's, its noise, its start and the paper's settings."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from stable_baselines3 import DDPG
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from batchproof.errors import BatchproofError
from batchproof.lab.agents import AGENTS, ddpg
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.modes import Plan, Slot

_path = Path(__file__).with_name("test_sb3_parity.py")
_spec = importlib.util.spec_from_file_location("sb3_parity", _path)
assert _spec is not None
assert _spec.loader is not None
parity = importlib.util.module_from_spec(_spec)
sys.modules["sb3_parity"] = parity
_spec.loader.exec_module(parity)

_compile_fast, _float64 = parity._compile_fast, parity._float64

O, A, B = parity.O, parity.A, parity.B  # noqa: E741
NOWHERE, CRITIC, BOTH = (), ("critic",), ("actor", "critic")
ACTOR_RATE, CRITIC_RATE, WEIGHT_DECAY = 1e-4, 1e-3, 1e-2
UPDATES = 5
KEY = jax.random.key(0)


class Pair(parity.Pair):
    """Stable-Baselines3's DDPG and ours, with equal weights and batches, and unequal rates.

    The library gives both networks one learning rate; its optimizers are torch's Adam, to which
    rates and weight decay are given directly.
    """

    def __init__(self, normalized, hidden=(32, 32), plan="sb3-td3", seed=0, decay=WEIGHT_DECAY):
        self.algo, self.agent = "td3", ddpg  # its networks have the names of TD3's
        torch.manual_seed(seed)
        self.model = DDPG(
            parity.NormalizedTD3Policy,
            parity.Spaces(),
            buffer_size=1,
            policy_kwargs={
                "net_arch": list(hidden),
                "normalized": normalized,
                "features_extractor_class": parity.Cast,
            },
            device="cpu",
        )
        self.model.set_logger(configure(None, []))
        self.model._update_learning_rate = lambda optimizers: None
        self.model.actor.optimizer.param_groups[0]["lr"] = ACTOR_RATE
        self.model.critic.optimizer.param_groups[0]["lr"] = CRITIC_RATE
        self.model.critic.optimizer.param_groups[0]["weight_decay"] = decay
        names = parity.NETWORKS["td3"]
        parity.scatter(self.model, names.values(), seed)

        def mlp(network):
            return MLP(hidden, Norm("batch" if network in normalized else "none"))

        self.config = ddpg.Config(
            actor=mlp("actor"),
            critic=mlp("critic"),
            plan=Plan.parse(plan),
            learning_rate=ACTOR_RATE,
            critic_learning_rate=CRITIC_RATE,
            critic_weight_decay=decay,
        )
        self.state = parity.fresh_state(ddpg, self.config)._replace(
            **{ours: self.networks(theirs) for ours, theirs in names.items()}
        )
        self.rng = np.random.default_rng(seed)

    def update(self):
        batch = self.draw_batch()
        assert 0 < batch.terminated.sum() < B
        self.state, metrics = compiled_update(self.config)(
            self.state, jax.tree.map(jnp.asarray, batch), KEY, 1
        )
        samples = ReplayBufferSamples(
            observations=torch.tensor(batch.obs),
            actions=torch.tensor(batch.action),
            next_observations=torch.tensor(batch.next_obs),
            dones=torch.tensor(batch.terminated)[:, None],
            rewards=torch.tensor(batch.reward)[:, None],
        )
        model = self.model
        model.replay_buffer.sample = lambda *args, **kwargs: samples
        model.logger.name_to_value.clear()
        model.train(gradient_steps=1, batch_size=B)
        return metrics, dict(model.logger.name_to_value)


@cache
def compiled_update(config):
    return jax.jit(partial(ddpg.update, config))


# --- updates --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("normalized", "hidden"),
    [(NOWHERE, (32, 32)), (CRITIC, (32,)), (BOTH, (32, 32))],
    ids=["none", "critic", "both"],
)
def test_five_updates_are_stable_baselines3s(normalized, hidden):
    """After each of five: losses, and parameters and statistics of all four networks."""
    pair = Pair(normalized, hidden)
    before = jax.tree.map(np.asarray, pair.state)
    for _ in range(UPDATES):
        metrics, logged = pair.update()
        parity.check_metrics(pair, metrics, logged, 1e-9)
        parity.check_networks(pair, 1e-9)
    for name in parity.NETWORKS["td3"]:  # the comparison is about something: all four moved
        old = getattr(before, name).params["linear_0"]["weight"]
        assert np.abs(old - getattr(pair.state, name).params["linear_0"]["weight"]).max() > 1e-6


def test_float32_updates_are_stable_baselines3s():
    """Within 1e-5, but for the odd weight whose gradient is rounding: Adam scales that up."""
    pair = Pair(NOWHERE, hidden=(64, 64), seed=1, decay=0.0)
    for step in range(1, UPDATES + 1):
        metrics, logged = pair.update()
        parity.check_metrics(pair, metrics, logged, 1e-5)
        for name, ours, theirs in pair.differences():
            assert np.isclose(ours, theirs, 1e-5, 1e-5).mean() > 0.99, name
            assert np.abs(ours - theirs).max() <= CRITIC_RATE * step / 10, name


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("wrong", ["TTTTE", "TEETE", "TETTT"])
def test_any_other_plan_is_not_stable_baselines3s(wrong):
    """One letter apart, the same comparison fails: after two updates, for slot 2's sake."""
    pair = Pair(BOTH, hidden=(16,), plan=wrong)
    for _ in range(2):
        pair.update()
    assert max(np.abs(ours - theirs).max() for _, ours, theirs in pair.differences()) > 1e-4


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("change", ["rates", "decay"])
def test_other_rates_and_decays_are_not_the_same_update(change):
    pair = Pair(NOWHERE, hidden=(16,))
    changes = {
        "rates": {"critic_learning_rate": None},
        "decay": {"critic_weight_decay": 0.0},
    }[change]
    pair.config = replace(pair.config, **changes)
    pair.update()
    assert max(np.abs(ours - theirs).max() for _, ours, theirs in pair.differences()) > 1e-5


@pytest.mark.usefixtures("_float64")
def test_acting_is_stable_baselines3s_predict():
    pair = Pair(BOTH)
    obs = pair.draw_batch().obs[:4]
    theirs, _ = pair.model.predict(obs.astype(np.float32), deterministic=True)
    for row, action in zip(obs, theirs, strict=True):
        ours, state = ddpg.act(pair.config, pair.state, jnp.asarray(row), KEY, explore=False)
        np.testing.assert_allclose(ours, action, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(state.noise, np.zeros(A))


# --- noise ----------------------------------------------------------------------------------------


def test_the_ou_process_is_stable_baselines3s(monkeypatch):
    """The same normal draws give the same 200 values; ours moves within the state of `act`."""
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(200, A))
    queue = list(normals)
    monkeypatch.setattr(np.random, "normal", lambda size: queue.pop(0))
    theirs = OrnsteinUhlenbeckActionNoise(np.zeros(A), 0.2 * np.ones(A), theta=0.15, dt=0.05)
    config = ddpg.Config(noise="ou", exploration_noise=0.2, ou_dt=0.05)
    noise = jnp.zeros(A)
    for normal in normals:
        noise = ddpg.next_noise(config, noise, jnp.asarray(normal))
        np.testing.assert_allclose(noise, theirs(), atol=1e-6)


@pytest.mark.usefixtures("_compile_fast")
def test_exploring_moves_the_process_and_evaluating_does_not():
    """Its long-run spread is the process's: sigma^2 / (2 theta - theta^2) at dt 1."""
    mlp = MLP((4,))
    config = ddpg.Config(actor=mlp, critic=mlp, noise="ou", exploration_noise=0.2)
    state = ddpg.init(config, KEY, O, A)
    obs = jnp.ones(O)
    quiet, after = ddpg.act(config, state, obs, KEY, explore=False)
    np.testing.assert_array_equal(after.noise, np.zeros(A))

    def body(state, key):
        action, state = ddpg.act(config, state, obs, key, explore=True)
        return state, (action, state.noise)

    _, (actions, noise) = jax.lax.scan(body, state, jax.random.split(KEY, 20_000))
    np.testing.assert_allclose(actions, np.clip(quiet + noise, -1, 1), atol=1e-6)
    np.testing.assert_allclose(np.std(noise), 0.2 / (2 * 0.15 - 0.15**2) ** 0.5, rtol=0.05)
    lagged = np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]
    np.testing.assert_allclose(lagged, 1 - 0.15, atol=0.02)


def test_gaussian_noise_is_independent_and_leaves_no_trace():
    config = ddpg.Config(exploration_noise=0.3)
    normal = jnp.asarray([1.0, -2.0])
    far = jnp.asarray([9.0, 9.0])
    np.testing.assert_allclose(ddpg.next_noise(config, far, normal), [0.3, -0.6], rtol=1e-6)


# --- start and settings ---------------------------------------------------------------------------


@pytest.mark.usefixtures("_compile_fast")
def test_the_output_layers_start_within_their_bound():
    """Uniform there, by a Kolmogorov-Smirnov test; the other layers stay PyTorch's."""
    plain = ddpg.Config()
    bounded = replace(plain, output_bound=3e-3)
    plain, bounded = (
        jax.jit(partial(ddpg.init, config), static_argnums=(1, 2))(KEY, O, A)
        for config in (plain, bounded)
    )
    for name in ("actor", "critic"):
        one, two = getattr(plain, name).params, getattr(bounded, name).params
        np.testing.assert_array_equal(one["linear_0"]["weight"], two["linear_0"]["weight"])
        weights = np.ravel(two["linear_out"]["weight"])
        assert np.abs(weights).max() <= 3e-3 * (1 + 1e-6)
        assert stats.kstest(weights, stats.uniform(-3e-3, 6e-3).cdf).pvalue > 0.01
    target = bounded.target_actor.params["linear_out"]["weight"]
    np.testing.assert_array_equal(target, bounded.actor.params["linear_out"]["weight"])


@pytest.mark.usefixtures("_compile_fast")
def test_the_bound_is_of_a_linear_network_too():
    config = ddpg.Config(actor=MLP(()), output_bound=3e-3)
    weights = np.ravel(ddpg.init(config, KEY, O, A).actor.params["linear_out"]["weight"])
    assert 1e-3 < np.abs(weights).max() <= 3e-3 * (1 + 1e-6)


def test_the_paper_s_preset_normalizes_what_the_paper_does():
    """The actor's input and hidden layers; of the critic, its input and first layer alone."""
    paper = ddpg.PRESETS["paper"]
    state = jax.eval_shape(lambda key: ddpg.init(paper, key, O, A), KEY)
    assert set(state.actor.stats) == {"norm_input", "norm_pre_0", "norm_pre_1"}
    assert set(state.critic.stats) == {"norm_input", "norm_pre_0"}
    shapes = {k: v["weight"].shape for k, v in state.critic.params.items() if "linear" in k}
    assert shapes["linear_0"] == (1, O, 400)
    assert shapes["linear_1"] == (1, 400 + A, 300)
    assert str(paper.plan) == "TTTTT"
    assert str(paper.plan[Slot.ACT]) == "E"


@pytest.mark.usefixtures("_compile_fast")
def test_without_target_networks_the_actor_s_statistics_move_in_slot_2_too():
    mlp = MLP((4,), Norm("batch"))
    config = ddpg.Config(
        actor=mlp, critic=mlp, target_network=False, plan=Plan.parse("TTEJJ"), batch_size=B
    )
    state = parity.fresh_state(ddpg, config)
    assert state.target_actor is state.target_critic is None
    rng = np.random.default_rng(0)
    batch = parity.Batch(
        *(jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(B, O), (B, A), B, (B, O)]),
        terminated=jnp.zeros(B),
    )
    state, metrics = compiled_update(config)(state, batch, KEY, 1)
    assert np.isfinite(metrics["critic_loss"])
    assert int(state.actor.stats["norm_pre_0"]["count"]) == 2
    assert int(state.critic.stats["norm_pre_0"]["count"][0]) == 1


def test_the_table_of_agents_has_it():
    assert AGENTS["ddpg"] is ddpg


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"noise": "uniform"}, "unknown noise 'uniform'"),
        ({"critic_learning_rate": 0.0}, "critic_learning_rate must be positive"),
        ({"critic_weight_decay": -1.0}, "critic_weight_decay must not be negative"),
        ({"exploration_noise": -0.1}, "exploration_noise"),
        ({"ou_dt": 0.0}, "ou_dt"),
        ({"output_bound": float("inf")}, "output_bound"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"tau": 2.0}, "tau"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_that_make_no_sense_raise(changes, part):
    with pytest.raises(BatchproofError, match=part):
        ddpg.Config(**changes)
