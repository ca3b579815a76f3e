"""Gaps of one pass: how far the action of a state moves with the mode and with its companions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchproof.lab import nets
from batchproof.lab.agents import ddpg
from batchproof.lab.nets import Network
from batchproof.modes import B, E, Mode, T
from batchproof.study.claims.batch_vs_single.conditions import (
    BATCH,
    BATCH_SIZE,
    CONDITIONS,
    DRAWS,
    FLOORS,
    HIDDEN,
    PROBES,
    SIZES,
    SYNC_SIZES,
    Condition,
    config_of,
)
from batchproof.study.claims.batch_vs_single.training import Trained


@cache
def compiled(function: Callable[..., Any], *fixed: Any) -> Callable[..., Any]:
    """``function`` with its first arguments fixed, compiled once."""
    return jax.jit(partial(function, *fixed))


def together(condition: Condition, mode: Mode, actor: Network, obs: Array) -> Array:
    """Actions (B,) of one pass over ``obs`` (B, O)."""
    return ddpg.policy(config_of(condition), actor, obs, mode)[0][:, 0]


def _alone(condition: Condition, mode: Mode, actor: Network, obs: Array) -> Array:
    """Actions (B,), each from a pass of its own."""
    return jax.lax.map(lambda row: together(condition, mode, actor, row[None])[0], obs)


def _actions(function: Any, condition: Condition, mode: Mode, actor: Any, obs: Any) -> np.ndarray:
    return np.asarray(compiled(function, condition, mode)(actor, obs))


def _cast(tree: Any, precision: str) -> Any:
    def leaf(x: Any) -> Array:
        x = np.asarray(x)
        return jnp.asarray(x.astype(precision) if x.dtype.kind == "f" else x)

    return jax.tree.map(leaf, tree)


def mean_gap(a: Any, b: Any) -> float:
    """Mean absolute difference."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).mean())


def one_pass(condition: Condition, actor: Network, states: Array) -> dict[str, float]:
    """The same states in a batch and alone, in E, T and B, in two precisions."""
    obs = states[:BATCH_SIZE]
    found = {}
    for precision in FLOORS:
        with jax.enable_x64(precision == "float64"):
            # With x64 off, 64-bit input is cast down.
            net, x = _cast((actor, obs), precision)
            batched = {m: _actions(together, condition, m, net, x) for m in (E, T, B)}
            alone = {m: _actions(_alone, condition, m, net, x) for m in (E, T, B)}
        found[f"floor {precision}"] = float(np.abs(batched[E] - alone[E]).max())
        if precision == "float32":
            found["gap T in a batch, E alone"] = mean_gap(batched[T], alone[E])
            found["gap T in a batch, T alone"] = mean_gap(batched[T], alone[T])
            found["spread of T alone"] = float(np.ptp(alone[T]))
            found["gap B, E"] = mean_gap(alone[B], alone[E])
    return found


def layer_norm_gap(layer: Trained | None, seed: int, key: Array, states: Array) -> dict[str, float]:
    """Largest gap of a layer-norm actor between a train-mode batch and alone."""
    condition = next(c for c in CONDITIONS if c.key == "layer")
    if layer is not None:
        actor = layer.agent(seed).actor
    else:
        actor = nets.init(key, config_of(condition).actor, states.shape[1], 1)
    found = {}
    for precision in FLOORS:
        with jax.enable_x64(precision == "float64"):
            net, x = _cast((actor, states[:BATCH_SIZE]), precision)
            gap = _actions(together, condition, T, net, x) - _actions(_alone, condition, E, net, x)
        found[f"layer {precision}"] = float(np.abs(gap).max())
    return found


def identical_weights(condition: Condition, actor: Network, states: Array) -> dict[str, float]:
    """Gap between a local and a target actor of identical weights, on the same states."""
    obs = states[:BATCH_SIZE]
    fresh = jax.tree.map(jnp.zeros_like, actor.stats)
    stale = {name: {**stats, "var": jnp.ones_like(stats["var"])} for name, stats in fresh.items()}
    local_t = _actions(together, condition, T, actor, obs)
    local_b = _actions(together, condition, B, actor, obs)
    target_e = _actions(together, condition, E, actor, obs)
    target_stale = _actions(together, condition, E, Network(actor.params, stale), obs)
    return {
        "twin T, E": mean_gap(local_t, target_e),
        "twin E, E": mean_gap(_actions(together, condition, E, actor, obs), target_e),
        "twin E, E never synced": mean_gap(target_e, target_stale),
        "twin B, T": mean_gap(local_b, local_t),
    }


