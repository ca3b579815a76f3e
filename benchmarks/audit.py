"""Wall time of `batchproof audit`, whole processes, imports included.

    python benchmarks/audit.py [--rounds 5]

A TD3 of Stable-Baselines3 with batch norm in actor and critics, nets 256x256, on 2048
observations, and a PPO with NatureCNN on 256 frames of 84x84x4. One run warms the disk's cache and
is not counted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import gymnasium
import numpy as np
from gymnasium import spaces

BOUNDS = {"TD3 with batch norm": 5.0, "PPO with NatureCNN": 10.0}  # seconds


class Frames(gymnasium.Env[np.ndarray, int]):
    """Random frames of 84x84 with four channels; the action changes nothing."""

    observation_space = spaces.Box(0, 255, (84, 84, 4), np.uint8)
    action_space = spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.observation_space.sample(), 0.0, False, False, {}


def build(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Both models and their observations on disk, by the name of the comparison."""
    from stable_baselines3 import PPO, TD3

    from batchproof.sb3.policies import NormTD3Policy

    td3 = TD3(
        NormTD3Policy,
        "Pendulum-v1",
        policy_kwargs={"net_arch": [256, 256], "norm": "batch"},
        learning_starts=100,
        seed=0,
        device="cpu",
    )
    td3.learn(400)
    td3.save(folder / "td3.zip")
    rng = np.random.default_rng(0)
    angle = rng.uniform(-np.pi, np.pi, 2048)
    obs = np.stack([np.cos(angle), np.sin(angle), rng.uniform(-8, 8, 2048)], 1)
    np.save(folder / "td3.npy", obs.astype(np.float32))
    ppo = PPO("CnnPolicy", Frames(), n_steps=64, batch_size=64, n_epochs=1, seed=0, device="cpu")
    ppo.learn(64)
    ppo.save(folder / "ppo.zip")
    np.save(folder / "ppo.npy", rng.integers(0, 255, (256, 4, 84, 84), dtype=np.uint8))
    return {
        "TD3 with batch norm": (folder / "td3.zip", folder / "td3.npy"),
        "PPO with NatureCNN": (folder / "ppo.zip", folder / "ppo.npy"),
    }


def audit(model: Path, obs: Path) -> tuple[float, int]:
    """Seconds and exit code of one `batchproof audit`."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "batchproof", "audit", str(model), "--obs", str(obs)],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    if done.returncode not in (0, 1):
        raise SystemExit(f"audit of {model.name} could not run:\n{done.stderr[-2000:]}")
    return seconds, done.returncode


def main() -> None:
    args = bench.parser(__doc__.splitlines()[0]).parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subjects = build(Path(folder))
        codes = {name: audit(*paths)[1] for name, paths in subjects.items()}
        samples: dict[str, list[bench.Sample]] = {name: [] for name in subjects}
        for _ in range(args.rounds):
            for name, paths in subjects.items():
                samples[name].append({"wall_s": audit(*paths)[0]})
    rows = [
        {
            "subject": name,
            "wall_s": bench.median_of(found, "wall_s"),
            "bound_s": BOUNDS[name],
            "exit_code": codes[name],
        }
        for name, found in samples.items()
    ]
    table = "\n".join(
        [
            "| subject | median wall time | asked for | exit code |",
            "|---|---|---|---|",
            *(
                f"| {r['subject']} | {r['wall_s']:.1f} s | {r['bound_s']:.0f} s "
                f"| {r['exit_code']} |"
                for r in rows
            ),
        ]
    )
    record = {
        "rounds": args.rounds,
        "wall_s": time.perf_counter() - began,
        "rows": rows,
        "samples": samples,
    }
    bench.write(args.out, "audit", record, table + "\n")


if __name__ == "__main__":
    main()
