"""What MonitorCallback costs: TD3 with batch norm, 256x256, with the callback and without.

    python benchmarks/monitor.py [--rounds 7] [--steps 3000] [--every 1000]

Each side trains in a fresh process on Pendulum-v1; the sides take turns in each round, and the
slowdown is the median over rounds of the ratio of their seconds in `learn`, after a warm-up that is
not counted. `share` is measured inside one run: seconds spent looking over the others. Less than
5 % is asked for.
"""

from __future__ import annotations

import json
import statistics
import time

import bench

BOUND = 0.05  # slowdown asked for
WARMUP_STEPS = 300  # environment steps, the first 100 without updates


def worker(side: str, steps: int, every: int, threads: int) -> None:
    """Train one side and print its seconds, how often it looked, and the seconds of that."""
    import torch
    from stable_baselines3 import TD3

    from batchproof.sb3.callback import MonitorCallback
    from batchproof.sb3.modes import set_modes
    from batchproof.sb3.policies import NormTD3Policy

    torch.set_num_threads(threads)
    looks: list[float] = []

    class Timed(MonitorCallback):
        def _look(self) -> None:
            began = time.perf_counter()
            super()._look()
            looks.append(time.perf_counter() - began)

    model = TD3(
        NormTD3Policy,
        "Pendulum-v1",
        policy_kwargs={"norm": "renorm", "net_arch": [256, 256]},
        seed=0,
        device="cpu",
    )
    set_modes(model, "TEETE")
    model.learn(WARMUP_STEPS)
    callback = Timed(every) if side == "callback" else None
    began = time.perf_counter()
    model.learn(steps, callback=callback, reset_num_timesteps=False)
    seconds = time.perf_counter() - began
    spent = sum(looks)
    record = {"seconds": seconds, "looks": len(looks), "share": spent / (seconds - spent)}
    print(json.dumps(record))


def main() -> None:
    parser = bench.parser(__doc__.splitlines()[0])
    parser.set_defaults(rounds=7)
    parser.add_argument("--steps", type=int, default=3000, help="environment steps of each run")
    parser.add_argument("--every", type=int, default=1000, help="environment steps between looks")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each run")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], *map(int, args.worker[1:]))
        return
    began = time.perf_counter()
    numbers = [str(args.steps), str(args.every), str(args.threads)]
    sides = {side: [side, *numbers] for side in ("bare", "callback")}
    samples = bench.alternate(__file__, sides, args.rounds)
    pairs = zip(samples["callback"], samples["bare"], strict=True)
    ratios = [on["seconds"] / off["seconds"] for on, off in pairs]
    row = {
        "bare_s": bench.median_of(samples["bare"], "seconds"),
        "callback_s": bench.median_of(samples["callback"], "seconds"),
        "looks": bench.median_of(samples["callback"], "looks"),
        "share": bench.median_of(samples["callback"], "share"),
        "slowdown": statistics.median(ratios) - 1,
        "bound": BOUND,
    }
    table = "\n".join(
        [
            "| without | with | looks | share of time | slowdown (median of ratios) | least, most "
            "| asked for |",
            "|---|---|---|---|---|---|---|",
            f"| {row['bare_s']:.1f} s | {row['callback_s']:.1f} s | {row['looks']:.0f} "
            f"| {100 * row['share']:.2f} % | {100 * row['slowdown']:+.1f} % "
            f"| {100 * (min(ratios) - 1):+.1f} %, {100 * (max(ratios) - 1):+.1f} % "
            f"| under {100 * BOUND:.0f} % |",
        ]
    )
    record = {
        "steps": args.steps,
        "every": args.every,
        "threads": args.threads,
        "rounds": args.rounds,
        "wall_s": time.perf_counter() - began,
        "row": row,
        "ratios": ratios,
        "samples": samples,
    }
    bench.write(args.out, "monitor", record, table + "\n")


if __name__ == "__main__":
    main()
