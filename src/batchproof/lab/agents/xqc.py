"""XQC: SAC with batch norm, projected weights and a categorical critic (arXiv 2509.25174).

    act       a ~ pi(.|s); its mean when deterministic                                     slot 0
    update    for each batch (s, a, r, s', terminated) from the replay
      scale     r <- r / std of the discounted returns seen so far
      action    a', log pi(a'|s') on s'                                                    slot 2
      forward   critics and target critics, each on (s, a) and (s', a') in one pass  slots 4 and 5
      target    Z of the target critic with the smaller mean; its atoms z_j move to
                r + gamma (1 - terminated) (z_j - alpha log pi(a'|s')), their mass goes to the
                atoms beside
      critics   minimize sum_c mean cross-entropy(target, Z_c(s, a))
      every policy_delay updates
        actor     minimize mean (alpha log pi(a~|s) - min_c E[Z_c(s, a~)])           slots 1 and 3
        alpha     minimize - log alpha * mean (log pi(a~|s) + target entropy)
      weights   of critics and actor back to unit length after each of their steps
      targets   the target critics move a step tau towards the critics

Written for one seed; a population is `jax.vmap` around it. The statistics of the returns move with
the environment's steps, in `observe`.

Shapes: ``B`` batch, ``O`` obs, ``A`` action, ``C`` critics, ``N`` atoms.
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
from batchproof.lab import measures, nets, obs_norm, squashed_gaussian
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

LOG_STD = (-10.0, 2.0)  # bounds
SCALE_EPS = 1e-8  # in units of reward

BATCH_NORM = Norm("batch", "input+pre", momentum=0.01, eps=1e-3, running_variance="biased")
"""On the input and before each ReLU, in the convention of the authors' library (flax)."""


@dataclass(frozen=True)
class Config:
    """Hyperparameters; defaults are the paper's.

    The paper runs two updates per environment step (`TRAINING`) for a million steps:
    ``schedule_steps`` is their product.

    Attributes:
        actor: the actor's hidden layers and norm.
        critic: each critic's hidden layers and norm.
        plan: which statistics each pass uses.
        critics: number of critics.
        atoms: values that a return can take, N, spread evenly from ``low`` to ``high``.
        low: the smallest, in normalized return.
        high: the largest.
        normalize_rewards: divide rewards by the standard deviation of the discounted returns.
        learning_rate: Adam's, for actor, critics and temperature.
        learning_rate_end: reached in a straight line after ``schedule_steps``.
        schedule_steps: length of that line in gradient steps; 0 keeps the rate constant.
        gamma: discount per environment step.
        tau: step of the target critics, per update.
        batch_size: transitions per update.
        policy_delay: critic updates per update of actor and temperature.
        initial_alpha: temperature at the start, in units of normalized reward per nat.
        entropy_per_dimension: target entropy in nats, over the action's size.
        target_stats: how the targets get running statistics: ``copy``, ``polyak`` or ``stale``.
    """

    actor: MLP = field(
        default_factory=lambda: MLP((256,) * 4, BATCH_NORM, bias=False, project="all")
    )
    critic: MLP = field(
        default_factory=lambda: MLP((512,) * 4, BATCH_NORM, bias=False, project="all")
    )
    plan: Plan = field(default_factory=lambda: Plan.parse("crossq"))
    critics: int = 2
    atoms: int = 101
    low: float = -5.0
    high: float = 5.0
    normalize_rewards: bool = True
    learning_rate: float = 3e-4
    learning_rate_end: float = 3e-5
    schedule_steps: int = 2_000_000
    gamma: float = 0.99
    tau: float = 0.005
    batch_size: int = 256
    policy_delay: int = 3
    initial_alpha: float = 0.01
    entropy_per_dimension: float = -0.5
    target_stats: str = "copy"

    def __post_init__(self) -> None:
        check_config(self)
        if not 0 < self.initial_alpha < math.inf:
            raise BatchproofError(f"initial_alpha must be positive, got {self.initial_alpha}")
        if self.atoms < 2 or not self.low < self.high:
            raise BatchproofError(
                f"a categorical critic needs at least 2 atoms and low < high, got {self.atoms} "
                f"atoms from {self.low} to {self.high}"
            )


PRESETS: dict[str, Config] = {}
"""Named configurations beside the default one."""

TRAINING: dict[str, Any] = {"learning_starts": 5_000, "gradient_steps": 2}
"""The paper's, where they differ from `batchproof.lab.training.Training`'s defaults."""


class Returns(NamedTuple):
    """The discounted return of the running episode, and the moments of all its values so far."""

    value: Array  # ()
    moments: obs_norm.Moments


