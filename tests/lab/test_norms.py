"""The lab's layers against PyTorch, sb3-contrib, NumPy and numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib.common.torch_layers import BatchRenorm1d

from batchproof.errors import BatchproofError
from batchproof.lab import norms
from batchproof.lab.norms import KINDS, Norm
from batchproof.modes import B, E, Mode, S, T

ROWS, FEATURES = 16, 8
SB3_CONTRIB = Norm(
    "renorm",
    momentum=0.01,
    eps=1e-3,
    batch_variance="unbiased",
    running_variance="unbiased",
    formula="folded",
)
# One of each layer that can normalize by the batch.
BATCH_LAYERS = {
    "batch": Norm("batch"),
    "batch-unbiased": Norm("batch", batch_variance="unbiased", running_variance="biased"),
    "renorm": Norm("renorm"),
    "renorm-folded": Norm("renorm", formula="folded", eps=1e-3),
    "renorm-sb3-contrib": SB3_CONTRIB,
}
ROW_LAYERS = {"layer": Norm("layer"), "group": Norm("group", groups=2), "rms": Norm("rms")}


@pytest.fixture(autouse=True, scope="module")
def _float64():
    # Nearly all the time goes into compiling, so compile fast.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def draw(seed, rows=ROWS, features=FEATURES):
    """A batch whose features have means and spreads of their own."""
    rng = np.random.default_rng(seed)
    return rng.normal(rng.normal(size=features), rng.uniform(0.5, 3, features), (rows, features))


def draw_layer(norm, seed, features=FEATURES, count=0):
    """Parameters and statistics away from their initial values."""
    rng = np.random.default_rng(seed)
    params, stats = norms.init(norm, features)
    params = {name: jnp.asarray(rng.normal(1, 0.5, features)) for name in params}
    if stats:
        stats = {
            "mean": jnp.asarray(rng.normal(size=features)),
            "var": jnp.asarray(rng.uniform(0.5, 3, features)),
            "count": jnp.asarray(count, jnp.int32),
        }
    return params, stats


def run(norm, params, stats, x, mode, cotangent):
    """Output, new statistics, and the gradients of sum(output * cotangent) in params and x."""

    def weighted(params, x):
        y, new_stats = norms.apply(norm, params, stats, x, mode)
        return (y * cotangent).sum(), (y, new_stats)

    grads, (y, new_stats) = jax.grad(weighted, argnums=(0, 1), has_aux=True)(params, x)
    return y, new_stats, *grads


def run_torch(layer, x, cotangent):
    """The same of a torch layer: output, gradients in its parameters and in x."""
    layer.zero_grad()
    x = torch.tensor(x, requires_grad=True)
    y = layer(x)
    (y * torch.tensor(cotangent)).sum().backward()
    return (
        y.detach().numpy(),
        {name: p.grad.numpy() for name, p in layer.named_parameters()},
        x.grad.numpy(),
    )


def copy_into(layer, params, names=("weight", "bias")):
    """Give a torch layer our parameters."""
    for ours, theirs in zip(("scale", "bias"), names, strict=True):
        if ours in params:
            getattr(layer, theirs).data = torch.tensor(np.asarray(params[ours]))


def equal(actual, desired, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=tolerance, atol=tolerance)


# Against PyTorch and sb3-contrib


@pytest.mark.parametrize(("momentum", "eps"), [(0.1, 1e-5), (0.01, 1e-3), (1.0, 0.1)])
def test_batch_norm_is_torchs(momentum, eps):
    norm = Norm("batch", momentum=momentum, eps=eps)
    params, _ = draw_layer(norm, 0)
    _, stats = norms.init(norm, FEATURES)
    layer = torch.nn.BatchNorm1d(FEATURES, eps=eps, momentum=momentum).double()
    copy_into(layer, params)
    for step, mode in enumerate([T, T, E, T, E]):
        x, cotangent = draw(step), draw(100 + step)
        layer.train(mode == T)
        theirs, their_params, their_x = run_torch(layer, x, cotangent)
        y, stats, grad_params, grad_x = run(norm, params, stats, x, mode, cotangent)
        equal(y, theirs)
        equal(grad_x, their_x)
        equal(grad_params["scale"], their_params["weight"])
        equal(grad_params["bias"], their_params["bias"])
        equal(stats["mean"], layer.running_mean)
        equal(stats["var"], layer.running_var)
        assert stats["count"] == layer.num_batches_tracked.item()


@pytest.mark.parametrize(
    ("norm", "layer"),
    [
        (Norm("layer", eps=1e-5), torch.nn.LayerNorm(FEATURES, eps=1e-5)),
        (Norm("layer", eps=0.1), torch.nn.LayerNorm(FEATURES, eps=0.1)),
        (Norm("group", groups=4), torch.nn.GroupNorm(4, FEATURES)),
        (Norm("group", groups=1), torch.nn.GroupNorm(1, FEATURES)),
        (Norm("rms", eps=1e-3), torch.nn.RMSNorm(FEATURES, eps=1e-3)),
    ],
)
def test_row_layers_are_torchs(norm, layer):
    layer = layer.double()
    params, stats = draw_layer(norm, 0)
    copy_into(layer, params)
    x, cotangent = draw(1), draw(2)
    theirs, their_params, their_x = run_torch(layer, x, cotangent)
    y, new_stats, grad_params, grad_x = run(norm, params, stats, x, T, cotangent)
    equal(y, theirs)
    equal(grad_x, their_x)
    equal(grad_params["scale"], their_params["weight"])
    assert ("bias" in grad_params) == ("bias" in their_params)
    if "bias" in grad_params:
        equal(grad_params["bias"], their_params["bias"])
    assert new_stats == {}


def test_group_norm_of_one_group_is_layer_norm():
    params, _ = draw_layer(Norm("layer"), 0)
    x = draw(1)
    one_group, _ = norms.apply(Norm("group", groups=1), params, {}, x, E)
    layer, _ = norms.apply(Norm("layer"), params, {}, x, E)
    equal(one_group, layer)


@pytest.mark.parametrize("steps", [0, 3, 4])
def test_folded_batch_renorm_is_sb3_contribs(steps):
    """Four updates from `steps` earlier ones, through the end of a warm-up of three, then eval.

    sb3-contrib corrects once steps > warmup_steps and we, like CrossQ's authors, once they are
    reached, so its warm-up of 3 is ours of 4.
    """
    norm = Norm(**{**vars(SB3_CONTRIB), "warmup_steps": 4})
    params, stats = draw_layer(norm, 3, count=steps)
    layer = BatchRenorm1d(FEATURES, warmup_steps=3).double()
    copy_into(layer, params, names=("scale", "bias"))
    layer.ra_mean.copy_(torch.tensor(np.asarray(stats["mean"])))
    layer.ra_var.copy_(torch.tensor(np.asarray(stats["var"])))
    layer.steps += steps
    for step, mode in enumerate([T, T, T, T, E]):
        x, cotangent = 4 * draw(step), draw(100 + step)
        layer.train(mode == T)
        theirs, their_params, their_x = run_torch(layer, x, cotangent)
        y, stats, grad_params, grad_x = run(norm, params, stats, x, mode, cotangent)
        equal(y, theirs)
        equal(grad_x, their_x)
        equal(grad_params["scale"], their_params["scale"])
        equal(grad_params["bias"], their_params["bias"])
        equal(stats["mean"], layer.ra_mean)
        equal(stats["var"], layer.ra_var)
        assert stats["count"] == layer.steps.item()


# Against NumPy and by hand


def test_canonical_batch_renorm_in_numpy():
    """Values, gradients and statistics by arXiv 1702.03275, algorithm 1, in plain NumPy."""
    norm = Norm("renorm", momentum=0.1, eps=1e-3)
    rng = np.random.default_rng(0)
    x, g = draw(1, features=6), draw(2, features=6)
    scale, bias = rng.normal(size=6), rng.normal(size=6)
    # Columns 0 and 1 clip r at 3 and 1/3, columns 2 and 3 clip d at 5 and -5.
    running_mean = x.mean(0) + np.array([0, 0, -20, 20, 0.3, -0.3])
    running_var = x.var(0) * np.array([1 / 100, 100, 1, 1, 1.5, 0.7])

    mean, var = x.mean(0), x.var(0)
    std, running_std = np.sqrt(var + norm.eps), np.sqrt(running_var + norm.eps)
    r_free, d_free = std / running_std, (mean - running_mean) / running_std
    assert r_free[0] > 3
    assert r_free[1] < 1 / 3
    assert d_free[2] > 5
    assert d_free[3] < -5
    r, d = np.clip(r_free, 1 / 3, 3), np.clip(d_free, -5, 5)
    normalized = (x - mean) / std
    corrected = normalized * r + d
    h = g * scale * r  # gradient at `normalized`, with r and d held
    by_hand = (h - h.mean(0) - normalized * (h * normalized).mean(0)) / std

    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    stats = {
        "mean": jnp.asarray(running_mean),
        "var": jnp.asarray(running_var),
        "count": jnp.asarray(7, jnp.int32),
    }
    y, new_stats, grad_params, grad_x = run(norm, params, stats, x, T, g)
    equal(y, corrected * scale + bias)
    equal(grad_x, by_hand)
    equal(grad_params["scale"], (g * corrected).sum(0))
    equal(grad_params["bias"], g.sum(0))
    equal(new_stats["mean"], 0.9 * running_mean + 0.1 * mean)
    equal(new_stats["var"], 0.9 * running_var + 0.1 * x.var(0, ddof=1))
    assert new_stats["count"] == 8


def test_unclipped_batch_renorm_normalizes_by_running_statistics():
    """Within the bounds of r and d the output is the running statistics'."""
    params, _ = draw_layer(Norm("renorm"), 0)
    x = draw(1)
    stats = {
        "mean": jnp.asarray(x.mean(0) + 0.2),
        "var": jnp.asarray(1.3 * x.var(0)),
        "count": jnp.asarray(1, jnp.int32),
    }
    train, _ = norms.apply(Norm("renorm"), params, stats, x, T)
    evaluated, _ = norms.apply(Norm("renorm"), params, stats, x, E)
    equal(train, evaluated)


