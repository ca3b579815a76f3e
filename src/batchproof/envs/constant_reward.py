"""The constant-reward environment for Gymnasium: nothing to see, and the reward is the action."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from batchproof.errors import BatchproofError

EPISODE_STEPS = 30
ENDINGS = ("terminated", "truncated")


def check_ending(ending: str) -> None:
    """Raise a `BatchproofError` unless ``ending`` is in `ENDINGS`."""
    if ending not in ENDINGS:
        raise BatchproofError(f"unknown ending {ending!r}: use one of {', '.join(ENDINGS)}")


if TYPE_CHECKING:
    import gymnasium

    _Env = gymnasium.Env[np.ndarray, np.ndarray]
else:
    # The JAX twin shares this file's constants and needs no Gymnasium for them.
    try:
        import gymnasium

        _Env = gymnasium.Env
    except ModuleNotFoundError:
        _Env = object


class ConstantRewardEnv(_Env):
    """Thirty steps of reward = action from the observation [0, 0, 0].

    Observations are always zeros in Box(-1, 1, (3,)), actions Box(-1, 1, (1,)). The best return
    is 30: whoever cannot learn this has a broken actor, for there is nothing to explore and
    nothing to generalize. From a blog post on batch norm in TD3 and SAC, whose episodes end as
    ``terminated``.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, ending: str = "terminated") -> None:
        """Episodes end as ``terminated`` (no value beyond) or ``truncated`` (bootstrapped)."""
        check_ending(ending)
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.ending = ending
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode: observation (3,)."""
        super().reset(seed=seed)
        self._steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Pay the action (1,)."""
        self._steps += 1
        over = self._steps >= EPISODE_STEPS
        terminates = self.ending == "terminated"
        reward = float(action[0])
        return np.zeros(3, np.float32), reward, over and terminates, over and not terminates, {}
