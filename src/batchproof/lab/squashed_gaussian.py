"""The squashed Gaussian policy of SAC, CrossQ and XQC.

Shapes: ``B`` batch, ``O`` obs, ``A`` action.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.lab import nets
from batchproof.lab.nets import MLP, Network, Tree
from batchproof.modes import Mode

TANH_EPS = 1e-6  # keeps log(1 - a^2) finite, as in the code of SAC's authors


class Noise(NamedTuple):
    """The standard normal noise that one update uses."""

    action: Array  # (B, A), for a~
    next_action: Array  # (B, A), for a'


def draw_noise(key: Array, shape: tuple[int, ...]) -> Noise:
    """The noise of one update, for actions of ``shape`` (B, A)."""
    now, later = jax.random.split(key)
    return Noise(jax.random.normal(now, shape), jax.random.normal(later, shape))


def sample(
    mlp: MLP,
    actor: Network,
    obs: Array,
    noise: Array | None,
    mode: Mode,
    log_std: tuple[float, float],
) -> tuple[Array, Array, Tree]:
    """A squashed Gaussian action, reparameterized (equations 20 and 21 of arXiv 1812.05905).

    Args:
        mlp: the actor's layers; it gives mean and log std, (B, 2 A).
        actor: parameters and statistics.
        obs: (B, O).
        noise: standard normal (B, A); None gives the mean action.
        mode: of the pass.
        log_std: bounds that the log std is clipped to.

    Returns:
        Actions (B, A) in (-1, 1), their log densities (B,), the actor's statistics after the pass.
    """
    output, stats = nets.apply(nets.without_action(mlp), actor, obs, mode)
    mean, spread = jnp.split(output, 2, axis=-1)
    spread = jnp.clip(spread, *log_std)
    if noise is None:
        noise = jnp.zeros_like(mean)
    action = jnp.tanh(mean + jnp.exp(spread) * noise)
    log_density = -0.5 * (jnp.square(noise) + jnp.log(2 * jnp.pi)) - spread
    log_prob = (log_density - jnp.log(1 - jnp.square(action) + TANH_EPS)).sum(-1)
    return action, log_prob, stats
