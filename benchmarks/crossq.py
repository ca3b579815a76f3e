"""CrossQ on HalfCheetah-v5, one seed, critic 2x1024: environment steps per second, all included.

    python benchmarks/crossq.py [--rounds 5] [--steps 300] [--width 1024]

sb3-contrib, SBX and ours in turn, each in a fresh process: environment, acting, storing and
learning, timed after 200 warm-up steps. Equal networks (actor 2x256, Batch Renorm on the input and
after each ReLU), batch 256, an actor update every third step. Where the CPU has instructions for
bfloat16, ours runs a second time with ``--critic-precision bfloat16``. The floor is the time that
the matrix products of an update alone would take at the best rate that a product of that type
reaches here.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import bench

from batchproof import cpu

OURS = {"ours": "float32", "ours, bfloat16": "bfloat16"}
"""Our sides, and the precision of the critics' products."""
WARM_UP, LEARNING_STARTS = 200, 100
OBS, ACTION, ACTOR_WIDTH, BATCH = 17, 6, 256, 256


def library_worker(library: str, width: int, steps: int) -> dict[str, float]:
    from importlib import import_module

    import gymnasium

    module = import_module({"sb3": "sb3_contrib", "sbx": "sbx"}[library])
    model = module.CrossQ(
        "MlpPolicy",
        gymnasium.make("HalfCheetah-v5"),
        policy_kwargs={"net_arch": {"pi": [ACTOR_WIDTH] * 2, "qf": [width] * 2}},
        learning_rate=1e-3,
        batch_size=BATCH,
        learning_starts=LEARNING_STARTS,
        train_freq=1,
        gradient_steps=1,
        policy_delay=3,
        seed=0,
    )
    model.learn(WARM_UP)
    began = time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    return {"steps_per_s": steps / (time.perf_counter() - began)}


def lab_worker(precision: str, width: int, steps: int) -> dict[str, float]:
    from batchproof.lab.agents.crossq import RENORM, Config
    from batchproof.lab.nets import MLP
    from batchproof.lab.off_policy import Stepper
    from batchproof.lab.training import Training

    run = Stepper(
        Training(
            algo="crossq",
            config=Config(
                actor=MLP((ACTOR_WIDTH,) * 2, RENORM),
                critic=MLP((width,) * 2, RENORM, precision=precision),
            ),
            env_id="HalfCheetah-v5",
            # The replay is as large as in a run of a million steps.
            steps=1_000_000,
            learning_starts=LEARNING_STARTS,
        )
    )
    run.advance(WARM_UP)
    began = time.perf_counter()
    run.advance(WARM_UP + steps)
    seconds = time.perf_counter() - began
    return {
        "steps_per_s": steps / seconds,
        "peak_mib": bench.peak_memory_mib(),
        "gemm_gflops": bench.best_gemm_gflops(precision),
    }


def update_flops(width: int) -> float:
    """FLOP of the matrix products in one gradient step, a third of an actor update included.

    A forward pass counts once; a backward pass once more for the weights and once more for the
    inputs, but for the first layer, whose input needs no gradient, unless it contains the action.
    The joint forward pass of the two critics has two batches of rows, all of which have gradients.
    """

    def layers(rows: int, inputs: int, width: int, outputs: int) -> tuple[float, float]:
        return 2.0 * rows * inputs * width, 2.0 * rows * width * (width + outputs)

    first, rest = layers(2 * BATCH, OBS + ACTION, width, 1)
    critic_update = 2 * (2 * (first + rest) + rest)
    actor_first, actor_rest = layers(BATCH, OBS, ACTOR_WIDTH, 2 * ACTION)
    asked = sum(layers(BATCH, OBS + ACTION, width, 1))
    actor_update = 2 * (actor_first + actor_rest) + actor_rest + 2 * 2 * asked
    return critic_update + actor_first + actor_rest + actor_update / 3


def main() -> None:
    parser = bench.parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="timed environment steps")
    parser.add_argument("--width", type=int, default=1024, help="of the critics' hidden layers")
    args = parser.parse_args()
    if args.worker:
        kind, width, steps = args.worker[0], *map(int, args.worker[1:])
        ours = OURS.get(kind)
        done = lab_worker(ours, width, steps) if ours else library_worker(kind, width, steps)
        print(json.dumps(done))
        return
    began = time.perf_counter()
    sides = ["sb3", "sbx", "ours", *(["ours, bfloat16"] if cpu.has_bfloat16() else [])]
    size = [str(args.width), str(args.steps)]
    samples = bench.alternate(__file__, {kind: [kind, *size] for kind in sides}, args.rounds)
    flops = update_flops(args.width)

    def row(side: str) -> dict[str, Any]:
        ours, sb3, sbx = samples[side], samples["sb3"], samples["sbx"]
        rate = bench.median_of(ours, "steps_per_s")
        floor = bench.median_of(ours, "gemm_gflops") * 1e9 / flops
        return {
            "width": args.width,
            "precision": OURS[side],
            "sb3_contrib_steps_per_s": bench.median_of(sb3, "steps_per_s"),
            "sbx_steps_per_s": bench.median_of(sbx, "steps_per_s"),
            "ours_steps_per_s": rate,
            "times_sb3_contrib": bench.median_ratio(ours, sb3, "steps_per_s"),
            "times_sbx": bench.median_ratio(ours, sbx, "steps_per_s"),
            "gflop_per_update": flops / 1e9,
            "gemm_gflops": bench.median_of(ours, "gemm_gflops"),
            "floor_steps_per_s": floor,
            "share_of_floor": rate / floor,
            "peak_mib": bench.median_of(ours, "peak_mib"),
        }

    rows = [row(side) for side in sides if side in OURS]
    record = {
        "rounds": args.rounds,
        "wall_s": time.perf_counter() - began,
        "rows": rows,
        "samples": samples,
    }
    name = "crossq" if args.width == 1024 else f"crossq_{args.width}"
    bench.write(args.out, name, record, render(rows))


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| critic | products in | sb3-contrib steps/s | SBX steps/s | ours | times sb3-contrib "
        "| times SBX | GFLOP an update | best GEMM, GFLOP/s | products alone, steps/s | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| 2x{row['width']} | {row['precision']} | {row['sb3_contrib_steps_per_s']:.1f} "
        f"| {row['sbx_steps_per_s']:.1f} | {row['ours_steps_per_s']:.1f} "
        f"| {row['times_sb3_contrib']:.2f} | {row['times_sbx']:.2f} "
        f"| {row['gflop_per_update']:.2f} | {row['gemm_gflops']:.0f} "
        f"| {row['floor_steps_per_s']:.1f} ({row['share_of_floor']:.0%} reached) "
        f"| {row['peak_mib']:.0f} |"
        for row in rows
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
