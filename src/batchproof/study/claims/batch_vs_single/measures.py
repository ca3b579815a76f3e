"""All that is measured: gaps of one pass, trained actors as policies, and the TD error."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.stats import wasserstein_distance
from tqdm import tqdm

from batchproof.lab import nets, replay
from batchproof.lab.agents import ddpg
from batchproof.lab.nets import Network
from batchproof.lab.passes import Batch
from batchproof.lab.recalibrate import recalibrate, recalibrate_critics
from batchproof.modes import B, E, Mode
from batchproof.study.claims.batch_vs_single.conditions import (
    BATCH_SIZE,
    EPISODES,
    GROUPS,
    POPULATION,
    STARTS,
    TD_PLANS,
    Condition,
    config_of,
)
from batchproof.study.claims.batch_vs_single.gaps import (
    compiled,
    gap_by_size,
    identical_weights,
    layer_norm_gap,
    one_pass,
    synchronized_gaps,
)
from batchproof.study.claims.batch_vs_single.other_actors import dropout_gaps, notebook_gaps
from batchproof.study.claims.batch_vs_single.training import Trained, act_out


def measure(trained: Trained, cells: dict[str, Trained], progress: bool) -> dict[str, Any]:
    """Every measure of the study, each a list with one number a seed."""
    seeds = len(trained.returns)
    per_seed: list[dict[str, Any]] = []
    populations, actors = [], []
    for seed in tqdm(range(seeds), desc="measure", unit=" seeds", disable=not progress):
        agent, key = trained.agent(seed), jax.random.key(10_000 + seed)
        acted = acting(trained.condition, agent.actor, key)
        states = acted.pop("states")
        per_seed.append(
            acted
            | one_pass(trained.condition, agent.actor, states)
            | layer_norm_gap(cells.get("layer"), seed, key, states)
            | gap_by_size(trained.condition, agent.actor, states, key)
            | identical_weights(trained.condition, agent.actor, states)
            | td_errors(trained.condition, agent, trained.rows[seed], key)
            | notebook_gaps(seed)
            | dropout_gaps(seed, states)
        )
        populations.append(np.asarray(states, np.float64))
        actors.append(jax.tree.map(np.asarray, agent.actor))
    found: dict[str, Any] = {name: [one[name] for one in per_seed] for name in per_seed[0]}
    found |= collected_data(cells)
    if importlib.util.find_spec("torch") is not None:
        found |= synchronized_gaps(actors, populations)
    return found


def acting(condition: Condition, actor: Network, key: Array) -> dict[str, Any]:
    """A trained actor as a policy: returns and visited states, by mode and batch."""
    keys_a, keys_b = (jax.random.split(k, EPISODES) for k in jax.random.split(key))

    def acted(mode: Mode, group: int, keys: Array) -> tuple[np.ndarray, float]:
        seen, returns = compiled(act_out, condition, mode, group)(actor, keys)
        return np.asarray(seen).reshape(-1, seen.shape[-1]), float(returns.mean())

    reference, _ = acted(E, 1, keys_a)
    alone, alone_return = acted(E, 1, keys_b)
    found: dict[str, Any] = {"return E": alone_return, "shift E": shift(alone, reference)}
    for group in GROUPS:
        states, mean = acted(Mode("t"), group, keys_b)
        found |= {f"return T{group}": mean, f"shift T{group}": shift(states, reference)}
    states, mean = acted(B, 1, keys_b)
    found |= {"return B": mean, "shift B": shift(states, reference)}
    chosen = np.random.default_rng(0).choice(len(reference), POPULATION, replace=False)
    return found | {"states": jnp.asarray(reference[chosen])}


def collected_data(cells: dict[str, Trained]) -> dict[str, list[float]]:
    """Shift of the replayed states of act-T from act-E's, and of other seeds of act-E.

    Floor and shift compare replays of different seeds, so that both hold what seeds differ by.
    """
    if "act-T" not in cells:
        return {}
    obs = {key: cells[key].rows[:, STARTS:, :3] for key in ("act-E", "act-T")}
    seeds = len(obs["act-E"])
    if seeds < 2:
        return {}
    pairs = [(i, (i + 1) % seeds) for i in range(seeds)]
    return {
        "collected floor": [shift(obs["act-E"][j], obs["act-E"][i]) for i, j in pairs],
        "collected shift": [shift(obs["act-T"][j], obs["act-E"][i]) for i, j in pairs],
    }


def shift(states: np.ndarray, reference: np.ndarray) -> float:
    """Wasserstein-1 distance in each coordinate, in its standard deviations, averaged."""
    scale = reference.std(0)
    return float(
        np.mean(
            [
                wasserstein_distance(states[:, i], reference[:, i]) / scale[i]
                for i in range(reference.shape[1])
            ]
        )
    )


def td_errors(
    condition: Condition, agent: ddpg.State, rows: np.ndarray, key: Array
) -> dict[str, Any]:
    """How wrong the TD error is by normalization, by mode: mean size, and the three mean parts."""
    data = replay.sample(jnp.asarray(rows), key, jnp.asarray(len(rows)), POPULATION, 3)
    true = compiled(with_true_statistics, condition)(agent, data)
    found: dict[str, float] = {}
    for letters in TD_PLANS:
        split = compiled(td_split, condition, letters)
        parts = []
        for start in range(0, POPULATION, BATCH_SIZE):
            batch = jax.tree.map(lambda leaf, s=start: leaf[s : s + BATCH_SIZE], data)
            parts.append(np.stack(split(agent, true, batch)))
        error, true_error, *biases = np.concatenate(parts, axis=1).astype(np.float64)
        found[f"td {letters} wrong"] = float(
            np.abs(error - true_error).mean() / np.abs(true_error).mean()
        )
        found[f"td {letters} bias"] = float((error - true_error).mean())
        for name, bias in zip(("target", "current", "action"), biases, strict=True):
            found[f"td {letters} {name}"] = float(bias.mean())
        found["td size"] = float(np.abs(true_error).mean())
    return found


def with_true_statistics(condition: Condition, agent: ddpg.State, data: Batch) -> ddpg.State:
    """The agent with every running statistic that of ``data``: (s, a) and (s', pi'(s')) pooled."""
    config = config_of(condition)
    obs = jnp.concatenate([data.obs, data.next_obs])
    assert agent.target_actor is not None
    assert agent.target_critic is not None
    target_actor = recalibrate(config.actor, agent.target_actor, obs)
    next_action, _ = ddpg.policy(config, target_actor, data.next_obs, E)
    action = jnp.concatenate([data.action, next_action])
    return agent._replace(
        actor=recalibrate(config.actor, agent.actor, obs),
        target_actor=target_actor,
        critic=recalibrate_critics(config.critic, agent.critic, obs, action),
        target_critic=recalibrate_critics(config.critic, agent.target_critic, obs, action),
    )


def td_split(
    condition: Condition, letters: str, agent: ddpg.State, true: ddpg.State, batch: Batch
) -> tuple[Array, Array, Array, Array, Array]:
    """TD errors (B,) as `letters` (slots 2, 4, 5) have them and true, and the three parts."""
    config = config_of(condition)
    action_mode, replay_mode, target_mode = (Mode(letter) for letter in letters)
    assert agent.target_actor is not None
    assert agent.target_critic is not None
    assert true.target_actor is not None
    assert true.target_critic is not None

    def q(critic: Network, obs: Array, action: Array, mode: Mode) -> Array:
        return nets.q_values(config.critic, critic, obs, action, mode)[0][0]

    next_action, _ = ddpg.policy(config, agent.target_actor, batch.next_obs, action_mode)
    true_action, _ = ddpg.policy(config, true.target_actor, batch.next_obs, E)
    discount = config.gamma * (1 - batch.terminated)
    next_q = q(agent.target_critic, batch.next_obs, next_action, target_mode)
    q_now = q(agent.critic, batch.obs, batch.action, replay_mode)
    true_next_q = q(true.target_critic, batch.next_obs, next_action, E)
    true_q = q(true.critic, batch.obs, batch.action, E)
    best_q = q(true.target_critic, batch.next_obs, true_action, E)
    error = batch.reward + discount * next_q - q_now
    true_error = batch.reward + discount * best_q - true_q
    b_target = discount * (next_q - true_next_q)
    b_current = true_q - q_now
    b_action = discount * (true_next_q - best_q)
    return error, true_error, b_target, b_current, b_action
