"""Our TD3 and SAC against Stable-Baselines3's own `train`, from equal weights on equal batches.

Without norm, with batch norm in the critics, and in actor and critics, in the modes that the
library's train and eval switches amount to: TD3 ``TETTE``, SAC ``TTTTE``.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import nn

from batchproof.lab.agents import sac, td3
from batchproof.lab.nets import MLP, Network
from batchproof.lab.norms import Norm
from batchproof.lab.passes import Batch
from batchproof.modes import Plan

O, A, B = 5, 2, 64  # noqa: E741
LEARNING_RATE = 1e-3
INITIAL_ALPHA = 0.3
UPDATES = 5
ACTOR_AND_CRITIC, CRITIC, NOWHERE = ("actor", "critic"), ("critic",), ()


# Stable-Baselines3 with batch norm before each ReLU


class Cast(FlattenExtractor):
    """Policies cast observations to float32; give them back in the networks' precision."""

    def forward(self, observations):
        return super().forward(observations).to(torch.get_default_dtype())


def with_batch_norm(layers):
    out = []
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            out.append(nn.BatchNorm1d(out[-1].out_features))
        out.append(layer)
    return nn.Sequential(*out)


class NormalizedNetworks:
    """Rebuilds the networks as they are made, so that optimizers and targets see the norms."""

    def __init__(self, *args, normalized=(), **kwargs):
        self.normalized = normalized
        super().__init__(*args, **kwargs)

    def make_actor(self, features_extractor=None):
        actor = super().make_actor(features_extractor)
        name = "mu" if isinstance(self, TD3Policy) else "latent_pi"
        if "actor" in self.normalized:
            setattr(actor, name, with_batch_norm(getattr(actor, name)))
        return actor

    def make_critic(self, features_extractor=None):
        critic = super().make_critic(features_extractor)
        if "critic" in self.normalized:
            critic.q_networks = [with_batch_norm(q) for q in critic.q_networks]
            for i, q in enumerate(critic.q_networks):
                setattr(critic, f"qf{i}", q)
        return critic


class NormalizedTD3Policy(NormalizedNetworks, TD3Policy):
    pass


class NormalizedSACPolicy(NormalizedNetworks, SACPolicy):
    pass


class Spaces(gymnasium.Env):
    """An environment for its spaces alone."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (O,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (A,), np.float32)


def make_model(algo, hidden, normalized):
    make, policy = {
        "td3": (TD3, NormalizedTD3Policy),
        "sac": (partial(SAC, ent_coef=f"auto_{INITIAL_ALPHA}"), NormalizedSACPolicy),
    }[algo]
    model = make(
        policy,
        Spaces(),
        learning_rate=LEARNING_RATE,
        buffer_size=1,
        policy_kwargs={
            "net_arch": list(hidden),
            "normalized": normalized,
            "features_extractor_class": Cast,
        },
        device="cpu",
    )
    model.set_logger(configure(None, []))
    return model


# One set of weights in both layouts


def torch_layers(model, name):
    """The torch layers with parameters of one network: a list of lists, one a critic."""
    network = getattr(model, name)
    if "critic" in name:
        stacks = [list(q) for q in network.q_networks]
    elif isinstance(model, TD3):
        stacks = [list(network.mu)]
    else:
        stacks = [[*network.latent_pi, (network.mu, network.log_std)]]
    return [[m for m in layers if not isinstance(m, nn.ReLU | nn.Tanh)] for layers in stacks]


def as_network(layers):
    """Our view of a stack of torch layers: parameters and statistics as NumPy arrays."""
    params, stats = {}, {}
    hidden = -1
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d):
            name = f"norm_pre_{hidden}"
            params[name] = {"scale": array(layer.weight), "bias": array(layer.bias)}
            stats[name] = {
                "mean": array(layer.running_mean),
                "var": array(layer.running_var),
                "count": array(layer.num_batches_tracked),
            }
            continue
        hidden += 1
        heads = layer if isinstance(layer, tuple) else (layer,)
        last = layer is layers[-1]
        params["linear_out" if last else f"linear_{hidden}"] = {
            "weight": np.concatenate([array(head.weight).T for head in heads], axis=1),
            "bias": np.concatenate([array(head.bias) for head in heads]),
        }
    return Network(params, stats)


def array(tensor):
    return tensor.detach().numpy().copy()


def read(model, name):
    """A network of a Stable-Baselines3 model in our layout; critics are stacked."""
    networks = [as_network(layers) for layers in torch_layers(model, name)]
    if "critic" not in name:
        return networks[0]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *networks)


def scatter(model, names, seed):
    """Random norms and statistics, and targets that lag: equality at the start is then no help."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name in names:
            network = getattr(model, name)
            for parameter in network.parameters():
                parameter += torch.tensor(rng.uniform(-0.05, 0.05, parameter.shape))
            for buffer_name, buffer in network.named_buffers():
                if "running_" in buffer_name:
                    buffer += torch.tensor(rng.uniform(0, 0.5, buffer.shape))


