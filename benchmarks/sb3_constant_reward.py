"""Batch norm in the critic on a constant-reward environment, in Stable-Baselines3 itself.

Every observation is [0, 0, 0] and the reward is the action, so the best return of a 30-step
episode is 30. TD3 and SAC are trained in three conditions:

    none     no batch norm
    library  batch norm after each hidden Linear of both critics, run as the library runs it:
             the critic normalizes with the batch's statistics inside the actor's loss
    cure     the same network, but inside the actor's loss, and there alone, the critic
             normalizes with its running statistics

With the batch's statistics, shifting every action of the batch by one delta leaves every
critic output as it was, so the actor's gradient has no component along a common shift; with a
constant observation a deterministic actor can move in no other way. `kappa` below measures
that component, `slope` its size at the actor's own actions.

A mode plan is five letters, one for each pass of the update: actor in its loss, actor on the
next observation, critic in the actor's loss, critic on replayed actions, critic in the TD
target. T is the batch's statistics, E the running ones.

    python benchmarks/sb3_constant_reward.py --seeds 5

Runs are kept one by one in DIR/sb3.json; running the same command again does only those missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import nn
from tqdm import tqdm

EPISODE_STEPS = 30
NET_ARCH = [64, 64]
LEARNING_RATE = 1e-3
LEARNING_STARTS = 100  # environment steps; the default of Stable-Baselines3
EVAL_EVERY = 250  # environment steps
PROBE_BATCH = 256  # transitions
RUN_FIELDS = ("returns", "kappas", "slopes", "bn_updates", "curves", "wall_s")


class ConstantReward(gym.Env[np.ndarray, np.ndarray]):
    """Observation always zeros, reward = action, fixed length.

    Args:
        ending: flag raised on the last of the 30 steps, `"terminated"` or `"truncated"`.
    """

    observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, ending: str) -> None:
        self.ending = ending
        self.t = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        last = self.t == EPISODE_STEPS
        terminated = last and self.ending == "terminated"
        return np.zeros(3, np.float32), float(action[0]), terminated, last and not terminated, {}


# ------------------------------------------------------------------------------------- critics


@contextmanager
def running_statistics(module: nn.Module) -> Iterator[None]:
    """Run the forwards inside with running statistics, then restore the module's mode."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


class BatchNormCritic(ContinuousCritic):
    """The library's critic with Linear-BatchNorm1d-ReLU in place of Linear-ReLU."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space, action_space, net_arch, features_extractor, features_dim, **kwargs
        )
        in_dim = features_dim + action_space.shape[0]
        for i in range(self.n_critics):
            layers = create_mlp(in_dim, 1, net_arch, post_linear_modules=[nn.BatchNorm1d])
            self.q_networks[i] = nn.Sequential(*layers)
            # `q_networks` is a plain list, which torch does not look into: the name under which
            # the library registered its own network must be given to the new one as well.
            setattr(self, f"qf{i}", self.q_networks[i])


class CuredCritic(BatchNormCritic):
    """The same critic, with running statistics in the actor's loss and nowhere else.

    The actor's loss is the only pass whose actions carry a gradient: replayed actions are data,
    and the TD target is computed without gradients. TD3 calls `q1_forward` there and SAC
    `forward`. Batch norm fixes its mode in the forward, so the later backward follows it.
    """

    def forward(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        if not actions.requires_grad:
            return super().forward(obs, actions)
        with running_statistics(self):
            return super().forward(obs, actions)

    def q1_forward(self, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        with running_statistics(self):
            return super().q1_forward(obs, actions)


def policy_with(base: type[Any], critic_class: type[ContinuousCritic]) -> type[Any]:
    """The library's policy `base` with its critics built from `critic_class`."""

    class Policy(base):
        def make_critic(
            self, features_extractor: BaseFeaturesExtractor | None = None
        ) -> ContinuousCritic:
            kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
            return critic_class(**kwargs).to(self.device)

    return Policy


ALGOS: dict[str, tuple[type[TD3] | type[SAC], type[Any]]] = {
    "td3": (TD3, TD3Policy),
    "sac": (SAC, SACPolicy),
}
CRITICS = {"none": ContinuousCritic, "library": BatchNormCritic, "cure": CuredCritic}
MODES = {
    ("td3", "library"): "TETTE",
    ("td3", "cure"): "TEETE",
    ("sac", "library"): "TTTTE",
    ("sac", "cure"): "TTETE",
}


# ------------------------------------------------------------------------------------ measures


def episode_return(model: TD3 | SAC, ending: str) -> float:
    """Undiscounted return of one episode of the deterministic policy, in [-30, 30]."""
    env = ConstantReward(ending)
    obs, _ = env.reset()
    total, done = 0.0, False
    while not done:
        action, _ = model.predict(obs, deterministic=True)
        obs, reward, terminated, truncated, _ = env.step(action)
        total += reward
        done = terminated or truncated
    return total


