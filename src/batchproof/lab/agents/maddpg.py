"""MADDPG: multi-agent deep deterministic policy gradient (Lowe et al., arXiv 1706.02275).

    act       each agent i on its own: a_i = clip(pi_i(o_i) + N(0, exploration_noise))     slot 0
    update    for each batch (x, a, r, x', terminated) from the replay, x = (o_1 .. o_n)
      targets   a'_j = pi'_j(o'_j) for every agent j                                       slot 2
      every agent i
        target  y_i = r_i + gamma (1 - terminated) Q'_i(x', a'_1 .. a'_n)                  slot 5
        critic  minimize mean (Q_i(x, a_1 .. a_n) - y_i)^2                                 slot 4
        actor   maximize mean Q_i(x, a_1 .. pi_i(o_i) .. a_n) - penalty      slots 1 and 3
      targets   all move a step tau towards actors and critics

Critics see all agents and exist while training alone; actors see their own observation. With
`Config.centralized` off critic i is Q_i(o_i, a_i): independent DDPG. Each agent has all five slots
to itself, and the norm's place in a critic is the same as anywhere (`batchproof.lab.nets`); with
``before-action`` the actions of all agents enter a centralized critic at its second layer.

With shared parameters one actor and one critic serve every agent. A one-hot that says which
agent is meant stands beside the observation, and the rows of all agents go through a pass together,
so that one batch's statistics cover them all; when acting each agent is a batch of its own.

Written for one seed; a population is `jax.vmap` around it. The agents of an update share its
minibatch, where the paper draws one for each, and no target moves before every agent has learned.

Shapes: ``B`` batch, ``n`` agents, ``O_i`` and ``A_i`` obs and action of agent i, ``O`` and ``A``
their sums: observations and actions of all agents lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from batchproof.errors import BatchproofError
from batchproof.lab import measures, nets
from batchproof.lab.envs.layout import Layout
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
MULTI_AGENT = True  # `init` takes a `Layout`, and rewards are (B, n)


@dataclass(frozen=True)
class Config:
    """Hyperparameters; defaults are those of the authors' code where it has them.

    The authors act with Gumbel-softmax samples; here actions are continuous, in [-1, 1], with
    Gaussian noise.

    Attributes:
        actor: hidden layers and norm of every actor.
        critic: hidden layers and norm of every critic.
        plan: which statistics each pass uses, for every agent.
        centralized: critics see the observations and actions of all agents, not their own alone.
        share_parameters: one actor and one critic for all agents, which must have equal sizes.
        learning_rate: Adam's, for actors and critics.
        gamma: discount per environment step.
        tau: step of the target networks, per update.
        batch_size: transitions per update.
        exploration_noise: standard deviation of the noise when acting.
        max_grad_norm: the gradient of each single weight or bias is scaled down to this norm;
            None leaves it.
        action_penalty: weight of the mean square of the actor's output before tanh in its loss.
        target_network: False makes the online networks value (x', a'), as CrossQ does.
        target_stats: how the targets get running statistics: ``copy``, ``polyak`` or ``stale``.
    """

    critics: ClassVar[int] = 1  # Q networks of each agent

    actor: MLP = field(default_factory=lambda: MLP((64, 64)))
    critic: MLP = field(default_factory=lambda: MLP((64, 64)))
    plan: Plan = field(default_factory=lambda: Plan.parse("sb3-td3"))
    centralized: bool = True
    share_parameters: bool = False
    learning_rate: float = 1e-2
    gamma: float = 0.95
    tau: float = 0.01
    batch_size: int = 1024
    exploration_noise: float = 0.1
    max_grad_norm: float | None = 0.5
    action_penalty: float = 1e-3
    target_network: bool = True
    target_stats: str = "copy"

    def __post_init__(self) -> None:
        check_config(self)
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise BatchproofError(
                f"max_grad_norm must be positive, or None for no clipping, got {self.max_grad_norm}"
            )
        for name in ("exploration_noise", "action_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BatchproofError(f"{name} must not be negative, got {getattr(self, name)}")


PRESETS: dict[str, Config] = {"openai": Config()}
"""Named configurations. ``openai``, the default one, is the authors' code but for the actions."""

TRAINING: dict[str, Any] = {"learning_starts": 25_600, "update_every": 100}
"""Fields of `batchproof.lab.training.Training` that differ from its defaults: the authors'."""


