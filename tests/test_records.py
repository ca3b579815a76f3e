"""Records: strict JSON, whole files, and one writer at a time."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
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
