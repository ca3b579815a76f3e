"""TD3: twin delayed deep deterministic policy gradient (Fujimoto et al., arXiv 1802.09477).

    act       a = clip(pi(s) + N(0, exploration_noise))                                    slot 0
    update    for each batch (s, a, r, s', terminated) from the replay
      target    a' = clip(pi'(s') + clip(N(0, target_noise), -noise_clip, noise_clip))     slot 2
                y  = r + gamma (1 - terminated) min_c Q'_c(s', a')                         slot 5
      critics   minimize sum_c mean (Q_c(s, a) - y)^2                                      slot 4
      every policy_delay updates
        actor     maximize mean Q_1(s, pi(s))                                      slots 1 and 3
        targets   move a step tau towards actor and critics

Written for one seed; a population is `jax.vmap` around it. Running statistics move in the order
of Stable-Baselines3's passes: slots 2, 5, 4, then 1 and 3.

Shapes: ``B`` batch, ``O`` obs, ``A`` action, ``C`` critics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from batchproof.lab import measures, nets
from batchproof.lab.nets import MLP, Network, Tree
from batchproof.lab.passes import (
    Batch,
    CriticPasses,
    check_config,
    follow,
    policy_q,
    replay_and_target_q,
)
from batchproof.modes import Mode, Plan, Slot

STEPPER = "off_policy"  # how its environments are stepped, see `batchproof.lab.loop`
MULTI_AGENT = False


@dataclass(frozen=True)
class Config:
    """Hyperparameters; defaults are the paper's, as revised in its authors' code.

    Attributes:
        actor: the actor's hidden layers and norm.
        critic: each critic's hidden layers and norm.
        plan: which statistics each pass uses.
        critics: number of Q networks.
        learning_rate: Adam's, for actor and critics.
        gamma: discount per environment step.
        tau: step of the target networks, per delayed update.
        batch_size: transitions per update.
        policy_delay: critic updates per actor update.
        target_noise: standard deviation of the target action's noise; actions are in [-1, 1].
        noise_clip: bound of that noise.
        exploration_noise: standard deviation of the noise when acting.
        target_network: False makes the online networks value (s', a'), as CrossQ does.
        target_stats: how the targets get running statistics: ``copy``, ``polyak`` or ``stale``.
    """

    actor: MLP = field(default_factory=MLP)
    critic: MLP = field(default_factory=MLP)
    plan: Plan = field(default_factory=lambda: Plan.parse("sb3-td3"))
    critics: int = 2
    learning_rate: float = 3e-4
    gamma: float = 0.99
    tau: float = 0.005
    batch_size: int = 256
    policy_delay: int = 2
    target_noise: float = 0.2
    noise_clip: float = 0.5
    exploration_noise: float = 0.1
    target_network: bool = True
    target_stats: str = "copy"

    def __post_init__(self) -> None:
        check_config(self)


PRESETS: dict[str, Config] = {}
"""Named configurations beside the default one."""

TRAINING: dict[str, Any] = {}
"""Fields of `batchproof.lab.training.Training` that differ from its defaults."""


class State(NamedTuple):
    """All that learning changes."""

    actor: Network
    critic: Network  # leaves have a leading axis C
    target_actor: Network | None
    target_critic: Network | None
    actor_optimizer: Any
    critic_optimizer: Any


class _Delayed(NamedTuple):
    """What an actor update changes."""

    actor: Network
    actor_optimizer: Any
    critic_stats: Tree
    target_actor: Network | None
    target_critic: Network | None


def init(config: Config, key: Array, obs_size: int, action_size: int) -> State:
    """Fresh networks, targets equal to them, and Adam's moments at zero."""
    actor_key, critic_key = jax.random.split(key)
    actor = nets.init(actor_key, nets.without_action(config.actor), obs_size, action_size)
    critic = nets.init_critics(critic_key, config.critic, obs_size, action_size, config.critics)
    optimizer = optax.adam(config.learning_rate)
    return State(
        actor=actor,
        critic=critic,
        target_actor=actor if config.target_network else None,
        target_critic=critic if config.target_network else None,
        actor_optimizer=optimizer.init(actor.params),
        critic_optimizer=optimizer.init(critic.params),
    )


def policy(config: Config, actor: Network, obs: Array, mode: Mode) -> tuple[Array, Tree]:
    """The deterministic action (B, A) in [-1, 1] and the actor's statistics after the pass."""
    mean, stats = nets.apply(nets.without_action(config.actor), actor, obs, mode)
    return jnp.tanh(mean), stats


def draw_noise(key: Array, shape: tuple[int, ...]) -> Array:
    """The standard normal noise (B, A) that one update uses."""
    return jax.random.normal(key, shape)


def td_target(config: Config, batch: Batch, next_q: Array) -> Array:
    """y = r + gamma (1 - terminated) min_c Q'_c(s', a'): (B,) from ``next_q`` (C, B)."""
    return batch.reward + config.gamma * (1 - batch.terminated) * next_q.min(0)


def critic_loss(
    params: Tree, config: Config, state: State, batch: Batch, next_action: Array
) -> tuple[Array, tuple[CriticPasses, Array]]:
    """Sum over critics of the mean squared TD error; also the passes and y (B,)."""
    critic = Network(params, state.critic.stats)
    passes = replay_and_target_q(
        config.critic, critic, state.target_critic, batch, next_action, config.plan
    )
    target = td_target(config, batch, passes.next_q)
    return jnp.square(passes.q - target).mean(-1).sum(), (passes, target)


