"""Score every estimator of running statistics, and recalibration, on streams of batches.

    python benchmarks/estimators.py [--repetitions 48]

A feature is normal with sd 1, and its mean drifts by a fixed amount a batch. Each row is, with
probability p, an outlier: M is added to it. Estimators start at the truth and see `BATCHES` batches
of N rows, by the formulas of `batchproof.estimators`. The errors are of the running mean, in sd of
the clean rows, and of the logarithm of the running variance: root mean squares over repetitions and
over the last `SCORED` batches. Recalibration pools `RECALIBRATION_ROWS` rows of the last
distribution. A second part measures how many batches an estimator needs after a jump of the mean.

The predictions (`PREDICTIONS`) were written before the first run. The script writes
``estimators.json`` and ``.md`` into ``--out``, and the figures and the picture of
``docs/estimators.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import bench
import numpy as np

from batchproof.estimators import ESTIMATORS, Batch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "estimators.md"
PICTURE = ROOT / "docs" / "images" / "estimators.png"

BATCHES, SCORED = 1000, 300
RECALIBRATION_ROWS = 4096
ROWS = (32, 256, 1024)
RHOS = (0.01, 0.1, 0.5)
DRIFTS = (0.0, 1e-3, 1e-2)  # sd a batch
SIZES = (10.0, 100.0)
PROBABILITIES = (0.0, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
JUMPS = (1.0, 10.0)
PATIENCE = 2000  # batches waited for after a jump
ROBUST = ("winsorized", "huber", "median-of-means")
MARGIN = 0.95  # a smaller error than this times EMA's is more than a tie
RECALIBRATION = "recalibration"
NAMES = (*ESTIMATORS, RECALIBRATION)

PREDICTIONS = {
    "clean": "EMA has the smallest error of the mean at p = 0, among estimators that forget "
    "(within 5 %)",
    "crossover": "Huber and median of means have a smaller error of the mean than EMA once "
    "p M exceeds 1 / sqrt(N window), window = (2 - rho) / rho, without drift",
}
"""From the mechanism: the outliers' bias p M against EMA's noise."""

FORGETTING = [name for name in ESTIMATORS if name != "cumulative"]


def stream(
    rng: np.random.Generator, rows: int, probability: float, size: float, repetitions: int
) -> np.ndarray:
    """A batch (N, R) of each repetition, around a mean of 0."""
    x = rng.standard_normal((rows, repetitions), dtype=np.float32)
    if probability:
        hit = rng.binomial(rows * repetitions, probability)
        x.ravel()[rng.integers(rows * repetitions, size=hit)] += np.float32(size)
    return x


def seen(x: np.ndarray, count: int) -> Batch:
    """A batch as torch's layers give it to an estimator: the unbiased variance."""
    return Batch(x.mean(0), x.var(0, ddof=1), x, count, len(x) / (len(x) - 1))


def score(rows: int, probability: float, size: float, repetitions: int) -> list[dict[str, Any]]:
    """Errors of every estimator, for all rho and drifts at once, on one stream."""
    rng = np.random.default_rng([rows, round(probability * 1e6), round(size)])
    rho = np.array(RHOS)[:, None, None]
    drift = np.array(DRIFTS)[None, :, None]
    shape = (len(RHOS), len(DRIFTS), repetitions)
    state = {name: (np.zeros(shape), np.ones(shape)) for name in ESTIMATORS}
    squares = {name: [np.zeros(shape[:2]), np.zeros(shape[:2])] for name in NAMES}
    for count in range(1, BATCHES + 1):
        batch = seen(stream(rng, rows, probability, size, repetitions), count)
        for name, known in ESTIMATORS.items():
            mean, var = state[name]
            # The truth moves by the drift: in its frame the running mean falls behind.
            mean, var = known.update(mean - drift, var, batch, rho)
            state[name] = mean, var
            if count > BATCHES - SCORED:
                squares[name][0] += (mean**2).mean(-1) / SCORED
                squares[name][1] += (np.log(var) ** 2).mean(-1) / SCORED
    pooled = stream(rng, RECALIBRATION_ROWS, probability, size, repetitions)
    squares[RECALIBRATION][0] += (pooled.mean(0) ** 2).mean()
    squares[RECALIBRATION][1] += (np.log(pooled.var(0)) ** 2).mean()
    return [
        {
            "rows": rows,
            "rho": RHOS[i],
            "drift": DRIFTS[j],
            "probability": probability,
            "size": size if probability else None,
            "mean_error": {name: float(np.sqrt(squares[name][0][i, j])) for name in NAMES},
            "log_variance_error": {name: float(np.sqrt(squares[name][1][i, j])) for name in NAMES},
        }
        for i in range(len(RHOS))
        for j in range(len(DRIFTS))
    ]


