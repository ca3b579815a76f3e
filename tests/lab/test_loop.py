"""The training loop: what it stores, when it learns, and that being killed changes nothing.

Run as a program it is the victim: ``test_loop.py RUN FOLDER POINT`` trains RUN in FOLDER and kills
itself, as an out-of-memory killer would, when it comes to POINT.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file

from batchproof import records
from batchproof.envs.constant_reward import ConstantRewardEnv
from batchproof.errors import BatchproofError
from batchproof.lab import checkpoint, loop, off_policy, replay
from batchproof.lab.agents import sac, td3
from batchproof.lab.envs import JAX_ENVS
from batchproof.lab.envs.constant_reward import ConstantReward
from batchproof.lab.envs.host import TRAIN, HostEnvs
from batchproof.lab.envs.jax_env import Step
from batchproof.lab.loop import train
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import Plan

ID = "batchproof/ConstantReward-v0"
STEPS, STARTS, EVERY, ROWS = 120, 40, 30, 64
LIMIT = 25  # steps of a host episode, so that truncations fall between evaluations

# Acting in mode T moves the actor's statistics, so a careless evaluation would leave traces.
SMALL = MLP((16, 16), Norm("batch"))
TD3 = td3.Config(actor=SMALL, critic=SMALL, plan=Plan.parse("TTEETE"), batch_size=16)
SAC = sac.Config(actor=SMALL, critic=SMALL, batch_size=16)
IN_JAX = Training(
    "td3",
    TD3,
    ID,
    seeds=(0, 5),
    steps=STEPS,
    learning_starts=STARTS,
    buffer_size=ROWS,
    gradient_steps=2,
    eval_every=EVERY,
)
PENDULUM = replace(
    IN_JAX,
    env_id="Pendulum-v1",
    env_options={"max_episode_steps": LIMIT},
    gradient_steps=1,
    host_env=True,
)
CHEETAH = replace(PENDULUM, algo="sac", config=SAC, env_id="HalfCheetah-v5", seeds=(3,))
RUNS = {"jax": IN_JAX, "pendulum": PENDULUM, "cheetah": CHEETAH}
needs_mujoco = pytest.mark.skipif(find_spec("mujoco") is None, reason="needs MuJoCo")
ENGINES = ["jax", "pendulum", pytest.param("cheetah", marks=needs_mujoco)]


# --- dying ------------------------------------------------------------------------------------

# By run, where its victims die: each goes on from where the one before was killed. The value is
# the step of the checkpoint that is left.
POINTS = {
    "jax": {"after a checkpoint": 30, "in an interval": 60, "between the files": 60},
    "pendulum": {"in an interval": 60, "between the files": 60},
    "cheetah": {"in an interval": 60},
}
MIDDLE = 75  # environment steps: between the evaluations at 60 and 90


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DeadlyBar:
    """A progress bar that kills the process once ``MIDDLE`` is passed."""

    def __init__(self, *, initial: int, **_: Any) -> None:
        self.step = initial

    def __enter__(self) -> DeadlyBar:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

    def update(self, steps: int) -> None:
        self.step += steps
        if self.step > MIDDLE:
            die()


def be_killed(name: str, out: Path, point: str) -> None:
    """Train until ``point``."""
    save = checkpoint.save_checkpoint

    def save_and_die(*args: Any) -> None:
        save(*args)
        die()

    if point == "after a checkpoint":
        checkpoint.save_checkpoint = save_and_die
    elif point == "in an interval":
        loop.tqdm = DeadlyBar
    elif point == "between the files":
        checkpoint.write_json = die
    train(RUNS[name], out, progress=False, checkpoint_seconds=0)


# --- runs that several tests look at ------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compile each program once: a run is compiled anew otherwise, for seconds."""
    folder = tmp_path_factory.mktemp("compiled")
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class Finished(NamedTuple):
    """A run that nothing disturbed."""

    training: Training
    out: Path
    result: loop.Result
    rows: dict[int, np.ndarray]  # the replay (P, N, ...) at each checkpoint's step


