"""CrossQ: SAC with batch norm, a joint forward pass and no target network (arXiv 1902.05605).

    act       a ~ pi(.|s); its mean when deterministic                                     slot 0
    update    for each batch (s, a, r, s', terminated) from the replay
      action    a', log pi(a'|s') on s'                                                    slot 2
      forward   Q_c(s, a) and Q_c(s', a') from one pass over both batches            slots 4 and 5
      target    y = r + gamma (1 - terminated) (min_c Q_c(s', a') - alpha log pi(a'|s'))
      critics   minimize 1/2 sum_c mean (Q_c(s, a) - y)^2, no gradient through y
      every policy_delay updates
        actor     minimize mean (alpha log pi(a~|s) - min_c Q_c(s, a~))              slots 1 and 3
        alpha     minimize - log alpha * mean (log pi(a~|s) + target entropy)

CrossQ+WN (arXiv 2502.07523) is a configuration, `PRESETS`: weights projected to unit length after
each step, a target network that runs the same joint forward, and a learning rate that falls.

Written for one seed; a population is `jax.vmap` around it. Running statistics move in the order
of sb3-contrib's passes: slots 2, 4 with 5, then 1 and 3; the temperature in y and in the actor's
loss is the one from before its own step.

Shapes: ``B`` batch, ``O`` obs, ``A`` action, ``C`` critics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from batchproof.errors import BatchproofError
from batchproof.lab import measures, nets, squashed_gaussian
from batchproof.lab.nets import MLP, Network, Tree
from batchproof.lab.norms import Norm
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

STEPPER = "off_policy"  # how its environments are stepped, see `batchproof.lab.loop`
MULTI_AGENT = False

LOG_STD = (-20.0, 2.0)  # bounds

RENORM = Norm(
    "renorm",
    "input+post",
    momentum=0.01,
    eps=1e-3,
    batch_variance="biased",
    running_variance="biased",
    formula="folded",
    warmup_steps=100_000,
)
"""Batch Renorm as in the authors' code: on the input, and after each ReLU."""


@dataclass(frozen=True)
class Config:
    """Hyperparameters; defaults are the paper's, with critics 1024 wide, as the ports have them.

    Attributes:
        actor: the actor's hidden layers and norm.
        critic: each critic's hidden layers and norm.
        plan: which statistics each pass uses.
        critics: number of Q networks.
        learning_rate: Adam's, for actor, critics and temperature.
        learning_rate_end: reached in a straight line after ``schedule_steps``.
        schedule_steps: length of that line in gradient steps; 0 keeps the rate constant.
        adam_b1: decay of Adam's first moment, for actor and critics; the temperature's is 0.9.
        weight_decay: AdamW's, on norms and output layers only; 0 is Adam.
        gamma: discount per environment step.
        tau: step of the target critics, per update, where there are any.
        batch_size: transitions per update.
        policy_delay: critic updates per update of actor and temperature.
        initial_alpha: temperature at the start, in units of reward per nat.
        entropy_per_dimension: target entropy in nats, over the action's size.
        target_network: True keeps target critics, as CrossQ+WN does.
        target_stats: how the targets get running statistics: ``copy``, ``polyak`` or ``stale``.
    """

    actor: MLP = field(default_factory=lambda: MLP((256, 256), RENORM))
    critic: MLP = field(default_factory=lambda: MLP((1024, 1024), RENORM))
    plan: Plan = field(default_factory=lambda: Plan.parse("crossq"))
    critics: int = 2
    learning_rate: float = 1e-3
    learning_rate_end: float | None = None
    schedule_steps: int = 0
    adam_b1: float = 0.5
    weight_decay: float = 0.0
    gamma: float = 0.99
    tau: float = 0.005
    batch_size: int = 256
    policy_delay: int = 3
    initial_alpha: float = 1.0
    entropy_per_dimension: float = -1.0
    target_network: bool = False
    target_stats: str = "copy"

    def __post_init__(self) -> None:
        check_config(self)
        if not 0 < self.initial_alpha < math.inf:
            raise BatchproofError(f"initial_alpha must be positive, got {self.initial_alpha}")
        if (self.learning_rate_end is None) != (self.schedule_steps == 0):
            raise BatchproofError(
                "learning_rate_end and schedule_steps belong together: give both (the rate falls "
                "over schedule_steps gradient steps) or neither (it is constant)"
            )


