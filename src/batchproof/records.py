"""What runs leave behind: strict JSON, written so that a kill never leaves half a file.

Strict means that NaN and infinity are refused on the way in and written as null on the way out:
any JSON reader can take the files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from batchproof.errors import BatchproofError


def to_json(value: Any) -> Any:
    """The same value with NaN and infinities as None and tuples as lists, at any depth."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return to_json(value.tolist())
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON in one move: readers see the old file or the new one."""
    text = json.dumps(to_json(value), indent=1, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> Any:
    """Read strict JSON.

    Raises:
        BatchproofError: missing, not JSON, or with NaN or infinity in it.
    """

    def refuse(token: str) -> Any:
        raise ValueError(f"{token} is not JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise BatchproofError(f"{path}: no such file") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BatchproofError(
            f"{path}: not a readable JSON file ({error}); it was cut short or edited: "
            "delete the folder to start over"
        ) from None
    except OSError as error:
        raise BatchproofError(f"{path}: {error.strerror}") from None


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes the place of ``path`` only once it is whole on disk."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BatchproofError(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Create a run's folder.

    Raises:
        BatchproofError: it is a file, or may not be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BatchproofError(f"cannot write to folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise BatchproofError(f"cannot write to folder {path}: permission denied")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the kernel lets go of it even after ``kill -9``.

    Raises:
        BatchproofError: another process holds it.
    """
    make_folder(folder)
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise BatchproofError(f"cannot write to folder {folder}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BatchproofError(
                f"another process is writing to {folder}: wait for it, or choose another --out"
            ) from None
        yield


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_columns(path: Path, columns: dict[str, Any]) -> None:
    """Write columns of equal length as Parquet, in one move."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as file:
        pq.write_table(pa.table(columns), file, compression="zstd")


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, this package and the named ones, those that are installed."""
    found = {"python": platform.python_version()}
    for package in ("batchproof", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The processor's name and the cores that this process may use; nothing that names the host."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": name, "cores": cores}


def git_sha() -> str | None:
    """The commit that the package's source stands at, None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
