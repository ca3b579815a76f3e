"""Batch Renorm state of other libraries: parity of outputs with their own layers, both ways."""

import warnings

import numpy as np
import pytest
import torch
from sb3_contrib.common.torch_layers import BatchRenorm1d as Sb3BatchRenorm1d

from batchproof.errors import BatchproofError
from batchproof.layers import CONVENTIONS, BatchRenorm1d, from_state, to_state

torch.set_num_threads(1)
ROWS, FEATURES, WARMUP = 16, 5, 4


def draw(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(rng.normal(size=FEATURES), rng.uniform(0.05, 5, FEATURES), (ROWS, FEATURES))


def values(count):
    rng = np.random.default_rng(3)
    weight, bias, mean = rng.normal(size=(3, FEATURES))
    return weight, bias, mean, rng.uniform(0.5, 3, FEATURES), count


def equal(actual, desired, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=tolerance, atol=tolerance)


# sb3-contrib: the installed class


def sb3_contrib(count):
    weight, bias, mean, var, count = values(count)
    layer = Sb3BatchRenorm1d(FEATURES, warmup_steps=WARMUP).double()
    layer.load_state_dict(
        {
            "scale": torch.tensor(weight),
            "bias": torch.tensor(bias),
            "ra_mean": torch.tensor(mean),
            "ra_var": torch.tensor(var),
            "steps": torch.tensor(count),
        }
    )
    return layer


@pytest.mark.parametrize("count", [0, WARMUP, 2 * WARMUP])
def test_sb3_contrib(count):
    """Three updates from its state, in train and in eval, and what they leave, read back by it."""
    theirs = sb3_contrib(count)
    ours = from_state("sb3-contrib", theirs.state_dict(), warmup_steps=WARMUP + 1)
    for seed, training in enumerate([False, True, True, True, False]):
        x = torch.tensor(draw(seed))
        equal(ours.train(training)(x).detach(), theirs.train(training)(x).detach())
    state = to_state(ours, "sb3-contrib")
    assert list(state) == ["scale", "bias", "ra_mean", "ra_var", "steps"]
    for name, value in theirs.state_dict().items():
        equal(state[name], value)
    sb3_contrib(0).load_state_dict(state)


# SBX: the installed flax module


@pytest.mark.parametrize("count", [0, WARMUP - 1, 2 * WARMUP])
def test_sbx(count):
    jax = pytest.importorskip("jax", reason="needs JAX")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("sbx.common.jax_layers", reason="needs sbx-rl")
    weight, bias, mean, var, count = values(count)
    with jax.enable_x64(True):
        theirs = module.BatchRenorm(momentum=0.99, epsilon=1e-3, warmup_steps=WARMUP)
        arrays = {k: jax.numpy.asarray(v) for k, v in {"mean": mean, "var": var}.items()}
        variables = {
            "params": {"scale": jax.numpy.asarray(weight), "bias": jax.numpy.asarray(bias)},
            "batch_stats": {**arrays, "r_max": 3, "d_max": 5, "steps": count},
        }
        ours = from_state("sbx", variables, warmup_steps=WARMUP)
        merged = {**variables["params"], **variables["batch_stats"]}
        flat = from_state("sbx", merged, warmup_steps=WARMUP)
        for name, value in ours.state_dict().items():
            assert torch.equal(flat.state_dict()[name], value)
        for seed, training in enumerate([False, True, True, True, False]):
            x = draw(seed)
            y = ours.train(training)(torch.tensor(x)).detach()
            their_y, new = theirs.apply(
                variables, x, use_running_average=not training, mutable=["batch_stats"]
            )
            equal(y, their_y, 1e-9)
            variables = {**variables, **new}
        state = to_state(ours, "sbx")
        for kind, tree in variables.items():
            assert set(state[kind]) == set(tree)
            for name, value in tree.items():
                equal(state[kind][name], value, 1e-9)
        # flax itself takes what we give it.
        again = theirs.apply(state, x, use_running_average=True)
        equal(again, their_y, 1e-6)


# TorchRL, which is not installed: its formula, written out


def torchrl(state, x, training):
    """TorchRL's `BatchRenorm1d.forward` on (N, C), from reading it at commit 2666425.

    Momentum .01, eps 1e-5, r_max 3, d_max 5. Its warm-up blends r and d in by a factor, which the
    hard one takes as count // warm-up steps.
    """
    weight, bias, mean, var, count = state
    running_std = np.sqrt(var + 1e-5)
    if not training:
        return (x - mean) / running_std * weight + bias, state
    batch_mean, batch_var = x.mean(0), x.var(0)
    std = np.sqrt(batch_var + 1e-5)
    r = np.clip(std / running_std, 1 / 3, 3)
    d = np.clip((batch_mean - mean) / running_std, -5, 5)
    factor = count // WARMUP
    r, d = 1 + (r - 1) * factor, d * factor
    y = ((x - batch_mean) / std * r + d) * weight + bias
    unbiased = batch_var * len(x) / (len(x) - 1)
    moved = (mean + 0.01 * (batch_mean - mean), var + 0.01 * (unbiased - var), count + 1)
    return y, (weight, bias, *moved)


@pytest.mark.parametrize("count", [0, WARMUP - 1, WARMUP])
def test_torchrl(count):
    state = values(count)
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ours = from_state("torchrl", dict(zip(names, state, strict=True)), warmup_steps=WARMUP)
    for seed, training in enumerate([False, True, True, True, False]):
        x = draw(seed)
        their_y, state = torchrl(state, x, training)
        equal(ours.train(training)(torch.tensor(x)).detach(), their_y)
    found = to_state(ours, "torchrl")
    assert tuple(found) == names
    for name, value in zip(names, state, strict=True):
        equal(found[name], value)


# The rest of the contract


@pytest.mark.parametrize("source", CONVENTIONS)
def test_there_and_back(source):
    layer = BatchRenorm1d(FEATURES, **CONVENTIONS[source])
    torch.nn.init.normal_(layer.weight)
    layer(torch.tensor(draw(0)).float())
    state = to_state(layer, source)
    back = from_state(source, state)
    for name, value in layer.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
    assert back.extra_repr() == layer.extra_repr()
    layer(torch.tensor(draw(1)).float())  # the state is a copy
    assert torch.equal(from_state(source, state).running_mean, back.running_mean)


@pytest.mark.parametrize(
    ("source", "change", "says"),
    [
        ("tianshou", {}, "unknown source 'tianshou': use one of sb3-contrib, sbx, torchrl"),
        ("sb3-contrib", {"ra_mean": None}, "not the state of one sb3-contrib.*missing ra_mean"),
        ("sb3-contrib", {"extra": torch.zeros(3)}, "left over extra"),
        ("sb3-contrib", {"ra_mean": torch.zeros(2, 3)}, r"shape \(2, 3\), not \(C,\)"),
        ("sb3-contrib", {"scale": torch.zeros(4)}, "not that of one layer"),
        ("torchrl", {}, "missing weight, running_mean, running_var, num_batches_tracked"),
    ],
)
def test_another_state_is_refused(source, change, says):
    state = {**Sb3BatchRenorm1d(3).state_dict(), **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(BatchproofError, match=says):
        from_state(source, state)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("sbx", {}, "make it with formula='folded', running_variance='biased'"),
        ("sb3-contrib", {}, "formula='folded', batch_variance='unbiased'"),
        ("sb3-contrib", {**CONVENTIONS["sb3-contrib"], "r_max": 2.0}, "r_max=3.0, d_max=5.0"),
        ("sbx", {**CONVENTIONS["sbx"], "warmup": "smooth"}, "make it with warmup='hard'"),
        ("torchrl", {"affine": False}, "affine=True"),
        ("flax", {}, "unknown source 'flax'"),
    ],
)
def test_a_layer_of_another_kind_is_not_written(source, options, says):
    with pytest.raises(BatchproofError, match=says):
        to_state(BatchRenorm1d(3, **options), source)
