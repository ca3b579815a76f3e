"""Several agents as one: the layout, PettingZoo's environments, and the loop over both."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from mpe2 import simple_reference_v3, simple_speaker_listener_v4, simple_spread_v3

from batchproof.envs.rally import parallel_env as rally_env
from batchproof.errors import BatchproofError
from batchproof.lab import checkpoint, off_policy, replay
from batchproof.lab.agents import maddpg, td3
from batchproof.lab.envs import host, parallel
from batchproof.lab.envs.host import EVALUATE, TRAIN, HostEnvs
from batchproof.lab.envs.layout import Layout
from batchproof.lab.loop import read_metrics, train
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import Plan

MPE2 = {
    "mpe2/simple_spread": simple_spread_v3,
    "mpe2/simple_speaker_listener": simple_speaker_listener_v4,
    "mpe2/simple_reference": simple_reference_v3,
}


# --- joining --------------------------------------------------------------------------------------


class Pair:
    """A PettingZoo parallel environment of two unequal agents, whose every number is known."""

    possible_agents = ("a", "b")

    def __init__(self, ends: tuple[bool, bool] = (False, False)) -> None:
        self.ends = ends
        self.got: dict[str, np.ndarray] = {}
        self.spaces: dict[str, Any] = {
            "a": gymnasium.spaces.Box(-2, 2, (2,)),
            "b": gymnasium.spaces.Box(0, 1, (1, 1)),
        }

    def observation_space(self, agent: str) -> Any:
        return gymnasium.spaces.Box(-1, 1, (1,) if agent == "a" else (2, 1))

    def action_space(self, agent: str) -> Any:
        return self.spaces[agent]

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        return {"b": np.asarray([[2.0], [3.0]]), "a": np.asarray([1.0])}, {}

    def step(self, actions: dict[str, np.ndarray]) -> Any:
        self.got = actions
        obs, _ = self.reset()
        ends = dict(zip("ab", self.ends, strict=True))
        return obs, {"b": 20.0, "a": 10.0}, ends, {"a": False, "b": False}, {}

    def close(self) -> None: ...


def made_by(monkeypatch: pytest.MonkeyPatch, env: Any) -> str:
    """The id of ``env``."""
    module = ModuleType("tests_pair")
    module.parallel_env = lambda: env
    monkeypatch.setitem(sys.modules, "tests_pair", module)
    return "tests_pair:parallel_env"


def test_agents_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    envs = HostEnvs(made_by(monkeypatch, pair), [{}], [0], TRAIN)
    assert envs.layout == Layout(("a", "b"), (1, 2), (2, 1), "sum")
    np.testing.assert_array_equal(envs.reset(), [[1, 2, 3]])
    step = envs.step(np.asarray([[-1, 0.5, 0]], np.float32))
    assert {name: action.tolist() for name, action in pair.got.items()} == {
        "a": [-2, 1],
        "b": [[0.5]],
    }
    np.testing.assert_array_equal(step.reward, [[10, 20]])
    assert (step.terminated.tolist(), step.ended.tolist()) == ([False], [False])


def test_a_layout_splits_and_scores() -> None:
    layout = Layout(("a", "b"), (1, 2), (2, 1), "max")
    values = np.arange(6).reshape(2, 3)
    assert [part.tolist() for part in layout.split_obs(values)] == [[[0], [3]], [[1, 2], [4, 5]]]
    assert [part.shape for part in layout.split_actions(values)] == [(2, 2), (2, 1)]
    returns = np.asarray([[1.0, 5.0], [2.0, -4.0]])
    for score, wanted in {"max": [5, 2], "sum": [6, -2], "mean": [3, -1]}.items():
        assert replace(layout, score=score).score_of(returns).tolist() == wanted
    assert jax.tree.leaves(layout) == []


def test_agents_that_end_one_by_one_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    envs = HostEnvs(made_by(monkeypatch, Pair(ends=(True, False))), [{}], [0], TRAIN)
    envs.reset()
    with pytest.raises(BatchproofError, match="one by one"):
        envs.step(np.zeros((1, 3), np.float32))


@pytest.mark.parametrize(
    ("space", "part"),
    [
        (gymnasium.spaces.Discrete(3), "Discrete"),
        (gymnasium.spaces.Box(-np.inf, np.inf, (1,)), "unbounded actions"),
    ],
)
def test_other_spaces_raise(space: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    pair.spaces["b"] = space
    with pytest.raises(BatchproofError, match=part):
        host.make(made_by(monkeypatch, pair), {})


@pytest.mark.parametrize("env_id", MPE2)
def test_mpe2_is_stepped_as_its_users_do(env_id: str) -> None:
    envs = HostEnvs(env_id, [{}], [7], EVALUATE)
    theirs = MPE2[env_id].parallel_env(continuous_actions=True)
    assert envs.layout is not None
    assert envs.layout.names == tuple(theirs.possible_agents)
    assert envs.layout.score == "sum"
    seed = np.random.SeedSequence([7, EVALUATE, 2]).generate_state(1)[0]
    obs, _ = theirs.reset(seed=int(seed))
    joined = envs.reset(2)
    rng = np.random.default_rng(0)
    for _ in range(25):
        np.testing.assert_array_equal(joined[0], np.concatenate(list(obs.values())))
        actions = rng.uniform(-1, 1, (1, envs.action_size)).astype(np.float32)
        split = envs.layout.split_actions((actions[0].astype(float) + 1) / 2)
        obs, rewards, *_ = theirs.step(
            {name: part.astype(np.float32) for name, part in zip(obs, split, strict=True)}
        )
        result = envs.step(actions)
        np.testing.assert_allclose(result.reward[0], list(rewards.values()), rtol=1e-6)
        joined = result.next_obs
    assert (result.ended.tolist(), result.terminated.tolist()) == ([True], [False])
    envs.close()


def test_the_installed_version_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["simple_v3", "simple_spread_v9", "simple_spread_v10", "simple_spread"]
    monkeypatch.setattr(
        parallel.pkgutil, "iter_modules", lambda path: [SimpleNamespace(name=n) for n in names]
    )
    assert parallel._mpe2_module("mpe2/simple_spread") == "mpe2.simple_spread_v10"
    assert parallel._mpe2_module("mpe2/simple_spread_v9") == "mpe2.simple_spread_v9"
    with pytest.raises(BatchproofError, match="did you mean mpe2/simple_spread"):
        parallel._mpe2_module("mpe2/simple_spraed")


@pytest.mark.parametrize(
    ("env_id", "options", "part"),
    [
        ("mpe2/simple_spread", {"n": 2}, "unexpected keyword argument 'n'"),
        ("mpe2/simple_spread", {"continuous_actions": False}, "Discrete"),
        ("no.such.module:parallel_env", {}, "No module named 'no'"),
        ("json:parallel_env", {}, "has no attribute 'parallel_env'"),
    ],
)
def test_a_wrong_environment_raises(env_id: str, options: dict[str, Any], part: str) -> None:
    with pytest.raises(BatchproofError, match=part):
        host.make(env_id, options)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "mpe2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(parallel, "import_module", without)
    with pytest.raises(BatchproofError, match=r"needs mpe2: pip install 'batchproof\[marl\]'"):
        host.make("mpe2/simple_spread", {})


@pytest.mark.parametrize("env_id", ["mpe2/simple_reference", "batchproof/Rally-v0"])
def test_host_environments_continue_their_episodes_exactly(env_id: str) -> None:
    rng = np.random.default_rng(0)
    envs = HostEnvs(env_id, [{}, {}], [0, 3], TRAIN)
    envs.reset()
    for _ in range(37):
        step = envs.step(rng.uniform(-1, 1, (2, envs.action_size)).astype(np.float32))
    state = json.loads(json.dumps(envs.state()))
    assert min(len(taken) for taken in state["taken"]) > 0
    others = HostEnvs(env_id, [{}, {}], [0, 3], TRAIN)
    np.testing.assert_array_equal(others.restore(state), step.obs)
    for _ in range(30):  # over the end of an episode
        actions = rng.uniform(-1, 1, (2, envs.action_size)).astype(np.float32)
        for one, two in zip(envs.step(actions), others.step(actions), strict=True):
            np.testing.assert_array_equal(one, two)


# --- the loop -------------------------------------------------------------------------------------

# Acting in mode T moves the actors' statistics, which a resumed run must have as well.
NORMED, PLAIN = MLP((8,), Norm("batch")), MLP((8,))
MADDPG = maddpg.Config(actor=NORMED, critic=PLAIN, plan=Plan.parse("TTEETE"), batch_size=16)
RALLY = Training(
    "maddpg",
    MADDPG,
    "batchproof/Rally-v0",
    env_options={"max_steps": 20},
    seeds=(0, 5),
    steps=120,
    learning_starts=40,
    buffer_size=64,
    update_every=25,
    eval_every=30,
    eval_episodes=3,
)
RUNS = {"jax": RALLY, "host": replace(RALLY, host_env=True)}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile each program once: a run that resumes would compile it anew."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield


class Killed(BaseException):
    """Stands for a kill: only the files are left."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name == "jax" else []) for name in RUNS]
)
def test_a_run_that_was_killed_equals_one_that_never_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[int, np.ndarray] = {}
    updates: list[np.ndarray] = []
    save = checkpoint.save_checkpoint

    def save_and_keep(folder: Path, step: int, tree: Any, extra: dict[str, Any]) -> None:
        if isinstance(tree, off_policy.Seed):
            rows[step] = np.array(tree.rows)
        else:
            updates.append(np.array(tree["agent"].actor_optimizers[1][0].count))
        save(folder, step, tree, extra)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_and_keep)
    whole = train(RUNS[name], tmp_path / "whole", progress=False, checkpoint_seconds=0)
    assert [seed["status"] for seed in whole.seeds] == ["ok", "ok"]
    # One update after 50, 75 and 100 environment steps.
    assert updates[0].tolist() == [3, 3]
    assert np.isnan(whole.metrics["critic_loss"][whole.metrics["step"] == 30]).all()

    def save_and_die(folder: Path, step: int, *rest: Any) -> None:
        save(folder, step, *rest)
        if step == 60:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            train(RUNS[name], tmp_path / "killed", progress=False, checkpoint_seconds=0)
    again = train(RUNS[name], tmp_path / "killed", progress=False)
    for column, values in whole.metrics.items():
        np.testing.assert_array_equal(again.metrics[column], values, err_msg=column)
    assert again.seeds == whole.seeds
    arrays = [
        (tmp_path / run / "checkpoint").glob("*.safetensors").__next__().read_bytes()
        for run in ("whole", "killed")
    ]
    assert arrays[0] == arrays[1]
    assert read_metrics(tmp_path / "killed" / "metrics.parquet").keys() == whole.metrics.keys()

    # What is stored are the rally's transitions, with a reward for each agent.
    stored = replay.sample(jnp.asarray(rows[60][0]), jax.random.key(0), 60, 500, 48, agents=2)
    assert stored.reward.shape == (500, 2)
    assert set(np.unique(np.round(stored.reward, 6))) <= {np.float32(v) for v in (-0.01, 0, 0.1)}
    ends = np.asarray(stored.terminated) == 1
    # An end costs one agent .01; the moments of an observation have moved on by one.
    np.testing.assert_allclose(np.asarray(stored.reward)[ends].min(axis=1), -0.01)
    obs, next_obs = (np.asarray(x).reshape(-1, 2, 3, 8) for x in (stored.obs, stored.next_obs))
    np.testing.assert_array_equal(obs[:, :, 1:], next_obs[:, :, :2])
    np.testing.assert_allclose(
        next_obs[~ends][:, :, -1, 0],
        np.clip(
            obs[~ends][:, :, -1, 0] + 0.4 * np.asarray(stored.action)[~ends][:, ::2], -4.5, -0.5
        ),
        atol=1e-5,
    )