@pytest.mark.parametrize("formula", ["canonical", "folded"])
@pytest.mark.parametrize("warmup", ["hard", "smooth"])
def test_unwarmed_batch_renorm_is_batch_norm(formula, warmup):
    renorm = Norm("renorm", formula=formula, warmup=warmup, warmup_steps=80)
    params, stats = draw_layer(renorm, 0, count=10)  # 10 is an eighth of 80: still plain
    x, cotangent = draw(1), draw(2)
    ours = run(renorm, params, stats, x, T, cotangent)
    plain = run(Norm("batch"), params, stats, x, T, cotangent)
    jax.tree.map(equal, ours, plain)


def test_hard_warm_up_ends_at_its_step():
    norm = Norm("renorm", warmup_steps=4)
    params, stats = draw_layer(norm, 0)
    x = draw(1)
    plain, _ = norms.apply(Norm("batch"), params, stats, x, T)
    for count, is_plain in ((0, True), (3, True), (4, False), (5, False)):
        y, _ = norms.apply(norm, params, {**stats, "count": jnp.asarray(count, jnp.int32)}, x, T)
        assert np.allclose(y, plain, atol=1e-12) == is_plain


@pytest.mark.parametrize(
    ("count", "r_max", "d_max"),
    [
        (0, 1, 0),
        (5_000, 1, 0),
        (10_000, 1 + 2 * 5 / 35, 1.25),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5),
        (32_500, 1 + 2 * 27.5 / 35, 5),
        (40_000, 3, 5),
        (1_000_000, 3, 5),
    ],
)
def test_smooth_warm_up_is_the_papers(count, r_max, d_max):
    """Plain for 5k steps, d_max to 5 by 25k, r_max to 3 by 40k, both linearly.

    A batch far from the running statistics clips both: its spread becomes r_max, its mean d_max.
    """
    norm = Norm("renorm", warmup="smooth", warmup_steps=40_000, eps=0.0)
    params, stats = norms.init(norm, 3)
    x = 1e4 + 100 * draw(0, features=3)
    y, _ = norms.apply(norm, params, {**stats, "count": jnp.asarray(count, jnp.int32)}, x, T)
    equal(y.std(0), r_max)
    equal(y.mean(0), d_max, 1e-10)


