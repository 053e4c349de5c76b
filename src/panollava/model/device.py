"""The device: which one, its precision (autocast, frozen layers in bf16) and its memory."""

import ctypes
import os
import platform
import re
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from panollava.errors import UserError

# From glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 1 << 30  # bytes of a block that is kept


def choose_device(accelerator: str) -> torch.device:
    """The device that Lightning would take for `trainer.accelerator`. Raises UserError for a GPU
    that isn't there."""
    there = torch.cuda.is_available()
    if accelerator == "gpu" and not there:
        raise UserError(
            f"trainer.accelerator: found gpu, but torch {torch.__version__} finds no GPU that it "
            "can use; set it to cpu, or to auto, which takes a GPU where there is one"
        )
    return torch.device("cuda" if there and accelerator != "cpu" else "cpu")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """As Lightning does it in training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16"))


def cast_frozen_linears(model: nn.Module, precision: str, keep: tuple[str, ...] = ()) -> None:
    """Hold the linear layers of all parts of `model`, but those that `keep` names, in the precision
    in which autocast computes them: the same results in half the memory, and no copy in each pass.
    Not for what is trained or saved.

    An embedding's weights stay as they are, and so does a head that shares them: what is looked up
    isn't rounded under autocast."""
    if not precision.startswith("bf16"):
        return
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, part in model.named_children():
        for layer in () if name in keep else part.modules():
            if type(layer) is nn.Linear and id(layer.weight) not in looked_up:
                layer.to(torch.bfloat16)


def keep_freed_memory() -> None:
    """Keep what is freed for what is allocated next, as each step of a training does it alike:
    memory that is new from the system has to be cleared by it, page by page. The peak stays as it
    is. Without glibc, or where a variable MALLOC_* says how, nothing changes."""
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
    library.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU that trains, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # What follows knows no better than the largest of this program and the one that started it.
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
