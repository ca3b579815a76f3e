"""SAC: soft actor-critic with a learned temperature (Haarnoja et al., arXiv 1812.05905).

    act       a ~ pi(.|s); its mean when deterministic                                     slot 0
    update    for each batch (s, a, r, s', terminated) from the replay
      actions   a~, log pi(a~|s) on s, then a', log pi(a'|s') on s'                 slots 1 and 2
      target    y = r + gamma (1 - terminated) (min_c Q'_c(s', a') - alpha log pi(a'|s'))  slot 5
      critics   minimize 1/2 sum_c mean (Q_c(s, a) - y)^2                                  slot 4
      actor     minimize mean (alpha log pi(a~|s) - min_c Q_c(s, a~))              slots 1 and 3
      alpha     minimize - log alpha * mean (log pi(a~|s) + target_entropy)
      targets   the target critics move a step tau towards the critics

Written for one seed; a population is `jax.vmap` around it. Running statistics move in the order
of Stable-Baselines3's passes: slots 1, 2, 5, 4, 3; the temperature in y and in the actor's loss is
the one from before its own step.

Shapes: ``B`` batch, ``O`` obs, ``A`` action, ``C`` critics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from batchproof.errors import BatchproofError
from batchproof.lab import measures, nets, squashed_gaussian
from batchproof.lab.nets import MLP, Network, Tree
from batchproof.lab.passes import (
    Batch,
    CriticPasses,
    check_config,
    follow,
    policy_q,
    replay_and_target_q,
)
from batchproof.lab.squashed_gaussian import draw_noise
from batchproof.modes import Mode, Plan, Slot

LOG_STD = (-20.0, 2.0)  # bounds


STEPPER = "off_policy"  # how its environments are stepped, see `batchproof.lab.loop`
MULTI_AGENT = False


@dataclass(frozen=True)
class Config:
    """Hyperparameters; defaults are the paper's.

    Attributes:
        actor: the actor's hidden layers and norm.
        critic: each critic's hidden layers and norm.
        plan: which statistics each pass uses.
        critics: number of Q networks.
        learning_rate: Adam's, for actor, critics and temperature.
        gamma: discount per environment step.
        tau: step of the target critics, per update.
        batch_size: transitions per update.
        initial_alpha: temperature at the start, in units of reward per nat.
        target_entropy: of the policy, in nats per action; None is minus the action's size.
        target_network: False makes the online critics value (s', a'), as CrossQ does.
        target_stats: how the targets get running statistics: ``copy``, ``polyak`` or ``stale``.
    """

    actor: MLP = field(default_factory=MLP)
    critic: MLP = field(default_factory=MLP)
    plan: Plan = field(default_factory=lambda: Plan.parse("sb3-sac"))
    critics: int = 2
    learning_rate: float = 3e-4
    gamma: float = 0.99
    tau: float = 0.005
    batch_size: int = 256
    initial_alpha: float = 1.0
    target_entropy: float | None = None
    target_network: bool = True
    target_stats: str = "copy"

    def __post_init__(self) -> None:
        check_config(self)
        if not 0 < self.initial_alpha < math.inf:
            raise BatchproofError(f"initial_alpha must be positive, got {self.initial_alpha}")


PRESETS: dict[str, Config] = {}
"""Named configurations beside the default one."""

TRAINING: dict[str, Any] = {}
"""Fields of `batchproof.lab.training.Training` that differ from its defaults."""


class State(NamedTuple):
    """All that learning changes."""

    actor: Network
    critic: Network  # leaves have a leading axis C
    target_critic: Network | None
    log_alpha: Array  # ()
    actor_optimizer: Any
    critic_optimizer: Any
    alpha_optimizer: Any


def init(config: Config, key: Array, obs_size: int, action_size: int) -> State:
    """Fresh networks, targets equal to them, and Adam's moments at zero."""
    actor_key, critic_key = jax.random.split(key)
    actor = nets.init(actor_key, nets.without_action(config.actor), obs_size, 2 * action_size)
    critic = nets.init_critics(critic_key, config.critic, obs_size, action_size, config.critics)
    optimizer = optax.adam(config.learning_rate)
    log_alpha = jnp.full(
        (), math.log(config.initial_alpha), actor.params["linear_out"]["bias"].dtype
    )
    return State(
        actor=actor,
        critic=critic,
        target_critic=critic if config.target_network else None,
        log_alpha=log_alpha,
        actor_optimizer=optimizer.init(actor.params),
        critic_optimizer=optimizer.init(critic.params),
        alpha_optimizer=optimizer.init(log_alpha),
    )


def policy(
    config: Config, actor: Network, obs: Array, noise: Array | None, mode: Mode
) -> tuple[Array, Array, Tree]:
    """Actions (B, A), log densities (B,) and statistics, see `squashed_gaussian.sample`."""
    return squashed_gaussian.sample(config.actor, actor, obs, noise, mode, LOG_STD)


def td_target(
    config: Config, batch: Batch, next_q: Array, alpha: Array, next_log_prob: Array
) -> Array:
    """y = r + gamma (1 - terminated) (min_c Q'_c - alpha log pi): (B,) from ``next_q`` (C, B)."""
    soft_value = next_q.min(0) - alpha * next_log_prob
    return batch.reward + config.gamma * (1 - batch.terminated) * soft_value


def critic_loss(
    params: Tree,
    config: Config,
    state: State,
    batch: Batch,
    next_action: Array,
    next_log_prob: Array,
) -> tuple[Array, tuple[CriticPasses, Array]]:
    """Half the sum over critics of the mean squared TD error; also the passes and y (B,)."""
    critic = Network(params, state.critic.stats)
    passes = replay_and_target_q(
        config.critic, critic, state.target_critic, batch, next_action, config.plan
    )
    alpha = jnp.exp(state.log_alpha)
    target = td_target(config, batch, passes.next_q, alpha, next_log_prob)
    return 0.5 * jnp.square(passes.q - target).mean(-1).sum(), (passes, target)


