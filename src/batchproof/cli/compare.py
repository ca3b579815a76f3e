"""`batchproof compare`: many runs of `batchproof train`, from options or a TOML file."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from batchproof.cli import train, words
from batchproof.errors import BatchproofError

if TYPE_CHECKING:
    from batchproof.lab.training import Training

# Options of `train` that a comparison has in a form of its own, and those of its environments.
COMPARED = (
    "norm", "actor-norm", "critic-norm", "placement", "actor-placement", "critic-placement",
    "modes", "preset",
)  # fmt: skip
COMPARE_OWN = ("env", "out", "seeds", "no-progress", "tensorboard")
OF_TASK = ("steps", "eval-every", "eval-episodes", "env-option", "host-env")
ALSO_OF_TASK = ("learning-starts", "buffer-size", "normalize-obs")


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "compare",
        help="compare norms, placements and mode plans over algorithms, environments and seeds",
        description=(
            "Train every combination of what is listed, each with the same seeds, and say what "
            "differs. What is finished is kept: the same command continues, and one with more "
            "conditions or seeds runs only those. Options of `batchproof train` hold for all "
            "conditions; where one has no effect it is left away."
        ),
        epilog=(
            "example: batchproof compare --algo td3,sac --env Pendulum-v1 --norm none,batch,layer "
            "--modes default,TEETE --seeds 5 --steps 10000 --hidden 64,64 --out runs/pendulum"
        ),
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    help_ = (
        "a TOML file with these options as its keys, [[condition]] for single conditions and "
        "[[environment]] for tasks with a length or options of their own"
    )
    add("file", nargs="?", type=words.file, metavar="FILE", help=help_)
    help_ = f"each ALGO or ALGO:PRESET: {words.either(words.ALGORITHMS)}"
    add("--algo", type=words.several(words.algo), metavar="A,B", help=help_)
    add("--env", type=words.several(words.model), metavar="ID,ID", help="environments, as in train")
    help_ = (
        f"each {words.either(words.NORMS)}, critic:KIND or actor:KIND for one network alone, or "
        "default, the algorithm's own [default]"
    )
    add(
        "--norm",
        type=words.several(words.norm),
        default=("default",),
        metavar="KIND,KIND",
        help=help_,
    )
    help_ = "where the norm sits, as in train [the algorithm's own]"
    add("--placement", type=words.several(words.placement), metavar="P,P", help=help_)
    help_ = "mode plans, as in train, or default, the algorithm's own [default]"
    add(
        "--modes",
        type=words.several(words.plan),
        default=("default",),
        metavar="PLAN,PLAN",
        help=help_,
    )
    help_ = "of every condition: a number N for 0 to N-1, or a list such as 0,3,7 [5]"
    add("--seeds", type=words.seeds, default=tuple(range(5)), metavar="N", help=help_)
    help_ = "train so many seeds at once: every condition gets its first before any gets more [all]"
    add("--seeds-at-once", type=words.whole(1), metavar="N", help=help_)
    help_ = "compare all with this condition [that without a norm, for each algorithm]"
    add("--baseline", metavar="NAME", help=help_)
    help_ = "stop in time, at an evaluation, with what is known: such as 30m or 2h"
    add("--budget", type=words.duration, metavar="TIME", help=help_)
    names = words.output("--out")
    add(*names, type=words.folder, metavar="DIR", help="the comparison's folder")
    help_ = "train on a Ray cluster, all of whose nodes see DIR: ray or ray:HOST:PORT [here]"
    add("--on", type=words.cluster, metavar="PLACE", help=help_)
    add(
        "--list",
        action="store_true",
        help="show what would be trained and what is already, and train nothing",
    )
    add("--no-progress", action="store_true", help="no table that follows along")

    group = parser.add_argument_group("for all conditions, see `batchproof train --help`")
    of_train = _alone(train.add_to, "train")
    shared = _option_names(of_train, (*COMPARED, *COMPARE_OWN))
    for action in of_train._actions:
        if not action.option_strings or _name(action) not in shared:
            continue
        name = f"--{_name(action)}"
        if action.nargs == 0:
            group.add_argument(name, action="store_true", help=action.help)
            continue
        many = "append" if isinstance(action.default, list) else "store"
        check = words.checked(action.type)
        group.add_argument(name, type=check, action=many, metavar=action.metavar, help=action.help)


def run(args: argparse.Namespace, command: str) -> int:
    """Run the command; ``command`` is what was typed."""
    from batchproof import compare

    extra: list[tuple[str, str, tuple[tuple[str, ...], ...]]] = []
    of_env: dict[str, tuple[tuple[str, ...], ...]] = {}
    if args.file is not None:
        options = _option_names(_alone(add_to, "compare"))
        trained = _option_names(_alone(train.add_to, "train"), (*COMPARE_OWN, *OF_TASK))
        every = _option_names(_alone(train.add_to, "train"))
        of_task = {name: every[name] for name in (*OF_TASK, *ALSO_OF_TASK)}
        written, extra, of_env = compare.read_file(args.file, options, trained, of_task)
        # What stands on the command line comes later, and so wins.
        args = _alone(add_to, "compare").parse_args([*written, *shlex.split(command)[2:]])
        args.env = args.env or tuple(of_env) or None
    for option in ("env", "out") if extra else ("algo", "env", "out"):
        if getattr(args, option) is None and not (args.list and option == "out"):
            raise BatchproofError(f"what to compare is not complete: add --{option}")
    of_train = _alone(train.add_to, "train")

    def build(written: Sequence[str]) -> Training:
        one = of_train.parse_args([*written, "--out", "."])
        train.check_effects(one)
        return train.training_of(one, words.pairs("--env-option", one.env_option))

    spec = compare.Spec(
        algos=args.algo or (),
        envs=args.env,
        norms=args.norm,
        placements=args.placement or (),
        modes=args.modes,
        shared=tuple(_shared(args, of_train)),
        extra=tuple(extra),
        of_env={env: own for env, own in of_env.items() if env in args.env},
        seeds=args.seeds,
        at_once=args.seeds_at_once,
        baseline=args.baseline,
        budget_s=args.budget,
    )
    if args.list:
        print(compare.listing(spec, build, args.out))
        return 0
    asked = [*spec.shared, *(option for *_, own in spec.extra for option in own)]
    if args.on is None and ("--critic-precision", "bfloat16") in asked:
        train.say_if_bfloat16_is_slow()
    progress = not args.no_progress
    record = compare.run(spec, args.out, build, on=args.on, progress=progress, command=command)
    print(compare.text(record))
    print(f"\n{args.out / 'compare.json'}: conditions, returns of each seed, statistics")
    print(f"{args.out / 'cells'}: the runs, as of `batchproof train`")
    page = shlex.join(["--out", str(args.out / "report.html")])
    print(f"\nCurves and more: batchproof report {shlex.quote(str(args.out))} {page}")
    if record["status"] == "interrupted":
        return 130
    # The table names the failed cells; the others stand.
    failed = [cell for cell in record["cells"] if cell["state"] == "failed"]
    if failed:
        first = next(p["error"] for p in failed[0]["populations"] if p["error"])
        count = f"{len(failed)} of {words.count(len(record['cells']), 'cell')} failed"
        raise BatchproofError(f"{count}, the first with: {first}")
    return 0


def _alone(add: Callable[[Any], None], name: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    commands = words.Parser(prog="batchproof").add_subparsers()
    add(commands)
    return commands.choices[name]


def _option_names(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> dict[str, bool]:
    """Options of a parser; True for those without a value."""
    found = {_name(action): action.nargs == 0
             for action in parser._actions if action.option_strings}  # fmt: skip
    return {name: flag for name, flag in found.items() if name not in ("help", *without)}


def _name(action: argparse.Action) -> str:
    """An option without its dashes; of several spellings that which names its value."""
    return action.dest.replace("_", "-")


def _shared(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterator[tuple[str, ...]]:
    """The options of `train` that were written for all conditions."""
    for name, flag in _option_names(parser, (*COMPARED, *COMPARE_OWN)).items():
        value = getattr(args, name.replace("-", "_"))
        if flag and value:
            yield (f"--{name}",)
        elif not flag and value is not None:
            for text in value if isinstance(value, list) else [value]:
                yield f"--{name}", text
