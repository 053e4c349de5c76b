"""The curves of a training stage: those that are the same for the same inputs, and apart from them
those of this machine's speed and memory."""

import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from dvclive import Live

from panollava.training.lightning_module import LitStage
from panollava.training.tracking import Track


class Curves(pl.Callback):
    """DVCLive's curves of a stage, the same for the same inputs."""

    def __init__(self, folder: Path, every: int, track: Track) -> None:
        self.every, self.track = every, track
        self.live = open_live(folder)

    def write(self, step: int, values: dict[str, float], plot: bool = True) -> None:
        self.live.step = step
        for name, value in values.items():
            self.live.log_metric(name, value, plot=plot)
        self.live.make_summary()
        self.track(step, values)

    def _record(self, module: LitStage, values: dict[str, float]) -> None:
        module.history.append((module.step, values))
        self.write(module.step, values)

    def on_train_batch_end(self, trainer: pl.Trainer, module: LitStage, *_: Any) -> None:  # type: ignore[override]
        last = module.epoch_step == module.epoch_steps[module.epoch]
        if module.step == 1 or module.step % self.every == 0 or last:
            self._record(module, {name: float(value) for name, value in module.values.items()})

    def on_validation_end(self, trainer: pl.Trainer, module: LitStage) -> None:  # type: ignore[override]
        values = trainer.callback_metrics
        names = (name for name in values if name.startswith("val_"))
        self._record(module, {name.replace("_", "/", 1): float(values[name]) for name in names})


class Speed(pl.Callback):
    """Rows a second and peak memory, which differ from run to run, in a folder of their own."""

    def __init__(self, folder: Path, every: int, track: Track) -> None:
        self.every, self.live, self.track = every, open_live(folder), track
        self.rows, self.since = 0, time.perf_counter()

    def on_train_epoch_start(self, *_: Any) -> None:
        self.rows, self.since = 0, time.perf_counter()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: LitStage, outputs: Any, batch: list, batch_idx: int
    ) -> None:
        self.rows += sum(module.objective.count(part) for part in batch)
        if module.step % self.every == 0 or trainer.is_last_batch:
            now = time.perf_counter()
            values = {
                "rows_per_second": self.rows / (now - self.since),
                "peak_memory_gb": peak_memory(module.device) / 1e9,
            }
            self.live.step = module.step
            for name, value in values.items():
                self.live.log_metric(name, value)
            self.live.make_summary()
            self.track(module.step, values)
            self.rows, self.since = 0, now


def open_live(folder: Path) -> Live:
    return Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None)


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
