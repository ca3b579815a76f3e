"""pendulum-swingup without MuJoCo: dm_control's numbers, and both of our versions equal."""

from __future__ import annotations

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from batchproof.envs import register_envs
from batchproof.envs.pendulum_swingup import (
    EPISODE_STEPS,
    GRAVITY,
    LENGTH,
    MASS,
    MAX_SPEED,
    PendulumSwingupEnv,
    SwingupState,
    move,
    observe,
)
from batchproof.errors import BatchproofError
from batchproof.lab.envs import JAX_ENVS
from batchproof.lab.envs.pendulum_swingup import PendulumSwingup

ID = "batchproof/PendulumSwingup-v0"
KEY = jax.random.key(0)
register_envs()

# dm_control 1.0.50 on MuJoCo 3.17.0, from rest at an angle, with the actions of `drive`:
# (steps done, vertical, horizontal, speed), and the steps with reward 1.
RECORDED = {
    3.0: (
        (
            (1, -0.9901463422644367, 0.14003649845792823, 0.054718864785268675),
            (10, -0.998176122219819, 0.06036910658776601, 0.8067556319048587),
            (100, -0.775147977284122, -0.6317797189783272, 3.132486107615371),
            (500, -0.5752868742722008, -0.8179517175788072, -2.966831950815137),
            (1000, -0.5976927296621848, -0.8017252652305319, 4.397951834720775),
        ),
        0,
    ),
    0.05: (
        (
            (1, 0.9987308141770271, 0.05036626662054766, 0.019379274725112815),
            (10, 0.99493137290425, 0.10055626887899162, 0.5980575478066216),
            (100, -0.4748911522495978, 0.8800445406427161, -1.4993018482847433),
            (500, -0.14837528744099598, -0.9889311270643684, -2.5462596694477617),
            (1000, -0.6470343931625766, -0.7624608147732815, 4.710563091261795),
        ),
        12,
    ),
}


def drive(step: int) -> float:
    """In the pole's own rhythm, beyond the motor's limits at times."""
    return 1.3 * np.sin(0.085 * step)


@pytest.mark.parametrize("theta", RECORDED)
def test_an_episode_is_dm_control_s(theta: float) -> None:
    moments, rewarded = RECORDED[theta]
    state, paid, found = SwingupState(np.float64(theta), np.float64(0), 0), [], {}
    for step in range(EPISODE_STEPS):
        state, reward = move(np, state, drive(step))
        found[state.steps] = observe(np, state)
        paid.append(reward)
    for step, *expected in moments:
        np.testing.assert_allclose(found[step], expected, atol=1e-10)
    assert sum(paid) == rewarded


def test_gymnasium_s_own_checks_pass_and_it_is_registered() -> None:
    check_env(gymnasium.make(ID).unwrapped)
    assert JAX_ENVS[ID] is PendulumSwingup
    env, twin = gymnasium.make(ID), PendulumSwingup.make()
    spaces = env.observation_space, env.action_space
    assert [space.shape for space in spaces] == [(twin.obs_size,), (twin.action_size,)]


def test_both_versions_are_equal_step_by_step_in_float64() -> None:
    with jax.enable_x64(True):
        env, twin = gymnasium.make(ID), PendulumSwingup.make()
        step = jax.jit(twin.step)
        env.reset(seed=3)
        theirs = SwingupState(np.float64(0.05), np.float64(0), 0)
        env.unwrapped.state = theirs
        state = SwingupState(*map(jnp.asarray, theirs))._replace(steps=jnp.zeros((), jnp.int32))
        rng = np.random.default_rng(0)
        ends, rewards, angles = [], [], []
        for i in range(EPISODE_STEPS):
            action = rng.uniform(-0.5, 0.5) + drive(i)
            obs, reward, terminated, truncated, _ = env.step(np.array([action]))
            result = step(KEY, state, jnp.array([action]))
            state = result.state
            np.testing.assert_allclose(
                [state.theta, state.speed], env.unwrapped.state[:2], rtol=0, atol=1e-9
            )
            np.testing.assert_allclose(result.obs, obs, atol=1e-6)  # Gymnasium's is float32
            assert env.observation_space.contains(obs)
            assert result.reward == reward
            assert result.terminated == terminated == False  # noqa: E712
            assert result.truncated == truncated
            ends.append(truncated)
            rewards.append(reward)
            angles.append(abs(float(state.theta)))
        assert np.flatnonzero(ends).tolist() == [EPISODE_STEPS - 1]
        assert max(angles) > np.pi  # it hung on both sides
        assert {0.0, 1.0} == set(rewards)


