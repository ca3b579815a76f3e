"""Our CrossQ against sb3-contrib's own `train`, from equal weights on equal batches; options."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sb3_contrib import CrossQ
from sb3_contrib.common.torch_layers import BatchRenorm
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from batchproof.errors import BatchproofError
from batchproof.lab import nets
from batchproof.lab.agents import crossq
from batchproof.lab.nets import MLP, Network
from batchproof.lab.norms import Norm
from batchproof.lab.off_policy import Stepper
from batchproof.lab.passes import Batch
from batchproof.lab.training import Training
from batchproof.modes import Plan

O, A, B = 5, 2, 64  # noqa: E741
ACTOR, CRITIC = (16, 16), (24, 24)
LEARNING_RATE = 1e-3
INITIAL_ALPHA = 0.3
UPDATES = 7  # of which two move the actor


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
    # Nearly all the time goes into compiling.
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


def dtype():
    return np.float64 if torch.get_default_dtype() == torch.float64 else np.float32


class Cast(FlattenExtractor):
    """Policies cast observations to float32; give them back in the networks' precision."""

    def forward(self, observations):
        return super().forward(observations).to(torch.get_default_dtype())


class Spaces(gymnasium.Env):
    """An environment for its spaces alone."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (O,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (A,), np.float32)


def make_model(warmup_steps):
    model = CrossQ(
        "MlpPolicy",
        Spaces(),
        learning_rate=LEARNING_RATE,
        ent_coef=f"auto_{INITIAL_ALPHA}",
        buffer_size=1,
        policy_kwargs={
            "net_arch": {"pi": list(ACTOR), "qf": list(CRITIC)},
            "renorm_warmup_steps": warmup_steps,
            "features_extractor_class": Cast,
        },
        device="cpu",
    )
    # Their norms are made in float32 whatever torch's default.
    model.policy.to(torch.get_default_dtype())
    model.set_logger(configure(None, []))
    return model


# One set of weights in both layouts


def array(tensor):
    return tensor.detach().numpy().copy()


def as_network(layers):
    """Our view of their layers: [norm, linear, ReLU] for each hidden layer, norm, heads."""
    params, stats = {}, {}
    norms = ["norm_input", *(f"norm_post_{i}" for i in range(len(layers)))]
    linears = iter(range(len(layers)))
    for layer in layers:
        if isinstance(layer, BatchRenorm):
            name = norms.pop(0)
            params[name] = {"scale": array(layer.scale), "bias": array(layer.bias)}
            mean, var = array(layer.ra_mean), array(layer.ra_var)
            stats[name] = {"mean": mean, "var": var, "count": array(layer.steps)}
            continue
        heads = layer if isinstance(layer, tuple) else (layer,)
        name = "linear_out" if layer is layers[-1] else f"linear_{next(linears)}"
        params[name] = {
            "weight": np.concatenate([array(head.weight).T for head in heads], axis=1),
            "bias": np.concatenate([array(head.bias) for head in heads]),
        }
    return Network(params, stats)


def read(model, name):
    """A network of an sb3-contrib model in our layout; critics are stacked."""
    if name == "actor":
        actor = model.actor
        layers = [m for m in actor.latent_pi if not isinstance(m, nn.ReLU)]
        return as_network([*layers, (actor.mu, actor.log_std)])
    critics = [[m for m in q if not isinstance(m, nn.ReLU)] for q in model.critic.q_networks]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(as_network, critics))


def scatter(model, seed):
    """Random norms and statistics: equality at the start is then no help.

    And narrow policies: near |a| = 1 the log density in float32 is mostly rounding.
    """
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        model.actor.log_std.bias -= 2
        for network in (model.actor, model.critic):
            for parameter in network.parameters():
                parameter += torch.tensor(rng.uniform(-0.05, 0.05, parameter.shape))
            for name, buffer in network.named_buffers():
                if name.endswith(("ra_mean", "ra_var")):
                    buffer += torch.tensor(rng.uniform(0, 0.5, buffer.shape))


@contextmanager
def given_noise(draws):
    """Make torch draw these standard normal numbers, in this order, and no others."""
    queue = [torch.tensor(np.asarray(draw)) for draw in draws]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.distributions.Normal,
            "rsample",
            lambda self, sample_shape=(): self.loc + self.scale * queue.pop(0),
        )
        yield
    assert not queue


@cache
def compiled_update(config, x64):
    return jax.jit(partial(crossq.update, config))


def contrib_norm(warmup_steps):
    """What sb3-contrib computes; it waits one step longer than its number says."""
    norm = crossq.PRESETS["sb3-contrib"].critic.norm
    return replace(norm, warmup_steps=warmup_steps + 1)


class Pair:
    """An sb3-contrib model and our agent with equal weights, batches and noise."""

    def __init__(self, plan="crossq", warmup_steps=3, seed=0):
        torch.manual_seed(seed)
        self.model = make_model(warmup_steps)
        scatter(self.model, seed)
        norm = contrib_norm(warmup_steps)
        self.config = crossq.Config(
            actor=MLP(ACTOR, norm),
            critic=MLP(CRITIC, norm),
            plan=Plan.parse(plan),
            learning_rate=LEARNING_RATE,
            initial_alpha=INITIAL_ALPHA,
        )
        self.state = fresh_state(self.config)._replace(
            actor=jax.tree.map(jnp.asarray, read(self.model, "actor")),
            critic=jax.tree.map(jnp.asarray, read(self.model, "critic")),
        )
        self.rng = np.random.default_rng(seed)
        self.key = jax.random.key(seed)
        self.step = 0

    def update(self):
        """One update of each. Returns our metrics and what sb3-contrib logged."""
        self.step += 1
        batch = draw_batch(self.rng)
        key = jax.random.fold_in(self.key, self.step)
        noise = crossq.draw_noise(key, (B, A))
        update = compiled_update(self.config, jax.config.jax_enable_x64)
        self.state, metrics = update(self.state, jax.tree.map(jnp.asarray, batch), key, self.step)
        samples = ReplayBufferSamples(
            observations=torch.tensor(batch.obs),
            actions=torch.tensor(batch.action),
            next_observations=torch.tensor(batch.next_obs),
            dones=torch.tensor(batch.terminated)[:, None],
            rewards=torch.tensor(batch.reward)[:, None],
        )
        self.model.replay_buffer.sample = lambda *args, **kwargs: samples
        self.model.logger.name_to_value.clear()
        draws = [noise.next_action] + [noise.action] * (self.step % 3 == 0)
        with given_noise(draws):
            self.model.train(gradient_steps=1, batch_size=B)
        return metrics, dict(self.model.logger.name_to_value)

    def differences(self):
        """(name, ours, theirs) of every parameter and statistic, and of the temperature."""
        for name in ("actor", "critic"):
            ours, theirs = getattr(self.state, name), read(self.model, name)
            assert jax.tree.structure(ours) == jax.tree.structure(theirs)
            leaves = jax.tree_util.tree_leaves_with_path(ours)
            for (path, leaf), other in zip(leaves, jax.tree.leaves(theirs), strict=True):
                yield name + jax.tree_util.keystr(path), np.asarray(leaf), other
        yield "log_alpha", np.asarray(self.state.log_alpha), array(self.model.log_ent_coef)[0]


def fresh_state(config):
    """A new agent, its weights left undrawn: zeros of the right shapes."""
    shapes = jax.eval_shape(lambda key: crossq.init(config, key, O, A), jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return state._replace(log_alpha=jnp.log(jnp.asarray(config.initial_alpha)))


def draw_batch(rng):
    """Transitions of which a quarter ended; their numbers are exact in float32."""

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32).astype(dtype())

    return Batch(
        obs=draw(B, O),
        action=np.tanh(draw(B, A)),
        reward=draw(B),
        next_obs=2 * draw(B, O),
        terminated=(rng.uniform(size=B) < 0.25).astype(dtype()),
    )


def check_metrics(pair, metrics, logged, tolerance):
    expected = {"critic_loss": logged["train/critic_loss"], "alpha": logged["train/ent_coef"]}
    if pair.step % 3 == 0:
        expected["actor_loss"] = logged["train/actor_loss"]
    else:
        assert np.isnan(metrics["actor_loss"])
        assert np.isnan(metrics["entropy"])
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, tolerance, tolerance, err_msg=name)


@pytest.mark.usefixtures("_float64")
def test_updates_are_sb3_contribs():
    """In float64 to 1e-9 over seven updates, Batch Renorm's warm-up ending in the fourth."""
    pair = Pair()
    for _ in range(UPDATES):
        check_metrics(pair, *pair.update(), 1e-9)
        for name, ours, theirs in pair.differences():
            np.testing.assert_allclose(ours, theirs, 1e-9, 1e-9, err_msg=name)
    # Statistics move once per critic update (the joint pass), and with each actor update.
    for name, count in (("critic", UPDATES), ("actor", 2)):
        stats = getattr(pair.state, name).stats
        assert {int(n) for s in stats.values() for n in np.ravel(s["count"])} == {count}