def _weight_norm() -> Config:
    batch_norm = Norm("batch", "input+post", momentum=0.01, eps=1e-3, running_variance="biased")
    return Config(
        actor=MLP((256, 256), batch_norm, project="hidden"),
        critic=MLP((512, 512), batch_norm, project="hidden"),
        learning_rate=3e-4,
        learning_rate_end=3e-5,
        schedule_steps=2_000_000,
        adam_b1=0.9,
        weight_decay=1e-2,
        initial_alpha=0.01,
        entropy_per_dimension=-0.5,
        target_network=True,
    )


_CONTRIB = replace(
    RENORM, batch_variance="unbiased", running_variance="unbiased", warmup_steps=100_001
)
PRESETS: dict[str, Config] = {
    "crossq": Config(critic=MLP((2048, 2048), RENORM)),
    "sb3-contrib": Config(actor=MLP((256, 256), _CONTRIB), critic=MLP((1024, 1024), _CONTRIB)),
    "wn": _weight_norm(),
}
"""The paper's own size; what sb3-contrib runs; CrossQ+WN (arXiv 2502.07523, table of its appendix).

``wn`` was run with two updates per environment step (``gradient_steps=2`` in
`batchproof.lab.training.Training`) for a million steps: ``schedule_steps`` is their product.
"""

TRAINING: dict[str, Any] = {"learning_starts": 5_000}
"""The paper's, where they differ from `batchproof.lab.training.Training`'s defaults."""


class State(NamedTuple):
    """All that learning changes."""

    actor: Network
    critic: Network  # leaves have a leading axis C
    target_critic: Network | None
    log_alpha: Array  # ()
    actor_optimizer: Any
    critic_optimizer: Any
    alpha_optimizer: Any


class _Delayed(NamedTuple):
    """What an update of actor and temperature changes."""

    actor: Network
    actor_optimizer: Any
    critic_stats: Tree
    log_alpha: Array
    alpha_optimizer: Any


def learning_rate(config: Config, step: Array | int) -> Array | float:
    """The rate of gradient step ``step``, from 1."""
    if config.learning_rate_end is None:
        return config.learning_rate
    share = jnp.minimum((jnp.asarray(step) - 1) / config.schedule_steps, 1.0)
    return config.learning_rate + share * (config.learning_rate_end - config.learning_rate)


def network_optimizer(config: Config, step: Array | int) -> optax.GradientTransformation:
    """Adam of actor and critics for gradient step ``step``, with decay where there is any."""

    def decays(params: Tree) -> Tree:
        return {
            name: dict.fromkeys(layer, name == "linear_out" or name.startswith("norm_"))
            for name, layer in params.items()
        }

    rate = learning_rate(config, step)
    if config.weight_decay == 0:
        return optax.adam(rate, b1=config.adam_b1)
    return optax.adamw(rate, b1=config.adam_b1, weight_decay=config.weight_decay, mask=decays)


def init(config: Config, key: Array, obs_size: int, action_size: int) -> State:
    """Fresh networks, targets equal to them, and Adam's moments at zero."""
    actor_key, critic_key = jax.random.split(key)
    actor = nets.init(actor_key, nets.without_action(config.actor), obs_size, 2 * action_size)
    critic = nets.init_critics(critic_key, config.critic, obs_size, action_size, config.critics)
    optimizer = network_optimizer(config, 1)
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
        alpha_optimizer=optax.adam(config.learning_rate).init(log_alpha),
    )


def policy(
    config: Config, actor: Network, obs: Array, noise: Array | None, mode: Mode
) -> tuple[Array, Array, Tree]:
    """Actions (B, A), log densities (B,) and statistics, see `squashed_gaussian.sample`."""
    return squashed_gaussian.sample(config.actor, actor, obs, noise, mode, LOG_STD)


def td_target(
    config: Config, batch: Batch, next_q: Array, alpha: Array, next_log_prob: Array
) -> Array:
    """y = r + gamma (1 - terminated) (min_c Q_c - alpha log pi): (B,) from ``next_q`` (C, B)."""
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
) -> tuple[Array, tuple[Array, Tree, Tree]]:
    """mean (alpha log pi - min_c Q_c(s, a~)); also log pi (B,), statistics of actor and critics."""
    actor = Network(params, state.actor.stats)
    mode = config.plan[Slot.ACTOR_UPDATE]
    action, log_prob, actor_stats = policy(config, actor, batch.obs, noise, mode)
    q, critic_stats = policy_q(
        config.critic, state.critic, batch, action, config.plan[Slot.POLICY_Q]
    )
    loss = (jnp.exp(state.log_alpha) * log_prob - q.min(0)).mean()
    return loss, (log_prob, actor_stats, critic_stats)


