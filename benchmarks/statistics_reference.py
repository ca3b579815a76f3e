"""What rliable 1.2.0 says of fixed scores, kept for the tests of `batchproof.study.statistics`.

    python -m venv /tmp/rliable
    /tmp/rliable/bin/pip install rliable==1.2.0 "arch<8" "pandas<3"
    /tmp/rliable/bin/python benchmarks/statistics_reference.py

It needs that environment and nothing of this project: rliable's arch does not import beside pandas
3. Writes ``tests/study/data/rliable.json`` with the scores themselves, so that the tests need
neither rliable nor the same random numbers.
"""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rliable import library, metrics

REPETITIONS = 5000
THRESHOLDS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5]


def scores() -> dict[str, np.ndarray]:
    """Two conditions, 10 and 8 seeds, 5 tasks of different means; some ties; a heavy tail."""
    rng = np.random.default_rng(7)
    level = np.linspace(0.1, 1.0, 5)
    a = np.round(level + 0.25 * rng.standard_t(3, (10, 5)), 2)
    b = np.round(level - 0.1 + 0.25 * rng.standard_normal((8, 5)), 2)
    return {"a": a, "b": b}


def reference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Estimates with their 95% percentile intervals."""

    def interval(data: Any, function: Any) -> dict[str, list[float]]:
        np.random.seed(0)  # rliable draws from NumPy's global generator
        estimate, ends = library.get_interval_estimates(
            {"x": data}, lambda *x: np.atleast_1d(function(*x)), reps=REPETITIONS
        )
        return {
            "estimate": estimate["x"].tolist(),
            "lo": ends["x"][0].tolist(),
            "hi": ends["x"][1].tolist(),
        }

    def profile(x: np.ndarray) -> Any:
        return library.score_distributions(x, THRESHOLDS)

    return {
        "iqm_a": interval(a, metrics.aggregate_iqm),
        "iqm_b": interval(b, metrics.aggregate_iqm),
        "iqm_one_task": interval(a[:, 2:3], metrics.aggregate_iqm),
        "improvement": interval([a, b], metrics.probability_of_improvement),
        "profile_a": interval(a, profile),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tests/study/data/rliable.json"))
    out = parser.parse_args().out
    data = scores()
    record = {
        "command": "python benchmarks/statistics_reference.py",
        "versions": {
            name: metadata.version(name) for name in ("rliable", "arch", "numpy", "scipy")
        },
        "repetitions": REPETITIONS,
        "thresholds": THRESHOLDS,
        **{name: values.tolist() for name, values in data.items()},
        **reference(**data),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
