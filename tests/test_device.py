"""The device is checked, and freed memory is reused."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from panollava.errors import UserError
from panollava.model.device import choose_device

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

default = faults()
keep_freed_memory()
faults()
print(default, faults())
"""


def test_a_missing_gpu_is_an_error_only_if_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu") == choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match=r"trainer\.accelerator is gpu.*set it to cpu or auto"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("gpu") == choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


def _faults(**environment: str) -> tuple[int, int]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }
    command = [sys.executable, "-c", _PROGRAM]
    out = subprocess.check_output(command, env={**inherited, **environment}, text=True)
    before, after = map(int, out.split())
    return before, after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only for glibc")
def test_freed_memory_is_reused() -> None:
    before, after = _faults()
    assert before > 1000
    assert after < 0.01 * before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only for glibc")
def test_malloc_variables_of_the_environment_take_precedence() -> None:
    before, after = _faults(MALLOC_ARENA_MAX="2")
    assert after > 0.5 * before > 500
