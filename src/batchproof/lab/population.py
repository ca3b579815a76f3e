"""Many seeds at once: `jax.vmap` over seeds, spread over the devices that JAX has.

A CPU counts as one device per core (see `batchproof.lab`), so two cores train two halves of a
population side by side without a lock between them. Seeds never talk to each other.

Shapes: ``P`` population, the number of seeds with padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SEEDS = PartitionSpec("seeds")
SHARED = PartitionSpec()


def mesh_for(seeds: int) -> Mesh:
    """The devices that ``seeds`` seeds are spread over: no more than there are seeds."""
    devices = jax.local_devices()
    return jax.make_mesh(
        (min(len(devices), seeds),),
        ("seeds",),
        devices=devices[: min(len(devices), seeds)],
        axis_types=(jax.sharding.AxisType.Auto,),
    )


def padded(seeds: list[int], mesh: Mesh) -> list[int]:
    """The seeds, the last one repeated until every device has as many: its copies are dropped."""
    return seeds + [seeds[-1]] * (-len(seeds) % mesh.size)


def keys(seeds: list[int]) -> Array:
    """One key a seed, (P,). A seed's randomness is the same in every population."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def over_seeds(
    function: Callable[..., Any],
    mesh: Mesh,
    shared: tuple[int, ...] = (),
    donate: bool = False,
    rare: bool = False,
) -> Callable[..., Any]:
    """Compile a function of one seed into one of all seeds.

    Args:
        function: of positional arguments, written for one seed.
        mesh: from `mesh_for`.
        shared: positions of the arguments that all seeds share; all others have a leading axis P.
        donate: let the first argument's memory hold the result.
        rare: called so seldom that compiling fast matters more than running fast.

    Returns:
        The compiled function; everything that it returns has a leading axis P.
    """

    def for_all(*args: Any) -> Any:
        axes = tuple(None if i in shared else 0 for i in range(len(args)))
        specs = tuple(SHARED if i in shared else SEEDS for i in range(len(args)))
        batched = jax.vmap(function, in_axes=axes)
        if mesh.size == 1:
            return batched(*args)
        spread = jax.shard_map(batched, mesh=mesh, in_specs=specs, out_specs=SEEDS, check_vma=False)
        return spread(*args)

    # Random draws compile slowly when optimized: ten seconds against one for two small networks.
    options = {"xla_backend_optimization_level": 0} if rare else None
    return jax.jit(for_all, donate_argnums=(0,) if donate else (), compiler_options=options)


def place(tree: Any, mesh: Mesh) -> Any:
    """Put a tree with leading axes P onto the devices, in buffers of its own.

    The copy matters: leaves that are one buffer (a target network equal to its network) cannot
    both be donated.
    """
    return jax.tree.map(partial(_place_leaf, sharding=NamedSharding(mesh, SEEDS)), tree)


def _place_leaf(leaf: Array, sharding: NamedSharding) -> Array:
    return jax.device_put(jnp.copy(leaf), sharding)
