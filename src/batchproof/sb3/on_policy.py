"""PPO and A2C with batch norm: which mode collects, which mode updates, and what that does.

The library collects in eval mode and updates in train mode, so with batch norm (or dropout) the
policy that is updated is not the one that acted: the ratio of the first minibatch is not 1, rows
are clipped before anything was learned, and the gradient is that of another policy. `OnPolicyModes`
measures this in every update and cures it in the way that its first argument names:

    model.learn(200_000, callback=OnPolicyModes("preserved"))

| how | collects | updates | first ratio |
|---|---|---|---|
| ``library`` | E | T | not 1: measured, not cured |
| ``train`` | T, on the batch of environments | T | not 1: the two batches differ |
| ``eval-after`` | E | T for ``warmup`` updates, then E | 1 after the warm-up |
| ``frozen`` | E | E; statistics are taken anew from the rollout after each update | 1 |
| ``preserved`` | E | the same, and weights and biases make up for the new statistics | 1 |
| ``renorm`` | E | T, on Batch Renorm layers | 1 where r and d are not clipped |
| ``mdr`` | E | T, then E in the last ``rectified`` epochs | not 1; the update ends in E |

Statistics that move between two rollouts move the policy by a step that PPO does not clip; which
way learns best, and by how much, is in ``docs/on-policy.md``.

**frozen.** New statistics change the policy, so when they are taken matters. Here they are taken
after the update and before the next rollout is collected, from the observations of the last one at
the new weights. The policy that acts is then exactly the one that is updated, and no stored
log-probability has to be computed again. (Taking them between collecting and updating would need
new log-probabilities and values, and the actions would still be another policy's.) Still they are
another policy than the one that the update arrived at, by a step that PPO does not clip.

**preserved.** The same, but each layer's weight and bias take up what its new statistics change, so
that the policy stays the function that the update arrived at (as Pop-Art does for targets, arXiv
1602.07714). Only the gradient's coordinates are normalized anew.

**mdr** follows what is published of mode-dependent rectification (arXiv 2602.05619): each update
has two phases on the same rollout, the usual one in train mode and a rectification in eval mode,
and together they take no more epochs than before. How the epochs are shared is our choice: half
and half.

The callback lives as long as one ``learn``: it stores nothing in the model, whose files are the
library's own. Give it to every ``learn``, also after loading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from typing import Any

import numpy as np
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor, nn

from batchproof.errors import BatchproofError
from batchproof.layers import mode_layers, use_mode
from batchproof.layers.batch_renorm import _BatchRenorm
from batchproof.layers.moments import moments

HOW = ("library", "train", "eval-after", "frozen", "preserved", "renorm", "mdr")
"""The ways to use the modes of normalization on-policy."""

WARMUP = 10
"""Updates in which ``eval-after`` lets statistics move, unless told otherwise."""

MOST_ROWS = 1024
"""Observations of a rollout, spread evenly over it, that new statistics are taken from."""

KL_ROWS = 256
"""Of these, the observations on which the policies before and after are compared."""

_REFRESHED = ("frozen", "preserved")
# Names of running mean, running variance, weight and bias: PyTorch's, and sb3-contrib's.
_NAMES = (
    ("running_mean", "running_var", "weight", "bias"),
    ("ra_mean", "ra_var", "scale", "bias"),
)


class OnPolicyModes(BaseCallback):
    """Train PPO or A2C under one of the `HOW`, and log the first minibatch of every update.

    Keys in the model's logger, measured at epoch 0, minibatch 0, before any step, with r the ratio
    of the new probability of the stored actions to the stored one:

    ``batchproof/first_kl``
        mean of r - 1 - log r, an estimate of KL(collecting policy || updated policy), in nats.
    ``batchproof/first_ratio_error``
        largest abs(r - 1).
    ``batchproof/first_clip_fraction``
        share of rows with abs(r - 1) above the clip range (PPO).

    Without batch norm or dropout they are 0, up to the rounding between a batch of environments and
    a minibatch. `first` holds those of the last update without the prefix. Where statistics are
    taken anew after an update there is also

    ``batchproof/refresh_kl``
        mean KL(policy before || policy after) over observations of the rollout, in nats: a step
        that no clip range holds back. `refresh_kl` holds the last one, 0 where there is none.
    """

    def __init__(
        self,
        how: str,
        *,
        warmup: int | None = None,
        rectified: int | None = None,
        verbose: int = 0,
    ) -> None:
        """Choose the way.

        Args:
            how: one of `HOW`.
            warmup: ``eval-after``: updates (rollouts learned from) in which statistics move; None
                for `WARMUP`.
            rectified: ``mdr``: epochs of each update, the last ones, that run in eval mode; None
                for half of them, rounded down.
            verbose: the library's own.

        Raises:
            BatchproofError: an unknown way, or an option that it does not have.
        """
        super().__init__(verbose)
        if how not in HOW:
            raise BatchproofError(f"unknown on-policy mode {how!r}: use one of {', '.join(HOW)}")
        for name, value, only in (
            ("warmup", warmup, "eval-after"),
            ("rectified", rectified, "mdr"),
        ):
            if value is not None and how != only:
                raise BatchproofError(
                    f"{name} has no effect with {how!r}: leave it out, or use {only}"
                )
        if warmup is not None and warmup < 0:
            raise BatchproofError(f"warmup must be 0 updates or more, got {warmup}")
        self.how = how
        self.warmup = WARMUP if warmup is None else warmup
        self.rectified = rectified
        self.first: dict[str, float] = {}
        self.refresh_kl = 0.0
        self._update = _Update()
        self._obs: Any = None

    def _on_training_start(self) -> None:
        self._check()
        policy: Any = self.model.policy
        buffer: Any = self.model.rollout_buffer  # type: ignore[attr-defined]
        self._update = _Update()
        self._obs = None
        policy.evaluate_actions = _Evaluate(policy, self._update)
        buffer.get = _Get(buffer, self._update)
        vars(policy).pop("forward", None)
        if self.how == "train":
            policy.forward = _Collect(policy)

    def _on_rollout_start(self) -> None:
        self._finish_update()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        epochs = getattr(model, "n_epochs", 1)
        if self.how in _REFRESHED:
            self._update.eval_from = 0
            self._obs = _rows(_flat(model.rollout_buffer.observations))
        elif self.how == "eval-after":
            # The library counts epochs.
            warm = model._n_updates >= self.warmup * epochs
            self._update.eval_from = 0 if warm else math.inf
        elif self.how == "mdr":
            self._update.eval_from = epochs - self._rectified(epochs)

    def _on_training_end(self) -> None:
        self._finish_update()
        policy: Any = self.model.policy
        buffer: Any = self.model.rollout_buffer  # type: ignore[attr-defined]
        for owner, name in (
            (policy, "evaluate_actions"),
            (policy, "forward"),
            (buffer, "get"),
        ):
            vars(owner).pop(name, None)

    def _finish_update(self) -> None:
        """What is done between an update and the next rollout, or the end of training."""
        log_ratio = self._update.first_log_ratio
        if log_ratio is not None:
            self.first = _figures(log_ratio, _clip_range(self.model))
            for key, value in self.first.items():
                self.logger.record(f"batchproof/{key}", value)
        if self._obs is not None:
            self._refresh(obs_as_tensor(self._obs, self.model.device))
            self._obs = None
        self._update.clear()

    def _refresh(self, obs: Any) -> None:
        policy: Any = self.model.policy
        few = _rows(obs, KL_ROWS)
        before = _actions(policy, few)
        refresh(policy, obs, preserve=self.how == "preserved")
        kl = kl_divergence(before, _actions(policy, few))
        # Continuous actions have a number for each of their parts.
        self.refresh_kl = float(kl.reshape(len(kl), -1).sum(1).mean())
        self.logger.record("batchproof/refresh_kl", self.refresh_kl)

    def _rectified(self, epochs: int) -> int:
        return epochs // 2 if self.rectified is None else self.rectified

    def _check(self) -> None:
        model: Any = self.model
        if not isinstance(model, PPO | A2C):
            raise BatchproofError(
                f"OnPolicyModes is for PPO and A2C, not for a {type(model).__name__}: for SAC, "
                "TD3 and DDPG use batchproof.sb3.set_modes(model, plan)"
            )
        if self.how == "library":
            return
        layers = mode_layers(model.policy)
        dropout = [
            module
            for module in model.policy.modules()
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        ]
        if not layers and not dropout:
            raise BatchproofError(
                f"this {type(model).__name__} has no layer that depends on its mode, so "
                f'OnPolicyModes("{self.how}") changes nothing: add batch norm, for example '
                'policy_kwargs={"features_extractor_class": NatureCNN, '
                '"features_extractor_kwargs": {"use_batch_norm": True}}'
            )
        if self.how in _REFRESHED and not layers:
            raise BatchproofError(
                f"{self.how} is about running statistics and this policy has none: leave it out"
            )
        if self.how == "preserved" and not all(_has_affine(layer) for layer in layers):
            raise BatchproofError(
                "preserved needs layers with weight and bias, which make up for new statistics: "
                "make them with affine=True"
            )
        if self.how == "renorm" and not all(_is_renorm(layer) for layer in layers):
            raise BatchproofError(
                'OnPolicyModes("renorm") needs Batch Renorm layers: make the policy with '
                'norm="renorm"'
            )
        if self.how == "train" and model.n_envs < 2:
            raise BatchproofError(
                "collecting in train mode with one environment normalizes every observation by "
                "itself: take at least 2 environments, better 8"
            )
        epochs = getattr(model, "n_epochs", 1)
        if self.how == "mdr" and not 1 <= self._rectified(epochs) < epochs:
            raise BatchproofError(
                f"mdr shares the epochs of an update between train and eval mode: of {epochs} "
                f"epochs {self._rectified(epochs)} cannot be rectified; give n_epochs at least 2 "
                "and rectified at least 1 and below n_epochs"
            )


def refresh(policy: Any, obs: Any, *, preserve: bool = False) -> None:
    """Give every layer with running statistics those of its input on ``obs``, in place.

    Without ``preserve`` one pass on the batch's own statistics, which are written down on the way
    (biased variance): in eval mode each layer then normalizes these very rows as train mode would
    (PreciseBN, arXiv 2105.07576, on one batch; `batchproof.clinic` has it for any data).

    With it one pass in eval mode: each layer gets the statistics of the input that it has there,
    and weight and bias that keep its output what it was.

    Args:
        policy: an actor-critic policy of the library.
        obs: observations (B, ...) as tensors, before the policy's own preprocessing.
        preserve: keep the policy's function; layers then need weight and bias.
    """

    def write(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        mean, var = moments(inputs[0].detach())
        for names in _NAMES:
            if getattr(layer, names[0], None) is not None:
                parts: list[Any] = [getattr(layer, name, None) for name in names]
                old_mean, old_var, weight, bias = parts
                if preserve:
                    old_std, std = ((v + layer.eps).sqrt() for v in (old_var, var))
                    bias += weight * (mean - old_mean) / old_std
                    weight *= std / old_std
                old_mean.copy_(mean)
                old_var.copy_(var)

    handles = [layer.register_forward_pre_hook(write) for layer in mode_layers(policy)]
    flag = policy.training
    try:
        policy.set_training_mode(False)  # dropout rests
        with torch.no_grad(), use_mode(policy, "E" if preserve else "t"):
            type(policy).forward(policy, obs, deterministic=True)
    finally:
        policy.set_training_mode(flag)
        for handle in handles:
            handle.remove()


def _actions(policy: Any, obs: Any) -> Any:
    """The distribution of actions in eval mode."""
    flag = policy.training
    try:
        policy.set_training_mode(False)
        with torch.no_grad():
            # The policy has one object for all its distributions.
            return copy(policy.get_distribution(obs))
    finally:
        policy.set_training_mode(flag)


class _Update:
    """What the hooks share: how far an update is, from which epoch on it runs in eval mode."""

    def __init__(self) -> None:
        self.eval_from = math.inf
        self.clear()

    def clear(self) -> None:
        """No update runs."""
        self.epoch = -1
        self.samples: Any = None
        self.first_log_ratio: Tensor | None = None


class _Evaluate:
    """In place of ``evaluate_actions``: the class's own, in the mode of the epoch.

    An object, not a closure, so that a copy of the policy refers to its own parts.
    """

    def __init__(self, policy: Any, update: _Update) -> None:
        self.policy = policy
        self.update = update

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        policy, update = self.policy, self.update
        updating = policy.training and update.epoch >= 0
        rectify = updating and update.epoch >= update.eval_from
        if rectify:
            policy.set_training_mode(False)
        try:
            found = type(policy).evaluate_actions(policy, *args, **kwargs)
        finally:
            if rectify:
                policy.set_training_mode(True)
        if update.samples is not None and update.first_log_ratio is None:
            old = update.samples.old_log_prob
            update.first_log_ratio = found[1].detach().double() - old.double()
        return found


class _Get:
    """In place of the rollout buffer's ``get``: the same, and the update knows its minibatch."""

    def __init__(self, buffer: Any, update: _Update) -> None:
        self.buffer = buffer
        self.update = update

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        self.update.epoch += 1
        for samples in type(self.buffer).get(self.buffer, *args, **kwargs):
            self.update.samples = samples
            yield samples


