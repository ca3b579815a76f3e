"""Environments on the host: observations in parts, and the DeepMind Control Suite."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from batchproof.errors import BatchproofError
from batchproof.lab.envs import host


class Parts(gymnasium.Env):
    """Observations in parts, as the DeepMind Control Suite gives them."""

    observation_space = spaces.Dict(
        {
            "velocity": spaces.Box(-np.inf, np.inf, (2,)),
            "body": spaces.Dict({"height": spaces.Box(-np.inf, np.inf, ())}),
        }
    )
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        parts = {"velocity": np.float32([2, 3]), "body": {"height": np.float32(1)}}
        return parts, {}


def test_observations_in_parts_come_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gymnasium, "make", lambda env_id, **options: Parts())
    env = host.make("Parts-v0", {})
    assert env.observation_space.shape == (3,)
    assert env.reset()[0].tolist() == [1, 2, 3]

    labelled = spaces.Dict({"label": spaces.Discrete(3)})
    monkeypatch.setattr(Parts, "observation_space", labelled)
    with pytest.raises(BatchproofError, match="has a Dict observation space, but the lab needs"):
        host.make("Parts-v0", {})


def test_the_control_suite_names_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BatchproofError, match=r"pip install 'batchproof\[dmc\]'"):
        host.make("dm_control/pendulum-swingup-v0", {})


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("dm_control", "shimmy"))), reason="needs dm-control"
)
def test_an_episode_of_the_control_suite_continues_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disable")
    envs = host.HostEnvs("dm_control/cheetah-run-v0", [{}, {}], [0, 7], host.TRAIN)
    envs.reset()
    rng = np.random.default_rng(0)
    for _ in range(1040):  # past an episode's end, at 1000
        result = envs.step(rng.uniform(-1, 1, (2, envs.action_size)).astype(np.float32))
    again = host.HostEnvs("dm_control/cheetah-run-v0", [{}, {}], [0, 7], host.TRAIN)
    np.testing.assert_array_equal(again.restore(envs.state()), result.obs)


@pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="needs MuJoCo")
def test_mujoco_warns_in_python_and_leaves_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mujoco

    monkeypatch.chdir(tmp_path)
    mujoco.set_mju_user_warning(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what this version says of the cheetah's model
        env = host.make("HalfCheetah-v5", {}).unwrapped
    env.data.qpos[:] = np.nan
    with pytest.warns(UserWarning, match="MuJoCo: .*QPOS"):
        mujoco.mj_step(env.model, env.data)
    env.data.qpos[:] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # raised within the engine it would end the process
        mujoco.mj_step(env.model, env.data)
    env.close()
    assert list(tmp_path.iterdir()) == []
