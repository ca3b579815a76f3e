"""Comparisons on a Ray cluster: what can be known without one."""

from __future__ import annotations

import fcntl
import math
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from batchproof.cli import main
from batchproof.compare import on_ray
from batchproof.compare.on_ray import DEATHS, Board, Orders
from batchproof.errors import BatchproofError

SMALL = "compare --algo ddpg --norm none --env batchproof/ConstantReward-v0 --hidden 8,8"


@pytest.mark.parametrize("on", ["slurm", "ray:", "ray:somewhere", "ray:here:x", "rayon"])
def test_a_place_that_is_none_is_one_line(
    on: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*shlex.split(SMALL), "--on", on, "--out", str(tmp_path / "out")]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert f"{on!r} is no place to train: write ray, or ray:HOST:PORT" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("on", "module", "part"),
    [
        ("ray", None, "Ray, which is not installed: pip install 'batchproof[ray]'"),
        ("ray:127.0.0.1:1", SimpleNamespace(is_initialized=lambda: False), "nothing answers at"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(
    on: str,
    module: Any,
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", module)
    assert main([*shlex.split(SMALL), "--on", on, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert part in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_board_counts_deaths_without_a_new_checkpoint() -> None:
    board = Board()
    steps = (0, 0, 0, 40, 40, 80)
    deaths = [board.begin(0, f"node {i}", step)[1] for i, step in enumerate(steps)]
    assert deaths == [0, 1, 2, 0, 1, 0]
    assert [board.begin(1, "node", 0)[1] for _ in range(DEATHS + 1)][-1] == DEATHS
    assert board.tell(0, "node 5", 120, 1.5, 10.0) == Orders(stop=False, left_s=math.inf)
    reports = board.exchange(Orders(left_s=3.0))
    assert reports[0] == ("node 5", 120, 0, True, 1.5, 10.0)
    assert board.tell(0, "node 5", 160, 1.5, 10.0).left_s == 3.0
    board.exchange(Orders(stop=True))
    assert board.begin(2, "node", 0)[0].is_over
    assert 2 not in board.exchange(Orders(left_s=0.0))
    assert board.begin(2, "node", 0)[0].is_over


def test_a_node_that_would_lose_or_change_results_says_so(tmp_path: Path) -> None:
    shared = on_ray.Shared(tmp_path, 1, {"numpy": np.__version__, "jax": "0.0.1"}, 60.0)
    with pytest.raises(
        BatchproofError, match=r"is not there on .*: choose an --out that all nodes"
    ):
        on_ray.prepare(shared)
    (tmp_path / ".lock").touch()
    with pytest.raises(BatchproofError, match=r"has jax .*, here it is 0.0.1: install the same"):
        on_ray.prepare(shared)


def test_a_worker_waits_for_a_folder_that_a_lost_one_still_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = open(tmp_path / ".lock", "w")  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            file.close()

    monkeypatch.setattr(on_ray.time, "sleep", nap)
    on_ray.wait_for(tmp_path)
    assert len(naps) == 3