def actor_loss(
    params: Tree, config: Config, state: State, batch: Batch
) -> tuple[Array, tuple[Tree, Tree]]:
    """- mean Q_1(s, pi(s)); also the statistics of actor (slot 1) and critics (slot 3)."""
    actor = Network(params, state.actor.stats)
    action, actor_stats = policy(config, actor, batch.obs, config.plan[Slot.ACTOR_UPDATE])
    # Only the first critic runs, so only its statistics can move.
    first = jax.tree.map(lambda leaf: leaf[:1], state.critic)
    q, first_stats = policy_q(config.critic, first, batch, action, config.plan[Slot.POLICY_Q])
    critic_stats = jax.tree.map(
        lambda all_, one: all_.at[:1].set(one), state.critic.stats, first_stats
    )
    return -q.mean(), (actor_stats, critic_stats)


def update(
    config: Config, state: State, batch: Batch, key: Array, step: Array | int
) -> tuple[State, dict[str, Array]]:
    """One gradient step on the critics and, every `policy_delay` steps, on actor and targets.

    Args:
        config: hyperparameters.
        state: networks and optimizers.
        batch: transitions.
        key: source of the target noise.
        step: number of this gradient step, from 1. Shared by all seeds, so that the delayed
            branch stays a branch under `jax.vmap`.

    Returns:
        The new state and scalar metrics; ``actor_loss`` is NaN where the actor was not updated.
    """
    optimizer = optax.adam(config.learning_rate)
    noise = jnp.clip(
        config.target_noise * draw_noise(key, batch.action.shape),
        -config.noise_clip,
        config.noise_clip,
    )
    next_actor = state.actor if state.target_actor is None else state.target_actor
    next_action, next_stats = policy(
        config, next_actor, batch.next_obs, config.plan[Slot.TARGET_ACTION]
    )
    if state.target_actor is None:
        state = state._replace(actor=Network(state.actor.params, next_stats))
    else:
        state = state._replace(target_actor=Network(state.target_actor.params, next_stats))
    next_action = jnp.clip(next_action + noise, -1, 1)

    (loss, (passes, target)), grads = jax.value_and_grad(critic_loss, has_aux=True)(
        state.critic.params, config, state, batch, next_action
    )
    deltas, critic_optimizer = optimizer.update(grads, state.critic_optimizer)
    state = state._replace(
        critic=Network(
            nets.project(config.critic, optax.apply_updates(state.critic.params, deltas)),
            passes.stats,
        ),
        critic_optimizer=critic_optimizer,
    )
    if state.target_critic is not None:
        state = state._replace(
            target_critic=Network(state.target_critic.params, passes.target_stats)
        )

    # The branch hands back what it changes and nothing else: the rest would be copied.
    def improve(delayed: _Delayed) -> tuple[_Delayed, Array]:
        (loss, (actor_stats, critic_stats)), grads = jax.value_and_grad(actor_loss, has_aux=True)(
            state.actor.params, config, state, batch
        )
        deltas, actor_optimizer = optimizer.update(grads, state.actor_optimizer)
        actor_params = nets.project(config.actor, optax.apply_updates(state.actor.params, deltas))
        actor = Network(actor_params, actor_stats)
        target_actor, target_critic = delayed.target_actor, delayed.target_critic
        if target_actor is not None and target_critic is not None:
            critic = Network(state.critic.params, critic_stats)
            target_actor = follow(target_actor, actor, config.tau, config.target_stats)
            target_critic = follow(target_critic, critic, config.tau, config.target_stats)
        return _Delayed(actor, actor_optimizer, critic_stats, target_actor, target_critic), loss

    def keep(delayed: _Delayed) -> tuple[_Delayed, Array]:
        return delayed, jnp.full_like(loss, jnp.nan)

    delayed = _Delayed(
        state.actor,
        state.actor_optimizer,
        state.critic.stats,
        state.target_actor,
        state.target_critic,
    )
    delayed, policy_loss = jax.lax.cond(step % config.policy_delay == 0, improve, keep, delayed)
    state = state._replace(
        actor=delayed.actor,
        actor_optimizer=delayed.actor_optimizer,
        critic=Network(state.critic.params, delayed.critic_stats),
        target_actor=delayed.target_actor,
        target_critic=delayed.target_critic,
    )
    return state, {
        "critic_loss": loss,
        "actor_loss": policy_loss,
        "q": passes.q.mean(),
        "td_target": target.mean(),
    }


def act(
    config: Config, state: State, obs: Array, key: Array, *, explore: bool
) -> tuple[Array, State]:
    """An action (A,) in [-1, 1] for one observation (O,), and the state after slot 0's pass."""
    action, stats = policy(config, state.actor, obs[None], config.plan[Slot.ACT])
    if explore:
        action = action + config.exploration_noise * jax.random.normal(key, action.shape)
    state = state._replace(actor=Network(state.actor.params, stats))
    return jnp.clip(action[0], -1, 1), state


def measure(config: Config, state: State, batch: Batch, key: Array) -> dict[str, Array]:
    """What `batchproof.lab.measures` says of the networks on this batch."""
    action, _ = policy(config, state.actor, batch.obs, config.plan[Slot.ACTOR_UPDATE])
    first = jax.tree.map(lambda leaf: leaf[:1], state.critic)

    def q_in(mode: Mode, action: Array) -> Array:
        return policy_q(config.critic, first, batch, action, mode)[0][0]

    policy_mode, replay_mode = config.plan[Slot.POLICY_Q], config.plan[Slot.REPLAY_Q]
    shown = measures.report(key, q_in, action, batch.action, policy_mode, replay_mode)
    return shown | measures.networks(
        config, state.actor, state.critic, batch.obs, batch.obs, batch.action
    )
