"""What words on the command line may be: names, numbers, lists and folders.

Names that live in modules which need JAX are repeated here, so that help and mistakes answer at
once; a test compares the two.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from batchproof.errors import BatchproofError
from batchproof.modes import Plan

ALGORITHMS = ("td3", "sac", "ddpg", "crossq", "xqc", "maddpg", "reinforce")
NORMALIZED = {"crossq": "renorm", "xqc": "batch"}  # the norm of those that have one by default
AGENT_PRESETS = {
    "td3": (),
    "sac": (),
    "ddpg": ("paper",),
    "crossq": ("crossq", "sb3-contrib", "wn"),
    "xqc": (),
    "maddpg": ("openai",),
    "reinforce": (),
}
NORMS = ("none", "batch", "renorm", "layer", "group", "rms")
ESTIMATORS = ("ema", "debiased", "cumulative", "chan", "winsorized", "huber", "median-of-means")
RUNNING_NORMS = ("batch", "renorm")  # those that keep running statistics, so modes matter
PLACEMENTS = ("input", "pre", "post", "before-action")
PRECISIONS = ("float32", "bfloat16")
TARGET_STATS = ("copy", "polyak", "stale")
ENDINGS = ("terminated", "truncated", "both")
LETTERS = "TESJMB"
MAX_SEEDS = 10_000
OUTPUT = ("-o", "--output", "--out")  # one option in every command, however it is written
OF_A_RUN = ("run.json", "metrics.parquet", "compare.json", "study.json", ".lock")


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise a `BatchproofError`, which `main` prints."""
        raise BatchproofError(f"{message} (see {self.prog} --help)")


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were written: the others keep the library's defaults."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def pairs(option: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs as a dictionary; a key that is given twice raises."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise BatchproofError(f"{option} {name} is given twice: keep one")
    return dict(pairs)


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is one."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def either(names: Iterable[str]) -> str:
    """Names as help and errors list them."""
    return ", ".join(names)


def one_of(what: str, names: tuple[str, ...]) -> Callable[[str], str]:
    """A parser of one name out of several."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {what} {text!r}: use one of {either(names)}")
        return text

    return parse


def several(parse: Callable[[str], str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of a list with commas, without repetitions."""
    return lambda text: tuple(dict.fromkeys(parse(part.strip()) for part in text.split(",")))


def checked(parse: Any) -> Callable[[str], str]:
    """Accepts what `parse` accepts, and hands on the text."""

    def check(text: str) -> str:
        if parse is not None:
            parse(text)
        return text

    return check


def model(text: str) -> str:
    """The name of a model or environment, which is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file, got nothing")
    return text


def file(text: str) -> Path:
    """A path."""
    return Path(model(text))


def folder(text: str) -> Path:
    """A folder's path."""
    if not text:  # an unset shell variable, which must not mean the current folder
        raise argparse.ArgumentTypeError("must name a folder, got nothing")
    return Path(text)


def output(*shown: str) -> tuple[str, ...]:
    """The spellings of a command's output option, with those that its help shows first in front."""
    return (*shown, *(name for name in OUTPUT if name not in shown))


def check_output(out: Path | None, *inputs: Path | None) -> None:
    """Raise a `BatchproofError` for a file to write that would take the place of one that counts.

    Args:
        out: the file; None is standard output.
        inputs: what the command reads. None and files that are not there are passed over.
    """
    if out is None:
        return
    if out.is_dir():
        raise BatchproofError(f"{out} is a folder: name a file to write")
    if out.exists() and not out.is_file():
        raise BatchproofError(f"{out} is a device or a pipe: name a file to write")
    for one in inputs:
        if one is not None and one.exists() and out.exists() and out.samefile(one):
            raise BatchproofError(
                f"{out} is what this command reads, which is never overwritten: name another file"
            )
    if out.name in OF_A_RUN or _is_in_a_checkpoint(out):
        raise BatchproofError(
            f"{out} would take the place of a run's own record: name another file"
        )


def _is_in_a_checkpoint(path: Path) -> bool:
    """Whether a file lies where a run keeps its agents, also by way of a link."""
    folder = path.parent.resolve()
    return any(
        each.name == "checkpoint"
        and ((each / "state.json").exists() or (each.parent / "run.json").exists())
        for each in (folder, *folder.parents)
    )


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers, ``least`` and up."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return parse