class State(NamedTuple):
    """All that learning changes. Network i belongs to agent i, or the only one to every agent."""

    layout: Layout  # static: no array
    actors: tuple[Network, ...]
    critics: tuple[Network, ...]  # leaves have a leading axis of 1, see `nets.init_critics`
    target_actors: tuple[Network, ...] | None
    target_critics: tuple[Network, ...] | None
    actor_optimizers: tuple[Any, ...]
    critic_optimizers: tuple[Any, ...]


def init(config: Config, key: Array, layout: Layout) -> State:
    """Fresh networks, targets equal to them, and Adam's moments at zero.

    Raises:
        BatchproofError: parameters cannot be shared by agents of unequal sizes.
    """
    count = len(layout.names)
    obs_sizes, action_sizes = layout.obs_sizes, layout.action_sizes
    networks, told = count, 0
    if config.share_parameters and count > 1:
        if len(set(obs_sizes)) > 1 or len(set(action_sizes)) > 1:
            raise BatchproofError(
                "share_parameters needs agents of equal sizes, got observations "
                f"{list(obs_sizes)} and actions {list(action_sizes)}: give each agent its own"
            )
        networks, told = 1, count
    actors, critics = [], []
    for i, network_key in enumerate(jax.random.split(key, networks)):
        actor_key, critic_key = jax.random.split(network_key)
        actor = nets.without_action(config.actor)
        actors.append(nets.init(actor_key, actor, obs_sizes[i] + told, action_sizes[i]))
        obs_size, action_size = obs_sizes[i], action_sizes[i]
        if config.centralized:
            obs_size, action_size = sum(obs_sizes), sum(action_sizes)
        critics.append(
            nets.init_critics(
                critic_key, config.critic, obs_size + told, action_size, config.critics
            )
        )
    optimizer = optax.adam(config.learning_rate)
    return State(
        layout=layout,
        actors=tuple(actors),
        critics=tuple(critics),
        target_actors=tuple(actors) if config.target_network else None,
        target_critics=tuple(critics) if config.target_network else None,
        actor_optimizers=tuple(optimizer.init(network.params) for network in actors),
        critic_optimizers=tuple(optimizer.init(network.params) for network in critics),
    )


def agents_of(state: State, network: int) -> range:
    """The agents that a network serves."""
    served = len(state.layout.names) // len(state.actors)
    return range(network * served, (network + 1) * served)


def _told(state: State, agent: int, obs: Array) -> Array:
    """``obs`` (B, ...) with the agent's one-hot beside it where parameters are shared."""
    count = len(state.layout.names)
    if len(state.actors) == count:
        return obs
    one_hot = jax.nn.one_hot(jnp.full(len(obs), agent), count, dtype=obs.dtype)
    return jnp.concatenate([obs, one_hot], axis=-1)


def actor_rows(state: State, network: int, obs: Array) -> Array:
    """What an actor reads in one pass: the observation of each agent it serves, one under another.

    (B, O_i) from ``obs`` (B, O); (n B, O_i + n) where parameters are shared.
    """
    own = state.layout.split_obs(obs)
    return jnp.concatenate([_told(state, i, own[i]) for i in agents_of(state, network)])


def critic_rows(config: Config, state: State, network: int, batch: Batch) -> Batch:
    """The transitions as a critic sees them, those of each agent it serves one under another."""
    served = agents_of(state, network)

    def stacked_obs(joint: Array) -> Array:
        own = state.layout.split_obs(joint)
        seen = [joint if config.centralized else own[i] for i in served]
        return jnp.concatenate([_told(state, i, o) for i, o in zip(served, seen, strict=True)])

    return Batch(
        obs=stacked_obs(batch.obs),
        action=stacked_actions(config, state, network, state.layout.split_actions(batch.action)),
        reward=jnp.concatenate([batch.reward[:, i] for i in served]),
        next_obs=stacked_obs(batch.next_obs),
        terminated=jnp.tile(batch.terminated, len(served)),
    )


def stacked_actions(config: Config, state: State, network: int, actions: Sequence[Array]) -> Array:
    """Actions (B, A_i) of every agent in the rows of `critic_rows`."""
    joint = jnp.concatenate(actions, axis=-1)
    served = agents_of(state, network)
    return jnp.concatenate([joint if config.centralized else actions[i] for i in served])


