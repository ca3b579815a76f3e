"""The ``batchproof`` command: words on the command line become calls into the package.

Nothing heavy is imported before the words are known to be good, so help and mistakes answer at
once. Names that live in modules which need JAX are repeated here for that reason; a test compares
the two.

Exit codes: 0 done, 2 bad input or a machine's limit (one line on standard error), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from batchproof import __version__
from batchproof.errors import BatchproofError
from batchproof.modes import PRESETS, Mode, Plan, Slot

if TYPE_CHECKING:
    from batchproof.lab.loop import Result, Training

ALGORITHMS = ("td3", "sac")
NORMS = ("none", "batch", "renorm", "layer", "group", "rms")
RUNNING_NORMS = ("batch", "renorm")  # those that keep running statistics, so modes matter
PLACEMENTS = ("input", "pre", "post", "before-action")
TARGET_STATS = ("copy", "polyak", "stale")
ENDINGS = ("terminated", "truncated", "both")
LETTERS = "TESJMB"
MAX_SEEDS = 10_000


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``batchproof``; None takes them from the process.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BatchproofError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        print("batchproof: interrupted: the same command resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141  # what a shell reports for a process that SIGPIPE ended
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "batchproof":
            raise
        return _complain(f"{error.name} is not installed: pip install 'batchproof[lab]'")
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        _drop_output_if_full()
        return _complain(f"{name}{error.strerror or error}")


def _run(words: list[str]) -> int:
    try:
        args = _parser().parse_args(words)
    except SystemExit as done:  # --help and --version, which have printed what they had to say
        return int(done.code or 0)
    return args.run(args, shlex.join(["batchproof", *words]))


def _complain(message: str) -> int:
    print(f"batchproof: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _drop_output() -> None:
    """Send what is still buffered nowhere: the interpreter flushes once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _drop_output_if_full() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


# --- train -----------------------------------------------------------------------------------


def _train(args: argparse.Namespace, command: str) -> int:
    _check_effects(args)
    training = _training(args, _env_options(args.env_option))
    finished = _is_finished(args.out)

    from batchproof.lab.loop import train

    result = train(
        training,
        args.out,
        progress=not args.no_progress,
        label=f"{args.algo} {args.env}",
        tensorboard=args.tensorboard,
        command=command,
    )
    if finished:
        print("This run was finished before: nothing was run again.\n")
    _print_result(result, args.out, tensorboard=args.tensorboard)
    return 0


def _kinds(args: argparse.Namespace) -> dict[str, str]:
    """The norm of each network."""
    both = args.norm or "none"
    return {"actor": args.actor_norm or both, "critic": args.critic_norm or both}


def _check_effects(args: argparse.Namespace) -> None:
    """Raise a `BatchproofError` for an option that could change nothing."""
    kinds = _kinds(args)
    used = {kind for kind in kinds.values() if kind != "none"}
    running = used.intersection(RUNNING_NORMS)

    def refuse(option: str, why: str) -> NoReturn:
        raise BatchproofError(f"{option} has no effect {why}")

    keeps = f"without a norm that keeps running statistics ({' or '.join(RUNNING_NORMS)})"
    if args.eps is not None and not used:
        refuse("--eps", "without a norm: add --norm, or leave it out")
    if args.momentum is not None and not running:
        refuse("--momentum", f"{keeps if used else 'without a norm'}: leave it out")
    if args.groups is not None and "group" not in used:
        refuse("--groups", "without --norm group: leave it out")
    # A mode says which statistics are used; skipping is the one that any layer can do.
    if args.modes is not None and not running:
        skips = any(args.modes[slot].bypass for slot in Slot)
        if not used or not skips:
            refuse("--modes", f"{keeps if used else 'without a norm'}: leave it out")
    # Where the action enters is a matter of the network, with a norm or without.
    for network in kinds:
        placement = getattr(args, f"{network}_placement")
        moves_action = network == "critic" and "before-action" in (placement or "")
        if placement is not None and kinds[network] == "none" and not moves_action:
            refuse(
                f"--{network}-placement", f"without a norm in the {network}: add --{network}-norm"
            )
    if args.placement is not None and not used and "before-action" not in args.placement:
        refuse("--placement", "without a norm: add --norm, or leave it out")
    if args.no_target_network:
        for option in ("target_stats", "tau"):
            if getattr(args, option) is not None:
                name = "--" + option.replace("_", "-")
                refuse(name, "with --no-target-network: leave one of the two out")
    if args.target_stats is not None and not running:
        refuse("--target-stats", f"{keeps}: leave it out")


