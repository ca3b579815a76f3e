"""The floor under every update: rates of square single-precision matrix products, by size.

    python benchmarks/gemm.py [--rounds 5]

JAX, as the lab calls it, and torch, in turn, each in a fresh process. A chain of products, so that
none can be left out; the best of many repetitions. An update of nets 256x256 with batch 256 is made
of products of size 256, which run well below the best rate.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import bench

SIZES = (64, 128, 256, 512, 1024)
CHAIN = 20


def best_rate(size: int, run: Callable[[], Any]) -> float:
    """GFLOP/s of ``run``, which does `CHAIN` products of ``size``, at its best."""
    run()
    best = float("inf")
    for _ in range(15):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 * CHAIN / best / 1e9


def jax_worker() -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    import batchproof.lab  # noqa: F401 (gives JAX its devices, as in every run of the lab)

    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(CHAIN):
            x = x @ w
        return x

    compiled = jax.jit(chain)
    rates = {}
    for size in SIZES:
        w = jnp.full((size, size), 1 / size)
        rates[str(size)] = best_rate(size, lambda w=w: compiled(w, w).block_until_ready())
    return rates


def torch_worker() -> dict[str, float]:
    import torch

    def chain(w: torch.Tensor) -> torch.Tensor:
        x = w
        for _ in range(CHAIN):
            x = x @ w
        return x

    rates = {}
    for size in SIZES:
        w = torch.full((size, size), 1 / size)
        rates[str(size)] = best_rate(size, lambda w=w: chain(w))
    return rates


def main() -> None:
    parser = bench.parser(__doc__.splitlines()[0])
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(jax_worker() if args.worker == ["jax"] else torch_worker()))
        return
    began = time.perf_counter()
    samples = bench.alternate(__file__, {"jax": ["jax"], "torch": ["torch"]}, args.rounds)
    rows = [
        {"size": size, **{k: bench.median_of(v, str(size)) for k, v in samples.items()}}
        for size in SIZES
    ]
    lines = ["| size | JAX GFLOP/s | torch GFLOP/s |", "|---|---|---|"]
    lines += [f"| {r['size']} | {r['jax']:.0f} | {r['torch']:.0f} |" for r in rows]
    record = {
        "rounds": args.rounds,
        "wall_s": time.perf_counter() - began,
        "rows": rows,
        "samples": samples,
    }
    bench.write(args.out, "gemm", record, "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
