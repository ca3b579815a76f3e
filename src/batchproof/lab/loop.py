"""A run and its folder: train, evaluate, save, resume.

How the seeds are stepped is the agent's kind: its module names it in ``STEPPER``, a row of
`STEPPERS`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from batchproof import records, run_record
from batchproof.errors import BatchproofError
from batchproof.lab import checkpoint, episodic, off_policy
from batchproof.lab.load import up_to_date
from batchproof.lab.training import NOT_DIVERGED, Training

STEPPERS: dict[str, Any] = {"off_policy": off_policy.Stepper, "episodic": episodic.Stepper}
"""What steps all seeds of a run, by the name in an agent's ``STEPPER``."""


Stop = Callable[[int, Sequence[float]], bool]
"""Told how many environment steps are done and each seed's return; True stops the run there."""


class Result(NamedTuple):
    """What a run gave."""

    metrics: dict[str, np.ndarray]  # columns, a row for each evaluation and seed
    seeds: list[dict[str, Any]]  # for each: seed, status, diverged_at, final_return
    wall_s: float  # of all calls together, each up to the checkpoint where the next went on
    agents: tuple[str, ...] = ()  # their names, where there are several


def train(
    training: Training,
    out: Path,
    *,
    progress: bool = True,
    label: str = "",
    tensorboard: bool = False,
    checkpoint_seconds: float = 60.0,
    command: str = "",
    stop: Stop | None = None,
) -> Result:
    """Train every seed and leave ``run.json``, ``metrics.parquet`` and ``checkpoint/`` in ``out``.

    A run that was stopped, by any means, continues at its last checkpoint and gives the same
    result as if it never stopped. A finished one is read back.

    Args:
        training: what to run.
        out: the run's folder.
        progress: show a bar on standard error.
        label: what the bar is called.
        tensorboard: also write event files into ``out/tensorboard``.
        checkpoint_seconds: least time between two checkpoints; they are made at evaluations.
        command: what a user typed, for the record.
        stop: asked after each evaluation but the last. A run that it stops leaves a checkpoint, so
            that the next call continues there, and its metrics end before ``training.steps``.

    Raises:
        BatchproofError: ``out`` holds another run, or is in use, or is damaged.
    """
    off_policy.check_env(training)  # a wrong name must not leave an empty folder behind
    with records.locked(out):
        finished = _check_folder(training, out)
        if finished is not None:
            return finished
        run = _Run(training, out, tensorboard, checkpoint_seconds, command)
        try:
            return run.run(progress, label or training.algo, stop)
        finally:
            run.close()


