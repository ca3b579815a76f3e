"""REINFORCE: Monte-Carlo policy gradient (Williams, doi:10.1007/BF00992696), Gaussian policy.

    act       a ~ N(pi(s), std^2), in a batch with the other running episodes            slot 0
    update    for each batch of whole episodes
      returns     G_t = r_t + gamma G_t+1, up to the episode's end
      advantages  A_t = G_t - baseline
      policy      minimize - mean over episodes of sum_t log N(a_t; pi(s_t), std^2) A_t  slot 1
      baseline    fit its line to (s_t, t) and G_t, for the next batch

Written for one seed; a population is `jax.vmap` around it. Slot 0 sees the episodes' observations
of one step, slot 1 all rows of the batch: in mode ``T`` the two normalize by different rows.

Shapes: ``S`` steps, ``N`` episodes of a batch, ``B`` rows, ``O`` obs, ``A`` action.
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
from batchproof.lab import measures, nets
from batchproof.lab.nets import MLP, Network, Tree
from batchproof.lab.recalibrate import recalibrate
from batchproof.modes import Mode, Plan, Slot

STEPPER = "episodic"  # how its environments are stepped, see `batchproof.lab.loop`
MULTI_AGENT = False
BASELINES = ("none", "mean", "linear")
RIDGE = 1e-3  # of the linear baseline, relative to each feature's mean square
TRAINING: dict[str, Any] = {"learning_starts": 0}  # nothing is replayed


@dataclass(frozen=True)
class Config:
    """Hyperparameters.

    Attributes:
        actor: the policy's hidden layers and norm; ``MLP(())`` is a linear policy.
        plan: which statistics slots 0 and 1 use; the other slots belong to critics and are ``E``.
        learning_rate: Adam's, for the policy and its standard deviation.
        gamma: discount per environment step. As usual the factor gamma^t of the gradient of the
            discounted return is left out.
        episodes_per_update: whole episodes in a batch, N, which also act side by side.
        baseline: ``none``; ``mean``, of the batch's G_t at the same t, which shrinks the expected
            gradient by 1 - 1/N and turns it nowhere; or ``linear``, a ridge regression on
            [s, t, t^2, t^3, 1], fit to the batch before (after arXiv 1604.06778, appendix).
        log_std: the start of the logarithm of the standard deviation, which is learned and does
            not depend on the state; actions are in [-1, 1].
        max_grad_norm: a longer gradient is shortened to this length before Adam sees it: a return
            far off the others would otherwise stay in Adam's second moment for a thousand updates.
            None leaves it as it is.
    """

    actor: MLP = field(default_factory=lambda: MLP((64, 64)))
    plan: Plan = field(default_factory=lambda: Plan.parse("TEEEE"))
    learning_rate: float = 1e-2
    gamma: float = 0.99
    episodes_per_update: int = 16
    baseline: str = "mean"
    log_std: float = -0.5
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.baseline not in BASELINES:
            raise BatchproofError(
                f"unknown baseline {self.baseline!r}: use one of {', '.join(BASELINES)}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise BatchproofError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.gamma <= 1:
            raise BatchproofError(f"gamma must be in [0, 1], got {self.gamma}")
        if not math.isfinite(self.log_std):
            raise BatchproofError(f"log_std must be finite, got {self.log_std}")
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise BatchproofError(f"max_grad_norm must be positive, got {self.max_grad_norm}")
        fewest = 2 if self.baseline == "mean" else 1
        if self.episodes_per_update < fewest:
            raise BatchproofError(
                f"episodes_per_update must be at least {fewest} with baseline {self.baseline}, "
                f"got {self.episodes_per_update}"
            )
        for slot in list(Slot)[2:]:
            if self.plan[slot].kind != "E":
                raise BatchproofError(
                    f"mode plan {self.plan}: REINFORCE has no critic, so slots 2 to 5 must be E "
                    "(for example TEEEE, or tTEEEE to act in the batch too)"
                )


PRESETS: dict[str, Config] = {}
"""Named configurations beside the default one."""


class State(NamedTuple):
    """All that learning and acting change."""

    actor: Network
    log_std: Array  # (A,)
    optimizer: Any
    baseline: Array  # (O + 4,), the linear baseline's weights


class Episodes(NamedTuple):
    """A batch of whole episodes, as rows of equal length.

    What follows an episode's end in its row is the start of another one: it fills the batch whose
    statistics a norm takes, and no loss counts it.
    """

    obs: Array  # (S, N, O)
    action: Array  # (S, N, A), as sampled: the environment's bounds are not applied
    mean: Array  # (S, N, A), of the policy that sampled
    reward: Array  # (S, N)
    alive: Array  # (S, N), 1 up to and with the step that ends the episode, 0 after it


def init(config: Config, key: Array, obs_size: int, action_size: int) -> State:
    """A fresh policy, Adam's moments and the baseline at zero."""
    actor = nets.init(key, nets.without_action(config.actor), obs_size, action_size)
    log_std = jnp.full(action_size, config.log_std, jnp.float32)
    return State(
        actor=actor,
        log_std=log_std,
        optimizer=_optimizer(config).init((actor.params, log_std)),
        baseline=jnp.zeros(obs_size + 4),
    )