def action_gradient(model: TD3 | SAC, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Gradient (B, A) of the batch mean of Q, taken as the actor's loss takes it.

    Works on a float64 copy of the critic in train mode, as `train()` leaves it before the
    actor's loss: the model's statistics and modes stay as they are, and an exact zero is told
    apart from float32 rounding. Q is the first critic in TD3 and the smaller of both in SAC.
    """
    critic = copy.deepcopy(model.critic).double()
    critic.set_training_mode(True)
    actions = actions.detach().double().requires_grad_(True)
    if isinstance(model, TD3):
        q = critic.q1_forward(obs, actions)
    else:
        q = th.cat(critic(obs, actions), dim=1).min(dim=1).values
    return th.autograd.grad(q.mean(), actions)[0]


def gradient_measures(model: TD3 | SAC) -> tuple[float | None, float]:
    """`kappa` and `slope` on one batch of the replay buffer.

    Returns:
        kappa: |sum_i dQ/da_i| / sum_i |dQ/da_i| in [0, 1] at the replayed actions, which
            differ from row to row; at TD3's own actions, all alike, a train-mode critic gives
            0/0. `None` where no gradient is left at all.
        slope: sum_i dQ/da_i at the actor's own actions, that is the change of mean Q per unit
            of a common shift of the action. Its true value is 1: the reward is the action.
    """
    assert model.replay_buffer is not None
    data = model.replay_buffer.sample(PROBE_BATCH)
    replayed = action_gradient(model, data.observations, data.actions)
    total = replayed.abs().sum().item()
    kappa = abs(replayed.sum().item()) / total if total > 0 else None
    own = action_gradient(model, data.observations, model.actor(data.observations))
    return kappa, own.sum().item()


def train_one(algo: str, condition: str, seed: int, steps: int, ending: str) -> dict[str, Any]:
    """Train one agent for `steps` environment steps and measure it.

    Returns:
        One value for each of `RUN_FIELDS`: the final return, `kappa` and `slope` as
        `gradient_measures` gives them, the updates of the first batch norm's running statistics
        per update of the critic (`None` without batch norm), the returns at `eval_steps`, and
        the seconds taken.
    """
    start = time.perf_counter()
    algo_class, base_policy = ALGOS[algo]
    model = algo_class(
        policy_with(base_policy, CRITICS[condition]),
        ConstantReward(ending),
        learning_rate=LEARNING_RATE,
        learning_starts=LEARNING_STARTS,
        policy_kwargs={"net_arch": NET_ARCH},
        seed=seed,
        device="cpu",
    )
    curve = [episode_return(model, ending)]
    for before, after in zip(eval_steps(steps), eval_steps(steps)[1:], strict=False):
        model.learn(after - before, reset_num_timesteps=False)
        curve.append(episode_return(model, ending))
    kappa, slope = gradient_measures(model)
    norms = [module for module in model.critic.modules() if isinstance(module, nn.BatchNorm1d)]
    bn_updates = int(norms[0].num_batches_tracked or 0) / model._n_updates if norms else None
    measured = (curve[-1], kappa, slope, bn_updates, curve, time.perf_counter() - start)
    return dict(zip(RUN_FIELDS, measured, strict=True))


def eval_steps(steps: int) -> list[int]:
    """Environment steps at which the policy is evaluated: 0, 250, ..., and the last."""
    return [*range(0, steps, EVAL_EVERY), steps]


# ------------------------------------------------------------------------------------- records


def cpu_model() -> str:
    """Name of the processor, as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def empty_record(args: argparse.Namespace) -> dict[str, Any]:
    """A record without runs: what must be equal for runs to be kept in one file."""
    return {
        "benchmark": "sb3_constant_reward",
        "command": "",
        "wall_s": 0.0,
        "settings": {
            "steps": args.steps,
            "ending": args.ending,
            "net_arch": NET_ARCH,
            "learning_rate": LEARNING_RATE,
            "learning_starts": LEARNING_STARTS,
            "probe_batch": PROBE_BATCH,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": th.__version__,
            "stable_baselines3": stable_baselines3.__version__,
            "gymnasium": gym.__version__,
            "numpy": np.__version__,
        },
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "torch_threads": args.threads,
            "device": "cpu",
        },
        "eval_steps": eval_steps(args.steps),
        "rows": [],
    }


