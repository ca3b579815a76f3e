"""Gymnasium and PettingZoo environments stepped on the host, one for each seed, in lockstep.

Every episode is started with a seed of its own, drawn from (seed, purpose, episode number). So a
killed run continues an unfinished episode exactly, in any environment that is deterministic
given its seed: reset with the same seed, then replay the actions.

Shapes: ``P`` population, ``O`` obs, ``A`` action, ``n`` agents.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from batchproof import envs
from batchproof.errors import BatchproofError
from batchproof.lab.envs import parallel
from batchproof.lab.envs.layout import Layout
from batchproof.lab.envs.parallel import JointEnv

TRAIN, EVALUATE = 0, 1  # the purpose of an environment, so that their episodes differ


class HostStep(NamedTuple):
    """The result of stepping every environment once."""

    next_obs: np.ndarray  # (P, O), the state reached, also when the episode ended there
    reward: np.ndarray  # (P,), or (P, n) with several agents
    terminated: np.ndarray  # (P,) bool
    ended: np.ndarray  # (P,) bool, terminated or truncated
    obs: np.ndarray  # (P, O), to act on next: after a reset where the episode ended


def make(env_id: str, options: dict[str, Any]) -> gymnasium.Env:
    """Build a Gymnasium environment with Box spaces, or a PettingZoo one with its agents joined.

    Observations that are a Dict of Boxes, as the DeepMind Control Suite gives them
    (``dm_control/DOMAIN-TASK-v0``), come as one flat Box, the keys in alphabetical order.

    Raises:
        BatchproofError: unknown id or option, a missing package, or a space that is not a
            bounded Box of actions and a Box, or Dict of Boxes, of observations.
    """
    if parallel.is_parallel(env_id):
        return parallel.make(env_id, options)
    if env_id.startswith("dm_control/"):
        _register_control_suite(env_id)
    try:
        env = envs.make(env_id, options)
    except gymnasium.error.UnregisteredEnv:
        close = difflib.get_close_matches(env_id, list(gymnasium.registry), n=3)
        hint = f": did you mean {', '.join(close)}?" if close else ""
        raise BatchproofError(f"unknown environment {env_id!r}{hint}") from None
    except (gymnasium.error.Error, ImportError) as error:
        line = " ".join(str(error).split())
        raise BatchproofError(f"cannot make environment {env_id!r}: {line}") from None
    except BatchproofError:
        raise
    except Exception as error:  # environments judge their options in their own ways
        line = " ".join(str(error).split())
        raise BatchproofError(
            f"cannot make environment {env_id!r}: {type(error).__name__}: {line}"
        ) from error
    action_space, obs_space = env.action_space, env.observation_space
    if not isinstance(action_space, gymnasium.spaces.Box):
        raise BatchproofError(
            f"{env_id} has a {type(action_space).__name__} action space, but TD3 and SAC need "
            "continuous actions (Box): choose another environment"
        )
    if _is_dict_of_boxes(obs_space):
        env = gymnasium.wrappers.FlattenObservation(env)
    elif not isinstance(obs_space, gymnasium.spaces.Box):
        raise BatchproofError(
            f"{env_id} has a {type(obs_space).__name__} observation space, but the lab needs a "
            "Box: flatten it with gymnasium.wrappers.FlattenObservation"
        )
    if not action_space.is_bounded():
        raise BatchproofError(
            f"{env_id} has unbounded actions, which cannot be scaled from [-1, 1]: "
            "wrap it with gymnasium.wrappers.RescaleAction"
        )
    return env


def _register_control_suite(env_id: str) -> None:
    """Make the ids of the DeepMind Control Suite known to Gymnasium: importing shimmy does."""
    if importlib.util.find_spec("dm_control") is None or importlib.util.find_spec("shimmy") is None:
        raise BatchproofError(
            f"{env_id} needs dm-control and shimmy: pip install 'batchproof[dmc]'"
        )
    importlib.import_module("shimmy")


def _is_dict_of_boxes(space: gymnasium.Space) -> bool:
    return isinstance(space, gymnasium.spaces.Dict) and all(
        isinstance(part, gymnasium.spaces.Box) or _is_dict_of_boxes(part)
        for part in space.spaces.values()
    )


def layout_of(env: gymnasium.Env) -> Layout | None:
    """The layout of an environment with several agents, None for one agent."""
    return env.layout if isinstance(env, JointEnv) else None


class HostEnvs:
    """One environment a seed, with automatic resets."""

    def __init__(
        self,
        env_id: str,
        options: list[dict[str, Any]],
        seeds: list[int],
        purpose: int,
    ) -> None:
        """Build them.

        Args:
            env_id: a Gymnasium id, or one of `batchproof.lab.envs.parallel`.
            options: keyword arguments of `make`, one dictionary a seed.
            seeds: one a seed of the population.
            purpose: `TRAIN` or `EVALUATE`.
        """
        self._envs = [make(env_id, option) for option in options]
        self.layout = layout_of(self._envs[0])
        self._seeds = seeds
        self._purpose = purpose
        space, obs_space = self._envs[0].action_space, self._envs[0].observation_space
        assert isinstance(space, gymnasium.spaces.Box)
        assert isinstance(obs_space, gymnasium.spaces.Box)
        self._low = space.low.reshape(-1).astype(np.float64)
        self._high = space.high.reshape(-1).astype(np.float64)
        self._action_shape = space.shape
        self._action_dtype = space.dtype
        self.obs_size = int(np.prod(obs_space.shape))
        self.action_size = int(np.prod(space.shape))
        self._episode = [0] * len(seeds)
        # The actions of each unfinished episode, for resuming.
        self._taken: list[list[np.ndarray]] = [[] for _ in seeds]

    def close(self) -> None:
        """Close every environment."""
        for env in self._envs:
            env.close()

    def reset(self, episode: int = 0) -> np.ndarray:
        """Start episode number ``episode`` everywhere: observations (P, O)."""
        self._episode = [episode] * len(self._envs)
        return np.stack([self._reset_one(i) for i in range(len(self._envs))])

    def step(self, actions: np.ndarray) -> HostStep:
        """Step every environment with ``actions`` (P, A) in [-1, 1]; ended ones start anew."""
        count = len(self._envs)
        next_obs = np.empty((count, self.obs_size), np.float32)
        obs = np.empty_like(next_obs)
        agents = (len(self.layout.names),) if self.layout else ()
        reward = np.empty((count, *agents), np.float32)
        terminated = np.empty(count, bool)
        ended = np.empty(count, bool)
        for i, env in enumerate(self._envs):
            self._taken[i].append(actions[i])
            raw, reward[i], terminated[i], truncated, _ = env.step(self._scaled(actions[i]))
            next_obs[i] = np.reshape(raw, -1)
            ended[i] = terminated[i] or truncated
            if ended[i]:
                self._episode[i] += 1
                obs[i] = self._reset_one(i)
            else:
                obs[i] = next_obs[i]
        return HostStep(next_obs, reward, terminated, ended, obs)

    def state(self) -> dict[str, Any]:
        """Everything needed to continue the running episodes, as JSON values."""
        return {
            "episode": list(self._episode),
            # float32 values survive a trip through JSON's decimal notation unchanged.
            "taken": [[action.tolist() for action in taken] for taken in self._taken],
        }

    def restore(self, state: dict[str, Any]) -> np.ndarray:
        """Continue where `state` was taken: observations (P, O) to act on next."""
        obs = np.empty((len(self._envs), self.obs_size), np.float32)
        for i, env in enumerate(self._envs):
            self._episode[i] = state["episode"][i]
            obs[i] = self._reset_one(i)
            for values in state["taken"][i]:
                action = np.asarray(values, np.float32)
                self._taken[i].append(action)
                raw, *_ = env.step(self._scaled(action))
                obs[i] = np.reshape(raw, -1)
        return obs

    def _reset_one(self, i: int) -> np.ndarray:
        sequence = np.random.SeedSequence([self._seeds[i], self._purpose, self._episode[i]])
        self._taken[i] = []
        raw, _ = self._envs[i].reset(seed=int(sequence.generate_state(1)[0]))
        return np.reshape(raw, -1).astype(np.float32)

    def _scaled(self, action: np.ndarray) -> np.ndarray:
        scaled = self._low + 0.5 * (action.astype(np.float64) + 1) * (self._high - self._low)
        scaled = np.clip(scaled, self._low, self._high)
        return scaled.astype(self._action_dtype).reshape(self._action_shape)
