"""The point mass: its physics, and that the JAX and the Gymnasium environment are one."""

from __future__ import annotations

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from batchproof.envs import point_mass, register_envs
from batchproof.envs.point_mass import (
    EPISODE_STEPS,
    RADIUS,
    WALL,
    Moment,
    PointMassEnv,
    move,
    observe,
    start,
)
from batchproof.errors import BatchproofError
from batchproof.lab.envs import JAX_ENVS
from batchproof.lab.envs.point_mass import PointMass

ID = "batchproof/PointMass-v0"
register_envs()


def moment(position: tuple, velocity: tuple = (0.0, 0.0), goal: tuple = (0.8, 0.0)) -> Moment:
    arrays = (np.asarray(part, np.float32) for part in (position, velocity, goal))
    return Moment(*arrays, np.asarray(0))


def steer(env: PointMassEnv, lift: float) -> float:
    """The return of a hand-made policy: over the disc by ``lift``, then to the goal, damped."""
    env.reset(seed=0)
    total = 0.0
    for _ in range(EPISODE_STEPS):
        position, velocity, goal = env.moment[:3]
        aim = goal if position[0] > 0 else np.array([0.1, lift])
        total += env.step(np.clip(4 * (aim - position) - 2 * velocity, -1, 1))[1]
    return total


@pytest.mark.parametrize("options", [{}, {"radius": 0.0}])
def test_gymnasium_s_own_checks_pass(options: dict[str, float]) -> None:
    check_env(gymnasium.make(ID, **options).unwrapped)


def test_the_jax_environment_equals_it_step_by_step() -> None:
    assert JAX_ENVS[ID] is PointMass
    env, twin = gymnasium.make(ID), PointMass.make()
    spaces = env.observation_space, env.action_space
    assert [space.shape for space in spaces] == [(twin.obs_size,), (twin.action_size,)]
    step = jax.jit(twin.step)
    rng = np.random.default_rng(0)
    met_disc = met_wall = 0
    for episode in range(6):
        obs, _ = env.reset(seed=episode)
        state = jax.tree.map(jnp.asarray, env.unwrapped.moment)
        np.testing.assert_array_equal(obs, observe(jnp, state))
        # Pushed towards the disc first, then anywhere: both it and the walls are met.
        for i in range(EPISODE_STEPS):
            bias = -5 * obs[:2] if i < 20 else np.array([-0.5, 0.5 * (episode % 3 - 1)])
            action = np.clip(rng.uniform(-1, 1, 2) + bias, -1, 1).astype(np.float32)
            obs, reward, terminated, truncated, _ = env.step(action)
            result = step(jax.random.key(i), state, jnp.asarray(action))
            state = result.state
            assert result.obs.dtype == obs.dtype == np.float32
            np.testing.assert_allclose(result.obs, obs, atol=2e-5)
            np.testing.assert_allclose(result.reward, reward, atol=2e-5)
            assert (bool(result.terminated), bool(result.truncated)) == (terminated, truncated)
            assert (terminated, truncated) == (False, i == EPISODE_STEPS - 1)
            met_disc += np.hypot(*obs[:2]) < RADIUS + 1e-4
            met_wall += np.abs(obs[:2]).max() == WALL
            # Rounding at the disc's edge must not add up: go on from the same state.
            state = jax.tree.map(jnp.asarray, env.unwrapped.moment)
    assert met_disc > 10
    assert met_wall > 10


def test_the_jax_environment_starts_by_the_same_rule() -> None:
    twin = PointMass.make()
    states, obs = jax.vmap(twin.reset)(jax.random.split(jax.random.key(0), 2000))
    x, goal_x = np.asarray(states.position[:, 0]), np.asarray(states.goal[:, 0])
    assert ((x >= -0.9) & (x <= -0.6) & (goal_x >= 0.6) & (goal_x <= 0.9)).all()
    heights = np.stack([states.position[:, 1], states.goal[:, 1]])
    np.testing.assert_allclose(heights.var(axis=1), 1 / 12, rtol=0.1)
    assert abs(np.corrcoef(heights)[0, 1]) < 0.08
    assert not np.asarray(states.velocity).any()
    np.testing.assert_allclose(obs[:, 4:], states.goal - states.position, atol=1e-7)


def test_a_push_moves_it_as_newton_says() -> None:
    after, reward = move(np, moment((-0.8, 0.5), (1.0, -2.0)), np.array([0.5, -1.0]), RADIUS)
    # v += 0.1 (2 a - 0.5 v), x += 0.1 v
    np.testing.assert_allclose(after.velocity, [1.05, -2.1], rtol=1e-6)
    np.testing.assert_allclose(after.position, [-0.695, 0.29], rtol=1e-6)
    distance = np.hypot(0.8 + 0.695, 0.29)
    np.testing.assert_allclose(reward, -distance - 0.02 * 1.25, rtol=1e-6)
    clipped, _ = move(np, moment((-0.8, 0.5)), np.array([3.0, -7.0]), RADIUS)
    wanted, _ = move(np, moment((-0.8, 0.5)), np.array([1.0, -1.0]), RADIUS)
    np.testing.assert_array_equal(clipped.position, wanted.position)


def test_the_disc_stops_what_flies_into_it_and_lets_slide_what_grazes() -> None:
    head_on, _ = move(np, moment((-0.4, 0.0), (2.0, 0.0)), np.zeros(2), RADIUS)
    np.testing.assert_allclose(head_on.position, [-RADIUS, 0], atol=1e-6)
    np.testing.assert_allclose(head_on.velocity, [0, 0], atol=1e-6)
    grazing, _ = move(np, moment((-0.25, 0.3), (2.0, 0.0)), np.zeros(2), RADIUS)
    normal = grazing.position / RADIUS
    np.testing.assert_allclose(np.hypot(*grazing.position), RADIUS, rtol=1e-6)
    assert grazing.velocity[0] > 1.5
    np.testing.assert_allclose(grazing.velocity @ normal, 0, atol=1e-6)
    through, _ = move(np, moment((-0.25, 0.3), (2.0, 0.0)), np.zeros(2), 0.0)
    np.testing.assert_allclose(through.velocity, [1.9, 0], rtol=1e-6)


def test_a_wall_takes_the_speed_along_its_axis_only() -> None:
    after, _ = move(np, moment((-0.95, 0.5), (-3.0, 1.0)), np.zeros(2), RADIUS)
    np.testing.assert_allclose(after.position, [-WALL, 0.595], rtol=1e-6)
    np.testing.assert_allclose(after.velocity, [0, 0.95], rtol=1e-6)


def test_around_the_disc_is_better_than_into_it_and_both_than_nothing() -> None:
    env = PointMassEnv()
    around, into = steer(env, 0.6), steer(env, 0.0)
    env.reset(seed=0)
    still = sum(env.step(np.zeros(2, np.float32))[1] for _ in range(EPISODE_STEPS))
    assert around > into + 5
    assert around > -35
    assert still < -70


def test_an_impossible_disc_raises_in_both() -> None:
    for make in (PointMassEnv, PointMass.make):
        for radius in (-0.1, point_mass.WIDEST + 0.1):
            with pytest.raises(BatchproofError, match="radius must be from 0"):
                make(radius=radius)


def test_start_and_goal_lie_outside_the_widest_disc() -> None:
    draws = np.random.default_rng(0).random((200, 4), np.float32)
    for row in draws:
        made = start(np, row)
        assert min(np.hypot(*made.position), np.hypot(*made.goal)) > point_mass.WIDEST
