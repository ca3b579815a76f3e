"""Running moments of a stream, and observations normalized by them, as pure functions.

What Stable-Baselines3 calls ``VecNormalize``: one set of statistics for a whole agent, moved by
every observation that it acts on and by nothing else, and frozen in evaluation. A norm with
placement ``input`` (`batchproof.lab.norms`) is another thing: each network has its own, each pass
picks its statistics by its mode, and they are moved by replayed batches.

Shapes: ``N`` rows, ``O`` obs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

CLIP = 10.0  # bound of a normalized observation, in standard deviations
EPS = 1e-8
START = 1e-4  # rows that the start counts as, with mean 0 and variance 1


class Moments(NamedTuple):
    """Mean and biased variance of all rows so far, and how many they were.

    In float32 the number stops at 2^24 = 16.8 million single rows; from there on the moments are
    an exponential average over as many.
    """

    mean: Array
    var: Array
    rows: Array  # ()


def init(shape: tuple[int, ...] = ()) -> Moments:
    """Mean 0 and variance 1, to be outweighed by the first row."""
    return Moments(jnp.zeros(shape), jnp.ones(shape), jnp.asarray(START))


def update(moments: Moments, rows: Array) -> Moments:
    """The moments after ``rows`` (N, ...) more, whatever batches they come in (Chan's merge).

    Two groups of n and m rows whose means are d apart have together a mean of
    mean_n + d m / (n + m) and a variance of (n var_n + m var_m + d^2 n m / (n + m)) / (n + m).
    """
    total = moments.rows + len(rows)
    share = len(rows) / total
    delta = rows.mean(0) - moments.mean
    spread = delta**2 * (moments.rows / total)
    return Moments(
        mean=moments.mean + share * delta,
        var=moments.var + share * (rows.var(0) - moments.var + spread),
        rows=total,
    )


def normalize(moments: Moments, obs: Array) -> Array:
    """Observations (..., O) less the mean, over the standard deviation, clipped to +-`CLIP`."""
    normalized = (obs - moments.mean) * jax.lax.rsqrt(moments.var + EPS)
    return jnp.clip(normalized, -CLIP, CLIP)
