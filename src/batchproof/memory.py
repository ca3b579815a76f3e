"""Let the process keep the memory that a computation frees, for the next one."""

from __future__ import annotations

import contextlib
import ctypes

# glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX, and how large the heaps of its threads are.
_TRIM_THRESHOLD, _TOP_PAD, _MOST_MMAPS = -1, -2, -4
_HEAP = 64 << 20


def keep_freed_memory() -> bool:
    """Heaps that never shrink, and no block outside them (glibc's ``mallopt``).

    Training allocates and frees the same tens of MiB at every update. glibc hands them back to the
    system and gets them again page by page, each page cleared. The call holds for the whole
    process, from now on, and no number changes. The price is that the process stays as large as it
    ever was. `batchproof.lab` does this when it is imported; Stable-Baselines3's users call it
    themselves, before they train on images. Source: mallopt(3).

    Returns:
        Whether it could: False with a C library that has no ``mallopt`` or refuses a setting
        (macOS, Windows, musl), where nothing is needed or nothing can be done.
    """
    # A pad as large as a thread's heap keeps its empty heaps. One heap for all threads would do so
    # too, and they would wait for each other.
    settings = {_TRIM_THRESHOLD: 2**31 - 1, _MOST_MMAPS: 0, _TOP_PAD: _HEAP}
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all([mallopt(name, value) for name, value in settings.items()])
    return False
