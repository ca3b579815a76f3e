"""Watch normalization while Stable-Baselines3 trains: figures into the library's own logger.

The figures come from one batch of the replay buffer (of the rollout, for PPO and A2C); the model
and every random state are as they were afterwards, so training goes on as without the callback.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from batchproof.errors import BatchproofError
from batchproof.layers import mode_layers, use_mode
from batchproof.modes import E, Mode, Plan, Slot
from batchproof.sb3.adapter import buffered, holds_rows
from batchproof.sb3.modes import get_modes, join, remembered_modes

MAD_SIGMAS = 5.0
"""A value further than this many robust standard deviations from the median is an outlier."""

_RUNNING = (("running_mean", "running_var"), ("ra_mean", "ra_var"))
_ALONE = Mode("t")  # the batch's statistics, the running ones left alone


class MonitorCallback(BaseCallback):
    """Log what the normalization layers do, every so many environment steps.

    Keys, all under ``batchproof/``; the worst layer's value, or every layer's with ``per_layer``:

    ``mean_error``
        mean over features of |running mean - batch mean| / sqrt(batch variance + eps).
    ``var_error``
        mean over features of |log((running variance + eps) / (batch variance + eps))|.
    ``outlier_share``
        share of rows with a feature of the layer's input beyond median +- 5 * 1.4826 * MAD.
    ``r_clipped``, ``d_clipped``
        Batch Renorm: share of features whose r or d reaches its bound; while it warms up, would.
    ``action_gap``
        mean over rows of the largest |action in eval - action in train mode|, in action units.
    ``kappa``
        |sum of dQ/da| / sum of |dQ/da| over the batch, of the action dimension where it is
        smallest, the critic in the mode of slot 3. 0 to rounding: the critic cannot show the actor
        a shift that all actions share.

    A figure that does not apply (no such layer, discrete actions, no critic of actions) is left
    out. The statistics of the actor are held against s, those of the critic against the replayed
    (s, a), each layer's input in a pass on the batch's own statistics.
    """

    def __init__(
        self, every: int = 1000, *, batch_size: int = 256, per_layer: bool = False, verbose: int = 0
    ) -> None:
        """Set when to look, and on how much.

        Args:
            every: environment steps between two looks.
            batch_size: rows of each look.
            per_layer: log each layer under ``key/network.path`` too (not printed to the terminal).
            verbose: the library's own.

        Raises:
            BatchproofError: ``every`` below 1 or ``batch_size`` below 2.
        """
        super().__init__(verbose)
        if every < 1:
            raise BatchproofError(f"every must be at least 1 environment step, got {every}")
        if batch_size < 2:
            raise BatchproofError(f"batch_size must be at least 2 rows, got {batch_size}")
        self.every = every
        self.batch_size = batch_size
        self.per_layer = per_layer
        self._next = 0

    def _on_training_start(self) -> None:
        if hasattr(self.model.policy, "lstm_actor"):
            raise BatchproofError(
                f"MonitorCallback cannot watch a {type(self.model).__name__}: a recurrent policy "
                "has no batch of single rows; leave the callback out"
            )
        remembered = remembered_modes(self.model)
        if remembered is not None and get_modes(self.model) is None:
            raise BatchproofError(
                f"this model was saved under the mode plan {remembered}, which loading does not "
                "bring back: call set_modes(model) before learn()"
            )
        self._next = self.model.num_timesteps + self.every

    def _on_step(self) -> bool:
        # Before its first update an off-policy model has no statistics to speak of.
        if isinstance(self.model, OffPolicyAlgorithm) and self._due(self.model.learning_starts):
            self._look()
        return True

    def _on_rollout_end(self) -> None:
        if not isinstance(self.model, OffPolicyAlgorithm) and self._due(0):
            self._look()

    def _due(self, starts: int) -> bool:
        steps = self.model.num_timesteps
        return steps >= self._next and steps > starts

    def _look(self) -> None:
        self._next = self.model.num_timesteps + self.every
        figures, layers = measure(self.model, self.batch_size)
        for key, value in figures.items():
            self.logger.record(f"batchproof/{key}", value)
        if self.per_layer:
            for name, of_layer in layers.items():
                for key, value in of_layer.items():
                    # The terminal's table cuts long keys and fails where two become one.
                    self.logger.record(f"batchproof/{key}/{name}", value, exclude=("stdout", "log"))


def measure(
    model: Any, batch_size: int = 256
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The figures of `MonitorCallback` for a model that holds a replay buffer or a rollout.

    Args:
        model: any Stable-Baselines3 or sb3-contrib model; it is left bit for bit as it was.
        batch_size: rows.

    Returns:
        Figures by key, and by layer's name and key.

    Raises:
        BatchproofError: a model that holds no observations, as one that was just loaded, or that
            keeps a hidden state.
    """
    _check(model)
    with _untouched(model.policy):
        # Statistics are measured on one set of rows, so that figures differ by layer alone.
        obs, actions = _batch(model, batch_size)
        layers: dict[str, dict[str, float]] = {}
        with torch.no_grad():
            for role, network, run in _passes(model, obs, actions):
                layers |= _layer_figures(role, network, run)
            figures = {
                key: max(of[key] for of in layers.values() if key in of)
                for key in ("mean_error", "var_error", "outlier_share", "r_clipped", "d_clipped")
                if any(key in of for of in layers.values())
            }
            figures |= _action_gap(model, obs)
        figures |= _kappa(model, obs, actions)
    return figures, layers


