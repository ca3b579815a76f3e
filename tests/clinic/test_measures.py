"""The clinic's measures: by hand, against the lab's on equal weights, and on known layers."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from batchproof.clinic import measures, probe
from batchproof.clinic.subject import Subject

_path = Path(__file__).with_name("planted_slots.py")
_spec = importlib.util.spec_from_file_location("planted_slots", _path)
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kappa_and_slope_by_hand():
    """Qbar = mean of w_i a_i: the gradients are w_i / B."""
    weights = torch.tensor([3.0, -1.0, 1.0, -1.0])

    def q(action):
        return weights * action[:, 0]

    action = torch.zeros(4, 1)
    assert measures.kappa(q, action) == pytest.approx(2 / 6)
    assert measures.common_slope(q, action) == pytest.approx(2 / 4)


def test_kappa_averages_over_action_dimensions():
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])

    def q(action):
        return action[:, 0] + signs * action[:, 1]

    assert measures.kappa(q, torch.zeros(4, 2)) == pytest.approx(0.5)


def test_kappa_without_any_gradient_is_zero():
    assert measures.kappa(lambda a: torch.ones(len(a)) + 0 * a[:, 0], torch.zeros(4, 2)) == 0


def test_gaps_by_hand():
    """Values with half their batch mean taken off: 1/2 for all rows, 1 - 1/(2 B) for one."""

    def q(action):
        return action[:, 0] - 0.5 * action[:, 0].mean()

    action = normal(8, 1)
    gaps = measures.action_gaps(q, action, delta=0.2)
    assert gaps.common == pytest.approx(0.2 / 2)
    assert gaps.individual == pytest.approx(0.2 * (1 - 1 / 16))
    assert measures.response_ratio(q, action) == pytest.approx(0.5 / (1 - 1 / 16))


@pytest.mark.parametrize(("mode", "placement"), [("T", "pre"), ("E", "post")])
def test_as_in_the_lab_on_equal_weights(mode, placement):
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    from batchproof.lab import measures as lab
    from batchproof.lab import nets
    from batchproof.lab.norms import Norm
    from batchproof.modes import Mode

    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(16, 3)), rng.uniform(-1, 1, (16, 2))
    with jax.enable_x64(True):
        mlp = nets.MLP((8, 8), Norm("batch", placement))

        def draw(x):
            return jnp.asarray(rng.uniform(0.1, 0.9, x.shape) * rng.choice([-1, 1], x.shape))

        fresh = jax.eval_shape(lambda key: nets.init(key, mlp, 3, 1, 2), jax.random.key(0))
        params = jax.tree.map(draw, fresh.params)
        stats = {
            name: {
                "mean": jnp.asarray(rng.normal(size=8)),
                "var": jnp.asarray(rng.uniform(0.2, 2, 8)),
                "count": jnp.zeros((), jnp.int32),
            }
            for name in fresh.stats
        }

        def q_lab(a):
            network = nets.Network(params, stats)
            return nets.apply(mlp, network, jnp.asarray(obs), Mode(mode), a)[0][:, 0]

        @jax.jit
        def of(a):
            found = [f(q_lab, a) for f in (lab.kappa, lab.common_slope, lab.response_ratio)]
            return jnp.stack(found), q_lab(a)

        # Nearly all the time goes into compiling.
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            expected, value = (np.asarray(x) for x in of(jnp.asarray(action)))
        finally:
            jax.config.update("jax_disable_most_optimizations", False)

    layers = []
    for i in range(2):
        norm = nn.BatchNorm1d(8)
        _load(norm, params[f"norm_{placement}_{i}"], stats[f"norm_{placement}_{i}"])
        linear = _linear(params[f"linear_{i}"])
        layers += [linear, norm, nn.ReLU()] if placement == "pre" else [linear, nn.ReLU(), norm]
    critic = nn.Sequential(*layers, _linear(params["linear_out"])).double().train(mode == "T")
    states = torch.tensor(obs)

    def q(a):
        return critic(torch.cat([states, a], 1))[:, 0]

    a = torch.tensor(action)
    found = [f(q, a) for f in (measures.kappa, measures.common_slope, measures.response_ratio)]
    np.testing.assert_allclose(q(a).detach().numpy(), value, rtol=1e-9)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12)
    if (mode, placement) == ("T", "pre"):
        assert found[0] < 1e-12
        assert found[2] < 1e-9
    if mode == "E":
        assert found[2] == pytest.approx(1)


def _linear(params):
    weight = torch.tensor(np.asarray(params["weight"])).T
    layer = nn.Linear(*weight.shape[::-1])
    layer.weight.data = weight
    layer.bias.data = torch.tensor(np.asarray(params["bias"]))
    return layer


def _load(norm, params, stats):
    norm.weight.data = torch.tensor(np.asarray(params["scale"]))
    norm.bias.data = torch.tensor(np.asarray(params["bias"]))
    norm.running_mean = torch.tensor(np.asarray(stats["mean"]))
    norm.running_var = torch.tensor(np.asarray(stats["var"]))


def test_batch_noise_is_the_variance_over_companions():
    """q_i = x_i - mean(x): the companions' mean has variance 24 Var(x) / 32^2."""
    x = normal(4000)

    def q_at(index):
        return x[index] - x[index].mean()

    noise = measures.batch_noise(q_at, len(x), 32, draws=400)
    assert noise == pytest.approx(24 * float(x.var()) / 32**2, rel=0.2)


