"""Running what is missing of a comparison, here or on a cluster."""

from __future__ import annotations

import itertools
import shlex
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from batchproof import records
from batchproof.compare import on_ray
from batchproof.compare.conditions import Build, Condition, Spec, grid, seed_words, words_on
from batchproof.compare.populations import Cell, Population, cell_state, cells, ordered
from batchproof.compare.summary import summarized
from batchproof.compare.table import Table, aligned, counted
from batchproof.compare.work import Clock, recall, saved_step, train_command, train_population
from batchproof.errors import BatchproofError


def run(
    spec: Spec,
    out: Path,
    build: Build,
    *,
    on: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Run what is missing of a comparison and write ``out/compare.json``.

    A cell that fails is marked, and the others go on. Ctrl-C or SIGTERM stops at the next
    evaluation, a second one at once (what is lost is at most a minute); the record then says
    ``interrupted``.

    Args:
        spec: what to compare.
        out: the comparison's folder.
        build: turns words into a training.
        on: ``ray`` or ``ray:HOST:PORT`` for a Ray cluster, all of whose nodes see ``out``; None
            for this process.
        progress: show a table on standard error that follows along, or lines where that is no
            terminal.
        command: what a user typed, for the record.

    Returns:
        The content of ``compare.json``.

    Raises:
        BatchproofError: nothing can be trained, ``out`` holds another comparison or is in use, the
            cluster cannot be reached, or every cell failed.
    """
    began = time.monotonic()
    clock = Clock(None if spec.budget_s is None else began + spec.budget_s)
    chosen = grid(spec, build)
    broken = _broken(spec, build, chosen.conditions[0])
    found = cells(spec, chosen.conditions, out, build)
    queue = ordered(found, spec.baseline)
    with on_ray.connected(on) if on else nullcontext(), records.locked(out):
        past = _past(out)
        table = Table(found, queue, spec, began, progress)
        for line in chosen.lines():
            table.say(line)
        interrupted = False
        try:
            for cell, population in queue:
                recall(population, past.get(population.folder.relative_to(out).as_posix(), {}))
                if cell.env in broken:
                    population.state, population.error = "failed", broken[cell.env]
            for line in _begun_with_more(found, spec):
                table.say(line)
            waiting = [(cell, p) for cell, p in queue if p.state == "waiting"]
            with _first_interrupt(clock, table):
                if on:
                    on_ray.train_all(waiting, out, clock, table)
                else:
                    _train_here(waiting, clock, table)
        except KeyboardInterrupt:
            interrupted = True
            for _, population in queue:
                if population.state == "running":
                    population.state, population.step = "stopped", saved_step(population)
        finally:
            table.close()
        if all(population.state == "failed" for _, population in queue):
            raise BatchproofError(f"every cell failed, the first with: {queue[0][1].error}")
        status = "finished"
        if interrupted or any(p.state in ("waiting", "stopped") for _, p in queue):
            status = "interrupted" if interrupted or clock.asked else "stopped"
        record = summarized(spec, chosen, found, out)
        record |= {"status": status, "wall_s": time.monotonic() - began, "command": command}
        records.write_json(out / "compare.json", record)
    return records.to_json(record)


def listing(spec: Spec, build: Build, out: Path | None = None) -> str:
    """What a comparison would run, what not, and what of it ``out`` holds already, in words.

    Raises:
        BatchproofError: as `run`, before it trains anything.
    """
    chosen = grid(spec, build)
    rows = [
        ("condition", "what it trains"),
        *((c.name, shlex.join(c.words)) for c in chosen.conditions),
    ]
    parts = ["\n".join(aligned(rows, left=(0, 1))), "\n".join(chosen.lines())]
    own = ((env, itertools.chain(*spec.of_env.get(env, ()))) for env in spec.envs)
    parts.append(
        "\n".join(f"{env}: {shlex.join(words)}" for env, words in own if env in spec.of_env)
    )
    count = counted(len(chosen.conditions) * len(spec.envs), "cell")
    parts.append(
        f"{counted(len(chosen.conditions), 'condition')} on {', '.join(spec.envs)}: {count} of "
        f"{counted(len(spec.seeds), 'seed')}"
    )
    if out is not None and (out / "cells").is_dir():
        found = cells(spec, chosen.conditions, out, build)
        for cell in found:
            for population in cell.populations:
                recall(population, {})
        states = Counter(map(cell_state, found))
        held = ", ".join(f"{number} {state}" for state, number in states.items())
        parts.append("\n".join([f"In {out}: {held}", *_begun_with_more(found, spec)]))
    return "\n\n".join(part for part in parts if part)


def _begun_with_more(found: Sequence[Cell], spec: Spec) -> list[str]:
    """A line for each unfinished population with seeds that were not asked for: they go on too."""
    lines = []
    for cell in found:
        for population in cell.populations:
            more = [str(seed) for seed in population.training.seeds if seed not in spec.seeds]
            if more and population.state == "waiting":
                title = f"{cell.env} {cell.condition.name}"
                lines.append(f"{title} was begun with seeds {', '.join(more)} too: they go on")
    return lines


def _train_here(queue: Sequence[tuple[Cell, Population]], clock: Clock, table: Table) -> None:
    """Train populations one after the other, until time is up."""
    for cell, population in queue:
        if not clock.has_time():
            return
        population.state = "running"
        table.start(cell, population)
        train_population(population, train_command(cell, population), clock, table.draw)
        table.end(cell, population)
        if population.state == "stopped":
            return


def _broken(spec: Spec, build: Build, condition: Condition) -> dict[str, str]:
    """Environments that cannot be made, with the reason."""
    from batchproof.lab.envs import JAX_ENVS, host

    found = {}
    for env in spec.envs:
        training = build([*words_on(condition, spec, env), *seed_words(spec.seeds)])
        if training.host_env or env not in JAX_ENVS:
            try:
                host.make(env, training.options_of(0)).close()
            except BatchproofError as error:
                found[env] = str(error)
    if len(found) == len(spec.envs):
        raise BatchproofError(next(iter(found.values())))
    return found


def _past(out: Path) -> dict[str, dict[str, Any]]:
    """What an earlier call knew of each population, by its folder."""
    try:
        record = records.read_json(out / "compare.json")
        return {item["folder"]: item for cell in record["cells"] for item in cell["populations"]}
    except (BatchproofError, TypeError, KeyError):
        return {}  # it is only about times


@contextmanager
def _first_interrupt(clock: Clock, table: Table) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM stop at the next evaluation; a second one is as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}

    def give_back() -> None:
        while before:
            signal.signal(*before.popitem())

    def ask(*_: Any) -> None:
        clock.asked = True
        give_back()
        table.say("stopping at the next evaluation; Ctrl-C again stops at once")

    for number in (signal.SIGINT, signal.SIGTERM):  # schedulers send the second
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup: keep it so
            before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        give_back()