def _check_folder(training: Training, out: Path) -> Result | None:
    """The result in ``out`` if it holds this very run, finished."""
    path = out / "run.json"
    if not path.exists():
        return None
    run = records.read_json(path)
    wanted = records.to_json(training.record())
    held = run.get("training") if isinstance(run, dict) else None
    if not isinstance(held, dict):
        raise BatchproofError(f"{path}: not a run record; delete it or choose another --out")
    if held != wanted:
        held = up_to_date(held, path)
    if held != wanted:
        raise BatchproofError(
            f"{out} holds another run ({run_record.differing(held, wanted)}): "
            "choose another --out, or delete that folder"
        )
    if run.get("status") != "finished":
        return None
    # JSON has no NaN: the return of a seed that diverged was written as null.
    seeds = [
        seed | {"final_return": math.nan if seed["final_return"] is None else seed["final_return"]}
        for seed in run["seeds"]
    ]
    agents = run.get("spaces", {}).get("agents") or {"names": ()}
    columns = read_metrics(out / "metrics.parquet")
    return Result(columns, seeds, run["wall_s"], tuple(agents["names"]))


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of a metrics file.

    Raises:
        BatchproofError: missing or damaged.
    """
    try:
        return records.read_columns(path)
    except BatchproofError as error:
        raise BatchproofError(f"{error}: delete {path.parent} to start over") from None


class _Run:
    """A run and its folder: when to evaluate, what to write down."""

    def __init__(
        self,
        training: Training,
        out: Path,
        tensorboard: bool,
        checkpoint_seconds: float,
        command: str,
    ) -> None:
        self.training = training
        self.out = out
        self.command = command
        self.checkpoint_seconds = checkpoint_seconds
        self.stepper = STEPPERS[training.agent.STEPPER](training)
        self.agents = self.stepper.layout.names if self.stepper.layout else ()
        self.rows: list[dict[str, Any]] = []
        self.tensorboard = tensorboard
        self.writer: Any = None

    def close(self) -> None:
        self.stepper.close()
        if self.writer is not None:
            self.writer.close()

    def run(self, progress: bool, label: str, stop: Stop | None) -> Result:
        stepper, steps = self.stepper, self.training.steps
        began = time.perf_counter()
        folder = self.out / "checkpoint"
        if checkpoint.read_state(folder) is not None:
            began -= self._recorded_wall_s()
            self._check_devices()
            stepper.restore(folder)
            columns = read_metrics(self.out / "metrics.parquet")
            self.rows = [row for row in _rows(columns) if row["step"] <= stepper.step]
        if self.tensorboard:
            self.writer = _tensorboard_writer(self.out, stepper.step + 1)
        self._write_record("running", time.perf_counter() - began)
        saved = time.monotonic()
        with _bar(progress, label, steps, stepper.step) as bar:
            while stepper.step < steps:
                due = _next_multiple(stepper.step, self.training.evaluation_interval)
                stepper.advance(min(due, steps), bar.update)
                returns = self._evaluate(bar)
                if stepper.step >= steps:
                    break
                stopped = stop is not None and stop(stepper.step, returns)
                if stopped or time.monotonic() - saved >= self.checkpoint_seconds:
                    # The rows first: no checkpoint stands for evaluations that are not on disk.
                    self._write_metrics()
                    stepper.save(folder)
                    self._write_record("running", time.perf_counter() - began)
                    saved = time.monotonic()
                if stopped:
                    wall_s = time.perf_counter() - began
                    seeds = self._write_record("stopped", wall_s)
                    return Result(_columns(self.rows), seeds, wall_s, self.agents)
        wall_s = time.perf_counter() - began
        self._write_metrics()
        state = checkpoint.read_state(folder)
        if state is None or state["step"] < steps:  # else killed just before the record
            stepper.save_agents(folder)
        seeds = self._write_record("finished", wall_s)
        return Result(_columns(self.rows), seeds, wall_s, self.agents)

    def _check_devices(self) -> None:
        # Devices share the seeds evenly: with another number of them the population may be padded
        # to another size.
        path, seeds = self.out / "run.json", len(self.training.seeds)
        then = records.read_json(path).get("devices") if path.exists() else None
        now = self.stepper.mesh.size
        if isinstance(then, int) and then > 0 and -seeds % then != -seeds % now:
            raise BatchproofError(
                f"{self.out} was begun on {then} devices and there are {now} here: set "
                f"JAX_NUM_CPU_DEVICES={then} to continue it, or choose another --out"
            )

    def _recorded_wall_s(self) -> float:
        path = self.out / "run.json"
        held = records.read_json(path).get("wall_s") if path.exists() else None
        # No time is worth the run: a record that was edited counts from here.
        return held if isinstance(held, float) and 0 <= held < math.inf else 0.0

    def _evaluate(self, bar: Any) -> list[float]:
        returns, measures = self.stepper.evaluate(), self.stepper.measure()
        diverged_at = self.stepper.diverged_at()
        for i, number in enumerate(self.training.seeds):
            sound = diverged_at[i] == NOT_DIVERGED
            row = {
                "seed": number,
                "step": self.stepper.step,
                "return": float(returns[i].mean()) if sound else math.nan,
                "diverged": not sound,
            }
            row |= {name: float(values[i]) for name, values in measures.items()}
            self.rows.append(row)
            if self.writer is not None:
                for name, value in row.items():
                    if name not in ("seed", "step"):
                        self.writer.add_scalar(f"seed_{number}/{name}", float(value), row["step"])
        last = [row["return"] for row in self.rows[-len(self.training.seeds) :]]
        bar.set_postfix_str(_postfix(last), refresh=False)
        return last

    def _write_metrics(self) -> None:
        records.write_columns(self.out / "metrics.parquet", _columns(self.rows))

    def _write_record(self, status: str, wall_s: float) -> list[dict[str, Any]]:
        diverged_at = self.stepper.diverged_at()
        final = {row["seed"]: row["return"] for row in self.rows}
        layout = self.stepper.layout
        seeds = [
            {
                "seed": number,
                "status": "ok" if diverged_at[i] == NOT_DIVERGED else "diverged",
                "diverged_at": int(diverged_at[i]) if diverged_at[i] != NOT_DIVERGED else None,
                "final_return": final.get(number, math.nan),
            }
            for i, number in enumerate(self.training.seeds)
        ]
        records.write_json(
            self.out / "run.json",
            {
                "status": status,
                "training": self.training.record(),
                "seeds": seeds,
                "wall_s": wall_s,
                "command": self.command,
                "versions": records.versions(
                    "jax", "jaxlib", "optax", "numpy", "gymnasium", "pettingzoo", "mpe2"
                ),
                "git_sha": records.git_sha(),
                "machine": records.machine(),
                "devices": self.stepper.mesh.size,
                "spaces": {
                    "obs_size": self.stepper.obs_size,
                    "action_size": self.stepper.action_size,
                    "agents": None if layout is None else asdict(layout),
                },
            },
        )
        return seeds


def _next_multiple(step: int, interval: int) -> int:
    return (step // interval + 1) * interval


def _postfix(returns: list[float]) -> str:
    known = [value for value in returns if not math.isnan(value)]
    text = f"return {np.mean(known):.4g}" if known else "all seeds diverged"
    lost = len(returns) - len(known)
    return text + (f", {lost} diverged" if lost and known else "")


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    # A run that an earlier version began has fewer metrics in its first rows.
    names = dict.fromkeys([*rows[0], *rows[-1]]) if rows else {}
    return {name: np.asarray([row.get(name, math.nan) for row in rows]) for name in names}


def _rows(columns: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    names = list(columns)
    for values in zip(*(columns[name].tolist() for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


@contextmanager
def _bar(progress: bool, label: str, total: int, done: int) -> Iterator[Any]:
    with tqdm(
        total=total,
        initial=done,
        desc=label,
        unit=" steps",
        disable=not progress,
        dynamic_ncols=True,
        mininterval=0.2,
    ) as bar:
        yield bar


def _tensorboard_writer(out: Path, begins: int) -> Any:
    """A writer of events from step ``begins`` on: a killed run's later ones are not shown."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=begins)