def recovery(rows: int, rho: float, jump: float, repetitions: int) -> dict[str, Any]:
    """Batches after a jump of the mean until its error is below a tenth of the jump, by estimator.

    The jump comes after 200 batches; the median over repetitions, None beyond `PATIENCE`.
    """
    rng = np.random.default_rng([rows, round(jump), 7])
    state = {name: (np.zeros(repetitions), np.ones(repetitions)) for name in ESTIMATORS}
    first = {name: np.zeros(repetitions) for name in ESTIMATORS}
    for count in range(1, 201 + PATIENCE):
        batch = seen(stream(rng, rows, 0.0, 0.0, repetitions) + jump * (count > 200), count)
        for name, known in ESTIMATORS.items():
            state[name] = known.update(*state[name], batch, rho)
            if count > 200:
                there = np.abs(state[name][0] - jump) < 0.1 * jump
                first[name][there & (first[name] == 0)] = count - 200
        if all((found > 0).all() for found in first.values()):
            break
    return {
        "rows": rows,
        "rho": rho,
        "jump": jump,
        "batches": {
            name: float(np.median(found)) if (found > 0).all() else None
            for name, found in first.items()
        },
    }


def crossovers(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The p from which on a robust estimator beats EMA, without drift, beside the predicted one."""
    found = []
    for rows in ROWS:
        for rho in RHOS:
            for size in SIZES:
                cells = [
                    cell
                    for cell in scores
                    if (cell["rows"], cell["rho"], cell["drift"]) == (rows, rho, 0.0)
                    and cell["size"] in (None, size)
                ]
                for name in ROBUST:
                    found.append(
                        {
                            "rows": rows,
                            "rho": rho,
                            "size": size,
                            "estimator": name,
                            "predicted": math.sqrt(rho / (2 - rho) / rows) / size,
                            **_first_win(cells, name),
                        }
                    )
    return found


def _first_win(cells: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    """Between which two grid values of p an estimator starts to win, and until which it does."""
    wins = [
        (cell["probability"], cell["mean_error"][name] < MARGIN * cell["mean_error"]["ema"])
        for cell in cells
    ]
    winning = [p for p, won in wins if won]
    if not winning:
        return {"above": None, "by": None, "until": None}
    before = [p for p, _ in wins if p < winning[0]]
    return {"above": before[-1] if before else 0.0, "by": winning[0], "until": winning[-1]}


def judged(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What became of each prediction, in numbers."""
    clean = [c for c in record["scores"] if c["probability"] == 0 and c["drift"] == 0]
    held = sum(
        c["mean_error"]["ema"] <= 1.05 * min(c["mean_error"][name] for name in FORGETTING)
        for c in clean
    )
    still = [c for c in record["scores"] if c["probability"] > 0 and c["drift"] == 0]

    def agree(name: str, robust_should_win: bool) -> dict[str, int]:
        chosen = [
            c["mean_error"][name] / c["mean_error"]["ema"]
            for c in still
            if (c["probability"] * c["size"] > math.sqrt(c["rho"] / (2 - c["rho"]) / c["rows"]))
            == robust_should_win
        ]
        held = {
            key: sum((ratio < limit) == robust_should_win for ratio in chosen)
            for key, limit in (("held", 1), ("held_by_margin", MARGIN))
        }
        return {**held, "of": len(chosen)}

    return {
        "clean": {"held": held, "held_by_margin": held, "of": len(clean)},
        **{
            f"{name}, {side}": agree(name, side == "above")
            for name in ("huber", "median-of-means")
            for side in ("above", "below")
        },
    }


# The page

SHOWN = (
    ("clean", 0.0, None, 0.0),
    ("drift .001", 0.0, None, 1e-3),
    ("drift .01", 0.0, None, 1e-2),
    ("p 1e-4, M 100", 1e-4, 100.0, 0.0),
    ("p 1e-3, M 10", 1e-3, 10.0, 0.0),
    ("p 1e-3, M 100", 1e-3, 100.0, 0.0),
    ("p .01, M 10", 1e-2, 10.0, 0.0),
    ("p .01, M 100", 1e-2, 100.0, 0.0),
    ("p .1, M 100", 1e-1, 100.0, 0.0),
)
"""The columns of the page's table: p, M, drift."""


def _cell(scores: list[dict[str, Any]], rows: int, rho: float, shown: Any) -> dict[str, Any]:
    _, probability, size, drift = shown
    return next(
        c
        for c in scores
        if (c["rows"], c["rho"], c["probability"], c["size"], c["drift"])
        == (rows, rho, probability, size, drift)
    )


def score_table(record: dict[str, Any], rows: int, rho: float) -> str:
    cells = [_cell(record["scores"], rows, rho, shown) for shown in SHOWN]
    lines = [
        f"| N {rows}, rho {rho:g} | {' | '.join(shown[0] for shown in SHOWN)} |",
        "|---" * (len(SHOWN) + 1) + "|",
    ]
    for name in NAMES:
        figures = [
            f"{c['mean_error'][name]:.2g}, {c['log_variance_error'][name]:.2g}" for c in cells
        ]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def recovery_table(record: dict[str, Any]) -> str:
    cells = record["recovery"]
    heads = [f"N {c['rows']}, rho {c['rho']:g}, {c['jump']:g} sd" for c in cells]
    lines = [f"| batches after a jump | {' | '.join(heads)} |", "|---" * (len(cells) + 1) + "|"]
    for name in ESTIMATORS:
        counts = [c["batches"][name] for c in cells]
        shown = [f"> {PATIENCE}" if n is None else f"{n:.0f}" for n in counts]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def crossover_table(record: dict[str, Any]) -> str:
    lines = [
        "| N | rho | M | predicted p | winsorized wins in p | huber | median-of-means |",
        "|---|---|---|---|---|---|---|",
    ]
    found = record["crossovers"]
    for first in range(0, len(found), len(ROBUST)):
        group = found[first : first + len(ROBUST)]
        head = group[0]
        ranges = ["never" if g["by"] is None else f"{g['by']:g} to {g['until']:g}" for g in group]
        lines.append(
            f"| {head['rows']} | {head['rho']:g} | {head['size']:g} | {head['predicted']:.1g} "
            f"| {' | '.join(ranges)} |"
        )
    return "\n".join(lines)


def win_count(record: dict[str, Any]) -> str:
    cells = [c["mean_error"] for c in record["scores"] if c["probability"] and not c["drift"]]
    counts = [
        f"{name} in {sum(cell[name] < MARGIN * cell['ema'] for cell in cells)}" for name in ROBUST
    ]
    return f"Of {len(cells)} cells with outliers, each wins in: {', '.join(counts)}."


def verdict_table(record: dict[str, Any]) -> str:
    lines = [
        "| prediction | held in cells | with wins of less than 5 % taken as ties |",
        "|---|---|---|",
    ]
    for name, count in record["judged"].items():
        text = PREDICTIONS.get(name)
        if text is None:
            estimator, side = name.split(", ")
            who = "beats EMA" if side == "above" else "does not beat EMA"
            text = f"{estimator} {who} {side} p M = 1 / sqrt(N window)"
        cells = " | ".join(f"{count[key]} of {count['of']}" for key in ("held", "held_by_margin"))
        lines.append(f"| {text} | {cells} |")
    return "\n".join(lines)


def blocks(record: dict[str, Any]) -> dict[str, str]:
    """The page's measured parts by their markers' names."""
    command = (
        f"`{record['command']}`, {record['repetitions']} repetitions, {record['cpu_s']:.0f} s of "
        f"one core ({record['machine']['processor']})."
    )
    return {
        "scores": score_table(record, 256, 0.1) + "\n\n" + score_table(record, 32, 0.01),
        "recovery": recovery_table(record),
        "verdicts": verdict_table(record),
        "crossovers": crossover_table(record) + "\n\n" + win_count(record),
        "command": command,
    }


def filled(text: str, record: dict[str, Any]) -> str:
    """The page with its measured parts as the record has them."""
    for name, block in blocks(record).items():
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.S)
        new = f"<!-- {name} -->\n{block}\n<!-- /{name} -->"
        text, count = pattern.subn(lambda _, new=new: new, text)
        if count != 1:
            raise SystemExit(f"docs/estimators.md: {count} places for {name}, expected one")
    return text