@pytest.mark.parametrize(
    ("running_variance", "after_three", "after_one"),
    [("unbiased", 1.3, 1.17), ("biased", 1.166667, 1.05)],
)
def test_numbers_of_a_batch_and_a_single_row(running_variance, after_three, after_one):
    """Momentum .1 from (0, 1): a batch of three, then a single row trained on, then evaluated.

    .9 + .1 * 4 = 1.3 with PyTorch's unbiased running variance, .9 + .1 * 8/3 = 1.166667 with the
    biased one; a single row has variance 0 in both, so .9 of either is left.
    """
    norm = Norm("batch", momentum=0.1, eps=1e-8, running_variance=running_variance)
    params, stats = norms.init(norm, 2)
    rows, row = jnp.array([[1.0, 2], [3, 4], [5, 6]]), jnp.array([[2.0, 3]])

    y, stats = norms.apply(norm, params, stats, rows, T)
    equal(y, [[-1.224745] * 2, [0, 0], [1.224745] * 2], 1e-6)
    equal(stats["mean"], [0.3, 0.4])
    equal(stats["var"], [after_three] * 2, 1e-6)

    y, stats = norms.apply(norm, params, stats, row, T)
    equal(y, [[0, 0]])
    equal(stats["mean"], [0.47, 0.66])
    equal(stats["var"], [after_one] * 2, 1e-6)

    y, same = norms.apply(norm, params, stats, row, E)
    if running_variance == "biased":
        equal(y, [[1.4931, 2.2836]], 1e-4)
    equal(y, [[1.53 / np.sqrt(after_one), 2.34 / np.sqrt(after_one)]], 1e-6)
    assert same is stats