@contextmanager
def _untouched(policy: nn.Module) -> Iterator[None]:
    """Eval mode inside; the modes and the random states of torch and NumPy come back."""
    flags = [(module, module.training) for module in policy.modules()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def _batch(model: Any, batch_size: int) -> tuple[Any, Tensor | None]:
    """Observations and replayed actions, as the networks take them; no actions from a rollout."""
    if isinstance(model, OffPolicyAlgorithm):
        buffer: Any = model.replay_buffer
        # The class's own: a mode plan's `sample` would take this for the batch of an update.
        samples = type(buffer).sample(buffer, batch_size, env=model._vec_normalize_env)
        return samples.observations, samples.actions
    return buffered(model, batch_size, seed=0), None


def _check(model: Any) -> None:
    """Raise a `BatchproofError` for a model that there is nothing to measure on."""
    name = type(model).__name__
    if hasattr(model.policy, "lstm_actor"):
        raise BatchproofError(
            f"a {name} cannot be measured: a recurrent policy has no batch of single rows"
        )
    if not isinstance(model, OffPolicyAlgorithm | OnPolicyAlgorithm):
        raise BatchproofError(f"a {name} cannot be measured: it keeps no observations")
    if not holds_rows(model):
        data = (
            "first, or give it its data with model.load_replay_buffer(FILE)"
            if isinstance(model, OffPolicyAlgorithm)
            else "first: a rollout is not saved with a model"
        )
        raise BatchproofError(
            f"this {name} holds no observations to measure on: call model.learn {data}"
        )


def _passes(
    model: Any, obs: Any, actions: Tensor | None
) -> Iterator[tuple[str, nn.Module, Callable[[], Any]]]:
    """Role, network and a pass on the batch, of each network that trains."""
    policy = model.policy
    if isinstance(policy, ActorCriticPolicy):
        yield "policy", policy, lambda: policy(obs, deterministic=True)
    elif hasattr(policy, "actor"):
        yield "actor", policy.actor, lambda: _act(policy.actor, obs)
        yield "critic", policy.critic, lambda: _own(policy.critic, obs, actions)
    else:
        name = "quantile_net" if hasattr(policy, "quantile_net") else "q_net"
        network = getattr(policy, name)
        yield name, network, lambda: _own(network, obs)


def _own(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The class's own forward: the entry points of a mode plan would choose a slot."""
    return type(network).forward(network, *args, **kwargs)


def _act(actor: nn.Module, obs: Any) -> Tensor:
    """The deterministic action (B, A), scaled as the critic takes it."""
    takes = inspect.signature(type(actor).forward).parameters
    return _own(actor, obs, **({"deterministic": True} if "deterministic" in takes else {}))


def _layer_figures(
    role: str, network: nn.Module, run: Callable[[], Any]
) -> dict[str, dict[str, float]]:
    """Figures of each normalization layer with running statistics."""
    found: dict[str, dict[str, float]] = {}
    chosen = {id(layer) for layer in mode_layers(network)}
    handles = []
    for path, layer in network.named_modules():
        if id(layer) not in chosen:
            continue

        def keep(module: nn.Module, args: Any, name: str = f"{role}.{path}") -> None:
            found[name] = _figures_of(module, args[0])

        handles.append(layer.register_forward_pre_hook(keep))
    try:
        if handles:
            with use_mode(network, _ALONE):
                run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _figures_of(layer: Any, x: Tensor) -> dict[str, float]:
    axes = [axis for axis in range(x.ndim) if axis != 1]
    mean, var = x.mean(axes), x.var(axes, correction=0)
    figures = {"outlier_share": _outlier_share(x)}
    names = next((pair for pair in _RUNNING if getattr(layer, pair[0], None) is not None), None)
    if names is None:
        return figures
    running_mean, running_var = (getattr(layer, name).detach() for name in names)
    sigma, running_sigma = (var + layer.eps).sqrt(), (running_var + layer.eps).sqrt()
    ratio = sigma / running_sigma
    figures["mean_error"] = float(((running_mean - mean).abs() / sigma).mean())
    figures["var_error"] = float(2 * ratio.log().abs().mean())
    bounds = _bounds(layer)
    if bounds is not None:
        r_max, d_max = bounds
        d = (mean - running_mean) / running_sigma
        figures["r_clipped"] = float(((ratio >= r_max) | (ratio <= 1 / r_max)).float().mean())
        figures["d_clipped"] = float((d.abs() >= d_max).float().mean())
    return figures


def _bounds(layer: Any) -> tuple[float, float] | None:
    """Batch Renorm's r_max and d_max, its own or sb3-contrib's; None for other layers."""
    if hasattr(layer, "renorm"):
        return layer.renorm.r_max, layer.renorm.d_max
    return (layer.rmax, layer.dmax) if hasattr(layer, "rmax") else None


def _outlier_share(x: Tensor) -> float:
    if x.ndim > 2:
        x = x.flatten(2).mean(2)  # a channel of an image is one value
    distance = (x - x.median(0).values).abs()
    mad = distance.median(0).values
    # Where more than half of the rows share one value there is no scale to judge by.
    beyond = (distance > MAD_SIGMAS * 1.4826 * mad) & (mad > 0)
    return float(beyond.any(1).float().mean())


def _action_gap(model: Any, obs: Any) -> dict[str, float]:
    """The eval-train gap of the deterministic action, in environment units."""
    policy, space = model.policy, model.action_space
    network = getattr(policy, "actor", policy)
    if not isinstance(space, spaces.Box) or not list(mode_layers(network)):
        return {}

    def act() -> Tensor:
        if isinstance(policy, ActorCriticPolicy):
            return policy(obs, deterministic=True)[0]
        return _act(network, obs)

    with use_mode(network, E):
        evaled = act()
    with use_mode(network, _ALONE):
        trained = act()
    gap = (evaled - trained).abs().flatten(1)
    if policy.squash_output:
        span = torch.as_tensor(space.high - space.low, device=gap.device).flatten()
        gap = gap * span / 2
    return {"action_gap": float(gap.max(1).values.mean())}


def _kappa(model: Any, obs: Any, replayed: Tensor | None) -> dict[str, float]:
    """The common share of the critic's gradient at the actor's own actions, as slot 3 runs it."""
    critic = getattr(model.policy, "critic", None)
    if critic is None or replayed is None:
        return {}
    with torch.no_grad(), use_mode(model.policy.actor, E):
        actions = _act(model.policy.actor, obs)
    actions = actions.detach().requires_grad_(True)
    mode = slot_3_mode(model)
    rows = len(actions)
    asked = (obs, actions)
    if mode.kind == "M":
        asked, mode = (join(obs, obs), torch.cat([actions, replayed])), _ALONE
    with torch.enable_grad(), use_mode(critic, Mode(mode.letter.lower())):
        q = _own(critic, *asked)
        if isinstance(q, tuple):
            q = torch.cat(q, dim=1)
            # TD3 asks its first critic, the others the least one.
            q = q[:, 0] if isinstance(model, TD3) else q.min(1).values
        (gradient,) = torch.autograd.grad(q[:rows].sum(), actions)
    total = gradient.abs().sum(0)
    share = torch.where(total > 0, gradient.sum(0).abs() / total, torch.zeros_like(total))
    return {"kappa": float(share.min())}


def slot_3_mode(model: Any) -> Mode:
    """The mode in which the model runs the critic inside the actor's loss."""
    plan = get_modes(model)
    if plan is not None:
        return Plan.parse(plan)[Slot.POLICY_Q]
    # CrossQ switches its critic to eval there; the others leave it in train mode.
    has_target = getattr(model.policy, "critic_target", None) is not None
    return Mode("T") if has_target else E
