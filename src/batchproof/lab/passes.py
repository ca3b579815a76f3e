"""The critic's three passes, where the modes that need two batches in one forward are made.

Slot 3 is `policy_q`; slots 4 and 5 are `replay_and_target_q`, together because ``J`` makes them
one forward pass. Every off-policy agent uses these two. Both run the critics through ``outputs``,
`nets.q_values` unless told otherwise: a distributional critic's `nets.critic_outputs` puts one more
axis behind the batch wherever the shapes here say (C, B).

Shapes: ``B`` batch, ``O`` obs, ``A`` action, ``C`` critics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.errors import BatchproofError
from batchproof.lab.nets import MLP, Network, Tree, q_values
from batchproof.modes import Mode, Plan, Slot

TARGET_STATS = ("copy", "polyak", "stale")
Outputs = Callable[[MLP, Network, Array, Array, Mode], tuple[Array, Tree]]


class Batch(NamedTuple):
    """Replayed transitions."""

    obs: Array  # (B, O)
    action: Array  # (B, A), in [-1, 1]
    reward: Array  # (B,)
    next_obs: Array  # (B, O)
    terminated: Array  # (B,), 1 where the episode truly ended: a truncation bootstraps


def _layer_mode(mode: Mode) -> Mode:
    """The mode a single layer sees: ``J`` and ``M`` are ``T`` on a concatenated batch."""
    if mode.kind in "JM":
        # Replaced, not made: `batchproof.lab.trace` writes the slot on it.
        return replace(mode, letter="T" if mode.updates else "t")
    return mode


def policy_q(
    mlp: MLP,
    critic: Network,
    batch: Batch,
    policy_action: Array,
    mode: Mode,
    outputs: Outputs = q_values,
) -> tuple[Array, Tree]:
    """Slot 3: the critics on (s, pi(s)). In ``M`` the statistics also cover the replayed (s, a).

    Returns:
        Q (C, B) and the critic's statistics after the pass.
    """
    if mode.kind != "M":
        return outputs(mlp, critic, batch.obs, policy_action, mode)
    obs = jnp.concatenate([batch.obs, batch.obs])
    action = jnp.concatenate([policy_action, batch.action])
    q, stats = outputs(mlp, critic, obs, action, _layer_mode(mode))
    return q[:, : len(batch.obs)], stats


class CriticPasses(NamedTuple):
    """What slots 4 and 5 give."""

    q: Array  # (C, B), slot 4, with gradient
    next_q: Array  # (C, B), slot 5, without gradient
    stats: Tree  # the critic's statistics after both
    target_stats: Tree  # the target critic's; with no target network, `stats`


def replay_and_target_q(
    mlp: MLP,
    critic: Network,
    target: Network | None,
    batch: Batch,
    next_action: Array,
    plan: Plan,
    outputs: Outputs = q_values,
) -> CriticPasses:
    """Slots 4 and 5: the critics on (s, a), and the target critics on (s', a').

    Without a target network (``target`` is None) the critic itself values (s', a'), without
    gradient. With ``J`` both batches go through one forward pass, so that both are normalized by
    the statistics of their mixture (CrossQ, arXiv 1902.05605, equation 4); a target network then
    runs on the same mixture.
    """
    replay_mode, target_mode = plan[Slot.REPLAY_Q], plan[Slot.TARGET_Q]
    if plan.joint:
        rows = len(batch.obs)
        obs = jnp.concatenate([batch.obs, batch.next_obs])
        action = jnp.concatenate([batch.action, next_action])
        both, stats = outputs(mlp, critic, obs, action, _layer_mode(replay_mode))
        if target is None:
            next_q, target_stats = both[:, rows:], stats
        else:
            target_both, target_stats = outputs(mlp, target, obs, action, _layer_mode(target_mode))
            next_q = target_both[:, rows:]
        return CriticPasses(both[:, :rows], jax.lax.stop_gradient(next_q), stats, target_stats)

    # The target's pass comes first, as in Stable-Baselines3: where both move the same running
    # statistics the order shows.
    owner = critic if target is None else target
    next_q, target_stats = outputs(mlp, owner, batch.next_obs, next_action, target_mode)
    if target is None:
        critic = Network(critic.params, target_stats)
    q, stats = outputs(mlp, critic, batch.obs, batch.action, replay_mode)
    if target is None:
        target_stats = stats
    return CriticPasses(q, jax.lax.stop_gradient(next_q), stats, target_stats)


def follow(target: Network, online: Network, tau: float, target_stats: str) -> Network:
    """Move a target network a step ``tau`` towards the online one.

    Its running statistics are replaced (``copy``, what Stable-Baselines3 does since issue 996),
    averaged like the parameters (``polyak``) or left as they are (``stale``). Counters follow too,
    unless stale: Batch Renorm's warm-up reads them.
    """
    params = _polyak(target.params, online.params, tau)
    if target_stats == "copy":
        return Network(params, online.stats)
    if target_stats == "polyak":
        return Network(params, _polyak(target.stats, online.stats, tau))
    return Network(params, target.stats)


def check_config(config: Any) -> None:
    """Raise a `BatchproofError` for a hyperparameter that no off-policy agent can run with."""
    if config.target_stats not in TARGET_STATS:
        raise BatchproofError(
            f"unknown target statistics {config.target_stats!r}: "
            f"use one of {', '.join(TARGET_STATS)}"
        )
    if not 0 < config.learning_rate < math.inf:
        raise BatchproofError(f"learning_rate must be positive, got {config.learning_rate}")
    if not 0 <= config.gamma <= 1:
        raise BatchproofError(f"gamma must be in [0, 1], got {config.gamma}")
    if not 0 < config.tau <= 1:
        raise BatchproofError(f"tau must be in (0, 1], got {config.tau}")
    # Not every agent has each of these.
    for name in ("batch_size", "critics", "policy_delay"):
        value = getattr(config, name, 1)
        if value < 1:
            raise BatchproofError(f"{name} must be at least 1, got {value}")
    for name in ("exploration_noise", "target_noise", "noise_clip", "schedule_steps"):
        value = getattr(config, name, 0)
        if not 0 <= value < math.inf:
            raise BatchproofError(f"{name} must not be negative, got {value}")
    end = getattr(config, "learning_rate_end", None)
    if end is not None and not 0 < end < math.inf:
        raise BatchproofError(f"learning_rate_end must be positive, got {end}")


def _polyak(target: Tree, online: Tree, tau: float) -> Tree:
    def leaf(t: Array, o: Array) -> Array:
        # Counters are not averaged.
        return o if jnp.issubdtype(t.dtype, jnp.integer) else t + tau * (o - t)

    return jax.tree.map(leaf, target, online)
