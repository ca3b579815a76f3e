"""Cells of a pixel study: Stable-Baselines3's own PPO on an Atari game, a process each.

A cell is one seed of one condition in a folder of its own, on one thread of torch, so that as many
cells as there are cores run side by side. A finished cell is read back, an unfinished one starts
anew: a cell takes minutes.

    python -m batchproof.study.pixels FOLDER PARENT

trains the cell that ``FOLDER/cell.json`` describes and ends with the process PARENT, which started
it; `run_cells` writes that file and starts the processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.memory import keep_freed_memory
from batchproof.records import write_columns

FRAMES = 4
"""Frames of the game to one agent step: each action is repeated."""

PACKAGES = (
    "torch", "stable-baselines3", "gymnasium", "ale-py", "numpy", "scipy", "matplotlib"
)  # fmt: skip
"""Packages whose versions matter."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
POLL_S = 0.5
AUDITED_ROWS = 256  # observations of the last rollout that the clinic looks at


@dataclass(frozen=True)
class Cell:
    """One training: PPO with the settings of the public zoo's Atari runs.

    Attributes:
        name: also its folder's.
        norm: of the convolutions, a name in `batchproof.layers.LAYERS`.
        how: how modes are used, of `batchproof.sb3.on_policy.HOW`.
        seed: of the networks, the environments and the draws.
        steps: agent steps, all environments together; whole rollouts are collected.
        horizon: agent steps over which learning rate and clip range fall linearly to 0.
        learning_rate: at the start.
        game: its name in ale-py.
        n_envs: environments.
        n_steps: agent steps of each environment in a rollout.
        batch_size: rows of a minibatch.
        n_epochs: of each update.
        games: whole games that the final policy plays, actions drawn from it.
        audit: whether the clinic looks at the final policy.
        autocast: what the network computes in, of `batchproof.sb3.NatureCNN`.
    """

    name: str
    norm: str
    how: str
    seed: int
    steps: int
    horizon: int
    learning_rate: float = 2.5e-4
    game: str = "breakout"
    n_envs: int = 8
    n_steps: int = 128
    batch_size: int = 256
    n_epochs: int = 4
    games: int = 30
    audit: bool = False
    autocast: str | None = None


class Result(NamedTuple):
    """What a cell gave: columns with a row for each rollout, and its record."""

    metrics: dict[str, np.ndarray]
    record: dict[str, Any]


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    progress: bool,
    workers: int | None = None,
    budget_s: float | None = None,
) -> dict[str, Result]:
    """Train the cells, each in ``out/cells/NAME``; finished ones are read back.

    Args:
        cells: in the order in which they start.
        out: the study's folder.
        progress: show a bar over the agent steps of all cells.
        workers: processes side by side; None for one a core.
        budget_s: seconds after which no cell is started; those that run are waited for.

    Returns:
        The finished cells by name: all of them without a budget.

    Raises:
        BatchproofError: a folder holds a cell of other settings, or a training failed.
    """
    folders = {cell.name: out / "cells" / cell.name for cell in cells}
    waiting = deque(cell for cell in cells if not _is_finished(cell, folders[cell.name]))
    workers = records.machine()["cores"] if workers is None else workers
    steps = sum(cell.steps for cell in cells)
    done = steps - sum(cell.steps for cell in waiting)
    running: dict[str, tuple[Cell, subprocess.Popen[bytes]]] = {}
    end = np.inf if budget_s is None else time.monotonic() + budget_s
    left: list[Cell] = []
    bar = tqdm(total=steps, initial=done, unit="step", disable=not progress, smoothing=0)
    with bar:
        try:
            while waiting or running:
                if time.monotonic() >= end:
                    left += waiting
                    waiting.clear()
                while waiting and len(running) < workers:
                    cell = waiting.popleft()
                    running[cell.name] = (cell, _start(cell, folders[cell.name]))
                time.sleep(POLL_S)
                for name, (cell, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[name]
                    if process.returncode != 0:
                        raise BatchproofError(_complaint(name, folders[name]))
                    for kind in ("cell.json", "log", "step"):
                        (folders[name] / kind).unlink(missing_ok=True)
                    done += cell.steps
                under_way = sum(_step(folders[name]) for name in running)
                bar.set_postfix_str(", ".join(running), refresh=False)
                bar.update(max(0, min(done + under_way, steps) - bar.n))
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
    return {cell.name: read_cell(folders[cell.name]) for cell in cells if cell not in left}


def read_cell(folder: Path) -> Result:
    """A finished cell."""
    metrics = records.read_columns(folder / "metrics.parquet")
    return Result(metrics, records.read_json(folder / "run.json"))


def _is_finished(cell: Cell, folder: Path) -> bool:
    path = folder / "run.json"
    if not path.is_file():
        return False
    run = records.read_json(path)
    if not isinstance(run, dict) or "cell" not in run:
        raise BatchproofError(f"{path}: not a run record; delete it or choose another --out")
    # A setting that is not in the record is newer than it and has its default; numbers as JSON has
    # them, so that equal settings are equal.
    defaults = {f.name: f.default for f in fields(Cell) if f.default is not MISSING}
    if defaults | run["cell"] != records.to_json(asdict(cell)):
        raise BatchproofError(
            f"{folder} holds a run with other settings: choose another --out, or delete that folder"
        )
    return True


def _start(cell: Cell, folder: Path) -> subprocess.Popen[bytes]:
    records.make_folder(folder)
    records.write_json(folder / "cell.json", asdict(cell))
    (folder / "step").unlink(missing_ok=True)
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "batchproof.study.pixels", str(folder), str(os.getpid())],
            env=os.environ | ONE_THREAD,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _step(folder: Path) -> int:
    try:
        return int((folder / "step").read_text() or 0)
    except (OSError, ValueError):  # not written yet
        return 0


