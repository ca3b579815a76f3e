"""Every normalization by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from batchproof.errors import BatchproofError
from batchproof.layers.batch_norm import BatchNorm1d, BatchNorm2d
from batchproof.layers.batch_renorm import BatchRenorm1d, BatchRenorm2d
from batchproof.layers.functional import one_of


def _none(features: int, dims: int) -> nn.Module:
    return nn.Identity()


def _batch(features: int, dims: int, **options: Any) -> nn.Module:
    return (BatchNorm1d if dims == 1 else BatchNorm2d)(features, **options)


def _renorm(features: int, dims: int, **options: Any) -> nn.Module:
    return (BatchRenorm1d if dims == 1 else BatchRenorm2d)(features, **options)


def _layer(features: int, dims: int, **options: Any) -> nn.Module:
    # On images layer norm is group norm of one group (arXiv 1803.08494): no fixed height and width.
    if dims == 2:
        return nn.GroupNorm(1, features, **options)
    return nn.LayerNorm(features, **options)


def _group(features: int, dims: int, groups: int = 8, **options: Any) -> nn.Module:
    if groups < 1 or features % groups:
        raise BatchproofError(
            f"group norm cannot split {features} features into {groups} equal groups: choose "
            "groups that divide the features"
        )
    return nn.GroupNorm(groups, features, **options)


def _rms(features: int, dims: int, eps: float = 1e-5, **options: Any) -> nn.Module:
    if dims == 2:
        raise BatchproofError(
            "rms norm takes (N, C) only, torch's acts on the last axis: use 'layer' or 'group' on "
            "images"
        )
    return nn.RMSNorm(features, eps=eps, **options)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "none": _none,
    "batch": _batch,
    "renorm": _renorm,
    "layer": _layer,
    "group": _group,
    "rms": _rms,
}
"""What makes each layer, from the number of features, the dims and the options of its class."""


def create_norm(name: str, features: int, *, dims: int = 1, **options: Any) -> nn.Module:
    """Make a normalization layer by name.

    Args:
        name: a name in `LAYERS`, the lab's names.
        features: C.
        dims: 1 for (N, C), 2 for images (N, C, H, W).
        options: the class's own, for example ``eps``, ``momentum``, ``groups``, ``formula``.

    Raises:
        BatchproofError: unknown name, dims or option, or a value that the layer refuses.
    """
    one_of("norm", name, tuple(LAYERS))
    if dims not in (1, 2):
        raise BatchproofError(f"dims must be 1 for (N, C) or 2 for (N, C, H, W), got {dims}")
    try:
        return LAYERS[name](features, dims, **options)
    except TypeError as error:
        raise BatchproofError(f"norm {name!r} cannot take these options: {error}") from None
