"""A comparison in a TOML file: the words that it stands for."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from batchproof.compare.conditions import Option
from batchproof.errors import BatchproofError


class InFile(NamedTuple):
    """What a TOML file says.

    Attributes:
        words: of the command line.
        conditions: that it lists, each a name, an algorithm and options.
        environments: that it lists, with the options of each.
    """

    words: list[str]
    conditions: list[tuple[str, str, tuple[Option, ...]]]
    environments: dict[str, tuple[Option, ...]]


def read_file(
    path: Path,
    options: Mapping[str, bool],
    train: Mapping[str, bool],
    task: Mapping[str, bool],
) -> InFile:
    """What a TOML file says.

    A key is an option without its dashes, a list is joined with commas, a table is one KEY=VALUE
    for each of its entries.

    Args:
        path: the file.
        options: what may stand in it; True for those without a value.
        train: the same for a ``[[condition]]``.
        task: the same for an ``[[environment]]``.

    Raises:
        BatchproofError: it cannot be read, or holds what is no option.
    """
    try:
        held = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BatchproofError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BatchproofError(f"{path}: not a TOML file ({error})") from None
    conditions = []
    for item in _listed(path, held, "condition"):
        algo, name = item.pop("algo", None), item.pop("name", None)
        if not isinstance(algo, str) or not isinstance(name, str) or not name:
            raise BatchproofError(f"{path}: each [[condition]] needs algo = ... and name = ...")
        conditions.append((name, algo, tuple(_file_options(path, item, train))))
    environments: dict[str, tuple[Option, ...]] = {}
    for item in _listed(path, held, "environment"):
        env = item.pop("id", None)
        if not isinstance(env, str) or not env:
            raise BatchproofError(f"{path}: each [[environment]] needs id = ...")
        if env in environments:
            raise BatchproofError(f"{path}: [[environment]] {env} stands there twice: keep one")
        environments[env] = tuple(_file_options(path, item, task))
    words = list(itertools.chain(*_file_options(path, held, options)))
    return InFile(words, conditions, environments)


def _listed(path: Path, held: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Takes the tables under [[name]] out of a file."""
    listed = held.pop(name, [])
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise BatchproofError(f"{path}: write [[{name}]] with two brackets, one for each")
    return listed


def _file_options(
    path: Path, table: Mapping[str, Any], known: Mapping[str, bool]
) -> Iterator[Option]:
    for key, value in table.items():
        name = key.replace("_", "-")
        if name not in known:
            raise BatchproofError(f"{path}: unknown key {key}: use some of {', '.join(known)}")
        option = f"--{name}"
        if known[name] != isinstance(value, bool):
            wanted = "true or false" if known[name] else "a value"
            raise BatchproofError(f"{path}: {key} = {json.dumps(value)}: expected {wanted}")
        if value is True:
            yield (option,)
        elif isinstance(value, dict):
            for entry, item in value.items():
                yield option, f"{entry}={json.dumps(item)}"
        elif isinstance(value, list):
            # One number of seeds would be their count.
            end = "," if name == "seeds" and len(value) == 1 else ""
            yield option, ",".join(map(str, value)) + end
        elif value is not False:
            yield option, str(value)