def _training(args: argparse.Namespace, env_options: dict[str, Any]) -> Training:
    from batchproof.lab.agents import AGENTS
    from batchproof.lab.loop import Training
    from batchproof.lab.nets import MLP
    from batchproof.lab.norms import Norm

    kinds = _kinds(args)

    def mlp(network: str) -> MLP:
        placement = getattr(args, f"{network}_placement") or args.placement
        layer = _given(args, "momentum", "eps", "groups") if kinds[network] != "none" else {}
        if placement is not None:
            layer["placement"] = placement
        norm = Norm(kinds[network], **layer)
        return MLP(getattr(args, f"{network}_hidden") or args.hidden, norm)

    agent = _given(args, "learning_rate", "gamma", "tau", "batch_size", "target_stats")
    if args.modes is not None:
        agent["plan"] = args.modes
    if args.no_target_network:
        agent["target_network"] = False
    return Training(
        algo=args.algo,
        config=AGENTS[args.algo].Config(actor=mlp("actor"), critic=mlp("critic"), **agent),
        env_id=args.env,
        env_options=env_options,
        seeds=args.seeds,
        steps=args.steps,
        host_env=args.host_env,
        **_given(
            args, "learning_starts", "buffer_size", "gradient_steps", "eval_every", "eval_episodes"
        ),
    )


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were written: the others keep the library's defaults."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _env_options(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise BatchproofError(f"--env-option {name} is given twice: keep one")
    return dict(pairs)


def _is_finished(out: Path) -> bool:
    """Whether the folder holds a finished run; `train` judges whether it is this one."""
    from batchproof.records import read_json

    path = out / "run.json"
    if not path.is_file():
        return False
    run = read_json(path)
    return isinstance(run, dict) and run.get("status") == "finished"