# The modes' contract, on every layer that can normalize by the batch


@pytest.mark.parametrize("name", BATCH_LAYERS)
@pytest.mark.parametrize("letter", ["T", "S", "J", "M", "t", "s", "j", "m"])
def test_batch_modes_use_and_track_the_batch(name, letter):
    norm = BATCH_LAYERS[name]
    params, stats = draw_layer(norm, 0, count=5)
    x, cotangent = draw(1), draw(2)
    y, new_stats, *_ = run(norm, params, stats, x, Mode(letter), cotangent)

    in_t, *_ = run(norm, params, stats, x, T, cotangent)
    equal(y, in_t)
    if letter.islower():
        jax.tree.map(np.testing.assert_array_equal, new_stats, stats)
        return
    var = x.var(0, ddof=1 if norm.running_variance == "unbiased" else 0)
    rho = norm.momentum
    equal(new_stats["mean"], (1 - rho) * stats["mean"] + rho * x.mean(0))
    equal(new_stats["var"], (1 - rho) * stats["var"] + rho * var)
    assert new_stats["count"] == 6


@pytest.mark.parametrize("name", BATCH_LAYERS)
def test_batch_modes_normalize_by_the_batch(name):
    """Far from the running statistics, where Batch Renorm's corrections are at their bounds."""
    norm = BATCH_LAYERS[name]
    params, stats = norms.init(norm, FEATURES)
    x = 1e4 + 100 * draw(0)
    ddof = 1 if norm.batch_variance == "unbiased" else 0
    y, _ = norms.apply(norm, params, stats, x, T)
    spread, shift = (3.0, 5.0) if norm.kind == "renorm" else (1.0, 0.0)
    equal(y.std(0, ddof=ddof), [spread] * FEATURES, 1e-3)
    equal(y.mean(0), [shift] * FEATURES, 1e-3)


