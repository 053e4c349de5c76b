"""The curves of a training stage: those that are the same for the same inputs, and apart from them
those of this machine's speed and memory."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from dvclive import Live

from panollava.errors import UserError
from panollava.model.device import peak_memory
from panollava.training.lightning_module import LitStage

Track = Callable[[int, Mapping[str, float]], None]


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


def open_tracker(project: str | None, name: str, settings: dict[str, Any]) -> Track:
    """What writes the values of a step to a new run `name`; nothing where there is no project.
    A run ends when the next one starts, or with the process.

    Raises UserError if wandb isn't installed."""
    if project is None:
        return lambda step, values: None
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError(
            f"machine.wandb: '{project}' asks for Weights & Biases, which isn't installed: "
            "pip install wandb, or set machine.wandb to null"
        ) from None
    run = wandb.init(project=project, name=name, config=settings, reinit="finish_previous")
    return lambda step, values: run.log(dict(values), step=step)
