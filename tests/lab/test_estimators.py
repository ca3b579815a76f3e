"""Estimators: the lab's against the NumPy formulas, what the registry says of them, the page."""

import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from batchproof import estimators as formulas
from batchproof import layers
from batchproof.errors import BatchproofError
from batchproof.estimators import ESTIMATORS, Batch
from batchproof.lab import estimators, nets, norms
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.passes import Batch as Transitions
from batchproof.lab.passes import policy_q, replay_and_target_q
from batchproof.modes import E, Mode, Plan, S, T

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")
RESULT = ROOT / "results" / "benchmarks" / "estimators.json"


@pytest.fixture(autouse=True, scope="module")
def _float64():
    # Nearly all the time goes into compiling, so compile fast.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def draw(seed, rows=64, features=5):
    """Rows with outliers, a drift, a constant feature and one that is 0 on most rows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0.1 * seed, rng.uniform(0.5, 3, features), (rows, features))
    x[rng.random(x.shape) < 0.03] += 40
    x[:, -2] = 2.5
    x[:, -1] = np.maximum(x[:, -1] - 2, 0)
    return x


def equal(actual, desired, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=tolerance, atol=tolerance)


def move(name, state, x, rho, count, unbiased=True):
    """One batch by the NumPy formula."""
    bessel = len(x) / (len(x) - 1) if unbiased and len(x) > 1 else 1.0
    batch = Batch(x.mean(0), x.var(0) * bessel, x, count, bessel)
    return ESTIMATORS[name].update(*state, batch, rho)


# The lab, torch and NumPy are one


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("kind", "rho", "variance"), [("batch", 0.1, "unbiased"), ("renorm", 1.0, "biased")]
)
def test_lab_torch_and_numpy_are_one(name, kind, rho, variance):
    norm = Norm(kind, momentum=rho, running_variance=variance, estimator=name)
    params, stats = norms.init(norm, 5)
    options = {"momentum": rho, "running_variance": variance, "estimator": name}
    layer = layers.create_norm(kind, 5, **options).double()
    state = np.zeros(5), np.ones(5)
    for count, (rows, mode) in enumerate([(64, T), (64, S), (20, T), (1, T), (64, T)], start=1):
        x = draw(count, rows)
        y, stats = norms.apply(norm, params, stats, jnp.asarray(x), mode)
        same = layer(torch.tensor(x), mode=mode)
        state = move(name, state, x, rho, count, variance == "unbiased")
        equal(stats["mean"], state[0])
        equal(stats["var"], state[1], 1e-10)
        equal(layer.running_mean, state[0], 1e-9)
        equal(layer.running_var, state[1], 1e-9)
        equal(y, same.detach(), 1e-9)
        assert stats["count"] == count == layer.num_batches_tracked
    x = draw(9)
    y, after = norms.apply(norm, params, stats, jnp.asarray(x), E)
    equal(y, (x - state[0]) / np.sqrt(state[1] + norm.eps), 1e-9)
    assert after is stats


def test_names_and_refusal():
    assert list(estimators.ESTIMATORS) == list(ESTIMATORS) == list(layers.ESTIMATORS)
    assert Norm().estimator == "ema"
    with pytest.raises(BatchproofError, match="unknown estimator 'mean': use one of ema, debiased"):
        Norm("batch", estimator="mean")


@pytest.mark.parametrize(
    ("kind", "name"), [*(("batch", name) for name in ESTIMATORS), ("renorm", "winsorized")]
)
def test_no_gradient_flows_into_statistics_nor_out_of_the_output(name, kind):
    norm, plain = Norm(kind, estimator=name), Norm(kind)
    params, stats = norms.init(norm, 5)
    x = jnp.asarray(draw(0))

    def output(x, norm):
        return (norms.apply(norm, params, stats, x, T)[0] ** 3).sum()

    def statistics(x):
        new = norms.apply(norm, params, stats, x, T)[1]
        return new["mean"].sum() + new["var"].sum()

    equal(jax.grad(output)(x, norm), jax.grad(output)(x, plain))
    assert not jax.grad(statistics)(x).any()
    for quiet in ("t", "s", "E", "B"):
        assert norms.apply(norm, params, stats, x, Mode(quiet))[1] == stats


@pytest.mark.parametrize("name", ["chan", "winsorized", "median-of-means"])
def test_joint_and_mixed_passes(name):
    """J and M: the estimator sees the concatenated batch."""
    mlp = MLP((8,), Norm("batch", placement="input", estimator=name))
    critics = nets.init_critics(jax.random.key(0), mlp, 3, 2, 2)
    rng = np.random.default_rng(0)
    obs, action, next_obs, other = (
        jnp.asarray(rng.normal(i, 1 + i, (64, size))) for i, size in enumerate((3, 2, 3, 2))
    )
    batch = Transitions(obs, action, jnp.zeros(64), next_obs, jnp.zeros(64))
    plan = Plan.parse("TEMJJ")
    joint = replay_and_target_q(mlp, critics, None, batch, other, plan).stats
    mixed = policy_q(mlp, critics, batch, other, Mode("M"))[1]
    rows = {
        "joint": np.concatenate([np.hstack([obs, action]), np.hstack([next_obs, other])]),
        "mixed": np.concatenate([np.hstack([obs, other]), np.hstack([obs, action])]),
    }
    for which, stats in (("joint", joint), ("mixed", mixed)):
        mean, var = move(name, (np.zeros(5), np.ones(5)), rows[which], 0.1, 1)
        for critic in (0, 1):
            equal(stats["norm_input"]["mean"][critic], mean)
            equal(stats["norm_input"]["var"][critic], var)


# What the registry says


def spoilt(name, share_of_rows=0.0, share_of_batches=0.0, size=1e6, batches=300, rows=256):
    """|mean| after clean N(0, 1) batches with some rows, or batches, of a given size."""
    rng = np.random.default_rng(0)
    state = np.zeros(1), np.ones(1)
    for count in range(1, batches + 1):
        x = rng.normal(size=(rows, 1))
        x[: round(share_of_rows * rows)] = size
        # The first batch is clean: Huber takes it whole.
        if count > 1 and rng.random() < share_of_batches:
            x[0] = size
        state = move(name, state, x, 0.1, count)
    return abs(float(state[0][0]))


@pytest.mark.parametrize("name", ["ema", "debiased", "cumulative", "chan"])
def test_averages_break_down_at_one_row(name):
    assert ESTIMATORS[name].breakdown.startswith("0")
    assert spoilt(name, share_of_rows=1 / 256) > 1000


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 2, 9, 64])
def test_the_median_is_one_of_the_rows_to_the_last_bit(rows, dtype):
    """As a sort has it, infinities, ties, signed zeros, tiny numbers and NaN included."""
    rng = np.random.default_rng(rows)
    x = rng.normal(0, 3, (rows, 40)).astype(dtype)
    odd = [np.inf, -np.inf, 0.0, -0.0, np.finfo(dtype).tiny, -np.finfo(dtype).max, np.nan, -np.nan]
    x[rng.random(x.shape) < 0.3] = 1.5
    x[:, 8:24] = rng.choice(np.array(odd, dtype), (rows, 16))
    found = np.asarray(jax.jit(estimators._lower_median)(jnp.asarray(x)))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.sort(x, axis=0)[(rows - 1) // 2])


def test_winsorized_breaks_down_at_half_of_the_rows():
    assert ESTIMATORS["winsorized"].breakdown.startswith("1/2 of a batch's rows")
    assert spoilt("winsorized", share_of_rows=0.45) < 20
    assert spoilt("winsorized", share_of_rows=0.55) > 1e5


def test_huber_breaks_down_at_half_of_the_batches():
    assert ESTIMATORS["huber"].breakdown.startswith("1/2 of the batches")
    assert spoilt("huber", share_of_batches=0.3) < 0.3
    # From there on it moves a bounded step a batch, without end: further with more batches.
    assert spoilt("huber", share_of_batches=0.7, batches=1200) > 100


def test_median_of_means_stands_four_rows():
    assert ESTIMATORS["median-of-means"].breakdown.startswith("4 rows")
    assert spoilt("median-of-means", share_of_rows=4 / 256) < 0.5
    assert spoilt("median-of-means", share_of_rows=5 / 256) > 1000


@pytest.mark.parametrize("name", ESTIMATORS)
def test_lag_behind_a_drift(name):
    """Batches behind a mean that moves by g sigma a batch, at the end of t batches."""
    rho, t, rows = 0.2, 120, 64
    drift = 0.2 * 3 * rho / math.sqrt(rows)  # a fifth of what Huber can follow
    noise = np.random.default_rng(0).normal(size=(rows, 1000))
    state = np.zeros(1000), np.ones(1000)
    for count in range(1, t + 1):
        x = np.roll(noise, 7 * count, axis=1) + drift * count
        state = move(name, state, x, rho, count)
    lag = (drift * t - state[0].mean()) / drift
    said = (t - 1) / 2 if name == "cumulative" else (1 - rho) / rho
    assert (formulas.EMA_LAG in ESTIMATORS[name].lag) == (name != "cumulative")
    assert lag == pytest.approx(said, abs=0.6)


def test_huber_cannot_follow_a_faster_drift():
    rho, rows = 0.1, 64
    limit = 3 * rho / math.sqrt(rows)
    state, lags = (np.zeros(1), np.ones(1)), []
    rng = np.random.default_rng(0)
    for count in range(1, 601):
        state = move("huber", state, rng.normal(2 * limit * count, 1, (rows, 1)), rho, count)
        lags.append(2 * limit * count - state[0][0])
    assert lags[599] - lags[299] == pytest.approx(300 * limit, rel=0.05)


def test_median_variance_of_normal_rows():
    for rows in (4, 7, 28, 113):
        x = np.random.default_rng(rows).normal(size=(rows, 20_000))
        assert formulas.median_variance(rows) == pytest.approx(
            np.median(x.var(0, ddof=1)), rel=0.02
        )


@pytest.mark.parametrize(("rows", "number"), [(1, 1), (11, 1), (12, 3), (32, 7), (36, 9), (999, 9)])
def test_blocks(rows, number):
    assert formulas.blocks(rows) == number


# The page


def table(header):
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_page_lists_the_registry():
    expected = [
        [f"`{name}`", known.breakdown, known.lag, known.choose]
        for name, known in ESTIMATORS.items()
    ]
    assert table("estimator") == expected


def test_the_pages_code_runs():
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, namespace)
    assert namespace["torch_layer"].estimator == namespace["lab_layer"].estimator == "winsorized"


def test_the_page_has_the_measured_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(
        "score_estimators", ROOT / "benchmarks" / "estimators.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    assert script.filled(PAGE, record) == PAGE
    assert set(record["scores"][0]["mean_error"]) == {*ESTIMATORS, "recalibration"}


def test_a_norm_is_replaced_whole():
    """Frozen and hashable with an estimator, so static under jit."""
    assert hash(replace(Norm("batch"), estimator="chan")) != hash(Norm("batch"))
