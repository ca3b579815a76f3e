"""What is said of the processor, from what Linux says of it."""

import platform

import pytest

from batchproof import cpu, records

ZEN5 = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC
flags\t\t: fma avx2 avx512f avx512_bf16

processor\t: 1
vendor_id\t: AuthenticAMD
model name\t: another
flags\t\t: fma
"""
XEON = "vendor_id\t: GenuineIntel\nmodel name\t: Intel Xeon\nflags\t\t: fma avx2 amx_bf16\n"
OLD = "vendor_id\t: AuthenticAMD\nmodel name\t: Opteron\nflags\t\t: sse2\n"


@pytest.mark.parametrize(
    ("info", "name", "bfloat16", "amd"),
    [
        (ZEN5, "AMD EPYC with AVX-512 and bfloat16", True, True),
        (XEON, "Intel Xeon with AVX2 and bfloat16", True, False),
        (OLD, "Opteron", False, True),
        ("Hardware\t: BCM2835\n", platform.processor() or platform.machine(), None, False),
        (None, platform.processor() or platform.machine(), None, False),
    ],
    ids=["zen5", "xeon", "old", "arm", "no-linux"],
)
def test_what_linux_says_is_put_in_words(tmp_path, monkeypatch, info, name, bfloat16, amd):
    path = tmp_path / "cpuinfo"
    if info is not None:
        path.write_text(info)
    monkeypatch.setattr(cpu, "_INFO", path)
    cpu._described.cache_clear()
    try:
        assert cpu.name() == name
        assert cpu.has_bfloat16() is bfloat16
        assert cpu.is_amd() is amd
        assert records.machine()["processor"] == name
    finally:
        cpu._described.cache_clear()
