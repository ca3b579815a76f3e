"""How the lab's cost grows: with seeds, batch, width, replay and environment, and its memory.

    python benchmarks/growth.py [--rounds 3] [--quick]

Each point is one fresh process: SAC on Pendulum-v1 in JAX with nets 64x64, batches of 256, a replay
of 10 000 rows and ten seeds, one changed at a time; the seeds also at 256x256. The compiled
loop is timed once it is warm, environment, acting, storing and learning included. The base point
stands in every other sweep of every round, so that a drift of the machine's speed shows. Memory is
the process's largest resident size; what a seed takes is the slope over the seeds. `--quick` runs a
few points once.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import bench
import numpy as np

WARM_UP = 16  # environment steps before the clock starts, all with an update
SECONDS = 4.0  # each point is timed for about as long
MEMORY = 24 * 1024  # MiB, of the machine that the largest population is stated for

BASE: dict[str, Any] = {
    "seeds": 10, "batch": 256, "width": 64, "replay": 10_000, "env": "Pendulum-v1",
}  # fmt: skip
SWEEPS: dict[str, tuple[Any, ...]] = {
    "seeds": (1, 3, 10, 30, 100, 300, 1000),
    "wide": (1, 3, 10, 30),
    "batch": (32, 64, 128, 256, 512, 1024),
    "width": (32, 64, 128, 256, 512),
    "replay": (1000, 10_000, 100_000, 1_000_000),
    "env": (
        "batchproof/ConstantReward-v0", "Pendulum-v1", "Pendulum-v1 on the host",
        "HalfCheetah-v5 on the host",
    ),
}  # fmt: skip
QUICK: dict[str, tuple[Any, ...]] = {"seeds": (1, 10, 100), "batch": (64, 256)}
TITLES = {
    "seeds": "seeds at once",
    "wide": "seeds at once, nets 256x256",
    "batch": "batch",
    "width": "width of both hidden layers",
    "replay": "rows of replay",
    "env": "environment",
}
HOST = " on the host"


def worker(seeds: int, batch: int, width: int, replay: int, env: str) -> dict[str, float]:
    """Seed-updates per second and memory of one point."""
    from batchproof.lab.agents import sac
    from batchproof.lab.nets import MLP
    from batchproof.lab.off_policy import Stepper
    from batchproof.lab.training import Training

    mlp = MLP((width, width))
    run = Stepper(
        Training(
            algo="sac",
            config=sac.Config(actor=mlp, critic=mlp, batch_size=batch),
            env_id=env.removesuffix(HOST),
            host_env=env.endswith(HOST),
            seeds=tuple(range(seeds)),
            # As many rows as asked for are allocated, however few of them this run fills.
            steps=max(replay, 10**9),
            buffer_size=replay,
            learning_starts=1,
            eval_every=10**9,
        )
    )
    run.advance(WARM_UP)
    began = time.perf_counter()
    run.advance(2 * WARM_UP)
    per_step = (time.perf_counter() - began) / WARM_UP
    steps = max(WARM_UP, int(SECONDS / per_step))
    began = time.perf_counter()
    run.advance(2 * WARM_UP + steps)
    seconds = time.perf_counter() - began
    return {
        "updates_per_s": seeds * steps / seconds,
        "ms_per_step": 1000 * seconds / steps,
        "peak_mib": bench.peak_memory_mib(),
        "state_mib": state_mib(run.seed),
    }


def state_mib(tree: Any) -> float:
    """What one seed's arrays take by their shapes alone, in MiB."""
    import jax

    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes")]
    return sum(leaf.nbytes / len(leaf) for leaf in leaves) / 2**20


def point(sweep: str, value: Any) -> dict[str, Any]:
    if sweep == "wide":
        return BASE | {"seeds": value, "width": 256}
    return BASE | {sweep: value}


def words(setting: dict[str, Any]) -> list[str]:
    return [json.dumps(setting)]


def main() -> None:
    parser = bench.parser(__doc__.splitlines()[0])
    parser.set_defaults(rounds=3)
    parser.add_argument("--quick", action="store_true", help="a few points, once, nothing written")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(**json.loads(args.worker[0]))))
        return
    began = time.perf_counter()
    sweeps = QUICK if args.quick else SWEEPS
    sides = {}
    for name, values in sweeps.items():
        for value in values:
            sides[f"{name} {value}"] = words(point(name, value))
    samples = bench.alternate(__file__, sides, 1 if args.quick else args.rounds)
    rows = [
        row(name, value, samples[f"{name} {value}"])
        for name, values in sweeps.items()
        for value in values
    ]
    memory = memory_of(rows)
    table = render(rows, memory)
    if args.quick:
        print(table)
        return
    record = {
        "rounds": args.rounds,
        "wall_s": time.perf_counter() - began,
        "base": BASE,
        "rows": rows,
        "memory": memory,
        "samples": samples,
    }
    bench.write(args.out, "growth", record, table)


def row(sweep: str, value: Any, samples: list[bench.Sample]) -> dict[str, Any]:
    fields = ("updates_per_s", "ms_per_step", "peak_mib", "state_mib", "wall_s")
    return {"sweep": sweep, "value": value} | {f: bench.median_of(samples, f) for f in fields}


def memory_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What a seed takes, measured as a slope over the seeds, and how many fit."""
    seeds = [r for r in rows if r["sweep"] == "seeds"]
    slope, base = np.polyfit([r["value"] for r in seeds], [r["peak_mib"] for r in seeds], 1)
    return {
        "mib_per_seed": float(slope),
        "mib_of_the_process": float(base),
        "mib_per_seed_by_shapes": seeds[-1]["state_mib"],
        "largest_population": float((MEMORY - base) // slope),
    }


def render(rows: list[dict[str, Any]], memory: dict[str, float]) -> str:
    lines = []
    for sweep in dict.fromkeys(r["sweep"] for r in rows):
        lines += [
            f"| {TITLES[sweep]} | seed-updates a second | ms an environment step | peak MiB |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {r['value'] if isinstance(r['value'], str) else format(r['value'], ',')} "
            f"| {r['updates_per_s']:,.0f} | {r['ms_per_step']:.2f} | {r['peak_mib']:,.0f} |"
            for r in rows
            if r["sweep"] == sweep
        ]
        lines.append("")
    lines.append(
        f"A seed takes {memory['mib_per_seed']:.2f} MiB ({memory['mib_per_seed_by_shapes']:.2f} by "
        f"its arrays' shapes), the process without seeds {memory['mib_of_the_process']:.0f} MiB: "
        f"{memory['largest_population']:,.0f} seeds fit in 24 GiB."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
