"""`batchproof study`."""

from __future__ import annotations

import argparse
from functools import partial
from importlib import import_module
from typing import Any

from batchproof.cli import words
from batchproof.errors import BatchproofError

STUDY_OPTIONS = ("budget", "ending", "width")  # those that only some studies have


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "study",
        help="run a study and judge its claims",
        description=(
            "Run a study: DIR gets study.json, report.html, pictures and metrics.parquet. One "
            "that was stopped continues with the same command. Without NAME, list the studies."
        ),
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="which study")
    add("--list", action="store_true", help="list the studies")
    names = words.output("--out")
    add(*names, type=words.folder, metavar="DIR", help="the study's folder")
    add("--seeds", type=words.whole(1), metavar="N", help="seeds 0 to N-1 of each condition")
    add("--steps", type=words.whole(1), metavar="N", help="environment steps of each seed")
    add("--quick", action="store_true", help="a small version that ends in minutes")
    add("--conditions", metavar="A,B", help="only these conditions, or `all`")
    help_ = (
        "naturecnn-breakout: begin no training after TIME, such as 2h, and judge what is finished; "
        "0s trains nothing"
    )
    add("--budget", type=partial(words.duration, zero=True), metavar="TIME", help=help_)
    help_ = f"constant-reward: how episodes end, {words.either(words.ENDINGS)} [terminated]"
    add("--ending", type=words.one_of("ending", words.ENDINGS), metavar="HOW", help=help_)
    help_ = "hopper-decay: width of the critics' two hidden layers [256]"
    add("--width", type=words.whole(1), metavar="N", help=help_)
    add("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace, command: str) -> int:
    """Run the command; ``command`` is what was typed."""
    from batchproof.study import STUDIES

    if args.list or args.name is None:
        width = max(map(len, STUDIES), default=0)
        for name, study in STUDIES.items():
            print(f"{name:<{width}}  {study.summary}")
        return 0
    if args.name not in STUDIES:
        raise BatchproofError(f"unknown study {args.name!r}: use one of {', '.join(STUDIES)}")
    if args.out is None:
        raise BatchproofError("a study needs a folder for its results: add --out DIR")
    study = STUDIES[args.name]
    own = words.given(args, *STUDY_OPTIONS)
    for option in own:
        if option not in study.options:
            raise BatchproofError(f"--{option} has no effect in {args.name}: leave it out")
    outcome = import_module(study.module).run(
        args.out,
        seeds=args.seeds,
        steps=args.steps,
        quick=args.quick,
        conditions=args.conditions,
        progress=not args.no_progress,
        command=command,
        **own,
    )
    claims = outcome["claims"]
    width = max((len(claim["id"]) for claim in claims), default=0)
    for claim in claims:
        print(f"{claim['id']:<{width}}  {claim['verdict']:<12}  {claim['statement']}")
    print()
    for path in (args.out / "report.html", *sorted(args.out.glob("*.png"))):
        if path.exists():
            print(path)
    return 0
