"""A point mass that steers around a disc: momentum, two actions and something in the way.

The rules are here once, for NumPy and for JAX; `PointMassEnv` is the Gymnasium environment. A
plane seen from above, in metres and seconds: walls at +-1 on both axes, the disc around the
origin, the start on its left, the goal on its right.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from batchproof.errors import BatchproofError

EPISODE_STEPS = 60
OBS_SIZE, ACTION_SIZE = 6, 2
DT = 0.1  # seconds per step
FORCE = 2.0  # greatest acceleration along each axis
DRAG = 0.5  # share of the speed lost per second
TOP_SPEED = math.sqrt(2) * FORCE / DRAG
WALL = 1.0
RADIUS = 0.35  # of the disc
WIDEST = 0.5  # disc: start and goal lie outside of it
EFFORT = 0.02  # cost of a full push along one axis, in metres of distance

if TYPE_CHECKING:
    import gymnasium

    _Env = gymnasium.Env[np.ndarray, np.ndarray]
else:
    # The JAX twin shares this file's rules and needs no Gymnasium for them.
    try:
        import gymnasium

        _Env = gymnasium.Env
    except ModuleNotFoundError:
        _Env = object


class Moment(NamedTuple):
    """Where the mass is, how it moves, and where it should be."""

    position: Any  # (2,)
    velocity: Any  # (2,)
    goal: Any  # (2,)
    steps: Any  # () int, environment steps done


def check_radius(radius: float) -> None:
    """Raise a `BatchproofError` unless the disc leaves room for start and goal."""
    if not 0 <= radius <= WIDEST:
        raise BatchproofError(f"radius must be from 0 (no disc) to {WIDEST}, got {radius}")


def start(xp: Any, draws: Any) -> Moment:
    """A mass at rest on the left and a goal on the right.

    Args:
        xp: ``numpy`` or ``jax.numpy``.
        draws: (4,) uniform in [0, 1): x and y of the start, x and y of the goal.
    """
    x, y = 0.6 + 0.3 * draws[::2], draws[1::2] - 0.5
    position, goal = xp.stack([-x[0], y[0]]), xp.stack([x[1], y[1]])
    return Moment(position, 0 * position, goal, xp.asarray(0))


def observe(xp: Any, moment: Moment) -> Any:
    """Position, velocity, and the way to the goal: (6,)."""
    return xp.concatenate([moment.position, moment.velocity, moment.goal - moment.position])


def move(xp: Any, moment: Moment, action: Any, radius: Any) -> tuple[Moment, Any]:
    """One step: push, slide along the disc, stop at the walls.

    Args:
        xp: ``numpy`` or ``jax.numpy``.
        moment: the one before.
        action: (2,) in [-1, 1], the push along each axis.
        radius: of the disc.

    Returns:
        The moment after, and the reward: minus the distance to the goal and the effort.
    """
    action = xp.clip(action, -1.0, 1.0)
    velocity = moment.velocity + DT * (FORCE * action - DRAG * moment.velocity)
    position = moment.position + DT * velocity
    # In the disc: out along the normal, and the speed into it is lost.
    distance = xp.sqrt((position**2).sum())
    inside = distance < radius
    normal = position / xp.where(distance > 0, distance, 1.0)
    position = xp.where(inside, radius * normal, position)
    into = xp.minimum((velocity * normal).sum(), 0.0)
    velocity = velocity - xp.where(inside, into, 0.0) * normal
    held = xp.clip(position, -WALL, WALL)
    velocity = xp.where(held == position, velocity, 0.0)
    reward = -xp.sqrt(((held - moment.goal) ** 2).sum()) - EFFORT * (action**2).sum()
    return Moment(held, velocity, moment.goal, moment.steps + 1), reward


class PointMassEnv(_Env):
    """Sixty steps to bring a mass with momentum to a goal behind a disc, and to keep it there.

    Observations Box (6,): position, velocity, and the way to the goal. Actions Box(-1, 1, (2,)):
    the push along each axis. The reward of a step is minus the distance to the goal, and a little
    for effort: about -90 an episode for random pushes. Episodes are cut off, ``truncated``:
    nothing terminates.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, radius: float = RADIUS) -> None:
        """A disc of ``radius`` metres; 0 is none."""
        check_radius(radius)
        self._radius = np.float32(radius)
        high = np.repeat([WALL, TOP_SPEED, 2 * WALL], 2).astype(np.float32)
        self.observation_space = gymnasium.spaces.Box(-high, high)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)
        self.moment = start(np, np.zeros(4, np.float32))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode: observation (6,)."""
        super().reset(seed=seed)
        self.moment = start(np, self.np_random.random(4, np.float32))
        return observe(np, self.moment), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Push with ``action`` (2,) for a tenth of a second."""
        push = np.asarray(action, np.float32)
        self.moment, reward = move(np, self.moment, push, self._radius)
        over = bool(self.moment.steps >= EPISODE_STEPS)
        return observe(np, self.moment), float(reward), False, over, {}