def test_the_return_is_the_score_of_the_agents_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = off_policy.Stepper(RUNS["host"])
    returns = np.random.default_rng(0).normal(size=(2, 3, 2))
    monkeypatch.setattr(stepper, "_returns", lambda: returns)
    np.testing.assert_array_equal(stepper.evaluate(), returns.max(axis=2))
    stepper.close()


@pytest.mark.parametrize(
    ("training", "part"),
    [
        (replace(RALLY, algo="td3", config=td3.Config()), "has 2 agents, but td3 trains one"),
        (replace(RALLY, env_id="Pendulum-v1", env_options={}), "has one agent, but maddpg trains"),
    ],
)
def test_one_agent_or_several_must_fit(training: Training, part: str) -> None:
    for make in (off_policy.check_env, off_policy.Stepper):
        with pytest.raises(BatchproofError, match=part):
            make(training)


def test_options_of_an_environment_in_jax_are_checked() -> None:
    off_policy.check_env(RALLY)
    with pytest.raises(BatchproofError, match=r"argument 'N'.*--host-env"):
        off_policy.check_env(replace(RALLY, env_id="mpe2/simple_spread", env_options={"N": 2}))


def test_blocks_of_updates_follow_the_multiples() -> None:
    for every, starts in ((1, 0), (1, 7), (4, 0), (4, 7), (4, 8), (50, 3)):
        training = replace(RALLY, update_every=every, learning_starts=starts)
        multiples = [n for n in range(1, 121) if n % every == 0 and n > starts]
        for step in range(starts, 121):
            wanted = sum(n <= step for n in multiples)
            assert training.blocks_before(step) == wanted
    with pytest.raises(BatchproofError, match="leaves no update"):
        replace(RALLY, update_every=70, learning_starts=80)


def test_a_pause_between_updates_does_not_copy_the_replay() -> None:
    config = td3.Config(actor=MLP((4,)), critic=MLP((4,)), batch_size=4)
    training = Training(
        "td3", config, "batchproof/ConstantReward-v0", steps=100_000, update_every=10
    )
    stepper = off_policy.Stepper(training)
    # Buffers are the same without optimized kernels, which take long to compile.
    quick = {"xla_backend_optimization_level": 0}
    compiled = stepper._run_in_jax.lower(stepper.seed, 0, 1000).compile(compiler_options=quick)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * stepper.seed.rows.nbytes


def test_the_host_and_jax_agree_on_the_agents() -> None:
    envs = HostEnvs("batchproof/Rally-v0", [{}], [0], TRAIN)
    assert envs.layout == off_policy.JAX_ENVS["batchproof/Rally-v0"].layout
    assert rally_env().possible_agents == list(envs.layout.names)