def real(
    wanted: str, low: float, high: float = math.inf, open_low: bool = False
) -> Callable[[str], float]:
    """A parser of numbers from ``low`` to ``high``; ``wanted`` says so in the error."""

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


def placement(text: str) -> str:
    """A norm's places, joined with +."""
    for place in text.split("+"):
        one_of("placement", PLACEMENTS)(place)
    return text


def algo(text: str) -> str:
    """``ALGO`` or ``ALGO:PRESET``."""
    algo, colon, preset = text.partition(":")
    one_of("algorithm", ALGORITHMS)(algo)
    if colon and preset not in AGENT_PRESETS[algo]:
        known = either(AGENT_PRESETS[algo]) or "none"
        raise argparse.ArgumentTypeError(f"unknown preset {preset!r}: {algo} has {known}")
    return text


def norm(text: str) -> str:
    """``KIND``, or ``NETWORK:KIND`` once or twice with + between."""
    networks = []
    for part in text.split("+"):
        network, colon, kind = part.rpartition(":")
        if colon:
            networks.append(one_of("network", ("actor", "critic"))(network))
        one_of("norm", NORMS if colon or "+" in text else (*NORMS, "default"))(kind)
    if len(set(networks)) != text.count("+") + (":" in text):
        raise argparse.ArgumentTypeError(
            f"{text!r} names no network, or one twice: write for example actor:layer+critic:batch"
        )
    return text


def plan(text: str) -> str:
    """A mode plan's letters or its name, or ``default``."""
    # A plan that is well spelt and still impossible is left out of the comparison, with its reason.
    if text != "default" and not re.fullmatch(f"[{LETTERS}{LETTERS.lower()}]{{5,6}}", text):
        Plan.parse(text)
    return text


def widths(text: str) -> tuple[int, ...]:
    """Widths of hidden layers."""
    if text == "linear":
        return ()
    try:
        return tuple(whole(1)(width) for width in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of positive widths: write for example 256,256"
        ) from None


def seeds(text: str) -> tuple[int, ...]:
    """A number of seeds, or a list."""
    try:
        if "," not in text:
            count = whole(1)(text)
            if count <= MAX_SEEDS:
                return tuple(range(count))
            raise argparse.ArgumentTypeError(
                f"{count} seeds are too many, and the one seed {count} is written '{count},'"
            )
        seeds = tuple(whole(0)(seed) for seed in text.removesuffix(",").split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{error}; write a number of seeds, or distinct seeds such as 0,3,7"
        ) from None
    if len(set(seeds)) != len(seeds):
        raise argparse.ArgumentTypeError(f"{text} names a seed twice: seeds must be distinct")
    if max(seeds) >= 2**32:
        raise argparse.ArgumentTypeError(f"seeds must be less than 2**32, got {max(seeds)}")
    return seeds


def pair(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``, with the value as JSON where it is JSON."""
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


def duration(text: str, *, zero: bool = False) -> float:
    """A time such as ``1h30m``, in seconds; ``zero``: whether 0s is one."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    if not hours + minutes + seconds and not (zero and text == "0s"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time: write for example 90s, 30m or 2h"
        )
    return 3600.0 * hours + 60 * minutes + seconds


def cluster(text: str) -> str:
    """Where a comparison is trained."""
    if not re.fullmatch(r"ray(:[^:/\s]+:\d+)?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no place to train: write ray, or ray:HOST:PORT such as ray:10.0.0.1:6379"
        )
    return text


def code(text: str) -> str:
    """The code of one rule."""
    if not re.fullmatch(r"BP[0-9]{3}", text.upper()):
        raise argparse.ArgumentTypeError(
            f"unknown rule {text!r}: a code is BP and three digits, see `batchproof rules`"
        )
    return text.upper()


def names(text: str) -> list[str]:
    """Codes of rules and names of fixes."""
    names = [name.strip() for name in text.split(",")]
    return [name.upper() if name.upper().startswith("BP") else name for name in names]


def codes(text: str) -> list[str]:
    """Codes of rules, or beginnings of codes."""
    codes = [code.strip().upper() for code in text.split(",")]
    for code in codes:
        if not re.fullmatch(r"BP[0-9]{0,3}", code):
            raise argparse.ArgumentTypeError(
                f"unknown rule {code!r}: write codes such as BP401, or BP4 for a whole family"
            )
    return codes
