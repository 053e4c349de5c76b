"""Memory is kept between steps, and nothing is changed where someone else has decided."""

import os
import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
import torch
from panollava.model.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        for size in (1 << 22, 1 << 24):  # floats: 16 and 64 MB
            torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
keep_freed_memory()
faults()
print(usual, faults())
"""


def _faults(**environment: str) -> tuple[int, int]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", _PROGRAM]
    out = subprocess.check_output(command, env={**kept, **environment}, text=True)
    before, after = map(int, out.split())
    return before, after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_freed_memory_is_there_for_the_next_step() -> None:
    before, after = _faults()
    assert before > 1000
    assert after < 0.01 * before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_what_the_environment_says_stays() -> None:
    before, after = _faults(MALLOC_ARENA_MAX="2")
    assert after > 0.5 * before > 500
