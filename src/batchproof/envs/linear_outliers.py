"""The linear task with outliers for Gymnasium: what a batch norm's statistics have to survive.

Both versions of the task, this one and `batchproof.lab.envs.linear_outliers`, share its equations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from batchproof.errors import BatchproofError

EPISODE_STEPS = 10
FEATURES = 4
BOUND = math.sqrt(3)  # features are uniform in +-BOUND, so that their variance is 1
WEIGHT = 1 / (FEATURES * BOUND)  # the target WEIGHT * sum(features) then lies in [-1, 1]
VARIANCE = FEATURES * WEIGHT**2  # of the target: 1/12

if TYPE_CHECKING:
    import gymnasium

    _Env = gymnasium.Env[np.ndarray, np.ndarray]
else:
    # The JAX twin shares this file's equations and needs no Gymnasium for them.
    try:
        import gymnasium

        _Env = gymnasium.Env
    except ModuleNotFoundError:
        _Env = object


def scales(spread: float) -> np.ndarray:
    """Standard deviations of the observed features, (FEATURES,), from 1/spread to spread."""
    return np.geomspace(1 / spread, spread, FEATURES).astype(np.float32)


def check_options(
    outlier_probability: float, outlier_size: float, drift: float, shift: float, spread: float
) -> None:
    """Raise a `BatchproofError` unless the options make an environment."""
    if not 0 <= outlier_probability <= 1:
        raise BatchproofError(f"outlier_probability must be in [0, 1], got {outlier_probability}")
    for name, value in (("outlier_size", outlier_size), ("drift", drift), ("shift", shift)):
        if not math.isfinite(value):
            raise BatchproofError(f"{name} must be finite, got {value}")
    if not 0 < spread < math.inf:
        raise BatchproofError(f"spread must be positive, got {spread}")


def observe(
    features: Any, hit: Any, steps: Any, scale: Any, size: Any, drift: Any, shift: Any
) -> Any:
    """scale * (features + shift + drift * steps + size * hit): the observation (FEATURES,).

    Of NumPy or JAX values alike. ``hit`` is 1 for an outlier, which moves all features of the
    observation by ``size`` standard deviations, and 0 elsewhere.
    """
    return scale * (features + (shift + drift * steps + size * hit))


def reward_of(features: Any, action: Any) -> Any:
    """1 - (action - target)^2 / Var(target), with target = WEIGHT * sum(features): ().

    Its mean is the policy's coefficient of determination: 1 for the perfect one, 0 for the best
    that ignores the observation.
    """
    return 1 - (action - WEIGHT * features.sum()) ** 2 / VARIANCE


class LinearOutliersEnv(_Env):
    """Ten steps of telling a hidden linear function of four features, seen through bad sensors.

    At each step four features are drawn anew, uniform with mean 0 and variance 1, and the best
    action is their sum times `WEIGHT`. Nothing carries over to the next step, so the policy to
    learn is linear and the best return is 10; what never looks at the observation gets at most 0.
    The observation shows the features on scales of their own, shifted, drifting within the
    episode, and now and then far off: whoever normalizes has to survive that.

    Observations are in a bounded Box (4,), actions Box(-1, 1, (1,)), rewards in [-47, 1]. Episodes
    are cut off, ``truncated``: nothing terminates.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        outlier_probability: float = 0.0,
        outlier_size: float = 0.0,
        drift: float = 0.0,
        shift: float = 3.0,
        spread: float = 10.0,
    ) -> None:
        """Build it. Standard deviations are those of the clean features.

        Args:
            outlier_probability: of an observation to be an outlier, each on its own.
            outlier_size: how far off one is, in standard deviations, in every feature.
            drift: of the observations' mean, in standard deviations per step; a new episode
                starts without.
            shift: mean of the observations, in standard deviations.
            spread: the features' standard deviations go from 1/spread to spread.
        """
        check_options(outlier_probability, outlier_size, drift, shift, spread)
        self._probability = outlier_probability
        self._scale = scales(spread)
        self._shape = np.float32(outlier_size), np.float32(drift), np.float32(shift)
        moves = [(0.0, outlier_size), (0.0, drift * EPISODE_STEPS)]
        low, high = (shift + sum(f(m) for m in moves) + s for f, s in ((min, -2), (max, 2)))
        self.observation_space = gymnasium.spaces.Box(
            (low * self._scale).astype(np.float32), (high * self._scale).astype(np.float32)
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._steps = 0
        self._features = np.zeros(FEATURES, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode: observation (4,)."""
        super().reset(seed=seed)
        self._steps = 0
        return self._see(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Pay for the action (1,) and draw the next features."""
        reward = float(reward_of(self._features, np.clip(action[0], -1, 1)))
        self._steps += 1
        return self._see(), reward, False, self._steps >= EPISODE_STEPS, {}

    def _see(self) -> np.ndarray:
        self._features = self.np_random.uniform(-BOUND, BOUND, FEATURES).astype(np.float32)
        hit = np.float32(self.np_random.random() < self._probability)
        size, drift, shift = self._shape
        return observe(
            self._features, hit, np.float32(self._steps), self._scale, size, drift, shift
        )
