"""What the benchmarks share: fresh processes in turn, medians of ratios, one JSON and one table.

Every figure comes from a process of its own. The sides of a comparison take turns within each
round, so that a drift of the machine's speed hits all of them alike.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from batchproof import records

Sample = dict[str, float]


def run_worker(script: str, words: Sequence[str]) -> Sample:
    """Run ``script --worker WORDS`` in a fresh process.

    Returns:
        What the worker printed as JSON on its last line, and the process's ``wall_s`` in seconds.
    """
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, script, "--worker", *words], capture_output=True, text=True, check=False
    )
    wall_s = time.perf_counter() - began
    if done.returncode != 0:
        raise SystemExit(f"worker {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "wall_s": wall_s}


def alternate(script: str, sides: dict[str, Sequence[str]], rounds: int) -> dict[str, list[Sample]]:
    """Run every side once in each round, in turn: samples by side."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    with tqdm(total=rounds * len(sides), unit=" runs", dynamic_ncols=True) as bar:
        for _ in range(rounds):
            for name, words in sides.items():
                bar.set_description(name)
                samples[name].append(run_worker(script, words))
                bar.update(1)
    return samples


def median_of(samples: list[Sample], field: str) -> float:
    """Median of one field."""
    return statistics.median(sample[field] for sample in samples)


def median_ratio(a: list[Sample], b: list[Sample], field: str, factor: float = 1.0) -> float:
    """Median over rounds of factor * a / b."""
    return statistics.median(factor * x[field] / y[field] for x, y in zip(a, b, strict=True))


def peak_memory_mib() -> float:
    """Largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def best_gemm_gflops(precision: str = "float32") -> float:
    """The best rate of JAX's matrix products here, over square sizes, in GFLOP/s.

    ``precision`` is the factors'; sums are float32.
    """
    import jax
    import jax.numpy as jnp

    best = 0.0
    multiply = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    for size in (512, 1024, 2048):
        x = jnp.ones((size, size), precision)
        multiply(x, x).block_until_ready()
        for _ in range(8):
            began = time.perf_counter()
            multiply(x, x).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


def update_flops(algo: str, obs: int, action: int, width: int, batch: int = 256) -> float:
    """FLOP of the matrix products in one gradient step with two hidden layers of ``width``.

    A forward pass counts once; a backward pass once more for the weights and once more for the
    inputs, but for the first layer, whose input needs no gradient. TD3's actor is updated every
    second step and asks one critic.
    """

    def layers(inputs: int, outputs: int) -> tuple[float, float]:
        first, rest = inputs * width, width * width + width * outputs
        return 2.0 * batch * first, 2.0 * batch * rest

    critic_first, critic_rest = layers(obs + action, 1)
    actor_first, actor_rest = layers(obs, action if algo == "td3" else 2 * action)
    critic_forward, actor_forward = critic_first + critic_rest, actor_first + actor_rest
    critic_update = 2 * (2 * critic_forward + critic_forward + critic_rest)  # target, loss
    asked = 1 if algo == "td3" else 2
    # The critic's gradient with respect to the action goes through its first layer too.
    actor_update = 2 * actor_forward + actor_rest + asked * 2 * critic_forward
    return critic_update + actor_forward + (actor_update / 2 if algo == "td3" else actor_update)


def write(out: Path, name: str, record: dict[str, Any], table: str) -> None:
    """Write ``NAME.json`` and ``NAME.md`` into ``out`` and print the table."""
    records.make_folder(out)
    record = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": records.machine(),
        "versions": records.versions(
            "jax", "jaxlib", "torch", "stable-baselines3", "sbx-rl", "gymnasium", "mujoco"
        ),
        **record,
    }
    records.write_json(out / f"{name}.json", record)
    (out / f"{name}.md").write_text(table, encoding="utf-8")
    print(table)
    print(f"Written: {out / name}.json and .md")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--rounds", type=int, default=5, help="rounds, each side once in each")
    made.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    made.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    return made
