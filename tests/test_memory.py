"""Freed memory stays with the process: no page is asked for twice."""

import platform
import subprocess
import sys

import pytest

from batchproof import memory

SCRIPT = """
import ctypes, resource, sys, threading
from batchproof.memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
SIZE, COUNT = 16 << 20, int(sys.argv[2])

def update():
    blocks = [ctypes.c_void_p(libc.malloc(SIZE)) for _ in range(COUNT)]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)
    for block in blocks:
        libc.free(block)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        update()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def work():
    returned = faults()
    assert keep_freed_memory()
    update()  # the heaps grow once
    print(returned, faults())

if sys.argv[1] == "thread":
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize("blocks", [1, 12], ids=["one heap", "several heaps"])
def test_blocks_that_were_freed_are_used_again_without_a_page_fault(
    where: str, blocks: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, where, str(blocks)],
        capture_output=True,
        text=True,
        check=True,
    )
    returned, kept = map(int, done.stdout.split())
    assert kept < returned / 10, (returned, kept)


def test_a_c_library_without_mallopt_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is False
