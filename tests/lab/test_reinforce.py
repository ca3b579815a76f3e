"""REINFORCE: one update against torch's autograd and plain NumPy, and learning over seeds."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from batchproof.errors import BatchproofError
from batchproof.lab.agents import AGENTS, reinforce
from batchproof.lab.agents.reinforce import Config, Episodes
from batchproof.lab.episodic import Stepper
from batchproof.lab.nets import MLP, Network
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import Plan

S, N, OBS, A = 5, 4, 3, 2
LENGTHS = (5, 2, 1, 4)  # of the episodes


def made(seed: int = 0) -> Episodes:
    """A batch of episodes of unequal length, with rows of later ones behind their ends."""
    rng = np.random.default_rng(seed)
    alive = np.arange(S)[:, None] < np.asarray(LENGTHS)
    return Episodes(
        *(
            jnp.asarray(values, jnp.float32)
            for values in (
                rng.normal(2, 3, (S, N, OBS)),
                rng.normal(0, 1, (S, N, A)),
                rng.normal(0, 1, (S, N, A)),
                rng.normal(0, 1, (S, N)),
                alive,
            )
        )
    )


def numpy_returns(batch: Episodes, gamma: float) -> np.ndarray:
    returns = np.zeros((S, N))
    for episode, length in enumerate(LENGTHS):
        for t in range(length):
            rewards = np.asarray(batch.reward, np.float64)[t:length, episode]
            returns[t, episode] = (gamma ** np.arange(length - t) * rewards).sum()
    return returns


def test_returns_end_with_their_episode() -> None:
    batch = made()
    np.testing.assert_allclose(
        reinforce.returns_to_go(Config(gamma=0.7), batch), numpy_returns(batch, 0.7), rtol=1e-5
    )


def test_baselines() -> None:
    batch = made()
    returns = jnp.asarray(numpy_returns(batch, 0.9), jnp.float32)
    none = reinforce.advantages(Config(baseline="none"), None, batch, returns)
    np.testing.assert_array_equal(none, returns)
    mean = np.asarray(reinforce.advantages(Config(), None, batch, returns))
    # Step 1 is reached by episodes 0, 1 and 3; step 4 by episode 0 alone.
    expected = returns[1] - np.asarray(returns)[1, [0, 1, 3]].mean()
    np.testing.assert_allclose(mean[1, [0, 1, 3]], expected[np.array([0, 1, 3])], rtol=1e-5)
    np.testing.assert_allclose(mean[4, 0], 0, atol=1e-6)


def test_linear_baseline_is_a_ridge_regression_of_any_scale() -> None:
    batch = made()
    batch = batch._replace(obs=batch.obs * jnp.asarray([1e-3, 1.0, 1e4]))
    weights = reinforce.fit_baseline(batch, jnp.asarray(numpy_returns(batch, 0.9), jnp.float32))
    alive = np.asarray(batch.alive).ravel() > 0
    x = np.asarray(reinforce.features(batch), np.float64).reshape(S * N, -1)[alive]
    y = numpy_returns(batch, 0.9).ravel()[alive]
    scale = 1 / np.sqrt((x**2).mean(0))
    z = x * scale
    ridge = reinforce.RIDGE * len(z) * np.eye(z.shape[1])
    expected = z @ np.linalg.solve(z.T @ z + ridge, z.T @ y)
    np.testing.assert_allclose(x @ np.asarray(weights, np.float64), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("hidden", [(), (7,)])
@pytest.mark.parametrize("letter", ["T", "E", "S"])
def test_one_update_equals_torch_in_float64(hidden: tuple[int, ...], letter: str) -> None:
    norm = Norm("batch", "input+pre" if hidden else "input", momentum=0.3)
    config = Config(
        actor=MLP(hidden, norm),
        plan=Plan.parse(f"E{letter}EEEE"),
        gamma=0.9,
        learning_rate=0.05,
        episodes_per_update=N,
        max_grad_norm=0.5,
    )
    state = reinforce.init(config, jax.random.key(1), OBS, A)
    moved = jax.tree.map(lambda leaf: leaf + 0.3, state.actor.params)
    state = state._replace(actor=Network(moved, state.actor.stats))
    batch = made()
    after, metrics = reinforce.update(config, state, batch, jax.random.key(0), 1)

    def tensor(leaf: jax.Array) -> torch.Tensor:
        return torch.tensor(np.asarray(leaf), dtype=torch.float64, requires_grad=True)

    params = jax.tree.map(tensor, state.actor.params)
    log_std = tensor(state.log_std)
    running = jax.tree.map(lambda leaf: np.array(leaf, np.float64), state.actor.stats)

    def normalize(name: str, x: torch.Tensor) -> torch.Tensor:
        mean, var = x.mean(0), x.var(0, correction=0)
        if letter == "E":
            mean, var = (torch.tensor(running[name][k]) for k in ("mean", "var"))
        else:
            rows = len(x)
            for key, value in (("mean", mean), ("var", var * rows / (rows - 1))):
                running[name][key] += 0.3 * (value.detach().numpy() - running[name][key])
        if letter == "S":
            mean, var = mean.detach(), var.detach()
        out = (x - mean) / torch.sqrt(var + norm.eps)
        return out * params[name]["scale"] + params[name]["bias"]

    x = torch.tensor(np.asarray(batch.obs), dtype=torch.float64).reshape(S * N, OBS)
    x = normalize("norm_input", x)
    if hidden:
        x = x @ params["linear_0"]["weight"] + params["linear_0"]["bias"]
        x = torch.relu(normalize("norm_pre_0", x))
    mean = (x @ params["linear_out"]["weight"] + params["linear_out"]["bias"]).reshape(S, N, A)
    returns = numpy_returns(batch, 0.9)
    loss = torch.zeros((), dtype=torch.float64)
    action = torch.tensor(np.asarray(batch.action), dtype=torch.float64)
    density = torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(-1)
    for t in range(S):
        running_now = [e for e in range(N) if t < LENGTHS[e]]
        baseline = returns[t, running_now].mean()
        for e in running_now:
            loss = loss - density[t, e] * (returns[t, e] - baseline) / N
    loss.backward()
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-4)
    leaves = [*jax.tree.leaves(params), log_std]
    torch.nn.utils.clip_grad_norm_(leaves, 0.5)
    torch.optim.Adam(leaves, lr=0.05).step()
    found = [*jax.tree.leaves(after.actor.params), after.log_std]
    known = 0
    for value, leaf in zip(found, leaves, strict=True):
        # Adam blows the rounding of a zero gradient up: a shift below a norm in mode T has one.
        sound = np.abs(leaf.grad.numpy()) > 1e-5
        known += sound.sum()
        expected = leaf.detach().numpy()
        np.testing.assert_allclose(np.asarray(value)[sound], expected[sound], rtol=1e-3, atol=2e-4)
    assert known > 0.6 * sum(leaf.numel() for leaf in leaves)
    for name, stats in running.items():
        for key in ("mean", "var"):
            np.testing.assert_allclose(after.actor.stats[name][key], stats[key], rtol=1e-4)


def test_refresh_moves_statistics_as_an_update_does_and_nothing_else() -> None:
    config = Config(actor=MLP((), Norm("batch", "input")), episodes_per_update=N)
    state = reinforce.init(config, jax.random.key(0), OBS, A)
    learned, _ = reinforce.update(config, state, made(), jax.random.key(0), 1)
    still, _ = reinforce.refresh(config, state, made())
    for a, b in zip(*map(jax.tree.leaves, (still.actor.stats, learned.actor.stats)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(still.actor.stats["norm_input"]["mean"]).min() > 0
    for a, b in zip(*map(jax.tree.leaves, (still.actor.params, state.actor.params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gaps_are_zero_where_running_and_batch_statistics_agree() -> None:
    config = Config(actor=MLP((), Norm("batch", "input", momentum=1.0)), episodes_per_update=N)
    state = reinforce.init(config, jax.random.key(0), OBS, A)
    batch = made()
    off = reinforce.measure(config, state, batch)
    x = np.asarray(batch.obs, np.float64).reshape(-1, OBS)
    assert off["mean_gap"] == pytest.approx(np.abs(x.mean(0) / x.std(0)).mean(), rel=1e-3)
    assert off["log_var_gap"] == pytest.approx(-np.log(x.var(0)).mean(), rel=1e-3)
    same, _ = reinforce.refresh(config, state, batch)
    on = reinforce.measure(config, same, batch)
    assert on["mean_gap"] == pytest.approx(0, abs=1e-5)
    rows = len(x)  # the running variance is the unbiased one, as in torch
    assert on["log_var_gap"] == pytest.approx(math.log(rows / (rows - 1)), abs=1e-4)
    plain = reinforce.measure(Config(), reinforce.init(Config(), jax.random.key(0), OBS, A), batch)
    assert all(name.startswith("weight_length/actor/linear_") for name in plain)


LINEAR = Config(
    actor=MLP((), Norm("batch", "input")),
    plan=Plan.parse("tTEEEE"),
    learning_rate=0.03,
    gamma=0.0,
    episodes_per_update=24,
    log_std=-1.0,
)
TASK = Training(
    "reinforce",
    LINEAR,
    "batchproof/LinearOutliers-v0",
    seeds=tuple(range(8)),
    steps=240 * 80,
    learning_starts=0,
    eval_episodes=8,
)


def test_a_linear_policy_learns_the_linear_task_in_every_seed() -> None:
    """10 is perfect and a policy that does not look at the observation gets at most 0."""
    stepper = Stepper(TASK)
    stepper.advance(TASK.steps)
    assert stepper.evaluate().mean(1).min() > 8


def test_running_statistics_change_nothing_in_train_mode() -> None:
    """The training is the same to the bit whatever rho and estimator, in mode T."""
    trained = []
    for norm in (Norm("batch", "input"), Norm("batch", "input", momentum=0.95, estimator="huber")):
        config = replace(LINEAR, actor=MLP((), norm))
        stepper = Stepper(replace(TASK, config=config, seeds=(0, 1), steps=240 * 3))
        stepper.advance(240 * 3)
        trained.append(stepper.seed.agent)
    for a, b in zip(*(jax.tree.leaves(t.actor.params) for t in trained), strict=True):
        np.testing.assert_array_equal(a, b)
    means = [t.actor.stats["norm_input"]["mean"] for t in trained]
    assert (np.asarray(means[0]) != np.asarray(means[1])).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"baseline": "best"}, "use one of none, mean, linear"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"gamma": 1.5}, "gamma must be in"),
        ({"episodes_per_update": 1}, "at least 2 with baseline mean"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"log_std": float("nan")}, "log_std must be finite"),
        ({"plan": Plan.parse("TETTE")}, "slots 2 to 5 must be E"),
    ],
)
def test_impossible_settings_raise(options: dict[str, object], words: str) -> None:
    with pytest.raises(BatchproofError, match=words):
        Config(**options)


def test_it_is_registered() -> None:
    assert AGENTS["reinforce"] is reinforce
