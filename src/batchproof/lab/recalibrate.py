"""PreciseBN: running statistics computed anew, for fixed weights, from given data.

A running average mixes the statistics of many past weights and policies. Here each layer gets those
of the data as it is now (arXiv 2105.07576, section 3). With k batches of means mu_B and biased
variances v_B they are mean = E[mu_B] and variance = E[mu_B^2 + v_B] - mean^2, weighted by rows:
the statistics of all rows together, however they were split.

**Layer by layer**, as `batchproof.clinic.precise`: each layer sees its input as the layers below
give it in eval mode with their new statistics. That is one forward pass of all rows, each layer
normalizing by their own biased statistics: in mode ``E`` the same rows give the same output. 10^3
to 10^4 rows are enough; Batch Renorm's statistics are those of batch norm.

Weights, optimizers and counts stay as they are. Shapes: ``N`` rows, ``O`` obs, ``A`` action, ``C``
critics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from batchproof.errors import BatchproofError
from batchproof.lab import nets
from batchproof.lab.nets import MLP, Network
from batchproof.lab.passes import Batch
from batchproof.modes import T


def recalibrate(mlp: MLP, network: Network, obs: Array, action: Array | None = None) -> Network:
    """One network with the statistics of ``obs`` (N, O) and, for a critic, ``action`` (N, A).

    The rows are of the data that training normalizes: a sample of the replay, or an on-policy
    agent's rollouts; several batches are joined by ``jnp.concatenate``. Under the statistics of the
    states that its present policy visits an off-policy agent that worked may fail: see
    docs/estimators.md. The variance written is the biased one.

    Raises:
        BatchproofError: fewer than 2 rows.
    """
    if len(obs) < 2:
        raise BatchproofError(f"recalibration needs at least 2 rows, got {len(obs)}")
    if mlp.norm.kind not in ("batch", "renorm"):
        return network
    all_rows = replace(
        mlp.norm,
        kind="batch",
        momentum=1.0,
        estimator="ema",
        batch_variance="biased",
        running_variance="biased",
    )
    _, seen = nets.apply(replace(mlp, norm=all_rows), network, obs, T, action)
    stats = {name: {**seen[name], "count": old["count"]} for name, old in network.stats.items()}
    return Network(network.params, stats)


def recalibrate_critics(mlp: MLP, critics: Network, obs: Array, action: Array) -> Network:
    """Stacked critics, leaves with a leading axis C, with the statistics of (N, O) and (N, A)."""
    stats = jax.vmap(lambda critic: recalibrate(mlp, critic, obs, action).stats)(critics)
    return Network(critics.params, stats)


def recalibrate_agent(
    config: Any, agent: Any, batch: Batch, policy: Callable[[Network, Array], Array]
) -> Any:
    """All networks of an off-policy agent, with the statistics of replayed transitions.

    The actor gets those of s, its target those of s', and the critics those of (s, a) and
    (s', pi'(s')) together, the mixture that a TD update puts through them.

    Args:
        config: the agent's, with ``actor`` and ``critic``.
        agent: its state, with ``actor``, ``critic`` and ``target_critic``; where it has a
            ``target_actor``, that one is pi'.
        batch: N transitions, for example `batchproof.lab.replay.sample` of 4096.
        policy: the deterministic action (N, A) of an actor on (N, O), in mode ``E``.
    """
    actor_mlp = nets.without_action(config.actor)
    agent = agent._replace(actor=recalibrate(actor_mlp, agent.actor, batch.obs))
    actor = agent.actor
    if getattr(agent, "target_actor", None) is not None:
        actor = recalibrate(actor_mlp, agent.target_actor, batch.next_obs)
        agent = agent._replace(target_actor=actor)
    obs = jnp.concatenate([batch.obs, batch.next_obs])
    action = jnp.concatenate([batch.action, policy(actor, batch.next_obs)])
    critics = {"critic": agent.critic}
    if agent.target_critic is not None:
        critics["target_critic"] = agent.target_critic
    return agent._replace(
        **{
            name: recalibrate_critics(config.critic, critic, obs, action)
            for name, critic in critics.items()
        }
    )
