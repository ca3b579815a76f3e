"""Observation statistics in the loop: of all that was seen, on both ways to step, and kept."""

import jax
import numpy as np
import pytest

from batchproof.errors import BatchproofError
from batchproof.lab.agents import reinforce, td3, xqc
from batchproof.lab.nets import MLP
from batchproof.lab.off_policy import Stepper
from batchproof.lab.training import Training

SMALL = MLP((8, 8))


def training(host: bool, **options: object) -> Training:
    return Training(
        algo="td3",
        config=td3.Config(actor=SMALL, critic=SMALL, batch_size=8),
        env_id="Pendulum-v1",
        seeds=(3,),
        steps=300,
        learning_starts=20,
        host_env=host,
        normalize_obs=True,
        **options,
    )


@pytest.mark.parametrize("host", [False, True])
def test_the_moments_are_those_of_every_observation_that_was_acted_on(host, tmp_path):
    stepper = Stepper(training(host))
    stepper.advance(50)
    stepper.save(tmp_path)
    stepper.advance(250)  # over the end of an episode at 200
    rows, moments = np.asarray(stepper.seed.rows[0]), stepper.seed.obs_moments
    acted_on = np.concatenate([rows[:250, :3], np.asarray(stepper.seed.obs)[:1]])
    np.testing.assert_allclose(moments.mean[0], acted_on.mean(0), atol=1e-4)
    np.testing.assert_allclose(moments.var[0], acted_on.var(0), rtol=1e-3)
    returns = stepper.evaluate()
    stepper.close()

    again = Stepper(training(host))
    again.restore(tmp_path)
    again.advance(250)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves((again.seed.agent, again.seed.obs_moments)),
            jax.tree.leaves((stepper.seed.agent, stepper.seed.obs_moments)),
            strict=True,
        )
    )
    assert np.array_equal(again.evaluate(), returns)
    # What evaluation sees is scaled too: other moments, other actions.
    moments = again.seed.obs_moments
    again.seed = again.seed._replace(obs_moments=moments._replace(mean=moments.mean + 1))
    assert not np.array_equal(again.evaluate(), returns)
    again.close()


def test_xqc_scales_rewards_by_the_spread_of_returns_that_the_loop_shows_it():
    config = xqc.Config(actor=MLP((8,)), critic=MLP((8,)), batch_size=4)
    run = Training("xqc", config, "Pendulum-v1", seeds=(0,), steps=60, learning_starts=50)
    stepper = Stepper(run)
    fresh = jax.tree.map(np.asarray, stepper.seed.agent.returns)
    stepper.advance(40)
    seen = jax.tree.map(np.asarray, stepper.seed.agent.returns)
    changed = [not np.array_equal(a, b) for a, b in zip(fresh, seen, strict=True)]
    assert any(changed)


def test_reinforce_says_what_to_use_instead():
    options = {"seeds": (0,), "steps": 1000, "learning_starts": 0, "normalize_obs": True}
    with pytest.raises(BatchproofError, match="--placement input"):
        Training("reinforce", reinforce.Config(), "Pendulum-v1", **options)