def test_batch_noise_is_zero_without_coupling():
    x = normal(100)
    assert measures.batch_noise(lambda index: x[index], len(x), 32) == 0


def test_statistic_error_by_hand():
    error = measures.statistic_error(
        torch.tensor([1.0, 0.0]),
        torch.tensor([1.0, 1.0]),
        torch.tensor([3.0, 0.0]),
        torch.tensor([4.0, 0.0]),
    )
    assert float(error.shift[0]) == pytest.approx(1.0)
    assert float(error.log_ratio[0]) == pytest.approx(np.log(1 / 4))
    assert torch.isnan(error.shift[1])


def facts(module, obs):
    subject = Subject.from_module(module, obs)
    with probe.recorded(subject.networks) as calls:
        subject.policy(obs)
    return probe.layer_facts(calls)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, planted.OwnNorm])
def test_precise_statistics_are_those_of_one_train_pass_over_all_rows(norm):
    """With the pool's statistics in every layer eval mode gives what T gives on the whole pool."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 8), norm(8), nn.Linear(8, 1)
    ).eval()
    obs = normal(64, 4).float()
    layers = facts(module, obs)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with torch.no_grad(), measures.precise_statistics(layers, lambda: module(obs)):
        halves = torch.cat([module(obs[:10]), module(obs[10:])])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(halves, module.train()(obs), rtol=1e-4, atol=1e-5)


def test_precise_statistics_come_back_after_an_error():
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()
    obs = normal(16, 4).float()
    layers = facts(module, obs)
    with (
        pytest.raises(KeyboardInterrupt),
        measures.precise_statistics(layers, lambda: module(obs)),
    ):
        raise KeyboardInterrupt
    assert float(module[1].running_mean.abs().max()) == 0
    assert not module[1]._forward_pre_hooks


def test_inputs_of_feature_maps_have_features_in_columns():
    x = normal(2, 3, 4, 5)
    flat = measures.by_feature(x)
    assert flat.shape == (2 * 4 * 5, 3)
    torch.testing.assert_close(measures.moments(x)[0], x.mean((0, 2, 3)))
    torch.testing.assert_close(measures.moments(x)[1], x.var((0, 2, 3), correction=0))


def test_td_bias_by_hand():
    bias = measures.td_bias(
        gamma=0.5,
        terminated=torch.tensor([0.0, 1.0]),
        next_q=torch.tensor([3.0, 100.0]),
        next_q_reference=torch.tensor([1.0, 0.0]),
        q=torch.tensor([2.0, 4.0]),
        q_reference=torch.tensor([1.0, 1.0]),
        next_q_running_action=torch.tensor([-1.0, 0.0]),
    )
    assert bias.target == pytest.approx(0.5 * 2 / 2)
    assert bias.current == pytest.approx(-2.0)
    assert bias.action == pytest.approx(0.5 * 2 / 2)
    assert bias.total == pytest.approx(-1.0)
    assert bias.noise[1] == pytest.approx(np.std([1, 3], ddof=1) / np.sqrt(2))