def run(training: Training, out: Path, **options: Any) -> Finished:
    """Train with a checkpoint at every evaluation."""
    rows = {}
    save = checkpoint.save_checkpoint

    def save_and_keep(folder: Path, step: int, tree: Any, extra: dict[str, Any]) -> None:
        if isinstance(tree, off_policy.Seed):
            rows[step] = np.array(tree.rows)
        save(folder, step, tree, extra)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save_and_keep)
        result = train(training, out, progress=False, checkpoint_seconds=0, **options)
    return Finished(training, out, result, rows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """Runs by name, each trained once."""

    @cache
    def get(name: str) -> Finished:
        return run(RUNS[name], tmp_path_factory.mktemp("finished") / name)

    return get


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory, cache_folder: Path
) -> Callable[[str], dict[str, Path]]:
    """By run and point: the folder as the kill left it. Each victim resumes the one before."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache_folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    @cache
    def get(name: str) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("killed")
        left = {}
        for point in POINTS[name]:
            words = [sys.executable, __file__, name, str(folder / "run"), point]
            done = subprocess.run(words, capture_output=True, text=True, env=environment)
            assert done.returncode == -signal.SIGKILL, done.stderr
            left[point] = folder / point
            shutil.copytree(folder / "run", folder / point)
        return left

    return get


def state_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "checkpoint" / "state.json").read_text())


def agents(out: Path) -> dict[str, np.ndarray]:
    """Every array of the final agents, each with a leading axis P."""
    return load_file(out / "checkpoint" / state_of(out)["arrays"])


def assert_same_agents(out: Path, other: Path) -> None:
    one, two = agents(out), agents(other)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def assert_same_metrics(result: loop.Result, other: loop.Result) -> None:
    assert result.metrics.keys() == other.metrics.keys()
    for name in result.metrics:
        np.testing.assert_array_equal(result.metrics[name], other.metrics[name], err_msg=name)


def columns(rows: np.ndarray, obs_size: int = 3) -> dict[str, np.ndarray]:
    """The parts of replay rows (N, ...)."""
    end = rows.shape[1] - obs_size - 2
    return {
        "obs": rows[:, :obs_size],
        "action": rows[:, obs_size:end],
        "reward": rows[:, end],
        "terminated": rows[:, end + 1],
        "next_obs": rows[:, end + 2 :],
    }


# --- resuming -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "jax",
        pytest.param("pendulum", marks=pytest.mark.full),
        pytest.param("cheetah", marks=[needs_mujoco, pytest.mark.full]),
    ],
)
def test_a_run_that_was_killed_equals_one_that_never_was(
    name: str,
    finished: Callable[[str], Finished],
    killed: Callable[[str], dict[str, Path]],
    tmp_path: Path,
) -> None:
    whole = finished(name)
    left = killed(name)
    # The kills fell where they were meant to.
    assert {point: state_of(folder)["step"] for point, folder in left.items()} == POINTS[name]
    for point, folder in left.items():
        files = list((folder / "checkpoint").glob("step-*"))
        assert len(files) == (2 if point == "between the files" else 1)

    out = shutil.copytree(list(left.values())[-1], tmp_path / "run")
    result = train(whole.training, out, progress=False)
    assert_same_metrics(result, whole.result)
    assert_same_metrics(loop.Result(loop.read_metrics(out / "metrics.parquet"), [], 0), result)
    assert_same_agents(out, whole.out)
    assert result.seeds == whole.result.seeds
    # Nothing of the kills is left behind.
    assert [path.name for path in (out / "checkpoint").glob("*.safetensors")] == [
        state_of(out)["arrays"]
    ]


class Killed(BaseException):
    """Stands for a kill where only the files matter."""


def test_a_kill_in_the_last_moment_loses_nothing(
    finished: Callable[[str], Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished("jax")
    save = checkpoint.save_checkpoint

    def save_and_die(*args: Any) -> None:
        save(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save_and_die)
        # Too short for a checkpoint in between: only the last one, of the agents, is made.
        with pytest.raises(Killed):
            train(whole.training, tmp_path, progress=False)
    assert state_of(tmp_path)["step"] == STEPS
    result = train(whole.training, tmp_path, progress=False)
    assert_same_metrics(result, whole.result)
    assert result.seeds == whole.result.seeds
    assert_same_agents(tmp_path, whole.out)


def test_the_wall_time_of_a_resumed_run_counts_what_came_before(
    finished: Callable[[str], Finished], tmp_path: Path
) -> None:
    training = finished("jax").training
    first = train(training, tmp_path, progress=False, stop=lambda step, returns: True)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "stopped"
    assert record["wall_s"] == first.wall_s > 0
    hours = 10_000.0
    records.write_json(tmp_path / "run.json", record | {"wall_s": hours})
    second = train(training, tmp_path, progress=False)
    assert hours < second.wall_s < hours + 1_000
    assert records.read_json(tmp_path / "run.json")["wall_s"] == second.wall_s


@pytest.mark.parametrize("edited", ["an hour", -1.0])
def test_a_wall_time_that_was_edited_does_not_stop_a_run(
    edited: Any, finished: Callable[[str], Finished], tmp_path: Path
) -> None:
    training = finished("jax").training
    train(training, tmp_path, progress=False, stop=lambda step, returns: True)
    record = json.loads((tmp_path / "run.json").read_text())
    records.write_json(tmp_path / "run.json", record | {"wall_s": edited})
    assert 0 < train(training, tmp_path, progress=False).wall_s < 1_000


def test_another_number_of_devices_is_said_in_one_line(
    finished: Callable[[str], Finished], tmp_path: Path
) -> None:
    """Three seeds on two devices are padded to four, on one they are three."""
    training = replace(finished("jax").training, seeds=(0, 1, 2))
    train(training, tmp_path, progress=False, stop=lambda step, returns: True)
    record = json.loads((tmp_path / "run.json").read_text())
    other = 2 if record["devices"] == 1 else 1
    records.write_json(tmp_path / "run.json", record | {"devices": other})
    with pytest.raises(BatchproofError, match=f"begun on {other} .* JAX_NUM_CPU_DEVICES={other} "):
        train(training, tmp_path, progress=False)
    records.write_json(tmp_path / "run.json", record)
    assert len(train(training, tmp_path, progress=False).seeds) == 3


def test_a_run_that_goes_on_hides_the_events_that_it_repeats(
    finished: Callable[[str], Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorboardX

    training, purged = finished("jax").training, []
    real = tensorboardX.SummaryWriter

    def writer(folder: str, purge_step: int) -> Any:
        purged.append(purge_step)
        return real(folder, purge_step=purge_step)

    monkeypatch.setattr(tensorboardX, "SummaryWriter", writer)
    train(training, tmp_path, progress=False, tensorboard=True, stop=lambda step, returns: True)
    reached = checkpoint.read_state(tmp_path / "checkpoint")
    assert reached is not None
    train(training, tmp_path, progress=False, tensorboard=True)
    assert purged == [1, reached["step"] + 1]


def test_a_metric_that_is_newer_than_the_beginning_of_a_run_is_nan_there(
    finished: Callable[[str], Finished], tmp_path: Path
) -> None:
    whole = finished("jax")
    train(whole.training, tmp_path, progress=False, stop=lambda step, returns: True)
    held = loop.read_metrics(tmp_path / "metrics.parquet")
    newer = held.pop("weight_length/critic/linear_0")
    assert np.isfinite(newer).all()
    records.write_columns(tmp_path / "metrics.parquet", held)
    found = train(whole.training, tmp_path, progress=False).metrics
    expected = whole.result.metrics["weight_length/critic/linear_0"].copy()
    expected[: len(newer)] = np.nan
    np.testing.assert_array_equal(found.pop("weight_length/critic/linear_0"), expected)
    for name, values in found.items():
        np.testing.assert_array_equal(values, whole.result.metrics[name], err_msg=name)


def test_a_finished_run_is_read_back(finished: Callable[[str], Finished]) -> None:
    whole = finished("jax")
    before = {path: path.stat().st_mtime_ns for path in whole.out.rglob("*.*") if path.suffix}
    again = train(whole.training, whole.out, progress=False)
    assert_same_metrics(again, whole.result)
    assert again.seeds == whole.result.seeds
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def forget(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        state = json.loads(path.read_text())
        del state[name], state["checksum"]  # as a file of another version
        path.write_text(json.dumps(state))

    return damage


DAMAGE = {
    "cut-off arrays": ("checkpoint/step-*", cut, "missing or damaged"),
    "flipped bit": ("checkpoint/step-*", flip, "missing or damaged"),
    "missing arrays": ("checkpoint/step-*", Path.unlink, "missing or damaged"),
    "cut-off state": ("checkpoint/state.json", cut, "not a readable JSON file"),
    "state without arrays": ("checkpoint/state.json", forget("arrays"), "checkpoint"),
    "state without format": ("checkpoint/state.json", forget("format"), "format"),
    "missing metrics": ("metrics.parquet", Path.unlink, "no such file"),
    "cut-off metrics": ("metrics.parquet", cut, "not a readable Parquet file"),
    "cut-off record": ("run.json", cut, "not a readable JSON file"),
    "record of nothing": ("run.json", forget("training"), "not a run record"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "damage", "part"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_one_line(
    pattern: str,
    damage: Callable[[Path], None],
    part: str,
    killed: Callable[[str], dict[str, Path]],
    tmp_path: Path,
) -> None:
    out = shutil.copytree(killed("jax")["after a checkpoint"], tmp_path / "run")
    (path,) = out.glob(pattern)
    damage(path)
    with pytest.raises(BatchproofError, match=part) as caught:
        train(IN_JAX, out, progress=False)
    assert "\n" not in str(caught.value)
    assert str(out) in str(caught.value)


def test_arrays_of_another_shape_do_not_fit(tmp_path: Path) -> None:
    tree = {"key": jax.random.split(jax.random.key(1), 2), "weight": jnp.ones((2, 16))}
    left = tmp_path / ".step-000000000003.safetensors.partial"
    left.write_bytes(b"what a kill left")
    checkpoint.save_checkpoint(tmp_path, 7, tree, {"more": [1]})
    assert not left.exists()
    step, loaded, extra = checkpoint.load_checkpoint(tmp_path, tree)
    assert (step, extra) == (7, {"more": [1]})
    np.testing.assert_array_equal(loaded["weight"], tree["weight"])
    assert (loaded["key"] == tree["key"]).all()
    for other in (jnp.ones((2, 17)), jnp.ones((3, 16)), jnp.ones((2, 16), jnp.int32)):
        with pytest.raises(BatchproofError, match="does not fit this run"):
            checkpoint.load_checkpoint(tmp_path, tree | {"weight": other})
    with pytest.raises(BatchproofError, match="does not fit this run"):
        checkpoint.load_checkpoint(tmp_path, tree | {"bias": jnp.ones(2)})


def test_no_checkpoint_is_written_through_a_link(tmp_path: Path) -> None:
    """A run's folder may come from somebody else, and its link lead anywhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    mine = elsewhere / "step-000000000001.safetensors"
    mine.write_bytes(b"somebody's")
    (tmp_path / "checkpoint").symlink_to(elsewhere)
    with pytest.raises(BatchproofError, match="symbolic link"):
        checkpoint.save_checkpoint(tmp_path / "checkpoint", 7, {"weight": jnp.ones(2)}, {})
    assert mine.read_bytes() == b"somebody's"
    assert [path.name for path in elsewhere.iterdir()] == [mine.name]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"config": replace(TD3, gamma=0.9)}, r"config\.gamma is 0\.99, not 0\.9"),
        ({"seeds": (0, 4), "steps": 121}, r"seeds is \[.*\], not \[0, 4\], steps is 120, not 121"),
        ({"env_options": {"ending": "truncated"}}, r"env_options\.ending is .*, not \"truncated\""),
    ],
)
def test_a_folder_holds_one_run(
    changes: dict[str, Any], names: str, finished: Callable[[str], Finished]
) -> None:
    with pytest.raises(BatchproofError, match=rf"another run \({names}\)"):
        train(replace(IN_JAX, **changes), finished("jax").out, progress=False)