def gap_by_size(
    condition: Condition, actor: Network, states: Array, key: Array
) -> dict[str, float]:
    """Mean gap of an action in T among N rows, from all states' statistics and from E."""
    everyone = np.asarray(compiled(together, condition, T)(actor, states))[:PROBES]
    alone = np.asarray(compiled(together, condition, E)(actor, states))[:PROBES]
    found = {}
    for size in SIZES:
        actions = np.asarray(compiled(_batch_gap, condition, size)(actor, states, key))
        found[f"gap {size}"] = mean_gap(actions, everyone)
        found[f"gap from E {size}"] = mean_gap(actions, alone)
    return found


def _batch_gap(condition: Condition, size: int, actor: Network, states: Array, key: Array) -> Array:
    """Actions (DRAWS, PROBES) in T among ``size`` - 1 companions: the first states are probes."""

    def draw(key: Array) -> Array:
        index = jax.random.randint(key, (PROBES, size - 1), 0, len(states))

        def one(probe: Array, companions: Array) -> Array:
            batch = jnp.concatenate([probe[None], states[companions]])
            return together(condition, T, actor, batch)[0]

        return jax.vmap(one)(states[:PROBES], index)

    return jax.lax.map(draw, jax.random.split(key, DRAWS))


def synchronized_gaps(actors: list[Network], populations: list[np.ndarray]) -> dict[str, list[Any]]:
    """Gaps when two processes share their batch's statistics over gloo, as SyncBN does.

    torch's own SyncBatchNorm runs on GPUs alone, so the sums are added by `all_reduce` here.
    """
    import torch.multiprocessing as processes

    arrays: dict[str, np.ndarray] = {}
    for seed, (actor, states) in enumerate(zip(actors, populations, strict=True)):
        rng = np.random.default_rng(seed)
        arrays[f"{seed} states"] = states
        for layer, params in actor.params.items():
            arrays |= {f"{seed} {layer} {name}": np.asarray(v) for name, v in params.items()}
        for size in SYNC_SIZES:
            index = rng.integers(0, len(states), (PROBES * DRAWS, size))
            index[:, 0] = np.tile(np.arange(PROBES), DRAWS)
            arrays[f"{seed} index {size}"] = index
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "in.npz", **arrays)  # type: ignore[arg-type]
        processes.spawn(synchronized_rank, (folder, len(actors)), nprocs=2)
        with np.load(Path(folder) / "out.npz") as results:
            return {name: results[name].tolist() for name in results.files}


def synchronized_rank(rank: int, folder: str, seeds: int) -> None:
    """One of two processes: half of every batch, with and without the other half's statistics."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    with np.load(Path(folder) / "in.npz") as arrays:
        data = {name: torch.as_tensor(arrays[name]).double() for name in arrays.files}
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        net = {
            name.removeprefix(f"{seed} "): value
            for name, value in data.items()
            if name.startswith(f"{seed} ")
        }

        def policy(x: torch.Tensor, shared: bool, net: dict[str, Any] = net) -> torch.Tensor:
            """Actions (D, N) in T of ``x`` (D, N, O), each of the D batches by its own sums."""
            for i in range(len(HIDDEN)):
                z = x @ net[f"linear_{i} weight"] + net[f"linear_{i} bias"]
                sums = [z.sum(1), z.square().sum(1), torch.tensor(float(z.shape[1]))]
                if shared:
                    for part in sums:
                        distributed.all_reduce(part)
                mean = sums[0] / sums[2]
                std = (sums[1] / sums[2] - mean.square() + BATCH.eps).sqrt()
                z = (z - mean[:, None]) / std[:, None]
                x = torch.relu(z * net[f"norm_pre_{i} scale"] + net[f"norm_pre_{i} bias"])
            return torch.tanh(x @ net["linear_out weight"] + net["linear_out bias"])[..., 0]

        states = net["states"]
        reference = policy(states[None], shared=False)[0, :PROBES].tile(DRAWS)
        for size in SYNC_SIZES:
            batches = states[net[f"index {size}"].long()]
            half = batches[:, : size // 2] if rank == 0 else batches[:, size // 2 :]
            gaps = {
                "sync": policy(half, shared=True)[:, 0] - reference,
                "half": policy(half, shared=False)[:, 0] - reference,
                "whole": policy(batches, shared=False)[:, 0] - reference,
            }
            for name, gap in gaps.items():
                found.setdefault(f"{name} {size}", []).append(float(gap.abs().mean()))
            error = (gaps["sync"] - gaps["whole"]).abs().max()
            found.setdefault(f"sync error {size}", []).append(float(error))
    if rank == 0:
        np.savez(Path(folder) / "out.npz", **found)  # type: ignore[arg-type]
    distributed.destroy_process_group()
