"""A population gives each seed what it gets alone."""

import os
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchproof.lab import population
from batchproof.lab.agents import td3
from batchproof.lab.nets import MLP
from batchproof.lab.norms import Norm
from batchproof.lab.passes import Batch

O, A, B = 3, 2, 16  # noqa: E741
NET = MLP((8,), Norm("batch"))
CONFIG = td3.Config(actor=NET, critic=NET, learning_rate=1e-2)


@pytest.fixture(autouse=True, scope="module")
def _float64():
    """Rounding is then far below what leaking from one seed to another would do."""
    # Nearly all the time goes into compiling, so compile fast.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def draw_state(seed):
    """An agent of the seed's own."""
    rng = np.random.default_rng(seed)
    state = jax.eval_shape(lambda key: td3.init(CONFIG, key, O, A), jax.random.key(0))
    state = jax.tree.map(lambda x: rng.uniform(0.1, 0.5, x.shape).astype(x.dtype), state)
    fresh = jax.tree.map(np.zeros_like, (state.actor_optimizer, state.critic_optimizer))
    return state._replace(actor_optimizer=fresh[0], critic_optimizer=fresh[1])


def draw_batch(seed, step):
    rng = np.random.default_rng([seed, step])
    return Batch(
        obs=rng.normal(size=(B, O)),
        action=rng.uniform(-1, 1, (B, A)),
        reward=rng.normal(size=B),
        next_obs=rng.normal(size=(B, O)),
        terminated=rng.integers(0, 2, B).astype(float),
    )


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)


@cache
def compiled_update(mesh):
    def update(state, batch, key, step):
        return td3.update(CONFIG, state, batch, jax.random.fold_in(key, step), step)

    return population.over_seeds(update, mesh, shared=(3,))


def run(seeds):
    """Agents and metrics after four updates, one entry a seed, padding dropped."""
    mesh = population.mesh_for(len(seeds))
    padded = population.padded(seeds, mesh)
    keys = population.place(population.keys(padded), mesh)
    state = population.place(stack([draw_state(seed) for seed in padded]), mesh)
    for step in range(1, 5):
        batch = stack([draw_batch(seed, step) for seed in padded])
        state, metrics = compiled_update(mesh)(state, batch, keys, step)
    result = (state, metrics)
    assert all(len(leaf) == len(padded) for leaf in jax.tree.leaves(result))
    found = jax.tree.map(np.asarray, result)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(len(seeds))]


@pytest.fixture(scope="module")
def alone():
    return {seed: run([seed])[0] for seed in (3, 7, 11)}


def distance(one, other):
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, other)
    return max(jax.tree.leaves(gaps))


@pytest.mark.parametrize("seeds", [[3], [7, 3], [3, 7, 11]])
def test_a_seed_is_the_same_in_every_population(alone, seeds):
    for seed, member in zip(seeds, run(seeds), strict=True):
        assert distance(member, alone[seed]) < 1e-9


@pytest.mark.full
def test_thousands_of_seeds_are_what_each_is_alone():
    # With XLA's optimizations: 0.10.2 is known to compile some products of more than 32,768 rows
    # into wrong programs on CPUs (issue 39103 of JAX).
    jax.config.update("jax_disable_most_optimizations", False)
    compiled_update.cache_clear()
    try:
        many, few = run(list(range(4096))), [0, 2047, 4095]
        for seed, member in zip(few, run(few), strict=True):
            assert distance(member, many[seed]) < 1e-8
    finally:
        compiled_update.cache_clear()
        jax.config.update("jax_disable_most_optimizations", True)


def test_seeds_differ(alone):
    assert distance(alone[3], alone[7]) > 1e-2
    assert distance(alone[7], alone[11]) > 1e-2


@pytest.mark.parametrize(
    ("seeds", "devices", "padded"),
    [
        ([5], 1, [5]),
        ([5, 6], 2, [5, 6]),
        ([5, 6, 7], 2, [5, 6, 7, 7]),
        ([5, 6, 7], 4, [5, 6, 7, 7]),
        ([5, 6, 7, 8, 9], 4, [5, 6, 7, 8, 9, 9, 9, 9]),
    ],
)
def test_padding_repeats_the_last_seed(seeds, devices, padded):
    assert population.padded(seeds, SimpleNamespace(size=devices)) == padded


def test_mesh_has_no_more_devices_than_seeds():
    devices = len(jax.local_devices())
    for seeds in (1, 2, 3, 100):
        assert population.mesh_for(seeds).size == min(devices, seeds)


def test_a_seeds_key_is_its_own():
    keys = population.keys([7, 0, 2**32 - 1])
    for i, seed in enumerate((7, 0, 2**32 - 1)):
        np.testing.assert_array_equal(
            jax.random.key_data(keys[i]), jax.random.key_data(jax.random.key(np.uint32(seed)))
        )


def test_shared_arguments_are_given_whole():
    mesh = population.mesh_for(2)
    add = population.over_seeds(lambda own, shared: own + shared.sum(), mesh, shared=(1,))
    np.testing.assert_array_equal(add(jnp.array([1.0, 2.0]), jnp.array([10.0, 20.0])), [31, 32])


def test_placed_leaves_can_be_donated_though_they_were_one_buffer():
    mesh = population.mesh_for(2)
    leaf = jnp.arange(2.0)
    tree = population.place({"online": leaf, "target": leaf}, mesh)
    moved = population.over_seeds(
        lambda tree: {"online": tree["online"] + 1, "target": tree["target"] * 2},
        mesh,
        donate=True,
    )(tree)
    np.testing.assert_array_equal(moved["online"], [1, 2])
    np.testing.assert_array_equal(moved["target"], [0, 2])
    assert tree["online"].is_deleted()
    np.testing.assert_array_equal(leaf, [0, 1])


@pytest.mark.parametrize(
    ("asked", "devices"),
    [
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4),
        ({}, len(os.sched_getaffinity(0))),
    ],
    ids=["jax", "xla", "not asked"],
)
def test_who_asks_for_a_number_of_devices_gets_it(asked, devices):
    script = "import batchproof.lab, jax; print(len(jax.devices()))"
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=kept | {"JAX_PLATFORMS": "cpu"} | asked,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == devices
