"""Steps per second on Breakout with 8 games: the games alone, and whole PPO training.

    python benchmarks/atari.py [--rounds 5] [--quick]

Each side runs in one fresh process, in turn: the library's wrappers, frame stack and NatureCNN
(its `make_atari_env`), the same network in our games, our policy in our games, that with
`keep_freed_memory`, that with threads of torch that sleep soon (``GOMP_SPINCOUNT``), and that in
bfloat16 where the CPU has instructions for it. The zoo's settings: 8 games x 128 steps, 4 epochs,
minibatches of 256. `--quick` prints a rough table and writes nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import bench

from batchproof import cpu, records

ENVS, STEPS = 8, 128
SIDES = (
    "library",
    "our games",
    "our games and policy",
    "the same, memory kept",
    "the same, threads sleep soon",
    "the same, bfloat16 too",
)


def worker(side: str, threads: int, rollouts: int) -> dict[str, float]:
    """Environment steps per second: with random actions, and learning."""
    if side in SIDES[4:]:
        # Read when torch is first imported. Else its threads spin on the cores that the games need.
        os.environ["GOMP_SPINCOUNT"] = "10000"
    import numpy as np
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

    from batchproof.sb3 import CnnPolicy, keep_freed_memory, make_atari

    if side in SIDES[3:]:
        keep_freed_memory()
    torch.set_num_threads(threads)
    if side == "library":
        # The games of NoFrameskip-v4, whose id warns.
        options = {"frameskip": 1, "repeat_action_probability": 0.0}
        made = make_atari_env("ALE/Breakout-v5", n_envs=ENVS, seed=0, env_kwargs=options)
        env: Any = VecTransposeImage(VecFrameStack(made, 4))
    else:
        env = make_atari("breakout", ENVS, seed=0)
    lower = {"features_extractor_kwargs": {"autocast": "bfloat16"}}
    model = PPO(
        CnnPolicy if side in SIDES[2:] else "CnnPolicy",
        env,
        n_steps=STEPS,
        batch_size=256,
        n_epochs=4,
        learning_rate=2.5e-4,
        clip_range=0.1,
        ent_coef=0.01,
        policy_kwargs=lower if side == SIDES[5] else None,
        seed=0,
        device="cpu",
    )
    model.learn(ENVS * STEPS)  # warms up
    began = time.perf_counter()
    model.learn(rollouts * ENVS * STEPS)
    learned = rollouts * ENVS * STEPS / (time.perf_counter() - began)
    rng = np.random.default_rng(0)
    env.reset()
    began = time.perf_counter()
    for _ in range(2 * STEPS):
        env.step(rng.integers(4, size=ENVS))
    alone = 2 * ENVS * STEPS / (time.perf_counter() - began)
    return {"learning_per_s": learned, "alone_per_s": alone}


def main() -> None:
    parser = bench.parser(__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one short round, nothing written")
    args = parser.parse_args()
    if args.worker:
        side, threads, rollouts = args.worker
        print(json.dumps(worker(side, int(threads), int(rollouts))))
        return
    began = time.perf_counter()
    rounds, rollouts = (1, 1) if args.quick else (args.rounds, 4)
    names = SIDES if cpu.has_bfloat16() else SIDES[:5]
    sides = {name: [name, str(args.threads), str(rollouts)] for name in names}
    samples = bench.alternate(__file__, sides, rounds)
    rows = []
    for name, found in samples.items():
        row: dict[str, Any] = {"side": name}
        for field in ("alone_per_s", "learning_per_s"):
            row[field] = bench.median_of(found, field)
            row[f"{field}_ratio"] = bench.median_ratio(found, samples["library"], field)
        rows.append(row)
    table = render(rows)
    if args.quick:
        print(table)
        return
    record = {
        "versions": records.versions("torch", "stable-baselines3", "gymnasium", "ale-py"),
        "rounds": rounds,
        "threads": args.threads,
        "steps": rollouts * ENVS * STEPS,
        "wall_s": time.perf_counter() - began,
        "rows": rows,
        "samples": samples,
    }
    bench.write(args.out, "atari", record, table)


def render(rows: list[dict[str, Any]]) -> str:
    lines = ["| side | games alone | | PPO training | |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['side']} | {r['alone_per_s']:.0f} /s | {r['alone_per_s_ratio']:.2f}x "
        f"| {r['learning_per_s']:.0f} /s | {r['learning_per_s_ratio']:.2f}x |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