def _print_result(result: Result, out: Path, *, tensorboard: bool) -> None:
    sound = []
    print(f"{'seed':>10}  {'final return':>12}  status")
    for seed in result.seeds:
        value, status = seed["final_return"], seed["status"]
        value = math.nan if value is None else value  # NaN cannot stand in run.json
        if status == "ok":
            sound.append(value)
            shown = f"{value:.2f}"
        else:
            shown, status = "-", f"diverged at step {seed['diverged_at']}"
        print(f"{seed['seed']:>10}  {shown:>12}  {status}")
    count, lost = len(result.seeds), len(result.seeds) - len(sound)
    if sound:
        mean = math.fsum(sound) / len(sound)
        kept = f"over {_count(len(sound), 'seed')}" + (" that did not diverge" if lost else "")
        print(f"\nmean {mean:.2f}, min {min(sound):.2f}, max {max(sound):.2f} {kept}")
    if lost:
        print(f"\nDIVERGED: {lost} of {_count(count, 'seed')}; they have no final return.")
    metrics = out / "metrics.parquet"
    script = (
        "import pyarrow.parquet as pq; "
        f"[print(row) for row in pq.read_table({str(metrics)!r}).to_pylist()]"
    )
    print(f"\n{out / 'run.json'}: configuration, versions, seeds")
    print(f"{metrics}: a row for each evaluation and seed")
    print(f"{out / 'checkpoint'}: the agents, in safetensors")
    print(f"\nLook at the metrics with any Parquet reader, or: python -c {shlex.quote(script)}")
    if tensorboard:
        print(f"or: tensorboard --logdir {shlex.quote(str(out / 'tensorboard'))}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


# --- study -----------------------------------------------------------------------------------


def _study(args: argparse.Namespace, command: str) -> int:
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
    outcome = import_module(STUDIES[args.name].module).run(
        args.out,
        seeds=args.seeds,
        steps=args.steps,
        quick=args.quick,
        conditions=args.conditions,
        ending=args.ending,
        progress=not args.no_progress,
        command=command,
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


# --- modes -----------------------------------------------------------------------------------


def _modes(args: argparse.Namespace, command: str) -> int:
    print("Slots: the passes of an off-policy actor-critic update; acting is slot 0\n")
    for slot in Slot:
        print(f"  {slot.value}  {slot.name.lower():<14} {slot.title}")
    print("\nModes: the statistics that a normalized network uses in one pass\n")
    for letter in LETTERS:
        print(f"  {letter}  {Mode(letter).title}")
    print("\n  A lower-case letter leaves the running statistics alone.")
    print("\nPlans: five letters for slots 1 to 5 (slot 0 is E), or six with slot 0 in front\n")
    for name, letters in PRESETS.items():
        print(f"  {name:<8} {letters}")
    return 0


# --- words -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        raise BatchproofError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="batchproof",
        description="Normalization for deep RL that acts the same alone and in a batch.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"batchproof {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    _add_study(commands)
    modes = commands.add_parser(
        "modes", help="show slots, modes and named plans", allow_abbrev=False
    )
    modes.set_defaults(run=_modes)
    return parser


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train an agent on an environment, many seeds at once",
        description=(
            "Train many seeds of an agent at once. A run that was stopped continues with the "
            "same command; a finished one is read back."
        ),
        epilog=(
            "example: batchproof train td3 --env batchproof/ConstantReward-v0 --norm batch "
            "--modes TEETE --steps 3000 --seeds 10 --out runs/td3-bn"
        ),
        allow_abbrev=False,
    )
    parser.set_defaults(run=_train)
    add = parser.add_argument
    add("algo", metavar="ALGO", type=_one_of("algorithm", ALGORITHMS), help=_either(ALGORITHMS))
    add("--env", required=True, metavar="ID", help="a Gymnasium id with continuous actions")
    add("--out", required=True, type=_folder, metavar="DIR", help="the run's folder")

    add = parser.add_argument_group("normalization").add_argument
    kind, place = _one_of("norm", NORMS), _placement
    add("--norm", type=kind, metavar="KIND", help=f"of both networks: {_either(NORMS)} [none]")
    add("--actor-norm", type=kind, metavar="KIND", help="of the actor [--norm]")
    add("--critic-norm", type=kind, metavar="KIND", help="of the critics [--norm]")
    help_ = f"where it sits: {_either(PLACEMENTS)}, or several joined with + [pre]"
    add("--placement", type=place, metavar="P", help=help_)
    add("--actor-placement", type=place, metavar="P", help="in the actor [--placement]")
    add("--critic-placement", type=place, metavar="P", help="in the critics [--placement]")
    help_ = "statistics of each pass, see `batchproof modes` [sb3-td3 or sb3-sac, by ALGO]"
    add("--modes", type=Plan.parse, metavar="PLAN", help=help_)
    help_ = "weight of the new batch in the running statistics, flax's 0.99 is 0.01 [0.1]"
    share = _real("in (0, 1], the weight of the new batch", 0, 1, open_low=True)
    add("--momentum", type=share, metavar="X", help=help_)
    help_ = "added to the variance before the square root [1e-5]"
    add("--eps", type=_real("a finite number, at least 0", 0), metavar="X", help=help_)
    add("--groups", type=_whole(1), metavar="N", help="feature groups of the norm `group` [8]")
    help_ = f"how target networks get running statistics: {_either(TARGET_STATS)} [copy]"
    stats = _one_of("target statistics", TARGET_STATS)
    add("--target-stats", type=stats, metavar="HOW", help=help_)
    help_ = "let the online networks value the next step, as CrossQ does"
    add("--no-target-network", action="store_true", help=help_)

    add = parser.add_argument_group("networks and learning").add_argument
    help_ = "widths of the hidden layers of both networks [256,256]"
    add("--hidden", type=_widths, default=(256, 256), metavar="N,N", help=help_)
    add("--actor-hidden", type=_widths, metavar="N,N", help="of the actor [--hidden]")
    add("--critic-hidden", type=_widths, metavar="N,N", help="of the critics [--hidden]")
    positive = _real("a positive finite number", 0, open_low=True)
    add("--learning-rate", type=positive, metavar="X", help="Adam's [3e-4]")
    help_ = "discount per environment step [0.99]"
    add("--gamma", type=_real("in [0, 1]", 0, 1), metavar="X", help=help_)
    help_ = "step of the target networks [0.005]"
    add("--tau", type=_real("in (0, 1]", 0, 1, open_low=True), metavar="X", help=help_)
    add("--batch-size", type=_whole(1), metavar="N", help="transitions per update [256]")
    help_ = "updates per environment step [1]"
    add("--gradient-steps", type=_whole(1), metavar="N", help=help_)
    help_ = "environment steps with random actions and no learning [100]"
    add("--learning-starts", type=_whole(0), metavar="N", help=help_)
    help_ = "replay capacity in transitions [1000000]"
    add("--buffer-size", type=_whole(1), metavar="N", help=help_)

    add = parser.add_argument_group("run").add_argument
    help_ = "environment steps of each seed [100000]"
    add("--steps", type=_whole(1), default=100_000, metavar="N", help=help_)
    help_ = "a number N for seeds 0 to N-1, or a list such as 0,3,7 (one seed: 7,) [1]"
    add("--seeds", type=_seeds, default=(0,), metavar="N", help=help_)
    help_ = "environment steps between evaluations [a fortieth of --steps]"
    add("--eval-every", type=_whole(1), metavar="N", help=help_)
    help_ = "deterministic episodes per evaluation and seed [5]"
    add("--eval-episodes", type=_whole(1), default=5, metavar="N", help=help_)
    help_ = "keyword argument of gymnasium.make, value as JSON or text; may be repeated"
    add(
        "--env-option",
        type=_pair,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=help_,
    )
    help_ = "step in Gymnasium even where the environment also exists in JAX"
    add("--host-env", action="store_true", help=help_)
    add("--tensorboard", action="store_true", help="also write DIR/tensorboard")
    add("--no-progress", action="store_true", help="no progress bar")


def _add_study(commands: Any) -> None:
    parser = commands.add_parser(
        "study",
        help="run a study and judge its claims",
        description=(
            "Run a study: DIR gets study.json, report.html, pictures and metrics.parquet. One "
            "that was stopped continues with the same command. Without NAME, list the studies."
        ),
        allow_abbrev=False,
    )
    parser.set_defaults(run=_study)
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="which study")
    add("--list", action="store_true", help="list the studies")
    add("--out", type=_folder, metavar="DIR", help="the study's folder")
    add("--seeds", type=_whole(1), metavar="N", help="seeds 0 to N-1 of each condition")
    add("--steps", type=_whole(1), metavar="N", help="environment steps of each seed")
    add("--quick", action="store_true", help="a small version that ends in minutes")
    add("--conditions", metavar="A,B", help="only these conditions, or `all`")
    add("--ending", type=_one_of("ending", ENDINGS), metavar="HOW", help=_either(ENDINGS))
    add("--no-progress", action="store_true", help="no progress bar")


def _either(names: Iterable[str]) -> str:
    return ", ".join(names)


def _one_of(what: str, names: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {text!r}: use one of {_either(names)}"
            )
        return text

    return parse


def _folder(text: str) -> Path:
    if not text:  # an unset shell variable, which must not mean the current folder
        raise argparse.ArgumentTypeError("must name a folder, got nothing")
    return Path(text)


def _placement(text: str) -> str:
    for place in text.split("+"):
        _one_of("placement", PLACEMENTS)(place)
    return text


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return parse


def _real(
    wanted: str, low: float, high: float = math.inf, open_low: bool = False
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        # NaN fails every comparison.
        above = value > low if open_low else value >= low
        if not (above and value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return parse


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(_whole(1)(width) for width in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of positive widths: write for example 256,256"
        ) from None


def _seeds(text: str) -> tuple[int, ...]:
    try:
        if "," not in text:
            count = _whole(1)(text)
            if count <= MAX_SEEDS:
                return tuple(range(count))
            raise argparse.ArgumentTypeError(
                f"{count} seeds are too many, and the one seed {count} is written '{count},'"
            )
        seeds = tuple(_whole(0)(seed) for seed in text.removesuffix(",").split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{error}; write a number of seeds, or distinct seeds such as 0,3,7"
        ) from None
    if len(set(seeds)) != len(seeds):
        raise argparse.ArgumentTypeError(f"{text} names a seed twice: seeds must be distinct")
    if max(seeds) >= 2**32:
        raise argparse.ArgumentTypeError(f"seeds must be less than 2**32, got {max(seeds)}")
    return seeds


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not KEY=VALUE: write for example ending=truncated"
        )

    def refuse(token: str) -> NoReturn:
        raise ValueError(token)

    try:
        return name, json.loads(value, parse_constant=refuse)
    except ValueError:
        return name, value
