"""Runs read back: the same training, the same networks, and the same actions by plain NumPy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.lab import load
from batchproof.lab.agents import AGENTS, td3
from batchproof.lab.loop import train
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import Plan

NET = MLP((8, 6), Norm("batch", eps=1e-3))
TRAINING = Training(
    "td3",
    td3.Config(actor=NET, critic=MLP((4,)), batch_size=8, plan=Plan.parse("TETTE")),
    "Pendulum-v1",
    env_options=({"max_episode_steps": 30}, {"max_episode_steps": 25}),
    seeds=(4, 2),
    steps=60,
    learning_starts=20,
    eval_every=60,
    normalize_obs=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(TRAINING, out, progress=False)
    return out


@pytest.fixture(scope="module")
def run(folder) -> load.Run:
    return load.load_run(folder)


def test_the_training_and_the_sizes_come_back(run):
    assert run.training == TRAINING
    assert (run.obs_size, run.action_size, run.step, run.layout) == (3, 1, 60, None)


@pytest.mark.parametrize("algo", AGENTS)
def test_every_configuration_comes_back_from_its_record(algo):
    agent = AGENTS[algo]
    for config in (agent.Config(), *agent.PRESETS.values()):
        training = Training(algo, config, "Pendulum-v1", seeds=(1, 3))
        record = json.loads(json.dumps(records.to_json(training.record())))
        assert load.training_from_record(record, Path("run.json")) == training


def by_hand(run: load.Run, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """The actor of `TRAINING` in float64, from its arrays."""
    moments: Any = run.moments_of_seed(seed)
    actor: Any = jax.tree.map(lambda x: np.asarray(x, np.float64), run.of_seed(seed).actor)

    def act(obs: np.ndarray) -> np.ndarray:
        x = np.clip((obs - moments.mean) / np.sqrt(moments.var + 1e-8), -10, 10)
        for i in range(2):
            layer, norm = actor.params[f"linear_{i}"], actor.params[f"norm_pre_{i}"]
            stats = actor.stats[f"norm_pre_{i}"]
            x = x @ layer["weight"] + layer["bias"]
            x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-3) * norm["scale"] + norm["bias"]
            x = np.maximum(x, 0)
        return np.tanh(
            x @ actor.params["linear_out"]["weight"] + actor.params["linear_out"]["bias"]
        )

    return act


def test_a_seed_acts_as_its_arrays_say(run):
    obs = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    acted = load.actions(run, 2)(obs)
    np.testing.assert_allclose(acted, by_hand(run, 2)(obs), atol=1e-5)
    assert not np.allclose(acted, by_hand(run, 4)(obs), atol=1e-3)


def test_collecting_explores_in_the_run_s_environment(run):
    found = load.collect(run, 2, 30)
    assert found.obs.shape == found.next_obs.shape == (30, 3)
    in_time = np.argsort(np.random.default_rng(2).permutation(30))
    obs, next_obs = found.obs[in_time], found.next_obs[in_time]
    ends = np.flatnonzero((obs[1:] != next_obs[:-1]).any(1)) + 1
    assert ends.tolist() == [25]  # that seed's own time limit
    assert not found.terminated.any()
    noise = found.action - by_hand(run, 2)(found.obs)
    inside = np.abs(found.action) < 1
    assert 0.03 < noise[inside].std() < 0.3  # 0.1 is asked for
    np.testing.assert_array_equal(load.bounds(run, 2), ([-2], [2]))


def test_what_does_not_fit_is_said_in_one_line(run, folder, tmp_path):
    with pytest.raises(BatchproofError, match="seed 0 was not trained in this run: it has 4, 2"):
        run.of_seed(0)
    with pytest.raises(BatchproofError, match="sizes 2 and 1, the run 3 and 1"):
        load.collect(run, 2, 5, "MountainCarContinuous-v0")
    with pytest.raises(BatchproofError, match="name the folder of a `batchproof train` run"):
        load.load_run(tmp_path)
    record = records.read_json(folder / "run.json")
    record["training"]["config"]["made_up"] = 1
    records.write_json(tmp_path / "run.json", record)
    with pytest.raises(BatchproofError, match=r"another version of batchproof \(made_up\)"):
        load.load_run(tmp_path)
    for place in (("actor",), ("actor", "norm")):  # a newer version's networks and norms
        record = records.read_json(folder / "run.json")
        part = record["training"]["config"]
        for name in place:
            part = part[name]
        part["made_up"] = 1
        with pytest.raises(BatchproofError, match=r"another version of batchproof \(made_up\)"):
            load.training_from_record(record["training"], tmp_path)