def load_record(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The record in `path`, or an empty one.

    Raises:
        ValueError: the file is not such a record, or holds runs made differently.
    """
    fresh = empty_record(args)
    if not path.exists():
        return fresh
    try:
        record = json.loads(path.read_text())
        parts = {key: record[key] for key in ("settings", "versions", "machine", "rows")}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no record of this benchmark; choose another --out") from None
    for part in ("settings", "versions", "machine"):
        for key, value in fresh[part].items():
            if parts[part].get(key) != value:
                raise ValueError(
                    f"{path} holds runs with {key} = {parts[part].get(key)}, now {value}; "
                    "choose another --out"
                )
    return record


def row_of(record: dict[str, Any], algo: str, condition: str) -> dict[str, Any]:
    """The row of one algorithm and condition, added to the record if it has none yet."""
    for row in record["rows"]:
        if (row["algo"], row["condition"]) == (algo, condition):
            return row
    row = {"algo": algo, "condition": condition, "modes": MODES.get((algo, condition))}
    row |= {field: [] for field in ("seeds", *RUN_FIELDS)}
    record["rows"].append(row)
    return row


def add_run(row: dict[str, Any], seed: int, run: dict[str, Any]) -> None:
    """Append one finished run to its row."""
    row["seeds"].append(seed)
    for field, value in run.items():
        row[field].append(value)


def command_of(record: dict[str, Any], out: Path) -> str:
    """The command that gives every run in the record; a folder outside is named alone."""
    algos = [algo for algo in ALGOS if any(row["algo"] == algo for row in record["rows"])]
    settings, machine = record["settings"], record["machine"]
    words = ["python", "benchmarks/sb3_constant_reward.py"]
    words += ["--seeds", str(max(max(row["seeds"]) + 1 for row in record["rows"]))]
    words += ["--steps", str(settings["steps"]), "--algos", *algos, "--ending", settings["ending"]]
    words += ["--threads", str(machine["torch_threads"])]
    return shlex.join([*words, "--out", out.name if out.is_absolute() else out.as_posix()])


def table(record: dict[str, Any]) -> str:
    """Markdown: one line for each algorithm and condition."""
    settings, machine, versions = record["settings"], record["machine"], record["versions"]
    seen = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Constant reward in Stable-Baselines3",
        "",
        f"Episodes end as `{settings['ending']}`; {settings['steps']} environment steps; "
        "best return 30.",
        "",
        f"    {record['command']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} torch thread(s), "
        f"{record['wall_s']:.0f} s in all. {seen}.",
        "",
        "| algorithm | condition | modes | mean return | returns, one per seed "
        "| largest kappa | smallest kappa | mean slope | statistics updates |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        kappas = [kappa for kappa in row["kappas"] if kappa is not None]
        updates = [update for update in row["bn_updates"] if update is not None]
        cells = [
            row["algo"].upper(),
            row["condition"],
            row["modes"] or "-",
            f"{statistics.fmean(row['returns']):.1f}",
            " ".join(f"{value:.1f}" for value in row["returns"]),
            f"{max(kappas):.1e}" if kappas else "-",
            f"{min(kappas):.1e}" if kappas else "-",
            f"{statistics.fmean(row['slopes']):.2g}",
            f"{statistics.fmean(updates):.2f}" if updates else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Returns: one deterministic episode after training. kappa: |sum dQ/da| / sum |dQ/da| over "
        f"{settings['probe_batch']} replayed actions, the critic as in the actor's loss. slope: "
        "change of mean Q per unit of a common shift of the actor's own actions (true value 1). "
        "Statistics updates: of the first critic, per critic update.",
        "",
    ]
    return "\n".join(lines)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a stop, sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def save(record: dict[str, Any], out: Path) -> None:
    """Bring the record's totals up to date and write `sb3.json` and `sb3.md`."""
    record["rows"].sort(
        key=lambda row: (list(ALGOS).index(row["algo"]), list(CRITICS).index(row["condition"]))
    )
    record["wall_s"] = sum(sum(row["wall_s"]) for row in record["rows"])
    record["command"] = command_of(record, out)
    write_atomically(out / "sb3.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_atomically(out / "sb3.md", table(record))


# ---------------------------------------------------------------------------------------- main


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse and check the options; exits with code 2 and one line where one is wrong."""
    parser = OneLineParser(
        description="TD3 and SAC of Stable-Baselines3 with batch norm in the critic, "
        "on an environment whose reward is the action.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N-1")
    parser.add_argument("--steps", type=int, default=3000, help="environment steps of each run")
    parser.add_argument("--algos", nargs="+", choices=list(ALGOS), default=list(ALGOS))
    parser.add_argument("--ending", choices=["terminated", "truncated"], default="terminated")
    parser.add_argument(
        "--out", type=Path, default=Path("results/constant-reward-sb3"), metavar="DIR"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    if args.steps <= LEARNING_STARTS + 1:
        parser.error(
            f"--steps must be over {LEARNING_STARTS + 1}, where learning starts; got {args.steps}"
        )
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    if not os.access(args.out, os.W_OK):
        parser.error(f"--out {args.out}: not writable")
    try:
        args.record = load_record(args.out / "sb3.json", args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    """Do the runs that the record lacks, saving after each."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    th.set_num_threads(args.threads)
    wanted = [
        (algo, condition, seed)
        for seed in range(args.seeds)
        for algo in ALGOS
        if algo in args.algos
        for condition in CRITICS
    ]
    done = {
        (row["algo"], row["condition"], seed)
        for row in args.record["rows"]
        for seed in row["seeds"]
    }
    missing = [run for run in wanted if run not in done]
    bar = tqdm(missing, total=len(wanted), initial=len(wanted) - len(missing), unit="run")
    for algo, condition, seed in bar:
        bar.set_description(f"{algo} {condition} seed {seed}")
        run = train_one(algo, condition, seed, args.steps, args.ending)
        add_run(row_of(args.record, algo, condition), seed, run)
        save(args.record, args.out)
    print((args.out / "sb3.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
