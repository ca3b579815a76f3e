"""Trained policies before and after their running statistics are computed anew: on which states?

    python benchmarks/recalibration.py [--tasks pendulum,halfcheetah]

Agents with batch norm are trained; then the actor's statistics are replaced, weights untouched, by
those of states drawn from the replay, and by those of the states that the policy itself visits.
Returns are of deterministic episodes that all start alike.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import bench
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from batchproof.lab import nets
from batchproof.lab.agents import AGENTS
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.off_policy import Stepper
from batchproof.lab.recalibrate import recalibrate
from batchproof.lab.training import Training
from batchproof.modes import Plan

ROWS = 4096
"""States that statistics are computed from."""
EPISODES = 5
FIRST_EPISODE = 1000
"""Seed of the first episode: none that training or evaluations use."""


@dataclass(frozen=True)
class Task:
    """Where agents are trained, and for how long."""

    env_id: str
    steps: int
    learning_starts: int
    seeds: int
    width: int
    algos: tuple[str, ...]


TASKS = {
    "pendulum": Task("Pendulum-v1", 10_000, 1000, 5, 64, ("td3", "sac", "crossq")),
    "halfcheetah": Task("HalfCheetah-v5", 25_000, 5000, 3, 256, ("crossq",)),
}


def training_of(task: Task, algo: str) -> Training:
    """CrossQ as it is; TD3 and SAC with batch norm in both networks, slot 3 in ``E``."""
    config = AGENTS[algo].Config
    widths = (task.width, task.width)
    if algo == "crossq":
        default = config()
        config = config(
            actor=MLP(widths, default.actor.norm), critic=MLP(widths, default.critic.norm)
        )
    else:
        mlp = MLP(widths, Norm("batch"))
        config = config(actor=mlp, critic=mlp, plan=Plan.parse("TEETE"), learning_rate=1e-3)
    return Training(
        algo,
        config,
        task.env_id,
        seeds=tuple(range(task.seeds)),
        steps=task.steps,
        learning_starts=task.learning_starts,
        eval_every=task.steps,
    )


def act_out(training: Training, agents: list[Any]) -> tuple[list[float], list[np.ndarray]]:
    """Mean return of each agent's deterministic episodes, and the states that they visit (N, O)."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *agents)
    key = jax.random.key(0)  # not used: no exploration
    act = jax.jit(
        jax.vmap(
            lambda agent, o: training.agent.act(training.config, agent, o, key, explore=False)[0]
        )
    )
    envs = [gymnasium.make(training.env_id) for _ in agents]
    space: Any = envs[0].action_space
    returns, visited = np.zeros(len(agents)), []
    for episode in range(EPISODES):
        obs = np.stack([env.reset(seed=FIRST_EPISODE + episode)[0] for env in envs])
        over = np.zeros(len(agents), bool)
        while not over.all():
            visited.append(obs.astype(np.float32))
            actions = np.asarray(act(stacked, jnp.asarray(obs, jnp.float32)))
            scaled = space.low + 0.5 * (actions + 1) * (space.high - space.low)
            for i, env in enumerate(envs):
                obs[i], reward, ended, cut, _ = env.step(scaled[i])
                returns[i] += 0.0 if over[i] else float(reward)
                over[i] |= ended or cut
    found = np.stack(visited, 1)  # (P, N, O)
    return (returns / EPISODES).tolist(), list(found)


def measured(task: Task, algo: str) -> dict[str, Any]:
    """Returns of each seed: as trained, and recalibrated on either kind of states."""
    training = training_of(task, algo)
    stepper = Stepper(training)
    stepper.advance(task.steps)
    mlp = nets.without_action(training.config.actor)
    seeds = [jax.tree.map(lambda leaf, i=i: leaf[i], stepper.seed) for i in range(task.seeds)]
    agents = [seed.agent for seed in seeds]
    stepper.close()
    rng = np.random.default_rng(0)

    def anew(states: list[Any]) -> list[float]:
        """With the statistics of as many of each seed's states as of any other's."""
        rows = (jnp.asarray(own[rng.choice(len(own), ROWS)]) for own in states)
        return act_out(
            training,
            [
                agent._replace(actor=recalibrate(mlp, agent.actor, part))
                for agent, part in zip(agents, rows, strict=True)
            ],
        )[0]

    before, visited = act_out(training, agents)
    replayed = [np.asarray(seed.rows[:, : stepper.obs_size]) for seed in seeds]
    return {
        "task": task.env_id,
        "algo": algo,
        "steps": task.steps,
        "norm": training.config.actor.norm.kind,
        "trained": before,
        "replay": anew(replayed),
        "visited": anew(visited),
    }


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| task | agent | actor's norm | as trained | statistics of the replay "
        "| statistics of its own states |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{statistics.fmean(row[name]):.0f} [{min(row[name]):.0f}, {max(row[name]):.0f}]"
            for name in ("trained", "replay", "visited")
        ]
        lines.append(
            f"| {row['task']}, {row['steps']} steps | {row['algo'].upper()} | `{row['norm']}` | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = bench.parser(__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"of {', '.join(TASKS)}")
    args = parser.parse_args()
    began = time.perf_counter()
    jobs = [(TASKS[name], algo) for name in args.tasks.split(",") for algo in TASKS[name].algos]
    rows = []
    with tqdm(jobs, unit=" agents", dynamic_ncols=True) as bar:
        for task, algo in bar:
            bar.set_description(f"{algo} on {task.env_id}")
            rows.append(measured(task, algo))
    record = {"rounds": 1, "wall_s": time.perf_counter() - began, "rows": rows}
    bench.write(args.out, "recalibration", record, render(rows))


if __name__ == "__main__":
    sys.exit(main())
