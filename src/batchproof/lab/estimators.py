"""Estimators of running statistics for the lab; `batchproof.estimators` says what is known of each.

Pure functions of the running mean and variance (F,), the batch, and rho, the weight of the new
batch. They return the new mean and variance, which are at any time what mode ``E`` uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from batchproof.estimators import (
    FLOOR,
    HUBER,
    MAD_TO_STD,
    WINSOR,
    Batch,
    blocks,
    median_variance,
)

Moved = tuple[Array, Array]
Share = float | Array


def ema(mean: Array, var: Array, batch: Batch, rho: Share) -> Moved:
    """Exponential moving average: m += rho (batch.mean - m), and v likewise."""
    return mean + rho * (batch.mean - mean), var + rho * (batch.var - var)


def debiased(mean: Array, var: Array, batch: Batch, rho: float) -> Moved:
    """Bias-corrected average: weight rho / (1 - (1 - rho)^count), 1 for the first batch."""
    log_decay = math.log1p(-rho) if rho < 1 else -math.inf
    share = rho / -jnp.expm1(batch.count.astype(mean.dtype) * log_decay)
    return ema(mean, var, batch, share)


def cumulative(mean: Array, var: Array, batch: Batch, rho: float) -> Moved:
    """Plain average over all batches: weight 1 / count. The momentum is not used."""
    share = 1 / batch.count.astype(mean.dtype)
    return ema(mean, var, batch, share)


def chan(mean: Array, var: Array, batch: Batch, rho: float) -> Moved:
    """Exponential Chan merge: v <- (1 - rho) (v + rho d^2) + rho batch.var, d = batch.mean - m."""
    d = batch.mean - mean
    return mean + rho * d, (1 - rho) * (var + rho * jnp.square(d)) + rho * batch.var


def winsorized(mean: Array, var: Array, batch: Batch, rho: float) -> Moved:
    """Average of batches whose rows were clipped to median +- 3 * 1.4826 * MAD first."""
    middle = _lower_median(batch.x)
    mad = _lower_median(jnp.abs(batch.x - middle))
    limit = jnp.where(mad > 0, WINSOR * MAD_TO_STD * mad, jnp.inf)
    x = jnp.clip(batch.x, middle - limit, middle + limit)
    return ema(mean, var, batch._replace(mean=x.mean(0), var=x.var(0) * batch.bessel), rho)


def huber(mean: Array, var: Array, batch: Batch, rho: float) -> Moved:
    """Average with bounded steps: m += rho clip(batch.mean - m, +- 3 sqrt(v / N)).

    log v likewise, clipped at +- 3 sqrt(2 / N). The first batch is taken as it is.
    """
    rows = len(batch.x)
    limit = HUBER * jnp.sqrt((var + FLOOR) / rows)
    log_limit = HUBER * math.sqrt(2 / rows)
    step = jnp.clip(batch.mean - mean, -limit, limit)
    log_step = jnp.clip(jnp.log((batch.var + FLOOR) / (var + FLOOR)), -log_limit, log_limit)
    new_var = jnp.maximum(var + (var + FLOOR) * jnp.expm1(rho * log_step), 0)
    first = batch.count == 1
    return (
        jnp.where(first, batch.mean, mean + rho * step),
        jnp.where(first, batch.var, new_var),
    )


def median_of_means(mean: Array, var: Array, batch: Batch, rho: float) -> Moved:
    """Average of the median over 9 blocks of the blocks' means, and of their variances.

    Row i belongs to block i mod 9, so that each block of a concatenated batch (modes ``J`` and
    ``M``) has rows of both.
    """
    rows = len(batch.x)
    number = blocks(rows)
    if number == 1:
        return ema(mean, var, batch, rho)
    size = rows // number
    parts = batch.x[: size * number].reshape(size, number, -1)
    scale = batch.bessel * (rows - 1) / rows / median_variance(size)
    middle, spread = _lower_median(parts.mean(0)), _lower_median(parts.var(0, ddof=1))
    return ema(mean, var, batch._replace(mean=middle, var=spread * scale), rho)


def _lower_median(x: Array) -> Array:
    """The median over the first axis; the smaller of the middle two, as `torch.median`.

    Found bit by bit, from the highest: a bit stays where no more rows than may be below are. One
    pass over the rows a bit, which a CPU does many at a time; XLA's sort on a CPU compares one
    pair at a time: in tries six times as long on 17 features, thirty times on 256. NaN counts as
    above all else, as in `jnp.sort`.
    """
    below = (len(x) - 1) // 2
    size = 8 * x.dtype.itemsize
    signed, unsigned = jnp.dtype(f"int{size}"), jnp.dtype(f"uint{size}")
    highest = jnp.iinfo(signed).min

    # Bits of floats, read as a whole number, rise with the float, from 0 up; below 0 they fall.
    bits = lax.bitcast_convert_type(jnp.where(jnp.isnan(x), jnp.nan, x), signed)
    ordered = lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ highest), unsigned)

    def keep_or_drop(i: Array, found: Array) -> Array:
        tried = found | (jnp.ones((), unsigned) << (size - 1 - i).astype(unsigned))
        return jnp.where((ordered < tried).sum(0) <= below, tried, found)

    found = lax.fori_loop(0, size, keep_or_drop, jnp.zeros(x.shape[1:], unsigned))
    bits = lax.bitcast_convert_type(found, signed)
    return lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ highest, ~bits), x.dtype)


ESTIMATORS: dict[str, Callable[[Array, Array, Batch, float], Moved]] = {
    "ema": ema,
    "debiased": debiased,
    "cumulative": cumulative,
    "chan": chan,
    "winsorized": winsorized,
    "huber": huber,
    "median-of-means": median_of_means,
}
"""Every estimator of running statistics by name."""
