"""Folding: a batch norm that runs on running statistics is a scale and a shift, so the layer
before it can do its work.

With y = s (W x + b) + t for each feature, W' = s W and b' = s b + t. Which layer follows which is
read from values that really passed (the output of one call is the input of the next), so that
`nn.Sequential` and layers linked in a forward method are found alike; s and t are measured, so that
any normalization layer will do. Every fold is proven on observations in float64, or undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchproof.clinic import probe
from batchproof.clinic.probe import Call, LayerFacts
from batchproof.clinic.subject import Obs, Subject, take, training_mode, unchanged
from batchproof.errors import BatchproofError

FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight (F, ...) has one slice for each output feature, which a scale can enter."""


@dataclass(frozen=True)
class Folded:
    """One normalization layer folded into the layer before it.

    Attributes:
        name: role and path of the normalization layer.
        into: role and path of the layer that does its work now.
        error: largest change of the policy's output in eval mode on the observations, evaluated
            in float64; what is left is the rounding of the stored weights.
        tolerance: `probe.ROUNDING` rounding errors of the weights' type, times the output's scale.
    """

    name: str
    into: str
    error: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"{self.name} folded into {self.into}: output changed by {self.error:.2g} "
            f"(rounding: {self.tolerance:.2g})"
        )


def fold(
    subject_or_module: Subject | nn.Module, obs: Obs | None = None, *, keep_layers: bool = False
) -> list[Folded]:
    """Fold normalization layers into the Linear or Conv layers before them, in place.

    Only layers that act on the policy's output are folded: each fold is proven on it. A fold whose
    error is above its tolerance is undone: the output of the layer before was used elsewhere too,
    or its weights are shared.

    Args:
        subject_or_module: a subject, or a module that maps observations (B, ...).
        obs: observations to prove it on; None takes the subject's.
        keep_layers: leave the normalization layer in its place, with mean -0, variance 1, scale 1
            and shift 0 (`is_folded`), so that the names of the state stay: a library that builds
            the network anew before it loads weights needs that. Otherwise an `nn.Identity` takes
            its place.

    Returns:
        What was folded, in the order of the forward pass.
    """
    if isinstance(subject_or_module, Subject):
        subject = subject_or_module
    else:
        if obs is None:
            raise BatchproofError("fold(module, obs): give observations to prove it on")
        subject = Subject.from_module(subject_or_module, obs)
    given = subject.obs if obs is None else obs
    done: list[Folded] = []
    for layer, before in _pairs(subject, given):
        reference = _output(subject, given)
        undo = _fold(subject, layer, before.module, keep_layers)
        if undo is None:
            continue
        changed = _output(subject, given)
        eps = torch.finfo(before.module.weight.dtype).eps  # type: ignore[arg-type]
        tolerance = probe.ROUNDING * eps * max(float(reference.abs().max()), 1e-30)
        error = probe.difference(reference, changed)
        if error <= tolerance:
            done.append(Folded(layer.name, before.name, error, tolerance))
        else:
            undo()
    return done


def _output(subject: Subject, obs: Obs) -> Tensor:
    """The policy's output in eval mode, in float64."""
    with (
        unchanged(subject),
        training_mode(subject, False),
        probe.in_float64(subject),
        torch.no_grad(),
    ):
        return subject.policy(obs)


def _pairs(subject: Subject, obs: Obs) -> list[tuple[LayerFacts, Call]]:
    """Normalization layers with the Linear or Conv call whose output is their input."""
    with (
        unchanged(subject),
        training_mode(subject, False),
        torch.no_grad(),
        probe.recorded(subject.networks) as calls,
    ):
        subject.policy(take(obs, slice(0, 2 * probe.PROBE_ROWS)))
    with unchanged(subject):
        layers = probe.layer_facts(calls)
    pairs = []
    for layer in layers:
        if not layer.running or layer.couples_eval or layer.random_eval or layer.moves_eval:
            continue
        uses = [call for call in calls if call.module is layer.call.module]
        x = uses[0].inputs[0]
        producers = [
            call
            for call in calls
            if isinstance(call.module, FOLDABLE)
            and isinstance(x, Tensor)
            and call.output.shape == x.shape
            and torch.equal(call.output, x)
        ]
        if len(producers) == 1 and len(uses) == 1:
            pairs.append((layer, producers[0]))
    return pairs