def own_actions(
    config: Config, state: State, network: int, replayed: Array, action: Array
) -> Array:
    """A critic's actions with each agent's own replaced: a_1 .. pi_i(o_i) .. a_n.

    Args:
        config: hyperparameters.
        state: networks.
        network: whose agents.
        replayed: actions of all agents (B, A), from the replay.
        action: of the agents served, in the rows of `actor_rows`.

    Returns:
        Actions in the rows of `critic_rows`.
    """
    if not config.centralized:
        return action
    served = agents_of(state, network)
    rows = []
    for i, own in zip(served, jnp.split(action, len(served)), strict=True):
        parts = state.layout.split_actions(replayed)
        parts[i] = own
        rows.append(jnp.concatenate(parts, axis=-1))
    return jnp.concatenate(rows)


def policy(config: Config, actor: Network, obs: Array, mode: Mode) -> tuple[Array, Array, Tree]:
    """An actor's deterministic actions in [-1, 1], its output before tanh, its new statistics."""
    mean, stats = nets.apply(nets.without_action(config.actor), actor, obs, mode)
    return jnp.tanh(mean), mean, stats


def td_target(config: Config, rows: Batch, next_q: Array) -> Array:
    """y_i = r_i + gamma (1 - terminated) Q'_i(x', a'), a row each, from ``next_q`` (1, rows)."""
    return rows.reward + config.gamma * (1 - rows.terminated) * next_q[0]


def critic_loss(
    params: Tree, config: Config, state: State, network: int, rows: Batch, next_action: Array
) -> tuple[Array, tuple[CriticPasses, Array]]:
    """Mean squared TD error of one critic; also its passes and y."""
    critic = Network(params, state.critics[network].stats)
    target = None if state.target_critics is None else state.target_critics[network]
    passes = replay_and_target_q(config.critic, critic, target, rows, next_action, config.plan)
    y = td_target(config, rows, passes.next_q)
    return jnp.square(passes.q[0] - y).mean(), (passes, y)


def actor_loss(
    params: Tree, config: Config, state: State, network: int, batch: Batch, rows: Batch
) -> tuple[Array, tuple[Tree, Tree]]:
    """- mean Q_i(x, a_1 .. pi_i(o_i) .. a_n) + action_penalty * mean(output^2) of one actor.

    Also the statistics of actor (slot 1) and critic (slot 3).
    """
    actor = Network(params, state.actors[network].stats)
    obs = actor_rows(state, network, batch.obs)
    action, mean, actor_stats = policy(config, actor, obs, config.plan[Slot.ACTOR_UPDATE])
    action = own_actions(config, state, network, batch.action, action)
    q, critic_stats = policy_q(
        config.critic, state.critics[network], rows, action, config.plan[Slot.POLICY_Q]
    )
    penalty = config.action_penalty * jnp.square(mean).mean()
    return penalty - q.mean(), (actor_stats, critic_stats)


def update(
    config: Config, state: State, batch: Batch, key: Array, step: Array | int
) -> tuple[State, dict[str, Array]]:
    """One gradient step on every critic and every actor, then on the targets.

    Args:
        config: hyperparameters.
        state: networks and optimizers.
        batch: transitions of all agents, ``reward`` (B, n).
        key: not used: there is no noise in an update.
        step: number of this gradient step, from 1; not used.

    Returns:
        The new state and scalar metrics, each a mean over the networks.
    """
    next_actions, state = _target_actions(config, state, batch)
    found = []
    for k in range(len(state.actors)):
        rows = critic_rows(config, state, k, batch)
        next_rows = stacked_actions(config, state, k, next_actions)
        (critic_loss_, (passes, y)), grads = jax.value_and_grad(critic_loss, has_aux=True)(
            state.critics[k].params, config, state, k, rows, next_rows
        )
        params, optimizer = _descend(
            config, config.critic, state.critics[k].params, grads, state.critic_optimizers[k]
        )
        state = state._replace(
            critics=_put(state.critics, k, Network(params, passes.stats)),
            critic_optimizers=_put(state.critic_optimizers, k, optimizer),
        )
        if state.target_critics is not None:
            target = Network(state.target_critics[k].params, passes.target_stats)
            state = state._replace(target_critics=_put(state.target_critics, k, target))

        (actor_loss_, (actor_stats, critic_stats)), grads = jax.value_and_grad(
            actor_loss, has_aux=True
        )(state.actors[k].params, config, state, k, batch, rows)
        params, optimizer = _descend(
            config, config.actor, state.actors[k].params, grads, state.actor_optimizers[k]
        )
        state = state._replace(
            actors=_put(state.actors, k, Network(params, actor_stats)),
            actor_optimizers=_put(state.actor_optimizers, k, optimizer),
            critics=_put(state.critics, k, Network(state.critics[k].params, critic_stats)),
        )
        found.append(
            {
                "critic_loss": critic_loss_,
                "actor_loss": actor_loss_,
                "q": passes.q.mean(),
                "td_target": y.mean(),
            }
        )
    if state.target_actors is not None and state.target_critics is not None:
        state = state._replace(
            target_actors=_follow_all(config, state.target_actors, state.actors),
            target_critics=_follow_all(config, state.target_critics, state.critics),
        )
    return state, _mean_of(found)


