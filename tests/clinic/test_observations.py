"""Observations come out of files as they went in, and no damaged file does anything but refuse."""

import os
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from batchproof.clinic.observations import check_against, read_observations
from batchproof.errors import BatchproofError


class Marker:
    """Unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(path, key=None, match=None):
    with pytest.raises(BatchproofError, match=match) as caught:
        read_observations(path, key)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (np.float32, torch.float32),
        (np.float64, torch.float32),
        (np.float16, torch.float32),
        (">f4", torch.float32),
        (np.uint8, torch.uint8),
        (np.int32, torch.int64),
        (bool, torch.float32),
    ],
)
def test_npy(tmp_path, dtype, expected, order):
    array = np.asarray(np.arange(24).reshape(4, 3, 2), dtype=dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    obs = read_observations(tmp_path / "a.npy")
    assert obs.dtype == expected
    np.testing.assert_array_equal(obs.numpy(), array.astype(obs.numpy().dtype))
    obs.zero_()  # it may be written to


def test_discrete_observations_are_a_vector_of_integers(tmp_path):
    np.save(tmp_path / "a.npy", np.array([3, 1, 2]))
    assert read_observations(tmp_path / "a.npy").tolist() == [3, 1, 2]


def test_npz_with_one_array_and_with_several(tmp_path):
    one, two = np.ones((5, 2)), np.zeros((5, 3), np.uint8)
    np.savez(tmp_path / "one.npz", one)
    assert read_observations(tmp_path / "one.npz").shape == (5, 2)
    np.savez_compressed(tmp_path / "two.npz", point=one, frame=two)
    obs = read_observations(tmp_path / "two.npz")
    assert {key: tuple(part.shape) for key, part in obs.items()} == {
        "point": (5, 2),
        "frame": (5, 3),
    }
    assert read_observations(tmp_path / "two.npz", "frame").dtype == torch.uint8
    refused(tmp_path / "two.npz", "other", match="no array 'other': there are point, frame")


def test_npz_rows_must_agree(tmp_path):
    np.savez(tmp_path / "a.npz", point=np.ones((5, 2)), goal=np.ones((4, 2)))
    refused(tmp_path / "a.npz", match="equally many rows, got point 5, goal 4")


def test_parquet_columns_and_lists(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [1.0, 2.0], "speed": [3, 4], "on": [True, False]}), path)
    assert read_observations(path).tolist() == [[1, 3, 1], [2, 4, 0]]
    assert read_observations(path, "speed").tolist() == [[3], [4]]
    refused(path, "other", match="no column 'other'")
    lists = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    for kind in (pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 3)):
        pq.write_table(pa.table({"obs": pa.array(lists, type=kind), "t": [0, 1]}), path)
        assert read_observations(path, "obs").tolist() == lists
    refused(path, match="choose the column of lists by key: obs")


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"name": ["a", "b"]}, "column 'name' is string, not numbers"),
        ({"x": [1.0, None]}, "empty cells"),
        ({"x": [1.0, float("nan")]}, "NaN or infinity"),
        ({"x": [[1.0], [1.0, 2.0]]}, "different lengths"),
        ({"x": [[1.0, None], [1.0, 2.0]]}, "empty cells"),
        ({"x": pa.array([], pa.float32())}, "no observations"),
        ({}, "no column"),
    ],
)
def test_parquet_refused(tmp_path, columns, match):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", match=match)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((0, 3)), "no observations"),
        (np.zeros((3, 0)), "each observation is empty"),
        (np.zeros(()), "a single number"),
        (np.zeros(3), "rank 1"),
        (np.array([[1.0, np.nan]]), "NaN or infinity"),
        (np.array([[1.0, np.inf]]), "NaN or infinity"),
        (np.array([[1e300]]), "NaN or infinity"),
        (np.array([["a"]]), "not numbers"),
        (np.array([[1j]]), "not numbers"),
        (np.array([[1.0]], dtype=object), "Python objects"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_refused(tmp_path, array, match, suffix):
    save = np.save if suffix == ".npy" else np.savez
    save(tmp_path / f"a{suffix}", array)
    refused(tmp_path / f"a{suffix}", match=match)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_nothing_is_unpickled(tmp_path, suffix):
    marker = tmp_path / "was-unpickled"
    (np.save if suffix == ".npy" else np.savez)(
        tmp_path / f"a{suffix}", np.array([Marker(marker)], dtype=object)
    )
    refused(tmp_path / f"a{suffix}", match="Python objects")
    assert not marker.exists()


def test_wrong_files(tmp_path):
    refused(tmp_path / "gone.npy", match="no such file")
    refused(tmp_path / "a.csv", match="unknown kind of file")
    np.save(tmp_path / "a.npy", np.ones((2, 2)))
    refused(tmp_path / "a.npy", "key", match="has no keys")
    (tmp_path / "text.npy").write_text("hello")
    refused(tmp_path / "text.npy", match="not a readable .npy")
    (tmp_path / "empty.npz").write_bytes(b"")
    refused(tmp_path / "empty.npz", match="not a readable .npz")
    (tmp_path / "folder.npy").mkdir()
    refused(tmp_path / "folder.npy", match="no such file")


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path):
    header = {"descr": "<f8", "fortran_order": False, "shape": (1 << 50, 4)}
    with open(tmp_path / "c.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    refused(tmp_path / "c.npy", match="its header promises")
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.write(tmp_path / "c.npy", "obs.npy")
    refused(tmp_path / "d.npz", match="its header promises")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".parquet"])
def test_fuzzed_files_are_read_or_refused(tmp_path, suffix):
    rng = np.random.default_rng(0)
    whole = tmp_path / f"whole{suffix}"
    array = rng.normal(size=(6, 3)).astype(np.float32)
    if suffix == ".npy":
        np.save(whole, array)
    elif suffix == ".npz":
        np.savez_compressed(whole, a=array, b=array)
    else:
        pq.write_table(pa.table({str(i): array[:, i] for i in range(3)}), whole)
    raw = whole.read_bytes()
    damaged = [raw[:cut] for cut in rng.integers(0, len(raw), 60)]
    for _ in range(140):
        changed = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(len(raw))] = rng.integers(256)
        damaged.append(bytes(changed))
    outcomes = set()
    for index, content in enumerate(damaged):
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(content)
        try:
            read_observations(path)
            outcomes.add("read")
        except BatchproofError:
            outcomes.add("refused")
            continue
        assert index >= 60 or len(content) == len(raw), "a file that was cut short was read"
    assert "refused" in outcomes


def test_check_against_says_what_was_expected_and_what_came():
    check_against(torch.zeros(5, 3), (3,))
    check_against(torch.zeros(5, dtype=torch.int64), ())
    check_against({"a": torch.zeros(5, 2)}, {"a": (2,)})
    with pytest.raises(BatchproofError, match=r"shape \(N, 4\), got \(5, 3\)"):
        check_against(torch.zeros(5, 3), (4,))
    with pytest.raises(BatchproofError, match="add the batch axis"):
        check_against(torch.zeros(3, 4), (3, 4))
    with pytest.raises(BatchproofError, match=r"file: a.*\(N, 2\), got \(5, 3\)"):
        check_against({"a": torch.zeros(5, 3)}, {"a": (2,)}, "file")
    with pytest.raises(BatchproofError, match="takes the keys a, b, got a"):
        check_against({"a": torch.zeros(5, 2)}, {"a": (2,), "b": (2,)})
    with pytest.raises(BatchproofError, match="got one array"):
        check_against(torch.zeros(5, 2), {"a": (2,)})
    with pytest.raises(BatchproofError, match="got the keys a"):
        check_against({"a": torch.zeros(5, 2)}, (2,))
    with pytest.raises(BatchproofError, match="equally many rows"):
        check_against({"a": torch.zeros(5, 2), "b": torch.zeros(4, 2)}, {"a": (2,), "b": (2,)})
