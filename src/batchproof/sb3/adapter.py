"""From a Stable-Baselines3 or sb3-contrib model to a `Subject`. The model is left as it was.

| algorithm | networks by role | ``policy`` gives |
|---|---|---|
| TD3, DDPG | actor, critic, actor_target, critic_target | actions in environment units |
| SAC, TQC | actor, critic, critic_target | actions in environment units |
| CrossQ | actor, critic | actions in environment units |
| DQN, QRDQN | q_net, q_net_target | Q-values (QRDQN: the mean over quantiles) |
| PPO, A2C, TRPO, MaskablePPO | policy | actions in environment units, or logits |
| ARS | policy | actions in environment units, or scores; it has no gradient update |

Shapes: ``N`` observations, ``B`` rows of one batch, ``A`` action, ``C`` critics.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer, RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import is_image_space, maybe_transpose
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecNormalize,
    unwrap_vec_normalize,
)
from torch import Tensor, nn

from batchproof.clinic.observations import check_against
from batchproof.clinic.subject import (
    Obs,
    Subject,
    Transitions,
    rows,
    sound_weights,
    stacked_q,
    take,
    tensors,
    unchanged,
)
from batchproof.envs import register_envs
from batchproof.errors import BatchproofError
from batchproof.sb3.modes import get_modes

MOST_TRANSITIONS = 256
"""Replayed transitions that a subject takes."""

EXPLORATION = 0.1
"""Standard deviation, in the critic's action scale, of the noise added to the actions of an actor
that has none of its own while transitions are collected (TD3's, arXiv 1802.09477)."""

_WITH_ACTOR = ("actor", "critic", "actor_target", "critic_target")
_SUPPORTED = "PPO, A2C, TRPO, DQN, DDPG, TD3, SAC, TQC, QRDQN, CrossQ, MaskablePPO or ARS"


def subject_from_model(
    model: Any,
    obs: Any = None,
    *,
    env: str | gym.Env | VecEnv | None = None,
    count: int = 512,
    seed: int = 0,
    name: str | None = None,
    obs_name: str = "observations",
) -> Subject:
    """A subject from a Stable-Baselines3 or sb3-contrib model.

    Args:
        model: the library's model; it is not changed.
        obs: observations (N, ...) as the networks take them (after ``VecNormalize`` where there
            is one; images in either channel order): a tensor, an array, or a dict of such. None
            takes them from ``env``, or else from the model's replay or rollout buffer.
        env: an environment, or its id, to collect observations in, with the policy acting. One
            that is handed over is stepped; statistics of a normalizer around it stay as they are.
        count: observations to take, if ``obs`` is None.
        seed: of the choice of rows, of the collection, and of ``update``'s made-up rewards.
        name: what reports call it; None takes the algorithm's name.
        obs_name: what messages call ``obs``, for example the file.

    Raises:
        BatchproofError: an algorithm that is not supported, observations of another shape, an
            environment that does not fit, or no observations at all.
    """
    name = name or type(model).__name__
    networks = _networks(model)
    if count < 2:
        raise BatchproofError(f"an audit compares rows: take at least 2 observations, not {count}")
    bare = Subject(name, networks, torch.zeros(2, 1), act=_nothing, policy=_nothing)
    # The model's own way of acting switches modes and draws random numbers.
    with unchanged(bare), torch.no_grad():
        collected: _Collected | None = None
        if env is not None and (obs is None or isinstance(model, OffPolicyAlgorithm)):
            collected = _collect(model, env, count, seed)
        if obs is not None:
            found = _as_taken(model, obs, obs_name)
        elif collected is not None:
            found = collected.obs
        else:
            found = buffered(model, count, seed)
        replayed = _replayed(model, seed)
        acted = collected is not None and (obs is None or replayed is None)
        if replayed is None and collected is not None:
            replayed = collected.transitions
    action = _Action(model)
    parts = _off_policy_parts(model, action) if isinstance(model, OffPolicyAlgorithm) else {}
    subject = Subject(
        name=name,
        networks=networks,
        obs=found,
        act=_act(model),
        policy=_policy(model, action),
        discrete=not isinstance(model.action_space, spaces.Box),
        targets={role: role.removesuffix("_target") for role in networks if "_target" in role},
        transitions=replayed,
        collected=acted,
        action_low=action.low,
        action_high=action.high,
        gamma=float(getattr(model, "gamma", 0.99)),
        plan=lambda: get_modes(model),
        model=model,
        normalizers=_normalizers(model, env),
        **parts,
    )
    subject.update = _update(model, subject, seed)
    return subject


def _nothing(batch: Obs) -> Tensor:
    raise AssertionError("a bare subject does not act")


def _networks(model: Any) -> dict[str, nn.Module]:
    """The networks by role.

    Raises:
        BatchproofError: an algorithm that is not supported.
    """
    kind, policy = type(model).__name__, getattr(model, "policy", None)
    if not isinstance(policy, nn.Module):
        raise BatchproofError(
            f"a {kind} is no Stable-Baselines3 model: for a plain module write "
            "Subject.from_module(module, obs)"
        )
    if hasattr(policy, "lstm_actor"):
        raise BatchproofError(
            f"{kind} keeps a hidden state between steps, which an audit of single observations "
            f"cannot follow: use {_SUPPORTED}"
        )
    if isinstance(getattr(policy, "actor", None), nn.Module):
        found = {role: getattr(policy, role, None) for role in _WITH_ACTOR}
        return {role: net for role, net in found.items() if isinstance(net, nn.Module)}
    for role in ("q_net", "quantile_net"):
        if hasattr(policy, role):
            target = getattr(policy, f"{role}_target")
            return {"q_net": getattr(policy, role), "q_net_target": target}
    if hasattr(policy, "get_distribution") or hasattr(policy, "action_net"):
        return {"policy": policy}
    raise BatchproofError(f"{kind} is not supported: use {_SUPPORTED}")


class _Action:
    """The action space: its bounds, and from the critics' scale to environment units."""

    def __init__(self, model: Any) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        if isinstance(model.action_space, spaces.Box):
            space = model.action_space
            self.low = torch.as_tensor(space.low, dtype=torch.float32).flatten().to(model.device)
            self.high = torch.as_tensor(space.high, dtype=torch.float32).flatten().to(model.device)

    def unscaled(self, action: Tensor) -> Tensor:
        """From [-1, 1] (B, A) to environment units, as ``BasePolicy.unscale_action``."""
        assert self.low is not None
        assert self.high is not None
        low, high = self.low.to(action), self.high.to(action)
        return low + 0.5 * (action + 1.0) * (high - low)

    def clipped(self, action: Tensor) -> Tensor:
        """Environment units (B, A) within the bounds, as ``predict`` gives them."""
        assert self.low is not None
        assert self.high is not None
        return torch.maximum(torch.minimum(action, self.high.to(action)), self.low.to(action))


def _act(model: Any) -> Callable[[Obs], Tensor]:
    box = isinstance(model.action_space, spaces.Box)

    def act(batch: Obs) -> Tensor:
        arrays = _numpy(batch)
        action, _ = model.predict(arrays, deterministic=True)
        chosen = torch.as_tensor(np.asarray(action)).reshape(rows(batch), -1)
        return chosen if box else chosen.long()

    return act


def _numpy(batch: Obs) -> Any:
    if isinstance(batch, dict):
        return {key: part.detach().cpu().numpy() for key, part in batch.items()}
    return batch.detach().cpu().numpy()


def _policy(model: Any, action: _Action) -> Callable[[Obs], Tensor]:
    policy = model.policy
    box = isinstance(model.action_space, spaces.Box)
    if isinstance(getattr(policy, "actor", None), nn.Module):
        actor = _actor(policy.actor)
        return lambda batch: action.unscaled(actor(batch))
    if hasattr(policy, "quantile_net"):
        return lambda batch: policy.quantile_net(batch).mean(1)
    if hasattr(policy, "q_net"):
        return lambda batch: policy.q_net(batch)
    bounded = action.unscaled if policy.squash_output else action.clipped
    if not hasattr(policy, "get_distribution"):  # ARS

        def scores(batch: Obs) -> Tensor:
            output = policy.action_net(policy.extract_features(batch, policy.features_extractor))
            return bounded(output.flatten(1)) if box else output

        return scores

    def distribution(batch: Obs) -> Tensor:
        found = policy.get_distribution(batch)
        if box:
            return bounded(found.mode().flatten(1))
        inner = getattr(found, "distribution", None)
        parts = inner if isinstance(inner, list) else getattr(found, "distributions", None)
        if not parts:
            parts = [inner]
        return torch.cat([part.logits for part in parts], dim=1)

    return distribution


def _actor(actor: nn.Module) -> Callable[[Obs], Tensor]:
    """The deterministic action (B, A) in [-1, 1]; a stochastic actor's mode."""
    if hasattr(actor, "action_log_prob"):
        return lambda batch: actor(batch, True)
    return lambda batch: actor(batch)


def _off_policy_parts(model: Any, action: _Action) -> dict[str, Any]:
    policy = model.policy
    if not isinstance(getattr(policy, "actor", None), nn.Module):
        online, target = _networks(model).values()
        return {"critic": _chosen(online), "target_critic": _chosen(target)}
    quantiles = hasattr(policy.critic, "quantiles_total") or hasattr(policy.critic, "n_quantiles")

    def q_of(critic: nn.Module | None) -> Callable[[Obs, Tensor], Tensor] | None:
        if critic is None:
            return None
        if quantiles:  # (B, C, quantiles)
            return lambda batch, taken: critic(batch, taken).mean(2).T
        return lambda batch, taken: stacked_q(critic(batch, taken))

    actor_target = getattr(policy, "actor_target", None)
    return {
        "critic": q_of(policy.critic),
        "target_critic": q_of(getattr(policy, "critic_target", None)),
        "critic_actor": _actor(policy.actor),
        "target_actor": None if actor_target is None else _actor(actor_target),
    }


def _chosen(net: nn.Module) -> Callable[[Obs, Tensor], Tensor]:
    """Q (1, B) of the actions (B,) that were taken."""

    def q(batch: Obs, taken: Tensor) -> Tensor:
        values = net(batch)
        values = values.mean(1) if values.ndim == 3 else values  # QRDQN: (B, quantiles, K)
        return values.gather(1, taken.long().reshape(-1, 1)).T

    return q


def _as_taken(model: Any, obs: Any, name: str = "observations") -> Obs:
    """Given observations as the networks take them; ``name`` is what messages call them."""
    space = model.observation_space
    if isinstance(space, spaces.Dict):
        keys: Any = {key: () for key in space.spaces}
        if not isinstance(obs, Mapping):
            check_against(torch.zeros(1), keys, name)
        extra = set(obs) ^ set(space.spaces)
        if extra:
            check_against({key: torch.zeros(1) for key in obs}, keys, name)
        parts = {
            key: _one(obs[key], part, f"{name}: {key}", model.device)
            for key, part in space.spaces.items()
        }
        shapes: Any = {key: tuple(part.shape[1:]) for key, part in parts.items()}
        check_against(parts, shapes, name)
        return parts
    if isinstance(obs, Mapping):
        check_against({key: torch.zeros(1) for key in obs}, tuple(space.shape), name)
    return _one(obs, space, name, model.device)


def _one(value: Any, space: spaces.Space, name: str, device: Any) -> Tensor:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise BatchproofError(f"{name}: they are {array.dtype}, not numbers")
    shape = tuple(space.shape or ())
    if (
        is_image_space(space)
        and array.ndim == 1 + len(shape)
        and array.shape[1:] != shape
        and _channel_first(array.shape[1:]) == shape
    ):
        array = maybe_transpose(array, space)
    check_against(torch.from_numpy(np.array(array)), shape, name)
    kind = np.dtype(space.dtype) if space.dtype is not None else array.dtype
    if kind.kind in "iub" and array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        raise BatchproofError(
            f"{name}: the policy takes {kind} and these are fractions: give them as the "
            "environment does, before any division"
        )
    if kind.kind in "iu":
        bounds = np.iinfo(kind)
        if array.size and (array.min() < bounds.min or array.max() > bounds.max):
            raise BatchproofError(
                f"{name}: the policy takes {kind}, and some entries are out of its range"
            )
    if isinstance(space, spaces.Discrete) and array.size:
        last = int(space.start + space.n - 1)
        if array.min() < space.start or array.max() > last:
            raise BatchproofError(
                f"{name}: the policy takes whole numbers from {int(space.start)} to {last}"
            )
    kind = np.dtype(np.float32) if kind.kind == "f" else kind
    return torch.from_numpy(np.array(array, dtype=kind, order="C", copy=True)).to(device)


def _channel_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], *shape[:-1])


