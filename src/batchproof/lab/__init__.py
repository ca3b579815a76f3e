"""The lab: many seeds at once in JAX, with every normalization choice explicit.

Importing it sets JAX up for CPUs: one device for each core (unless the environment names a number),
so that `batchproof.lab.population` can spread seeds over cores; loops that write several arrays in
one pass; and memory that the process keeps between two calls. The first two have an effect only
before JAX's first computation in the process, and ``XLA_FLAGS`` that already name
``--xla_backend_extra_options`` stay as they are.
"""

import contextlib
import ctypes
import os

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


def _one_pass_for_several_arrays() -> None:
    # An Adam step writes the weights and two moments: three passes over memory without this. Wide
    # networks wait for memory, so one pass shows (docs/crossq.md). It is off in XLA by default, and
    # JAX has no other way to ask for it.
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_backend_extra_options" not in flags:
        wanted = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
        os.environ["XLA_FLAGS"] = f"{flags} {wanted}".strip()


def _keep_freed_memory() -> None:
    # Each call allocates and frees the same tens of MiB. glibc would hand them back to the system
    # and get them again page by page, some 8000 page faults an update of wide critics: so, one heap
    # for all threads, that grows by no other means and is never cut. Other C libraries have no
    # mallopt, or one that does not know these.
    trim_threshold, most_mmaps, most_arenas = -1, -4, -8
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(most_mmaps, 0)
        mallopt(most_arenas, 1)


_one_device_per_core()
_one_pass_for_several_arrays()
_keep_freed_memory()
