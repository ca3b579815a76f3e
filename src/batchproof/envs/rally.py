"""Rally: two agents keep a ball in play over a net.

A task of our own in the shape of a course's two-player tennis: the sizes, rewards and
threshold are that task's, the physics is not. The rules are here once, for NumPy and for JAX;
`parallel_env` is the PettingZoo environment.

A side view of a court, in metres and seconds. Each agent has a view of its own, mirrored for the
right one: its side is at x < 0 and the net stands at x = 0, so that both play the same game.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from batchproof.envs.options import check_whole
from batchproof.errors import BatchproofError

NAMES = ("left", "right")
FRAME, FRAMES = 8, 3  # values of one moment, and moments in an observation
OBS_SIZE, ACTION_SIZE = FRAME * FRAMES, 2  # of one agent
EPISODE_STEPS = 300
SOLVED = 0.5  # mean over 100 episodes of the better agent's return

OVER, FAULT = 0.1, -0.01  # rewards

SUBSTEPS, DT = 5, 0.02  # of physics in one environment step of 0.1 s
GRAVITY = 10.0
HALF = 4.0  # the court ends this far from the net
NET = 0.6  # height of the net
REST = 0.5  # height of a racket while its agent stands
FRONT, BACK = -0.5, -4.5  # how far an agent runs
RUN, JUMP = 4.0, 3.0  # greatest speeds
REACH = 0.35  # the ball is hit within this distance of a racket
SWING = 0.25  # share of its own speed that a racket passes on
FACE = (0.5**0.5, 0.5**0.5)  # normal of a racket: half towards the net, half up
SIDES = ((1.0, 1.0, 1.0, 1.0), (-1.0, 1.0, -1.0, 1.0))  # from the left view to each agent's

NOBODY = -1


class RallyState(NamedTuple):
    """A moment of a rally; positions and velocities are x, y, vx, vy."""

    ball: Any  # (4,) in the left agent's view
    rackets: Any  # (2, 4), each in its agent's view
    frames: Any  # (2, 3, 8), what each agent saw last, the newest at the end
    hitter: Any  # () int, who hit the ball last, or `NOBODY`
    steps: Any  # () int, environment steps done


def serve(xp: Any, draws: Any) -> RallyState:
    """A ball that comes from above the net to one of the agents.

    Args:
        xp: ``numpy`` or ``jax.numpy``.
        draws: (6,) uniform in [0, 1): where to, how high, how fast, how far, and both agents.
    """
    side = xp.where(draws[0] < 0.5, -1.0, 1.0)
    y, vy = 1.5 + 0.5 * draws[1], 1 + 2 * draws[2]
    flight = (vy + xp.sqrt(vy**2 + 2 * GRAVITY * (y - REST))) / GRAVITY
    vx = (1 + 2.5 * draws[3]) / flight
    ball = xp.stack([0 * y, y, side * vx, vy])
    x = -1 - 2.5 * draws[4:6]
    rackets = xp.stack([x, REST + 0 * x, 0 * x, 0 * x], axis=1)
    frame = _frame(xp, ball, rackets)
    frames = xp.stack([frame] * FRAMES, axis=1)
    return RallyState(ball, rackets, frames, xp.asarray(NOBODY), xp.asarray(0))


def observe(state: RallyState) -> Any:
    """What each agent sees, (2, 24): three moments of its racket and the ball, newest last."""
    return state.frames.reshape(2, OBS_SIZE)


def repeat(count: int, body: Callable[[Any], Any], value: Any) -> Any:
    """``body`` applied ``count`` times."""
    for _ in range(count):
        value = body(value)
    return value


def play(
    xp: Any, state: RallyState, action: Any, repeat: Callable[..., Any] = repeat
) -> tuple[RallyState, Any, Any]:
    """One environment step.

    Args:
        xp: ``numpy`` or ``jax.numpy``.
        state: the moment before.
        action: (2, 2) in [-1, 1]: the speed towards the net, and a jump where it is positive and
            the agent stands.
        repeat: the loop over substeps, as `repeat`.

    Returns:
        The moment after, the rewards (2,), and whether the ball is out of play.
    """
    rackets = _act(xp, state.rackets, action)
    start = (state.ball, rackets, state.hitter, xp.zeros(2, rackets.dtype), xp.asarray(False))
    ball, rackets, hitter, reward, over = repeat(
        SUBSTEPS, lambda moving: _substep(xp, *moving), start
    )
    frames = xp.concatenate([state.frames[:, 1:], _frame(xp, ball, rackets)[:, None]], axis=1)
    return RallyState(ball, rackets, frames, hitter, state.steps + 1), reward, over


def _act(xp: Any, rackets: Any, action: Any) -> Any:
    """The rackets at the speeds that their agents want."""
    action = xp.clip(action, -1.0, 1.0)
    stands = rackets[:, 1] <= REST
    rise = xp.where(stands, xp.maximum(action[:, 1], 0.0) * JUMP, rackets[:, 3])
    return xp.stack([rackets[:, 0], rackets[:, 1], RUN * action[:, 0], rise], axis=1)


def _substep(
    xp: Any, ball: Any, rackets: Any, hitter: Any, reward: Any, over: Any
) -> tuple[Any, ...]:
    """`DT` seconds; once the ball is out of play nothing moves and nothing counts."""
    old = ball, rackets, hitter
    rackets = _run(xp, rackets)
    ball = _fly(xp, ball)
    change, ends = _judge(xp, old[0], ball, hitter)
    ball, hitter = _hit(xp, ball, rackets, hitter)
    reward = reward + xp.where(over, 0.0, change)
    ball, rackets, hitter = (
        xp.where(over, before, after)
        for before, after in zip(old, (ball, rackets, hitter), strict=True)
    )
    return ball, rackets, hitter, reward, over | ends


def _frame(xp: Any, ball: Any, rackets: Any) -> Any:
    return xp.concatenate([rackets, ball * xp.asarray(SIDES, ball.dtype)], axis=1)


def _run(xp: Any, rackets: Any) -> Any:
    x, y, vx, vy = (rackets[:, i] for i in range(4))
    wanted = x + vx * DT
    x = xp.clip(wanted, BACK, FRONT)
    vx = xp.where(x == wanted, vx, 0.0)
    y = y + vy * DT - 0.5 * GRAVITY * DT**2
    lands = y <= REST
    vy = xp.where(lands, 0.0, vy - GRAVITY * DT)
    return xp.stack([x, xp.where(lands, REST, y), vx, vy], axis=1)


def _fly(xp: Any, ball: Any) -> Any:
    x, y, vx, vy = (ball[i] for i in range(4))
    fall = GRAVITY * DT
    return xp.stack([x + vx * DT, y + vy * DT - 0.5 * fall * DT, vx, vy - fall])


def _hit(xp: Any, ball: Any, rackets: Any, hitter: Any) -> tuple[Any, Any]:
    """A racket within reach throws the ball back off its face, without loss."""
    face = xp.asarray(FACE, ball.dtype)
    views = ball * xp.asarray(SIDES, ball.dtype)
    apart = views - rackets
    closing = ((views - SWING * rackets)[:, 2:] * face).sum(1)
    hits = ((apart[:, :2] ** 2).sum(1) < REACH**2) & (closing < 0)
    bounce = xp.where(hits, -2 * closing, 0.0)[:, None] * face
    # Rackets never come so close to the net that both reach the ball.
    change = bounce[0] + bounce[1] * xp.asarray((-1.0, 1.0), ball.dtype)
    hitter = xp.where(hits[0], 0, xp.where(hits[1], 1, hitter))
    return xp.concatenate([ball[:2], ball[2:] + change]), hitter


def _judge(xp: Any, before: Any, ball: Any, hitter: Any) -> tuple[Any, Any]:
    """Rewards (2,) of a ball that moved from ``before``, and whether it is out of play."""
    agents = xp.arange(2)
    crosses = (before[0] < 0) != (ball[0] < 0)
    share = before[0] / xp.where(crosses, before[0] - ball[0], 1.0)
    clears = before[1] + share * (ball[1] - before[1]) > NET
    drops = ball[1] <= 0
    out = xp.abs(ball[0]) > HALF
    owner = xp.where(ball[0] < 0, 0, 1)
    in_net = crosses & ~clears
    culprit = xp.where(in_net | out, hitter, owner)
    over = in_net | drops
    reward = OVER * (crosses & clears & (agents == hitter))
    reward = reward + FAULT * (over & (agents == culprit))
    return reward.astype(ball.dtype), over


def check_max_steps(max_steps: int) -> None:
    """Raise a `BatchproofError` unless episodes have 1 to 300 steps."""
    check_whole("max_steps of batchproof/Rally-v0", max_steps, EPISODE_STEPS)


def parallel_env(max_steps: int = EPISODE_STEPS) -> Any:
    """Build the PettingZoo environment.

    Raises:
        BatchproofError: PettingZoo is missing, or ``max_steps`` is not from 1 to 300.
    """
    # The rules above need no PettingZoo, and it is slow to import.
    try:
        from batchproof.envs.rally_env import RallyEnv
    except ModuleNotFoundError:
        raise BatchproofError(
            "batchproof.envs.rally needs PettingZoo: pip install 'batchproof[marl]'"
        ) from None
    return RallyEnv(max_steps)
