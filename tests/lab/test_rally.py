"""Rally: its physics, its rewards, and that the JAX and the PettingZoo environment are one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from batchproof.envs import rally
from batchproof.envs.rally import NOBODY, RallyState, observe, parallel_env, play, serve
from batchproof.errors import BatchproofError
from batchproof.lab.envs.rally import Rally

STEP = rally.DT * rally.SUBSTEPS  # seconds
STILL = np.zeros((2, 2), np.float32)
FAR = ((-3.0, rally.REST, 0.0, 0.0), (-3.0, rally.REST, 0.0, 0.0))  # rackets at rest


def moment(ball: Any, rackets: Any = FAR, hitter: int = NOBODY) -> RallyState:
    rackets = np.asarray(rackets, np.float32)
    frames = np.zeros((2, 3, 8), np.float32)
    return RallyState(np.asarray(ball, np.float32), rackets, frames, np.asarray(hitter), 0)


# --- physics --------------------------------------------------------------------------------------


def test_the_ball_falls_as_a_stone_does() -> None:
    after, reward, over = play(np, moment([-2, 2.5, 1.5, 3]), STILL)
    wanted = [-2 + 1.5 * STEP, 2.5 + 3 * STEP - 5 * STEP**2, 1.5, 3 - 10 * STEP]
    np.testing.assert_allclose(after.ball, wanted, rtol=1e-5)
    assert (reward.tolist(), over) == ([0, 0], False)


@pytest.mark.parametrize("agent", [0, 1])
def test_a_racket_at_rest_turns_the_ball_without_loss(agent: int) -> None:
    sign = 1 - 2 * agent
    # The ball comes at 30 degrees and meets the racket in the first fiftieth of a second.
    speed = 6 * np.asarray([-np.cos(np.pi / 6), -np.sin(np.pi / 6)])
    ball = [sign * -2.7, 0.75, sign * speed[0], speed[1]]
    after, _, _ = play(np, moment(ball), STILL)
    assert after.hitter == agent
    # A face at 45 degrees swaps the parts of the velocity; gravity acts before and after.
    fallen = speed[1] - 10 * rally.DT
    wanted = [sign * -fallen, -speed[0] - 10 * (STEP - rally.DT)]
    np.testing.assert_allclose(after.ball[2:], wanted, rtol=1e-5)


def test_a_racket_that_runs_hits_harder() -> None:
    ball = [-2.7, 0.75, -4, -4]
    speeds = []
    for run in (-0.5, 0, 0.5):
        after, _, _ = play(np, moment(ball), np.asarray([[run, 0], [0, 0]], np.float32))
        speeds.append(after.ball[2])
    # Twice the share that is passed on of the racket's speed along the face's normal, of which
    # one half points along x.
    np.testing.assert_allclose(np.diff(speeds), rally.SWING * 0.5 * rally.RUN, rtol=1e-5)


def test_agents_run_in_their_half_and_jump_from_the_ground() -> None:
    state = moment([-2, 50, 0, 0])
    heights, jumps = [], np.asarray([[1, 1], [-1, 0.5]], np.float32)
    for _ in range(20):
        state, _, _ = play(np, state, jumps)
        heights.append(state.rackets[:, 1])
    assert state.rackets[:, 0].tolist() == [rally.FRONT, rally.BACK]
    assert state.rackets[:, 2].tolist() == [0, 0]  # stopped, not pushing on
    tops = np.max(heights, axis=0) - rally.REST
    # v^2 / 2 g, seen every tenth of a second.
    np.testing.assert_allclose(tops, [0.45, 0.1125], atol=0.06)
    assert np.min(heights, axis=0).tolist() == [rally.REST] * 2


# --- rewards --------------------------------------------------------------------------------------

ENDS = {
    # ball, hitter, rewards, out of play
    "over the net": ([-0.1, 1.5, 4, 0], 0, [0.1, 0], False),
    "over the net, leftwards": ([0.1, 1.5, -4, 0], 1, [0, 0.1], False),
    "a serve over the net": ([0.1, 1.5, -4, 0], NOBODY, [0, 0], False),
    "into the net": ([-0.1, 0.5, 4, 0], 0, [-0.01, 0], True),
    "into the net, leftwards": ([0.1, 0.5, -4, 0], 1, [0, -0.01], True),
    "drops on the left": ([-1, 0.1, 0, -2], 1, [-0.01, 0], True),
    "drops on the right": ([1, 0.1, 0, -2], 0, [0, -0.01], True),
    "a serve drops": ([1, 0.1, 0, -2], NOBODY, [0, -0.01], True),
    "out by the left agent": ([4.5, 0.1, 3, -2], 0, [-0.01, 0], True),
    "out by the right agent": ([4.5, 0.1, 3, -2], 1, [0, -0.01], True),
}


@pytest.mark.parametrize(("ball", "hitter", "rewards", "ended"), ENDS.values(), ids=ENDS)
def test_who_is_rewarded(ball: list[float], hitter: int, rewards: Any, ended: bool) -> None:
    after, reward, over = play(np, moment(ball, hitter=hitter), STILL)
    np.testing.assert_allclose(reward, rewards, rtol=1e-6)
    assert over == ended
    # A ball out of play stays where it is.
    assert (after.ball[1] > -0.1) or not ended


def test_both_agents_play_the_same_game() -> None:
    rng = np.random.default_rng(0)
    mirror = np.asarray([-1, 1, -1, 1], np.float32)
    for _ in range(20):
        one = serve(np, rng.random(6, np.float32))
        two = one._replace(
            ball=one.ball * mirror, rackets=one.rackets[::-1], frames=one.frames[::-1]
        )
        for _ in range(10):
            action = rng.uniform(-1, 1, (2, 2)).astype(np.float32)
            one, reward, over = play(np, one, action)
            two, mirrored, also_over = play(np, two, action[::-1])
            np.testing.assert_array_equal(observe(one), observe(two)[::-1])
            np.testing.assert_array_equal(reward, mirrored[::-1])
            assert over == also_over


# --- observations and episodes --------------------------------------------------------------------


def test_an_observation_is_three_moments_in_the_agents_own_view() -> None:
    env = parallel_env()
    obs, _ = env.reset(seed=3)
    for name in rally.NAMES:
        moments = obs[name].reshape(3, 8)
        np.testing.assert_array_equal(moments[0], moments[2])  # nothing came before
    seen = [obs]
    for _ in range(3):
        obs, *_ = env.step({name: np.asarray([0.5, 0], np.float32) for name in rally.NAMES})
        seen.append(obs)
    left, right = (obs[name].reshape(3, 8) for name in rally.NAMES)
    np.testing.assert_array_equal(left[:2], seen[-2]["left"].reshape(3, 8)[1:])
    # Each runs towards the net, in its own view to larger x, and the ball is one ball.
    assert left[-1, 0] > left[0, 0]
    assert right[-1, 0] > right[0, 0]
    assert left[-1, 0] < 0 > right[-1, 0]
    np.testing.assert_array_equal(left[:, 4:] * [-1, 1, -1, 1], right[:, 4:])


def test_it_is_a_parallel_env_of_pettingzoo() -> None:
    with warnings.catch_warnings():
        # PettingZoo's own tests import what PettingZoo deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        from pettingzoo.test import parallel_api_test, parallel_seed_test
    with warnings.catch_warnings():
        # Advice on unbounded boxes: positions have no natural bound here.
        warnings.simplefilter("ignore", UserWarning)
        parallel_api_test(parallel_env(), num_cycles=400)
    parallel_seed_test(partial(parallel_env, max_steps=40), num_cycles=100)


def test_a_long_rally_is_cut_off_not_ended() -> None:
    env = parallel_env(max_steps=4)
    env.reset(seed=0)
    action = {name: np.zeros(2, np.float32) for name in rally.NAMES}
    for _ in range(4):
        assert env.agents == list(rally.NAMES)
        *_, terminated, truncated, _ = env.step(action)
    assert env.agents == []
    assert terminated == dict.fromkeys(rally.NAMES, False)
    assert truncated == dict.fromkeys(rally.NAMES, True)


@pytest.mark.parametrize("make", [parallel_env, Rally.make])
def test_episodes_have_a_length_or_raise(make: Callable[..., Any]) -> None:
    for max_steps in (0, 301, 10.5, True):
        with pytest.raises(BatchproofError, match="from 1 to 300"):
            make(max_steps=max_steps)


def test_without_pettingzoo_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pettingzoo", None)
    monkeypatch.delitem(sys.modules, "batchproof.envs.rally_env", raising=False)
    with pytest.raises(BatchproofError, match=r"pip install 'batchproof\[marl\]'"):
        parallel_env()


# --- the two environments -------------------------------------------------------------------------


def heuristic(xp: Any, obs: Any) -> Any:
    """Be where the ball will come down, and stand still there: actions (2, 2) for (2, 24)."""
    x, ball_x, ball_y, vx, vy = (obs[:, -8 + i] for i in (0, 4, 5, 6, 7))
    root = xp.sqrt(xp.maximum(vy**2 + 2 * rally.GRAVITY * (ball_y - rally.REST), 0))
    comes_down = ball_x + vx * (vy + root) / rally.GRAVITY
    place = xp.where(comes_down < 0, xp.clip(comes_down, rally.BACK, rally.FRONT), -2)
    run = xp.clip((place - x) / (rally.RUN * STEP), -1, 1)
    return xp.stack([run, 0 * run], axis=1)


def test_both_are_equal_step_by_step() -> None:
    rng, env, steps, lengths = np.random.default_rng(0), parallel_env(60), 0, set()
    in_jax = Rally.make(60)
    step = jax.jit(lambda state, action: in_jax.step(jax.random.key(0), state, action))
    for episode in range(12):
        obs, _ = env.reset(seed=episode)
        state = jax.tree.map(jnp.asarray, env.rally)
        np.testing.assert_array_equal(
            np.concatenate(list(obs.values())), observe(state).reshape(-1)
        )
        while env.agents:
            joint = np.stack([obs[name] for name in rally.NAMES])
            # Noise, so that the ball is also missed, hit out and hit into the net.
            action = heuristic(np, joint) + 0.5 * (episode % 3) * rng.normal(size=(2, 2))
            action = np.clip(action, -1, 1).astype(np.float32)
            # From one state each time: a rally is chaotic.
            result = step(jax.tree.map(jnp.asarray, env.rally), action.reshape(-1))
            obs, reward, terminated, truncated, _ = env.step(
                dict(zip(rally.NAMES, action, strict=True))
            )
            np.testing.assert_allclose(
                np.concatenate(list(obs.values())), result.obs, rtol=1e-4, atol=1e-4
            )
            np.testing.assert_allclose(list(reward.values()), result.reward, atol=1e-6)
            assert terminated["left"] == terminated["right"] == bool(result.terminated)
            assert truncated["left"] == truncated["right"] == bool(result.truncated)
            assert env.rally.steps == result.state.steps
            steps += 1
        lengths.add(int(env.rally.steps))
    assert steps > 200
    assert 60 in lengths
    assert min(lengths) < 30


def test_random_play_scores_about_nothing_and_good_play_solves_it() -> None:
    env, episodes = Rally.make(), 200

    def episode(key: Array, at_random: Array) -> Array:
        state, obs = env.reset(key)

        def body(i: Array, carry: Any) -> Any:
            state, obs, over, total = carry
            uniform = jax.random.uniform(jax.random.fold_in(key, i), (2, 2), minval=-1)
            action = jnp.where(at_random, uniform, heuristic(jnp, obs.reshape(2, 24)))
            result = env.step(key, state, action.reshape(-1))
            total = total + jnp.where(over, 0, result.reward)
            return result.state, result.obs, over | result.terminated, total

        start = (state, obs, jnp.asarray(False), jnp.zeros(2))
        return jax.lax.fori_loop(0, env.max_steps, body, start)[-1]

    keys = jax.random.split(jax.random.key(0), 2 * episodes)
    returns = jax.jit(jax.vmap(episode))(keys, jnp.arange(2 * episodes) < episodes)
    scores = Rally.layout.score_of(np.asarray(returns))
    assert 0.005 < scores[:episodes].mean() < 0.05
    assert scores[episodes:].mean() > 3 * rally.SOLVED
