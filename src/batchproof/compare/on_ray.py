"""A comparison on a Ray cluster: each population is one task, in a folder that all nodes see.

Checkpoints and results stay in the comparison's folder and are never sent. Workers tell a `Board`
how far they are and hear from it whether to stop; where a worker dies, Ray runs its task again and
the run goes on at its last checkpoint, as `train` always does.

Each task takes one CPU of the cluster (and one GPU where there are any), but trains on as many
JAX devices as this process would: so a run has the same bits here and there, and can move between.
"""

from __future__ import annotations

import io
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from batchproof import records
from batchproof.compare.populations import Cell, Population
from batchproof.compare.summary import PACKAGES
from batchproof.compare.work import (
    Clock,
    read_back,
    saved_step,
    train_command,
    train_population,
)
from batchproof.errors import BatchproofError

if TYPE_CHECKING:
    from batchproof.compare.table import Table

CHECKPOINT_S = 60.0
CONNECT_S = 5.0
DEATHS = 3  # of a population's workers, one after the other with no new checkpoint
LOCK_S = 60.0  # for which a node that is lost may still hold a folder
POLL_S = 0.2


class Orders(NamedTuple):
    """What a worker has to know.

    Attributes:
        stop: at the next evaluation.
        left_s: seconds left of the budget, infinite without one.
    """

    stop: bool = False
    left_s: float = math.inf

    @property
    def is_over(self) -> bool:
        """Whether to begin nothing more."""
        return self.stop or self.left_s <= 0


class Report(NamedTuple):
    """How far a population is.

    Attributes:
        worker: the process that has it.
        step: environment steps done.
        deaths: of its workers, one after the other with no new checkpoint.
        evaluated: whether this worker has evaluated it.
        last: mean return over the seeds at the last evaluation.
        speed: environment steps of all seeds per second.
    """

    worker: str
    step: int
    deaths: int = 0
    evaluated: bool = False
    last: float = math.nan
    speed: float = math.nan


class Board:
    """Where the workers and the process that asked for them meet; an actor on the cluster.

    All that it holds is soon told anew, so it may be lost and begun again.
    """

    def __init__(self) -> None:
        self._orders = Orders()
        self._reports: dict[int, Report] = {}
        self._begun_at: dict[int, int] = {}

    def begin(self, index: int, worker: str, step: int) -> tuple[Orders, int]:
        """A worker begins population ``index`` at a checkpoint: its orders, and earlier deaths."""
        if self._orders.is_over:
            return self._orders, 0
        deaths = 0
        if step <= self._begun_at.get(index, -1):
            deaths = self._reports[index].deaths + 1
        self._begun_at[index] = step
        self._reports[index] = Report(worker, step, deaths)
        return self._orders, deaths

    def tell(self, index: int, worker: str, step: int, last: float, speed: float) -> Orders:
        """A worker has evaluated population ``index``: its orders."""
        held = self._reports.get(index, Report(worker, step))
        self._reports[index] = held._replace(step=step, evaluated=True, last=last, speed=speed)
        return self._orders

    def exchange(self, orders: Orders) -> dict[int, Report]:
        """New orders for all workers, for what they told last of each population."""
        self._orders = orders
        return self._reports