@pytest.mark.parametrize("name", BATCH_LAYERS)
@pytest.mark.parametrize("letter", ["T", "J", "M", "t", "j", "m"])
def test_the_gradient_flows_through_the_statistics(name, letter):
    """A shift of all rows moves nothing, so each feature's gradient sums to 0 over the batch."""
    norm = BATCH_LAYERS[name]
    params, stats = draw_layer(norm, 0)
    _, _, _, grad_x = run(norm, params, stats, draw(1), Mode(letter), draw(2))
    assert np.abs(grad_x).max() > 1e-2
    equal(grad_x.sum(0), np.zeros(FEATURES), 1e-13)


@pytest.mark.parametrize("name", BATCH_LAYERS)
@pytest.mark.parametrize("letter", ["S", "s"])
def test_s_stops_the_gradient_through_the_statistics(name, letter):
    """S gives T's values, and the gradient of an affine map by constants."""
    norm = BATCH_LAYERS[name]
    params, stats = draw_layer(norm, 0)
    x, cotangent = draw(1), draw(2)
    y, _, grad_params, grad_x = run(norm, params, stats, x, Mode(letter), cotangent)
    in_t, _, t_params, t_x = run(norm, params, stats, x, T, cotangent)
    equal(y, in_t)
    jax.tree.map(equal, grad_params, t_params)
    slope = (y[0] - y[1]) / (x[0] - x[1])  # of the affine map that each feature goes through
    equal(grad_x, cotangent * slope, 1e-10)
    assert np.abs(grad_x - t_x).max() > 1e-2


@pytest.mark.parametrize("name", BATCH_LAYERS)
@pytest.mark.parametrize("mode", [E, Mode("e")])
def test_e_uses_the_running_statistics_and_leaves_them(name, mode):
    norm = BATCH_LAYERS[name]
    params, stats = draw_layer(norm, 0)
    x, cotangent = draw(1), draw(2)
    y, new_stats, grad_params, grad_x = run(norm, params, stats, x, mode, cotangent)
    slope = params["scale"] / np.sqrt(stats["var"] + norm.eps)
    equal(y, (x - stats["mean"]) * slope + params["bias"])
    equal(grad_x, cotangent * slope)
    equal(grad_params["bias"], cotangent.sum(0))
    jax.tree.map(np.testing.assert_array_equal, new_stats, stats)


@pytest.mark.parametrize("name", [*BATCH_LAYERS, *ROW_LAYERS])
@pytest.mark.parametrize("mode", [B, Mode("b")])
def test_b_skips_the_layer(name, mode):
    norm = {**BATCH_LAYERS, **ROW_LAYERS}[name]
    params, stats = draw_layer(norm, 0)
    x, cotangent = draw(1), draw(2)
    y, new_stats, grad_params, grad_x = run(norm, params, stats, x, mode, cotangent)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(grad_x, cotangent)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grad_params)
    jax.tree.map(np.testing.assert_array_equal, new_stats, stats)


@pytest.mark.parametrize("name", BATCH_LAYERS)
def test_new_statistics_carry_no_gradient(name):
    norm = BATCH_LAYERS[name]
    params, stats = draw_layer(norm, 0)

    def tracked(x):
        _, new_stats = norms.apply(norm, params, stats, x, T)
        return new_stats["mean"].sum() + new_stats["var"].sum()

    np.testing.assert_array_equal(jax.grad(tracked)(jnp.asarray(draw(1))), 0)


def test_none_is_the_identity():
    params, stats = norms.init(Norm("none"), 3)
    x = draw(0, features=3)
    y, new_stats = norms.apply(Norm("none"), params, stats, x, T)
    assert y is x
    assert params == stats == new_stats == {}


# Properties

seeds = st.integers(0, 2**31 - 1)
modest = settings(deadline=None, database=None, max_examples=10)


