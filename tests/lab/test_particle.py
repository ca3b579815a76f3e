"""The particle tasks in JAX, step by step beside mpe2's."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchproof.errors import BatchproofError
from batchproof.lab.envs import host, parallel
from batchproof.lab.envs.particle import Reference, SpeakerListener, Spread, World

TASKS = {
    "mpe2/simple_spread": Spread,
    "mpe2/simple_speaker_listener": SpeakerListener,
    "mpe2/simple_reference": Reference,
}


def world_of(theirs: Any, steps: int) -> World:
    """The state of mpe2's environment."""
    world = theirs.unwrapped.world
    goals = [getattr(agent, "_goal_b", None) for agent in world.agents]
    return World(
        place=np.stack([agent.state.p_pos for agent in world.agents]),
        speed=np.stack([agent.state.p_vel for agent in world.agents]),
        landmarks=np.stack([landmark.state.p_pos for landmark in world.landmarks]),
        goals=np.asarray([world.landmarks.index(goal) if goal else 0 for goal in goals]),
        said=np.stack([agent.state.c for agent in world.agents]),
        steps=np.asarray(steps),
    )


@pytest.mark.parametrize("env_id", TASKS)
def test_a_task_equals_mpe2_step_by_step(env_id: str) -> None:
    ours = TASKS[env_id].make()
    theirs = import_module(parallel._mpe2_module(env_id)).parallel_env(continuous_actions=True)
    joint = parallel.JointEnv(env_id, theirs, "sum")
    assert ours.layout == joint.layout
    assert (ours.obs_size, ours.action_size) == (
        sum(ours.layout.obs_sizes),
        len(joint.action_space.low),
    )
    step = jax.jit(lambda state, action: ours.step(jax.random.key(0), state, action))
    rng, collisions = np.random.default_rng(0), 0
    for episode in range(4):
        joint.reset(seed=episode)
        world = theirs.unwrapped.world
        if episode:  # crowded, so that they collide
            for agent in world.agents:
                agent.state.p_pos = rng.uniform(-0.2, 0.2, 2)
        state = jax.tree.map(lambda leaf: jnp.asarray(leaf, _dtype(leaf)), world_of(theirs, 0))
        np.testing.assert_allclose(ours._observe(state), theirs.unwrapped.state(), atol=1e-6)
        for number in range(1, 26):
            action = rng.uniform(-1, 1, ours.action_size).astype(np.float32)
            obs, reward, terminated, truncated, _ = joint.step(0.5 * (action + 1))
            result = step(state, action)
            state = result.state
            np.testing.assert_allclose(result.obs, obs, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(result.reward, reward, rtol=1e-4, atol=1e-4)
            assert (terminated, truncated) == (bool(result.terminated), bool(result.truncated))
            assert truncated == (number == 25)
            places = world_of(theirs, number).place
            gaps = np.linalg.norm(places[:, None] - places, axis=-1) + np.eye(len(places))
            collisions += int(gaps.min() < 0.3)
            # Each step anew from their state: collisions are stiff, and float32 would drift.
            state = jax.tree.map(
                lambda leaf: jnp.asarray(leaf, _dtype(leaf)), world_of(theirs, number)
            )
    joint.close()
    assert collisions > 5 or env_id != "mpe2/simple_spread"


def _dtype(leaf: np.ndarray) -> Any:
    return jnp.int32 if np.issubdtype(leaf.dtype, np.integer) else jnp.float32


@pytest.mark.parametrize("env_id", TASKS)
def test_a_reset_draws_as_mpe2_does(env_id: str) -> None:
    worlds, obs = jax.vmap(TASKS[env_id].make().reset)(jax.random.split(jax.random.key(0), 2000))
    for places in (worlds.place, worlds.landmarks):
        assert -1 <= places.min() < -0.99 < 0.99 < places.max() <= 1
        assert np.abs(np.mean(places, axis=0)).max() < 0.07
    assert (worlds.speed == 0).all()
    assert (worlds.said == 0).all()
    counts = [np.bincount(goals, minlength=3) for goals in worlds.goals.T]
    assert np.min(counts) > 550
    theirs = host.make(env_id, {})
    wanted = np.stack([theirs.reset(seed=seed)[0] for seed in range(300)])
    np.testing.assert_allclose(np.mean(obs, axis=0), wanted.mean(0), atol=0.2)
    np.testing.assert_allclose(np.std(obs, axis=0), wanted.std(0), atol=0.15)


@pytest.mark.parametrize("task", TASKS.values())
def test_an_option_out_of_range_raises(task: Any) -> None:
    assert task.make(max_cycles=7).limit == 7
    for max_cycles in (0, 26, 10.5, True):
        with pytest.raises(BatchproofError, match="add --host-env"):
            task.make(max_cycles=max_cycles)
