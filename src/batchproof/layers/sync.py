"""Statistics over all ranks of a process group: turn a network to them, and check that they agree.

The layers themselves take ``process_group=``; see `batchproof.layers.BatchNorm1d`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch import nn

from batchproof.errors import BatchproofError
from batchproof.layers.batch_norm import BatchNorm1d, BatchNorm2d, _BatchNorm
from batchproof.layers.batch_renorm import _BatchRenorm
from batchproof.layers.moments import WORLD, check_group, gather, group_of
from batchproof.layers.override import mode_layers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_OURS: dict[type, type] = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d}


def convert_sync(module: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Give every batch norm and Batch Renorm in `module` a process group.

    Batchproof's layers are changed where they stand. torch's `BatchNorm1d` and `BatchNorm2d` give
    way to Batchproof's with the very same parameters and buffers, so that an optimizer made before
    still holds them; forward hooks on them are lost. Nothing is changed where anything is refused.

    Args:
        module: a layer or a network, before it is wrapped in `DistributedDataParallel`.
        process_group: what ``torch.distributed.new_group`` gave; None for all ranks, as in torch's
            ``convert_sync_batchnorm``.

    Returns:
        `module`; the new layer where `module` itself is torch's batch norm.

    Raises:
        BatchproofError: a layer that no group can be given: torch's `BatchNorm3d`, `SyncBatchNorm`
            and lazy ones, sb3-contrib's batch renorm, or an estimator that needs the rows.
    """
    group = WORLD if process_group is None else process_group
    layers: list[Any] = mode_layers(module)
    for layer in layers:
        if not isinstance(layer, _BatchNorm | _BatchRenorm) and type(layer) not in _OURS:
            raise BatchproofError(
                f"{type(layer).__name__} cannot share its statistics: replace it by a BatchNorm or "
                "BatchRenorm of batchproof.layers first (sb3-contrib's by from_state)"
            )
        check_group(group, getattr(layer, "estimator", "ema"))
    new = {layer: _ours(layer) for layer in layers}
    for layer in new.values():
        layer.process_group = group
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(module, module)


def check_in_sync(
    module: nn.Module, process_group: ProcessGroup | None = None, tolerance: float = 0.0
) -> dict[str, float]:
    """Compare the running statistics of all ranks; every rank has to call this.

    Layers of one process group agree to the bit on equal hardware. Those that keep to themselves
    drift apart: then every rank evaluates another policy, and the one that rank 0 saves was
    normalized by its own share of the data.

    Args:
        module: a network, also one wrapped in `DistributedDataParallel`.
        process_group: whose ranks; None for all.
        tolerance: largest difference that is allowed, in the units of the buffers.

    Returns:
        By layer, the largest difference of a buffer's element between two ranks; infinite where one
        is not finite.

    Raises:
        BatchproofError: on every rank, a larger difference than `tolerance`; ranks that hold
            different layers; `torch.distributed` is not set up: nothing to compare.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise BatchproofError(
            "there are no other ranks to compare with: call "
            "torch.distributed.init_process_group before check_in_sync"
        )
    layers = mode_layers(module)
    found = [
        (path, name, buffer)
        for path, layer in module.named_modules()
        if layer in layers
        for name, buffer in layer.named_buffers(recurse=False)
    ]
    group = group_of(WORLD if process_group is None else process_group)
    if group is None:
        return {path: 0.0 for path, _, _ in found}
    device = next((t.device for t in (*module.buffers(), *module.parameters())), None)
    values = [buffer.detach().double().flatten().to(device) for _, _, buffer in found]
    own = torch.cat([torch.zeros(0, dtype=torch.double, device=device), *values])
    sizes = gather(torch.tensor([len(own)], device=device), group).flatten().tolist()
    if min(sizes) < max(sizes):
        raise BatchproofError(
            f"ranks hold different layers ({min(sizes)} to {max(sizes)} running statistics): make "
            "the same network on every rank"
        )
    every = gather(own, group)
    gaps = (every.amax(0) - every.amin(0)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    largest = [float(part.max()) for part in gaps.split([len(part) for part in values])]
    differences: dict[str, float] = {}
    for (path, _, _), gap in zip(found, largest, strict=True):
        differences[path] = max(gap, differences.get(path, 0.0))
    if max(largest, default=0.0) > tolerance:
        gap, (path, name, _) = max(zip(largest, found, strict=True), key=lambda pair: pair[0])
        off = sum(gap > tolerance for gap in differences.values())
        raise BatchproofError(
            f"running statistics differ between ranks in {off} of {len(differences)} layers, by "
            f"{gap:.3g} at most, in {name} of {path or 'the layer'!r}: give the layers a process "
            "group before training (batchproof.layers.convert_sync), or broadcast rank 0's buffers"
        )
    return differences


def _ours(layer: Any) -> Any:
    """The layer, or Batchproof's in the place of torch's."""
    if type(layer) not in _OURS:
        return layer
    new = _OURS[type(layer)](
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        device="meta",
    )
    for name, value in (*layer._parameters.items(), *layer._buffers.items()):
        setattr(new, name, value)
    return new.train(layer.training)
