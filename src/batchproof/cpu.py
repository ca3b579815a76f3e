"""What this machine's processor is called and can compute with; nothing that names the host."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

_INFO = Path("/proc/cpuinfo")
# In the words of Linux, the widest first: these decide how fast matrix products are.
_WIDTHS = {"avx512f": "AVX-512", "avx2": "AVX2"}
_BFLOAT16 = ("avx512_bf16", "amx_bf16")


@functools.cache
def _described() -> dict[str, str]:
    """The first processor's lines in /proc/cpuinfo; empty where there is none (not Linux)."""
    try:
        lines = _INFO.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def flags() -> frozenset[str]:
    """Instruction sets, as Linux calls them; empty on another system."""
    return frozenset(_described().get("flags", "").split())


def is_amd() -> bool:
    """Whether it is known to be AMD's."""
    return _described().get("vendor_id") == "AuthenticAMD"


def has_bfloat16() -> bool | None:
    """Whether it has instructions for products of bfloat16; None where nobody says."""
    return any(name in flags() for name in _BFLOAT16) if flags() else None


def name() -> str:
    """Its name, with the widest vectors and bfloat16 where it has them: they decide its speed."""
    found = _described().get("model name") or platform.processor() or platform.machine()
    has = [words for flag, words in _WIDTHS.items() if flag in flags()][:1]
    if has_bfloat16():
        has.append("bfloat16")
    return f"{found} with {' and '.join(has)}" if has else found
