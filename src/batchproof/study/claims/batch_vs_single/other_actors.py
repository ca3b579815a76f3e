"""Gaps of actors that are not trained here: the notebook's, and one with dropout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchproof.lab import nets, norms
from batchproof.lab.nets import MLP, Network, Tree
from batchproof.modes import B, E, Mode, T
from batchproof.study.claims.batch_vs_single.conditions import BATCH, BATCH_SIZE, HIDDEN
from batchproof.study.claims.batch_vs_single.gaps import compiled, mean_gap

DROPOUT = 0.5


def notebook_gaps(seed: int) -> dict[str, float]:
    """The notebook's actor in three modes on one state at a time."""
    gaps = compiled(_notebook)(jax.random.key(20_000 + seed))
    return {name: float(value) for name, value in gaps.items()}


def _notebook(seed_key: Array) -> dict[str, Array]:
    """Gaps of the notebook's actor for one state: fresh, and after 200 train-mode batches."""
    keys = jax.random.split(seed_key, 4)
    actor = notebook_actor(keys[0])
    # Positions and velocities on scales of their own, three frames of eight numbers.
    mean = jnp.tile(jax.random.uniform(keys[1], (8,), minval=-5, maxval=5), 3)
    scale = jnp.tile(jax.random.uniform(keys[2], (8,), minval=0.1, maxval=5), 3)
    states = mean + scale * jax.random.normal(keys[3], (200, BATCH_SIZE, 24))

    def move(stats: Tree, batch: Array) -> tuple[Tree, None]:
        return notebook_policy(Network(actor.params, stats), batch, T)[1], None

    moved, _ = jax.lax.scan(move, actor.stats, states)
    found: dict[str, Array] = {}
    for name, stats in (("fresh", actor.stats), ("moved", moved)):
        network = Network(actor.params, stats)

        def single(mode: Mode, network: Network = network) -> Array:
            return jax.lax.map(
                lambda row: notebook_policy(network, row[None], mode)[0][0], states[0]
            )

        bypass, evaluated = single(B), single(E)
        in_batch, _ = notebook_policy(network, states[0], E)
        threes = states[0][: BATCH_SIZE // 3 * 3].reshape(-1, 3, 24)
        trained = jax.vmap(lambda x, n=network: notebook_policy(n, x, T)[0])(threes)[:, 0]
        first = slice(0, len(threes) * 3, 3)
        found |= {
            f"notebook {name} B, E": jnp.abs(bypass - evaluated).mean(),
            f"notebook {name} T of three, E": jnp.abs(trained - evaluated[first]).mean(),
            f"notebook {name} T of three, B": jnp.abs(trained - bypass[first]).mean(),
            f"notebook {name} floor": jnp.abs(in_batch - evaluated).max(),
            f"notebook {name} size": jnp.abs(evaluated).mean(),
        }
    return found


def notebook_actor(key: Array) -> Network:
    """Linear(24, 256), BN(256), ReLU, Linear(256, 128), ReLU, Linear(128, 2), tanh.

    Started as the notebook does: hidden weights uniform in +-1/sqrt(rows of the weight matrix),
    which torch lays out as (out, in), so by the width that comes out; the last layer's within
    3e-3; biases as PyTorch's.
    """
    params: dict[str, Any] = {}
    sizes = ((24, 256), (256, 128), (128, 2))
    for i, (size, width) in enumerate(sizes):
        bound = 3e-3 if i == 2 else width**-0.5
        weight_key, bias_key = jax.random.split(jax.random.fold_in(key, i))
        params[f"linear_{i}"] = {
            "weight": jax.random.uniform(weight_key, (size, width), minval=-bound, maxval=bound),
            "bias": jax.random.uniform(bias_key, (width,), minval=-1, maxval=1) * size**-0.5,
        }
    params["norm"], stats = norms.init(BATCH, 256)
    return Network(params, stats)


def notebook_policy(network: Network, obs: Array, mode: Mode) -> tuple[Array, Tree]:
    """The notebook's action (B, 2) and the statistics after the pass."""
    params = network.params

    def linear(i: int, x: Array) -> Array:
        return x @ params[f"linear_{i}"]["weight"] + params[f"linear_{i}"]["bias"]

    x, stats = norms.apply(BATCH, params["norm"], network.stats, linear(0, obs), mode)
    return jnp.tanh(linear(2, jax.nn.relu(linear(1, jax.nn.relu(x))))), stats


def dropout_gaps(seed: int, states: Array) -> dict[str, float]:
    """Dropout by mode: in eval, in train, and against the sub-network that a mask leaves."""
    rng = np.random.default_rng(seed)
    network = nets.init(jax.random.key(30_000 + seed), MLP(HIDDEN), states.shape[1], 1)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), network.params)
    obs = np.asarray(states[:BATCH_SIZE], np.float64)
    evaluated = dropout_policy(params, obs, None)
    alone = np.concatenate([dropout_policy(params, row[None], None) for row in obs])
    per_row = [rng.random((len(obs), width)) >= DROPOUT for width in HIDDEN]
    trained = dropout_policy(params, obs, per_row)
    one_by_one = np.concatenate(
        [dropout_policy(params, obs[[i]], [m[[i]] for m in per_row]) for i in range(len(obs))]
    )
    cuts = []
    for _ in range(16):
        masks = [rng.random(width) >= DROPOUT for width in HIDDEN]
        whole = dropout_policy(params, obs, masks)
        cuts.append(np.abs(whole - dropout_policy(sub_network(params, masks), obs, None)).max())
    return {
        "dropout eval floor": float(np.abs(evaluated - alone).max()),
        "dropout train, eval": mean_gap(trained, evaluated),
        "dropout companions": float(np.abs(trained - one_by_one).max()),
        "dropout sub-network": float(np.max(cuts)),
    }


def dropout_policy(params: Tree, obs: np.ndarray, masks: list[np.ndarray] | None) -> np.ndarray:
    """Actions (B,) of an MLP with inverted dropout after each ReLU, in float64 NumPy.

    Args:
        params: linear layers, as `batchproof.lab.nets` names them.
        obs: (B, O).
        masks: for each hidden layer, 1 where a unit stays: (width,) or (B, width). None is eval.
    """
    x = obs
    for i in range(len(params) - 1):
        layer = params[f"linear_{i}"]
        x = np.maximum(x @ layer["weight"] + layer["bias"], 0)
        if masks is not None:
            x = x * masks[i] / (1 - DROPOUT)
    return np.tanh(x @ params["linear_out"]["weight"] + params["linear_out"]["bias"])[:, 0]


def sub_network(params: Tree, masks: list[np.ndarray]) -> Tree:
    """The smaller network that is left when dropped units are cut out, kept ones scaled up."""
    cut: Tree = {}
    kept: np.ndarray | slice = slice(None)
    scale = 1.0
    names = [f"linear_{i}" for i in range(len(masks))] + ["linear_out"]
    for name, mask in zip(names, [*masks, None], strict=True):
        out = slice(None) if mask is None else np.flatnonzero(mask)
        cut[name] = {
            "weight": scale * params[name]["weight"][kept][:, out],
            "bias": params[name]["bias"][out],
        }
        kept, scale = out, 1 / (1 - DROPOUT)
    return cut
