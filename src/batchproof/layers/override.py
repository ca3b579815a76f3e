"""A mode for a block of calls, without passing it through the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from batchproof.errors import BatchproofError
from batchproof.layers.batch_norm import _BatchNorm
from batchproof.layers.batch_renorm import _BatchRenorm
from batchproof.layers.functional import Renorm, as_mode, normalize
from batchproof.modes import Mode

_TorchBatchNorm = nn.modules.batchnorm._BatchNorm
_SB3_CONTRIB = ("ra_mean", "ra_var", "steps", "scale", "bias", "rmax", "dmax", "warmup_steps")


def mode_layers(module: nn.Module) -> list[nn.Module]:
    """The layers in `module`, itself included, that a mode acts on.

    They are Batchproof's `BatchNorm1d`, `BatchNorm2d`, `BatchRenorm1d` and `BatchRenorm2d`, torch's
    batch norms of any rank, and sb3-contrib's batch renorm.
    """
    return [layer for layer in module.modules() if _is_mode_layer(layer)]


@contextmanager
def use_mode(module: nn.Module, mode: Mode | str) -> Iterator[nn.Module]:
    """Run every layer of `mode_layers` in one mode for a block of calls.

        with use_mode(critic, "E"):
            loss = -critic(obs, actor(obs)).mean()

    The mode takes the place of train() and eval() for these layers, which both stay as they are; a
    mode given to a layer's own call still wins. Blocks nest. Layers are given back as they were,
    also after an exception. Other people's layers get a ``forward`` of their own for the block, so
    what is compiled with `torch.compile` should hold Batchproof's.

    Args:
        module: a layer or a network of any depth.
        mode: `T`, `t`, `E`, `S`, `s` or `B`.

    Raises:
        BatchproofError: mode ``J`` or ``M``; a batch norm whose class has a ``forward`` of its own
            (SyncBatchNorm), or that has not seen its first batch (LazyBatchNorm).
    """
    mode = as_mode(mode)
    layers: list[Any] = mode_layers(module)
    forwards = {
        layer: _forward_in(layer, mode)
        for layer in layers
        if not isinstance(layer, _BatchNorm | _BatchRenorm)
    }
    before = [vars(layer).get("forward" if layer in forwards else "mode") for layer in layers]
    try:
        for layer in layers:
            if layer in forwards:
                layer.forward = forwards[layer]
            else:
                layer.mode = mode
        yield module
    finally:
        for layer, value in zip(layers, before, strict=True):
            if layer not in forwards:
                layer.mode = value
            elif value is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = value


def _is_mode_layer(layer: nn.Module) -> bool:
    # By name, because sb3-contrib need not be installed.
    return isinstance(layer, _TorchBatchNorm | _BatchRenorm) or "ra_mean" in layer._buffers


def _forward_in(layer: nn.Module, mode: Mode) -> Callable[[Tensor], Tensor]:
    """What a layer of torch or sb3-contrib computes in the given mode."""
    name = type(layer).__name__
    if not isinstance(layer, _TorchBatchNorm):
        if not all(hasattr(layer, attribute) for attribute in _SB3_CONTRIB):
            raise BatchproofError(
                f"{name} looks like sb3-contrib's batch renorm but lacks some of "
                f"{', '.join(_SB3_CONTRIB)}: replace it by batchproof.layers.BatchRenorm1d"
            )
        return partial(_sb3_contrib_forward, layer, mode)
    if type(layer).forward is not _TorchBatchNorm.forward:
        raise BatchproofError(
            f"{name} computes batch norm in a way of its own, which no mode can be set for: "
            "replace it by batchproof.layers.BatchNorm1d or BatchNorm2d"
        )
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        raise BatchproofError(
            f"{name} does not know its features yet: run the network once on a batch first"
        )
    return partial(_torch_forward, layer, mode)


def _torch_forward(layer: Any, mode: Mode, x: Tensor) -> Tensor:
    layer._check_input_dim(x)
    return normalize(
        x,
        mode,
        weight=layer.weight,
        bias=layer.bias,
        running_mean=layer.running_mean,
        running_var=layer.running_var,
        count=layer.num_batches_tracked,
        momentum=layer.momentum,
        eps=layer.eps,
    )


def _sb3_contrib_forward(layer: Any, mode: Mode, x: Tensor) -> Tensor:
    if x.dim() != 2:
        raise BatchproofError(
            f"input of shape {tuple(x.shape)} does not fit {type(layer).__name__}: give (N, C)"
        )
    return normalize(
        x,
        mode,
        weight=layer.scale if layer.affine else None,
        bias=layer.bias if layer.affine else None,
        running_mean=layer.ra_mean,
        running_var=layer.ra_var,
        count=layer.steps,
        momentum=layer.momentum,
        eps=layer.eps,
        batch_variance="unbiased",
        running_variance="unbiased",
        # It corrects once steps > warmup_steps, we once they are reached.
        renorm=Renorm(
            "folded",
            warmup_steps=layer.warmup_steps + 1,
            r_max=layer.rmax,
            d_max=layer.dmax,
        ),
    )
