"""PPO's update on Breakout frames: our NatureCNN against the library's own.

    python benchmarks/nature_cnn.py [--rounds 5] [--quick]

Each side runs in a fresh process, in turn: one rollout of 8 games x 128 steps is collected, then
the update on it (4 epochs, minibatches of 256: 16 gradient steps) is timed. `floor` is the time
that the products of the network alone would take at the best rate of a product in torch here.
"memory kept" calls `batchproof.sb3.keep_freed_memory` first; "policy" is our `CnnPolicy`, elsewhere
it is the library's. bfloat16 is left out on a CPU without instructions for it. `--quick` prints a
rough table and writes nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import bench

from batchproof import cpu, records

ENVS, STEPS, EPOCHS, BATCH = 8, 128, 4, 256
GRADIENT_STEPS = EPOCHS * ENVS * STEPS // BATCH

SIDES: dict[str, dict[str, Any] | None] = {
    "library": None,
    "off": {},
    "off, memory kept": {},
    "off, memory kept, policy": {},
    "off, bfloat16": {"autocast": "bfloat16"},
    "off, bfloat16, memory kept": {"autocast": "bfloat16"},
    "off, bfloat16, memory kept, policy": {"autocast": "bfloat16"},
    "batch": {"norm": "batch"},
    "renorm": {"norm": "renorm"},
    "layer": {"norm": "layer"},
    "group": {"norm": "group"},
}


def network_gflop() -> float:
    """GFLOP of one minibatch, forward and backward; the first layer's input needs no gradient."""
    forward = [400 * 32 * 4 * 64, 81 * 64 * 32 * 16, 49 * 64 * 64 * 9, 3136 * 512]
    return 2 * BATCH * (3 * sum(forward) - forward[0]) / 1e9


def gemm_gflops() -> float:
    """The best rate of a float32 product in torch: of square matrices, and as a convolution.

    The first goes to MKL, the second to oneDNN.
    """
    import torch

    best = 0.0
    for size in (512, 1024, 2048):
        x = torch.randn(size, size)
        image = x.view(1, size, 1, size).permute(0, 3, 1, 2)  # rows as pixels, channels last
        for product in (
            lambda x=x: torch.mm(x, x),
            lambda x=x, image=image: torch.nn.functional.conv2d(image, x[:, :, None, None]),
        ):
            for _ in range(8):
                began = time.perf_counter()
                product()
                best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


def worker(side: str, threads: int, updates: int) -> dict[str, float]:
    """Median seconds of one update."""
    import warnings

    import torch
    from stable_baselines3 import PPO

    from batchproof.sb3 import CnnPolicy, NatureCNN, keep_freed_memory, make_atari

    if "memory kept" in side:
        keep_freed_memory()
    warnings.simplefilter("ignore")  # of bfloat16 where a CPU emulates it
    torch.set_num_threads(threads)
    options = SIDES[side]
    kwargs = {}
    if options is not None:
        kwargs = {"features_extractor_class": NatureCNN, "features_extractor_kwargs": options}
    model = PPO(
        CnnPolicy if "policy" in side else "CnnPolicy",
        make_atari("breakout", ENVS),
        n_steps=STEPS,
        batch_size=BATCH,
        n_epochs=EPOCHS,
        learning_rate=2.5e-4,
        clip_range=0.1,
        ent_coef=0.01,
        policy_kwargs=kwargs,
        seed=0,
        device="cpu",
    )
    model.learn(ENVS * STEPS)  # collects, and warms up
    spent = []
    for _ in range(updates):
        began = time.perf_counter()
        model.train()
        spent.append(time.perf_counter() - began)
    floor = GRADIENT_STEPS * network_gflop() / gemm_gflops()
    return {"update_s": statistics.median(spent), "floor_s": floor}


def main() -> None:
    parser = bench.parser(__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round of few, nothing written")
    args = parser.parse_args()
    if args.worker:
        side, threads, updates = args.worker
        print(json.dumps(worker(side, int(threads), int(updates))))
        return
    began = time.perf_counter()
    rounds = 1 if args.quick else args.rounds
    fast = cpu.has_bfloat16() is not False
    names = [name for name in SIDES if fast or "bfloat16" not in name]
    if args.quick:
        names = ["library", "off", "off, memory kept, policy", "batch"]
    updates = "1" if args.quick else "3"
    samples = bench.alternate(
        __file__, {name: [name, str(args.threads), updates] for name in names}, rounds
    )
    rows = [
        {
            "side": name,
            "update_s": bench.median_of(samples[name], "update_s"),
            "against_library": bench.median_ratio(samples["library"], samples[name], "update_s"),
            "against_off": bench.median_ratio(samples[name], samples["off"], "update_s"),
        }
        for name in names
    ]
    floor = min(sample["floor_s"] for found in samples.values() for sample in found)
    table = render(rows, floor)
    if args.quick:
        print(table)
        return
    record = {
        "versions": records.versions("torch", "stable-baselines3", "gymnasium", "ale-py"),
        "rounds": rounds,
        "threads": args.threads,
        "bfloat16": fast,
        "wall_s": time.perf_counter() - began,
        "floor_s": floor,
        "rows": rows,
        "samples": samples,
    }
    bench.write(args.out, "nature_cnn", record, table)


def render(rows: list[dict[str, Any]], floor: float) -> str:
    lines = ["| network | one PPO update | library's / this | this / off |", "|---|---|---|---|"]
    lines += [
        f"| {r['side']} | {r['update_s']:.2f} s | {r['against_library']:.2f}x "
        f"| {r['against_off']:.2f}x |"
        for r in rows
    ]
    lines.append(f"| floor: its float32 products alone | {floor:.2f} s | | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
