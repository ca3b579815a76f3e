"""Comparisons on a real Ray cluster: two nodes with one CPU each, on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchproof.lab import loop

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray"),
]

WORDS = (
    "compare --algo ddpg --norm none,critic:batch --env batchproof/ConstantReward-v0 --seeds 3 "
    "--hidden 8,8 --batch-size 8 --learning-starts 20 --eval-episodes 1 --steps 10000 "
    "--eval-every 100"
)
PATIENCE = 180.0  # seconds; a machine under load is slow, not broken

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
node = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(node, allow_graceful=False)
    node = cluster.add_node(num_cpus=1)
    print("another node", flush=True)
cluster.shutdown()
"""

COMMAND = """
from batchproof import cli
from batchproof.compare import on_ray
on_ray.CHECKPOINT_S = 0.0
cli.run()
"""


class Nodes:
    """Two nodes of a cluster, in processes of their own."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert ":" in self.address

    def lose_one(self) -> None:
        """Kill all processes of the second node; another takes its place."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "another node\n"

    def compare(self, out: Path, words: str = WORDS) -> subprocess.Popen[str]:
        """A comparison on the cluster, with a checkpoint at every evaluation."""
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *shlex.split(words), "--out", str(out),
             "--on", f"ray:{self.address}"],
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    env = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = Nodes(env)
    yield started
    started.process.communicate(timeout=60)  # an end of its input is an end of the cluster


@pytest.fixture(scope="module")
def here(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same comparison without a cluster."""
    out = tmp_path_factory.mktemp("here") / "out"
    local(out, nodes)
    return out


def local(out: Path, nodes: Nodes, words: str = WORDS) -> None:
    command = [sys.executable, "-m", "batchproof", *shlex.split(words), "--out", str(out)]
    subprocess.run(command, env=nodes.env, check=True, capture_output=True, timeout=PATIENCE)


def runs(out: Path) -> list[Path]:
    return sorted(out.glob("cells/*/*/*/run.json"))


def check_equal(one: Path, other: Path) -> None:
    """Every number of every run is the same, to the last bit."""
    assert len(runs(one)) == len(runs(other)) == 2
    for mine, theirs in zip(runs(one), runs(other), strict=True):
        held, again = (loop.read_metrics(p.with_name("metrics.parquet")) for p in (mine, theirs))
        assert held.keys() == again.keys()
        for name, values in held.items():
            np.testing.assert_array_equal(values, again[name], err_msg=name)


def wait_until(holds: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = holds()
        if found:
            return found
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    pytest.fail("nothing happened")


def workers(out: Path) -> dict[str, int]:
    """Processes that hold a run's folder, by the condition's name."""
    found = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith(str(out / "cells")) and target.endswith(".lock"):
            found[target.split("/")[-3]] = int(link.parts[2])
    return found


def both_under_way(out: Path) -> dict[str, int]:
    """The two workers, once both runs have a checkpoint."""
    saved = list(out.glob("cells/*/*/*/checkpoint/state.json"))
    found = workers(out) if len(saved) == 2 else {}
    return found if len(found) == 2 else {}


@pytest.mark.parametrize("lost", ["worker", "node"])
def test_what_a_lost_worker_had_goes_on_at_its_checkpoint(
    lost: str, nodes: Nodes, here: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = nodes.compare(out)
    under_way = wait_until(lambda: both_under_way(out), process)
    raylets = {Path(f"/proc/{pid}/stat").read_text().split()[3] for pid in under_way.values()}
    assert len(raylets) == 2, "one node runs both"
    if lost == "worker":
        os.kill(under_way["ddpg-none"], signal.SIGKILL)
    else:
        nodes.lose_one()
    shown, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told
    again = [line for line in told.splitlines() if "its worker died, another goes on" in line]
    assert len(again) == 1, told
    if lost == "worker":
        assert "ddpg-none" in again[0]
    assert int(again[0].rsplit(" ", 1)[1].replace(",", "")) > 0
    assert told.count(": finished, return") == 2
    check_equal(out, here)
    held, reference = (json.loads((p / "compare.json").read_text()) for p in (out, here))
    assert held["statistics"] == reference["statistics"]
    assert held["sentences"] == reference["sentences"]
    assert all(sentence in shown for sentence in held["sentences"])


@pytest.mark.parametrize("presses", [1, 2])
def test_an_interrupt_leaves_a_state_that_goes_on_without_the_cluster(
    presses: int, nodes: Nodes, here: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = nodes.compare(out)
    wait_until(lambda: both_under_way(out), process)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    shown, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, told
    assert "Interrupted: 0 of 2 cells are finished; the same command continues." in shown
    record = json.loads((out / "compare.json").read_text())
    assert record["status"] == "interrupted"
    assert all(cell["populations"][0]["step"] > 0 for cell in record["cells"])
    assert not workers(out)
    local(out, nodes)
    check_equal(out, here)


def test_the_same_command_goes_on_where_it_was_killed(
    nodes: Nodes, here: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = nodes.compare(out)
    wait_until(lambda: both_under_way(out), process)
    process.kill()
    process.communicate()
    _, told = nodes.compare(out).communicate(timeout=PATIENCE)
    assert told.count(": finished, return") == 2
    check_equal(out, here)


def test_a_budget_that_is_spent_begins_nothing(nodes: Nodes, tmp_path: Path) -> None:
    process = nodes.compare(tmp_path, f"{WORDS} --budget 1s")
    shown, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told
    assert "Stopped by --budget: 0 of 2 cells are finished" in shown
    assert not runs(tmp_path)


def test_the_cluster_file_of_the_docs_is_one_that_ray_takes() -> None:
    import jsonschema
    import yaml

    page = (Path(__file__).parents[2] / "docs" / "ray.md").read_text(encoding="utf-8")
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = Path(spec.origin).parent / "autoscaler" / "ray-schema.json"
    config = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    jsonschema.validate(config, json.loads(schema.read_text(encoding="utf-8")))
    assert config["head_node_type"] in config["available_node_types"]