class State(NamedTuple):
    """All that learning changes."""

    actor: Network
    critic: Network  # leaves have a leading axis C
    target_critic: Network
    log_alpha: Array  # ()
    returns: Returns
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
    if config.schedule_steps == 0:
        return config.learning_rate
    share = jnp.minimum((jnp.asarray(step) - 1) / config.schedule_steps, 1.0)
    return config.learning_rate + share * (config.learning_rate_end - config.learning_rate)


def init(config: Config, key: Array, obs_size: int, action_size: int) -> State:
    """Fresh networks, targets equal to them, and Adam's moments at zero."""
    actor_key, critic_key = jax.random.split(key)
    actor = nets.init(actor_key, nets.without_action(config.actor), obs_size, 2 * action_size)
    critic = nets.init_critics(
        critic_key, config.critic, obs_size, action_size, config.critics, config.atoms
    )
    optimizer = optax.adam(config.learning_rate)
    dtype = actor.params["linear_out"]["bias"].dtype
    log_alpha = jnp.full((), math.log(config.initial_alpha), dtype)
    return State(
        actor=actor,
        critic=critic,
        target_critic=critic,
        log_alpha=log_alpha,
        returns=Returns(jnp.zeros((), dtype), obs_norm.init()),
        actor_optimizer=optimizer.init(actor.params),
        critic_optimizer=optimizer.init(critic.params),
        alpha_optimizer=optimizer.init(log_alpha),
    )


def observe(config: Config, state: State, reward: Array, ended: Array) -> State:
    """Take in one environment step: its reward, and whether it ended the episode in any way.

    G = gamma G + r, from 0 in each episode; the moments cover G after every step.
    """
    value = config.gamma * state.returns.value + reward
    moments = obs_norm.update(state.returns.moments, value[None])
    return state._replace(returns=Returns(jnp.where(ended, 0, value), moments))


def reward_scale(config: Config, state: State) -> Array:
    """What a reward is divided by, (): the standard deviation of the discounted returns so far."""
    if not config.normalize_rewards:
        return jnp.ones_like(state.returns.value)
    return jnp.sqrt(state.returns.moments.var) + SCALE_EPS


def policy(
    config: Config, actor: Network, obs: Array, noise: Array | None, mode: Mode
) -> tuple[Array, Array, Tree]:
    """Actions (B, A), log densities (B,) and statistics, see `squashed_gaussian.sample`."""
    return squashed_gaussian.sample(config.actor, actor, obs, noise, mode, LOG_STD)


def atoms(config: Config) -> Array:
    """The values z_j of the atoms, (N,)."""
    return jnp.linspace(config.low, config.high, config.atoms)


def mean_value(config: Config, logits: Array) -> Array:
    """E[Z] of distributions given by ``logits`` (..., N), (...)."""
    return jax.nn.softmax(logits) @ atoms(config)


def projected(config: Config, probabilities: Array, values: Array) -> Array:
    """Mass ``probabilities`` (B, N) at ``values`` (B, N), put onto the atoms: (B, N).

    Each value is clipped to [low, high] and its mass shared between the two atoms beside it, in
    proportion to how near they are (arXiv 1707.06887, algorithm 1).
    """
    spacing = (config.high - config.low) / (config.atoms - 1)
    place = (jnp.clip(values, config.low, config.high) - config.low) / spacing
    # On a CPU the B N^2 numbers of all values at once were half of an update's time.
    return jax.lax.platform_dependent(probabilities, place, cpu=_shared_in_turn, default=_shared)


def _shared(mass: Array, place: Array) -> Array:
    """Masses (B, N) shared between the atoms beside their places (B, N), in units of spacing."""
    nearness = jnp.maximum(1 - jnp.abs(place[:, :, None] - jnp.arange(place.shape[1])), 0)
    return (mass[:, :, None] * nearness).sum(1)


def _shared_in_turn(mass: Array, place: Array) -> Array:
    """The same, one of the N masses of each row after the other."""
    atoms = jnp.arange(place.shape[1])

    def add(j: Array, total: Array) -> Array:
        return total + mass[:, j, None] * jnp.maximum(1 - jnp.abs(place[:, j, None] - atoms), 0)

    return jax.lax.fori_loop(0, place.shape[1], add, jnp.zeros_like(mass))


def td_target(
    config: Config,
    batch: Batch,
    reward: Array,
    next_logits: Array,
    alpha: Array,
    next_log_prob: Array,
) -> Array:
    """The target distribution (B, N) from ``next_logits`` (C, B, N) and scaled ``reward`` (B,)."""
    lowest = mean_value(config, next_logits).argmin(0)
    logits = jnp.take_along_axis(next_logits, lowest[None, :, None], axis=0)[0]
    soft_atoms = atoms(config) - (alpha * next_log_prob)[:, None]
    discount = config.gamma * (1 - batch.terminated)
    values = reward[:, None] + discount[:, None] * soft_atoms
    return projected(config, jax.nn.softmax(logits), values)