@given(seeds, st.sampled_from(sorted(BATCH_LAYERS)), st.sampled_from([T, S, E]))
@modest
def test_permuting_the_rows_permutes_the_output(seed, name, mode):
    norm = BATCH_LAYERS[name]
    params, stats = draw_layer(norm, seed)
    x, cotangent = draw(seed), draw(seed + 1)
    order = np.random.default_rng(seed).permutation(ROWS)
    y, new_stats, _, grad_x = run(norm, params, stats, x, mode, cotangent)
    shuffled, same_stats, _, grad_shuffled = run(
        norm, params, stats, x[order], mode, cotangent[order]
    )
    equal(shuffled, y[order], 1e-11)
    equal(grad_shuffled, grad_x[order], 1e-11)
    jax.tree.map(equal, same_stats, new_stats)


@given(seeds, st.floats(0.01, 100), st.floats(-100, 100), st.sampled_from([0.0, 1e-5, 0.1]))
@modest
def test_batch_norm_in_t_ignores_scale_and_shift(seed, factor, shift, eps):
    """BN(factor x + shift; factor^2 eps) = BN(x; eps): exact, so invariant up to eps."""
    norm, scaled = Norm("batch", eps=eps), Norm("batch", eps=eps * factor**2)
    params, stats = draw_layer(norm, seed)
    x = draw(seed)
    y, _ = norms.apply(norm, params, stats, x, T)
    same, _ = norms.apply(scaled, params, stats, factor * x + shift, T)
    equal(same, y, 1e-8)