def _target_actions(config: Config, state: State, batch: Batch) -> tuple[list[Array], State]:
    """a'_j of every agent, each (B, A_j), and the state after slot 2's passes."""
    mode = config.plan[Slot.TARGET_ACTION]
    owners = list(state.actors if state.target_actors is None else state.target_actors)
    actions = []
    for k, owner in enumerate(owners):
        action, _, stats = policy(config, owner, actor_rows(state, k, batch.next_obs), mode)
        actions += jnp.split(action, len(agents_of(state, k)))
        owners[k] = Network(owner.params, stats)
    if state.target_actors is None:
        return actions, state._replace(actors=tuple(owners))
    return actions, state._replace(target_actors=tuple(owners))


def _descend(
    config: Config, mlp: MLP, params: Tree, grads: Tree, optimizer_state: Any
) -> tuple[Tree, Any]:
    """Adam's step, with the gradient of each leaf scaled down to norm `max_grad_norm`."""
    bound = config.max_grad_norm
    if bound is not None:
        grads = jax.tree.map(
            lambda g: g * (bound / jnp.maximum(jnp.sqrt(jnp.square(g).sum()), bound)), grads
        )
    deltas, optimizer_state = optax.adam(config.learning_rate).update(grads, optimizer_state)
    return nets.project(mlp, optax.apply_updates(params, deltas)), optimizer_state


def _follow_all(
    config: Config, targets: tuple[Network, ...], networks: tuple[Network, ...]
) -> tuple[Network, ...]:
    return tuple(
        follow(target, network, config.tau, config.target_stats)
        for target, network in zip(targets, networks, strict=True)
    )


def _put(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _mean_of(found: Sequence[dict[str, Array]]) -> dict[str, Array]:
    return {name: jnp.stack([each[name] for each in found]).mean(0) for name in found[0]}


def act(
    config: Config, state: State, obs: Array, key: Array, *, explore: bool
) -> tuple[Array, State]:
    """Actions of all agents (A,) in [-1, 1] for (O,), and the state after slot 0's passes.

    Each agent acts alone: a pass has one row, also where parameters are shared.
    """
    own = state.layout.split_obs(obs[None])
    actions = []
    for k in range(len(state.actors)):
        for i in agents_of(state, k):
            actor = state.actors[k]
            action, _, stats = policy(config, actor, _told(state, i, own[i]), config.plan[Slot.ACT])
            actions.append(action[0])
            state = state._replace(actors=_put(state.actors, k, Network(actor.params, stats)))
    action = jnp.concatenate(actions)
    if explore:
        action = action + config.exploration_noise * jax.random.normal(key, action.shape)
    return jnp.clip(action, -1, 1), state


def measure(config: Config, state: State, batch: Batch, key: Array) -> dict[str, Array]:
    """What `batchproof.lab.measures` says on this batch, averaged over the agents' networks.

    The actions of the other agents are the replayed ones.
    """
    policy_mode, replay_mode = config.plan[Slot.POLICY_Q], config.plan[Slot.REPLAY_Q]

    def of_network(k: int, key: Array) -> dict[str, Array]:
        rows = critic_rows(config, state, k, batch)
        obs = actor_rows(state, k, batch.obs)
        action, _, _ = policy(config, state.actors[k], obs, config.plan[Slot.ACTOR_UPDATE])
        replayed = jnp.concatenate(
            [state.layout.split_actions(batch.action)[i] for i in agents_of(state, k)]
        )

        def q_in(mode: Mode, action: Array) -> Array:
            joint = own_actions(config, state, k, batch.action, action)
            return policy_q(config.critic, state.critics[k], rows, joint, mode)[0][0]

        shown = measures.report(key, q_in, action, replayed, policy_mode, replay_mode)
        actor, critic = state.actors[k], state.critics[k]
        return shown | measures.networks(config, actor, critic, obs, rows.obs, rows.action)

    keys = jax.random.split(key, len(state.actors))
    return _mean_of([of_network(k, keys[k]) for k in range(len(state.actors))])