def alpha_loss(log_alpha: Array, log_prob: Array, target_entropy: float) -> Array:
    """- log alpha * mean (log pi + target_entropy): the temperature rises while entropy is low."""
    return -(log_alpha * jax.lax.stop_gradient(log_prob + target_entropy)).mean()


def update(
    config: Config, state: State, batch: Batch, key: Array, step: Array | int
) -> tuple[State, dict[str, Array]]:
    """One gradient step on the critics and, every `policy_delay` steps, on actor and temperature.

    Args:
        config: hyperparameters.
        state: networks and optimizers.
        batch: transitions.
        key: source of the actions' noise.
        step: number of this gradient step, from 1. Shared by all seeds, so that the delayed
            branch stays a branch under `jax.vmap`.

    Returns:
        The new state and scalar metrics; ``actor_loss`` and ``entropy`` are NaN where the actor
        was not updated.
    """
    optimizer = network_optimizer(config, step)
    noise = draw_noise(key, batch.action.shape)
    target_entropy = config.entropy_per_dimension * batch.action.shape[-1]

    next_action, next_log_prob, actor_stats = policy(
        config, state.actor, batch.next_obs, noise.next_action, config.plan[Slot.TARGET_ACTION]
    )
    state = state._replace(actor=Network(state.actor.params, actor_stats))

    (loss, (passes, target)), grads = jax.value_and_grad(critic_loss, has_aux=True)(
        state.critic.params, config, state, batch, next_action, next_log_prob
    )
    deltas, critic_optimizer = optimizer.update(grads, state.critic_optimizer, state.critic.params)
    params = nets.project(config.critic, optax.apply_updates(state.critic.params, deltas))
    state = state._replace(critic=Network(params, passes.stats), critic_optimizer=critic_optimizer)

    # The branch hands back what it changes and nothing else: the rest would be copied.
    def improve(delayed: _Delayed) -> tuple[_Delayed, Array, Array]:
        (loss, (log_prob, actor_stats, critic_stats)), grads = jax.value_and_grad(
            actor_loss, has_aux=True
        )(state.actor.params, config, state, batch, noise.action)
        deltas, actor_optimizer = optimizer.update(
            grads, delayed.actor_optimizer, state.actor.params
        )
        params = nets.project(config.actor, optax.apply_updates(state.actor.params, deltas))
        grad = jax.grad(alpha_loss)(state.log_alpha, log_prob, target_entropy)
        delta, alpha_optimizer = optax.adam(learning_rate(config, step)).update(
            grad, delayed.alpha_optimizer
        )
        delayed = _Delayed(
            actor=Network(params, actor_stats),
            actor_optimizer=actor_optimizer,
            critic_stats=critic_stats,
            log_alpha=state.log_alpha + delta,
            alpha_optimizer=alpha_optimizer,
        )
        return delayed, loss, -log_prob.mean()

    def keep(delayed: _Delayed) -> tuple[_Delayed, Array, Array]:
        unknown = jnp.full_like(loss, jnp.nan)
        return delayed, unknown, unknown

    delayed, policy_loss, entropy = jax.lax.cond(
        step % config.policy_delay == 0,
        improve,
        keep,
        _Delayed(
            state.actor,
            state.actor_optimizer,
            state.critic.stats,
            state.log_alpha,
            state.alpha_optimizer,
        ),
    )
    critic = Network(state.critic.params, delayed.critic_stats)
    target_critic = state.target_critic
    if target_critic is not None:
        target_critic = Network(target_critic.params, passes.target_stats)
        target_critic = follow(target_critic, critic, config.tau, config.target_stats)
    metrics = {
        "critic_loss": loss,
        "actor_loss": policy_loss,
        "alpha": jnp.exp(state.log_alpha),
        "entropy": entropy,
        "q": passes.q.mean(),
        "td_target": target.mean(),
    }
    state = State(
        actor=delayed.actor,
        critic=critic,
        target_critic=target_critic,
        log_alpha=delayed.log_alpha,
        actor_optimizer=delayed.actor_optimizer,
        critic_optimizer=state.critic_optimizer,
        alpha_optimizer=delayed.alpha_optimizer,
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
