"""The constant-reward environment: a good Gymnasium citizen, and the same one in JAX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from batchproof.envs import ENTRY_POINTS, register_envs
from batchproof.envs.constant_reward import EPISODE_STEPS, ConstantRewardEnv
from batchproof.errors import BatchproofError
from batchproof.lab.envs import JAX_ENVS
from batchproof.lab.envs.constant_reward import ConstantReward

ID = "batchproof/ConstantReward-v0"
register_envs()

both_endings = pytest.mark.parametrize("ending", ["terminated", "truncated"])


@both_endings
def test_gymnasium_s_own_checks_pass(ending: str) -> None:
    check_env(gymnasium.make(ID, ending=ending).unwrapped)


def test_gymnasium_imports_the_package_by_the_id_s_prefix(tmp_path: Path) -> None:
    script = f"""
import gymnasium
env = gymnasium.make("batchproof.envs:{ID}", ending="truncated")
env.reset(seed=0)
for step in range({EPISODE_STEPS}):
    obs, reward, terminated, truncated, info = env.step([0.25])
print(obs, reward, terminated, truncated)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout == "[0. 0. 0.] 0.25 False True\n"


def test_registering_twice_changes_nothing() -> None:
    register_envs()
    specs = {name: gymnasium.registry[name] for name in ENTRY_POINTS}
    register_envs()
    assert all(gymnasium.registry[name] is spec for name, spec in specs.items())


@both_endings
def test_an_episode_pays_its_actions_and_ends_once(ending: str) -> None:
    env = ConstantRewardEnv(ending)
    total = 0.0
    for episode in range(2):
        env.reset(seed=episode)
        for step in range(1, EPISODE_STEPS + 1):
            obs, reward, terminated, truncated, _ = env.step(np.ones(1, np.float32))
            total += reward
            np.testing.assert_array_equal(obs, np.zeros(3, np.float32))
            last = step == 30
            assert terminated == (last and ending == "terminated")
            assert truncated == (last and ending == "truncated")
    assert total == 2 * 30  # the best return is 30 an episode


@both_endings
def test_the_jax_environment_equals_it_step_by_step(ending: str) -> None:
    assert JAX_ENVS[ID] is ConstantReward
    env, twin = gymnasium.make(ID, ending=ending), ConstantReward.make(ending=ending)
    spaces = env.observation_space, env.action_space
    assert [space.shape for space in spaces] == [(twin.obs_size,), (twin.action_size,)]
    step = jax.jit(twin.step)
    key = jax.random.key(0)
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    state, twin_obs = twin.reset(key)
    np.testing.assert_array_equal(obs, twin_obs)
    episodes = 0
    for _ in range(4 * EPISODE_STEPS + 7):
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        result = step(key, state, jnp.asarray(action))
        state = result.state
        assert result.obs.dtype == obs.dtype
        np.testing.assert_array_equal(result.obs, obs)
        assert np.float32(reward) == result.reward
        assert terminated == result.terminated
        assert truncated == result.truncated
        if terminated or truncated:
            episodes += 1
            env.reset()
            state, _ = twin.reset(key)
    assert episodes == 4


def test_an_unknown_ending_raises() -> None:
    with pytest.raises(BatchproofError, match="use one of terminated, truncated"):
        ConstantRewardEnv("never")
    with pytest.raises(BatchproofError, match="unknown ending 'never'"):
        ConstantReward.make(ending="never")
