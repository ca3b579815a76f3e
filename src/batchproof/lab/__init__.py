"""The lab: many seeds at once in JAX, with every normalization choice explicit.

Importing it gives JAX one CPU device for each core, so that `batchproof.lab.population` can spread
seeds over cores, unless the environment names a number. That has an effect only before JAX's first
computation in the process. And it lets the process keep the memory that a computation frees for the
next one.
"""

import contextlib
import os

from batchproof.memory import keep_freed_memory

try:
    import jax
except ModuleNotFoundError as error:  # the base install has no JAX
    from batchproof.errors import BatchproofError

    raise BatchproofError(
        "the lab needs JAX, which is not installed: pip install 'batchproof[lab]'"
    ) from error


def _one_device_per_core() -> None:
    # Whoever asked for a number of devices in one of JAX's own ways gets it.
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if forced or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # JAX raises once a backend is running: then the process keeps the devices it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", cores or 1)


_one_device_per_core()
keep_freed_memory()