def actor_loss(
    params: Tree, config: Config, state: State, batch: Batch, noise: Array
) -> tuple[Array, tuple[Array, Tree]]:
    """mean (alpha log pi - min_c Q_c(s, a~)); also log pi (B,) and the critics' statistics."""
    actor = Network(params, state.actor.stats)
    mode = config.plan[Slot.ACTOR_UPDATE]
    action, log_prob, _ = policy(config, actor, batch.obs, noise, mode)
    q, critic_stats = policy_q(
        config.critic, state.critic, batch, action, config.plan[Slot.POLICY_Q]
    )
    loss = (jnp.exp(state.log_alpha) * log_prob - q.min(0)).mean()
    return loss, (log_prob, critic_stats)


def alpha_loss(log_alpha: Array, log_prob: Array, target_entropy: float) -> Array:
    """- log alpha * mean (log pi + target_entropy): the temperature rises while entropy is low."""
    return -(log_alpha * jax.lax.stop_gradient(log_prob + target_entropy)).mean()


def update(
    config: Config, state: State, batch: Batch, key: Array, step: Array | int
) -> tuple[State, dict[str, Array]]:
    """One gradient step on critics, actor and temperature, and the targets' step.

    Args:
        config: hyperparameters.
        state: networks and optimizers.
        batch: transitions.
        key: source of the actions' noise.
        step: number of this gradient step; SAC does not use it.

    Returns:
        The new state and scalar metrics.
    """
    del step
    optimizer = optax.adam(config.learning_rate)
    noise = draw_noise(key, batch.action.shape)
    target_entropy = (
        -float(batch.action.shape[-1]) if config.target_entropy is None else config.target_entropy
    )

    # Slot 1's statistics move before slot 2's pass. The pass itself is computed once: the same
    # expression stands in the actor's loss, and the compiler shares it.
    _, _, actor_stats = policy(
        config, state.actor, batch.obs, noise.action, config.plan[Slot.ACTOR_UPDATE]
    )
    next_action, next_log_prob, actor_stats = policy(
        config,
        Network(state.actor.params, actor_stats),
        batch.next_obs,
        noise.next_action,
        config.plan[Slot.TARGET_ACTION],
    )

    (loss, (passes, target)), grads = jax.value_and_grad(critic_loss, has_aux=True)(
        state.critic.params, config, state, batch, next_action, next_log_prob
    )
    deltas, critic_optimizer = optimizer.update(grads, state.critic_optimizer)
    state = state._replace(
        critic=Network(
            nets.project(config.critic, optax.apply_updates(state.critic.params, deltas)),
            passes.stats,
        ),
        critic_optimizer=critic_optimizer,
    )

    (policy_loss, (log_prob, critic_stats)), grads = jax.value_and_grad(actor_loss, has_aux=True)(
        state.actor.params, config, state, batch, noise.action
    )
    deltas, actor_optimizer = optimizer.update(grads, state.actor_optimizer)
    actor_params = nets.project(config.actor, optax.apply_updates(state.actor.params, deltas))
    actor = Network(actor_params, actor_stats)
    critic = Network(state.critic.params, critic_stats)

    grad = jax.grad(alpha_loss)(state.log_alpha, log_prob, target_entropy)
    delta, alpha_optimizer = optimizer.update(grad, state.alpha_optimizer)

    metrics = {
        "critic_loss": loss,
        "actor_loss": policy_loss,
        "alpha": jnp.exp(state.log_alpha),
        "entropy": -log_prob.mean(),
        "q": passes.q.mean(),
        "td_target": target.mean(),
    }
    target_critic = state.target_critic
    if target_critic is not None:
        target_critic = Network(target_critic.params, passes.target_stats)
        target_critic = follow(target_critic, critic, config.tau, config.target_stats)
    state = State(
        actor=actor,
        critic=critic,
        target_critic=target_critic,
        log_alpha=state.log_alpha + delta,
        actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer,
        alpha_optimizer=alpha_optimizer,
    )
    return state, metrics


def act(
    config: Config, state: State, obs: Array, key: Array, *, explore: bool
) -> tuple[Array, State]:
    """An action (A,) in (-1, 1) for one observation (O,), and the state after slot 0's pass."""
    action_size = state.actor.params["linear_out"]["bias"].shape[-1] // 2
    noise = jax.random.normal(key, (1, action_size)) if explore else None
    action, _, stats = policy(config, state.actor, obs[None], noise, config.plan[Slot.ACT])
    return action[0], state._replace(actor=Network(state.actor.params, stats))


def measure(config: Config, state: State, batch: Batch, key: Array) -> dict[str, Array]:
    """What `batchproof.lab.measures` says of the networks on this batch."""
    noise_key, jitter_key = jax.random.split(key)
    noise = draw_noise(noise_key, batch.action.shape).action
    action, _, _ = policy(config, state.actor, batch.obs, noise, config.plan[Slot.ACTOR_UPDATE])

    def q_in(mode: Mode, action: Array) -> Array:
        return policy_q(config.critic, state.critic, batch, action, mode)[0].min(0)

    policy_mode, replay_mode = config.plan[Slot.POLICY_Q], config.plan[Slot.REPLAY_Q]
    shown = measures.report(jitter_key, q_in, action, batch.action, policy_mode, replay_mode)
    return shown | measures.networks(
        config, state.actor, state.critic, batch.obs, batch.obs, batch.action
    )