@pytest.mark.usefixtures("_float64")
def test_another_end_of_the_warm_up_shows():
    """One step later, and the comparison fails."""
    pair = Pair()
    norm = contrib_norm(4)
    pair.config = replace(
        pair.config,
        actor=replace(pair.config.actor, norm=norm),
        critic=replace(pair.config.critic, norm=norm),
    )
    for _ in range(5):
        pair.update()
    assert max(np.abs(ours - theirs).max() for _, ours, theirs in pair.differences()) > 1e-4


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("wrong", ["TTEJJ", "TETJJ", "TEETT"])
def test_any_other_plan_is_not_sb3_contribs(wrong):
    """One letter apart, the same comparison fails, so it can tell each slot's mode."""
    pair = Pair(plan=wrong)
    for _ in range(3):
        pair.update()
    assert max(np.abs(ours - theirs).max() for _, ours, theirs in pair.differences()) > 1e-3


def test_float32_updates_are_sb3_contribs():
    """In the precision that both run in: losses to 1e-5, nearly all weights to 1e-5.

    Adam divides by a gradient's size, so where that is of the order of rounding, the step is
    rounding scaled up to the learning rate: that happens to few weights.
    """
    pair = Pair()
    for step in range(1, 4):
        check_metrics(pair, *pair.update(), 1e-5)
        for name, ours, theirs in pair.differences():
            assert np.isclose(ours, theirs, 1e-5, 1e-5).mean() > 0.98, name
            assert np.abs(ours - theirs).max() <= 2 * LEARNING_RATE * step, name