class _Collect:
    """In place of ``forward``: in train mode when it collects, which is when it draws actions."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __call__(self, obs: Any, deterministic: bool = False) -> Any:
        policy = self.policy
        collects = not deterministic and not policy.training
        if collects:
            policy.set_training_mode(True)
        try:
            return type(policy).forward(policy, obs, deterministic)
        finally:
            if collects:
                policy.set_training_mode(False)


def _flat(observations: Any) -> Any:
    """A rollout's observations (steps, environments, ...) as rows."""
    if isinstance(observations, dict):
        return {key: _flat(part) for key, part in observations.items()}
    return observations.reshape(-1, *observations.shape[2:])


def _rows(observations: Any, most: int = MOST_ROWS) -> Any:
    """At most so many rows, spread evenly, copied."""
    if isinstance(observations, dict):
        return {key: _rows(part, most) for key, part in observations.items()}
    count = len(observations)
    return observations[np.linspace(0, count - 1, min(most, count)).astype(int)]


def _figures(log_ratio: Tensor, clip_range: float | None) -> dict[str, float]:
    off = torch.expm1(log_ratio)
    figures = {
        "first_kl": float((off - log_ratio).mean()),
        "first_ratio_error": float(off.abs().max()),
    }
    if clip_range is not None:
        figures["first_clip_fraction"] = float((off.abs() > clip_range).double().mean())
    return figures


def _clip_range(model: Any) -> float | None:
    clip = getattr(model, "clip_range", None)
    return None if clip is None else float(clip(model._current_progress_remaining))


def _has_affine(layer: Any) -> bool:
    # sb3-contrib's Batch Renorm without an affine part has the parameters and does not use them.
    return getattr(layer, "affine", True) and all(
        getattr(layer, weight, None) is not None and getattr(layer, bias, None) is not None
        for mean, _, weight, bias in _NAMES
        if getattr(layer, mean, None) is not None
    )


def _is_renorm(layer: nn.Module) -> bool:
    # By name, because sb3-contrib need not be installed.
    return isinstance(layer, _BatchRenorm) or "ra_mean" in layer._buffers
