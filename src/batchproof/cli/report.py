"""`batchproof report`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from batchproof.cli import words
from batchproof.errors import BatchproofError


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "report",
        help="compare runs in one HTML file that opens offline",
        description=(
            "Compare runs in one HTML file: curves, statistics, mode plans and tables. It opens "
            "offline. The first condition is the baseline that the others are compared with."
        ),
        epilog="example: batchproof report runs/none runs/batch --out report.html",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    help_ = "a folder of `batchproof train` or `batchproof study`, or a folder of runs"
    add("runs", nargs="+", type=words.folder, metavar="RUN", help=help_)
    names, help_ = words.output("--out"), "the HTML file [report.html]"
    add(*names, type=words.file, default=Path("report.html"), metavar="FILE", help=help_)
    help_ = "return that `steps to a threshold` asks for [the median of what conditions reach]"
    add("--threshold", type=words.real("a finite number", -math.inf), metavar="RETURN", help=help_)


def run(args: argparse.Namespace, command: str) -> int:
    """Run the command; ``command`` is what was typed."""
    for run in args.runs:
        if not run.is_dir():
            raise BatchproofError(f"{run}: no such folder: name a run's or a study's")
    words.check_output(args.out)
    from batchproof import report

    for paragraph in report.write(args.runs, args.out, args.threshold):
        print(f"{paragraph}\n")
    print(args.out)
    return 0