NETWORKS = {
    "td3": {
        "actor": "actor",
        "critic": "critic",
        "target_actor": "actor_target",
        "target_critic": "critic_target",
    },
    "sac": {"actor": "actor", "critic": "critic", "target_critic": "critic_target"},
}


# One problem in both


class Pair:
    """A Stable-Baselines3 model and our agent with equal weights, batches and noise."""

    def __init__(self, algo, normalized, hidden=(32, 32), plan=None, seed=0):
        self.algo, self.agent = algo, {"td3": td3, "sac": sac}[algo]
        torch.manual_seed(seed)
        self.model = make_model(algo, hidden, normalized)
        names = NETWORKS[algo]
        scatter(self.model, names.values(), seed)

        def mlp(network):
            return MLP(hidden, Norm("batch" if network in normalized else "none"))

        self.config = self.agent.Config(
            actor=mlp("actor"),
            critic=mlp("critic"),
            plan=Plan.parse(plan or f"sb3-{algo}"),
            learning_rate=LEARNING_RATE,
        )
        if algo == "sac":
            self.config = replace(self.config, initial_alpha=INITIAL_ALPHA)
        self.state = jax.tree.map(jnp.asarray, fresh_state(self.agent, self.config))._replace(
            **{ours: self.networks(theirs) for ours, theirs in names.items()}
        )
        self.rng = np.random.default_rng(seed)
        self.key = jax.random.key(seed)
        self.step = 0

    def networks(self, name):
        return jax.tree.map(jnp.asarray, read(self.model, name))

    def draw_batch(self):
        """Transitions of which a quarter ended; their numbers are exact in float32."""

        def draw(*shape):
            return self.rng.normal(size=shape).astype(np.float32).astype(dtype())

        return Batch(
            obs=draw(B, O),
            action=np.tanh(draw(B, A)),
            reward=draw(B),
            next_obs=draw(B, O),
            terminated=(self.rng.uniform(size=B) < 0.25).astype(dtype()),
        )

    def update(self):
        """One update of each. Returns our metrics and what Stable-Baselines3 logged."""
        self.step += 1
        batch = self.draw_batch()
        assert 0 < batch.terminated.sum() < B
        key = jax.random.fold_in(self.key, self.step)
        noise = self.agent.draw_noise(key, (B, A))
        self.state, metrics = compiled_update(self.algo, self.config)(
            self.state, jax.tree.map(jnp.asarray, batch), key, self.step
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
        with given_noise([noise] if self.algo == "td3" else [noise.action, noise.next_action]):
            model.train(gradient_steps=1, batch_size=B)
        return metrics, dict(model.logger.name_to_value)

    def differences(self):
        """(name, ours, theirs) of every parameter and statistic of every network."""
        for ours, theirs in NETWORKS[self.algo].items():
            ours_tree, theirs_tree = getattr(self.state, ours), read(self.model, theirs)
            assert jax.tree.structure(ours_tree) == jax.tree.structure(theirs_tree)
            leaves = jax.tree_util.tree_leaves_with_path(ours_tree)
            for (path, leaf), other in zip(leaves, jax.tree.leaves(theirs_tree), strict=True):
                yield ours + jax.tree_util.keystr(path), np.asarray(leaf), other


def fresh_state(agent, config):
    """A new agent, its weights left undrawn: zeros of the right shapes."""
    shapes = jax.eval_shape(lambda key: agent.init(config, key, O, A), jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if agent is sac:
        state = state._replace(log_alpha=jnp.log(jnp.asarray(config.initial_alpha)))
    return state


@cache
def compiled_update(algo, config):
    return jax.jit(partial({"td3": td3, "sac": sac}[algo].update, config))


def dtype():
    return np.float64 if torch.get_default_dtype() == torch.float64 else np.float32


@contextmanager
def given_noise(draws):
    """Make torch draw these standard normal numbers, in this order, and no others."""
    queue = [torch.tensor(np.asarray(draw)) for draw in draws]

    def normal_(self, mean=0, std=1):
        return self.copy_(mean + std * queue.pop(0))

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * queue.pop(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "normal_", normal_)
        patch.setattr(torch.distributions.Normal, "rsample", rsample)
        yield
    assert not queue


@pytest.fixture
def _compile_fast():
    """Nearly all the time goes into compiling. One test, without this, compiles as users do."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def _float64(_compile_fast):
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


def is_target_counter(name):
    return name.startswith("target_") and name.endswith("['count']")


def check_metrics(pair, metrics, logged, tolerance):
    expected = {"critic_loss": logged["train/critic_loss"]}
    if "train/actor_loss" in logged:
        expected["actor_loss"] = logged["train/actor_loss"]
    if pair.algo == "sac":
        expected["alpha"] = logged["train/ent_coef"]
        expected["log_alpha"] = pair.model.log_ent_coef.item()
        metrics = {**metrics, "log_alpha": pair.state.log_alpha}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, tolerance, tolerance, err_msg=name)


def check_networks(pair, tolerance):
    for name, ours, theirs in pair.differences():
        if not is_target_counter(name):
            np.testing.assert_allclose(ours, theirs, tolerance, tolerance, err_msg=name)


# The tests


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("normalized", "hidden"),
    [(NOWHERE, (32, 32)), (CRITIC, (32,)), (ACTOR_AND_CRITIC, (32, 32))],
    ids=["none", "critic", "both"],
)
@pytest.mark.parametrize("algo", ["td3", "sac"])
def test_five_updates_are_stable_baselines3s(algo, normalized, hidden):
    """After each of five: losses, temperature, parameters and statistics of all networks."""
    pair = Pair(algo, normalized, hidden)
    before = jax.tree.map(np.asarray, pair.state)
    for step in range(1, UPDATES + 1):
        metrics, logged = pair.update()
        updates_actor = algo == "sac" or step % 2 == 0
        assert ("train/actor_loss" in logged) == updates_actor
        assert np.isfinite(metrics["actor_loss"]) == updates_actor
        check_metrics(pair, metrics, logged, 1e-9)
        check_networks(pair, 1e-9)
        if step == 1:
            first = jax.tree.map(np.asarray, pair.state)
    # The comparison is about something: the networks moved, TD3's actor and targets from step 2.
    moved = {
        name: not np.array_equal(
            getattr(before, name).params["linear_0"]["weight"],
            getattr(first, name).params["linear_0"]["weight"],
        )
        for name in NETWORKS[algo]
    }
    assert moved == {name: algo == "sac" or name == "critic" for name in moved}


@pytest.mark.usefixtures("_compile_fast")
@pytest.mark.parametrize("algo", ["td3", "sac"])
def test_float32_updates_are_stable_baselines3s(algo):
    """Without norm, in the precision that both run in and at 64x64: within 1e-5.

    Adam divides by a gradient's size, so where that is of the order of rounding, the step is
    rounding scaled up to the learning rate: that happens to one weight in hundreds.
    """
    pair = Pair(algo, NOWHERE, hidden=(64, 64), seed=1)
    for step in range(1, UPDATES + 1):
        metrics, logged = pair.update()
        check_metrics(pair, metrics, logged, 1e-5)
        for name, ours, theirs in pair.differences():
            assert np.isclose(ours, theirs, 1e-5, 1e-5).mean() > 0.99, name
            assert np.abs(ours - theirs).max() <= LEARNING_RATE * step / 10, name


@pytest.mark.parametrize("algo", ["td3", "sac"])
def test_a_float32_update_with_batch_norm_is_stable_baselines3s(algo):
    """The same with batch norm in both networks, after the first update.

    Batch norm in T subtracts the bias of the layer before it, so that bias has gradient 0 plus
    rounding, which Adam scales up: two implementations agree on it only to the learning rate, and
    on a running mean that a later pass moved to a tenth of that.
    """
    pair = Pair(algo, ACTOR_AND_CRITIC, hidden=(64, 64), seed=1)
    check_metrics(pair, *pair.update(), 1e-5)
    for name, ours, theirs in pair.differences():
        if is_target_counter(name):
            continue
        noise = 0.0
        if "linear_" in name and "out" not in name and name.endswith("['bias']"):
            noise = 2 * LEARNING_RATE
        elif name.endswith("['mean']"):
            noise = 0.1 * 2 * LEARNING_RATE
        np.testing.assert_allclose(ours, theirs, 1e-5, 1e-5 + noise, err_msg=name)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("algo", ["td3", "sac"])
def test_counters_of_targets(algo):
    """The library copies its targets' statistics without their counters; we copy both.

    A batch norm of fixed momentum never reads its counter. Batch Renorm's warm-up does.
    """
    pair = Pair(algo, ACTOR_AND_CRITIC)
    for _ in range(2):
        pair.update()
    for name, ours, theirs in pair.differences():
        if is_target_counter(name):
            online = getattr(pair.state, name.split(".")[0].removeprefix("target_"))
            layer = name.split("'")[1]
            np.testing.assert_array_equal(ours, online.stats[layer]["count"])
            np.testing.assert_array_equal(theirs, np.zeros_like(theirs))


@pytest.mark.usefixtures("_float64")
def test_how_often_each_networks_statistics_move():
    """Two updates: TD3's first critic 2 + 1 times, the second 2, the actor once.

    In SAC, that runs both critics in both losses, each 4 times, and the actor on s and s' 4 times.
    """
    counts = {}
    for algo in ("td3", "sac"):
        pair = Pair(algo, ACTOR_AND_CRITIC)
        for _ in range(2):
            pair.update()
        for name in ("actor", "critic"):
            ours = getattr(pair.state, name).stats["norm_pre_1"]["count"]
            theirs = read(pair.model, name).stats["norm_pre_1"]["count"]
            np.testing.assert_array_equal(ours, theirs)
            counts[algo, name] = ours.tolist()
    assert counts == {
        ("td3", "actor"): 1,
        ("td3", "critic"): [3, 2],
        ("sac", "actor"): 4,
        ("sac", "critic"): [4, 4],
    }


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("algo", "wrong"),
    [
        ("td3", "EETTE"),
        ("td3", "TTTTE"),
        ("td3", "TEETE"),
        ("td3", "TETEE"),
        ("td3", "TETTT"),
        ("sac", "TETTE"),
    ],
)
def test_any_other_plan_is_not_stable_baselines3s(algo, wrong):
    """One letter apart, the same comparison fails, so it can tell each slot's mode."""
    pair = Pair(algo, ACTOR_AND_CRITIC, hidden=(16,), plan=wrong)
    for _ in range(2):
        pair.update()
    gaps = [np.abs(ours - theirs).max() for _, ours, theirs in pair.differences()]
    assert max(gaps) > 1e-3


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("algo", ["td3", "sac"])
def test_acting_is_stable_baselines3s_predict(algo):
    """Slot 0 in E: one observation, deterministic, by the running statistics."""
    pair = Pair(algo, ACTOR_AND_CRITIC)
    obs = pair.draw_batch().obs[:4]
    theirs, _ = pair.model.predict(obs.astype(np.float32), deterministic=True)
    for row, action in zip(obs, theirs, strict=True):
        ours, state = pair.agent.act(
            pair.config, pair.state, jnp.asarray(row), pair.key, explore=False
        )
        np.testing.assert_allclose(ours, action, rtol=1e-6, atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, state.actor.stats, pair.state.actor.stats)
