"""What a critic in a given mode shows its actor, and how true running statistics are, in numbers.

Measures of a critic take ``q``, a function from a batch of actions (B, A) to their values (B,) with
everything else fixed: the states, the weights and the mode of slot 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.lab import nets
from batchproof.lab.nets import MLP, Network
from batchproof.lab.recalibrate import recalibrate, recalibrate_critics
from batchproof.modes import E, Mode, T

QFunction = Callable[[Array], Array]

NO_GRADIENT = 1e-6  # some ten times the rounding of float32


def kappa(q: QFunction, action: Array) -> Array:
    """Common-mode share of the actor's gradient, () in [0, 1], averaged over action dimensions.

    kappa = |sum_i dQbar/da_i| / sum_i |dQbar/da_i|, Qbar the batch's mean value. It is 0 to
    rounding when a norm on the first layer that contains the action, before its activation or on
    its input, uses the batch's statistics with gradient: a shift of all actions leaves every
    normalized value as it was. It is 1 when all rows want to move the same way.

    Where Qbar has no gradient at all it is 0 too: with one critic whose last hidden layer ends in
    such a norm, Qbar is constant. "No gradient" means below `NO_GRADIENT` of the gradient that the
    same critic has for differences between rows.
    """
    sign = jnp.where(jnp.arange(len(action)) % 2 == 0, 1.0, -1.0)
    gradient = jax.grad(lambda a: q(a).mean())(action)
    contrast = jax.grad(lambda a: (sign * q(a)).mean())(action)
    total = jnp.abs(gradient).sum(0)
    some = total > NO_GRADIENT * jnp.abs(contrast).sum(0)
    return jnp.where(some, jnp.abs(gradient.sum(0)) / jnp.where(some, total, 1), 0).mean()


def common_slope(q: QFunction, action: Array) -> Array:
    """Change of the mean value per unit of a shift of all actions, (): what moves the policy.

    sum_i dQbar/da_i, averaged over action dimensions, in units of return per action unit.
    """
    return jax.grad(lambda a: q(a).mean())(action).sum(0).mean()


def response_ratio(q: QFunction, action: Array, delta: float = 0.1, rows: int = 8) -> Array:
    """How much less the critic answers a shift of all actions than a shift of one, ().

    R = G_com / G_ind with G the mean absolute change of a row's own value: G_ind moves that
    row's action by ``delta`` in each dimension, G_com every row's. 1 without coupling between
    rows (modes E, B; layer norm), 0 for batch norm in T, about 1/2 in M. Batch Renorm in T answers
    in its values, because r and d follow the shift, though its gradient (`kappa`) does not.
    Measured on the first ``rows`` rows.
    """
    rows = min(rows, len(action))
    base = q(action)[:rows]
    common = jnp.abs(q(action + delta)[:rows] - base).mean()

    def alone(row: Array) -> Array:
        moved = q(action.at[row].add(delta))
        return jnp.abs(moved[row] - base[row])

    individual = jax.vmap(alone)(jnp.arange(rows)).mean()
    return common / jnp.where(individual > 0, individual, 1)


def seen_advantage(policy_value: Array, replay_value: Array) -> Array:
    """Mean value of the policy's actions above the replayed ones, in units of return, ().

    With slot 3 in T it is erased: the batch mean of the output does not know what the policy does.
    """
    return policy_value.mean() - replay_value.mean()


JITTER = 0.1  # standard deviation, in action units


def report(
    key: Array,
    q_in: Callable[[Mode, Array], Array],
    policy_action: Array,
    replay_action: Array,
    policy_mode: Mode,
    replay_mode: Mode,
) -> dict[str, Array]:
    """The measures of one agent on one batch.

    The first three are taken at the policy's actions with a jitter: where all actions are equal,
    mode T gives no row any gradient, and a share of nothing means nothing.

    Args:
        key: source of the jitter.
        q_in: value (B,) of actions (B, A) on the batch's states, in a mode.
        policy_action: pi(s), (B, A).
        replay_action: the replayed actions (B, A).
        policy_mode: the plan's mode of slot 3.
        replay_mode: the plan's mode of slot 4. A joint forward is taken as ``T`` here.
    """
    replay_mode = T if replay_mode.kind == "J" else replay_mode

    def q(action: Array) -> Array:
        return q_in(policy_mode, action)

    near = policy_action + JITTER * jax.random.normal(key, policy_action.shape)
    return {
        "kappa": kappa(q, near),
        "common_slope": common_slope(q, near),
        "response_ratio": response_ratio(q, near),
        "advantage_seen": seen_advantage(q(policy_action), q_in(replay_mode, replay_action)),
        "advantage_running": seen_advantage(q_in(E, policy_action), q_in(E, replay_action)),
    }


def statistics_gaps(role: str, mlp: MLP, held: Network, true: Network) -> dict[str, Array]:
    """How far each layer's running statistics are from the true ones, means over features.

    ``mean_gap/ROLE/LAYER`` is |running mean - true mean| in true standard deviations,
    ``log_var_gap/ROLE/LAYER`` the logarithm of running over true variance, each with ``eps`` added
    to variances: 0 and 0 is agreement. Empty without running statistics.

    Args:
        role: which network of the agent.
        mlp: whose norm it is.
        held: a network with its running statistics; stacked ones are averaged over.
        true: the same with those of data, see `batchproof.lab.recalibrate`.
    """
    found = {}
    for layer, stats in held.stats.items():
        if not stats:
            continue
        var = true.stats[layer]["var"] + mlp.norm.eps
        distance = jnp.abs(stats["mean"] - true.stats[layer]["mean"]) / jnp.sqrt(var)
        found[f"mean_gap/{role}/{layer}"] = distance.mean()
        found[f"log_var_gap/{role}/{layer}"] = jnp.log((stats["var"] + mlp.norm.eps) / var).mean()
    return found


def weight_lengths(role: str, network: Network) -> dict[str, Array]:
    """``weight_length/ROLE/LAYER`` of each hidden layer: its units' mean length of their weights.

    What a norm next to the layer cancels in the forward pass, and what decides how far a step of
    the optimizer turns a unit: the longer, the less. `nets.project` holds it at 1.

    Args:
        role: which network of the agent.
        network: stacked ones are averaged over.
    """
    return {
        f"weight_length/{role}/{name}": jnp.sqrt(nets.squared_lengths(name, layer)).mean()
        for name, layer in network.params.items()
        if name.startswith("linear_") and name != "linear_out"
    }


def networks(
    config: Any, actor: Network, critic: Network, obs: Array, critic_obs: Array, action: Array
) -> dict[str, Array]:
    """`weight_lengths` and `statistics_gaps` of an off-policy agent's networks.

    Such as ``weight_length/critic/linear_0`` and ``mean_gap/actor/norm_pre_0``. The truth of the
    gaps is the replayed batch's: the actor's on s, the critics' on (s, a). A batch of one has no
    variance, and gives no gaps.

    Args:
        config: the agent's, with ``actor`` and ``critic``.
        actor: what acts.
        critic: leaves have a leading axis C.
        obs: the actor's, (B, O).
        critic_obs: the critics', (B, O), of another size where several agents share a critic.
        action: the replayed ones, (B, A).
    """
    lengths = weight_lengths("actor", actor) | weight_lengths("critic", critic)
    if len(action) < 2:
        return lengths
    mlp = nets.without_action(config.actor)
    seen = recalibrate(mlp, actor, obs)
    values = recalibrate_critics(config.critic, critic, critic_obs, action)
    gaps = statistics_gaps("actor", mlp, actor, seen)
    return lengths | gaps | statistics_gaps("critic", config.critic, critic, values)
