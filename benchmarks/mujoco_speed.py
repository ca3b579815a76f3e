"""A MuJoCo task, one seed, nets 256x256: environment steps per second, everything included.

    python benchmarks/mujoco_speed.py [--env Hopper-v5] [--agents sac] [--rounds 5] [--steps 1500]

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
WIDTH = 256


def library_worker(library: str, env_id: str, algo: str, steps: int) -> dict[str, float]:
    from importlib import import_module

    import gymnasium

    module = import_module({"sb3": "stable_baselines3", "sbx": "sbx"}[library])
    model = getattr(module, algo.upper())(
        "MlpPolicy",
        gymnasium.make(env_id),
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


def lab_worker(norm: str, env_id: str, algo: str, steps: int) -> dict[str, float]:
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
            env_id=env_id,
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


def sizes(env_id: str) -> tuple[int, int]:
    """Of an observation and an action."""
    import gymnasium

    env = gymnasium.make(env_id)
    env.close()
    return env.observation_space.shape[0], env.action_space.shape[0]


def main() -> None:
    parser = bench.parser(__doc__.splitlines()[0])
    parser.add_argument("--env", default="HalfCheetah-v5", help="a task of gymnasium[mujoco]")
    parser.add_argument("--agents", default="td3,sac", help="of td3 and sac")
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    if args.worker:
        kind, env_id, algo, steps = args.worker
        work = library_worker if kind in ("sb3", "sbx") else lab_worker
        print(json.dumps(work(kind, env_id, algo, int(steps))))
        return
    obs, action = sizes(args.env)
    began = time.perf_counter()
    rows, samples = [], {}
    for algo in args.agents.split(","):
        sides = {
            f"{kind} {algo}": [kind, args.env, algo, str(args.steps)]
            for kind in ("sb3", "sbx", "none", "batch")
        }
        found = bench.alternate(__file__, sides, args.rounds)
        samples |= found
        sb3, sbx, ours, normed = found.values()
        rate = bench.median_of(ours, "steps_per_s")
        flops = bench.update_flops(algo, obs, action, WIDTH)
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
                "replay_mib": 1_000_000 * (2 * obs + action + 2) * 4 / 2**20,
            }
        )
    record = {
        "rounds": args.rounds,
        "wall_s": time.perf_counter() - began,
        "rows": rows,
        "samples": samples,
    }
    name = args.env.split("-")[0].lower()
    bench.write(args.out, name, record, render(rows))


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
