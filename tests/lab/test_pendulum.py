"""Pendulum-v1 in JAX is Gymnasium's, step by step."""

from __future__ import annotations

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchproof.errors import BatchproofError
from batchproof.lab.agents import ddpg
from batchproof.lab.envs import JAX_ENVS
from batchproof.lab.envs.jax_env import make
from batchproof.lab.envs.pendulum import Pendulum, PendulumState
from batchproof.lab.nets import MLP
from batchproof.lab.off_policy import Stepper
from batchproof.lab.training import Training

EPISODES, STEPS = 3, 200
KEY = jax.random.key(0)


def start(state: np.ndarray) -> PendulumState:
    return PendulumState(jnp.asarray(state[0]), jnp.asarray(state[1]), jnp.zeros((), jnp.int32))


@pytest.mark.parametrize("g", [10.0, 9.81])
def test_a_trajectory_is_gymnasium_s_in_float64(g: float) -> None:
    """From equal states with equal float64 actions: state, reward and observation for episodes."""
    with jax.enable_x64(True):
        env, twin = gymnasium.make("Pendulum-v1", g=g).unwrapped, Pendulum.make(g=g)
        step = jax.jit(twin.step)
        rng = np.random.default_rng(0)
        speeds, angles = [], []
        for episode in range(EPISODES):
            env.reset(seed=episode)
            state = start(env.state)
            # Pushed about in its own rhythm, so that it turns over and meets the bounds.
            actions = np.sign(np.sin(np.arange(STEPS) / 4)) * rng.uniform(0.6, 1.2, STEPS)
            for action in actions:
                obs, reward, *_ = env.step(np.array([2 * action]))
                result = step(KEY, state, jnp.array([action]))
                state = result.state
                assert state.theta.dtype == jnp.float64
                np.testing.assert_allclose([state.theta, state.speed], env.state, atol=1e-10)
                np.testing.assert_allclose(result.reward, reward, atol=1e-10)
                np.testing.assert_allclose(result.obs, obs, atol=1e-6)  # Gymnasium's is float32
                speeds.append(abs(float(state.speed)))
                angles.append(abs(float(state.theta)))
        assert max(speeds) == 8  # the bound was met
        assert max(angles) > np.pi  # and it turned over


def test_each_step_is_gymnasium_s_in_float32() -> None:
    """From the same state each time; the made environment clips, scales and truncates."""
    env, twin = gymnasium.make("Pendulum-v1"), Pendulum.make()
    assert JAX_ENVS["Pendulum-v1"] is Pendulum
    spaces = env.observation_space, env.action_space
    assert [space.shape for space in spaces] == [(twin.obs_size,), (twin.action_size,)]
    step = jax.jit(twin.step)
    rng = np.random.default_rng(1)
    env.reset(seed=0)
    ends = []
    for i in range(STEPS):
        before = start(env.unwrapped.state.astype(np.float32))
        before = before._replace(steps=jnp.asarray(i, jnp.int32))
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(2 * action)
        result = step(KEY, before, jnp.asarray(action))
        assert result.obs.dtype == jnp.float32
        np.testing.assert_allclose(result.obs, obs, atol=2e-5)
        np.testing.assert_allclose(result.reward, reward, atol=2e-5)
        assert result.terminated == terminated == False  # noqa: E712
        assert result.truncated == truncated
        ends.append(truncated)
    assert np.flatnonzero(ends).tolist() == [STEPS - 1]


def test_episodes_start_where_gymnasium_s_do() -> None:
    """Uniform in angle and speed: extremes and mean square of both against Gymnasium's."""
    env = gymnasium.make("Pendulum-v1").unwrapped
    theirs = []
    for seed in range(2000):
        env.reset(seed=seed)
        theirs.append(env.state)
    states, obs = jax.vmap(Pendulum.make().reset)(jax.random.split(KEY, 20_000))
    ours = np.stack([states.theta, states.speed], axis=1)
    assert (np.abs(ours) <= [np.pi, 1]).all()
    assert (np.abs(ours).max(0) > [0.99 * np.pi, 0.99]).all()
    np.testing.assert_allclose(ours.mean(0), 0, atol=0.06)
    np.testing.assert_allclose((ours**2).mean(0), np.mean(np.square(theirs), axis=0), rtol=0.06)
    cos, sin, speed = np.asarray(obs).T
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
    np.testing.assert_array_equal(speed, states.speed)
    assert not states.steps.any()


def test_the_time_limit_can_be_shorter_but_not_longer() -> None:
    env = Pendulum.make(max_episode_steps=3)
    state, _ = env.reset(KEY)
    truncated = []
    for _ in range(3):
        result = env.step(KEY, state, jnp.zeros(1))
        state = result.state
        truncated.append(bool(result.truncated))
    assert truncated == [False, False, True]
    for steps in (0, 201, 150.5, True):
        with pytest.raises(BatchproofError, match="add --host-env"):
            Pendulum.make(max_episode_steps=steps)
    for gravity in ("abc", float("nan")):
        with pytest.raises(BatchproofError, match="cannot make environment") as caught:
            make(Pendulum, {"g": gravity})
        assert "\n" not in str(caught.value)
    training = Training(
        "ddpg", ddpg.Config(), "Pendulum-v1", env_options={"gravity": 1}, learning_starts=0
    )
    with pytest.raises(BatchproofError, match="gravity"):
        Stepper(training)


def test_the_loop_runs_it_compiled_and_on_the_host_with_equal_returns() -> None:
    """The same weights earn the same in both, up to where episodes begin: 20 episodes' mean."""
    mlp = MLP((8,))
    config = ddpg.Config(actor=mlp, critic=mlp, batch_size=4, output_bound=1.0)
    base = Training(
        "ddpg", config, "Pendulum-v1", seeds=(1,), steps=3, learning_starts=1, eval_episodes=20
    )
    returns = {}
    for host in (False, True):
        training = Training(**{**vars(base), "host_env": host})
        stepper = Stepper(training)
        returns[host] = stepper.evaluate()[0]
        stepper.close()
    spread = np.hypot(*(np.std(values) / 20**0.5 for values in returns.values()))
    assert abs(returns[False].mean() - returns[True].mean()) < 4 * spread
