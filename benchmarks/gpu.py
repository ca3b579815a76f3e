"""Many seeds on one accelerator: the constant-reward run and the HalfCheetah-size update.

    python benchmarks/gpu.py [--seeds 1 8 64 256 1024] [--rounds 3]

Runs on whatever device JAX and torch find, a CPU too, and writes down which. Two parts, every
figure from a fresh process of its own, the sides in turn:

- the SAC run of the constant-reward study (3000 steps, nets 64x64, batch norm in the critics, slot
  3 in E), whole process, for each number of seeds;
- SAC's update at HalfCheetah-v5's sizes (17 observations, 6 actions, nets 256x256, batch 256)
  from a full replay, for each number of seeds, beside one seed of Stable-Baselines3 and of SBX on
  the same device: seed-updates a second, share of the best matrix product's rate there, and how
  long a gradient step of the library takes in units of ours.

For CUDA: pip install "jax[cuda12]" and a CUDA build of torch beside 'batchproof[bench]'.
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

OBS, ACTION, WIDTH, BATCH = 17, 6, 256, 256
STORED = 10_000  # transitions of replay
SECONDS = 5.0  # each update is timed for about as long


def device() -> dict[str, str]:
    """What JAX and torch run on."""
    import jax
    import torch

    cuda = torch.cuda.is_available()
    return {
        "jax": jax.devices()[0].device_kind,
        "jax_platform": jax.devices()[0].platform,
        "torch": torch.cuda.get_device_name() if cuda else "cpu",
    }


def study_worker(seeds: int) -> dict[str, float]:
    """One condition of the constant-reward study with so many seeds, as the study runs it."""
    from batchproof.lab.loop import train
    from batchproof.study.claims import constant_reward

    condition = next(c for c in constant_reward.CONDITIONS if c.key == "slot3-E")
    folder = Path(tempfile.mkdtemp())
    try:
        training = constant_reward.training("sac", condition, seeds, 3000, ("terminated",))
        result = train(training, folder / "run", progress=False)
    finally:
        shutil.rmtree(folder)
    returns = [seed["final_return"] for seed in result.seeds]
    return {"train_s": result.wall_s, "mean_return": sum(returns) / len(returns)}


def update_worker(seeds: int) -> dict[str, float]:
    """Seed-updates per second of SAC's update, its batch drawn from the device's replay."""
    import jax
    import jax.numpy as jnp

    from batchproof.lab import population, replay
    from batchproof.lab.agents import sac
    from batchproof.lab.nets import MLP

    mlp = MLP((WIDTH, WIDTH))
    config = sac.Config(actor=mlp, critic=mlp, batch_size=BATCH)
    mesh = population.mesh_for(seeds)

    def start(key: Any) -> Any:
        rows = jax.random.normal(key, replay.init(STORED, OBS, ACTION).shape)
        rows = rows.at[:, -OBS - 1].set(0)  # nothing terminates
        actions = jnp.clip(rows[:, OBS : OBS + ACTION], -1, 1)
        return sac.init(config, key, OBS, ACTION), rows.at[:, OBS : OBS + ACTION].set(actions)

    def updates(state_and_rows: Any, first: Any, last: Any) -> Any:
        def body(step: Any, carry: Any) -> Any:
            state, rows = carry
            draw, noise = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
            batch = replay.sample(rows, draw, jnp.asarray(STORED), BATCH, OBS)
            return sac.update(config, state, batch, noise, step + 1)[0], rows

        return jax.lax.fori_loop(first, last, body, state_and_rows)

    seeds_padded = population.padded(list(range(seeds)), mesh)
    state = population.over_seeds(start, mesh, rare=True)(population.keys(seeds_padded))
    state = population.place(state, mesh)
    run = population.over_seeds(updates, mesh, shared=(1, 2), donate=True)
    state = jax.block_until_ready(run(state, 0, 4))
    began = time.perf_counter()
    state = jax.block_until_ready(run(state, 4, 8))
    count = max(4, int(SECONDS * 4 / (time.perf_counter() - began)))
    began = time.perf_counter()
    jax.block_until_ready(run(state, 8, 8 + count))
    rate = seeds * count / (time.perf_counter() - began)
    return {"updates_per_s": rate, "gemm_gflops": bench.best_gemm_gflops()}


def library_worker(library: str) -> dict[str, float]:
    """Updates per second of one seed of Stable-Baselines3 or SBX on its best device."""
    from importlib import import_module

    import gymnasium
    import numpy as np

    class Shapes(gymnasium.Env):  # HalfCheetah's shapes without its simulator
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float64)
        action_space = gymnasium.spaces.Box(-1, 1, (ACTION,), np.float32)

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return self.np_random.normal(size=OBS), {}

        def step(self, action: Any) -> Any:
            return self.np_random.normal(size=OBS), 0.0, False, False, {}

    module = import_module({"sb3": "stable_baselines3", "sbx": "sbx"}[library])
    model = module.SAC(
        "MlpPolicy",
        Shapes(),
        policy_kwargs={"net_arch": [WIDTH, WIDTH]},
        batch_size=BATCH,
        buffer_size=STORED,
        learning_starts=STORED,
        seed=0,
    )
    model.learn(STORED + 10)

    def timed(count: int) -> float:
        began = time.perf_counter()
        model.train(gradient_steps=count, batch_size=BATCH)
        synchronize()
        return time.perf_counter() - began

    def synchronize() -> None:
        if library == "sb3":
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
        else:
            import jax

            jax.block_until_ready(model.policy.actor_state.params)

    timed(50)
    # SBX compiles anew for each number of steps.
    count = 200
    timed(count)
    return {"updates_per_s": count / min(timed(count) for _ in range(3))}


def main() -> None:
    parser = bench.parser(__doc__.splitlines()[0])
    parser.set_defaults(rounds=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    args = parser.parse_args()
    if args.worker:
        kind, *rest = args.worker
        work = {
            "study": study_worker, "update": update_worker, "library": library_worker,
        }  # fmt: skip
        if kind == "device":
            print(json.dumps(device()))
        else:
            words = [int(w) if w.isdigit() else w for w in rest]
            print(json.dumps(work[kind](*words)))
        return
    began = time.perf_counter()
    sides = {"sb3": ["library", "sb3"], "sbx": ["library", "sbx"]}
    sides |= {f"update {n}": ["update", str(n)] for n in args.seeds}
    sides |= {f"study {n}": ["study", str(n)] for n in args.seeds}
    samples = bench.alternate(__file__, sides, args.rounds)
    found = bench.run_worker(__file__, ["device"])
    on = {name: str(found[name]) for name in ("jax", "jax_platform", "torch")}
    flops = bench.update_flops("sac", OBS, ACTION, WIDTH)
    rows = []
    for n in args.seeds:
        update, study = samples[f"update {n}"], samples[f"study {n}"]
        rate = bench.median_of(update, "updates_per_s")
        gemm = bench.median_of(update, "gemm_gflops")
        rows.append(
            {
                "seeds": n,
                "updates_per_s": rate,
                "share_of_best_gemm": flops * rate / 1e9 / gemm,
                "times_sb3": bench.median_ratio(update, samples["sb3"], "updates_per_s"),
                "times_sbx": bench.median_ratio(update, samples["sbx"], "updates_per_s"),
                "study_train_s": bench.median_of(study, "train_s"),
                "study_process_s": bench.median_of(study, "wall_s"),
                "study_mean_return": bench.median_of(study, "mean_return"),
            }
        )
    record = {
        "device": on,
        "rounds": args.rounds,
        "wall_s": time.perf_counter() - began,
        "mflop_per_update": flops / 1e6,
        "sb3_updates_per_s": bench.median_of(samples["sb3"], "updates_per_s"),
        "sbx_updates_per_s": bench.median_of(samples["sbx"], "updates_per_s"),
        "rows": rows,
        "samples": samples,
    }
    name = "gpu" if on["jax_platform"] == "gpu" else f"gpu_on_{on['jax_platform']}"
    bench.write(args.out, name, record, render(record))


def render(record: dict[str, Any]) -> str:
    lines = [
        f"JAX on {record['device']['jax']}, torch on {record['device']['torch']}. One seed of "
        f"Stable-Baselines3: {record['sb3_updates_per_s']:.0f} updates a second; of SBX: "
        f"{record['sbx_updates_per_s']:.0f}.",
        "",
        "| seeds at once | seed-updates/s | share of best GEMM | times SB3 | times SBX "
        "| constant reward: training | whole process |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['seeds']} | {r['updates_per_s']:,.0f} | {r['share_of_best_gemm']:.0%} "
        f"| {r['times_sb3']:.1f} | {r['times_sbx']:.1f} | {r['study_train_s']:.1f} s "
        f"| {r['study_process_s']:.1f} s |"
        for r in record["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