@pytest.mark.parametrize(
    "env_id", ["Pendulum-v1", pytest.param("HalfCheetah-v5", marks=needs_mujoco)]
)
def test_host_environments_continue_their_episodes_exactly(env_id: str) -> None:
    options: list[dict[str, Any]] = [{"max_episode_steps": 10}, {}]
    rng = np.random.default_rng(0)
    envs = HostEnvs(env_id, options, [0, 3], TRAIN)
    envs.reset()
    for _ in range(17):
        actions = rng.uniform(-1, 1, (2, envs.action_size)).astype(np.float32)
        step = envs.step(actions)
    state = json.loads(json.dumps(envs.state()))
    assert [len(taken) for taken in state["taken"]] == [7, 17]

    others = HostEnvs(env_id, options, [0, 3], TRAIN)
    np.testing.assert_array_equal(others.restore(state), step.obs)
    for _ in range(5):  # over the end of an episode
        actions = rng.uniform(-1, 1, (2, envs.action_size)).astype(np.float32)
        for one, two in zip(envs.step(actions), others.step(actions), strict=True):
            np.testing.assert_array_equal(one, two)
    envs.close()
    others.close()


# --- what is stored -----------------------------------------------------------------------------


@pytest.mark.parametrize("host", [False, True], ids=["jax", "host"])
@pytest.mark.parametrize("ending", ["terminated", "truncated"])
def test_only_a_termination_is_stored_as_one(ending: str, host: bool, tmp_path: Path) -> None:
    training = replace(IN_JAX, env_options={"ending": ending}, host_env=host)
    if host:
        training = replace(training, gradient_steps=1)
    rows = run(training, tmp_path).rows
    for seed in range(2):
        stored = columns(rows[60][seed])
        np.testing.assert_array_equal(stored["reward"], stored["action"][:, 0])
        ends = np.flatnonzero(stored["terminated"])
        assert ends.tolist() == ([29, 59] if ending == "terminated" else [])
        # Step 89 is written over the oldest rows: 64 rows are all there are.
        assert len(rows[90][seed]) == ROWS
        ends = np.flatnonzero(columns(rows[90][seed])["terminated"])
        assert ends.tolist() == ([89 - ROWS, 29, 59] if ending == "terminated" else [])


