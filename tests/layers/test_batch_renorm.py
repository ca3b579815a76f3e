"""Batch Renorm against the lab's layers, in NumPy and by its warm-up."""

import numpy as np
import pytest
import torch

from batchproof.errors import BatchproofError
from batchproof.layers import BatchNorm1d, BatchRenorm1d, BatchRenorm2d
from batchproof.modes import B, E, Mode, S, T

torch.set_num_threads(1)
ROWS, FEATURES = 16, 6
OPTIONS = {
    "batch": None,
    "batch-variances": {"batch_variance": "unbiased", "running_variance": "biased"},
    "renorm": {},
    "renorm-warming": {"warmup_steps": 100},
    "renorm-smooth": {"warmup": "smooth", "warmup_steps": 12},
    "renorm-bounds": {"r_max": 1.2, "d_max": 0.3, "momentum": 1.0},
    "renorm-variances": {"batch_variance": "unbiased", "running_variance": "biased"},
    "folded": {"formula": "folded", "eps": 1e-3},
    "folded-smooth": {"formula": "folded", "warmup": "smooth", "warmup_steps": 12, "eps": 0.1},
    "folded-unbiased": {"formula": "folded", "eps": 1e-3, "batch_variance": "unbiased"},
}


def draw(seed, rows=ROWS):
    rng = np.random.default_rng(seed)
    return rng.normal(rng.normal(size=FEATURES), rng.uniform(0.05, 5, FEATURES), (rows, FEATURES))


def equal(actual, desired, tolerance=1e-11):
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("mode", "rows"), [*((mode, ROWS) for mode in (T, Mode("t"), E, S, B)), (T, 1)]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_labs(name, mode, rows):
    """Same weights, input and statistics: same output, gradients and statistics, in float64."""
    jax = pytest.importorskip("jax", reason="needs JAX")
    from batchproof.lab import norms

    jnp = jax.numpy
    kind = "batch" if name.startswith("batch") else "renorm"
    norm = norms.Norm(kind, **(OPTIONS[name] or {}))
    layer = (BatchNorm1d if kind == "batch" else BatchRenorm1d)(
        FEATURES, dtype=torch.float64, **(OPTIONS[name] or {})
    )
    rng = np.random.default_rng(3)
    weight, bias, mean = rng.normal(size=(3, FEATURES))
    var = rng.uniform(0.5, 3, FEATURES)
    layer.load_state_dict(
        {
            "weight": torch.tensor(weight),
            "bias": torch.tensor(bias),
            "running_mean": torch.tensor(mean),
            "running_var": torch.tensor(var),
            "num_batches_tracked": torch.tensor(5),
        }
    )
    x, cotangent = draw(1, rows), draw(2, rows)
    if rows > 1:
        x[:, 2] = 0.75  # variance 0, where a root has no gradient
    with jax.enable_x64(True):
        params = {"scale": jnp.asarray(weight), "bias": jnp.asarray(bias)}
        stats = {
            "mean": jnp.asarray(mean),
            "var": jnp.asarray(var),
            "count": jnp.asarray(5, jnp.int32),
        }

        def weighted(params, x):
            y, new_stats = norms.apply(norm, params, stats, x, mode)
            return (y * cotangent).sum(), (y, new_stats)

        with jax.disable_jit():
            (grad_params, grad_x), (their_y, their_stats) = jax.grad(
                weighted, argnums=(0, 1), has_aux=True
            )(params, jnp.asarray(x))
        theirs = [np.asarray(v) for v in (their_y, grad_x, grad_params["scale"])]
        their_bias = np.asarray(grad_params["bias"])
        their_stats = {key: np.asarray(value) for key, value in their_stats.items()}

    given = torch.tensor(x, requires_grad=True)
    y = layer(given, mode=mode)
    grads = torch.autograd.grad(
        (y * torch.tensor(cotangent)).sum(),
        (given, layer.weight, layer.bias),
        allow_unused=True,
        materialize_grads=True,
    )
    equal(y.detach(), theirs[0])
    equal(grads[0], theirs[1], 1e-9)
    equal(grads[1], theirs[2], 1e-10)
    equal(grads[2], their_bias, 1e-10)
    equal(layer.running_mean, their_stats["mean"])
    equal(layer.running_var, their_stats["var"])
    assert layer.num_batches_tracked.item() == their_stats["count"]


def test_defaults_are_the_labs():
    pytest.importorskip("jax", reason="needs JAX")
    from batchproof.lab.norms import Norm

    lab, layer = Norm("renorm"), BatchRenorm1d(3)
    for name in ("momentum", "eps", "batch_variance", "running_variance"):
        assert getattr(layer, name) == getattr(lab, name)
    for name in ("formula", "warmup", "warmup_steps", "r_max", "d_max"):
        assert getattr(layer.renorm, name) == getattr(lab, name)


