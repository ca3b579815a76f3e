"""HalfCheetah-v5, one seed, nets 256x256: environment steps per second, everything included.

    python benchmarks/half_cheetah.py [--rounds 5] [--steps 1500]

Stable-Baselines3, SBX and ours in turn, each in a fresh process: environment, acting, storing and
learning, timed after 500 warm-up steps. Ours a second time with batch norm in both networks under
the library's own mode plan.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import bench

WARM_UP = 500
OBS, ACTION, WIDTH = 17, 6, 256


def library_worker(library: str, algo: str, steps: int) -> dict[str, float]:
    from importlib import import_module

    import gymnasium

    module = import_module({"sb3": "stable_baselines3", "sbx": "sbx"}[library])
    model = getattr(module, algo.upper())(
        "MlpPolicy",
        gymnasium.make("HalfCheetah-v5"),
        policy_kwargs={"net_arch": [WIDTH, WIDTH]},
        learning_rate=3e-4,
        batch_size=256,
        learning_starts=100,
        train_freq=1,
        gradient_steps=1,
        seed=0,
    )
    model.learn(WARM_UP)
    began = time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    return {"steps_per_s": steps / (time.perf_counter() - began)}


def lab_worker(norm: str, algo: str, steps: int) -> dict[str, float]:
    from batchproof.lab.agents import AGENTS
    from batchproof.lab.nets import MLP
    from batchproof.lab.norms import Norm
    from batchproof.lab.off_policy import Stepper
    from batchproof.lab.training import Training

    mlp = MLP((WIDTH, WIDTH), Norm(norm))
    run = Stepper(
        Training(
            algo=algo,
            config=AGENTS[algo].Config(actor=mlp, critic=mlp),
            env_id="HalfCheetah-v5",
            # The replay is as large as in a run of a million steps.
            steps=1_000_000,
            learning_starts=100,
        )
    )
    run.advance(WARM_UP)
    began = time.perf_counter()
    run.advance(WARM_UP + steps)
    seconds = time.perf_counter() - began
    return {
        "steps_per_s": steps / seconds,
        "peak_mib": bench.peak_memory_mib(),
        "gemm_gflops": bench.best_gemm_gflops(),
    }


def main() -> None:
    parser = bench.parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    if args.worker:
        kind, algo, steps = args.worker
        work = library_worker if kind in ("sb3", "sbx") else lab_worker
        print(json.dumps(work(kind, algo, int(steps))))
        return
    began = time.perf_counter()
    rows, samples = [], {}
    for algo in ("td3", "sac"):
        sides = {
            f"{kind} {algo}": [kind, algo, str(args.steps)]
            for kind in ("sb3", "sbx", "none", "batch")
        }
        found = bench.alternate(__file__, sides, args.rounds)
        samples |= found
        sb3, sbx, ours, normed = found.values()
        rate = bench.median_of(ours, "steps_per_s")
        flops = bench.update_flops(algo, OBS, ACTION, WIDTH)
        rows.append(
            {
                "algo": algo,
                "sb3_steps_per_s": bench.median_of(sb3, "steps_per_s"),
                "sbx_steps_per_s": bench.median_of(sbx, "steps_per_s"),
                "ours_steps_per_s": rate,
                "times_sb3": bench.median_ratio(ours, sb3, "steps_per_s"),
                "times_sbx": bench.median_ratio(ours, sbx, "steps_per_s"),
                "batch_norm_steps_per_s": bench.median_of(normed, "steps_per_s"),
                "batch_norm_time_ratio": bench.median_ratio(ours, normed, "steps_per_s"),
                "mflop_per_update": flops / 1e6,
                "share_of_best_gemm": flops * rate / 1e9 / bench.median_of(ours, "gemm_gflops"),
                "peak_mib": bench.median_of(ours, "peak_mib"),
                "replay_mib": 1_000_000 * (2 * OBS + ACTION + 2) * 4 / 2**20,
            }
        )
    record = {
        "rounds": args.rounds,
        "wall_s": time.perf_counter() - began,
        "rows": rows,
        "samples": samples,
    }
    bench.write(args.out, "half_cheetah", record, render(rows))


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| agent | SB3 steps/s | SBX steps/s | ours | times SB3 | times SBX | with BN in both "
        "| time of BN | MFLOP an update | share of best GEMM | peak MiB (replay of 1M steps) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['algo'].upper()} | {r['sb3_steps_per_s']:.0f} | {r['sbx_steps_per_s']:.0f} "
        f"| {r['ours_steps_per_s']:.0f} | {r['times_sb3']:.2f} | {r['times_sbx']:.2f} "
        f"| {r['batch_norm_steps_per_s']:.0f} | {r['batch_norm_time_ratio']:.2f}x "
        f"| {r['mflop_per_update']:.0f} | {r['share_of_best_gemm']:.0%} "
        f"| {r['peak_mib']:.0f} ({r['replay_mib']:.0f}) |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
