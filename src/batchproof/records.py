"""What runs leave behind: strict JSON and Parquet, so written that a kill never leaves half a file.

Strict means that NaN and infinity are refused on the way in and written as null on the way out:
any JSON reader can take the files. Both kinds carry a checksum of their content, so that a file
that was damaged is refused and not taken for another result; files without one, which earlier
versions wrote, are read as they are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from batchproof import cpu
from batchproof.errors import BatchproofError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHECKSUM = "checksum"
"""Where a file keeps the checksum of its content: a key of JSON, or of Parquet's own metadata."""


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
    """Write strict JSON in one move: readers see the old file or the new one.

    A dictionary gets one more key, the `CHECKSUM` of the others.
    """
    value = to_json(value)
    if isinstance(value, dict):
        value = {name: item for name, item in value.items() if name != CHECKSUM}
        value[CHECKSUM] = _checksum_of_json(value)
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> Any:
    """Read strict JSON, without its checksum.

    Raises:
        BatchproofError: missing, not JSON, with NaN or infinity in it, or not what was written.
    """

    def refuse(token: str) -> Any:
        raise ValueError(f"{token} is not JSON")

    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        held = value.pop(CHECKSUM, None) if isinstance(value, dict) else None
        if held is not None and held != _checksum_of_json(value):
            raise ValueError("its checksum differs")
    except FileNotFoundError:
        raise BatchproofError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise BatchproofError(
            f"{path}: not a readable JSON file ({error}); it was cut short, damaged or edited: "
            "delete it and run the same command again"
        ) from None
    except OSError as error:
        raise BatchproofError(f"{path}: {error.strerror}") from None
    return value


def _checksum_of_json(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes the place of ``path`` only once it is whole on disk.

    It is written beside ``path`` under a name that nobody can foresee, and that must not exist: a
    folder from somebody else may hold links, and none of them is followed.
    """
    _clear_leftovers(path)
    try:
        with _temporary_beside(path) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            finally:
                with suppress(OSError):
                    os.unlink(file.name)  # where it did not take the place of `path`
    except OSError as error:
        raise BatchproofError(f"cannot write {path}: {error.strerror or error}") from error


def _temporary_beside(path: Path) -> IO[bytes]:
    while True:
        file = open(path.parent / f".{path.name}.{secrets.token_hex(4)}.partial", "xb")  # noqa: SIM115
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # before it was locked, another writer took it for a leftover


def _clear_leftovers(path: Path) -> None:
    """Remove what killed writers of ``path`` left; the file of one that lives is locked."""
    leftover = re.compile(rf"\.{re.escape(path.name)}(\.[0-9a-f]{{8}})?\.partial")
    with suppress(OSError):
        for name in filter(leftover.fullmatch, os.listdir(path.parent)):
            with suppress(OSError):  # a link is not followed, and a locked file is in use
                _unlink_if_free(path.parent / name)


def _unlink_if_free(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


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
        BatchproofError: another process holds it, or its lock is a link to some other file.
    """
    make_folder(folder)
    path = folder / ".lock"
    try:  # the folder may be somebody else's: nothing is followed, and nothing emptied
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise BatchproofError(
                f"{path} is a symbolic link, which no run leaves there: delete it and run the "
                "same command again"
            ) from None
        raise BatchproofError(f"cannot write to folder {folder}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BatchproofError(
                f"another process is writing to {folder}: wait for it, or choose another --out"
            ) from None
        yield
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_columns(path: Path, columns: dict[str, Any]) -> None:
    """Write columns of equal length as Parquet, in one move, with their `CHECKSUM`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns)
    table = table.replace_schema_metadata({CHECKSUM: _checksum_of_columns(_arrays(table))})
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd")


def read_columns(path: Path) -> dict[str, NDArray[Any]]:
    """Read a Parquet file's columns.

    Raises:
        BatchproofError: missing, not Parquet, or not what was written.
    """
    import pyarrow.parquet as pq

    try:
        # A file object: a path is taken as a data set, and a folder NAME=VALUE as a column of it.
        with open(path, "rb") as file:
            table = pq.read_table(file)
        columns = _arrays(table)
        held = (table.schema.metadata or {}).get(CHECKSUM.encode())
        if held is not None and held != _checksum_of_columns(columns).encode():
            raise ValueError("its checksum differs")
    except FileNotFoundError:
        raise BatchproofError(f"{path}: no such file") from None
    except Exception as error:  # damaged bytes make the reader raise almost anything
        line = " ".join(str(error).split())
        raise BatchproofError(f"{path}: not a readable Parquet file ({line})") from None
    return columns


def _arrays(table: Any) -> dict[str, NDArray[Any]]:
    return {name: table[name].to_numpy() for name in table.column_names}


def _checksum_of_columns(columns: dict[str, NDArray[Any]]) -> str:
    found = hashlib.sha256()
    for name, values in columns.items():
        text = values.dtype == object
        found.update(f"{name} {values.dtype} {values.shape}\n".encode())
        found.update(repr(values.tolist()).encode() if text else values.tobytes())
    return found.hexdigest()


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": cpu.name(), "cores": cores}


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
