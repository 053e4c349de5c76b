"""The compute device: choosing it, and its memory and threads."""

import ctypes
import os
import platform
import re
import resource
import sys
from pathlib import Path

import torch

from panollava.errors import UserError

# From glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 1 << 30  # bytes: larger blocks are returned to the system


def choose_device(accelerator: str) -> torch.device:
    """The device that Lightning uses for `trainer.accelerator`. Raises UserError if it is gpu and
    there is none."""
    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise UserError(
            f"trainer.accelerator is gpu, but torch {torch.__version__} finds no usable GPU; "
            "set it to cpu or auto"
        )
    return torch.device("cuda" if has_gpu and accelerator != "cpu" else "cpu")


def describe_device(device: torch.device) -> str:
    """Its name, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"processor ({platform.machine()}), {torch.get_num_threads()} threads"


def configure_cpu(threads: int) -> None:
    """The number of threads that torch uses, and `keep_freed_memory`."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Make glibc's malloc reuse freed memory instead of returning it to the system, which would
    clear it again, page by page, in every training step. The peak does not change. Does nothing
    without glibc, or if a MALLOC_* environment variable is set."""
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
    library.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: on `device` if it is a GPU, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # Preferred on Linux: getrusage also counts the peak of the process that started this one.
    if status.is_file() and (match := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
