"""Critics whose products are of bfloat16, in the loop: near float32, kept in the record, theirs."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from batchproof import records
from batchproof.errors import BatchproofError
from batchproof.lab.agents import crossq, reinforce, td3
from batchproof.lab.load import load_run, training_from_record
from batchproof.lab.loop import train
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training

NORM = Norm("batch", "post")


def training(precision: str, hidden: tuple[int, ...] = (8, 8), batch: int = 8) -> Training:
    config = crossq.Config(
        actor=MLP((8, 8), NORM), critic=MLP(hidden, NORM, precision=precision), batch_size=batch
    )
    return Training(
        algo="crossq",
        config=config,
        env_id="Pendulum-v1",
        seeds=(0, 1),
        steps=60,
        learning_starts=20,
        eval_every=60,
    )


@pytest.mark.parametrize(("hidden", "batch"), [((8, 8), 8), ((7, 5), 9)])
def test_a_run_is_near_that_of_float32_and_is_read_back(tmp_path, hidden, batch):
    found = {}
    for precision in ("float32", "bfloat16"):
        asked = training(precision, hidden, batch)
        folder = tmp_path / precision
        train(asked, folder, progress=False)
        record = records.read_json(folder / "run.json")["training"]
        assert record["config"]["critic"]["precision"] == precision
        assert training_from_record(record, folder) == asked
        agent = load_run(folder).of_seed(0)
        found[precision] = np.concatenate(
            [np.ravel(leaf) for leaf in jax.tree.leaves(agent.critic.params)]
        )
    assert found["bfloat16"].dtype == np.float32
    assert np.isfinite(found["bfloat16"]).all()
    off = np.abs(found["bfloat16"] - found["float32"])
    # 40 steps of Adam at 1e-3 can part by 0.08 at most.
    assert 0 < off.max() < 0.08
    assert off.mean() < 0.02


def test_a_record_from_before_there_was_a_precision_is_of_float32(tmp_path):
    record = training("float32").record()
    del record["config"]["critic"]["precision"]
    assert training_from_record(record, tmp_path) == training("float32")


@pytest.mark.parametrize("algo", ["td3", "reinforce"])
def test_an_actor_is_not_rounded(algo):
    config = {"td3": td3, "reinforce": reinforce}[algo].Config()
    config = replace(config, actor=MLP((8, 8), precision="bfloat16"))
    with pytest.raises(BatchproofError, match="precision is for the critics"):
        Training(algo=algo, config=config, env_id="Pendulum-v1", steps=200)
