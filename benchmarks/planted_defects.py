"""Planted defects and healthy policies: what the audit finds, and what it must not.

    python benchmarks/planted_defects.py

Runs every rule on every planted defect and every healthy policy of the test suite and writes the
table of `docs/planted-defects.md` into ``results/planted-defects/``. A defect counts as found when
the rule of its code fails or asks for review and one of its findings names its layer.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from batchproof import records

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path) -> Any:
    """A module of the test suite, by its file."""
    spec = importlib.util.spec_from_file_location(f"planted_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planted() -> dict[str, tuple[Callable[[], Any], str, str]]:
    """Every planted defect by name: how to build it, its rule's code and its layer."""
    found: dict[str, tuple[Callable[[], Any], str, str]] = {}
    for path in sorted((ROOT / "tests" / "clinic").glob("planted_*.py")):
        found |= load(path).PLANTED
    return found


def healthy() -> dict[str, Callable[[], Any]]:
    """Every healthy policy by name."""
    return load(ROOT / "tests" / "sb3" / "healthy.py").HEALTHY


def names_layer(outcome: Any, layer: str) -> bool:
    """Whether a finding names the layer as first, largest or by its site."""
    return any(
        layer in f"{f.network}.{f.first} {f.network}.{f.largest} {f.site} {f.message}"
        for f in outcome.findings
    )


def examine(name: str, build: Callable[[], Any], code: str = "", layer: str = "") -> dict[str, Any]:
    """One row: what was planted and what was found."""
    from batchproof.clinic.rules import Status, all_rules, audit

    report = audit(build(), only=list(all_rules()))  # those on request included
    by_status = {
        status: [c for c, o in report.outcomes.items() if o.status is status]
        for status in (Status.FAIL, Status.REVIEW, Status.SKIPPED)
    }
    row = {
        "name": name,
        "failed": by_status[Status.FAIL],
        "review": by_status[Status.REVIEW],
        "skipped": by_status[Status.SKIPPED],
        "seconds": report.seconds,
    }
    if code:
        outcome = report.outcomes[code]
        found = outcome.status in (Status.FAIL, Status.REVIEW)
        row |= {
            "code": code,
            "layer": layer,
            "status": str(outcome.status),
            "found": found and names_layer(outcome, layer),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/planted-defects"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small: a second thread only waits for the first
    began = time.perf_counter()
    defects = [
        examine(name, build, code, layer)
        for name, (build, code, layer) in tqdm(planted().items(), unit=" defects")
    ]
    sound = [examine(name, build) for name, build in tqdm(healthy().items(), unit=" policies")]
    records.make_folder(args.out)
    records.write_json(
        args.out / "planted.json",
        {
            "command": shlex.join(["python", "benchmarks/planted_defects.py", *sys.argv[1:]]),
            "machine": records.machine(),
            "versions": records.versions("torch", "stable-baselines3", "sb3-contrib"),
            "wall_s": time.perf_counter() - began,
            "planted": defects,
            "healthy": sound,
        },
    )
    missed = [row["name"] for row in defects if not row["found"]]
    alarms = [row["name"] for row in sound if row["failed"]]
    print(f"found {len(defects) - len(missed)} of {len(defects)} planted defects; missed: {missed}")
    print(f"false alarms on {len(alarms)} of {len(sound)} healthy policies: {alarms}")


if __name__ == "__main__":
    main()