def test_canonical_in_numpy():
    """Output, gradients and statistics by arXiv 1702.03275, algorithm 1, with r and d clipped."""
    x, g = draw(1), draw(2)
    rng = np.random.default_rng(0)
    scale, bias = rng.normal(size=(2, FEATURES))
    running_mean = x.mean(0) + x.std(0) * np.array([0, 0, -20, 20, 0.3, -0.3])
    running_var = x.var(0) * np.array([1 / 100, 100, 1, 1, 1.5, 0.7])
    mean, var = x.mean(0), x.var(0)
    std, running_std = np.sqrt(var + 1e-3), np.sqrt(running_var + 1e-3)
    r = np.clip(std / running_std, 1 / 3, 3)
    d = np.clip((mean - running_mean) / running_std, -5, 5)
    assert (r[0], r[1], d[2], d[3]) == (3, 1 / 3, 5, -5)
    normalized = (x - mean) / std
    h = g * scale * r
    by_hand = (h - h.mean(0) - normalized * (h * normalized).mean(0)) / std

    layer = BatchRenorm1d(FEATURES, eps=1e-3, dtype=torch.float64)
    layer.weight.data, layer.bias.data = torch.tensor(scale), torch.tensor(bias)
    layer.running_mean.copy_(torch.tensor(running_mean))
    layer.running_var.copy_(torch.tensor(running_var))
    given = torch.tensor(x, requires_grad=True)
    y = layer(given)
    (y * torch.tensor(g)).sum().backward()
    equal(y.detach(), (normalized * r + d) * scale + bias)
    equal(given.grad, by_hand)
    equal(layer.weight.grad, (g * (normalized * r + d)).sum(0))
    equal(layer.bias.grad, g.sum(0))
    equal(layer.running_mean, 0.9 * running_mean + 0.1 * mean)
    equal(layer.running_var, 0.9 * running_var + 0.1 * x.var(0, ddof=1))


@pytest.mark.parametrize("formula", ["canonical", "folded"])
@pytest.mark.parametrize("warmup", ["hard", "smooth"])
def test_before_the_warm_up_it_is_batch_norm(formula, warmup):
    renorm = BatchRenorm1d(FEATURES, formula=formula, warmup=warmup, warmup_steps=80).double()
    plain = BatchNorm1d(FEATURES).double()
    for seed in range(10):  # an eighth of 80
        x = torch.tensor(draw(seed))
        equal(renorm(x).detach(), plain(x).detach())
        equal(renorm.running_var, plain.running_var)


def test_hard_warm_up_ends_at_its_step():
    x = torch.tensor(draw(1))
    plain = BatchNorm1d(FEATURES).double()(x)
    for count, is_plain in ((0, True), (3, True), (4, False), (5, False)):
        layer = BatchRenorm1d(FEATURES, warmup_steps=4).double()
        layer.num_batches_tracked += count
        assert torch.allclose(layer(x), plain, atol=1e-12) == is_plain


def test_images_are_rows_of_pixels():
    x = torch.tensor(draw(1, rows=4 * 3 * 5)).reshape(4, 3, 5, FEATURES).permute(0, 3, 1, 2)
    rows = torch.tensor(draw(1, rows=4 * 3 * 5))
    for formula in ("canonical", "folded"):
        image = BatchRenorm2d(FEATURES, formula=formula).double()
        flat = BatchRenorm1d(FEATURES, formula=formula).double()
        for given in (x, x.contiguous()):  # channels last, channels first
            y = image(given).permute(0, 2, 3, 1).reshape(-1, FEATURES)
            equal(y.detach(), flat(rows).detach())
            equal(image.running_var, flat.running_var)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"formula": "fused"}, "unknown formula 'fused'.*canonical, folded"),
        ({"warmup": "linear"}, "unknown warmup 'linear'.*hard, smooth"),
        ({"r_max": 0.5}, "r_max >= 1.*got 0.5"),
        ({"d_max": -1.0}, "d_max >= 0.*got 3.0 and -1.0"),
    ],
)
def test_bad_options_say_what_to_write(options, says):
    with pytest.raises(BatchproofError, match=says):
        BatchRenorm1d(3, **options)


def test_torchs_sync_converter_leaves_it_alone():
    network = torch.nn.Sequential(BatchRenorm1d(3))
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert isinstance(converted[0], BatchRenorm1d)
