"""DDPG: deep deterministic policy gradient (Lillicrap et al., arXiv 1509.02971).

    act       a = clip(pi(s) + noise), Gaussian or Ornstein-Uhlenbeck                      slot 0
    update    for each batch (s, a, r, s', terminated) from the replay
      target    a' = pi'(s')                                                               slot 2
                y  = r + gamma (1 - terminated) Q'(s', a')                                 slot 5
      critic    minimize mean (Q(s, a) - y)^2, plus weight decay                           slot 4
      actor     maximize mean Q(s, pi(s))                                            slots 1 and 3
      targets   move a step tau towards actor and critic

Written for one seed; a population is `jax.vmap` around it. Running statistics move in the order
of Stable-Baselines3's passes: slots 2, 5, 4, then 1 and 3.

Shapes: ``B`` batch, ``O`` obs, ``A`` action, ``C`` critics, always 1 here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from batchproof.errors import BatchproofError
from batchproof.lab import measures, nets
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
from batchproof.modes import Mode, Plan, Slot

STEPPER = "off_policy"  # how its environments are stepped, see `batchproof.lab.loop`
MULTI_AGENT = False
NOISES = ("gaussian", "ou")


@dataclass(frozen=True)
class Config:
    """Hyperparameters; defaults are those of Stable-Baselines3's DDPG, with noise of 0.1.

    Attributes:
        actor: the actor's hidden layers and norm.
        critic: the critic's hidden layers and norm.
        plan: which statistics each pass uses.
        learning_rate: Adam's, for the actor.
        critic_learning_rate: Adam's, for the critic; None is the actor's.
        critic_weight_decay: L2 penalty on every parameter of the critic: this much of the
            parameter is added to the loss's gradient before Adam sees it, as torch's Adam does
            (a loss term of weight_decay / 2 times the squared norm; not AdamW's decoupled form).
        gamma: discount per environment step.
        tau: step of the target networks, per update.
        batch_size: transitions per update.
        noise: when acting: ``gaussian``, independent from step to step, or ``ou``, an
            Ornstein-Uhlenbeck process. The process runs on across episodes.
        exploration_noise: standard deviation of the Gaussian noise, or sigma of the process;
            actions are in [-1, 1].
        ou_theta: how fast the process returns to 0.
        ou_dt: its time step: x += -theta x dt + sigma sqrt(dt) N(0, 1).
        output_bound: weights and biases of both output layers start uniform in +- this; None
            leaves PyTorch's start.
        target_network: False makes the online networks value (s', a'), as CrossQ does.
        target_stats: how the targets get running statistics: ``copy``, ``polyak`` or ``stale``.
    """

    critics: ClassVar[int] = 1

    actor: MLP = field(default_factory=MLP)
    critic: MLP = field(default_factory=MLP)
    plan: Plan = field(default_factory=lambda: Plan.parse("sb3-td3"))
    learning_rate: float = 1e-3
    critic_learning_rate: float | None = None
    critic_weight_decay: float = 0.0
    gamma: float = 0.99
    tau: float = 0.005
    batch_size: int = 256
    noise: str = "gaussian"
    exploration_noise: float = 0.1
    ou_theta: float = 0.15
    ou_dt: float = 1.0
    output_bound: float | None = None
    target_network: bool = True
    target_stats: str = "copy"

    def __post_init__(self) -> None:
        check_config(self)
        if self.noise not in NOISES:
            raise BatchproofError(f"unknown noise {self.noise!r}: use one of {', '.join(NOISES)}")
        for name in ("critic_learning_rate", "ou_theta", "ou_dt", "output_bound"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BatchproofError(f"{name} must be positive, got {value}")
        if not 0 <= self.critic_weight_decay < math.inf:
            raise BatchproofError(
                f"critic_weight_decay must not be negative, got {self.critic_weight_decay}"
            )


_BEFORE_ACTION = MLP((400, 300), Norm("batch", placement="before-action"))

PRESETS: dict[str, Config] = {
    "paper": Config(
        actor=_BEFORE_ACTION,
        critic=_BEFORE_ACTION,
        plan=Plan.parse("TTTTT"),
        learning_rate=1e-4,
        critic_learning_rate=1e-3,
        critic_weight_decay=1e-2,
        tau=0.001,
        batch_size=64,
        noise="ou",
        exploration_noise=0.2,
        output_bound=3e-3,
    )
}
"""Named configurations beside the default one; ``paper`` is arXiv 1509.02971, section 7."""


TRAINING: dict[str, Any] = {}
"""Fields of `batchproof.lab.training.Training` that differ from its defaults."""


class State(NamedTuple):
    """All that learning and acting change."""

    actor: Network
    critic: Network  # leaves have a leading axis C
    target_actor: Network | None
    target_critic: Network | None
    actor_optimizer: Any
    critic_optimizer: Any
    noise: Array  # (A,), where the Ornstein-Uhlenbeck process is


def init(config: Config, key: Array, obs_size: int, action_size: int) -> State:
    """Fresh networks, targets equal to them, Adam's moments at zero and no noise."""
    actor_key, critic_key = jax.random.split(key)
    actor = nets.init(actor_key, nets.without_action(config.actor), obs_size, action_size)
    critic = nets.init_critics(critic_key, config.critic, obs_size, action_size, config.critics)
    if config.output_bound is not None:
        actor = _bound_output(actor, config.output_bound)
        critic = _bound_output(critic, config.output_bound)
    actor_optimizer, critic_optimizer = optimizers(config)
    return State(
        actor=actor,
        critic=critic,
        target_actor=actor if config.target_network else None,
        target_critic=critic if config.target_network else None,
        actor_optimizer=actor_optimizer.init(actor.params),
        critic_optimizer=critic_optimizer.init(critic.params),
        noise=jnp.zeros(action_size),
    )


def _bound_output(network: Network, bound: float) -> Network:
    """The network with an output layer drawn from +-bound: PyTorch's draw, shrunk."""
    fan_in = network.params["linear_out"]["weight"].shape[-2]
    shrink = bound * fan_in**0.5
    output = jax.tree.map(lambda leaf: shrink * leaf, network.params["linear_out"])
    return network._replace(params=network.params | {"linear_out": output})


def optimizers(
    config: Config,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Adam for the actor, and Adam with an L2 penalty for the critic."""
    critic_learning_rate = config.critic_learning_rate or config.learning_rate
    return optax.adam(config.learning_rate), optax.chain(
        optax.add_decayed_weights(config.critic_weight_decay), optax.adam(critic_learning_rate)
    )


def policy(config: Config, actor: Network, obs: Array, mode: Mode) -> tuple[Array, Tree]:
    """The deterministic action (B, A) in [-1, 1] and the actor's statistics after the pass."""
    mean, stats = nets.apply(nets.without_action(config.actor), actor, obs, mode)
    return jnp.tanh(mean), stats


def next_noise(config: Config, noise: Array, normal: Array) -> Array:
    """The exploration noise (A,) after ``noise``, from a standard normal draw (A,)."""
    if config.noise == "gaussian":
        return config.exploration_noise * normal
    drift = -config.ou_theta * noise * config.ou_dt
    return noise + drift + config.exploration_noise * config.ou_dt**0.5 * normal


def td_target(config: Config, batch: Batch, next_q: Array) -> Array:
    """y = r + gamma (1 - terminated) Q'(s', a'): (B,) from ``next_q`` (C, B)."""
    return batch.reward + config.gamma * (1 - batch.terminated) * next_q[0]


def critic_loss(
    params: Tree, config: Config, state: State, batch: Batch, next_action: Array
) -> tuple[Array, tuple[CriticPasses, Array]]:
    """Mean squared TD error; also the passes and y (B,). The weight decay is the optimizer's."""
    critic = Network(params, state.critic.stats)
    passes = replay_and_target_q(
        config.critic, critic, state.target_critic, batch, next_action, config.plan
    )
    target = td_target(config, batch, passes.next_q)
    return jnp.square(passes.q[0] - target).mean(), (passes, target)


def actor_loss(
    params: Tree, config: Config, state: State, batch: Batch
) -> tuple[Array, tuple[Tree, Tree]]:
    """- mean Q(s, pi(s)); also the statistics of actor (slot 1) and critic (slot 3)."""
    actor = Network(params, state.actor.stats)
    action, actor_stats = policy(config, actor, batch.obs, config.plan[Slot.ACTOR_UPDATE])
    q, critic_stats = policy_q(
        config.critic, state.critic, batch, action, config.plan[Slot.POLICY_Q]
    )
    return -q.mean(), (actor_stats, critic_stats)


def update(
    config: Config, state: State, batch: Batch, key: Array, step: Array | int
) -> tuple[State, dict[str, Array]]:
    """One gradient step on the critic, then on the actor, then a step of the targets.

    Args:
        config: hyperparameters.
        state: networks and optimizers.
        batch: transitions.
        key: unused: nothing is drawn.
        step: unused: every update is the same.

    Returns:
        The new state and scalar metrics.
    """
    actor_optimizer, critic_optimizer = optimizers(config)
    next_actor = state.actor if state.target_actor is None else state.target_actor
    next_action, next_stats = policy(
        config, next_actor, batch.next_obs, config.plan[Slot.TARGET_ACTION]
    )
    if state.target_actor is None:
        state = state._replace(actor=Network(state.actor.params, next_stats))

    (loss, (passes, target)), grads = jax.value_and_grad(critic_loss, has_aux=True)(
        state.critic.params, config, state, batch, next_action
    )
    deltas, critic_moments = critic_optimizer.update(
        grads, state.critic_optimizer, state.critic.params
    )
    params = nets.project(config.critic, optax.apply_updates(state.critic.params, deltas))
    state = state._replace(
        critic=Network(params, passes.stats),
        critic_optimizer=critic_moments,
    )

    (policy_loss, (actor_stats, critic_stats)), grads = jax.value_and_grad(
        actor_loss, has_aux=True
    )(state.actor.params, config, state, batch)
    deltas, actor_moments = actor_optimizer.update(grads, state.actor_optimizer)
    params = nets.project(config.actor, optax.apply_updates(state.actor.params, deltas))
    state = state._replace(
        actor=Network(params, actor_stats),
        actor_optimizer=actor_moments,
        critic=Network(state.critic.params, critic_stats),
    )
    if state.target_actor is not None and state.target_critic is not None:
        # The targets' own passes moved their statistics too: `follow` says what becomes of them.
        target_actor = Network(state.target_actor.params, next_stats)
        target_critic = Network(state.target_critic.params, passes.target_stats)
        state = state._replace(
            target_actor=follow(target_actor, state.actor, config.tau, config.target_stats),
            target_critic=follow(target_critic, state.critic, config.tau, config.target_stats),
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
    """An action (A,) in [-1, 1] for one observation (O,), and the state after slot 0's pass.

    The noise moves with each explored action. It does not learn where an episode ends: an
    Ornstein-Uhlenbeck process runs on into the next one.
    """
    actions, stats = policy(config, state.actor, obs[None], config.plan[Slot.ACT])
    action, noise = actions[0], state.noise
    if explore:
        noise = next_noise(config, noise, jax.random.normal(key, action.shape))
        action = action + noise
    state = state._replace(actor=Network(state.actor.params, stats), noise=noise)
    return jnp.clip(action, -1, 1), state


def measure(config: Config, state: State, batch: Batch, key: Array) -> dict[str, Array]:
    """What `batchproof.lab.measures` says of the networks on this batch."""
    action, _ = policy(config, state.actor, batch.obs, config.plan[Slot.ACTOR_UPDATE])

    def q_in(mode: Mode, action: Array) -> Array:
        return policy_q(config.critic, state.critic, batch, action, mode)[0][0]

    policy_mode, replay_mode = config.plan[Slot.POLICY_Q], config.plan[Slot.REPLAY_Q]
    shown = measures.report(key, q_in, action, batch.action, policy_mode, replay_mode)
    return shown | measures.networks(
        config, state.actor, state.critic, batch.obs, batch.obs, batch.action
    )
