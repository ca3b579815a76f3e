"""Batch norm and Batch Renorm, forward and backward: time against nn.BatchNorm1d.

    python benchmarks/layers.py [--rounds 5] [--quick]

Each cell, a batch's shape and a number of threads, runs in a fresh process; within it all layers
take turns, block by block. Gradients go to the input, the weight and the bias. `--quick` prints a
rough table and writes nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import bench

from batchproof import records

SHAPES = ((256, 256), (256, 2048))
THREADS = (1, 2)
CALLS = 10  # in a block


def sides(features: int) -> dict[str, Callable[..., Any]]:
    """The layers, with Batch Renorm past its warm-up."""
    from sb3_contrib.common.torch_layers import BatchRenorm1d
    from torch import nn

    from batchproof import layers

    theirs = BatchRenorm1d(features, warmup_steps=0)
    theirs.steps += 1
    folded = {**layers.CONVENTIONS["sb3-contrib"], "warmup_steps": 0}
    return {
        "torch": nn.BatchNorm1d(features),
        "batch": layers.BatchNorm1d(features),
        "renorm": layers.BatchRenorm1d(features),
        "folded": layers.BatchRenorm1d(features, **folded),
        "sb3_contrib": theirs,
    }


def worker(rows: int, features: int, threads: int, blocks: int) -> dict[str, float]:
    """Median microseconds of one forward and backward, by layer."""
    import torch

    torch.set_num_threads(threads)
    x = torch.randn(rows, features, requires_grad=True)
    cotangent = torch.randn(rows, features)
    times: dict[str, list[float]] = {}
    layers = sides(features)
    for block in range(blocks + 3):
        for name, layer in layers.items():
            inputs = (x, *layer.parameters())
            began = time.perf_counter()
            for _ in range(CALLS):
                torch.autograd.grad(layer(x), inputs, cotangent)
            if block >= 3:  # the first ones warm up
                spent = (time.perf_counter() - began) / CALLS * 1e6
                times.setdefault(name, []).append(spent)
    return {f"{name}_us": statistics.median(spent) for name, spent in times.items()}


def main() -> None:
    parser = bench.parser(__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round, nothing written")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(*(int(word) for word in args.worker))))
        return
    began = time.perf_counter()
    blocks, rounds = (30, 1) if args.quick else (50, args.rounds)
    cells = {
        f"{rows}x{features}, {threads} threads": [str(n) for n in (rows, features, threads, blocks)]
        for rows, features in SHAPES
        for threads in THREADS
    }
    samples = bench.alternate(__file__, cells, rounds)
    rows = []
    for cell, found in samples.items():
        row: dict[str, Any] = {"cell": cell, "torch_us": bench.median_of(found, "torch_us")}
        for name in ("batch", "renorm", "folded", "sb3_contrib"):
            row[f"{name}_ratio"] = statistics.median(
                sample[f"{name}_us"] / sample["torch_us"] for sample in found
            )
        rows.append(row)
    table = render(rows)
    if args.quick:
        print(table)
        return
    record = {
        "versions": records.versions("torch", "stable-baselines3", "sb3-contrib"),
        "rounds": rounds,
        "wall_s": time.perf_counter() - began,
        "rows": rows,
        "samples": samples,
    }
    bench.write(args.out, "layers", record, table)


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| batch | nn.BatchNorm1d | BatchNorm1d | BatchRenorm1d | folded | sb3-contrib |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['cell']} | {r['torch_us']:.0f} us | {r['batch_ratio']:.2f}x "
        f"| {r['renorm_ratio']:.2f}x | {r['folded_ratio']:.2f}x | {r['sb3_contrib_ratio']:.2f}x |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
