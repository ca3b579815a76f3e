"""PreciseBN: running statistics computed anew, for fixed weights, from given observations.

A running average mixes the statistics of many past weights and policies. Here each layer gets the
statistics of the data as it is now (arXiv 2105.07576, section 3): with k batches of means mu_B and
biased variances v_B, mean = E[mu_B] and variance = E[mu_B^2 + v_B] - mean^2, weighted by rows.

**Layer by layer**: the layers are taken in the order of the forward pass, and each sees its input
as the layers below give it in eval mode with their new statistics. In eval mode the network then
normalizes every layer by exactly its own input's statistics, and neither the batch size nor the
order of the rows matters. (fvcore's one-pass version leaves the layers below in train mode; its
result depends on the split.) It costs one pass for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from batchproof.clinic import probe
from batchproof.clinic.fold import is_folded
from batchproof.clinic.probe import LayerFacts
from batchproof.clinic.subject import (
    Obs,
    Subject,
    Transitions,
    finite_parameters,
    rows,
    sound_weights,
    take,
    training_mode,
)
from batchproof.errors import BatchproofError


@dataclass(frozen=True)
class Recalibrated:
    """What recalibration changed in one layer.

    Attributes:
        name: role and path of the layer.
        mean_error: largest |old mean - new mean| / new standard deviation over the features whose
            variances are above 0 and whose old mean was a number.
        log_variance_error: largest |log(old variance / new variance)| over the same.
        samples: rows (times positions, in feature maps) that the statistics come from.
    """

    name: str
    mean_error: float
    log_variance_error: float
    samples: int

    def __str__(self) -> str:
        return (
            f"{self.name}: mean moved by up to {self.mean_error:.3g} sigma, "
            f"variance by up to a factor {math.exp(min(self.log_variance_error, 700.0)):.3g}, "
            f"from {self.samples} samples"
        )


PROBED = 64
"""Rows that layers with running statistics are told apart on."""

_Passes = Callable[[int], Iterator[Callable[[], object]]]
_Critic = Callable[[Obs, Tensor], Tensor]
_Actor = Callable[[Obs], Tensor]


LACKS_REPLAY = (
    "the running statistics of an off-policy agent are those of its replay, and these are states "
    "of its present policy, under whose statistics it may stop working: load the replay buffer "
    "(model.load_replay_buffer) or give observations of it (obs=..., on the command line --obs "
    "FILE), and in either case no environment"
)


def recalibrate(
    subject_or_module: Subject | nn.Module,
    obs: Obs | None = None,
    *,
    batch_size: int = 256,
    where: Callable[[LayerFacts], bool] | None = None,
) -> list[Recalibrated]:
    """Give every layer with running statistics those of the given data, in place.

    Layers that `fold` left neutral stay so.

    **Which data.** That which the statistics are of in training: an on-policy agent's rollouts, an
    off-policy agent's replay. Under the statistics of the states that the present policy visits,
    off-policy agents that worked failed (docs/estimators.md, "On which states").

    In a subject with transitions the critics are recalibrated on (s, a) and (s', pi(s')) together,
    the mixture that a TD update puts through them. Everything else, modes and random state
    included, stays as it was. The variance written is the biased one of all the data.

    Args:
        subject_or_module: a subject, or a module that maps observations (B, ...).
        obs: (N, ...); 10^3 to 10^4 rows are enough. None takes the subject's own.
        batch_size: rows of one pass; it bounds the memory and changes nothing else.
        where: which layers; the others keep their statistics. None recalibrates all.

    Returns:
        One entry for each layer that was recalibrated, in the order of the forward pass; empty
        where no layer keeps running statistics.

    Raises:
        BatchproofError: no observations, or fewer than 2, or a parameter that is not finite, or an
            off-policy subject that has only states of its present policy (`Subject.lacks_replay`)
            and no ``obs`` are given.
    """
    if batch_size < 1:
        raise BatchproofError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(subject_or_module, Subject):
        subject = subject_or_module
        if obs is None and subject.lacks_replay:
            raise BatchproofError(LACKS_REPLAY)
        given = subject.obs if obs is None else obs
    else:
        if obs is None:
            raise BatchproofError("recalibrate(module, obs): observations are needed")
        subject, given = Subject.from_module(subject_or_module, obs), obs
    if not finite_parameters(*subject.networks.values()):
        raise BatchproofError(
            "parameters that are not finite leave no statistics that are: `batchproof audit --only "
            "BP404` says which"
        )
    if rows(given) < 2:
        raise BatchproofError(f"recalibration needs at least 2 observations, got {rows(given)}")
    done: set[int] = set()
    results: list[Recalibrated] = []
    torch_state = torch.get_rng_state()
    try:
        with training_mode(subject, False), torch.no_grad():
            for passes in _groups(subject, given):
                for layer in _layers(subject, passes):
                    chosen = where is None or where(layer)
                    if chosen and id(layer.call.module) not in done:
                        done.add(id(layer.call.module))
                        results.append(_recalibrate(subject, layer, passes(batch_size)))
    finally:
        torch.set_rng_state(torch_state)
    return results


def _groups(subject: Subject, obs: Obs) -> Iterator[_Passes]:
    """Forward passes that together put a network's data through it, one group for each network."""

    def over(forward: Callable[[Obs], object], data: Obs) -> _Passes:
        def passes(batch_size: int) -> Iterator[Callable[[], object]]:
            for start in range(0, rows(data), batch_size):
                batch = take(data, slice(start, start + batch_size))
                yield partial(forward, batch)

        return passes

    def critic_passes(critic: _Critic, data: Transitions, actor: _Actor | None) -> _Passes:
        def passes(batch_size: int) -> Iterator[Callable[[], object]]:
            for start in range(0, len(data), batch_size):
                part = slice(start, start + batch_size)
                yield partial(critic, take(data.obs, part), data.action[part])
                if actor is not None:
                    s_next = take(data.next_obs, part)
                    yield partial(critic, s_next, actor(s_next))

        return passes

    yield over(subject.policy, obs)
    data = subject.transitions
    if data is None:
        return
    if subject.target_actor is not None:
        yield over(subject.target_actor, data.next_obs)
    actor = subject.target_actor or subject.critic_actor
    for critic in (subject.critic, subject.target_critic):
        if critic is not None:
            yield critic_passes(critic, data, actor)