def test_the_state_that_ended_an_episode_is_stored(finished: Callable[[str], Finished]) -> None:
    physics = gymnasium.make("Pendulum-v1").unwrapped
    physics.reset(seed=0)
    rows = finished("pendulum").rows[60]
    for seed in range(2):
        stored = columns(rows[seed])
        for obs, action, reward, terminated, next_obs in zip(*stored.values(), strict=True):
            physics.state = np.array([np.arctan2(obs[1], obs[0]), obs[2]], np.float64)
            wanted, wanted_reward, *_ = physics.step(2 * action)
            np.testing.assert_allclose(next_obs, wanted, atol=1e-5)
            np.testing.assert_allclose(reward, wanted_reward, atol=1e-4)
            assert terminated == 0
        same = (stored["next_obs"][:-1] == stored["obs"][1:]).all(axis=1)
        assert np.flatnonzero(~same).tolist() == [LIMIT - 1, 2 * LIMIT - 1]
        begins = stored["obs"][[0, LIMIT, 2 * LIMIT]]
        assert (np.abs(begins[:, 2]) <= 1).all()  # Pendulum starts no faster than that
        assert len(np.unique(begins, axis=0)) == 3


def test_seeds_act_at_random_and_differ_until_learning_starts(
    finished: Callable[[str], Finished],
) -> None:
    one, two = finished("jax").rows[30], finished("pendulum").rows[30]
    actions = columns(one[0])["action"]
    # A seed's random actions are the same on every environment.
    np.testing.assert_array_equal(actions, columns(two[0])["action"])
    assert not np.isin(actions, columns(one[1])["action"]).any()
    assert np.abs(actions).max() <= 1
    assert actions.min() < -0.5 < 0.5 < actions.max()


