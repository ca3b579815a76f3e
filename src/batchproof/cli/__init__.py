"""The ``batchproof`` command: words on the command line become calls into the package.

Nothing heavy is imported before the words are known to be good, so help and mistakes answer at
once. Each command, or group of commands, has a module with ``add_to``, its options, and ``run``.

Exit codes: 0 done, 1 an audit with findings, 2 bad input or a machine's limit (one line on standard
error), 130 interrupted.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
from typing import NoReturn

from batchproof import __version__
from batchproof.cli import clinic, compare, export, modes, report, study, train
from batchproof.cli.words import Parser
from batchproof.errors import BatchproofError

RESUMED = ("train", "study", "compare")  # commands that go on where they were stopped
EXTRAS = {"stable_baselines3": "sb3", "sb3_contrib": "sb3"}  # what brings a package; else lab


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
        resumes = ": the same command resumes" if words[:1] and words[0] in RESUMED else ""
        print(f"batchproof: interrupted{resumes}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141  # what a shell reports for a process that SIGPIPE ended
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "batchproof":
            raise
        name = error.name.split(".")[0]
        extra = EXTRAS.get(name, "lab")
        return _complain(f"{name} is not installed: pip install 'batchproof[{extra}]'")
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        _drop_output_if_full()
        return _complain(f"{name}{error.strerror or error}")


def _run(words: list[str]) -> int:
    try:
        args = parser().parse_args(words)
    except SystemExit as done:  # --help and --version, which have printed what they had to say
        return int(done.code or 0)
    try:
        return args.run(args, shlex.join(["batchproof", *words]))
    except SystemExit as done:  # a factory, a trusted file, an environment: none may end an audit
        raise BatchproofError(
            f"code that was loaded ended Python (sys.exit({done.code!r})) before the command was "
            "done: take that call out of it"
        ) from done


def run() -> NoReturn:
    """The console script: `main`, and an exit that does not look for cycles among all modules."""
    code = main()
    gc.freeze()
    sys.exit(code)


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


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(
        prog="batchproof",
        description="Normalization for deep RL that acts the same alone and in a batch.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"batchproof {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (train, compare, study, report, clinic, export, modes):
        command.add_to(commands)
    return parser