def critic_loss(
    params: Tree,
    config: Config,
    state: State,
    batch: Batch,
    next_action: Array,
    next_log_prob: Array,
) -> tuple[Array, tuple[CriticPasses, Array]]:
    """Sum over critics of the mean cross-entropy; also the passes and the target (B, N)."""
    critic = Network(params, state.critic.stats)
    passes = replay_and_target_q(
        config.critic,
        critic,
        state.target_critic,
        batch,
        next_action,
        config.plan,
        nets.critic_outputs,
    )
    reward = batch.reward / reward_scale(config, state)
    alpha = jnp.exp(state.log_alpha)
    target = td_target(config, batch, reward, passes.next_q, alpha, next_log_prob)
    log_probabilities = jax.nn.log_softmax(passes.q)
    return -(target * log_probabilities).sum(-1).mean(-1).sum(), (passes, target)


def actor_loss(
    params: Tree, config: Config, state: State, batch: Batch, noise: Array
) -> tuple[Array, tuple[Array, Tree, Tree]]:
    """mean (alpha log pi - min_c E[Z_c]); also log pi (B,), statistics of actor and critics."""
    actor = Network(params, state.actor.stats)
    mode = config.plan[Slot.ACTOR_UPDATE]
    action, log_prob, actor_stats = policy(config, actor, batch.obs, noise, mode)
    logits, critic_stats = policy_q(
        config.critic,
        state.critic,
        batch,
        action,
        config.plan[Slot.POLICY_Q],
        nets.critic_outputs,
    )
    q = mean_value(config, logits).min(0)
    loss = (jnp.exp(state.log_alpha) * log_prob - q).mean()
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
        was not updated. ``q`` and ``td_target`` are in normalized return.
    """
    optimizer = optax.adam(learning_rate(config, step))
    noise = draw_noise(key, batch.action.shape)
    target_entropy = config.entropy_per_dimension * batch.action.shape[-1]

    next_action, next_log_prob, actor_stats = policy(
        config, state.actor, batch.next_obs, noise.next_action, config.plan[Slot.TARGET_ACTION]
    )
    state = state._replace(actor=Network(state.actor.params, actor_stats))

    (loss, (passes, target)), grads = jax.value_and_grad(critic_loss, has_aux=True)(
        state.critic.params, config, state, batch, next_action, next_log_prob
    )
    deltas, critic_optimizer = optimizer.update(grads, state.critic_optimizer)
    params = nets.project(config.critic, optax.apply_updates(state.critic.params, deltas))
    state = state._replace(critic=Network(params, passes.stats), critic_optimizer=critic_optimizer)

    # The branch hands back what it changes and nothing else: the rest would be copied.
    def improve(delayed: _Delayed) -> tuple[_Delayed, Array, Array]:
        (loss, (log_prob, actor_stats, critic_stats)), grads = jax.value_and_grad(
            actor_loss, has_aux=True
        )(state.actor.params, config, state, batch, noise.action)
        deltas, actor_optimizer = optimizer.update(grads, delayed.actor_optimizer)
        params = nets.project(config.actor, optax.apply_updates(state.actor.params, deltas))
        grad = jax.grad(alpha_loss)(state.log_alpha, log_prob, target_entropy)
        delta, alpha_optimizer = optimizer.update(grad, delayed.alpha_optimizer)
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
    target_critic = Network(state.target_critic.params, passes.target_stats)
    metrics = {
        "critic_loss": loss,
        "actor_loss": policy_loss,
        "alpha": jnp.exp(state.log_alpha),
        "entropy": entropy,
        "q": mean_value(config, passes.q).mean(),
        "td_target": (target @ atoms(config)).mean(),
        "reward_scale": reward_scale(config, state),
    }
    state = State(
        actor=delayed.actor,
        critic=critic,
        target_critic=follow(target_critic, critic, config.tau, config.target_stats),
        log_alpha=delayed.log_alpha,
        returns=state.returns,
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
        logits, _ = policy_q(config.critic, state.critic, batch, action, mode, nets.critic_outputs)
        return mean_value(config, logits).min(0)

    policy_mode, replay_mode = config.plan[Slot.POLICY_Q], config.plan[Slot.REPLAY_Q]
    shown = measures.report(jitter_key, q_in, action, batch.action, policy_mode, replay_mode)
    return shown | measures.networks(
        config, state.actor, state.critic, batch.obs, batch.obs, batch.action
    )