def holds_rows(model: Any) -> bool:
    """Whether the model's replay or rollout buffer holds observations to compare."""
    return _held(model) is not None


def _held(model: Any) -> tuple[Any, int] | None:
    """The buffer that holds observations, and of how many steps; None where none holds two.

    A rollout of a model that was only made or loaded is all zeros, and is no observation.
    """
    replay = getattr(model, "replay_buffer", None)
    if replay is not None and replay.size() * replay.n_envs >= 2:
        return replay, replay.size()
    rollout = getattr(model, "rollout_buffer", None)
    if rollout is not None and (rollout.full or rollout.pos >= 2):
        return rollout, rollout.buffer_size if rollout.full else rollout.pos
    return None


def buffered(model: Any, count: int, seed: int) -> Obs:
    """Up to ``count`` observations, as the networks take them, from the replay or rollout buffer.

    Raises:
        BatchproofError: there are none.
    """
    held = _held(model)
    if held is None:
        raise BatchproofError(
            f"this {type(model).__name__} holds no observations: pass some (obs=..., on the "
            "command line --obs FILE) or an environment id (env=..., --env ID)"
        )
    buffer, size = held
    of_rollout = isinstance(buffer, RolloutBuffer)
    # A rollout's `get` puts all environments into one axis; a replay buffer keeps raw observations.
    in_one_axis = of_rollout and buffer.generator_ready
    normalize = None if of_rollout else model.get_vec_normalize_env()
    total = size * buffer.n_envs
    # In no order of time, for rules look at the first rows: the oldest are random actions'.
    chosen = np.random.default_rng(seed).permutation(total)[:count]

    def picked(stored: np.ndarray) -> np.ndarray:
        if in_one_axis:
            return stored[chosen]
        return stored[chosen // buffer.n_envs, chosen % buffer.n_envs]

    stored = buffer.observations
    found: Any
    if isinstance(stored, dict):
        found = {key: picked(part) for key, part in stored.items()}
    else:
        found = picked(stored)
    if normalize is not None:
        found = normalize.normalize_obs(found)
    return _as_taken(model, _shaped(found, model.observation_space))


def _shaped(obs: Any, space: spaces.Space) -> Any:
    """Buffers keep a Discrete observation as (N, 1); networks take (N,)."""
    if isinstance(obs, dict) and isinstance(space, spaces.Dict):
        return {key: _shaped(part, space[key]) for key, part in obs.items()}
    return np.asarray(obs).reshape(len(obs), *(space.shape or ()))


def _replayed(model: Any, seed: int) -> Transitions | None:
    """A fixed sample of the replay buffer; None where it has too few to speak of."""
    buffer = getattr(model, "replay_buffer", None)
    if buffer is None or buffer.size() * buffer.n_envs < 64:
        return None
    number = min(MOST_TRANSITIONS, buffer.size() * buffer.n_envs)
    np.random.seed(seed)  # the buffer draws from it; the caller puts its state back
    try:
        sample = type(buffer).sample(buffer, number, env=model.get_vec_normalize_env())
    except RuntimeError:  # hindsight replay before the end of the first episode
        return None
    return _transitions(model, sample)


def _transitions(model: Any, sample: Any) -> Transitions:
    discrete = not isinstance(model.action_space, spaces.Box)
    return Transitions(
        obs=_dequeued(sample.observations, model.observation_space),
        action=sample.actions.reshape(-1) if discrete else sample.actions,
        reward=sample.rewards.reshape(-1),
        next_obs=_dequeued(sample.next_observations, model.observation_space),
        terminated=sample.dones.reshape(-1),
    )


def _dequeued(obs: Obs, space: spaces.Space) -> Obs:
    """Sampled observations, float64 in single precision and Discrete ones as (B,)."""
    if isinstance(obs, dict):
        assert isinstance(space, spaces.Dict)
        return {key: _dequeued(part, space[key]) for key, part in obs.items()}  # type: ignore[misc]
    obs = obs.float() if obs.dtype == torch.float64 else obs
    return obs.reshape(len(obs), *(space.shape or ()))


class _Collected:
    """What acting in an environment gave."""

    def __init__(self, obs: Obs, transitions: Transitions | None) -> None:
        self.obs = obs
        self.transitions = transitions


def _collect(model: Any, env: Any, count: int, seed: int) -> _Collected:
    """Act in an environment until there are ``count`` observations, exploring as in training."""
    vec, own = _vectorized(env)
    try:
        for what, ours, theirs in (
            ("observations", model.observation_space, vec.observation_space),
            ("actions", model.action_space, vec.action_space),
        ):
            if not _fits(ours, theirs):
                raise BatchproofError(
                    f"the environment does not fit this {type(model).__name__}: it has {what} "
                    f"{theirs}, the model takes {ours}"
                )
        try:
            with _frozen(vec):
                return _run(model, vec, count, seed)
        except BatchproofError:
            raise
        except Exception as error:  # environments are other people's code
            line = " ".join(str(error).split())[:160]
            raise BatchproofError(
                f"collecting observations in the environment failed: {type(error).__name__}: {line}"
            ) from error
    finally:
        if own:
            vec.close()


def _vectorized(env: Any) -> tuple[VecEnv, bool]:
    """As a vector environment, and whether it was made here."""
    if isinstance(env, VecEnv):
        return env, False
    if isinstance(env, gym.Env):
        return DummyVecEnv([lambda: env]), False
    register_envs()  # so that our own ids can be named without importing anything
    try:
        # The checker's warnings would be about what an audit is there to say.
        made = gym.make(env, disable_env_checker=True)
    except Exception as error:  # registries load other people's modules
        line = " ".join(str(error).split())[:160]
        raise BatchproofError(
            f"cannot make the environment {env!r}: {line or type(error).__name__}: write the id "
            "of one that is installed, for example Pendulum-v1"
        ) from None
    return DummyVecEnv([lambda: made]), True


def _fits(ours: spaces.Space, theirs: spaces.Space) -> bool:
    if isinstance(ours, spaces.Dict):
        return (
            isinstance(theirs, spaces.Dict)
            and set(ours.spaces) == set(theirs.spaces)
            and all(_fits(part, theirs[key]) for key, part in ours.spaces.items())
        )
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return bool(ours == theirs)
    same = ours.shape == theirs.shape
    return same or (is_image_space(ours) and _channel_first(theirs.shape or ()) == ours.shape)


@contextmanager
def _frozen(vec: VecEnv) -> Iterator[None]:
    """Statistics of a ``VecNormalize`` around an environment do not move inside."""
    normalize = unwrap_vec_normalize(vec)
    if normalize is None:
        yield
        return
    training, normalize.training = normalize.training, False
    try:
        yield
    finally:
        normalize.training = training


def _run(model: Any, vec: VecEnv, count: int, seed: int) -> _Collected:
    rng = np.random.default_rng(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # One around the environment that is stepped has done it already.
    normalize = model.get_vec_normalize_env() if unwrap_vec_normalize(vec) is None else None

    def taken(raw: Any) -> Obs:
        return _as_taken(model, normalize.normalize_obs(raw) if normalize is not None else raw)

    vec.seed(seed)
    chosen = _Explorer(model, seed)
    current = taken(vec.reset())
    seen, followers, actions, rewards, terminated = [], [], [], [], []
    for _ in range(-(-count // vec.num_envs)):
        _check_finite(current)
        action = chosen(current)
        scaled = action
        if isinstance(model.action_space, spaces.Box) and isinstance(model, OffPolicyAlgorithm):
            scaled = model.policy.scale_action(action)
            if not hasattr(model.policy.actor, "action_log_prob"):
                scaled = np.clip(scaled + EXPLORATION * rng.normal(size=scaled.shape), -1, 1)
                action = model.policy.unscale_action(scaled).astype(model.action_space.dtype)
        raw, reward, done, infos = vec.step(action)
        following = taken(raw)
        for index, info in enumerate(infos):
            if done[index] and info.get("terminal_observation") is not None:
                last = _rows_of(info["terminal_observation"])
                following = _with_row(following, index, taken(last))
        if normalize is not None:
            reward = normalize.normalize_reward(reward)
        ended = [
            float(d and not info.get("TimeLimit.truncated", False))
            for d, info in zip(done, infos, strict=True)
        ]
        seen.append(current)
        followers.append(following)
        actions.append(np.asarray(scaled, dtype=np.float32).reshape(vec.num_envs, -1))
        rewards.append(np.asarray(reward, dtype=np.float32))
        terminated.append(np.asarray(ended, dtype=np.float32))
        current = taken(raw)
    # In no order of time, for rules look at the first rows: else at the start of an episode.
    order = np.random.default_rng(seed).permutation(count)
    obs = take(_joined(seen), order)
    if not isinstance(model, OffPolicyAlgorithm):
        return _Collected(obs, None)
    device = model.device
    kept = order[:MOST_TRANSITIONS]
    action_of = torch.as_tensor(np.concatenate(actions)[kept], device=device)
    discrete = not isinstance(model.action_space, spaces.Box)
    return _Collected(
        obs,
        Transitions(
            obs=take(obs, slice(0, len(kept))),
            action=action_of.reshape(-1).long() if discrete else action_of,
            reward=torch.as_tensor(np.concatenate(rewards)[kept], device=device),
            next_obs=take(_joined(followers), kept),
            terminated=torch.as_tensor(np.concatenate(terminated)[kept], device=device),
        ),
    )


class _Explorer:
    """The model's stochastic action, or a random one where its own is not finite.

    So a policy with NaN in it is handed to the rules, of which one says so, like any other.
    """

    def __init__(self, model: Any, seed: int) -> None:
        self.model = model
        self.space = copy.deepcopy(model.action_space)  # drawing moves a space's random state
        self.space.seed(seed)

    def __call__(self, obs: Obs) -> np.ndarray:
        try:
            action, _ = self.model.predict(_numpy(obs), deterministic=False)
        except ValueError:  # torch's distributions refuse parameters that are NaN
            if sound_weights(self.model.policy):
                raise
            return np.stack([self.space.sample() for _ in range(rows(obs))])
        lost = ~np.isfinite(action).reshape(len(action), -1).all(1)
        if lost.any():
            action = np.array(action)
            action[lost] = [self.space.sample() for _ in range(int(lost.sum()))]
        return action


def _check_finite(obs: Obs) -> None:
    """Refuse an environment's observations that are not finite.

    Raises:
        BatchproofError: they hold NaN or infinity.
    """
    if not all(bool(torch.isfinite(part.float()).all()) for part in tensors(obs)):
        raise BatchproofError(
            "the environment gave observations that are NaN or infinite: mend it, or give "
            "observations (obs=..., on the command line --obs FILE)"
        )


def _rows_of(one: Any) -> Any:
    """One observation with a batch axis."""
    if isinstance(one, Mapping):
        return {key: np.asarray(part)[None] for key, part in one.items()}
    return np.asarray(one)[None]


def _with_row(batch: Obs, index: int, row: Obs) -> Obs:
    if isinstance(batch, dict):
        assert isinstance(row, dict)
        return {key: _with_row(part, index, row[key]) for key, part in batch.items()}  # type: ignore[misc]
    assert isinstance(row, Tensor)
    changed = batch.clone()
    changed[index] = row[0]
    return changed


def _joined(parts: list[Obs]) -> Obs:
    first = parts[0]
    if isinstance(first, dict):
        return {key: torch.cat([part[key] for part in parts]) for key in first}  # type: ignore[index]
    return torch.cat(parts)  # type: ignore[arg-type]


@contextmanager
def under_vecnormalize(env: str | gym.Env | VecEnv, path: Path) -> Iterator[VecNormalize]:
    """An environment under the normalizer that ``VecNormalize.save`` wrote; it is unpickled.

    Observations and rewards are as training normalized them, and the statistics stay as they are.

    Args:
        env: an environment, or its id.
        path: the normalizer's file.

    Raises:
        BatchproofError: no such file, or one that does not fit the environment.
    """
    if not path.is_file():
        raise BatchproofError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}")
    vec, own = _vectorized(env)
    try:
        if unwrap_vec_normalize(vec) is not None:
            raise BatchproofError(
                f"the environment has a VecNormalize around it already: leave out {path}"
            )
        yield _vecnormalize(path, vec)
    finally:
        if own:
            vec.close()


def _vecnormalize(path: Path, vec: VecEnv) -> VecNormalize:
    try:
        loaded = VecNormalize.load(str(path), vec)
    except Exception as error:  # whatever their pickle raises
        line = " ".join(str(error).split())[:160]
        raise BatchproofError(
            f"{path}: VecNormalize.load: {type(error).__name__}: {line}: give the file that "
            "VecNormalize.save wrote in training"
        ) from error
    if not isinstance(loaded, VecNormalize):
        raise BatchproofError(
            f"{path}: it holds a {type(loaded).__name__}: give the file that VecNormalize.save "
            "wrote in training"
        )
    loaded.training = False
    return loaded


def _normalizers(model: Any, env: Any) -> dict[str, Any]:
    """Environments whose wrappers are known. An id stands for data alone, not for deployment."""
    known: dict[str, Any] = {}
    if getattr(model, "env", None) is not None:
        known["train"] = model.env
    if isinstance(env, gym.Env | VecEnv):
        known["eval"] = env
    return known


def _update(model: Any, subject: Subject, seed: int) -> Callable[[], Any] | None:
    """One real ``train`` of the library, on the model's own data where it has enough."""
    if isinstance(model, OffPolicyAlgorithm):
        return lambda: _off_policy_update(model, subject, seed)
    if isinstance(model, OnPolicyAlgorithm):
        return lambda: _on_policy_update(model, subject, seed)
    return None


@contextmanager
def _attributes(thing: Any, **values: Any) -> Iterator[None]:
    """Other attributes for a block; those that were not there are removed again."""
    before = {name: thing.__dict__[name] for name in values if name in thing.__dict__}
    thing.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                thing.__dict__[name] = before[name]
            else:
                thing.__dict__.pop(name, None)


def _logger(model: Any) -> dict[str, Any]:
    """A logger without outputs for a model that has none."""
    missing = not hasattr(model, "_logger")
    return {"_logger": Logger(folder=None, output_formats=[])} if missing else {}


def _off_policy_update(model: Any, subject: Subject, seed: int) -> None:
    swapped: dict[str, Any] = _logger(model)
    buffer = model.replay_buffer
    if buffer is None or buffer.size() * buffer.n_envs < 64:
        swapped |= {"replay_buffer": _filled(model, subject, seed), "_vec_normalize_env": None}
    with _attributes(model, **swapped):
        # As many gradient steps as the actor waits for.
        steps = int(getattr(model, "policy_delay", 1))
        model.train(gradient_steps=steps, batch_size=model.batch_size)
        if hasattr(model, "exploration_schedule"):
            # DQN's target follows in `_on_step`, at the interval that the next step completes.
            interval = max(model.target_update_interval // model.n_envs, 1)
            counter = "_n_calls"
            with _attributes(model, **{counter: interval - 1}):
                model._on_step()


def _filled(model: Any, subject: Subject, seed: int) -> Any:
    """A small replay buffer of the subject's transitions, or of its observations in a row.

    Without transitions, actions are uniform and rewards standard normal: what an update does to
    statistics and which pass uses which does not depend on them.
    """
    rng = np.random.default_rng(seed)
    data, space = subject.transitions, model.action_space
    size = len(data) if data is not None else min(rows(subject.obs), 1024)
    first = data.obs if data is not None else take(subject.obs, slice(0, size))
    order = torch.arange(1, size + 1) % size
    following = data.next_obs if data is not None else take(first, order)
    kind = DictReplayBuffer if isinstance(first, dict) else ReplayBuffer
    buffer = kind(size, model.observation_space, space, device=model.device, n_envs=1)
    _store(buffer.observations, first)
    _store(buffer.next_observations, following)
    if data is not None:
        actions = data.action.detach().cpu().numpy()
        buffer.rewards[:, 0] = data.reward.detach().cpu().numpy()
        buffer.dones[:, 0] = data.terminated.detach().cpu().numpy()
    else:
        if isinstance(space, spaces.Box):
            actions = rng.uniform(-1, 1, (size, *buffer.actions.shape[2:]))
        else:
            actions = rng.integers(0, int(space.n), size)
        buffer.rewards[:, 0] = rng.normal(size=size)
    buffer.actions[:, 0] = actions.reshape(size, -1)
    buffer.pos, buffer.full = 0, True
    patch = vars(model.replay_buffer).get("sample") if model.replay_buffer is not None else None
    if patch is not None and hasattr(patch, "update"):
        # A mode plan that joins batches looks at what was sampled (`batchproof.sb3.modes`).
        buffer.sample = type(patch)(buffer, patch.update)  # type: ignore[method-assign]
    return buffer


def _store(stored: Any, obs: Obs) -> None:
    if isinstance(obs, dict):
        for key, part in obs.items():
            _store(stored[key], part)
    else:
        stored[:, 0] = obs.detach().cpu().numpy().reshape(len(obs), *stored.shape[2:])


def _on_policy_update(model: Any, subject: Subject, seed: int) -> None:
    """One epoch of at most two minibatches, on a rollout of the present weights.

    The rollout holds the subject's observations with actions, values and log probabilities as
    ``collect_rollouts`` would store them now; a rollout kept from before the last update would
    have other log probabilities than the policy that is examined.
    """
    rng = np.random.default_rng(seed)
    most = int(model.n_steps * model.n_envs)
    size = max(2, min(most, 2 * int(getattr(model, "batch_size", most)), 4096))
    index = torch.arange(size) % rows(subject.obs)
    obs = take(subject.obs, index)
    buffer = type(model.rollout_buffer)(
        size,
        model.observation_space,
        model.action_space,
        device=model.device,
        gamma=model.gamma,
        gae_lambda=model.gae_lambda,
        n_envs=1,
    )
    model.policy.set_training_mode(False)
    with torch.no_grad():
        actions, values, log_probs = model.policy(obs)
    stored = actions.cpu().numpy()
    for row in range(size):
        one = _numpy(take(obs, row))
        buffer.add(
            one,
            stored[row : row + 1],
            rng.normal(size=1),
            np.array([row == 0], dtype=np.float32),
            values[row : row + 1],
            log_probs[row : row + 1],
        )
    buffer.compute_returns_and_advantage(values[-1:], np.array([False]))
    swapped = _logger(model) | {"rollout_buffer": buffer}
    if hasattr(model, "n_epochs"):
        swapped["n_epochs"] = 1
    with _attributes(model, **swapped):
        model.train()
