"""Turns out-of-memory errors of a training into a UserError that names the parameter to change,
using the plan's estimates. It wraps `train` from outside, so no result depends on it."""

import contextlib
import gc
import resource
import traceback
from collections.abc import Iterator

import psutil
import torch

from panollava.config import Settings
from panollava.errors import UserError, out_of_memory_reason
from panollava.model.device import choose_device, peak_memory
from panollava.planning.plan import memory_with
from panollava.stages import Stage

_USABLE = 0.9  # share of the available memory that a plan may fill: allocators waste some
_LATE_IMPORTS = 50_000_000  # bytes of modules that are imported after the start


@contextlib.contextmanager
def explain_out_of_memory(stage: Stage, settings: Settings) -> Iterator[None]:
    """Raise out-of-memory errors in the block, which trains, as UserErrors with advice. Errors of
    data loader processes pass unchanged: they have another cause."""
    program = psutil.Process().memory_info().rss + _LATE_IMPORTS
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        reason = out_of_memory_reason(error)
        if reason is None or "DataLoader worker" in reason or "shared memory" in reason:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the model and the step
    gc.collect()
    device = choose_device(settings.trainer.accelerator)
    on_gpu = device.type == "cuda"
    peak, available = peak_memory(device), _available(on_gpu)
    advice = _advice(stage, settings, available, 0 if on_gpu else program)
    raise UserError(
        f"out of memory: peak use was {peak / 1e9:.2f} GB of the {available / 1e9:.2f} GB "
        f"available. {advice}. Changed parameters restart the stage; with more memory, the same "
        f"command resumes it. ({reason})"
    )


def _available(on_gpu: bool) -> int:
    """Bytes that this process can use, including those that it uses already."""
    if on_gpu:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    used = psutil.Process().memory_info()
    available = used.rss + psutil.virtual_memory().available
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:  # it also counts memory that is mapped but not resident
        available = min(available, limit - (used.vms - used.rss))
    return available


def _advice(stage: Stage, settings: Settings, available: int, program: int) -> str:
    """The first change that fits: more parts per step, then gradient checkpointing as well. Both
    keep the effective batch size."""
    key = f"stage.{stage.name}.accumulate"
    stage_settings = getattr(settings.stage, stage.name)
    current, checkpointing = stage_settings.accumulate, settings.trainer.gradient_checkpointing
    values = [current]
    while values[-1] < stage_settings.batch_size:
        values.append(min(2 * values[-1], stage_settings.batch_size))
    for value, checkpointed in [*((v, checkpointing) for v in values[1:]), (values[-1], True)]:
        need = program + memory_with(settings, stage, value, checkpointed).total
        changes = [f"{key} to {value} (now {current})"] if value != current else []
        if checkpointed != checkpointing:
            changes.append("trainer.gradient_checkpointing to true")
        if changes and need <= _USABLE * available:
            return (
                f"Set {' and '.join(changes)}: this needs about {need / 1e9:.2f} GB and gives the "
                "same result, except for the last bits"
            )
    return (
        f"Even {key} {values[-1]} with trainer.gradient_checkpointing true needs about "
        f"{need / 1e9:.2f} GB: lower stage.{stage.name}.batch_size, or use smaller towers or a "
        "machine with more memory"
    )