@pytest.mark.parametrize("repeat", [2, 4])
def test_a_repeated_action_is_as_many_steps_in_both_versions(repeat: int) -> None:
    with jax.enable_x64(True):
        env = gymnasium.make(ID, max_steps=40, repeat=repeat)
        plain, twin = gymnasium.make(ID, max_steps=40), PendulumSwingup.make(40, repeat)
        step = jax.jit(twin.step)
        start = SwingupState(np.float64(0.1), np.float64(0), 0)  # upright at first
        for one in (env, plain):
            one.reset(seed=0)
            one.unwrapped.state = start
        state = SwingupState(*map(jnp.asarray, start))._replace(steps=jnp.zeros((), jnp.int32))
        rewards, ends = [], []
        for i in range(40 // repeat):
            action = np.array([drive(i)])
            obs, reward, _, truncated, _ = env.step(action)
            paid = [plain.step(action) for _ in range(repeat)]
            result = step(KEY, state, jnp.asarray(action))
            state = result.state
            np.testing.assert_array_equal(obs, paid[-1][0])
            np.testing.assert_allclose(result.obs, obs, atol=1e-6)
            assert result.reward == reward == sum(one[1] for one in paid)
            assert result.truncated == truncated == paid[-1][3]
            rewards.append(reward)
            ends.append(truncated)
        assert max(rewards) == repeat
        assert np.flatnonzero(ends).tolist() == [40 // repeat - 1]


@pytest.mark.parametrize("repeat", [0, -1, 3, 1.5, 2.0, "two", 2000])
def test_an_action_lasts_for_a_part_of_the_episode(repeat: object) -> None:
    for made in (PendulumSwingupEnv, PendulumSwingup.make):
        with pytest.raises(BatchproofError, match="whole number"):
            made(repeat=repeat)


def test_float32_stays_close_for_a_step_and_types_stay() -> None:
    twin = PendulumSwingup.make()
    state, obs = twin.reset(KEY)
    result = jax.jit(twin.step)(KEY, state, jnp.array([0.7]))
    moved, _ = move(np, SwingupState(*(np.float64(value) for value in state[:2]), 0), 0.7)
    np.testing.assert_allclose(result.obs, observe(np, moved), atol=1e-6)
    assert result.obs.dtype == obs.dtype == jnp.float32
    assert [leaf.dtype for leaf in result.state] == [leaf.dtype for leaf in state]


def test_episodes_start_at_rest_anywhere() -> None:
    states, obs = jax.vmap(PendulumSwingup.make().reset)(jax.random.split(KEY, 20_000))
    env = PendulumSwingupEnv()
    theirs = np.array([env.reset(seed=seed)[0] for seed in range(500)])
    for theta in (np.asarray(states.theta), np.arctan2(theirs[:, 1], theirs[:, 0])):
        assert 0.98 * np.pi < np.abs(theta).max() <= np.pi + 1e-6
        assert abs(theta.mean()) < 0.3
        np.testing.assert_allclose((theta**2).mean(), np.pi**2 / 3, rtol=0.1)
    assert not states.speed.any()
    assert not theirs[:, 2].any()
    np.testing.assert_array_equal(obs[:, 2], 0)


def test_reward_is_within_eight_degrees() -> None:
    for degrees, expected in ((0, 1), (7.9, 1), (-7.9, 1), (8.1, 0), (180, 0), (367.9, 1)):
        theta = np.deg2rad(degrees)
        against_gravity = -MASS * GRAVITY * LENGTH * np.sin(theta)
        moved, reward = move(np, SwingupState(theta, 0.0, 0), against_gravity)
        assert moved.theta == theta
        assert reward == expected


def test_no_torque_drives_it_beyond_the_bound_of_its_speed() -> None:
    state = SwingupState(np.float64(0), np.float64(MAX_SPEED), 0)
    for _ in range(50):
        state, _ = move(np, state, 5.0)
        assert abs(state.speed) <= MAX_SPEED


@pytest.mark.parametrize("steps", [0, 1001])
def test_the_time_limit_can_be_shorter_but_not_longer(steps: int) -> None:
    for make in (PendulumSwingup.make, PendulumSwingupEnv):
        with pytest.raises(BatchproofError, match="from 1 to 1000"):
            make(max_steps=steps)
    env = PendulumSwingup.make(max_steps=1)
    assert env.step(KEY, env.reset(KEY)[0], jnp.zeros(1)).truncated
