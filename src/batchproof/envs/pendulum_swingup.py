"""Swing a pendulum up and hold it: the DeepMind Control Suite's task without MuJoCo.

Both versions, this one for Gymnasium and `batchproof.lab.envs.pendulum_swingup`, share these
equations. The pole of dm_control's ``pendulum.xml`` has one hinge, so MuJoCo's step has a closed
form: semi-implicit Euler with the joint's damping taken at the end of the step (``eulerdamp``,
MuJoCo's default). Beside dm_control 1.0.50 on MuJoCo 3.17.0, from equal states with equal actions
in float64, orientation and velocity differed by at most 2.1e-14 over episodes of 1000 steps and
rewards were equal (`tests/lab/test_pendulum_swingup.py` holds two of them).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from batchproof.envs.options import check_whole
from batchproof.errors import BatchproofError

EPISODE_STEPS = 1000
DT = 0.02  # seconds per step
GRAVITY = 9.81
MASS, LENGTH = 1.0, 0.5  # kg, metres from the hinge to the middle of the ball
INERTIA = MASS * LENGTH**2 + 0.4 * MASS * 0.05**2  # of a ball of radius 0.05 m, about the hinge
DAMPING = 0.1  # newton metre seconds per radian
MAX_TORQUE = 1.0  # newton metres: a fifth of what lifts the pole at once
UPRIGHT = math.cos(math.radians(8))  # the reward is 1 where the cosine is at least this
# At this speed damping takes all that torque and gravity can give.
MAX_SPEED = (MAX_TORQUE + MASS * GRAVITY * LENGTH) / DAMPING

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


class SwingupState(NamedTuple):
    """Where the pole is, and how long the episode has run."""

    theta: Any  # () radians, 0 is upright; it is not wrapped
    speed: Any  # () radians per second
    steps: Any  # () int


def move(xp: Any, state: SwingupState, action: Any) -> tuple[SwingupState, Any]:
    """The state after `DT` seconds with the motor at ``action`` (), and the reward there.

    Args:
        xp: ``numpy`` or ``jax.numpy``.
        state: the moment before.
        action: share of `MAX_TORQUE`, clipped to [-1, 1].
    """
    theta, speed, steps = state
    torque = MAX_TORQUE * xp.clip(action, -1.0, 1.0)
    push = torque + MASS * GRAVITY * LENGTH * xp.sin(theta) - DAMPING * speed
    speed = speed + DT * push / (INERTIA + DT * DAMPING)
    theta = theta + DT * speed
    reward = xp.where(xp.cos(theta) >= UPRIGHT, 1.0, 0.0)
    return SwingupState(theta, speed, steps + 1), reward


def observe(xp: Any, state: SwingupState) -> Any:
    """What is seen of a state, (3,): the pole's vertical and horizontal part, and its speed."""
    return xp.stack([xp.cos(state.theta), xp.sin(state.theta), state.speed])


def check_options(max_steps: int, repeat: int) -> None:
    """Raise a `BatchproofError` unless episodes have 1 to 1000 steps, a multiple of ``repeat``."""
    check_whole("max_steps of batchproof/PendulumSwingup-v0", max_steps, EPISODE_STEPS)
    check_whole("repeat of batchproof/PendulumSwingup-v0", repeat, max_steps)
    if max_steps % repeat:
        raise BatchproofError(
            "repeat of batchproof/PendulumSwingup-v0 must be a whole number that divides "
            f"max_steps={max_steps}, got {repeat}"
        )


class PendulumSwingupEnv(_Env):
    """A pole on a hinge, with a motor too weak to lift it at once.

    Observations are [cos, sin, speed] of the pole's angle from upright, Box (3,), actions the
    motor's torque, Box(-1, 1, (1,)). The reward is 1 where the pole is within 8 degrees of
    upright and 0 elsewhere. An episode starts at rest at a uniformly random angle and is truncated
    after 1000 steps (20 seconds), never terminated. With ``repeat`` an action lasts for so many
    steps and their rewards are added. arXiv 2509.25174 reports 818 for SAC.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, max_steps: int = EPISODE_STEPS, repeat: int = 1) -> None:
        """Episodes of ``max_steps`` times `DT`, an action for each ``repeat`` of them.

        Raises:
            BatchproofError: as `check_options`.
        """
        check_options(max_steps, repeat)
        high = np.array([1.0, 1.0, np.ceil(MAX_SPEED)], np.float32)
        self.observation_space = gymnasium.spaces.Box(-high, high)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.max_steps = max_steps
        self.repeat = repeat
        self.state = SwingupState(np.float64(math.pi), np.float64(0.0), 0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode: observation (3,)."""
        super().reset(seed=seed)
        theta = self.np_random.uniform(-math.pi, math.pi)
        self.state = SwingupState(np.float64(theta), np.float64(0.0), 0)
        return observe(np, self.state).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Turn the motor with ``action`` (1,) for `DT` times ``repeat``."""
        paid = 0.0
        for _ in range(self.repeat):
            self.state, reward = move(np, self.state, np.float64(action[0]))
            paid += float(reward)
        obs = observe(np, self.state).astype(np.float32)
        return obs, paid, False, self.state.steps >= self.max_steps, {}
