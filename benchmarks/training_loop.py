"""A stage's training by Lightning, without what `panollava train` does before and after it."""

import contextlib
import statistics
import time
from typing import Any

import pytorch_lightning as pl
import torch

from panollava.config import Settings
from panollava.stages import STAGES
from panollava.training import train
from panollava.training.lightning_module import LitStage
from panollava.training.objective import load_objective

STEPS = 20  # that are timed


class Stop(Exception):
    """Raised by a callback that needs no further steps."""


def make_module(name: str, settings: Settings) -> LitStage:
    """The stage on what `prepare` and `features` have written; its parts start as pretrained or
    random, not from the stage before."""
    torch.set_num_threads(settings.trainer.threads)
    stage = STAGES[name]
    objective: Any = load_objective(stage, settings)
    objective.open_readers()
    return train.make_module(stage, settings, objective)


def fit(module: LitStage, settings: Settings, *callbacks: pl.Callback) -> None:
    with contextlib.suppress(Stop):
        train._fit(module, settings.trainer, [*callbacks])


class _StepTimes(pl.Callback):
    """Seconds in steps, and between them: waiting for data, and everything else."""

    def __init__(self) -> None:
        self.between: list[float] = []
        self.inside: list[float] = []
        self.last: float | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.between.append(now - self.last)
        self.last = now

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.last is not None
        now = time.perf_counter()
        self.inside.append(now - self.last)
        self.last = now
        if len(self.inside) > STEPS:
            raise Stop


def step_times(settings: Settings, name: str = "resampler") -> tuple[float, float]:
    """Median seconds between two steps of a training, and in a step."""
    times = _StepTimes()
    fit(make_module(name, settings), settings, times)
    return statistics.median(times.between), statistics.median(times.inside)