@given(seeds, st.sampled_from(sorted(BATCH_LAYERS)), st.sampled_from([1, ROWS // 2]))
@modest
def test_e_is_the_same_in_two_parts(seed, name, cut):
    norm = BATCH_LAYERS[name]
    params, stats = draw_layer(norm, seed)
    x = draw(seed)
    whole, _ = norms.apply(norm, params, stats, x, E)
    parts = [norms.apply(norm, params, stats, part, E)[0] for part in (x[:cut], x[cut:])]
    equal(whole, np.concatenate(parts))


@given(seeds, st.sampled_from(sorted(ROW_LAYERS)), st.sampled_from([T, S, E]))
@modest
def test_row_layers_treat_each_row_alone(seed, name, mode):
    norm = ROW_LAYERS[name]
    params, stats = draw_layer(norm, seed)
    x = draw(seed)
    cotangent = np.zeros_like(x)
    cotangent[3] = draw(seed + 1)[3]
    y, _, _, grad_x = run(norm, params, stats, x, mode, cotangent)
    alone, _ = norms.apply(norm, params, stats, x[3:4], mode)
    equal(alone[0], y[3])
    # The exact coupling test: the gradient of row 3 in any other row is 0.
    np.testing.assert_array_equal(np.delete(grad_x, 3, axis=0), 0)
    assert np.abs(grad_x[3]).max() > 0


@pytest.mark.parametrize("name", BATCH_LAYERS)
def test_rows_are_coupled_in_t(name):
    """The counterpart: in T the gradient of one row reaches the others."""
    norm = BATCH_LAYERS[name]
    params, stats = draw_layer(norm, 0)
    cotangent = np.zeros((ROWS, FEATURES))
    cotangent[3] = 1
    _, _, _, grad_x = run(norm, params, stats, draw(0), T, cotangent)
    assert np.abs(np.delete(grad_x, 3, axis=0)).min(0).max() > 1e-4


@pytest.mark.parametrize("letter", ["T", "S", "E", "B"])
@pytest.mark.parametrize("name", [*BATCH_LAYERS, *ROW_LAYERS])
def test_a_batch_of_one_is_finite(name, letter):
    norm = {**BATCH_LAYERS, **ROW_LAYERS}[name]
    params, stats = draw_layer(norm, 0, count=5)
    results = run(norm, params, stats, draw(1, rows=1), Mode(letter), draw(2, rows=1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


@pytest.mark.parametrize("name", BATCH_LAYERS)
def test_a_constant_feature_is_finite(name):
    """At variance exactly 0 a square root has no gradient, which the folded form must survive."""
    norm = BATCH_LAYERS[name]
    params, stats = draw_layer(norm, 0, count=5)
    x = draw(1)
    x[:, 2] = 0.75
    y, new_stats, grad_params, grad_x = run(norm, params, stats, x, T, draw(2))
    assert all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves([y, new_stats, grad_params, grad_x])
    )
    equal(grad_x.sum(0), np.zeros(FEATURES), 1e-10)
    if norm.formula == "folded" or norm.kind == "batch":
        equal(y[:, 2], np.full(ROWS, params["bias"][2]))


def test_group_norm_blocks_do_not_mix():
    norm = ROW_LAYERS["group"]
    params, _ = norms.init(norm, FEATURES)
    x = draw(0)
    moved = x.copy()
    moved[:, 4:] = draw(1)[:, 4:]  # the second of two blocks
    y, other = (norms.apply(norm, params, {}, rows, E)[0] for rows in (x, moved))
    np.testing.assert_array_equal(y[:, :4], other[:, :4])
    assert np.abs(y[:, 4:] - other[:, 4:]).min() > 1e-6


# Construction


def test_init():
    params, stats = norms.init(Norm("batch"), 3)
    np.testing.assert_array_equal(params["scale"], [1, 1, 1])
    np.testing.assert_array_equal(params["bias"], [0, 0, 0])
    np.testing.assert_array_equal(stats["mean"], [0, 0, 0])
    np.testing.assert_array_equal(stats["var"], [1, 1, 1])
    assert stats["count"] == 0
    assert set(norms.init(Norm("rms"), 3)[0]) == {"scale"}
    assert norms.init(Norm("layer"), 3)[1] == {}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "batchnorm"}, "unknown norm 'batchnorm'.*batch, renorm, layer"),
        ({"placement": "before"}, "unknown placement 'before'.*before-action"),
        ({"placement": "input+before"}, "unknown placement 'before'"),
        ({"placement": ""}, "unknown placement ''"),
        ({"batch_variance": "sample"}, "unknown batch_variance 'sample'.*biased, unbiased"),
        ({"running_variance": "sample"}, "unknown running_variance 'sample'.*biased, unbiased"),
        ({"formula": "fused"}, "unknown formula 'fused'.*canonical, folded"),
        ({"warmup": "linear"}, "unknown warmup 'linear'.*hard, smooth"),
        ({"momentum": 0.0}, "momentum must be in.*got 0.0"),
        ({"momentum": 1.1}, "momentum must be in.*flax's 0.99 is 0.01 here"),
        ({"momentum": float("nan")}, "momentum must be in"),
        ({"eps": -1e-5}, "eps must not be negative, got -1e-05"),
        ({"eps": float("nan")}, "eps must not be negative"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"r_max": 0.5}, "r_max >= 1.*got 0.5"),
        ({"d_max": -1.0}, "d_max >= 0.*got 3.0 and -1.0"),
    ],
)
def test_bad_options_say_what_to_write(options, says):
    with pytest.raises(BatchproofError, match=says):
        Norm(**options)


def test_groups_must_divide_the_features():
    with pytest.raises(BatchproofError, match="10 features into 4 equal groups"):
        norms.init(Norm("group", groups=4), 10)


def test_every_kind_is_tested_here():
    tested = {norm.kind for norm in (*BATCH_LAYERS.values(), *ROW_LAYERS.values())}
    assert tested | {"none"} == set(KINDS)


def test_column_sums_of_mapped_batches_are_one_product_for_each():
    # Ones that all of them share would make `jax.vmap` copy the batches into one wide product.
    x = np.random.default_rng(0).normal(size=(2, 3, ROWS, FEATURES))
    x[0, 0, 0] = 0
    x[1, 2, 3, 4] = np.nan
    mapped = jax.vmap(jax.vmap(norms.column_sum))
    np.testing.assert_allclose(mapped(jnp.asarray(x)), x.sum(2), rtol=1e-12, atol=1e-12)
    products = [
        equation.params["dimension_numbers"]
        for equation in jax.make_jaxpr(mapped)(x).eqns
        if equation.primitive.name == "dot_general"
    ]
    assert [batch for _, batch in products] == [((0, 1), (0, 1))]
