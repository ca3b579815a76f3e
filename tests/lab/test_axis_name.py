"""A batch spread over two devices, and a population spread over two devices, against one device.

Run as a program, this file computes all of it on two forced CPU devices and prints what the tests
compare: the devices of a process cannot be changed once JAX has computed something.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from batchproof.errors import BatchproofError
from batchproof.lab import nets, norms, passes, population
from batchproof.lab.agents import td3
from batchproof.lab.nets import MLP, Network
from batchproof.lab.norms import Norm
from batchproof.lab.training import Training
from batchproof.modes import Mode, Plan

PAGE = Path(__file__).parents[2] / "docs" / "sync.md"
ROWS, FEATURES, O, A = 8, 3, 3, 2  # noqa: E741
KINDS = {
    "batch": {},
    "batch-unbiased": {"batch_variance": "unbiased", "running_variance": "biased"},
    "renorm": {"eps": 1e-3},
    "renorm-folded": {"eps": 1e-3, "formula": "folded", "batch_variance": "unbiased"},
    "layer": {},
}
MODES = "TSE"
# Each costs seconds of compiling: all of them run with the full tests.
QUICK = {"batch-unbiased": "T", "renorm": "S", "renorm-folded": "T"}
FULL = dict.fromkeys(KINDS, MODES)
UPDATES = 20


def layer(name, axis_name):
    """A norm with parameters and statistics of its own; r and d are clipped in some features."""
    norm = Norm(name.split("-")[0], axis_name=axis_name, **KINDS[name])
    params, stats = norms.init(norm, FEATURES)
    rng = np.random.default_rng(7)
    params = {key: rng.uniform(0.5, 2, FEATURES) for key in params}
    if stats:
        stats = {"mean": rng.normal(size=3), "var": np.array([0.05, 1, 3]), "count": np.array(4)}
    return norm, params, stats


def draw(*seed):
    rng = np.random.default_rng(seed)
    return rng.normal(rng.normal(size=FEATURES), rng.uniform(0.5, 3, FEATURES), (ROWS, FEATURES))


def through_layers(cases, axis_name):
    """A function of a batch and weights of the outputs: what each layer gives in its modes.

    By layer and mode, first what has a row for each row of the batch, then what has not.
    """

    def run(x, weighting):
        by_row, by_feature = {}, {}
        for name, modes in cases.items():
            norm, params, stats = layer(name, axis_name)
            for mode in modes:

                def loss(params, x, norm=norm, stats=stats, mode=mode):
                    y, new_stats = norms.apply(norm, params, stats, x, Mode(mode))
                    return (y * weighting).sum(), (y, new_stats)

                grads, (y, new_stats) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
                by_row[f"{name} {mode}"] = y, grads[1]
                # Each device has its own rows' share of the parameters' gradient.
                by_feature[f"{name} {mode}"] = summed(grads[0], axis_name), new_stats
        return by_row, by_feature

    return run


def summed(grads, axis_name):
    return grads if axis_name is None else jax.lax.psum(grads, axis_name)


def critic_mlp(axis_name):
    return MLP((4,), Norm("batch", placement="input+pre", axis_name=axis_name))


def draw_critics(*lead):
    """Twin critics, by NumPy: a random draw by JAX takes seconds to compile."""
    rng = np.random.default_rng(0)
    init = partial(nets.init_critics, mlp=critic_mlp(None), obs_size=O, action_size=A, critics=2)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: rng.uniform(0.1, 1, (*lead, *leaf.shape)).astype(leaf.dtype), shapes
    )


def joint_pass(axis_name):
    """The gradient of a TD loss whose two critic passes are joined (J), and the new statistics."""
    mlp = critic_mlp(axis_name)

    def run(critic, obs, next_obs):
        action, done = jnp.tanh(obs[:, :A]), jnp.zeros(len(obs))
        batch = passes.Batch(obs, action, obs[:, 0], next_obs, done)

        def loss(params):
            found = passes.replay_and_target_q(
                mlp, Network(params, critic.stats), None, batch, action, Plan.parse("TEEJJ")
            )
            td_error = found.q - batch.reward - 0.9 * found.next_q
            return jnp.square(td_error).sum() / ROWS, found.stats

        grads, stats = jax.grad(loss, has_aux=True)(critic.params)
        return summed(grads, axis_name), stats

    return run


def largest_gap(one, other):
    """Between two trees, in units of the largest element of each leaf."""

    def gap(a, b):
        a, b = np.asarray(a, float), np.asarray(b, float)
        return float(np.abs(a - b).max()) / max(1.0, float(np.abs(b).max()))

    return max(jax.tree.leaves(jax.tree.map(gap, one, other)), default=0.0)


def spread_batch(cases):
    """The largest difference between a batch on one device and on two, by layer and mode."""
    data, whole = PartitionSpec("data"), PartitionSpec()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = partial(jax.shard_map, mesh=mesh, check_vma=False)
    batches = draw(1), draw(2)
    alone = jax.jit(through_layers(cases, None))(*batches)
    run = through_layers(cases, "data")
    results = {"devices": jax.jit(spread(run, in_specs=data, out_specs=(data, whole)))(*batches)}
    if cases is FULL:  # the same axis without devices: both halves of the batch under one vmap
        halves = (batch.reshape(2, ROWS // 2, FEATURES) for batch in batches)
        by_row, by_feature = jax.jit(jax.vmap(run, axis_name="data", out_axes=(0, None)))(*halves)
        by_row = jax.tree.map(lambda leaf: leaf.reshape(ROWS, FEATURES), by_row)
        results["vmap"] = by_row, by_feature
    found = {}
    for how, (by_row, by_feature) in results.items():
        for key in by_row:
            gaps = [largest_gap(by_row[key], alone[0][key])]
            gaps.append(largest_gap(by_feature[key], alone[1][key]))
            found[f"{how} {key}"] = max(gaps)
    critic = draw_critics()
    spread = partial(spread, in_specs=(whole, data, data), out_specs=whole)
    on_two = jax.jit(spread(joint_pass("data")))(critic, *batches)
    found["critic"] = largest_gap(on_two, jax.jit(joint_pass(None))(critic, *batches))
    return found


def learn_critics(critic, batches):
    """One seed: critics that descend the TD loss of `joint_pass`."""

    def update(step, critic):
        grads, stats = joint_pass(None)(critic, *batches[step])
        return Network(jax.tree.map(lambda p, g: p - 0.1 * g, critic.params, grads), stats)

    return jax.lax.fori_loop(0, UPDATES, update, critic)


def learn_td3(key):
    """One seed of an agent with all its parts."""
    net = MLP((8,), Norm("batch"))
    config = td3.Config(actor=net, critic=net, learning_rate=1e-2)

    def update(step, state):
        step_key = jax.random.fold_in(key, step)
        obs, next_obs = jax.random.normal(step_key, (2, ROWS, O))
        action, done = jnp.tanh(next_obs[:, :A]), jnp.zeros(ROWS)
        batch = passes.Batch(obs, action, obs[:, 0], next_obs, done)
        return td3.update(config, state, batch, step_key, step)[0]

    return jax.lax.fori_loop(1, 1 + UPDATES, update, td3.init(config, key, O, A))


def spread_population(full):
    """The largest difference between four seeds on one device and on two, in float32."""
    seeds = [3, 5, 7, 11]
    batches = np.random.default_rng(1).normal(size=(len(seeds), UPDATES, 2, ROWS, O))
    states = []
    for devices in (1, 2):
        mesh = jax.make_mesh(
            (devices,), ("seeds",), devices=jax.local_devices()[:devices],
            axis_types=(jax.sharding.AxisType.Auto,),
        )  # fmt: skip
        if full:
            learn, args = learn_td3, (population.keys(seeds),)
        else:
            learn, args = learn_critics, (draw_critics(len(seeds)), batches.astype(np.float32))
        args = population.place(args, mesh)
        states.append(jax.tree.map(np.asarray, population.over_seeds(learn, mesh)(*args)))
    assert population.mesh_for(len(seeds)).size == 2
    return largest_gap(*states)


def main(full):
    # Over what the lab sets for the cores of this machine.
    jax.config.update("jax_num_cpu_devices", 2)
    found = {"population": spread_population(full)}
    # Nearly all the time goes into compiling, so compile fast.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        found |= spread_batch(FULL if full else QUICK)
    print(json.dumps(found))


def gaps_of(*full):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__, *full], env=os.environ | flags, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def gaps():
    return gaps_of()


@pytest.mark.parametrize("name", QUICK)
def test_a_batch_on_two_devices_is_one_batch(gaps, name):
    """Outputs, gradients and statistics, in float64."""
    assert gaps[f"devices {name} {QUICK[name]}"] < 1e-12


def test_a_joint_critic_pass_on_two_devices(gaps):
    assert gaps["critic"] < 1e-12


def test_a_population_on_two_devices_is_one_on_one_to_the_bit(gaps):
    assert gaps["population"] == 0


@pytest.mark.full
def test_every_norm_in_every_mode_and_an_axis_of_vmap():
    found = gaps_of("full")
    names = {f"{name} {mode}" for name in KINDS for mode in MODES}
    expected = {f"{how} {name}" for how in ("devices", "vmap") for name in names}
    assert found.keys() == expected | {"critic", "population"}
    assert found.pop("population") == 0
    assert max(found.values()) < 1e-12


def test_without_the_axis_each_part_is_normalized_by_itself():
    """What the parity tests would not see: parts that happen to have the same statistics."""
    norm, params, stats = layer("batch", None)
    x = draw(1)
    whole, _ = norms.apply(norm, params, stats, jnp.asarray(x), Mode("T"))
    half, _ = norms.apply(norm, params, stats, jnp.asarray(x[: ROWS // 2]), Mode("T"))
    assert largest_gap(half, whole[: ROWS // 2]) > 0.05


def test_the_axis_is_not_part_of_a_runs_record():
    config = td3.Config(critic=MLP(norm=Norm("batch", axis_name="data")))
    record = Training(algo="td3", config=config, env_id="Pendulum-v1").record()
    assert "axis_name" not in record["config"]["critic"]["norm"]
    assert record["config"]["critic"]["norm"]["kind"] == "batch"


def test_the_code_of_the_page_runs():
    *_, block = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    page = {}
    exec(block, page)
    np.testing.assert_allclose(page["new_stats"]["mean"], 0.1)  # of ones, by momentum 0.1
    assert page["y"].shape == (8 * len(jax.devices()), 4)


def test_estimators_that_need_the_rows_are_refused():
    with pytest.raises(BatchproofError, match="estimator 'huber' looks at the rows of a batch"):
        Norm("batch", estimator="huber", axis_name="data")


if __name__ == "__main__":
    main(full=len(sys.argv) > 1)
