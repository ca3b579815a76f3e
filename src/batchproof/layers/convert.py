"""Batch Renorm state of other libraries, in and out.

Libraries disagree on the formula, the variances, the momentum, eps and the warm-up, and a state
holds none of these. `CONVENTIONS` has them by library, as options of `BatchRenorm1d`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchproof.errors import BatchproofError
from batchproof.layers.batch_renorm import BatchRenorm1d
from batchproof.layers.functional import one_of

CONVENTIONS: dict[str, dict[str, Any]] = {
    # It corrects once steps > 100 000, we once they are reached.
    "sb3-contrib": {
        "momentum": 0.01,
        "eps": 1e-3,
        "formula": "folded",
        "warmup_steps": 100_001,
        "batch_variance": "unbiased",
        "running_variance": "unbiased",
    },
    "sbx": {
        "momentum": 0.01,
        "eps": 1e-3,
        "formula": "folded",
        "warmup_steps": 100_000,
        "batch_variance": "biased",
        "running_variance": "biased",
    },
    "torchrl": {
        "momentum": 0.01,
        "eps": 1e-5,
        "formula": "canonical",
        "warmup_steps": 10_000,
        "batch_variance": "biased",
        "running_variance": "unbiased",
    },
}
"""Options of `BatchRenorm1d` that reproduce each library's defaults; CrossQ's code is ``sbx``."""

_NAMES = {
    "sb3-contrib": {
        "weight": "scale",
        "bias": "bias",
        "running_mean": "ra_mean",
        "running_var": "ra_var",
        "num_batches_tracked": "steps",
    },
    "sbx": {
        "weight": "scale",
        "bias": "bias",
        "running_mean": "mean",
        "running_var": "var",
        "num_batches_tracked": "steps",
    },
    "torchrl": {
        name: name
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
}
"""Our names and each library's."""


def from_state(source: str, state: Mapping[str, Any], **options: Any) -> BatchRenorm1d:
    """A layer from another library's Batch Renorm state, in mode E equal to it.

    It is equal in training as well where `options` match what the other layer was made with. Known
    differences: sb3-contrib leaves no finite statistics after a batch of one; TorchRL's ``smooth``
    warm-up blends r and d in where ours widens their bounds, its correction keeps growing after
    twice the warm-up (seen at commit 2666425), and its unbiased variance counts only the first axis
    of (N, C, L).

    Args:
        source: a name in `CONVENTIONS`.
        state: one layer's. ``sb3-contrib`` and ``torchrl``: its ``state_dict()``. ``sbx``: the
            variables that flax's ``init`` gives (``params`` and ``batch_stats``), or the two merged
            into one flat mapping; ``r_max`` and ``d_max`` are taken from it. Values are tensors or
            whatever NumPy can read.
        options: of `BatchRenorm1d`, in place of the library's defaults: what a state does not say,
            for example ``warmup_steps``.

    Raises:
        BatchproofError: unknown source, a name missing or left over, or shapes that are not those
            of one layer.
    """
    one_of("source", source, tuple(CONVENTIONS))
    flat = dict(state)
    if source == "sbx" and "params" in flat:
        flat = {**flat["params"], **flat.get("batch_stats", {})}
    names = _NAMES[source]
    bounds = ("r_max", "d_max") if source == "sbx" else ()
    missing = [name for name in (*names.values(), *bounds) if name not in flat]
    left = [name for name in flat if name not in (*names.values(), *bounds)]
    if missing or left:
        raise BatchproofError(
            f"this is not the state of one {source} batch renorm layer, which has "
            f"{', '.join((*names.values(), *bounds))}: missing {', '.join(missing) or 'nothing'}, "
            f"left over {', '.join(left) or 'nothing'}"
        )
    tensors = {ours: _tensor(flat[theirs]) for ours, theirs in names.items()}
    count = tensors.pop("num_batches_tracked")
    shape = tensors["running_mean"].shape
    if len(shape) != 1 or count.dim() or any(t.shape != shape for t in tensors.values()):
        raise BatchproofError(
            f"the {source} state is not that of one layer: its mean has shape {tuple(shape)}, not "
            "(C,); of stacked critics take one, for example value[0] of each"
        )
    options = {
        **CONVENTIONS[source],
        **{name: float(_tensor(flat[name])) for name in bounds},
        **options,
    }
    layer = BatchRenorm1d(shape[0], dtype=tensors["running_mean"].dtype, **options)
    layer.load_state_dict({**tensors, "num_batches_tracked": count})
    return layer


def to_state(layer: BatchRenorm1d, source: str) -> dict[str, Any]:
    """The layer's state in another library's names; the inverse of `from_state`.

    Momentum, eps and warm-up are arguments there: make the other layer with ``layer.momentum`` (1
    minus it in flax), ``layer.eps`` and ``layer.renorm.warmup_steps`` (one less in sb3-contrib).

    Returns:
        ``sb3-contrib`` and ``torchrl``: copies of the tensors, for ``load_state_dict``. ``sbx``:
        ``params`` and ``batch_stats`` with NumPy arrays, for flax's ``apply``.

    Raises:
        BatchproofError: unknown source, no affine parameters, or a convention that the library does
            not have, so that the state would train differently there.
    """
    one_of("source", source, tuple(CONVENTIONS))
    if layer.weight is None:
        raise BatchproofError(f"{source} states hold weight and bias: make the layer affine=True")
    theirs = CONVENTIONS[source]
    options: dict[str, Any] = {**vars(layer.renorm), **vars(layer)}
    fixed = ["formula", "batch_variance", "running_variance"]
    wrong = [f"{name}={theirs[name]!r}" for name in fixed if options[name] != theirs[name]]
    if source != "torchrl" and layer.renorm.warmup != "hard":
        wrong.append("warmup='hard'")
    if source == "sb3-contrib" and (layer.renorm.r_max, layer.renorm.d_max) != (3.0, 5.0):
        wrong.append("r_max=3.0, d_max=5.0")
    if layer.estimator != "ema":
        wrong.append("estimator='ema'")
    if wrong:
        raise BatchproofError(
            f"the layer is not {source}'s kind of batch renorm: make it with {', '.join(wrong)}"
        )
    ours = layer.state_dict()
    state = {name: ours[key].detach().clone() for key, name in _NAMES[source].items()}
    if source != "sbx":
        return state
    arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in state.items()}
    params = {name: arrays.pop(name) for name in ("scale", "bias")}
    bounds = {"r_max": np.float32(layer.renorm.r_max), "d_max": np.float32(layer.renorm.d_max)}
    return {"params": params, "batch_stats": {**arrays, **bounds}}


def _tensor(value: Any) -> Tensor:
    return value.detach().clone() if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
