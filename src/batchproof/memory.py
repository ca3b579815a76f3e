"""Let the process keep the memory that a computation frees, for the next one."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MOST_MMAPS, _MOST_ARENAS = -1, -4, -8  # glibc's M_...: mallopt's parameters


def keep_freed_memory() -> bool:
    """One heap for all threads that never shrinks, and no block outside it (glibc's ``mallopt``).

    Training allocates and frees the same tens of MiB at every update. glibc hands them back to the
    system and gets them again page by page, each page cleared: some 9000 page faults an update. It
    holds for the whole process, from now on, and no number changes. The price is that the process
    stays as large as it ever was. `batchproof.lab` does this when it is imported;
    Stable-Baselines3's users call it themselves, before they train on images.

    Returns:
        Whether it could: False with a C library that has no ``mallopt`` or refuses a setting
        (macOS, Windows, musl), where nothing is needed or nothing can be done.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        settings = {_TRIM_THRESHOLD: 2**31 - 1, _MOST_MMAPS: 0, _MOST_ARENAS: 1}
        return all([mallopt(name, value) for name, value in settings.items()])
    return False