def _optimizer(config: Config) -> optax.GradientTransformation:
    adam = optax.adam(config.learning_rate)
    if config.max_grad_norm is None:
        return adam
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam)


def policy(config: Config, actor: Network, obs: Array, mode: Mode) -> tuple[Array, Tree]:
    """The mean action (B, A), without bounds, and the actor's statistics after the pass."""
    return nets.apply(nets.without_action(config.actor), actor, obs, mode)


def log_prob(mean: Array, log_std: Array, action: Array) -> Array:
    """log N(action; mean, exp(log_std)^2), summed over A: (...) from (..., A)."""
    z = (action - mean) * jnp.exp(-log_std)
    return (-0.5 * jnp.square(z) - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def returns_to_go(config: Config, batch: Episodes) -> Array:
    """G_t = r_t + gamma G_t+1 within each episode: (S, N). An end of any kind ends the sum."""

    def earlier(following: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, alive = step
        total = alive * (reward + config.gamma * following)
        return total, total

    start = jnp.zeros(batch.reward.shape[1])
    return jax.lax.scan(earlier, start, (batch.reward, batch.alive), reverse=True)[1]


def advantages(config: Config, weights: Array, batch: Episodes, returns: Array) -> Array:
    """A_t = G_t - baseline: (S, N) from the linear baseline's ``weights`` and G_t (S, N)."""
    if config.baseline == "none":
        return returns
    if config.baseline == "mean":
        running = jnp.maximum(batch.alive.sum(1, keepdims=True), 1)
        return returns - (batch.alive * returns).sum(1, keepdims=True) / running
    return returns - features(batch) @ weights


def features(batch: Episodes) -> Array:
    """[s, t, t^2, t^3, 1] with t from 0 to 1 over the batch's steps: (S, N, O + 4)."""
    steps, episodes = batch.reward.shape
    t = jnp.broadcast_to((jnp.arange(steps) / steps)[:, None], (steps, episodes))
    return jnp.concatenate([batch.obs, jnp.stack([t, t**2, t**3, jnp.ones_like(t)], -1)], -1)


def fit_baseline(batch: Episodes, returns: Array) -> Array:
    """Ridge regression of the batch's G_t (S, N) on its features: weights (O + 4,)."""
    x = features(batch).reshape(returns.size, -1) * batch.alive.reshape(-1, 1)
    rows = jnp.maximum(batch.alive.sum(), 1)
    # In units of each feature's root mean square, or float32 could not hold the normal equations.
    scale = jax.lax.rsqrt(jnp.square(x).sum(0) / rows + jnp.finfo(x.dtype).tiny)
    x = x * scale
    normal = x.T @ x / rows + RIDGE * jnp.eye(x.shape[1])
    return scale * jnp.linalg.solve(normal, x.T @ returns.reshape(-1) / rows)


def actor_loss(
    params: tuple[Tree, Array], config: Config, stats: Tree, batch: Episodes, advantage: Array
) -> tuple[Array, tuple[Array, Tree]]:
    """- mean over episodes of sum_t log pi(a_t | s_t) A_t; also pi(s) (S, N, A), statistics."""
    network, log_std = params
    mean, stats = policy(config, Network(network, stats), _rows(batch), config.plan[Slot(1)])
    mean = mean.reshape(batch.action.shape)
    score = log_prob(mean, log_std, batch.action) * jax.lax.stop_gradient(advantage)
    return -(batch.alive * score).sum() / score.shape[1], (mean, stats)


def update(
    config: Config, state: State, batch: Episodes, key: Array, step: Array | int
) -> tuple[State, dict[str, Array]]:
    """One gradient step on the policy, then the baseline's fit.

    Args:
        config: hyperparameters.
        state: policy, optimizer and baseline.
        batch: whole episodes.
        key: not used: nothing is drawn.
        step: not used: every update is alike.

    Returns:
        The new state and scalar metrics, see `report`.
    """
    returns = returns_to_go(config, batch)
    advantage = advantages(config, state.baseline, batch, returns)
    params = (state.actor.params, state.log_std)
    (loss, (mean, stats)), grads = jax.value_and_grad(actor_loss, has_aux=True)(
        params, config, state.actor.stats, batch, advantage
    )
    metrics = report(config, state, batch, loss, mean)
    deltas, optimizer = _optimizer(config).update(grads, state.optimizer)
    network, log_std = optax.apply_updates(params, deltas)
    state = State(
        actor=Network(nets.project(config.actor, network), stats),
        log_std=log_std,
        optimizer=optimizer,
        baseline=fit_baseline(batch, returns) if config.baseline == "linear" else state.baseline,
    )
    return state, metrics


def refresh(config: Config, state: State, batch: Episodes) -> tuple[State, dict[str, Array]]:
    """Slot 1's pass and nothing else: statistics move as in `update`, weights do not."""
    advantage = advantages(config, state.baseline, batch, returns_to_go(config, batch))
    params = (state.actor.params, state.log_std)
    loss, (mean, stats) = actor_loss(params, config, state.actor.stats, batch, advantage)
    metrics = report(config, state, batch, loss, mean)
    return state._replace(actor=Network(state.actor.params, stats)), metrics


def report(
    config: Config, state: State, batch: Episodes, loss: Array, mean: Array
) -> dict[str, Array]:
    """What an update shows: scalars.

    ``train_return`` and ``episode_steps`` are the batch's means over episodes, ``policy_gap`` is
    the mean of |pi(s) in slot 1 - pi(s) when acting| in standard deviations of the policy: how far
    the policy that is improved is from the one that acted. The rest is `measure`.
    """
    gap = (batch.alive[..., None] * jnp.abs(mean - batch.mean)).sum((0, 1)) / batch.alive.sum()
    return {
        "loss": loss,
        "train_return": (batch.alive * batch.reward).sum(0).mean(),
        "episode_steps": batch.alive.sum(0).mean(),
        "std": jnp.exp(state.log_std).mean(),
        "policy_gap": (gap * jnp.exp(-state.log_std)).mean(),
    } | measure(config, state, batch)


def measure(config: Config, state: State, batch: Episodes) -> dict[str, Array]:
    """How long weights are, and how far the running statistics are from the batch's.

    `measures.weight_lengths`; with a norm that keeps statistics `measures.statistics_gaps` for each
    layer, such as ``mean_gap/actor/norm_input``, and ``mean_gap`` and ``log_var_gap``, their means
    over normalized features.
    """
    lengths = measures.weight_lengths("actor", state.actor)
    mlp = nets.without_action(config.actor)
    seen = recalibrate(mlp, state.actor, _rows(batch))
    gaps = measures.statistics_gaps("actor", mlp, state.actor, seen)
    widths = {layer: held["mean"].size for layer, held in state.actor.stats.items() if held}
    if not widths:
        return lengths
    for name in ("mean_gap", "log_var_gap"):
        whole = sum(width * gaps[f"{name}/actor/{layer}"] for layer, width in widths.items())
        gaps[name] = whole / sum(widths.values())
    return lengths | gaps


def act(
    config: Config, state: State, obs: Array, key: Array, *, explore: bool
) -> tuple[Array, Array, State]:
    """Actions (N, A) for N observations (N, O) that go through slot 0 as one batch.

    Returns:
        The sampled actions (the mean ones without ``explore``), their means (N, A), neither
        bounded, and the state after the pass.
    """
    mean, stats = policy(config, state.actor, obs, config.plan[Slot.ACT])
    action = mean
    if explore:
        action = mean + jnp.exp(state.log_std) * jax.random.normal(key, mean.shape)
    return action, mean, state._replace(actor=Network(state.actor.params, stats))


def _rows(batch: Episodes) -> Array:
    """All observations of a batch, (S N, O)."""
    return batch.obs.reshape(-1, batch.obs.shape[-1])
