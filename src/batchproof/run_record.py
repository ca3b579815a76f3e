"""What ``run.json`` must hold to be read back, so that an edited or older one is told in one line.

The lab's classes say what a setting is, but they need JAX, which exports and reports do without:
their types are repeated here, and a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.modes import Plan


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_part(value: Any) -> bool:
    return isinstance(value, dict)


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_options(value: Any) -> bool:
    return _is_part(value) or (isinstance(value, list) and all(map(_is_part, value)))


_Form = tuple[Callable[[Any], bool], str, str]
_FORMS: tuple[_Form, ...] = (
    (
        _is_text,
        "text",
        "algo baseline batch_variance env_id estimator formula kind noise placement plan precision "
        "project running_variance score target_stats warmup",
    ),
    (
        _is_whole,
        "a whole number, 0 or more",
        "action_size atoms batch_size buffer_size critics episodes_per_update eval_episodes "
        "eval_every gradient_steps groups learning_starts obs_size policy_delay schedule_steps "
        "steps update_every warmup_steps",
    ),
    (
        _is_flag,
        "true or false",
        "bias centralized host_env normalize_obs normalize_rewards random_behaviour "
        "share_parameters target_network",
    ),
    (
        _is_number,
        "a number",
        "action_penalty adam_b1 critic_learning_rate critic_weight_decay d_max "
        "entropy_per_dimension eps exploration_noise gamma high initial_alpha learning_rate "
        "learning_rate_end log_std low max_grad_norm momentum noise_clip ou_dt ou_theta "
        "output_bound r_max target_entropy target_noise tau weight_decay",
    ),
    (_is_part, "an object", "actor agents config critic norm"),
    (_are_whole, "a list of whole numbers, 0 or more", "action_sizes hidden obs_sizes seeds"),
    (_are_texts, "a list of names", "names"),
    (_are_options, "an object, or a list of objects", "env_options"),
)
FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    name: (holds, words) for holds, words, names in _FORMS for name in names.split()
}
"""What a setting of that name must be, as a test and in words."""

OR_NULL = (
    "agents", "critic_learning_rate", "eval_every", "learning_rate_end", "max_grad_norm",
    "output_bound", "target_entropy",
)  # fmt: skip
"""Settings that may also be null."""

_TRAINING = ("algo", "config", "env_id", "env_options", "seeds")
_SPACES = ("obs_size", "action_size", "agents")
_AGENTS = ("names", "obs_sizes", "action_sizes", "score")


class Part(dict[str, Any]):
    """A part of a run's record; a key that it lacks is told with the name of its file."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        # What is handed to an environment stays a plain dictionary.
        super().__init__(
            (key, Part(value, path) if isinstance(value, dict) and key != "env_options" else value)
            for key, value in values.items()
        )
        self.path = path

    def __missing__(self, key: str) -> NoReturn:
        refuse(self.path, f"it has no {key}")


def refuse(path: Path, why: str) -> NoReturn:
    """Raise the `BatchproofError` of a file that is not the record of a run, or not any more."""
    raise BatchproofError(
        f"{path}: not the record of a run of this version ({why}); it was edited, or another "
        "version wrote it: use that version, or train into a new folder"
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever fails while a record is made sense of, say that it is the record."""
    try:
        yield
    except BatchproofError:
        raise
    except Exception as error:  # settings that fit no configuration fail in its constructors
        refuse(path, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")


def read(folder: Path) -> Part:
    """A run's ``run.json``, with what was trained and the sizes of its spaces.

    Raises:
        BatchproofError: missing, damaged, or not the record of a run of this version.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise BatchproofError(f"{path}: no such file: name the folder of a `batchproof train` run")
    run = records.read_json(path)
    if not _is_part(run):
        refuse(path, "it is no object")
    training, spaces = (_part(run, name, path) for name in ("training", "spaces"))
    check_training(training, path)
    _need(training, _TRAINING, path)
    if not training["seeds"]:
        refuse(path, "seeds is empty")
    _need(training["config"], ("actor", "plan"), path)
    for name in ("actor", "critic"):
        if name in training["config"]:
            _need(training["config"][name], ("hidden", "norm"), path)
            _need(training["config"][name]["norm"], ("kind", "placement"), path)
    _check_spaces(spaces, path)
    if not (_is_whole(run.get("devices", 1)) and run.get("devices", 1) >= 1):
        refuse(path, "devices is not a positive whole number")
    return Part(run, path)


def check_training(training: dict[str, Any], path: Path) -> None:
    """Raise a `BatchproofError` where a setting that is there is not what such a setting can be."""
    _check_forms(training, path)
    options, seeds = training.get("env_options"), training.get("seeds")
    if isinstance(options, list) and seeds is not None and len(options) != len(seeds):
        refuse(path, f"env_options has {len(options)} entries for {len(seeds)} seeds")
    plan = training.get("config", {}).get("plan")
    if plan is not None:
        try:
            Plan.parse(plan)
        except BatchproofError as error:
            refuse(path, str(error))


def _check_spaces(spaces: dict[str, Any], path: Path) -> None:
    _need(spaces, _SPACES, path)
    _check_forms(spaces, path)
    agents = spaces["agents"]
    if agents is None:
        return
    _need(agents, _AGENTS, path)
    if len({len(agents[name]) for name in ("names", "obs_sizes", "action_sizes")}) != 1:
        refuse(path, "agents has lists of other lengths")


def _check_forms(part: dict[str, Any], path: Path) -> None:
    for name, value in part.items():
        holds, words = FORMS.get(name, (None, ""))
        if holds is None or (value is None and name in OR_NULL):
            continue
        if not holds(value):
            refuse(path, f"{name} is not {words}")
        if isinstance(value, dict) and name != "env_options":
            _check_forms(value, path)


def _part(record: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    _need(record, (name,), path)
    part = record[name]
    if not isinstance(part, dict):
        refuse(path, f"{name} is not an object")
    return part


def _need(part: dict[str, Any], names: tuple[str, ...], path: Path) -> None:
    for name in names:
        if name not in part:
            refuse(path, f"it has no {name}")


def differing(held: Mapping[str, Any], wanted: Mapping[str, Any], most: int = 4) -> str:
    """Settings in which two records of a training differ, with both values, in words."""
    found = list(_differing(held, wanted))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _differing(
    held: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    for name in sorted(held.keys() | wanted.keys()):
        one, other = held.get(name), wanted.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differing(one, other, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} is {json.dumps(one)}, not {json.dumps(other)}"