def _complaint(name: str, folder: Path) -> str:
    lines = (folder / "log").read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no word"
    return f"the training {name} failed ({last}); see {folder / 'log'}, and run again to resume"


# --- in the cell's own process ---------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Train the cell in a folder, unless the process that started this one ends before."""
    import torch

    keep_freed_memory()
    torch.set_num_threads(1)
    folder, parent = Path(argv[0]), int(argv[1])
    train(Cell(**records.read_json(folder / "cell.json")), folder, parent)
    return 0


def train(cell: Cell, folder: Path, parent: int) -> Result:
    """Train, play the final games, let the clinic look; write it all down.

    Training stops once this process is not a child of ``parent`` any more.

    Writes ``metrics.parquet``, then ``run.json``, whose presence says that the cell is finished;
    with ``audit`` also ``audit.json`` and ``channels.json``.
    """
    from stable_baselines3.common.callbacks import CallbackList

    from batchproof.sb3 import OnPolicyModes

    records.make_folder(folder)
    began = time.perf_counter()
    model = make_model(cell)
    modes = OnPolicyModes(cell.how)
    recorder = _recorder(modes, folder, parent)
    try:
        model.learn(cell.steps, callback=CallbackList([modes, recorder]))
    finally:
        model.get_env().close()
    scores, lengths = play(model, cell)
    looked = examine(model, folder) if cell.audit else {}
    metrics = {
        name: np.array([row[name] for row in recorder.rows], dtype=float)
        for name in recorder.rows[0]
    }
    write_columns(folder / "metrics.parquet", metrics)
    record = {
        "cell": asdict(cell),
        "score": float(np.mean(scores)),
        "scores": scores,
        "lengths": lengths,
        "clinic": looked,
        "wall_s": time.perf_counter() - began,
        "versions": records.versions(*PACKAGES),
        "machine": records.machine(),
        "git_sha": records.git_sha(),
    }
    records.write_json(folder / "run.json", record)
    return Result(metrics, records.to_json(record))


