"""Constant reward: five seeds against five Stable-Baselines3 and five SBX runs, whole processes.

    python benchmarks/constant_reward.py [--rounds 5] [--widths 64 256]

Each width has a result of its own, ``constant_reward_WIDTH``. Each round runs one Stable-Baselines3
process, one SBX process and one of ours with all five seeds, imports and compilation included; five
rounds hold five runs of each library. 3000 environment steps, batch 256, learning rate 1e-3, one
update per step after 100. Ours evaluates 40 times and writes its results along the way; the others
only train. The steady state is updates per second of one run between steps 1000 and 3000 against
ours with ten seeds over as many steps; it is taken at the smallest width alone, since ten seeds at
256x256 take minutes a round.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench

STEPS = 3000
STEADY_FROM = 1000
STEADY_WIDTH = 64


def library_worker(library: str, algo: str, width: int) -> dict[str, float]:
    """One run of Stable-Baselines3 or SBX; updates per second once it is warm."""
    from importlib import import_module

    from batchproof.envs.constant_reward import ConstantRewardEnv

    module = import_module({"sb3": "stable_baselines3", "sbx": "sbx"}[library])
    model = getattr(module, algo.upper())(
        "MlpPolicy",
        ConstantRewardEnv(),
        policy_kwargs={"net_arch": [width, width]},
        learning_rate=1e-3,
        batch_size=256,
        learning_starts=100,
        train_freq=1,
        gradient_steps=1,
        seed=0,
    )
    model.learn(STEADY_FROM)
    began = time.perf_counter()
    model.learn(STEPS - STEADY_FROM, reset_num_timesteps=False)
    return {"updates_per_s": (STEPS - STEADY_FROM) / (time.perf_counter() - began)}


def training(algo: str, width: int, seeds: int, norm: str = "none") -> Any:
    """Our run of the same."""
    from batchproof.lab.agents import AGENTS
    from batchproof.lab.nets import MLP
    from batchproof.lab.norms import Norm
    from batchproof.lab.training import Training

    mlp = MLP((width, width), Norm(norm))
    return Training(
        algo=algo,
        config=AGENTS[algo].Config(actor=mlp, critic=mlp, learning_rate=1e-3),
        env_id="batchproof/ConstantReward-v0",
        seeds=tuple(range(seeds)),
        steps=STEPS,
        learning_starts=100,
    )


def lab_worker(algo: str, width: int, seeds: int) -> dict[str, float]:
    """A whole run of ours, as `batchproof train` does it."""
    from batchproof.lab.loop import train

    folder = Path(tempfile.mkdtemp())
    try:
        train(training(algo, width, seeds), folder / "run", progress=False)
    finally:
        shutil.rmtree(folder)
    return {"peak_mib": bench.peak_memory_mib()}


def steady_worker(algo: str, width: int, seeds: int) -> dict[str, float]:
    """Seed-updates per second of the compiled loop, environment included, once it is warm."""
    from batchproof.lab.off_policy import Stepper

    steps = Stepper(training(algo, width, seeds))
    steps.advance(STEADY_FROM)
    began = time.perf_counter()
    steps.advance(STEPS)
    seconds = time.perf_counter() - began
    return {
        "updates_per_s": seeds * (STEPS - STEADY_FROM) / seconds,
        "peak_mib": bench.peak_memory_mib(),
        "gemm_gflops": bench.best_gemm_gflops(),
    }


WORKERS = {"sb3": library_worker, "sbx": library_worker, "lab": lab_worker, "steady": steady_worker}


def main() -> None:
    parser = bench.parser(__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    args = parser.parse_args()
    if args.worker:
        kind, *rest = args.worker
        words = [rest[0], *map(int, rest[1:])]
        result = library_worker(kind, *words) if kind in ("sb3", "sbx") else WORKERS[kind](*words)
        print(json.dumps(result))
        return
    for width in args.widths:
        measure(width, args.rounds, args.out)


def measure(width: int, rounds: int, out: Path) -> None:
    """All sides at one width, TD3 and SAC, and its result."""
    began = time.perf_counter()
    rows, samples = [], {}
    for algo in ("td3", "sac"):
        sides = {
            f"{side} {algo} {width}": [kind, algo, str(width), *extra]
            for side, kind, extra in (
                ("sb3", "sb3", []),
                ("sbx", "sbx", []),
                ("ours, 5 seeds", "lab", ["5"]),
            )
        }
        if width <= STEADY_WIDTH:
            sides[f"ours, 10 seeds, steady {algo} {width}"] = ["steady", algo, str(width), "10"]
            sides[f"ours, 1 seed, steady {algo} {width}"] = ["steady", algo, str(width), "1"]
        found = bench.alternate(__file__, sides, rounds)
        samples |= found
        sb3, sbx, five, *steady = found.values()
        row = {
            "algo": algo,
            "width": width,
            "sb3_run_s": bench.median_of(sb3, "wall_s"),
            "sbx_run_s": bench.median_of(sbx, "wall_s"),
            "ours_five_seeds_s": bench.median_of(five, "wall_s"),
            "times_faster_than_five_sb3": bench.median_ratio(sb3, five, "wall_s", 5),
            "times_faster_than_five_sbx": bench.median_ratio(sbx, five, "wall_s", 5),
        }
        rows.append(row | (steady_figures(algo, width, sb3, sbx, *steady) if steady else {}))
    record = {
        "rounds": rounds,
        "wall_s": time.perf_counter() - began,
        "rows": rows,
        "samples": samples,
    }
    bench.write(out, f"constant_reward_{width}", record, render(rows))


def steady_figures(
    algo: str,
    width: int,
    sb3: list[bench.Sample],
    sbx: list[bench.Sample],
    ten: list[bench.Sample],
    one: list[bench.Sample],
) -> dict[str, float]:
    """Updates per second, their share of the best matrix product's rate, and memory."""
    flops = bench.update_flops(algo, 3, 1, width)
    rate = bench.median_of(ten, "updates_per_s")
    return {
        "sb3_updates_per_s": bench.median_of(sb3, "updates_per_s"),
        "sbx_updates_per_s": bench.median_of(sbx, "updates_per_s"),
        "ours_one_seed_updates_per_s": bench.median_of(one, "updates_per_s"),
        "ours_ten_seed_updates_per_s": rate,
        "steady_times_sb3": bench.median_ratio(ten, sb3, "updates_per_s"),
        "steady_times_sbx": bench.median_ratio(ten, sbx, "updates_per_s"),
        "mflop_per_update": flops / 1e6,
        "share_of_best_gemm": flops * rate / 1e9 / bench.median_of(ten, "gemm_gflops"),
        "mib_per_seed": (bench.median_of(ten, "peak_mib") - bench.median_of(one, "peak_mib")) / 9,
    }


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| agent, nets | five SB3 runs | five SBX runs | ours, 5 seeds | times SB3 | times SBX |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['algo'].upper()} {r['width']}x{r['width']} | {5 * r['sb3_run_s']:.0f} s "
        f"| {5 * r['sbx_run_s']:.0f} s | {r['ours_five_seeds_s']:.1f} s "
        f"| {r['times_faster_than_five_sb3']:.1f} | {r['times_faster_than_five_sbx']:.1f} |"
        for r in rows
    ]
    steady = [r for r in rows if "steady_times_sb3" in r]
    if not steady:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "| agent, nets | SB3 updates/s | SBX updates/s | ours, 1 seed | ours, 10 seeds "
        "(seed-updates/s) | times SB3 | times SBX | MFLOP an update | share of best GEMM "
        "| MiB a seed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['algo'].upper()} {r['width']}x{r['width']} | {r['sb3_updates_per_s']:.0f} "
        f"| {r['sbx_updates_per_s']:.0f} | {r['ours_one_seed_updates_per_s']:.0f} "
        f"| {r['ours_ten_seed_updates_per_s']:.0f} | {r['steady_times_sb3']:.1f} "
        f"| {r['steady_times_sbx']:.1f} | {r['mflop_per_update']:.0f} "
        f"| {r['share_of_best_gemm']:.0%} | {r['mib_per_seed']:.1f} |"
        for r in steady
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
