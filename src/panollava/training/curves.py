"""The curves of a training stage, by DVCLive and on Weights & Biases: those that are equal for
equal inputs, and separately those of speed and memory, which differ from run to run."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from dvclive import Live

from panollava.data.batches import StepBatch
from panollava.errors import UserError
from panollava.model.device import peak_memory
from panollava.training.lightning_module import LitStage

Track = Callable[[int, Mapping[str, Any]], None]


class _Writer(pl.Callback):
    """Writes values to `folder`/plots with DVCLive, and to `track`."""

    def __init__(self, folder: Path, every: int, track: Track) -> None:
        self.every, self.track = every, track
        self.live = Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None)
        Path(self.live.plots_dir).mkdir(exist_ok=True)  # an output of the stage, even if empty

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.live.step = step
        for name, value in values.items():
            self.live.log_metric(name, value)
        self.track(step, values)


class Curves(_Writer):
    """Writes the curves of training every `every` steps, and of validation before the first step
    and after each epoch.

    DVCLive's summary, the last value of each curve, is not written: metrics.json holds the metrics
    of the step with the lowest validation loss."""

    def _record(self, module: LitStage, values: dict[str, float]) -> None:
        module.history.append((module.step, values))
        self.write(module.step, values)

    def on_train_batch_end(self, trainer: pl.Trainer, module: LitStage, *_: Any) -> None:  # type: ignore[override]
        if module.step == 1 or module.step % self.every == 0 or trainer.is_last_batch:
            self._record(module, {name: float(value) for name, value in module.values.items()})

    def on_validation_end(self, trainer: pl.Trainer, module: LitStage) -> None:  # type: ignore[override]
        values = trainer.callback_metrics
        names = (name for name in values if name.startswith("val_"))
        self._record(module, {name.replace("_", "/", 1): float(values[name]) for name in names})


class Speed(_Writer):
    """Writes rows per second and peak memory to a folder apart from the other curves."""

    def on_train_epoch_start(self, *_: Any) -> None:
        self.rows, self.since = 0, time.perf_counter()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: LitStage, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        self.rows += batch.rows
        if module.step % self.every == 0 or trainer.is_last_batch:
            now = time.perf_counter()
            values = {
                "rows_per_second": self.rows / (now - self.since),
                "peak_memory_gb": peak_memory(module.device) / 1e9,
            }
            self.write(module.step, values)
            self.live.make_summary()
            self.rows, self.since = 0, now


def open_tracker(project: str | None, name: str, parameters: dict[str, Any]) -> Track:
    """A function that logs the values of a step to a new run `name` on Weights & Biases, or does
    nothing if there is no project. A run ends when the next one starts, or with the process.

    Raises:
        UserError: wandb is not installed.
    """
    if project is None:
        return lambda step, values: None
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError(
            f"machine.wandb: '{project}' needs Weights & Biases, which is not installed; "
            "run: pip install wandb, or set machine.wandb to null"
        ) from None
    run = wandb.init(project=project, name=name, config=parameters, reinit="finish_previous")
    return lambda step, values: run.log(dict(values), step=step)