def _layers(subject: Subject, passes: _Passes) -> list[LayerFacts]:
    """Layers with running statistics, in the order of the forward pass."""
    with probe.recorded(subject.networks, keep=1) as calls:
        _run(subject, next(passes(PROBED)))
    found = [layer for layer in probe.layer_facts(calls) if layer.mean_buffer and layer.var_buffer]
    # A folded layer has no statistics of its own: new ones would undo its share of the fold.
    return [layer for layer in found if not is_folded(layer)]


def _run(subject: Subject, forward: Callable[[], object]) -> None:
    """One pass. Torch's distributions refuse NaN, at the end, when every layer has had its call.

    So statistics that are NaN do not stand in the way of their own mending.
    """
    try:
        forward()
    except ValueError:
        if sound_weights(*subject.networks.values()):
            raise


def _recalibrate(
    subject: Subject, layer: LayerFacts, passes: Iterator[Callable[[], object]]
) -> Recalibrated:
    module = layer.call.module
    count, first, second = 0, torch.tensor(0.0), torch.tensor(0.0)

    def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count, first, second
        x = next(v for v in inputs if isinstance(v, Tensor) and v.is_floating_point()).double()
        axes = [d for d in range(x.ndim) if d != 1]
        n = x.numel() // x.shape[1]
        mean, var = x.mean(axes), x.var(axes, correction=0)
        count += n
        first = first + n * mean
        second = second + n * (mean.square() + var)

    handle = module.register_forward_pre_hook(see)
    try:
        for forward in passes:
            _run(subject, forward)
    finally:
        handle.remove()
    mean = first / count
    var = (second / count - mean.square()).clamp_min(0)
    buffers = dict(module.named_buffers(recurse=False))
    old_mean, old_var = buffers[layer.mean_buffer], buffers[layer.var_buffer]
    alive = (var > 0) & (old_var.double() > 0) & old_mean.isfinite()
    mean_error = ((old_mean.double() - mean).abs() / var.sqrt())[alive]
    log_error = (old_var.double() / var).log().abs()[alive]
    old_mean.data.copy_(mean)
    old_var.data.copy_(var)
    return Recalibrated(
        name=layer.name,
        mean_error=float(mean_error.max()) if mean_error.numel() else 0.0,
        log_variance_error=float(log_error.max()) if log_error.numel() else 0.0,
        samples=count,
    )
