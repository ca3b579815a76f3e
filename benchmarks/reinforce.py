"""REINFORCE with a linear policy: what a run costs from 1 to 1000 seeds in one vmap.

    python benchmarks/reinforce.py [--rounds 3]

The linear task with outliers, batch norm on the input, 32 episodes of 10 steps an update, 100
updates. Each figure is from a process of its own. Compiling is what the first call takes beyond a
later one of the same length; the rate is of the compiled loop, environment included.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import bench

UPDATES = 100
EPISODES = 32
SEEDS = (1, 10, 100, 300, 1000)


def worker(seeds: int) -> dict[str, float]:
    """Seconds to compile and to run, and memory, for this many seeds."""
    from batchproof.envs.linear_outliers import EPISODE_STEPS
    from batchproof.lab.agents.reinforce import Config
    from batchproof.lab.episodic import Stepper
    from batchproof.lab.nets import MLP
    from batchproof.lab.norms import Norm
    from batchproof.lab.training import Training
    from batchproof.modes import Plan

    batch = EPISODES * EPISODE_STEPS
    config = Config(
        actor=MLP((), Norm("batch", "input")),
        plan=Plan.parse("tTEEEE"),
        episodes_per_update=EPISODES,
    )
    stepper = Stepper(
        Training(
            "reinforce",
            config,
            "batchproof/LinearOutliers-v0",
            env_options={"outlier_probability": 3e-4, "outlier_size": 1000.0},
            seeds=tuple(range(seeds)),
            steps=(2 * UPDATES + 2) * batch,
            learning_starts=0,
        )
    )
    before = bench.peak_memory_mib()
    began = time.perf_counter()
    stepper.advance(batch)
    first = time.perf_counter() - began
    began = time.perf_counter()
    stepper.advance((UPDATES + 1) * batch)
    seconds = time.perf_counter() - began
    return {
        "compile_s": first - seconds / UPDATES,
        "run_s": seconds,
        "seed_updates_per_s": seeds * UPDATES / seconds,
        "env_steps_per_s": seeds * UPDATES * batch / seconds,
        "peak_mib": bench.peak_memory_mib(),
        "grown_mib": bench.peak_memory_mib() - before,
    }


def main() -> None:
    args = bench.parser(__doc__.splitlines()[0]).parse_args()
    if args.worker:
        print(json.dumps(worker(int(args.worker[0]))))
        return
    began = time.perf_counter()
    sides = {f"{seeds} seeds": [str(seeds)] for seeds in SEEDS}
    samples = bench.alternate(__file__, sides, args.rounds)
    one = samples["1 seeds"]
    rows: list[dict[str, Any]] = []
    for seeds in SEEDS:
        found = samples[f"{seeds} seeds"]
        fields = ("compile_s", "run_s", "seed_updates_per_s", "env_steps_per_s", "wall_s")
        row = {name: bench.median_of(found, name) for name in (*fields, "peak_mib")}
        row |= {
            "seeds": seeds,
            "run_times_one_seed": bench.median_ratio(found, one, "run_s"),
            "process_times_one_seed": bench.median_ratio(found, one, "wall_s"),
        }
        rows.append(row)
    record = {
        "rounds": args.rounds,
        "updates": UPDATES,
        "wall_s": time.perf_counter() - began,
        "rows": rows,
        "samples": samples,
    }
    bench.write(args.out, "reinforce", record, render(rows))


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| seeds | whole process | compile | 100 updates | times one seed | seed-updates/s "
        "| million environment steps/s | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['seeds']} | {r['wall_s']:.1f} s | {r['compile_s']:.1f} s | {r['run_s']:.2f} s "
        f"| {r['run_times_one_seed']:.1f} | {r['seed_updates_per_s']:.0f} "
        f"| {r['env_steps_per_s'] / 1e6:.2f} | {r['peak_mib']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
