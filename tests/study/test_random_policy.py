"""The random policy's return: known values, and the same on the host as in JAX."""

import numpy as np
import pytest

from batchproof.lab.envs import JAX_ENVS
from batchproof.study.random_policy import random_returns


def test_the_constant_reward_s_is_the_sum_of_thirty_uniform_actions():
    found = random_returns("batchproof/ConstantReward-v0", 4000)
    assert found.shape == (4000,)
    assert found.mean() == pytest.approx(0, abs=0.2)  # standard error 0.05
    assert found.std() == pytest.approx(np.sqrt(30 / 3), rel=0.05)


def test_the_host_s_environments_give_the_same_mean(monkeypatch):
    name = "batchproof/PointMass-v0"
    in_jax = random_returns(name, 2000)
    monkeypatch.delitem(JAX_ENVS, name)
    on_host = random_returns(name, 100)
    assert on_host.mean() == pytest.approx(
        in_jax.mean(), abs=4 * in_jax.std() / np.sqrt(len(on_host))
    )
    np.testing.assert_array_equal(random_returns(name, 3), random_returns(name, 3))


@pytest.mark.parametrize("host", [False, True])
def test_options_reach_the_environment(monkeypatch, host):
    name = "Pendulum-v1"
    if host:
        monkeypatch.delitem(JAX_ENVS, name)
    whole, short = (random_returns(name, 5, options={"max_episode_steps": n}) for n in (200, 20))
    assert short.mean() > whole.mean() / 5  # costs of a tenth of the steps
