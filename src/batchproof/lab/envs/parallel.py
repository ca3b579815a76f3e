"""PettingZoo's parallel environments, to the host path one agent with the values of all.

Named ``mpe2/simple_spread`` (the installed version, continuous actions), or
``module:parallel_env`` for the environment that a module makes so, as PettingZoo's modules do.

Shapes: ``n`` agents, ``O`` and ``A`` the sums of their observation and action sizes.
"""

from __future__ import annotations

import difflib
import os
import pkgutil
import re
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np

from batchproof.errors import BatchproofError
from batchproof.lab.envs.layout import Layout

MPE2, FACTORY = "mpe2/", ":parallel_env"
OWN = {"batchproof/Rally-v0": "batchproof.envs.rally"}
SCORES = {"batchproof.envs.rally": "max"}
"""`Layout.score` by module. Of others it is the sum, as the authors of MADDPG printed it."""


def is_parallel(env_id: str) -> bool:
    """Whether the id is one of this file's, not Gymnasium's."""
    return env_id in OWN or env_id.startswith(MPE2) or env_id.endswith(FACTORY)


def make(env_id: str, options: dict[str, Any]) -> JointEnv:
    """Build a PettingZoo environment with Box spaces and join its agents.

    Args:
        env_id: as above.
        options: keyword arguments of the module's ``parallel_env``.

    Raises:
        BatchproofError: unknown id or option, a missing package, or agents with spaces other than
            a bounded Box of actions and a Box of observations.
    """
    # Pygame, which mpe2 imports, greets on standard output.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        if env_id.startswith(MPE2):
            module = _mpe2_module(env_id)
            options = {"continuous_actions": True} | options
        else:
            module = OWN.get(env_id) or env_id.removesuffix(FACTORY)
        env = import_module(module).parallel_env(**options)
    except BatchproofError:
        raise
    except ImportError as error:
        needs = "" if error.name not in ("mpe2", "pettingzoo") else f" needs {error.name}"
        raise BatchproofError(
            f"{env_id}{needs}: pip install 'batchproof[marl]'"
            if needs
            else f"cannot make environment {env_id!r}: {error}"
        ) from None
    except Exception as error:  # environments judge their options in their own ways
        line = " ".join(str(error).split())
        raise BatchproofError(
            f"cannot make environment {env_id!r}: {type(error).__name__}: {line}"
        ) from error
    return JointEnv(env_id, env, SCORES.get(module, "sum"))


def _mpe2_module(env_id: str) -> str:
    """The newest installed version of an environment of mpe2, or the one that is named."""
    name = env_id.removeprefix(MPE2)
    versions: dict[str, int] = {}
    for module in pkgutil.iter_modules(import_module("mpe2").__path__):
        if match := re.fullmatch(r"(\w+)_v(\d+)", module.name):
            if module.name == name:
                return f"mpe2.{name}"
            versions[match[1]] = max(int(match[2]), versions.get(match[1], 0))
    if name not in versions:
        close = difflib.get_close_matches(name, versions, n=3) or sorted(versions)
        raise BatchproofError(
            f"unknown environment {env_id!r}: did you mean "
            f"{', '.join(MPE2 + known for known in close)}?"
        )
    return f"mpe2.{name}_v{versions[name]}"


class JointEnv(gymnasium.Env):
    """A parallel environment with concatenated observations (O,) and actions (A,).

    Its rewards are (n,), in the order of `Layout.names`, and its episodes end for all agents at
    once.
    """

    def __init__(self, env_id: str, env: Any, score: str) -> None:
        """Join the agents of ``env``; ``score`` as in `Layout`.

        Raises:
            BatchproofError: a space that is not a Box, or unbounded actions.
        """
        self._env_id, self._env = env_id, env
        names = list(env.possible_agents)
        self._action_spaces = {name: env.action_space(name) for name in names}
        obs_spaces = [env.observation_space(name) for name in names]
        for space in (*self._action_spaces.values(), *obs_spaces):
            if not isinstance(space, gymnasium.spaces.Box):
                raise BatchproofError(
                    f"{env_id} has a {type(space).__name__} space, but the lab needs Boxes of "
                    "observations and of actions: choose another environment"
                )
        bounds = [
            np.concatenate([getattr(space, side).ravel() for space in self._action_spaces.values()])
            for side in ("low", "high")
        ]
        if not np.isfinite(bounds).all():
            raise BatchproofError(
                f"{env_id} has unbounded actions, which cannot be scaled from [-1, 1]: "
                "choose another environment"
            )
        self.layout = Layout(
            tuple(names),
            tuple(int(np.prod(space.shape)) for space in obs_spaces),
            tuple(int(np.prod(space.shape)) for space in self._action_spaces.values()),
            score,
        )
        obs_size = sum(self.layout.obs_sizes)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_size,))
        self.action_space = gymnasium.spaces.Box(bounds[0], bounds[1], dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode: observations (O,)."""
        obs, _ = self._env.reset(seed=seed, options=options)
        return self._joined(obs), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Step with the actions of all agents (A,): the reward is (n,).

        Raises:
            BatchproofError: an agent's episode ended before another's.
        """
        actions, end = {}, 0
        for name, space in self._action_spaces.items():
            begin, end = end, end + int(np.prod(space.shape))
            actions[name] = action[begin:end].reshape(space.shape).astype(space.dtype)
        obs, rewards, terminations, truncations, _ = self._env.step(actions)
        names = self.layout.names
        endings = {(terminations.get(name), truncations.get(name)) for name in names}
        if len(endings) > 1:
            raise BatchproofError(
                f"{self._env_id} ends its agents' episodes one by one, but the lab needs all to "
                "end together: choose another environment"
            )
        ((terminated, truncated),) = endings
        reward = np.asarray([rewards[name] for name in names], np.float32)
        return self._joined(obs), reward, bool(terminated), bool(truncated), {}

    def close(self) -> None:
        """Close the environment within."""
        self._env.close()

    def _joined(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([np.ravel(obs[name]) for name in self.layout.names])
