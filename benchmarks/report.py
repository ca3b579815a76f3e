"""Time and size of a report of 4 algorithms x 6 conditions x 10 seeds x 200 evaluations.

    python benchmarks/report.py

The 24 run folders are in the format that `batchproof train` writes, with its metrics as columns
and random curves as values: the report's cost depends on their number, not on what they say. Each
round makes the report in a fresh process (the time of ``batchproof.report.write``, and of the
process with its imports), and opens it in a fresh headless Chromium of 1280 x 900 pixels: from
opening the file until the learning curves are on the screen, and until the figures further down
are drawn too. The page notes both on itself. Writes ``report.json`` and ``.md``.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import numpy as np

from batchproof import records
from batchproof.records import write_columns

ALGORITHMS = ("ddpg", "td3", "sac", "crossq")
SEEDS, EVALUATIONS, STEPS = 10, 200, 200_000
METRICS = (
    "actor_loss",
    "advantage_running",
    "advantage_seen",
    "alpha",
    "common_slope",
    "critic_loss",
    "entropy",
    "kappa",
    "q",
    "response_ratio",
    "td_target",
)  # what a run of SAC writes, and `layer_metrics`
CONDITIONS = (
    ("none", "pre", "TETTE"),
    ("batch", "pre", "TETTE"),
    ("batch", "pre", "TEEJJ"),
    ("renorm", "input+post", "TEEJJ"),
    ("layer", "pre", "TETTE"),
    ("rms", "post", "TETTE"),
)
AIMS = {"make_s": 10.0, "mb": 5.0, "open_s": 1.0}


def layer_metrics(kind: str, placement: str) -> list[str]:
    """What a run writes of each layer, with two hidden ones in both networks."""
    measured = [f"weight_length/{role}/linear_{i}" for role in ("actor", "critic") for i in (0, 1)]
    if kind in ("batch", "renorm"):
        places = {"pre": ["pre_0", "pre_1"], "input+post": ["input", "post_0", "post_1"]}
        measured += [
            f"{name}/{role}/norm_{place}"
            for name in ("mean_gap", "log_var_gap")
            for role in ("actor", "critic")
            for place in places[placement]
        ]
    return measured


def write_runs(folder: Path) -> list[Path]:
    """24 run folders; the curves rise to a plateau of their condition's own height."""
    rng = np.random.default_rng(0)
    at = np.arange(1, EVALUATIONS + 1) * (STEPS // EVALUATIONS)
    runs = []
    for algo in ALGORITHMS:
        for kind, placement, plan in CONDITIONS:
            run = folder / f"{algo}-{kind}-{plan}"
            records.make_folder(run)
            top = rng.uniform(1000, 9000) + rng.normal(0, 500, (SEEDS, 1))
            curves = top * (1 - np.exp(-at / rng.uniform(2e4, 8e4)))
            curves += rng.normal(0, 200, curves.shape)
            write_columns(
                run / "metrics.parquet",
                {
                    "seed": np.tile(np.arange(SEEDS), EVALUATIONS),
                    "step": np.repeat(at, SEEDS),
                    "return": curves.T.ravel(),
                    "diverged": np.zeros(curves.size, bool),
                    **{
                        name: rng.normal(size=curves.size)
                        for name in (*METRICS, *layer_metrics(kind, placement))
                    },
                },
            )
            net = {"hidden": [256, 256], "norm": {"kind": kind, "placement": placement}}
            training = {
                "algo": algo,
                "config": {"actor": net, "critic": net, "plan": plan},
                "env_id": "HalfCheetah-v5",
                "env_options": {},
                "seeds": list(range(SEEDS)),
                "steps": STEPS,
            }
            record = {"status": "finished", "training": training, "wall_s": 3600.0, "command": ""}
            records.write_json(run / "run.json", record)
            runs.append(run)
    return runs


def worker(words: list[str]) -> dict[str, float]:
    what, folder = words[0], Path(words[1])
    page = folder / "report.html"
    if what == "make":
        from batchproof import report

        began = time.perf_counter()
        report.write(sorted(path.parent for path in folder.glob("*/run.json")), page)
        seconds = time.perf_counter() - began
        return {"make_s": seconds, "mb": page.stat().st_size / 1e6}
    chromium = load_chromium()
    binary = next(filter(None, map(shutil.which, chromium.NAMES)), None)
    if binary is None:
        raise SystemExit("no Chromium found: install one (Debian: apt install chromium)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = chromium.Browser(binary, Path(profile))
        try:
            noted = browser.open(page).js("({...document.documentElement.dataset})")
        finally:
            browser.close()
    return {"open_s": int(noted["opened"]) / 1000, "all_s": int(noted["drawn"]) / 1000}


def load_chromium() -> Any:
    """The tests' Chromium."""
    path = Path(__file__).resolve().parents[1] / "tests" / "report" / "conftest.py"
    spec = importlib.util.spec_from_file_location("chromium", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    options = bench.parser(__doc__ or "").parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder))
        bench.run_worker(__file__, ["make", folder])  # something to open in the first round
        samples = bench.alternate(
            __file__, {"make": ["make", folder], "open": ["open", folder]}, options.rounds
        )
    figures: dict[str, Any] = {
        "make_s": bench.median_of(samples["make"], "make_s"),
        "process_s": bench.median_of(samples["make"], "wall_s"),
        "mb": bench.median_of(samples["make"], "mb"),
        "open_s": bench.median_of(samples["open"], "open_s"),
        "all_s": bench.median_of(samples["open"], "all_s"),
    }
    rows = [
        ("Write the report", f"{figures['make_s']:.1f} s", "under 10 s"),
        ("The same with Python's start and imports", f"{figures['process_s']:.1f} s", ""),
        ("Size of the file", f"{figures['mb']:.2f} MB", "under 5 MB"),
        ("Open until the curves show", f"{figures['open_s']:.2f} s", "under 1 s"),
        ("Open until every figure is drawn", f"{figures['all_s']:.2f} s", ""),
    ]
    table = "| | median | aim |\n|---|---|---|\n"
    table += "".join(f"| {what} | {value} | {aim} |\n" for what, value, aim in rows)
    shape = {
        "algorithms": len(ALGORITHMS),
        "conditions": len(CONDITIONS),
        "seeds": SEEDS,
        "evaluations": EVALUATIONS,
        "metrics": len(METRICS) + 1,
    }
    record = {"shape": shape, "aims": AIMS, "figures": figures, "samples": samples}
    bench.write(options.out, "report", record, table)


if __name__ == "__main__":
    main()