@pytest.mark.usefixtures("_float64")
def test_acting_is_sb3_contribs_predict():
    pair = Pair()
    pair.update()
    obs = draw_batch(pair.rng).obs[:4]
    theirs, _ = pair.model.predict(obs.astype(np.float32), deterministic=True)
    for row, action in zip(obs, theirs, strict=True):
        ours, state = crossq.act(pair.config, pair.state, jnp.asarray(row), pair.key, explore=False)
        np.testing.assert_allclose(ours, action, rtol=1e-6, atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, state.actor.stats, pair.state.actor.stats)


# Options


def test_presets_hold_the_papers_numbers():
    """Of arXiv 1902.05605, of sb3-contrib, and of arXiv 2502.07523."""
    paper, contrib, wn = (crossq.PRESETS[name] for name in ("crossq", "sb3-contrib", "wn"))
    for config in (paper, contrib):
        assert str(config.plan) == "TEEJJ"
        assert (config.learning_rate, config.adam_b1, config.policy_delay) == (1e-3, 0.5, 3)
        assert not config.target_network
        assert config.actor.hidden == (256, 256)
        for mlp in (config.actor, config.critic):
            norm = mlp.norm
            assert (norm.kind, norm.placement, norm.momentum, norm.eps) == (
                "renorm",
                "input+post",
                0.01,
                1e-3,
            )
    assert paper.critic.hidden == (2048, 2048)
    model = CrossQ("MlpPolicy", Spaces(), buffer_size=1, device="cpu")
    assert list(contrib.critic.hidden) == model.policy.net_arch["qf"]
    assert list(contrib.actor.hidden) == model.policy.net_arch["pi"]
    assert contrib.policy_delay == model.policy_delay
    assert contrib.entropy_per_dimension * A == model.target_entropy
    group = model.critic.optimizer.param_groups[0]
    assert (group["lr"], group["betas"][0]) == (contrib.learning_rate, contrib.adam_b1)
    assert model.ent_coef_optimizer.param_groups[0]["betas"][0] == 0.9
    assert wn.critic.hidden == (512, 512)
    assert (wn.target_network, wn.initial_alpha, wn.entropy_per_dimension) == (True, 0.01, -0.5)


def test_the_rate_falls_in_a_straight_line():
    config = crossq.Config(learning_rate=3e-4, learning_rate_end=3e-5, schedule_steps=10)
    rates = [float(crossq.learning_rate(config, step)) for step in (1, 6, 11, 99)]
    np.testing.assert_allclose(rates, [3e-4, 1.65e-4, 3e-5, 3e-5], rtol=1e-5)
    assert crossq.learning_rate(crossq.Config(), 99) == 1e-3


