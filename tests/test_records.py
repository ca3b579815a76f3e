"""Records: strict JSON, whole files, and one writer at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchproof import records
from batchproof.errors import BatchproofError


def test_values_that_json_lacks_become_null_at_any_depth(tmp_path: Path) -> None:
    value = {
        "nan": math.nan,
        "deep": [{"inf": (math.inf, -math.inf, 1.5)}],
        "array": np.array([[1.0, math.nan]], np.float32),
        "scalar": np.float32(0.5),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "path": Path("a/b"),
        7: None,
    }
    records.write_json(tmp_path / "x.json", value)
    # A reader that takes nothing but strict JSON.
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert len(read.pop("checksum")) == 64
    assert read == {
        "nan": None,
        "deep": [{"inf": [None, None, 1.5]}],
        "array": [[1.0, None]],
        "scalar": 0.5,
        "count": 3,
        "flag": True,
        "path": "a/b",
        "7": None,
    }
    assert records.read_json(tmp_path / "x.json") == read


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', "[Infinity]", "[-Infinity]", '{"a": 1', "", "\ud800"],
    ids=["nan", "infinity", "minus infinity", "cut short", "empty", "not utf-8"],
)
def test_a_damaged_file_is_one_line_with_its_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BatchproofError) as caught:
        records.read_json(path)
    assert str(caught.value).startswith(f"{path}: not a readable JSON file")
    assert "\n" not in str(caught.value)


def changed(data: bytes, every: int = 1) -> Iterator[bytes]:
    """The same bytes cut at each length, and with a bit of each byte flipped."""
    for i in range(0, len(data), every):
        yield data[:i]
        yield data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]


def test_json_that_was_changed_is_refused_or_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"step": 30, "deep": [{"returns": [1.5, None, -2e-7]}], "name": "td3 µ", "on": True}
    records.write_json(path, value)
    data, said = path.read_bytes(), []
    for damaged in changed(data, every=3):
        path.write_bytes(damaged)
        try:
            read = records.read_json(path)
        except BatchproofError as error:
            said.append(str(error))
            continue
        # The end of the file, a space, or a letter of the word "checksum".
        assert {name: read[name] for name in value} == value
    assert len(said) > 0.9 * 2 * len(data) / 3
    assert all(line.startswith(f"{path}: not a readable JSON file") for line in said)
    assert not any("\n" in line for line in said)

    path.write_bytes(data.replace(b"30", b"40"))
    with pytest.raises(BatchproofError, match="its checksum differs"):
        records.read_json(path)
    path.write_bytes(b'{"step": 40}')  # as earlier versions wrote it
    assert records.read_json(path) == {"step": 40}
    records.write_json(path, value | {"checksum": "of another file"})
    assert records.read_json(path) == value


COLUMNS = {
    "seed": np.array([0, 1, 0, 1]),
    "return": np.array([1.5, np.nan, -3.0, 2.25]),
    "diverged": np.array([False, True, False, False]),
    "algo": np.array(["td3", "td3", "sac", "sac"]),
}


def test_columns_come_back_bit_for_bit(tmp_path: Path) -> None:
    # What looks like a partition of a data set is no column.
    path = tmp_path / "lr=0.1" / "metrics.parquet"
    path.parent.mkdir()
    records.write_columns(path, COLUMNS)
    read = records.read_columns(path)
    assert list(read) == list(COLUMNS)
    for name in ("seed", "return", "diverged"):
        assert read[name].dtype == COLUMNS[name].dtype
        assert read[name].tobytes() == COLUMNS[name].tobytes()
    assert read["algo"].tolist() == COLUMNS["algo"].tolist()
    records.write_columns(path, {})
    assert records.read_columns(path) == {}
    with pytest.raises(BatchproofError, match="no such file"):
        records.read_columns(tmp_path / "metrics.parquet")


def test_columns_that_were_changed_are_refused_or_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "metrics.parquet"
    records.write_columns(path, COLUMNS)
    data, said = path.read_bytes(), []
    whole = repr(records.read_columns(path))
    for damaged in changed(data, every=13):
        path.write_bytes(damaged)
        try:
            read = records.read_columns(path)
        except BatchproofError as error:
            said.append(str(error))
            continue
        assert repr(read) == whole
    assert len(said) > len(data) / 13  # all that are cut, and more
    assert all(line.startswith(f"{path}: not a readable Parquet file") for line in said)
    assert not any("\n" in line for line in said)
    path.write_bytes(data)

    changed_return = COLUMNS | {"return": np.array([1.5, np.nan, -3.0, 2.5])}
    table = pq.read_table(path)
    other = pa.table(changed_return).replace_schema_metadata(table.schema.metadata)
    pq.write_table(other, path)
    with pytest.raises(BatchproofError, match="its checksum differs"):
        records.read_columns(path)
    pq.write_table(pa.table(changed_return), path)  # as earlier versions wrote it
    assert records.read_columns(path)["return"][-1] == 2.5


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BatchproofError, match=r"x\.json: no such file"):
        records.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), ValueError()])
def test_a_writer_that_fails_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    records.write_json(path, {"old": 1})
    wanted = BatchproofError if isinstance(error, OSError) else type(error)

    def write() -> None:
        with records.replacing(path) as file:
            file.write(b"half of")
            raise error

    with pytest.raises(wanted):
        write()
    assert records.read_json(path) == {"old": 1}
    records.write_json(path, {"new": 2})
    assert records.read_json(path) == {"new": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with records.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BatchproofError, match="cannot write"):
        records.write_json(tmp_path / "missing" / "x.json", 1)
    (tmp_path / "file").touch()
    with pytest.raises(BatchproofError, match="cannot write to folder"):
        records.make_folder(tmp_path / "file")


def test_a_link_that_came_with_a_folder_is_not_written_through(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    folder.mkdir()
    for name in (".x.json.partial", ".x.json.01234567.partial"):
        (folder / name).symlink_to(victim)
    (folder / ".lock").symlink_to(victim)
    records.write_json(folder / "x.json", {"a": 1})
    assert not (folder / "x.json").is_symlink()
    with (
        pytest.raises(BatchproofError, match=r"\.lock is a symbolic link.*: delete it") as caught,
        records.locked(folder),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert victim.read_text() == "precious"


def test_a_lock_keeps_what_is_in_its_file(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("a note")
    with records.locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "a note"


def test_a_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        records.write_json(tmp_path / "x.json", {})
    finally:
        os.umask(mask)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o640


WRITE = """
import sys
from pathlib import Path
from batchproof.records import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half of")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_killed_writers_left_goes_and_a_live_one_s_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    (tmp_path / ".x.json.partial").touch()  # as earlier versions called it
    (tmp_path / ".other.json.01234567.partial").touch()
    with subprocess.Popen(
        [sys.executable, "-c", WRITE, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        records.write_json(path, {"a": 1})
        (left,) = tmp_path.glob(".x.json*")
        assert left.name.endswith(".partial")  # the live one's
        writer.kill()
        writer.wait()
    assert left.exists()
    records.write_json(path, {"a": 2})
    names = sorted(each.name for each in tmp_path.iterdir())
    assert names == [".other.json.01234567.partial", "x.json"]
    assert records.read_json(path) == {"a": 2}


def test_a_file_that_another_writer_took_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def flock(file: object, how: int) -> None:
        if not taken:
            taken.extend(tmp_path.glob(".x.json.*.partial"))
            taken[0].unlink()

    monkeypatch.setattr(records.fcntl, "flock", flock)
    records.write_json(tmp_path / "x.json", {"a": 1})
    assert taken
    assert records.read_json(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize("path", [".", "/", ".."])
def test_a_folder_cannot_be_written_as_a_file(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BatchproofError, match=f"cannot write {path}: "):
        records.write_json(Path(path), 1)
    assert list(tmp_path.iterdir()) == []


TAKE_LOCK = """
import sys
from pathlib import Path
from batchproof.records import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_writer_until_that_one_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", TAKE_LOCK, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(BatchproofError, match="another process is writing to"),
            records.locked(folder),
        ):
            pass
        holder.kill()
        holder.wait()
        with records.locked(folder):
            pass
    with records.locked(folder):  # and it can be taken again
        pass


def test_digest_versions_and_machine(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert records.file_digest(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
    found = records.versions("numpy", "no-such-package")
    assert found["numpy"] == np.__version__
    assert set(found) == {"python", "batchproof", "numpy"}
    assert records.machine()["cores"] >= 1