def test_the_replay_overwrites_its_oldest_row_and_samples_filled_ones() -> None:
    rows = replay.init(4, 2, 1)
    for step in range(6):
        rows = replay.insert(
            rows,
            jnp.asarray(step),
            jnp.full(2, step, float),
            jnp.full(1, 10 + step, float),
            jnp.asarray(20.0 + step),
            jnp.full(2, step + 1, float),
            jnp.asarray(step == 3),
        )
        if step == 1:
            batch = replay.sample(rows, jax.random.key(0), jnp.asarray(2), 100, 2)
            assert set(batch.obs[:, 0].tolist()) == {0, 1}
    batch = replay.sample(rows, jax.random.key(0), jnp.asarray(4), 100, 2)
    assert set(batch.obs[:, 0].tolist()) == {2, 3, 4, 5}
    # The parts of a row stay together.
    np.testing.assert_array_equal(batch.action[:, 0], batch.obs[:, 0] + 10)
    np.testing.assert_array_equal(batch.reward, batch.obs[:, 1] + 20)
    np.testing.assert_array_equal(batch.next_obs, batch.obs + 1)
    np.testing.assert_array_equal(batch.terminated, batch.obs[:, 0] == 3)


# --- when it learns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["jax", "pendulum", pytest.param("cheetah", marks=[needs_mujoco, pytest.mark.full])]
)
def test_every_step_after_the_start_is_followed_by_its_updates(
    name: str, finished: Callable[[str], Finished]
) -> None:
    whole = finished(name)
    updates = (STEPS - STARTS) * whole.training.gradient_steps
    delay = 2 if whole.training.algo == "td3" else 1
    arrays = agents(whole.out)
    assert (arrays["agent.critic_optimizer.0.count"] == updates).all()
    assert (arrays["agent.actor_optimizer.0.count"] == updates // delay).all()


@pytest.mark.parametrize("name", ["jax", "pendulum"])
def test_evaluating_leaves_no_trace_in_learning(
    name: str, finished: Callable[[str], Finished], tmp_path: Path
) -> None:
    whole = finished(name)
    other = replace(whole.training, eval_every=50, eval_episodes=2)
    result = train(other, tmp_path, progress=False, tensorboard=True)
    assert_same_agents(tmp_path, whole.out)
    assert result.metrics["step"].tolist() == [50, 50, 100, 100, 120, 120]
    assert result.metrics["seed"].tolist() == [0, 5] * 3

    (events,) = (tmp_path / "tensorboard").glob("events*")
    written = events.read_bytes()
    assert all(f"seed_{seed}/return".encode() in written for seed in (0, 5))
    assert not (whole.out / "tensorboard").exists()


# --- divergence -----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Poisoned(ConstantReward):
    """The constant reward, with a NaN in each episode of a poisoned seed."""

    poison: Array

    @classmethod
    def make(cls, poison: bool = False) -> Poisoned:
        return cls(jnp.asarray(True), jnp.asarray(poison))

    def step(self, key: Array, state: Any, action: Array) -> Step:
        result = super().step(key, state, action)
        bad = self.poison & (result.state == 10)
        return result._replace(reward=jnp.where(bad, jnp.nan, result.reward))


POISON_FROM = 70


class PoisonedEnv(ConstantRewardEnv):
    """The constant reward, with nothing but NaN from the 70th step of a poisoned seed."""

    def __init__(self, poison: bool) -> None:
        super().__init__()
        self.poison = poison
        self.total = 0

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert np.isfinite(action).all()  # a diverged agent must not reach its environment
        self.total += 1
        obs, reward, *rest = super().step(action)
        return obs, np.nan if self.poison and self.total >= POISON_FROM else reward, *rest


@pytest.mark.slow
@pytest.mark.parametrize("host", [False, True], ids=["jax", "host"])
def test_a_seed_that_diverges_is_marked_and_alone(
    host: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tests/Poisoned-v0"
    monkeypatch.setitem(JAX_ENVS, name, Poisoned)
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    gymnasium.register(name, PoisonedEnv, disable_env_checker=True)
    base = replace(PENDULUM if host else IN_JAX, env_id=name, host_env=host)

    clean = replace(base, env_options=({"poison": False}, {"poison": False}))
    sound = train(clean, tmp_path / "clean", progress=False)
    dirty = replace(base, env_options=({"poison": False}, {"poison": True}))
    result = train(dirty, tmp_path / "dirty", progress=False)

    assert [seed["status"] for seed in sound.seeds] == ["ok", "ok"]
    well, ill = result.seeds
    assert well == sound.seeds[0]
    assert (ill["seed"], ill["status"]) == (5, "diverged")
    assert (POISON_FROM if host else STARTS + 1) <= ill["diverged_at"] <= STEPS
    assert np.isnan(ill["final_return"])

    of = {seed: result.metrics["seed"] == seed for seed in (0, 5)}
    for column, values in result.metrics.items():
        np.testing.assert_array_equal(values[of[0]], sound.metrics[column][of[0]], err_msg=column)
    late = result.metrics["step"][of[5]] >= ill["diverged_at"]
    np.testing.assert_array_equal(result.metrics["diverged"][of[5]], late)
    assert np.isnan(result.metrics["return"][of[5]][late]).all()
    assert np.isfinite(sound.metrics["return"][of[0]]).all()
    arrays, sound_arrays = agents(tmp_path / "dirty"), agents(tmp_path / "clean")
    for array in arrays:
        np.testing.assert_array_equal(arrays[array][0], sound_arrays[array][0], err_msg=array)

    # A finished run that is read back says the same, NaN and all.
    assert repr(train(dirty, tmp_path / "dirty", progress=False).seeds) == repr(result.seeds)


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("host", [False, True], ids=["jax", "host"])
def test_the_constant_reward_is_learned(host: bool, tmp_path: Path) -> None:
    plain = MLP((32, 32))
    config = td3.Config(actor=plain, critic=plain, learning_rate=1e-3, batch_size=64)
    training = Training("td3", config, ID, seeds=(0, 1), steps=1500, host_env=host, eval_every=500)
    result = train(training, tmp_path, progress=False)
    assert [seed["status"] for seed in result.seeds] == ["ok", "ok"]
    assert min(seed["final_return"] for seed in result.seeds) > 25


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"algo": "ppo"}, "use one of td3, sac"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "distinct"),
        ({"seeds": (-1,)}, "not negative"),
        ({"steps": 0}, "steps"),
        ({"learning_starts": STEPS}, "nothing would be learned"),
        ({"eval_every": 0}, "eval_every"),
        ({"eval_episodes": 0}, "eval_episodes"),
        ({"buffer_size": 0}, "buffer_size"),
        ({"gradient_steps": 0}, "gradient_steps"),
        ({"update_every": 0}, "update_every"),
        ({"env_options": ({},)}, "one for each of the 2 seeds"),
    ],
)
def test_a_run_that_makes_no_sense_raises(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(BatchproofError, match=part):
        replace(IN_JAX, **changes)


if __name__ == "__main__":
    be_killed(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
