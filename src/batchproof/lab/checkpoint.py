"""Checkpoints that resume bit for bit: arrays in safetensors, the rest in strict JSON.

``checkpoint/state.json`` names the arrays' file and its SHA-256, and is replaced in one move after
that file is whole on disk: a kill at any moment leaves the last complete checkpoint in place.
Nothing is ever unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from batchproof.errors import BatchproofError
from batchproof.records import file_digest, make_folder, read_json, replacing, write_json

FORMAT = 1
KEYS = {"format", "step", "arrays", "sha256", "extra"}


def save_checkpoint(folder: Path, step: int, tree: Any, extra: dict[str, Any]) -> None:
    """Write a checkpoint of ``tree``, a pytree of arrays, at environment step ``step``.

    Args:
        folder: the run's ``checkpoint`` folder.
        step: environment steps done.
        tree: arrays and PRNG keys.
        extra: JSON values that belong to it.

    Raises:
        BatchproofError: it cannot be written, or the folder is a link to some other place.
    """
    if folder.is_symlink():  # a run's folder may come from somebody else
        raise BatchproofError(
            f"{folder} is a symbolic link, which no run leaves there: delete it and run the same "
            "command again"
        )
    make_folder(folder)
    name = f"step-{step:012d}.safetensors"
    with replacing(folder / name) as file:
        file.write(save(_named_arrays(tree)))
    digest = file_digest(folder / name)
    state = {"format": FORMAT, "step": step, "arrays": name, "sha256": digest, "extra": extra}
    write_json(folder / "state.json", state)
    # Those of earlier steps, and what a kill in the middle of one left.
    for pattern in ("step-*.safetensors", ".step-*.partial"):
        for old in folder.glob(pattern):
            if old.name != name:
                old.unlink()


def read_state(folder: Path) -> dict[str, Any] | None:
    """What ``state.json`` says, or None where there is no checkpoint yet.

    Raises:
        BatchproofError: it is damaged, or of another format.
    """
    path = folder / "state.json"
    if not path.exists():
        return None
    state = read_json(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= KEYS:
        raise BatchproofError(
            f"{path}: not a checkpoint of format {FORMAT}: delete {folder.parent} to start over"
        )
    return state


def load_checkpoint(folder: Path, like: Any) -> tuple[int, Any, dict[str, Any]]:
    """Read the checkpoint in ``folder`` into a tree of the same structure as ``like``.

    Returns:
        The environment step, the tree (NumPy arrays and PRNG keys), and the extra values.

    Raises:
        BatchproofError: missing, cut short, damaged, or of other shapes.
    """
    state = read_state(folder)
    if state is None:
        raise BatchproofError(f"{folder}: no checkpoint here")
    path = folder / Path(state["arrays"]).name
    if not path.exists() or file_digest(path) != state["sha256"]:
        raise BatchproofError(
            f"{path}: the checkpoint is missing or damaged (its checksum differs): "
            f"delete {folder.parent} to start over"
        )
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise BatchproofError(f"{path}: not a safetensors file ({error})") from None
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    loaded = []
    for key_path, leaf in leaves:
        name = _name(key_path)
        wanted = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        array = arrays.get(name)
        if array is None or array.shape != wanted.shape or array.dtype != wanted.dtype:
            raise BatchproofError(
                f"{path}: the checkpoint does not fit this run (array {name}): "
                "it was made by another configuration or version"
            )
        loaded.append(jax.random.wrap_key_data(jnp.asarray(array)) if _is_key(leaf) else array)
    return int(state["step"]), jax.tree_util.tree_unflatten(structure, loaded), state["extra"]


def _named_arrays(tree: Any) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        _name(path): np.ascontiguousarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for path, leaf in leaves
    }


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
