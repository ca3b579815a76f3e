"""MADDPG beside XuanCe's: updates per second, and what both learn on two particle tasks of mpe2.

    python benchmarks/maddpg.py --xuance PYTHON [--rounds 5] [--updates 300]
    python benchmarks/maddpg.py --xuance PYTHON --learn 80000 [--seeds 5]

XuanCe pins old versions of NumPy and Gymnasium, so it lives in an environment of its own: PYTHON is
that environment's interpreter (``python -m venv xuance; xuance/bin/pip install xuance mpe2
"pyglet<2" scikit-image mpi4py``; version 1.4.4 imports the last three and does not ask for them).

Both have the same networks (two hidden layers of 64 for each agent's actor and centralized critic,
nothing shared) and the settings of the paper's authors: batches of 1024, learning rate 1e-2, tau
0.01, gamma 0.95, gradients clipped at 0.5. An update draws its batch from a replay of 100000
transitions and moves every actor, critic and target once. The sides take turns, each in a fresh
process. With ``--learn`` both train on the tasks, from 5000 steps on with batches of 256 and an
update every 25 steps, as XuanCe sets simple_spread, and are scored on 100 deterministic episodes:
the sum of all agents' returns. XuanCe steps mpe2, ours its twin in JAX.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, RATE, TAU, GAMMA, CLIP = 1024, 1e-2, 0.01, 0.95, 0.5
STORED = 100_000
LEARN_BATCH, STARTS, EVERY, EPISODE, EVALUATED = 256, 5000, 25, 25, 100  # with --learn
NOISE = 0.2  # of an action in [-1, 1]
TASKS = {
    "simple_speaker_listener": (("speaker_0", "listener_0"), (3, 11), (3, 5)),
    "simple_spread": (("agent_0", "agent_1", "agent_2"), (18, 18, 18), (5, 5, 5)),
}
SIDES = ("xuance, 1 thread", "xuance, 2 threads", "ours", "ours, 10 seeds")


def xuance_agent(task: str, seed: int, batch: int) -> Any:
    import numpy as np
    import torch
    from gymnasium.spaces import Box
    from xuance.torch.agents import MADDPG_Agents

    names, obs, actions = TASKS[task]
    config = argparse.Namespace(
        agent="MADDPG", env_name="mpe", env_id=task, learner="MADDPG_Learner",
        policy="MADDPG_Policy", representation="Basic_Identical", representation_hidden_size=[],
        actor_hidden_size=[64, 64], critic_hidden_size=[64, 64], activation="relu",
        activation_action="sigmoid", use_parameter_sharing=False, use_actions_mask=False,
        seed=seed, env_seed=seed, parallels=1, buffer_size=STORED, batch_size=batch,
        learning_rate_actor=RATE, learning_rate_critic=RATE, gamma=GAMMA, tau=TAU, start_noise=0.0,
        end_noise=0.0, sigma=0.0, start_training=0, running_steps=10**7, training_frequency=1,
        use_grad_clip=True, grad_clip_norm=CLIP, distributed_training=False, device="cpu",
        render=False, fps=50, logger="tensorboard", log_dir="batchproof-xuance/logs/",
        model_dir="batchproof-xuance/models/", test_mode=False, use_rnn=False,
        dl_toolbox="torch",
    )  # fmt: skip
    torch.manual_seed(seed)
    agent = MADDPG_Agents(
        config,
        num_agents=len(names),
        agent_keys=list(names),
        observation_space={n: Box(-np.inf, np.inf, (o,)) for n, o in zip(names, obs, strict=True)},
        action_space={n: Box(0.0, 1.0, (a,)) for n, a in zip(names, actions, strict=True)},
    )
    return agent


def xuance_store(agent: Any, obs: Any, actions: Any, rewards: Any, next_obs: Any) -> None:
    names = agent.agent_keys
    agent.memory.store(
        obs=obs,
        actions=actions,
        obs_next=next_obs,
        rewards=rewards,
        terminals=dict.fromkeys(names, False),  # episodes are cut off, which bootstraps
        agent_mask=dict.fromkeys(names, True),
    )


def xuance_speed(task: str, updates: int, threads: int) -> dict[str, float]:
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    agent = xuance_agent(task, 0, BATCH)
    names, obs, actions = TASKS[task]
    rng = np.random.default_rng(0)
    for memory, sizes in (("obs", obs), ("obs_next", obs), ("actions", actions)):
        for name, size in zip(names, sizes, strict=True):
            agent.memory.data[memory][name][:] = rng.uniform(size=(1, STORED, size))
    for name in names:
        agent.memory.data["rewards"][name][:] = rng.normal(size=(1, STORED))
        agent.memory.data["agent_mask"][name][:] = True
    agent.memory.size = STORED
    for _ in range(20):
        agent.learner.update(agent.memory.sample())
    began = time.perf_counter()
    for _ in range(updates):
        agent.learner.update(agent.memory.sample())
    return {"updates_per_s": updates / (time.perf_counter() - began)}


def xuance_learn(task: str, steps: int, seed: int) -> dict[str, float]:
    from importlib import import_module

    import numpy as np
    import torch

    torch.set_num_threads(1)
    version = {"simple_spread": 3, "simple_speaker_listener": 4}[task]
    env = import_module(f"mpe2.{task}_v{version}").parallel_env(
        continuous_actions=True, max_cycles=EPISODE
    )
    agent = xuance_agent(task, seed, LEARN_BATCH)
    names, _, sizes = TASKS[task]
    rng = np.random.default_rng(seed)

    def act(obs: Any) -> Any:
        # Its own get_actions is for one number an agent; this is what that calls.
        seen, ids, _ = agent._build_inputs([obs], None)
        with torch.no_grad():
            actions = agent.policy(observation=seen, agent_ids=ids)[1]
        return {name: actions[name].reshape(-1).numpy() for name in names}

    def explore(obs: Any, step: int) -> Any:
        if step < STARTS:
            return {
                n: rng.uniform(size=s).astype(np.float32) for n, s in zip(names, sizes, strict=True)
            }
        noisy = {n: a + NOISE / 2 * rng.normal(size=a.shape) for n, a in act(obs).items()}
        return {n: np.clip(a, 0, 1).astype(np.float32) for n, a in noisy.items()}

    began = time.perf_counter()
    obs, _ = env.reset(seed=seed)
    for step in range(steps):
        actions = explore(obs, step)
        next_obs, rewards, _, truncated, _ = env.step(actions)
        xuance_store(agent, obs, actions, rewards, next_obs)
        obs = env.reset()[0] if all(truncated.values()) else next_obs
        if step >= STARTS and (step + 1) % EVERY == 0:
            agent.learner.update(agent.memory.sample())
    trained_s = time.perf_counter() - began
    returns = []
    for episode in range(EVALUATED):
        obs, _ = env.reset(seed=10**6 + episode)
        total = 0.0
        for _ in range(EPISODE):
            obs, rewards, _, _, _ = env.step(act(obs))
            total += sum(rewards.values())
        returns.append(total)
    return {"return": float(np.mean(returns)), "trained_s": trained_s}


def our_config(batch: int) -> Any:
    from batchproof.lab.agents import maddpg

    return maddpg.Config(
        batch_size=batch, learning_rate=RATE, tau=TAU, gamma=GAMMA, max_grad_norm=CLIP,
        exploration_noise=NOISE,
    )  # fmt: skip


def our_speed(task: str, updates: int, seeds: int) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from batchproof.lab import population, replay
    from batchproof.lab.agents import maddpg
    from batchproof.lab.envs.layout import Layout

    names, obs, actions = TASKS[task]
    layout, config = Layout(names, obs, actions, "sum"), our_config(BATCH)
    mesh = population.mesh_for(seeds)

    def start(key: Any) -> Any:
        rows = replay.init(STORED, sum(obs), sum(actions), len(names))
        rows = jax.random.uniform(key, rows.shape).at[:, -sum(obs) - 1].set(0)
        return maddpg.init(config, key, layout), rows

    def update(state_and_rows: Any, step: Any) -> Any:
        state, rows = state_and_rows
        key = jax.random.fold_in(jax.random.key(0), step)
        batch = replay.sample(rows, key, jnp.asarray(STORED), BATCH, sum(obs), len(names))
        return maddpg.update(config, state, batch, key, step)[0], rows

    state = population.over_seeds(start, mesh, rare=True)(population.keys(list(range(seeds))))
    state = population.place(state, mesh)
    step_all = population.over_seeds(update, mesh, shared=(1,), donate=True)
    for step in range(20):
        state = step_all(state, step)
    jax.block_until_ready(state)
    began = time.perf_counter()
    for step in range(updates):
        state = step_all(state, step)
    jax.block_until_ready(state)
    return {"updates_per_s": seeds * updates / (time.perf_counter() - began)}


def our_learn(task: str, steps: int, seeds: int) -> dict[str, Any]:
    from batchproof.lab.loop import train
    from batchproof.lab.training import Training

    training = Training(
        "maddpg",
        our_config(LEARN_BATCH),
        f"mpe2/{task}",
        seeds=tuple(range(seeds)),
        steps=steps,
        learning_starts=STARTS,
        update_every=EVERY,
        eval_every=steps,
        eval_episodes=EVALUATED,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train(training, Path(folder), progress=False)
    returns = [seed["final_return"] for seed in result.seeds]
    return {"returns": returns, "trained_s": result.wall_s}


def work(words: list[str]) -> dict[str, Any]:
    side, kind, task, *numbers = words
    amounts = [int(number) for number in numbers]
    if side == "xuance":
        return xuance_speed(task, *amounts) if kind == "speed" else xuance_learn(task, *amounts)
    return our_speed(task, *amounts) if kind == "speed" else our_learn(task, *amounts)


def xuance_process(python: str, words: list[str]) -> dict[str, Any]:
    command = [str(Path(python).absolute()), str(Path(__file__).absolute())]
    with tempfile.TemporaryDirectory() as folder:  # it writes logs into the current one
        done = subprocess.run(
            [*command, "--worker", "xuance", *words],
            capture_output=True, text=True, check=False, cwd=folder,
        )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"XuanCe failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    if "--worker" in sys.argv:  # before anything that XuanCe's environment lacks
        print(json.dumps(work(sys.argv[sys.argv.index("--worker") + 1 :])))
        return
    import bench

    parser = bench.parser(__doc__.splitlines()[0])
    parser.add_argument("--xuance", required=True, metavar="PYTHON", help="see above")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--learn", type=int, metavar="STEPS", help="train instead of timing")
    parser.add_argument("--seeds", type=int, default=5, help="with --learn")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    found = subprocess.run(
        [args.xuance, "-c", "import importlib.metadata as m; print(m.version('xuance'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    began = time.perf_counter()
    record: dict[str, Any] = {"xuance": found.stdout.strip(), "rounds": args.rounds}
    if args.learn:
        rows = [learn_row(args, task) for task in args.tasks]
        record |= {"rounds": 1, "rows": rows, "wall_s": time.perf_counter() - began}
        bench.write(args.out, "maddpg_learning", record, render_learning(rows))
        return
    rows = [speed_row(args, task) for task in args.tasks]
    record |= {"rows": rows, "wall_s": time.perf_counter() - began}
    bench.write(args.out, "maddpg", record, render_speed(rows))


def speed_row(args: argparse.Namespace, task: str) -> dict[str, Any]:
    import bench

    samples: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        amount = str(args.updates)
        for side, threads in ((SIDES[0], "1"), (SIDES[1], "2")):
            words = ["speed", task, amount, threads]
            samples[side].append(xuance_process(args.xuance, words))
        for side, seeds in ((SIDES[2], "1"), (SIDES[3], "10")):
            words = ["ours", "speed", task, amount, seeds]
            samples[side].append(bench.run_worker(__file__, words))
    single, double, one, ten = (samples[side] for side in SIDES)
    # Whichever number of threads suits XuanCe better.
    theirs = max(single, double, key=lambda s: bench.median_of(s, "updates_per_s"))
    return {
        "task": task,
        "xuance_per_s": bench.median_of(theirs, "updates_per_s"),
        "ours_per_s": bench.median_of(one, "updates_per_s"),
        "ours_ten_seeds_per_s": bench.median_of(ten, "updates_per_s"),
        "times": bench.median_ratio(one, theirs, "updates_per_s"),
        "times_ten_seeds": bench.median_ratio(ten, theirs, "updates_per_s"),
        "samples": samples,
    }


def learn_row(args: argparse.Namespace, task: str) -> dict[str, Any]:
    import bench

    amount = str(args.learn)
    theirs = [
        xuance_process(args.xuance, ["learn", task, amount, str(seed)])
        for seed in range(args.seeds)
    ]
    ours = bench.run_worker(__file__, ["ours", "learn", task, amount, str(args.seeds)])
    return {
        "task": task,
        "steps": args.learn,
        "xuance": [sample["return"] for sample in theirs],
        "xuance_s": sum(sample["trained_s"] for sample in theirs),
        "ours": ours["returns"],
        "ours_s": ours["trained_s"],
    }


def render_speed(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| task | XuanCe, updates/s | ours, one seed | times | ours, ten seeds at once | times |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['task']} | {r['xuance_per_s']:.0f} | {r['ours_per_s']:.0f} | {r['times']:.1f} "
        f"| {r['ours_ten_seeds_per_s']:.0f} | {r['times_ten_seeds']:.1f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def render_learning(rows: list[dict[str, Any]]) -> str:
    from statistics import fmean

    lines = [
        "| task | steps | XuanCe: mean (lowest to highest) | ours | XuanCe, s | ours, s |",
        "|---|---|---|---|---|---|",
    ]

    def words(values: list[float]) -> str:
        return f"{fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    lines += [
        f"| {r['task']} | {r['steps']} | {words(r['xuance'])} | {words(r['ours'])} "
        f"| {r['xuance_s']:.0f} | {r['ours_s']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