def _fold(
    subject: Subject, layer: LayerFacts, before: nn.Module, keep: bool
) -> Callable[[], None] | None:
    """Fold one layer; gives the way back, or None where it cannot be folded."""
    norm = layer.call.module
    found = _scale_and_shift(layer)
    if found is None or not layer.path:
        return None
    scale, shift = found
    weight: Tensor = before.weight  # type: ignore[assignment]
    bias: Tensor | None = before.bias  # type: ignore[assignment]
    parts = [*norm.parameters(recurse=False), *norm.buffers(recurse=False)]
    saved = [(part, part.detach().clone()) for part in (weight, *parts)]
    if bias is not None:
        saved.append((bias, bias.detach().clone()))

    def undo() -> None:
        for part, content in saved:
            part.data.copy_(content)
        before.bias = bias  # type: ignore[assignment]
        for parent, name in places:
            setattr(parent, name, norm)

    places = [
        (module, name)
        for _, _, module in subject.modules()
        for name, child in module.named_children()
        if child is norm
    ]
    if keep:
        if bias is None:
            return None  # a bias would be a new name in the state
        _neutralize(layer)
        rest = _scale_and_shift(layer)
        assert rest is not None
        own_scale, own_shift = rest
    else:
        own_scale, own_shift = torch.ones_like(scale), torch.zeros_like(shift)
        for parent, name in places:
            setattr(parent, name, nn.Identity())
    factor = scale / own_scale
    offset = (shift - own_shift) / own_scale
    weight.data.copy_(weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1)))
    if bias is None:
        before.bias = nn.Parameter(offset.to(weight))
    else:
        bias.data.copy_(bias.double() * factor + offset)
    return undo


def _scale_and_shift(layer: LayerFacts) -> tuple[Tensor, Tensor] | None:
    """s and t (F,) of y = s x + t in eval mode, in float64; None where that is not what it does."""
    norm = probe.replica(layer.call)
    # The replica starts from the buffers at the call; the layer may have been changed since.
    norm.load_state_dict(layer.call.module.state_dict())
    norm.double().eval()
    x = layer.call.inputs[0].double()
    shape = (1, -1, *[1] * (x.ndim - 2))
    with torch.no_grad():
        t = norm(torch.zeros_like(x))
        s = norm(torch.ones_like(x)) - t
        scale, shift = s.transpose(0, 1).flatten(1)[:, 0], t.transpose(0, 1).flatten(1)[:, 0]
        y = norm(x)
    error = probe.difference(y, scale.reshape(shape) * x + shift.reshape(shape))
    # 1e-9: far above rounding in float64, far below anything with a meaning.
    affine = error <= 1e-9 * max(float(y.abs().max()), float(shift.abs().max()), 1e-30)
    return (scale, shift) if affine else None


def affine_names(layer: LayerFacts) -> tuple[str, str]:
    """Names of a layer's scale (F,) and shift (F,), told apart by what they do; '' for none."""
    norm = probe.replica(layer.call).eval()
    buffers = dict(norm.named_buffers(recurse=False))
    buffers[layer.mean_buffer].data.zero_()
    zero = torch.zeros_like(layer.call.inputs[0])
    scale = shift = ""
    with torch.no_grad():
        for name, parameter in norm.named_parameters(recurse=False):
            if parameter.shape != buffers[layer.mean_buffer].shape:
                continue
            before = norm(zero)
            parameter.add_(1.0)
            # With mean 0 a row of zeros stays where it is, unless a shift moves it.
            if torch.equal(norm(zero), before):
                scale = name
            else:
                shift = name
    return scale, shift


def is_folded(layer: LayerFacts) -> bool:
    """Whether a layer with running statistics is one that `fold` left in its place, neutral.

    Mean -0, variance 1, scale 1 and shift 0 for all features. A fresh layer has mean +0: the sign
    is the mark of a fold. It survives saving and loading, changes no output, and is gone as soon
    as the statistics move.
    """
    module = layer.call.module
    buffers = dict(module.named_buffers(recurse=False))
    mean = buffers[layer.mean_buffer]
    if not bool(((mean == 0) & mean.signbit()).all()):
        return False
    if layer.var_buffer and not bool((buffers[layer.var_buffer] == 1).all()):
        return False
    scale, shift = affine_names(layer)
    neutral = [(name, value) for name, value in ((scale, 1.0), (shift, 0.0)) if name]
    return all(bool((getattr(module, name) == value).all()) for name, value in neutral)


def _neutralize(layer: LayerFacts) -> None:
    """Running mean -0 and variance 1, scale 1 and shift 0, as `is_folded` knows them."""
    module = layer.call.module
    scale, shift = affine_names(layer)
    buffers = dict(module.named_buffers(recurse=False))
    buffers[layer.mean_buffer].data.fill_(-0.0)
    if layer.var_buffer:
        buffers[layer.var_buffer].data.fill_(1.0)
    if scale:
        getattr(module, scale).data.fill_(1.0)
    if shift:
        getattr(module, shift).data.zero_()
