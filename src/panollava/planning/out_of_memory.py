"""Where memory runs out in a training: what was used, and which parameter to set to what, by the
figures of the plan. It stands around `train`, not in it: no result depends on it."""

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
from panollava.planning.plan import memory_if
from panollava.stages import Stage

_SAFE = 0.9  # share of the memory that a plan may fill: allocators waste some
_LATER = 50_000_000  # bytes of modules that are imported after the start


@contextlib.contextmanager
def explain_out_of_memory(stage: Stage, settings: Settings) -> Iterator[None]:
    """Raise too little memory in the block, which trains, as a UserError that names a value to
    set. The processes which load batches have a shortage of their own."""
    program = psutil.Process().memory_info().rss + _LATER
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
    peak, free = peak_memory(device), _free(on_gpu)
    advice = _advice(stage, settings, free, 0 if on_gpu else program)
    raise UserError(
        f"out of memory: {peak / 1e9:.2f} GB were used at the peak, and {free / 1e9:.2f} GB are "
        f"there for this run. {advice}. With other parameters the stage starts anew; with more "
        f"memory, the same command goes on where it was. ({reason})"
    )


def _free(on_gpu: bool) -> int:
    """Bytes that this run can have, those that it has included."""
    if on_gpu:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    own = psutil.Process().memory_info()
    free = own.rss + psutil.virtual_memory().available
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:  # it counts what is mapped and not in memory as well
        free = min(free, limit - (own.vms - own.rss))
    return free


def _advice(stage: Stage, settings: Settings, free: int, program: int) -> str:
    """Smaller parts of a step first, which leave the effective batch size as it is, then gradient
    checkpointing."""
    key = f"stage.{stage.name}.accumulate"
    now = getattr(settings.stage, stage.name).accumulate
    checkpointed = settings.trainer.gradient_checkpointing
    _, work = memory_if(settings, stage, now, checkpointed)
    values = [now]
    while values[-1] < work.panoramas:
        values.append(min(2 * values[-1], work.panoramas))
    options = [(value, checkpointed) for value in values[1:]]
    if not checkpointed:
        options.append((values[-1], True))
    for value, twice in options:
        need = program + memory_if(settings, stage, value, twice)[0].total
        if need <= _SAFE * free:
            changes = [f"{key} to {value} (now {now})"] if value != now else []
            changes += ["trainer.gradient_checkpointing to true"] if twice != checkpointed else []
            return (
                f"Set {' and '.join(changes)}: that takes about {need / 1e9:.2f} GB, and gives "
                "the same result"
            )
    need = program + memory_if(settings, stage, values[-1], True)[0].total
    return (
        f"{key} {values[-1]} with trainer.gradient_checkpointing true takes about "
        f"{need / 1e9:.2f} GB, and is the least that this batch can do with: lower "
        f"stage.{stage.name}.batch_size, take smaller towers, or a machine with more memory"
    )