def make_model(cell: Cell) -> Any:
    """PPO as the zoo runs it, with `NatureCNN` as the features extractor."""
    from stable_baselines3 import PPO

    from batchproof.sb3 import NatureCNN, make_atari

    def falling(start: float) -> Any:
        # The library counts down from 1 over this run, the schedule over its own horizon.
        return lambda left: max(0.0, start * (1.0 - (1.0 - left) * cell.steps / cell.horizon))

    return PPO(
        "CnnPolicy",
        make_atari(cell.game, cell.n_envs, seed=cell.seed),
        learning_rate=falling(cell.learning_rate),
        n_steps=cell.n_steps,
        batch_size=cell.batch_size,
        n_epochs=cell.n_epochs,
        clip_range=falling(0.1),
        ent_coef=0.01,
        vf_coef=0.5,
        policy_kwargs={
            "features_extractor_class": NatureCNN,
            "features_extractor_kwargs": {"norm": cell.norm, "autocast": cell.autocast},
        },
        seed=cell.seed,
        device="cpu",
    )


def play(model: Any, cell: Cell) -> tuple[list[float], list[int]]:
    """Raw scores and lengths (frames) of whole games, actions drawn from the policy."""
    from stable_baselines3.common.evaluation import evaluate_policy

    from batchproof.sb3 import make_atari

    env = make_atari(cell.game, cell.n_envs, seed=10_000 + cell.seed, training=False)
    scores: Any
    lengths: Any
    try:
        scores, lengths = evaluate_policy(
            model,
            env,
            n_eval_episodes=cell.games,
            deterministic=False,
            return_episode_rewards=True,
        )
    finally:
        env.close()
    return [float(score) for score in scores], [int(length) for length in lengths]


def examine(model: Any, folder: Path) -> dict[str, Any]:
    """The clinic's findings on the final policy, from observations of the last rollout."""
    import json

    from batchproof.clinic import formats
    from batchproof.clinic.channels import channels
    from batchproof.clinic.rules import audit
    from batchproof.sb3 import subject_from_model

    stored = model.rollout_buffer.observations
    flat = stored.reshape(-1, *model.observation_space.shape)
    rows = flat[np.linspace(0, len(flat) - 1, min(AUDITED_ROWS, len(flat))).astype(int)]
    subject = subject_from_model(model, obs=rows)
    report = audit(subject)
    records.write_json(folder / "audit.json", json.loads(formats.to_json(report)))
    found = channels(subject)
    records.write_json(folder / "channels.json", [layer.to_json() for layer in found])
    return {
        "outcomes": {code: outcome.status.value for code, outcome in report.outcomes.items()},
        "seconds": report.seconds,
        "channels_off": {layer.name: int(layer.off.sum()) for layer in found},
        "channels": {layer.name: len(layer.off) for layer in found},
    }


def _recorder(modes: Any, folder: Path, parent: int) -> Any:
    """A callback with a row for each update."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Recorder(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[dict[str, float]] = []
            self.began = self.ended = self.ended_cpu = 0.0

        def _on_rollout_start(self) -> None:
            self._close()
            self.began = time.perf_counter()

        def _on_rollout_end(self) -> None:
            self.ended = time.perf_counter()
            self.ended_cpu = time.process_time()

        def _on_training_end(self) -> None:
            self._close()

        def _close(self) -> None:
            """The row of the update that has just ended, if any."""
            model: Any = self.model
            if self.ended <= self.began:
                return
            logged = model.logger.name_to_value
            last = [info["r"] for info in model.ep_info_buffer]
            self.rows.append(
                {
                    "step": float(model.num_timesteps),
                    "score": float(np.mean(last)) if last else float("nan"),
                    "games": float(len(last)),
                    "approx_kl": float(logged.get("train/approx_kl", np.nan)),
                    "clip_fraction": float(logged.get("train/clip_fraction", np.nan)),
                    "value_loss": float(logged.get("train/value_loss", np.nan)),
                    "entropy": -float(logged.get("train/entropy_loss", np.nan)),
                    **modes.first,
                    "collect_s": self.ended - self.began,
                    "update_s": time.perf_counter() - self.ended,
                    # What else the machine does hardly touches it.
                    "update_cpu_s": time.process_time() - self.ended_cpu,
                }
            )
            (folder / "step").write_text(str(model.num_timesteps))
            self.began = self.ended

        def _on_step(self) -> bool:
            if os.getppid() != parent:
                raise SystemExit("the study that started this training has ended")
            return True

    return Recorder()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
