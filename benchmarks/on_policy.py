"""PPO with batch norm on CartPole: the ways to use its modes, seed by seed.

    python benchmarks/on_policy.py [--seeds 5] [--steps 50000]

Stable-Baselines3's own PPO, an MLP of 64 and 64 with the norm after each hidden layer, 8
environments of 128 steps, 4 epochs, minibatches of 256. Each way is `OnPolicyModes(how)`; beside
them PPO without a norm and with layer norm. Judged is the mean return of the last 100 training
episodes, at half of the steps and at the end: actions are drawn from the policy. Nothing is
measured against time: the machine may be busy.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import bench
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from tqdm import tqdm

from batchproof import records
from batchproof.sb3 import OnPolicyModes
from batchproof.sb3.policies import NormActorCriticPolicy
from batchproof.study.statistics import difference_interval

ENV = "CartPole-v1"


class Way(NamedTuple):
    """A norm and how its modes are used."""

    label: str
    norm: str
    how: str = "library"


WAYS = {
    "none": Way("no norm", "none"),
    "library": Way("BN, `library`", "batch"),
    "train": Way("BN, `train`", "batch", "train"),
    "eval-after": Way("BN, `eval-after`", "batch", "eval-after"),
    "frozen": Way("BN, `frozen`", "batch", "frozen"),
    "preserved": Way("BN, `preserved`", "batch", "preserved"),
    "mdr": Way("BN, `mdr`", "batch", "mdr"),
    "renorm": Way("Batch Renorm, `renorm`", "renorm", "renorm"),
    "layer": Way("layer norm", "layer"),
}


class Watch(BaseCallback):
    """A row for each update."""

    def __init__(self, modes: OnPolicyModes) -> None:
        super().__init__()
        self.modes = modes
        self.rows: list[dict[str, float]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        logged = self.model.logger.name_to_value
        if "train/approx_kl" not in logged:  # nothing was learned yet
            return
        buffer: Any = self.model.ep_info_buffer
        self.rows.append(
            {
                "return": float(np.mean([info["r"] for info in buffer])),
                "entropy": -float(logged["train/entropy_loss"]),
                "update_kl": float(logged["train/approx_kl"]),
                "first_kl": self.modes.first["first_kl"],
                "refresh_kl": self.modes.refresh_kl,
            }
        )


def train(way: Way, seed: int, steps: int) -> dict[str, float]:
    """One training: its figures."""
    modes = OnPolicyModes(way.how)
    watch = Watch(modes)
    env = make_vec_env(ENV, 8, seed=seed)
    model = PPO(
        NormActorCriticPolicy, env, n_steps=128, batch_size=256, n_epochs=4, learning_rate=2.5e-4,
        ent_coef=0.01, seed=seed, device="cpu",
        policy_kwargs={"norm": way.norm, "net_arch": [64, 64]},
    )  # fmt: skip
    model.learn(steps, callback=CallbackList([modes, watch]))
    env.close()
    rows = watch.rows
    means = {
        name: float(np.mean([row[name] for row in rows]))
        for name in ("update_kl", "first_kl", "refresh_kl")
    }
    return {
        "half": rows[len(rows) // 2]["return"],
        "final": rows[-1]["return"],
        "entropy": rows[-1]["entropy"],
        **means,
    }


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| way | return, mean [lowest, highest seed] | at half | minus no norm "
        "| KL of an update | KL of its first minibatch | KL of new statistics |",
        "|---|---|---|---|---|---|---|",
    ]

    def of(key: str, name: str) -> np.ndarray:
        return np.array([run[name] for run in record["runs"][key]])

    for key, way in WAYS.items():
        final = of(key, "final")
        found = difference_interval(final, of("none", "final"))
        less = "-" if key == "none" else f"{found.mean:+.0f} [{found.lo:.0f}, {found.hi:.0f}]"
        refresh = of(key, "refresh_kl").mean()
        lines.append(
            f"| {way.label} | {final.mean():.0f} [{final.min():.0f}, {final.max():.0f}] "
            f"| {of(key, 'half').mean():.0f} | {less} | {of(key, 'update_kl').mean():.2g} "
            f"| {abs(of(key, 'first_kl').mean()):.1g} "
            f"| {f'{abs(refresh):.1g}' if way.how in ('frozen', 'preserved') else '-'} |"
        )
    lines += [
        "",
        f"{ENV}, {record['steps']:,} steps, {record['seeds']} seeds, `{record['command']}`, "
        f"{record['wall_s'] / 60:.0f} minutes on {record['machine']['cores']} of its cores "
        f"({record['machine']['processor']}). Brackets after differences are 95 % intervals.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train all and write down what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    runs: dict[str, list[dict[str, float]]] = {key: [] for key in WAYS}
    for seed, key in tqdm(list(product(range(args.seeds), WAYS)), unit=" runs"):
        runs[key].append(train(WAYS[key], seed, args.steps))
    record = {
        "command": shlex.join(["python", "benchmarks/on_policy.py", *sys.argv[1:]]),
        "machine": records.machine(),
        "seeds": args.seeds,
        "steps": args.steps,
        "wall_s": time.perf_counter() - began,
        "runs": runs,
    }
    bench.write(args.out, "on_policy", record, table(record))


if __name__ == "__main__":
    main()
