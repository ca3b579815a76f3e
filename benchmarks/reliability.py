"""Kill runs at random moments, break their disk and their files, and see what is lost.

    python benchmarks/reliability.py [--only kills|faults] [--kills 100] [--seed 0] [--quick]

Small runs of `batchproof train`, `study` and `compare` are ended by ``kill -9`` and started again
until they finish; their files must then equal those of a run that was never stopped. All of them
make a checkpoint at every evaluation, where the commands wait a minute between two, so that there
is more to break. Then come a disk that is full, a folder that may not be written, a second process,
a clock that goes backwards, and files that were cut short or changed.

Nothing is measured against time: the machine may be busy. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import bench
import numpy as np
from tqdm import tqdm

from batchproof import records
from batchproof.errors import BatchproofError

CONSTANT = "--env batchproof/ConstantReward-v0"
NETS = "--hidden 8 --batch-size 16 --seeds 2 --learning-starts 40 --eval-every 20"
SUBJECTS = {
    # The replay is smaller than the run, so its oldest rows are written over.
    "train": f"train ddpg {CONSTANT} {NETS} --norm batch --steps 400 --buffer-size 150",
    "train, host environment": f"train ddpg --env Pendulum-v1 {NETS} --norm none --steps 240",
    "study": "study constant-reward --seeds 2 --steps 160 --conditions none",
    "compare": f"compare --algo ddpg --norm none,layer {CONSTANT} {NETS} --steps 240",
}
SHARES = {"train": 0.25, "train, host environment": 0.2, "study": 0.25, "compare": 0.3}
AGAIN = 0.5  # how likely a run that was killed is killed once more

NOT_COMPARED = (".lock", "report.html")  # the page tells how long it took
TIMES = ("wall_s", "steps_per_s")
ASIDE = (*TIMES, "command", "git_sha", records.CHECKSUM)  # entries of JSON that may differ
LIMITS = (0, 6000)  # bytes a file may have where the disk is full: not even a record, no arrays
FREE = (0, 8192)  # bytes that are left of a disk


@dataclass
class Case:
    """One fault and what became of it.

    Attributes:
        fault: which.
        where: the command, or the file that was damaged.
        what: the kind of damage.
        outcome: ``refused`` (exit code 2, one line, no file changed), ``continued`` (no file lost:
            the run could go on afterwards and ended like one that was never stopped), ``no effect``
            (the same result as without the fault), ``marked`` (exit code 2 and one line for a
            cell of a comparison, all others finished), ``skipped``, or ``FAILED``.
        line: what was said on standard error, or why it failed.
    """

    fault: str
    where: str
    what: str
    outcome: str
    line: str = ""


# --- in a process of its own ------------------------------------------------------------------


def checkpoint_often() -> None:
    """Make a checkpoint at each evaluation, in runs and in those of a comparison."""
    from batchproof.compare import work
    from batchproof.lab import loop

    assert loop.train.__kwdefaults__ is not None
    loop.train.__kwdefaults__["checkpoint_seconds"] = 0.0
    assert work.train_population.__defaults__ == (60.0,)
    work.train_population.__defaults__ = (0.0,)


def worker(how: str, words: list[str]) -> int:
    """Run ``batchproof WORDS``, with a checkpoint at each evaluation.

    ``how`` is ``run``, ``back`` (each look at the clock is an hour before the last), ``count`` (the
    number of file operations in the folder of ``--out`` is printed at the end, and of those three
    quarters through the checkpoints) or the number of the file operation before which the process
    kills itself.
    """
    from batchproof import cli

    checkpoint_often()
    locked = records.locked

    @contextmanager
    def and_say_so(folder: Path) -> Iterator[None]:
        with locked(folder):
            print("locked", flush=True)
            yield

    records.locked = and_say_so
    if how == "back":
        now, calls = time.time(), count()
        time.time = lambda: now - 3600 * next(calls)
        time.time_ns = lambda: int(time.time() * 1e9)
    done: list[str] = []
    if how == "count" or how.isdigit():
        out = words[words.index("--out") + 1]
        sys.addaudithook(partial(_watch, out, done, int(how) if how.isdigit() else -1))
    code = cli.main(words)
    if how == "count":
        saved = [i for i, path in enumerate(done) if "/checkpoint/" in path]
        print(len(done), saved[3 * len(saved) // 4] if saved else 3 * len(done) // 4)
    return code


def _watch(out: str, done: list[str], last: int, event: str, args: tuple[Any, ...]) -> None:
    """Collect the paths below ``out`` that are changed; die before operation ``last``, from 1."""
    changes = event in ("os.rename", "os.remove", "os.mkdir")
    if event == "open":
        changes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if changes and isinstance(args[0], str | Path) and str(args[0]).startswith(out):
        done.append(str(args[0]))
        if len(done) == last:
            os.kill(os.getpid(), signal.SIGKILL)


def batch(log_path: str) -> None:
    """Answer each line on standard input, the words of a command, with its code and its stderr."""
    from batchproof import cli
    from batchproof.lab import checkpoint

    checkpoint_often()
    answers = os.fdopen(os.dup(1), "w")
    log = open(log_path, "ab+")  # noqa: SIM115
    os.dup2(log.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        log.truncate(0)
        asked = json.loads(line)
        code: Any
        try:
            if asked[0] == "read":
                code = _read_every_byte(Path(asked[1]), checkpoint.read_state)
            else:
                code = cli.main(asked)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        log.seek(0)
        print(json.dumps([code, log.read().decode(errors="replace")]), file=answers, flush=True)


def _read_every_byte(path: Path, read_state: Callable[[Path], Any]) -> dict[str, int]:
    """Change each byte of a file, and cut it at each length: refused, without effect, or wrong."""
    if path.suffix == ".parquet":
        read: Callable[[], Any] = partial(records.read_columns, path)
    elif path.name == "state.json":
        read = partial(read_state, path.parent)
    else:
        read = partial(records.read_json, path)
    data = path.read_bytes()
    whole = read()

    def same(value: Any) -> bool:
        if path.suffix == ".parquet":
            equal = partial(np.array_equal, equal_nan=False)
            return value.keys() == whole.keys() and all(
                equal(value[n].view(np.uint8), whole[n].view(np.uint8)) for n in whole
            )
        return all(value.get(name) == whole[name] for name in whole)

    found: Counter[str] = Counter()
    changes = [("cut", data[:length]) for length in range(len(data))]
    for i in range(len(data)):
        changes.append(("flip", data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :]))
    for kind, damaged in changes:
        path.write_bytes(damaged)
        try:
            value = read()
        except BatchproofError as error:
            found[f"{kind} refused" if "\n" not in str(error) else f"{kind} wrong"] += 1
            continue
        except Exception:
            traceback.print_exc()
            found[f"{kind} wrong"] += 1
            continue
        found[f"{kind} without effect" if same(value) else f"{kind} wrong"] += 1
    path.write_bytes(data)
    return {"bytes": len(data)} | dict(found)


# --- processes and folders --------------------------------------------------------------------


class Place:
    """The folder that everything happens in, and how processes are started there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = os.environ | {
            # Shared, so that a run of a second is not preceded by half a minute of compiling.
            "JAX_COMPILATION_CACHE_DIR": str(path / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "MPLCONFIGDIR": str(path / "matplotlib"),
        }
        self._numbers = count()

    def new(self, name: str = "run") -> Path:
        """A folder that does not exist yet."""
        return self.path / f"{name}-{next(self._numbers)}"

    def copy(self, folder: Path, name: str = "run") -> Path:
        """A copy of a folder."""
        return Path(shutil.copytree(folder, self.new(name)))

    def start(self, how: str, words: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """A process that runs ``batchproof WORDS``; it is past its lock or has ended."""
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", how, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            **options,
        )
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def run(self, how: str, words: Sequence[str], **options: Any) -> tuple[int, str, str]:
        """Its exit code, and what it said on standard output and standard error."""
        process = self.start(how, words, **options)
        out, error = process.communicate()
        return process.returncode, out, error


def words_of(subject: str, out: Path) -> list[str]:
    """The command line of a subject that writes to ``out``."""
    return [*shlex.split(SUBJECTS[subject]), "--out", str(out), "--no-progress"]


def contents(folder: Path) -> dict[str, Any]:
    """Every file by its path: bytes, or for JSON the value without times and commands."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items() if name not in ASIDE}
        return [plain(item) for item in value] if isinstance(value, list) else value

    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in NOT_COMPARED:
            data = path.read_bytes()
            with contextlib.suppress(ValueError):
                if path.suffix == ".json":
                    data = plain(json.loads(data))
            found[path.relative_to(folder).as_posix()] = data
    return found


def raw(folder: Path) -> dict[str, bytes]:
    """Every file but the lock by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def written(folder: Path) -> dict[str, Any]:
    """Every file by its path; of safetensors, whose header has no fixed order, header and data."""
    found: dict[str, Any] = dict(raw(folder))
    for name, data in found.items():
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(data[:8], "little")
            found[name] = json.loads(data[8:end]), data[end:]
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The files in which two folders differ."""
    return ", ".join(n for n in sorted(one.keys() | other.keys()) if one.get(n) != other.get(n))


def complaint(code: int, error: str) -> str:
    """What is wrong with a refusal: empty where it is one line with exit code 2."""
    if code != 2:
        return f"exit code {code}: {error.strip()[-300:]}"
    if len(error.splitlines()) != 1 or not error.startswith("batchproof: error: "):
        return f"not one line: {error.strip()[-300:]}"
    return ""


@dataclass
class Whole:
    """A subject as nothing disturbs it, and the same cut off in the middle."""

    folder: Path
    contents: dict[str, Any]
    seconds: float  # from its lock to its end
    operations: int
    half: Path


def prepare(place: Place, subject: str) -> Whole:
    """Run a subject to its end, twice, and once up to a checkpoint that is not among its last."""
    out = place.new("whole")
    process = place.start("run", words_of(subject, out))  # compiles
    _, error = process.communicate()
    if process.returncode:
        raise SystemExit(f"{subject} does not run: {error}")
    again = place.new("whole")
    process = place.start("count", words_of(subject, again))
    began = time.monotonic()
    said, _ = process.communicate()
    seconds = time.monotonic() - began
    whole = contents(out)
    if whole != contents(again):
        raise SystemExit(f"{subject} is not deterministic: {differing(whole, contents(again))}")
    operations, middle = map(int, said.split()[-2:])
    half = place.new("half")
    code, _, error = place.run(str(middle), words_of(subject, half))
    if code != -signal.SIGKILL:
        raise SystemExit(f"{subject} was not cut off: {error}")
    return Whole(out, whole, seconds, operations, half)


# --- kills ------------------------------------------------------------------------------------


def left_behind(out: Path) -> str:
    """What a kill left of a run, in words."""
    if any(out.rglob(".*.partial")):
        return "a file half written"
    if any(len(list(path.glob("step-*"))) > 1 for path in out.rglob("checkpoint")):
        return "between the files of a checkpoint"
    if not any(out.rglob("state.json")):
        return "before the first checkpoint"
    return "some checkpoints"


def kill_at_random(
    place: Place, subject: str, whole: Whole, kills: int, draw: np.random.Generator, bar: Any
) -> list[dict[str, Any]]:
    """Runs that are killed until ``kills`` are made, each run then brought to its end."""
    runs, made = [], 0
    while made < kills:
        out, moments, found = place.new(), [], Counter[str]()
        while True:
            moment = draw.uniform(0, whole.seconds)
            process = place.start("run", words_of(subject, out))
            try:
                _, error = process.communicate(timeout=moment)
                break  # it was faster
            except subprocess.TimeoutExpired:
                process.kill()
                _, error = process.communicate()
            if process.returncode != -signal.SIGKILL:  # ended in that very moment
                break
            moments.append(moment)
            found[left_behind(out)] += 1
            made += 1
            bar.update(1)
            if made == kills or draw.random() > AGAIN:
                process = place.start("run", words_of(subject, out))
                _, error = process.communicate()
                break
        differ = differing(contents(out), whole.contents)
        if moments or process.returncode or differ:
            runs.append(
                {
                    "killed_after_s": moments,
                    "left": dict(found),
                    "code": process.returncode,
                    "stderr": error,
                    "differs": differ,
                }
            )
        shutil.rmtree(out)
    return runs


def kill_at_operations(
    place: Place, subject: str, whole: Whole, kills: int, draw: np.random.Generator, bar: Any
) -> list[dict[str, Any]]:
    """A run for each of some file operations: killed right before it, then brought to its end."""
    runs = []
    chosen = draw.choice(whole.operations, min(kills, whole.operations), replace=False) + 1
    for number in sorted(map(int, chosen)):
        out = place.new()
        code, _, error = place.run(str(number), words_of(subject, out))
        found = left_behind(out) if out.exists() else "nothing"
        if code == -signal.SIGKILL:
            code, _, error = place.run("run", words_of(subject, out))
        else:
            code, error = 1, f"was not killed: {error}"
        runs.append(
            {
                "before_operation": number,
                "left": {found: 1},
                "code": code,
                "stderr": error,
                "differs": differing(contents(out), whole.contents),
            }
        )
        shutil.rmtree(out)
        bar.update(1)
    return runs


# --- faults of the machine --------------------------------------------------------------------


def goes_on(place: Place, subject: str, out: Path, whole: Whole, how: str = "run") -> str:
    """Run to the end: empty where it ends like the run that was never stopped."""
    code, _, error = place.run(how, words_of(subject, out))
    differ = differing(contents(out), whole.contents)
    return error or f"exit code {code}" if code else differ and f"differs in {differ}"


def judge(
    fault: str, subject: str, what: str, done: tuple[int, str, str], changed: str, after: str
) -> Case:
    """The case of a command that had to be refused or to end well."""
    code, _, error = done
    if after:
        return Case(fault, subject, what, "FAILED", f"afterwards: {after}")
    if code == 0:
        return Case(fault, subject, what, "no effect")
    wrong = complaint(code, error)
    if wrong:
        return Case(fault, subject, what, "FAILED", wrong)
    return Case(fault, subject, what, "continued" if changed else "refused", error.strip())


def second_process(place: Place, subject: str, whole: Whole) -> Iterator[Case]:
    """Start the same command again while it runs."""
    out = place.copy(whole.half)
    first = place.start("run", words_of(subject, out))
    first.send_signal(signal.SIGSTOP)
    time.sleep(0.2)  # all of its threads
    try:
        before = raw(out)
        done = place.run("run", words_of(subject, out))
        changed = differing(before, raw(out))
    finally:
        first.send_signal(signal.SIGCONT)
    _, error = first.communicate()
    after = error if first.returncode else differing(contents(out), whole.contents)
    case = judge("second process", subject, "the same command twice", done, changed, after)
    if case.outcome == "no effect":
        case.outcome, case.line = "FAILED", "the second process was not refused"
    yield case


def clock_backwards(place: Place, subject: str, whole: Whole) -> Iterator[Case]:
    """Resume files from the future with a clock that goes back an hour at each look."""
    for what, out in (("resumed", place.copy(whole.half)), ("from the start", place.new())):
        future = time.time() + 10 * 365 * 86400
        for path in [out, *out.rglob("*")] if out.exists() else []:
            os.utime(path, (future, future))
        wrong = goes_on(place, subject, out, whole, how="back")
        outcome = "FAILED" if wrong else "no effect"
        yield Case("clock backwards", subject, what, outcome, wrong)


def short_files(place: Place, subject: str, whole: Whole) -> Iterator[Case]:
    """Let no file grow beyond some bytes, as on a disk that is full."""
    for limit in LIMITS:
        out = place.copy(whole.half)
        before = raw(out)
        set_limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        done = place.run("run", words_of(subject, out), preexec_fn=set_limit)
        changed = differing(before, raw(out))
        after = goes_on(place, subject, out, whole) if changed else ""
        what = f"no file beyond {limit} bytes"
        yield judge("full disk", subject, what, done, changed, after)


@contextmanager
def disk(path: Path, size: int) -> Iterator[str]:
    """A disk of its own at ``path``; yields why there is none, or nothing."""
    path.mkdir()
    options = f"size={size}"
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        why = " ".join(done.stderr.split()) if done.returncode else ""
    except OSError as error:
        why = str(error)
    try:
        yield why
    finally:
        if not why:
            subprocess.run(["umount", str(path)], check=True)
        shutil.rmtree(path)


def full_disk(place: Place, subject: str, whole: Whole) -> Iterator[Case]:
    """Resume on a disk that has only some bytes left."""
    for free in FREE:
        what, mounted = f"a disk with {free} bytes left", place.new("disk")
        with disk(mounted, 1 << 24) as why:
            if why:
                yield Case("full disk", subject, what, "skipped", f"no disk could be made: {why}")
                continue
            out = Path(shutil.copytree(whole.half, mounted / "run"))
            (out / ".lock").touch()
            before = raw(out)
            filler = mounted / "filler"
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            if free:
                os.truncate(filler, filler.stat().st_size - free)
            done = place.run("run", words_of(subject, out))
            changed = differing(before, raw(out))
            filler.unlink()
            after = goes_on(place, subject, out, whole) if changed else ""
            yield judge("full disk", subject, what, done, changed, after)


def read_only(place: Place, subject: str, whole: Whole) -> Iterator[Case]:
    """Run in a folder that may not be written, half done or finished; then read it from there."""
    for what, folder in (("half done", whole.half), ("finished", whole.folder)):
        mounted = place.new("disk")
        with disk(mounted, 1 << 24) as why:
            if why and not os.geteuid():  # who may write to any folder
                yield Case("read-only folder", subject, what, "skipped", why)
                continue
            out = Path(shutil.copytree(folder, mounted / "run"))
            before = raw(out)
            if why:
                out.chmod(0o555)
            else:
                words = ["mount", "-o", "remount,ro", str(mounted)]
                subprocess.run(words, check=True, capture_output=True)
            done = place.run("run", words_of(subject, out))
            changed = differing(before, raw(out))
            target = place.new("read")
            target.mkdir()
            for name, words in readers(out, target).items() if subject == "train" else ():
                code, _, error = place.run("run", words)
                outcome = "FAILED" if code or error else "no effect"
                yield Case("read-only folder", name, what, outcome, error.strip()[-300:])
            if why:
                out.chmod(0o755)
            yield judge("read-only folder", subject, what, done, changed, "")


def no_record(place: Place, subject: str, whole: Whole) -> Iterator[Case]:
    """Do what the message on a damaged ``run.json`` says: delete it and run again."""
    for what, folder in (("half done", whole.half), ("finished", whole.folder)):
        out = place.copy(folder)
        for path in out.rglob("run.json"):
            path.unlink()
        wrong = goes_on(place, subject, out, whole)
        yield Case("run.json deleted", subject, what, "FAILED" if wrong else "no effect", wrong)


MACHINE = (second_process, clock_backwards, short_files, full_disk, read_only, no_record)


# --- damaged files ----------------------------------------------------------------------------


def readers(run: Path, target: Path) -> dict[str, list[str]]:
    """Commands that read a run and write one file into ``target``."""
    return {
        "trace": ["trace", str(run), "--format", "json", "--output", str(target / "trace.json")],
        "export": ["export", str(run), "--format", "torch", "--no-proof", "-o",
                   str(target / "actor.safetensors")],
        "report": ["report", str(run), "--out", str(target / "report.html")],
    }  # fmt: skip


def damages(path: Path) -> dict[str, bytes]:
    """Ways in which a file can be broken, a header apart from the data behind it."""
    data = path.read_bytes()
    size = len(data)
    lengths = {"0 bytes": 0, "1 byte": 1, "last byte missing": size - 1}
    flips = {"first byte": 0, "last byte": size - 1}
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        middle = (end + size) // 2
        lengths |= {
            "inside the header's length": 4,
            "after the header's length": 8,
            "inside the header": end // 2,
            "at the header's end": end,
            "after the first byte of the data": end + 1,
            "middle of the data": middle,
        }
        flips |= {
            "the header's length": 7,
            "the header": end // 2,
            "first byte of the data": end,
            "middle of the data": middle,
        }
    elif path.suffix == ".parquet":  # its header is at its end
        begin = size - 8 - int.from_bytes(data[-8:-4], "little")
        middle = (begin + size) // 2
        lengths |= {
            "inside the magic": 2,
            "after the magic": 4,
            "middle of the data": begin // 2,
            "before the footer": begin,
            "inside the footer": middle,
            "before the footer's length": size - 8,
            "before the last magic": size - 4,
        }
        flips |= {
            "a page's header": 6,
            "middle of the data": begin // 2,
            "the footer": middle,
            "the footer's length": size - 8,
        }
    else:
        digits = [i for i in range(size // 2, size) if data[i : i + 1].isdigit()]
        lengths |= {"after the first line": data.index(b"\n") + 1, "the middle": size // 2,
                    "last bracket missing": size - 2}  # fmt: skip
        flips |= {"a digit": digits[0], "the middle": size // 2}
    found = {f"cut: {name}": data[:length] for name, length in lengths.items()}
    for name, i in flips.items():
        found[f"flipped: {name}"] = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
    middle = size // 2
    inverted = bytes(byte ^ 0xFF for byte in data[middle : middle + 512])
    found["512 bytes inverted in the middle"] = data[:middle] + inverted + data[middle + 512 :]
    found["garbage behind it"] = data + b"\x00\xffgarbage"
    found["other bytes in its place"] = b"hello\n"
    if path.suffix == ".json":
        found |= {f"{text} in its place": text.encode() for text in ("{}", "[]", "null")}
    return found


class Batch:
    """A process that runs command after command, so that each does not import JAX anew."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._process: subprocess.Popen[str] | None = None

    def ask(self, words: Sequence[str]) -> tuple[Any, str]:
        """The exit code of a command and what it said on standard error."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--worker", "batch",
                 str(self.place.path / "batch.log")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=self.place.environment,
            )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(list(words)), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:  # the reader took the process down with it
            code = self._process.wait()
            self._process = None
            return code, "the process died"
        code, error = json.loads(answer)
        return code, error

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()


def damaged_files(place: Place, wholes: dict[str, Whole], every: int, bar: Any) -> Iterator[Case]:
    """Break each file of each kind of folder and let each command read it."""
    reader = Batch(place)
    for base, subject, name, commands in TARGETS:
        whole = wholes[subject]
        origin = whole.folder if base == "finished" else whole.half
        work, target = place.path / "work", place.path / "target"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(origin, work)
        relative = _chosen(work, base, name).relative_to(work)
        for command in commands:
            expected: dict[str, Any] = {}
            broken = list(damages(origin / relative).items())
            # All go through the same reader: for the slow ones a third is enough.
            slow = 3 if subject in ("study", "compare") else 1
            kinds = {"": b""} | dict(broken[:: max(every, slow)])
            for what, data in kinds.items():  # the first: undamaged
                shutil.rmtree(work)
                shutil.copytree(origin, work)
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
                if what:
                    (work / relative).write_bytes(data)
                own = command in ("train", "study", "compare")
                words = words_of(subject, work) if own else readers(work, target)[command]
                before = raw(work)
                code, error = reader.ask(words)
                changed = differing(before, raw(work))
                if not what:
                    expected = written(target)
                    if code != 0 or (own and contents(work) != whole.contents):
                        raise SystemExit(f"{command} fails on an undamaged folder: {error}")
                    continue
                where = f"{relative.name} ({subject}, {base})"
                case = Case("damaged file", f"{where} → {command}", what, "FAILED")
                partly = subject == "compare" and changed and not complaint(code, error)
                if own and (code == 0 or partly):
                    case = _ended(case, work, relative, before, whole)
                elif code == 0:
                    same = written(target) == expected
                    case.outcome = "no effect" if same else "FAILED"
                    case.line = error.strip() if same else "another result"
                else:
                    case.line = complaint(code, error)
                    if not case.line and changed:
                        case.line = f"changed {changed}"
                    if not case.line:
                        case.outcome, case.line = "refused", error.strip()
                bar.update(1)
                yield case
    reader.close()


def _chosen(work: Path, base: str, name: str) -> Path:
    """A file of a run that has the state `base`, or of the folder itself."""
    if (work / name).exists():
        return work / name
    wanted = base == "finished"
    for path in sorted(work.rglob("run.json")):
        state = path.parent / "checkpoint" / "state.json"
        if (records.read_json(path)["status"] == "finished") == wanted and state.exists():
            arrays = state.with_name(records.read_json(state)["arrays"])
            return {"state.json": state, "arrays": arrays}.get(name, path.with_name(name))
    raise SystemExit(f"{work}: no run is {base}")


def _ended(case: Case, work: Path, relative: Path, before: dict[str, bytes], whole: Whole) -> Case:
    """The case of a run that ended although one of its files was damaged."""
    now = raw(work)
    differ = differing(contents(work), whole.contents)
    if not differ or now == before:
        case.outcome = "no effect"
        return case
    case.line = f"differs in {differ}"
    cell = "/".join(relative.parts[:4]) + "/"  # cells/ENVIRONMENT/CONDITION/SEEDS
    elsewhere = [name for name in differ.split(", ") if not name.startswith(cell)]
    kept = all(now.get(name) == data for name, data in before.items() if name.startswith(cell))
    if elsewhere == ["compare.json"] and kept:
        cells = json.loads(now["compare.json"])["cells"]
        errors = [p["error"] for c in cells for p in c["populations"] if p["state"] == "failed"]
        if len(errors) == 1 and "\n" not in errors[0]:
            case.outcome, case.line = "marked", errors[0]
    return case


TARGETS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    # Which folder, of which subject, which file, read by which commands.
    ("half done", "train", "run.json", ("train", "trace", "export", "report")),
    ("half done", "train", "state.json", ("train", "trace", "export")),
    ("half done", "train", "arrays", ("train", "trace", "export")),
    ("half done", "train", "metrics.parquet", ("train", "report")),
    ("half done", "train, host environment", "state.json", ("train",)),
    ("finished", "train", "run.json", ("train", "trace", "export", "report")),
    ("finished", "train", "state.json", ("trace", "export")),
    ("finished", "train", "arrays", ("trace", "export")),
    ("finished", "train", "metrics.parquet", ("train", "report")),
    ("half done", "study", "run.json", ("study",)),
    ("half done", "study", "state.json", ("study",)),
    ("half done", "study", "arrays", ("study",)),
    ("half done", "study", "metrics.parquet", ("study",)),
    ("finished", "study", "study.json", ("study", "report")),
    ("half done", "compare", "run.json", ("compare",)),
    ("half done", "compare", "state.json", ("compare",)),
    ("half done", "compare", "arrays", ("compare",)),
    ("half done", "compare", "metrics.parquet", ("compare",)),
    ("finished", "compare", "compare.json", ("compare",)),
)


def every_byte(place: Place, wholes: dict[str, Whole]) -> list[dict[str, Any]]:
    """Each byte changed and each length cut, as the package's readers see it."""
    reader = Batch(place)
    rows = []
    for base, name in (("half", "run.json"), ("half", "state.json"), ("whole", "metrics.parquet")):
        whole = wholes["train"]
        out = place.copy(whole.half if base == "half" else whole.folder)
        (path,) = out.rglob(name)
        found, error = reader.ask(["read", str(path)])
        if not isinstance(found, dict):
            found = {"bytes": path.stat().st_size, "cut wrong": 1, "error": error}
        rows.append({"file": name, **found})
    reader.close()
    return rows


# --- results ----------------------------------------------------------------------------------


def other_files(run: dict[str, Any]) -> bool:
    """Whether a run ended with other files than one that was never stopped."""
    return bool(run["differs"])


def other_exit(run: dict[str, Any]) -> bool:
    """Whether its last process ended with another exit code than 0, or complained."""
    return bool(run["code"] or run["stderr"])


def kills_table(record: dict[str, Any]) -> str:
    """The kills as Markdown."""
    lines = [
        "| command | runs | kills | killed more than once | kills at a file operation "
        "| other files than a run that was never stopped | exit code other than 0 |",
        "|---|---|---|---|---|---|---|",
    ]
    left: Counter[str] = Counter()
    sums = np.zeros(6, int)
    for subject in SUBJECTS:
        runs, exact = record["kills"][subject], record["operation_kills"][subject]
        for run in [*runs, *exact]:
            left.update(run["left"])
        row = (
            len(runs) + len(exact),
            sum(len(run["killed_after_s"]) for run in runs),
            sum(len(run["killed_after_s"]) > 1 for run in runs),
            len(exact),
            sum(map(other_files, [*runs, *exact])),
            sum(map(other_exit, [*runs, *exact])),
        )
        sums += row
        lines.append(f"| {subject} | " + " | ".join(map(str, row)) + " |")
    lines.append("| **all** | " + " | ".join(f"**{number}**" for number in sums) + " |")
    states = ", ".join(f"{name} ({number})" for name, number in left.most_common())
    return "\n".join([*lines, "", f"What the kills left: {states}.", "", _foot(record)]) + "\n"


def faults_table(record: dict[str, Any]) -> str:
    """The faults as Markdown."""
    cases = [Case(**case) for case in record["faults"]]
    outcomes = ("refused", "continued", "no effect", "marked", "skipped", "FAILED")
    lines = ["| fault | where | cases | " + " | ".join(outcomes) + " |", "|---|---|" + "---|" * 7]
    for fault, where in dict.fromkeys((case.fault, case.where) for case in cases):
        mine = Counter(case.outcome for case in cases if (case.fault, case.where) == (fault, where))
        numbers = (mine.total(), *(mine[outcome] for outcome in outcomes))
        cells = " | ".join(str(number) if number else "-" for number in numbers)
        lines.append(f"| {fault} | {where} | {cells} |")
    every = Counter(case.outcome for case in cases)
    cells = " | ".join(f"**{number}**" for number in (len(cases), *(every[o] for o in outcomes)))
    lines += [f"| **all** | | {cells} |", ""]
    lines += [
        f"Skipped: {why}." for why in sorted({c.line for c in cases if c.outcome == "skipped"})
    ]
    lines += [
        "",
        "| file | bytes | cut at every length: refused | no effect | wrong "
        "| every byte changed: refused | no effect | wrong |",
        "|---|" + "---|" * 7,
    ]
    for row in record["every_byte"]:
        hows = ("refused", "without effect", "wrong")
        kinds = [f"{kind} {how}" for kind in ("cut", "flip") for how in hows]
        shown = " | ".join(str(row.get(kind, 0)) for kind in ("bytes", *kinds))
        lines.append(f"| `{row['file']}` | {shown} |")
    return "\n".join([*lines, "", _foot(record)]) + "\n"


def _foot(record: dict[str, Any]) -> str:
    machine = record["machine"]
    cores = f"{machine['cores']} core" + ("" if machine["cores"] == 1 else "s")
    return (
        f"`{record['command']}`, seed {record['seed']}, {record['wall_s'] / 60:.0f} minutes on "
        f"{cores} ({machine['processor']})."
    )


def kills(place: Place, wholes: dict[str, Whole], args: argparse.Namespace) -> dict[str, Any]:
    """All kills."""
    draw = np.random.default_rng(args.seed)
    number, exact, turns = (10, 1, 1) if args.quick else (args.kills, 3, 5)
    found: dict[str, Any] = {
        name: {subject: [] for subject in wholes} for name in ("kills", "operation_kills")
    }
    with tqdm(total=number + exact * len(wholes), desc="kills") as bar:
        for turn in range(turns):  # a machine that is busy for a while is so for all of them
            for subject, whole in wholes.items():
                before, after = (
                    round(SHARES[subject] * number * t / turns) for t in (turn, turn + 1)
                )
                found["kills"][subject] += kill_at_random(
                    place, subject, whole, after - before, draw, bar
                )
        for subject, whole in wholes.items():
            found["operation_kills"][subject] = kill_at_operations(
                place, subject, whole, exact, draw, bar
            )
    return found


def faults(place: Place, wholes: dict[str, Whole], args: argparse.Namespace) -> dict[str, Any]:
    """All faults."""
    cases: list[Case] = []
    for make in tqdm(MACHINE, desc="faults of the machine"):
        for subject, whole in wholes.items():
            cases += make(place, subject, whole)
    with tqdm(desc="damaged files") as bar:
        cases += damaged_files(place, wholes, 3 if args.quick else 1, bar)
    for case in cases:
        if case.outcome == "FAILED":
            print("FAILED:", case.fault, case.where, case.what, case.line, sep="  ")
    return {"faults": [asdict(case) for case in cases], "every_byte": every_byte(place, wholes)}


PARTS = {"kills": (kills, kills_table), "faults": (faults, faults_table)}


def main() -> None:
    """Do it all and write down what happened."""
    if sys.argv[1:2] == ["--worker"]:
        how, *words = sys.argv[2:]
        if how == "batch":
            batch(*words)
            return
        sys.exit(worker(how, words))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part of the two")
    parser.add_argument("--kills", type=int, default=100, help="at random moments, in all [100]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--quick", action="store_true", help="10 kills, and a third of the damage")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        place = Place(Path(folder))
        wholes = {subject: prepare(place, subject) for subject in tqdm(SUBJECTS, desc="whole runs")}
        for name, (make, table) in PARTS.items():
            if args.only not in (None, name):
                continue
            began = time.perf_counter()
            found = json.dumps(records.to_json(make(place, wholes, args)))
            record = {
                "command": shlex.join(["python", "benchmarks/reliability.py", *sys.argv[1:]]),
                "seed": args.seed,
                "wall_s": time.perf_counter() - began,
                "machine": records.machine(),
                "versions": records.versions("jax", "jaxlib", "numpy", "pyarrow", "safetensors"),
                "subjects": SUBJECTS,
                "undisturbed_s": {subject: whole.seconds for subject, whole in wholes.items()},
                "file_operations": {subject: whole.operations for subject, whole in wholes.items()},
                **json.loads(found.replace(f"{place.path}/", "")),
            }
            bench.write(args.out, f"reliability_{name}", record, table(record))


if __name__ == "__main__":
    main()
