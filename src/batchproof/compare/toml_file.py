"""A comparison in a TOML file: the words that it stands for."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batchproof.compare.conditions import Option
from batchproof.errors import BatchproofError


def read_file(
    path: Path, options: Mapping[str, bool], train: Mapping[str, bool]
) -> tuple[list[str], list[tuple[str, str, tuple[Option, ...]]]]:
    """The words that a TOML file stands for, and the conditions that it lists.

    A key is an option without its dashes, a list is joined with commas, a table is one KEY=VALUE
    for each of its entries.

    Args:
        path: the file.
        options: what may stand in it; True for those without a value.
        train: the same for a ``[[condition]]``.

    Raises:
        BatchproofError: it cannot be read, or holds what is no option.
    """
    try:
        held = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BatchproofError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BatchproofError(f"{path}: not a TOML file ({error})") from None
    listed = held.pop("condition", [])
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise BatchproofError(f"{path}: write [[condition]] with two brackets, one for each")
    words = list(itertools.chain(*_file_options(path, held, options)))
    conditions = []
    for item in listed:
        algo, name = item.pop("algo", None), item.pop("name", None)
        if not isinstance(algo, str) or not isinstance(name, str) or not name:
            raise BatchproofError(f"{path}: each [[condition]] needs algo = ... and name = ...")
        conditions.append((name, algo, tuple(_file_options(path, item, train))))
    return words, conditions


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