@contextmanager
def connected(on: str) -> Iterator[None]:
    """Be connected to a running Ray cluster.

    Args:
        on: ``ray`` for the one that runs on this machine, or ``ray:HOST:PORT``.

    Raises:
        BatchproofError: Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise BatchproofError(
            "--on ray needs Ray, which is not installed: pip install 'batchproof[ray]'"
        ) from None
    if ray.is_initialized():  # by a script that calls this
        yield
        return
    address = on.removeprefix("ray").removeprefix(":")
    if address:
        _check_answers(address)
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # try once where no Ray answers
    try:
        ray.init(address or "auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        raise BatchproofError(
            f"--on {on}: no Ray cluster answers: start one with `ray start --head`, which says "
            "its address, port 6379 if not told otherwise"
        ) from None
    except (RuntimeError, ValueError, ray.exceptions.RayError) as error:  # a version, a token
        raise BatchproofError(f"--on {on}: {_first_line(error)}") from None
    try:
        # Ray prints there what it thinks of each death, in the middle of the table.
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise unless something listens there: Ray itself would wait for a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise BatchproofError(
            f"--on ray:{address}: nothing answers at {address} ({_first_line(error)}): "
            "is `ray start --head` running there?"
        ) from None


class Shared(NamedTuple):
    """What all workers are given.

    Attributes:
        out: the comparison's folder.
        devices: CPU devices for JAX.
        versions: of the packages that results depend on.
        checkpoint_s: least time between two checkpoints.
    """

    out: Path
    devices: int
    versions: dict[str, str]
    checkpoint_s: float


def train_all(
    queue: Sequence[tuple[Cell, Population]], out: Path, clock: Clock, table: Table
) -> None:
    """Train populations on the cluster that this process is connected to, until time is up.

    Args:
        queue: what to train, in the order to begin in.
        out: the comparison's folder, which this process holds.
        clock: says when to stop.
        table: shows how far all are.
    """
    import jax
    import ray

    import batchproof.lab  # noqa: F401  # chooses the number of CPU devices

    board: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board).remote()
    # A worker for each task: JAX keeps its devices and its memory until the process ends.
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    task: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, max_retries=-1)(_work)
    devices = jax.config.values["jax_num_cpu_devices"]
    if devices < 1:  # XLA_FLAGS names the number
        devices = len(jax.local_devices(backend="cpu"))
    shared = Shared(out.resolve(), devices, records.versions(*PACKAGES), CHECKPOINT_S)
    ray.get(board.exchange.remote(_orders(clock)))
    tasks: dict[Any, int] = {}
    for index, (cell, population) in enumerate(queue):
        there = Population(population.training, population.folder.resolve())
        tasks[task.remote(board, shared, index, there, train_command(cell, population))] = index
    try:
        _follow(tasks, board, queue, clock, table)
    except BaseException:
        for one in tasks:
            ray.cancel(one, force=True)
        if tasks:
            ray.wait(list(tasks), num_returns=len(tasks), timeout=10)
        raise


def _orders(clock: Clock) -> Orders:
    left_s = math.inf if clock.deadline is None else clock.deadline - time.monotonic()
    return Orders(clock.asked, left_s)


def _follow(
    tasks: dict[Any, int],
    board: Any,
    queue: Sequence[tuple[Cell, Population]],
    clock: Clock,
    table: Table,
) -> None:
    """Write into the populations what workers tell, until all tasks have ended."""
    import ray

    known: dict[int, Report] = {}
    began: dict[int, float] = {}
    is_over = False
    while tasks:
        done, _ = ray.wait(list(tasks), timeout=POLL_S)
        active = set(tasks.values())
        for index, report in ray.get(board.exchange.remote(_orders(clock))).items():
            if index not in active:
                continue
            cell, population = queue[index]
            old, known[index] = known.get(index), report
            population.step = report.step
            if report.evaluated:
                population.last, population.speed = report.last, report.speed
            if old is None:
                began[index] = time.monotonic()
                population.state = "running"
                table.start(cell, population)
            elif report.worker != old.worker:
                title = table.title(cell, population)
                table.say(f"{title}: its worker died, another goes on at step {report.step:,}")
            elif report.evaluated and not old.evaluated:
                clock.started_in(time.monotonic() - began[index])
        for one in done:
            index = tasks.pop(one)
            cell, population = queue[index]
            _take(one, population)
            if index in began:
                population.wall_s += time.monotonic() - began[index]
            if population.state != "waiting":
                table.end(cell, population)
        if not is_over and not clock.has_time():
            is_over = True
            for one, index in tasks.items():
                if index not in known:
                    ray.cancel(one)
        table.draw()


def _take(task: Any, population: Population) -> None:
    """Write the outcome of a task that ended into its population."""
    import ray

    try:
        there: Population = ray.get(task)
    except ray.exceptions.TaskCancelledError:
        population.state, population.step = "waiting", saved_step(population)
        return
    except ray.exceptions.RayError as error:
        population.state, population.error = "failed", _first_line(error)
        return
    population.state, population.error = there.state, there.error
    population.step = there.step
    if not math.isnan(there.last):
        population.last, population.speed = there.last, there.speed
    if population.state == "finished" and not read_back(population):
        population.state = "failed"
        population.error = f"{population.folder} is not the folder that its worker wrote to"


# --- in a worker's process ----------------------------------------------------------------------


def _work(
    board: Any, shared: Shared, index: int, population: Population, command: str
) -> Population:
    """Train one population, and tell the board; what comes of it is in the folder."""
    import ray

    worker = f"{socket.gethostname()} {os.getpid()}"
    # A task that waits for an answer in its main thread lends its CPU to the next task.
    with ThreadPoolExecutor(1) as caller:

        def ask(method: str, *words: Any) -> Any:
            answer = getattr(board, method).remote(index, worker, *words)
            return caller.submit(ray.get, answer).result()

        try:
            prepare(shared)
            population.step = saved_step(population)
            orders, deaths = ask("begin", population.step)
            if orders.is_over:
                return population
            if deaths >= DEATHS:
                raise BatchproofError(
                    f"{deaths} workers died one after the other at step {population.step:,}: give "
                    "them more memory, or fewer --seeds-at-once"
                )
            wait_for(population.folder)
        except BatchproofError as error:
            population.state, population.error = "failed", str(error)
            return population
        clock = Clock(time.monotonic() + orders.left_s)

        def tell() -> None:
            clock.asked = ask("tell", population.step, population.last, population.speed).stop

        train_population(population, command, clock, tell, shared.checkpoint_s)
    population.result = None
    return population


def prepare(shared: Shared) -> None:
    """Give JAX its devices in this process.

    Raises:
        BatchproofError: what is trained here would be lost, or be different.
    """
    import jax

    import batchproof.lab  # noqa: F401  # chooses another number of devices first

    node = socket.gethostname()
    if not (shared.out / ".lock").is_file():
        raise BatchproofError(
            f"{shared.out} is not there on {node}: choose an --out that all nodes see"
        )
    mine = records.versions(*PACKAGES)
    for name, version in shared.versions.items():
        if mine.get(name) != version:
            raise BatchproofError(
                f"{node} has {name} {mine.get(name, 'not at all')}, here it is {version}: install "
                "the same versions on all nodes"
            )
    jax.config.update("jax_num_cpu_devices", shared.devices)


def wait_for(folder: Path) -> None:
    """Wait until a worker that was lost lets go of a run's folder."""
    deadline = time.monotonic() + LOCK_S
    while folder.is_dir() and time.monotonic() < deadline:
        try:
            with records.locked(folder):
                return
        except BatchproofError:
            time.sleep(1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
