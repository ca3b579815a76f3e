"""Observations from files: ``.npy``, ``.npz`` and Parquet, read without unpickling anything."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from batchproof.clinic.subject import Obs, rows, tensors
from batchproof.errors import BatchproofError

MOST_BYTES = 4 << 30
"""Files that unpack to more are refused: nothing that an audit needs is so large."""

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_observations(path: Path | str, key: str | None = None) -> Obs:
    """Observations (N, ...) from a file.

    Args:
        path: ``.npy``; ``.npz``, where several arrays are the keys of a Dict observation; or
            ``.parquet``, where every numeric column is a feature, or one column of equally long
            lists is the observation.
        key: the one array of an ``.npz`` or the one column of a Parquet file to take.

    Returns:
        float32, or int64 or uint8 where the file holds integers or bytes.

    Raises:
        BatchproofError: missing, cut short, of another kind, with objects, text, NaN or infinity
            in it, without rows, or a float array of rank 1.
    """
    path = Path(path)
    readers = {".npy": _read_npy, ".npz": _read_npz, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BatchproofError(
            f"{path}: unknown kind of file: write observations as .npy, .npz or .parquet"
        )
    if not path.is_file():
        raise BatchproofError(f"{path}: no such file")
    if key is not None and reader is _read_npy:
        raise BatchproofError(f"{path}: a .npy holds one array and has no keys: leave the key out")
    try:
        arrays = reader(path, key)
    except BatchproofError:
        raise
    # The readers of damaged files raise nearly anything, and all of it means the same.
    except Exception as error:
        line = " ".join(str(error).split())[:120]
        raise BatchproofError(
            f"{path}: not a readable {path.suffix} file ({line or type(error).__name__}): it was "
            "cut short or is of another kind"
        ) from None
    if isinstance(arrays, dict):
        parts = {name: _tensor(array, f"{path}: {name}") for name, array in arrays.items()}
        counts = {name: len(part) for name, part in parts.items()}
        if len(set(counts.values())) > 1:
            raise BatchproofError(
                f"{path}: the arrays of a Dict observation must have equally many rows, got "
                + ", ".join(f"{name} {count}" for name, count in counts.items())
            )
        return parts
    return _tensor(arrays, str(path))


def check_against(
    obs: Obs, shape: tuple[int, ...] | Mapping[str, tuple[int, ...]], name: str = "observations"
) -> None:
    """Compare observations with the shape of one observation.

    Args:
        obs: (N, ...).
        shape: of one observation, without the batch axis; one for each key of a Dict space.
        name: what the message calls them, for example the file.

    Raises:
        BatchproofError: another shape or other keys; says which were expected and which came.
    """
    if isinstance(shape, Mapping):
        if not isinstance(obs, dict):
            raise BatchproofError(
                f"{name}: the policy takes a Dict observation with the keys "
                f"{', '.join(shape)}, got one array: write an .npz with one array for each key"
            )
        if set(obs) != set(shape):
            raise BatchproofError(
                f"{name}: the policy takes the keys {', '.join(sorted(shape))}, "
                f"got {', '.join(sorted(obs))}"
            )
        for key, one in shape.items():
            check_against(obs[key], one, f"{name}: {key}")
        if len({len(part) for part in tensors(obs)}) > 1:
            raise BatchproofError(f"{name}: the keys must have equally many rows")
        return
    if isinstance(obs, dict):
        raise BatchproofError(
            f"{name}: the policy takes one array {_shape(shape)}, got the keys {', '.join(obs)}: "
            "choose one of them"
        )
    if tuple(obs.shape[1:]) != tuple(shape) or obs.ndim == 0:
        hint = ": add the batch axis" if tuple(obs.shape) == tuple(shape) else ""
        got = _shape(tuple(obs.shape[1:]), rows(obs)) if obs.ndim else "a scalar"
        raise BatchproofError(
            f"{name}: the policy takes observations of shape {_shape(shape)}, got {got}{hint}"
        )


def _shape(shape: tuple[int, ...], count: int | str = "N") -> str:
    return "(" + ", ".join(str(size) for size in (count, *shape)) + ("," if not shape else "") + ")"


def _read_npy(path: Path, key: str | None) -> np.ndarray:
    with open(path, "rb") as file:
        return _read_array(file, path.stat().st_size, str(path))


def _read_npz(path: Path, key: str | None) -> np.ndarray | dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if not infos:
            raise BatchproofError(f"{path}: there is no array in it")
        if key is not None and key not in infos:
            raise BatchproofError(f"{path}: no array {key!r}: there are {', '.join(infos)}")
        chosen = infos if key is None else {key: infos[key]}
        if sum(info.file_size for info in chosen.values()) > MOST_BYTES:
            raise BatchproofError(f"{path}: unpacks to more than 4 GiB: write fewer observations")
        for name, info in chosen.items():
            with archive.open(info) as member:
                arrays[name] = _read_array(member, info.file_size, f"{path}: {name}")
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _read_array(file: IO[bytes], size: int, name: str) -> np.ndarray:
    # The header is compared with the size first: a damaged one may ask for any amount of memory.
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"unknown version {version}")
    shape, fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise BatchproofError(
            f"{name}: it holds Python objects, which would have to be unpickled: write numbers"
        )
    if dtype.kind not in "fiub":
        raise BatchproofError(f"{name}: it holds {dtype}, not numbers")
    # Python's integers do not overflow.
    count = math.prod(int(extent) for extent in shape)
    if any(extent < 0 for extent in shape) or count * dtype.itemsize > min(size, MOST_BYTES):
        raise ValueError(f"its header promises {count} numbers")
    data = file.read(count * dtype.itemsize)
    flat = np.frombuffer(data, dtype=dtype, count=count)
    return flat.reshape(shape, order="F" if fortran else "C")


def _read_parquet(path: Path, key: str | None) -> np.ndarray:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise BatchproofError(
            f"{path}: reading Parquet needs pyarrow (pip install pyarrow): or write .npy"
        ) from None
    table = pq.ParquetFile(path).read()
    if key is not None:
        if key not in table.column_names:
            raise BatchproofError(
                f"{path}: no column {key!r}: there are {', '.join(table.column_names)}"
            )
        table = table.select([key])
    if table.num_columns == 0:
        raise BatchproofError(f"{path}: there is no column in it")

    def numeric(kind: Any) -> bool:
        return bool(
            pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        )

    kinds = {field.name: field.type for field in table.schema}
    nested = [
        name
        for name, kind in kinds.items()
        if (
            pa.types.is_list(kind)
            or pa.types.is_large_list(kind)
            or pa.types.is_fixed_size_list(kind)
        )
        and numeric(kind.value_type)
    ]
    if nested and table.num_columns > 1:
        raise BatchproofError(f"{path}: choose the column of lists by key: {', '.join(nested)}")
    other = [name for name, kind in kinds.items() if not numeric(kind) and name not in nested]
    if other:
        raise BatchproofError(
            f"{path}: column {other[0]!r} is {kinds[other[0]]}, not numbers: leave it out"
        )
    columns = [table.column(index).combine_chunks() for index in range(table.num_columns)]
    if any(column.null_count for column in columns):
        raise BatchproofError(f"{path}: there are empty cells: leave those rows out")
    if nested:
        lists = columns[0]
        values = lists.flatten()
        if values.null_count:
            raise BatchproofError(f"{path}: there are empty cells: leave those rows out")
        lengths = {len(entry) for entry in lists}
        if len(lengths) > 1:
            raise BatchproofError(f"{path}: the lists of {nested[0]!r} have different lengths")
        width = lengths.pop() if lengths else 0
        return values.to_numpy(zero_copy_only=False).reshape(len(lists), width)
    return np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1)


def _tensor(array: np.ndarray, name: str) -> Tensor:
    if array.ndim == 0:
        raise BatchproofError(f"{name}: a single number: write an array (N, ...)")
    if len(array) == 0:
        raise BatchproofError(f"{name}: there are no observations in it")
    if array.size == 0:
        raise BatchproofError(f"{name}: its shape is {array.shape}: each observation is empty")
    if array.dtype.kind == "f":
        if array.ndim == 1:
            raise BatchproofError(
                f"{name}: a float array of rank 1: write (N, features), with N = 1 for a single "
                "observation"
            )
        # float32 is what policies take; beyond its range is infinity, which is refused as well.
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise BatchproofError(
                f"{name}: there is NaN or infinity in it: leave those observations out"
            )
    elif array.dtype.kind == "b":
        array = array.astype(np.float32)
    elif array.dtype != np.uint8:
        array = array.astype(np.int64)
    return torch.from_numpy(np.array(array, order="C", copy=True))
