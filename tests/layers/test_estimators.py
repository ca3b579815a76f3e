"""The layers' estimators against the NumPy formulas, and what holds for every one of them."""

import numpy as np
import pytest
import torch
from torch import nn

from batchproof import estimators as formulas
from batchproof.errors import BatchproofError
from batchproof.layers import (
    ESTIMATORS,
    BatchNorm1d,
    BatchNorm2d,
    BatchRenorm1d,
    create_norm,
    to_state,
)

torch.set_num_threads(1)
FEATURES = 6


def draw(seed, rows=64):
    """Rows with outliers, a drift, a constant feature and one that is 0 on most rows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0.1 * seed, rng.uniform(0.5, 3, FEATURES), (rows, FEATURES))
    x[rng.random(x.shape) < 0.03] += 40
    x[:, 4] = 2.5
    x[:, 5] = np.maximum(x[:, 5] - 2, 0)
    return x


def reference(name, x, mean, var, rho, count, unbiased=True):
    bessel = len(x) / (len(x) - 1) if unbiased and len(x) > 1 else 1.0
    batch = formulas.Batch(x.mean(0), x.var(0) * bessel, x, count, bessel)
    return formulas.ESTIMATORS[name].update(mean, var, batch, rho)


def equal(actual, desired, tolerance=1e-12):
    torch.testing.assert_close(
        actual, torch.as_tensor(desired), rtol=tolerance, atol=tolerance, check_dtype=False
    )


def test_the_names_are_the_registrys():
    assert list(ESTIMATORS) == list(formulas.ESTIMATORS)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("kind", [BatchNorm1d, BatchRenorm1d])
@pytest.mark.parametrize("options", [{}, {"momentum": 1.0, "running_variance": "biased"}])
def test_statistics_are_the_formulas(name, kind, options):
    layer = kind(FEATURES, estimator=name, dtype=torch.float64, **options)
    mean, var = np.zeros(FEATURES), np.ones(FEATURES)
    for count, rows in enumerate((64, 64, 65, 20, 8, 1), start=1):
        x = draw(count, rows)
        layer(torch.tensor(x), mode="T" if count % 2 else "S")
        unbiased = layer.running_variance == "unbiased"
        mean, var = reference(name, x, mean, var, layer.momentum, count, unbiased)
        # Batch norm gets the variance back from 1 / std, at which a small one loses digits.
        equal(layer.running_mean, mean, 1e-9)
        equal(layer.running_var, var, 1e-9)
        assert layer.num_batches_tracked == count


@pytest.mark.parametrize("name", ESTIMATORS)
def test_momentum_none_weighs_all_batches_alike(name):
    layer = BatchNorm1d(FEATURES, momentum=None, estimator=name, dtype=torch.float64)
    mean, var = np.zeros(FEATURES), np.ones(FEATURES)
    for count in range(1, 5):
        x = draw(count)
        layer(torch.tensor(x))
        named = "cumulative" if name == "debiased" else name
        mean, var = reference(named, x, mean, var, 1 / count, count)
        equal(layer.running_mean, mean, 1e-9)
        equal(layer.running_var, var, 1e-9)


def test_chan_of_all_batches_is_the_pooled_variance():
    layer = BatchNorm1d(FEATURES, momentum=None, estimator="chan", running_variance="biased")
    layer.double()
    batches = [draw(seed) for seed in range(5)]
    for x in batches:
        layer(torch.tensor(x))
    pooled = np.concatenate(batches)
    equal(layer.running_mean, pooled.mean(0), 1e-9)
    equal(layer.running_var, pooled.var(0), 1e-9)


def test_debiased_is_the_average_from_zero_over_its_weight():
    """As Adam writes it, with a second pair of buffers; here one pair holds what E uses."""
    layer = BatchNorm1d(FEATURES, momentum=0.01, estimator="debiased", dtype=torch.float64)
    first, second = torch.zeros(FEATURES), torch.zeros(FEATURES)
    for count in range(1, 8):
        x = torch.tensor(draw(count))
        layer(x)
        first = 0.99 * first + 0.01 * x.mean(0)
        second = 0.99 * second + 0.01 * x.var(0)
        equal(layer.running_mean, first / (1 - 0.99**count), 1e-9)
        equal(layer.running_var, second / (1 - 0.99**count), 1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_feature_maps(name):
    """Statistics of all positions; N, and the blocks of the median of means, are of images."""
    x = np.random.default_rng(0).normal(1, 2, (40, FEATURES, 3, 5))
    x[7] += 100
    layer = BatchNorm2d(FEATURES, estimator=name, dtype=torch.float64)
    layer(torch.tensor(x))
    layer(torch.tensor(x))
    flat = x.transpose(0, 2, 3, 1).reshape(-1, FEATURES)
    mean, var = np.zeros(FEATURES), np.ones(FEATURES)
    for count in (1, 2):
        if name == "huber":
            bessel = 600 / 599
            batch = formulas.Batch(flat.mean(0), flat.var(0) * bessel, x, count, bessel)
            mean, var = formulas.huber(mean, var, batch, 0.1)
        elif name == "median-of-means":
            rows = [x[i:36:9].transpose(0, 2, 3, 1).reshape(-1, FEATURES) for i in range(9)]
            middle = np.median([block.mean(0) for block in rows], 0)
            spread = np.median([block.var(0, ddof=1) for block in rows], 0)
            mean, var = 0.9 * mean + 0.1 * middle, 0.9 * var + 0.1 * spread
        else:
            mean, var = reference(name, flat, mean, var, 0.1, count)
    # The median of a block's variance is divided by 0.989 here: 60 values in a block.
    equal(layer.running_mean, mean, 1e-9)
    equal(layer.running_var, var, 0.012 if name == "median-of-means" else 1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("kind", [BatchNorm1d, BatchRenorm1d])
def test_the_batch_still_normalizes_by_its_own_statistics(name, kind):
    """The estimator changes what T leaves behind, not what T gives; E uses what is left."""
    plain, layer = kind(FEATURES), kind(FEATURES, estimator=name)
    layer.load_state_dict(plain.state_dict())
    x = torch.tensor(draw(0)).float()
    for training in (True, False):
        x.requires_grad_()
        y, same = layer.train(training)(x, mode="t"), plain.train(training)(x, mode="t")
        assert torch.equal(y, same)
    left = dict(layer.named_buffers())
    assert torch.equal(left["running_var"], torch.ones(FEATURES))
    layer.train()(x)
    expected = (x - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
    equal(layer.eval()(x), expected, 1e-4)
    assert not layer.running_mean.requires_grad


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("kind", [BatchNorm1d, BatchRenorm1d])
def test_states_are_torchs(name, kind):
    theirs = nn.BatchNorm1d(FEATURES)
    theirs(torch.tensor(draw(0)).float())
    ours = kind(FEATURES, estimator=name)
    ours.load_state_dict(theirs.state_dict())
    ours(torch.tensor(draw(1)).float())
    nn.BatchNorm1d(FEATURES).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_low_precision_and_mixed_types(name):
    layer = BatchNorm2d(3, estimator=name)
    layer(torch.randn(16, 3, 2, 2, dtype=torch.bfloat16))
    layer.running_mean = layer.running_mean.double()
    layer.running_var = layer.running_var.double()
    layer(torch.randn(16, 3, 2, 2))
    assert layer.running_mean.dtype == torch.float64
    assert torch.isfinite(layer.running_var).all()


@pytest.mark.filterwarnings("ignore")  # what PyTorch itself warns about while it compiles
@pytest.mark.parametrize("name", ESTIMATORS)
def test_one_graph(name):
    torch.compiler.reset()
    eager, other = (BatchNorm1d(FEATURES, estimator=name) for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = torch.tensor(draw(seed)).float()
        equal(compiled(x), eager(x), 1e-5)
    equal(other.running_mean, eager.running_mean, 1e-5)
    equal(other.running_var, eager.running_var, 1e-5)


def test_a_feature_that_was_constant_moves_again():
    """Huber's limits are shares of v: at v = 0 without a floor they would be 0 for ever."""
    layer = BatchNorm1d(1, estimator="huber", momentum=0.1, dtype=torch.float64)
    for _ in range(50):
        layer(torch.zeros(256, 1, dtype=torch.float64))
    assert layer.running_var == 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(1200):
        layer(3 + 2 * torch.randn(256, 1, dtype=torch.float64, generator=generator))
    assert layer.running_mean.item() == pytest.approx(3, abs=0.1)
    assert layer.running_var.item() == pytest.approx(4, rel=0.1)


def test_by_name_and_refusals():
    assert create_norm("renorm", 4, dims=2, estimator="chan").estimator == "chan"
    with pytest.raises(BatchproofError, match=r"use one of ema, debiased, .*, median-of-means"):
        BatchNorm1d(3, estimator="mean")
    with pytest.raises(BatchproofError, match="make it with estimator='ema'"):
        to_state(BatchRenorm1d(3, estimator="huber"), "torchrl")