def test_weights_decay_on_norms_and_output_layers_only():
    config = crossq.Config(weight_decay=0.1, learning_rate=0.5)
    params = {
        name: {"weight": jnp.full(3, 2.0)}
        for name in ("norm_input", "linear_0", "norm_post_0", "linear_out")
    }
    optimizer = crossq.network_optimizer(config, 1)
    zero = jax.tree.map(jnp.zeros_like, params)
    deltas, _ = optimizer.update(zero, optimizer.init(params), params)
    for name, layer in deltas.items():
        np.testing.assert_allclose(layer["weight"], 0 if name == "linear_0" else -0.1, err_msg=name)


def unit_norms(layer):
    square = (np.asarray(layer["weight"], float) ** 2).sum(-2)
    return np.sqrt(square + np.asarray(layer["bias"], float) ** 2)


@pytest.fixture(scope="module")
def weight_norm():
    """CrossQ+WN at a small size: its state at the start, and its compiled update."""
    wn = crossq.PRESETS["wn"]
    config = replace(
        wn, actor=replace(wn.actor, hidden=(8, 8)), critic=replace(wn.critic, hidden=(8, 8))
    )
    rng = np.random.default_rng(1)
    state = jax.tree.map(jnp.asarray, fresh_state(config))

    def draw(network, mlp):
        params = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), network.params
        )
        stats = {
            name: layer | {"var": jnp.ones_like(layer["var"])}
            for name, layer in network.stats.items()
        }
        return Network(nets.project(mlp, params), stats)

    critic = draw(state.critic, config.critic)
    state = state._replace(
        actor=draw(state.actor, config.actor), critic=critic, target_critic=critic
    )
    return state, jax.jit(partial(crossq.update, config))


def test_crossq_with_weight_norm(weight_norm):
    """After three updates every hidden unit's weights have length 1, and the target lags."""
    first, update = weight_norm
    rng, state = np.random.default_rng(0), first
    for step in range(1, 4):
        state, _ = update(state, draw_batch(rng), jax.random.key(step), step)
    for network in (state.actor, state.critic):
        for name in ("linear_0", "linear_1"):
            np.testing.assert_allclose(unit_norms(network.params[name]), 1, rtol=3e-7)
        assert np.abs(unit_norms(network.params["linear_out"]) - 1).max() > 0.1
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, state)
    assert moved.actor.params["linear_0"]["weight"] > 1e-5
    online = moved.critic.params["linear_0"]["weight"]
    assert 0 < moved.target_critic.params["linear_0"]["weight"] < 0.05 * online


def test_target_critics_see_the_joint_batch(weight_norm):
    """With a target network slot 5 runs it on the mixture too: another (s, a) moves y."""
    state, update = weight_norm
    batch = draw_batch(np.random.default_rng(0))
    other = batch._replace(obs=batch.obs * np.linspace(0.1, 3, B, dtype=np.float32)[:, None])
    targets = [update(state, b, jax.random.key(1), 1)[1]["td_target"] for b in (batch, other)]
    assert abs(targets[0] - targets[1]) > 1e-3


@pytest.mark.parametrize("half", [{"learning_rate_end": 1e-5}, {"schedule_steps": 10}])
def test_half_a_schedule_says_what_to_write(half):
    with pytest.raises(BatchproofError, match="learning_rate_end and schedule_steps belong"):
        crossq.Config(**half)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(BatchproofError, match="initial_alpha must be positive"):
        crossq.Config(initial_alpha=0)


def test_it_learns_constant_reward():
    """Sixteen seeds, 1000 steps of a task whose best return is 30; single seeds scatter by 10."""
    norm = Norm("batch", "pre", momentum=0.01, eps=1e-3)
    run = Stepper(
        Training(
            algo="crossq",
            config=crossq.Config(
                actor=MLP((16,)), critic=MLP((32, 32), norm), initial_alpha=0.1, learning_rate=3e-3
            ),
            env_id="batchproof/ConstantReward-v0",
            seeds=tuple(range(16)),
            steps=1000,
        )
    )
    before = run.evaluate().mean()
    run.advance(1000)
    after = run.evaluate().mean()
    run.close()
    assert before < 5
    assert after > 16