def draw(record: dict[str, Any], path: Path) -> None:
    """Error of the mean against p, for three batch sizes and two sizes of outliers, at rho .1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rho = 0.1
    figure, axes = plt.subplots(
        len(SIZES), len(ROWS), figsize=(11, 6.4), sharex=True, sharey="row", layout="constrained"
    )
    styles = {
        "ema": ("black", "-", "o"),
        "chan": ("tab:gray", ":", "s"),
        "cumulative": ("tab:brown", "--", "v"),
        "winsorized": ("tab:blue", "-", "^"),
        "huber": ("tab:orange", "-", "D"),
        "median-of-means": ("tab:green", "-", "P"),
        RECALIBRATION: ("tab:purple", "--", "x"),
    }
    for row, size in enumerate(SIZES):
        for column, rows in enumerate(ROWS):
            axis = axes[row][column]
            cells = [
                c
                for c in record["scores"]
                if (c["rows"], c["rho"], c["drift"], c["size"]) == (rows, rho, 0.0, size)
            ]
            p = [c["probability"] for c in cells]
            for name, (colour, line, marker) in styles.items():
                if name == "chan":
                    continue  # its mean is EMA's
                axis.loglog(
                    p,
                    [c["mean_error"][name] for c in cells],
                    color=colour,
                    linestyle=line,
                    marker=marker,
                    markersize=4,
                    label=name,
                )
            axis.axvline(
                math.sqrt(rho / (2 - rho) / rows) / size,
                color="0.7",
                linewidth=3,
                zorder=0,
                label="predicted crossover",
            )
            axis.set_title(f"N = {rows}, outliers of {size:g} sd", fontsize=10)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel("error of the running mean (sd)")
            if row == len(SIZES) - 1:
                axis.set_xlabel("share of rows that are outliers")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.suptitle(f"Running mean under outliers, momentum {rho:g}, no drift")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    args = parser.parse_args()
    began, began_cpu = time.perf_counter(), time.process_time()
    streams = [
        (rows, probability, size)
        for rows in ROWS
        for size in SIZES
        for probability in PROBABILITIES
        if probability or size == SIZES[0]
    ]
    scores = []
    for number, (rows, probability, size) in enumerate(streams, start=1):
        scores += score(rows, probability, size, args.repetitions)
        print(f"\r{number}/{len(streams)} streams", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    record: dict[str, Any] = {
        "repetitions": args.repetitions,
        "predictions": PREDICTIONS,
        "scores": scores,
        "recovery": [
            recovery(rows, rho, jump, 8)
            for rows in (32, 256)
            for rho in (0.01, 0.1)
            for jump in JUMPS
        ],
        "crossovers": crossovers(scores),
    }
    record["judged"] = judged(record)
    record["wall_s"] = time.perf_counter() - began
    record["cpu_s"] = time.process_time() - began_cpu
    tables = [score_table(record, rows, rho) for rows in ROWS for rho in RHOS]
    tables += [recovery_table(record), crossover_table(record), verdict_table(record)]
    bench.write(args.out, "estimators", record, "\n\n".join(tables) + "\n")
    record = json.loads((args.out / "estimators.json").read_text(encoding="utf-8"))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    draw(record, PICTURE)


if __name__ == "__main__":
    sys.exit(main())
