"""Episodic stepping: whole episodes, on the host as in JAX, and resuming changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from batchproof.errors import BatchproofError
from batchproof.lab.agents.reinforce import Config
from batchproof.lab.envs import JAX_ENVS
from batchproof.lab.envs.jax_env import Step
from batchproof.lab.episodic import Stepper, _longest_episode, alone, collect, together
from batchproof.lab.loop import train
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import Plan

N, LONGEST = 3, 6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Countdown:
    """Episodes of ``length`` steps; the observation counts the steps, the reward is 1."""

    length: Any

    obs_size: ClassVar[int] = 1
    action_size: ClassVar[int] = 1
    max_steps: ClassVar[int] = LONGEST

    @classmethod
    def make(cls, length: int = LONGEST) -> Countdown:
        return cls(jnp.asarray(length))

    def reset(self, key: Any) -> Any:
        return jnp.zeros(()), jnp.zeros(1)

    def step(self, key: Any, state: Any, action: Any) -> Step:
        steps = state + 1
        over = steps >= self.length
        return Step(steps, steps[None], jnp.ones(()), over, jnp.asarray(False))


class CountdownEnv(gymnasium.Env):
    """The same for Gymnasium."""

    def __init__(self, length: int = LONGEST) -> None:
        self.observation_space = gymnasium.spaces.Box(0, LONGEST, (1,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self.length = length

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return np.full(1, self.steps, np.float32), 1.0, self.steps >= self.length, False, {}


for name, limit in (("Countdown-v0", LONGEST), ("Endless-v0", None)):
    gymnasium.register(f"test/{name}", CountdownEnv, max_episode_steps=limit)

CONFIG = Config(
    actor=MLP((), Norm("batch", "input")),
    plan=Plan.parse("TTEEEE"),
    episodes_per_update=N,
    baseline="linear",
)
COUNTDOWN = Training(
    "reinforce",
    CONFIG,
    "test/Countdown-v0",
    env_options=({"length": 4}, {"length": LONGEST}),
    seeds=(0, 7),
    steps=5 * N * LONGEST,
    learning_starts=0,
    eval_every=N * LONGEST,
    eval_episodes=2,
)
PENDULUM = replace(
    COUNTDOWN, env_id="Pendulum-v1", env_options={"max_episode_steps": LONGEST}, host_env=True
)
LINEAR = replace(COUNTDOWN, env_id="batchproof/LinearOutliers-v0", env_options={})
RUNS = {"jax": LINEAR, "host": PENDULUM}


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Equal programs of several steppers are compiled once."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def countdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JAX_ENVS, "test/Countdown-v0", Countdown)


@cache
def stepper(name: str) -> Stepper:
    return Stepper(RUNS[name])


def test_rows_after_an_episode_s_end_start_over_and_do_not_count() -> None:
    agent = COUNTDOWN.agent.init(CONFIG, jax.random.key(0), 1, 1)
    _, episodes = collect(COUNTDOWN, Countdown.make(4), agent, jax.random.key(1))
    np.testing.assert_array_equal(episodes.obs[:, 0, 0], [0, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(episodes.alive[:, 0], [1, 1, 1, 1, 0, 0])
    assert episodes.action.shape == (LONGEST, N, 1)


def test_the_host_collects_and_evaluates_the_same_episodes() -> None:
    found = Stepper(replace(COUNTDOWN, host_env=True))
    assert found.steps_per_update == N * LONGEST
    episodes = found._collect_on_host(0)
    for seed, length in enumerate((4, LONGEST)):
        counted = np.arange(LONGEST) % length
        np.testing.assert_array_equal(episodes.obs[seed, :, 1, 0], counted)
        np.testing.assert_array_equal(episodes.alive[seed, :, 1], np.arange(LONGEST) < length)
    np.testing.assert_array_equal(found.evaluate(), [[4, 4], [LONGEST, LONGEST]])
    found.advance(1)
    assert found.measure()["train_return"].tolist() == [4, LONGEST]


def test_steps_round_up_to_whole_batches() -> None:
    found = stepper("jax")
    batch = N * 10
    assert found.steps_per_update == batch
    told: list[int] = []
    start = found.step
    found.advance(start + 1, told.append)
    assert (found.step - start, told) == (batch, [batch])
    found.advance(start + batch, told.append)
    assert found.step == start + batch
    assert int(found.seed.agent.actor.stats["norm_input"]["count"][0]) % 11 == 0  # 10 steps, 1 pass


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    first, batch = stepper(name), stepper(name).steps_per_update
    second = Stepper(RUNS[name])
    # Compiled once for both.
    for compiled in ("_run_in_jax", "_act", "_learn", "_evaluate_act", "_evaluate_in_jax"):
        setattr(second, compiled, getattr(first, compiled))
    first.advance(first.step + batch)
    first.save(tmp_path)
    second.restore(tmp_path)
    assert second.step == first.step
    for one in (first, second):
        one.advance(one.step + 2 * batch)
    for a, b in zip(jax.tree.leaves(first.seed), jax.tree.leaves(second.seed), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.evaluate(), second.evaluate())
    assert np.abs(first.seed.agent.baseline).max() > 0


def test_an_interrupted_run_gives_what_an_undisturbed_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(LINEAR, tmp_path / "whole", progress=False)
    advance = Stepper.advance

    def interrupted(self: Stepper, last: int, *args: Any) -> None:
        if self.step >= 60:
            raise KeyboardInterrupt
        advance(self, last, *args)

    monkeypatch.setattr(Stepper, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(LINEAR, tmp_path / "parts", progress=False, checkpoint_seconds=0)
    monkeypatch.setattr(Stepper, "advance", advance)
    parts = train(LINEAR, tmp_path / "parts", progress=False)
    assert whole.metrics.keys() == parts.metrics.keys() >= {"return_together", "mean_gap", "loss"}
    for column, values in whole.metrics.items():
        np.testing.assert_array_equal(values, parts.metrics[column], err_msg=column)
    # 90 steps are asked for and a batch has 30; evaluations are due every 18.
    assert sorted(set(whole.metrics["step"].tolist())) == [30, 60, 90]


def test_evaluation_is_of_the_policy_alone_and_training_s_mode_is_kept_apart() -> None:
    plans = {
        text: (str(alone(made).config.plan), str(together(made).config.plan))
        for text in ("TTEEEE", "ETEEEE", "BTEEEE")
        for made in [replace(LINEAR, config=replace(CONFIG, plan=Plan.parse(text)))]
    }
    assert plans == {
        "TTEEEE": ("TEEEE", "tTEEEE"),
        "ETEEEE": ("TEEEE", "TEEEE"),
        "BTEEEE": ("BTEEEE", "BTEEEE"),
    }


def test_an_option_may_be_a_list() -> None:
    pytest.importorskip("mujoco")
    options = [{"healthy_z_range": [0.5, 10.0]}, {"healthy_z_range": [0.6, 10.0]}]
    assert _longest_episode("Hopper-v5", options) == 1000


def test_an_environment_without_end_is_refused() -> None:
    with pytest.raises(BatchproofError, match="has no time limit"):
        Stepper(replace(COUNTDOWN, env_id="test/Endless-v0", env_options={}, host_env=True))


def test_several_agents_are_refused() -> None:
    several = replace(COUNTDOWN, env_id="batchproof/Rally-v0", env_options={})
    with pytest.raises(BatchproofError, match="has 2 agents, but reinforce trains one"):
        Stepper(several)
