"""Processes that the GPU benchmark starts, each a training by Lightning; prints JSON.

start STAGE     seconds from the start of the process to the end of the tenth step, and the rate
train DIE_AT    stage resampler as `panollava train` runs it; kills itself after that step"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
import pytorch_lightning as pl
import torch

import gpu_project
from panollava import paths
from panollava.config import Settings
from panollava.stages import STAGES
from panollava.training import lightning_module, train
from panollava.training.cuda_graphs import Rerun
from panollava.training.curves import Curves
from training_loop import Stop, fit, make_module

TENTH, WARM, TIMED = 10, 110, 80  # steps; the second epoch has few new shapes


class _Clock(pl.Callback):
    """The tenth step's end, then steps and the time between them on the processor."""

    def __init__(self, started: float, tiny: bool) -> None:
        self.started, self.steps = started, 0
        self.warm, self.timed = (12, 4) if tiny else (WARM, TIMED)
        self.result: dict[str, float] = {}
        self.between: list[float] = []
        self.ended = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        if self.steps > self.warm:
            self.between.append(time.perf_counter() - self.ended)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.steps += 1
        if self.steps in (TENTH, self.warm, self.warm + self.timed):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.time()
            if self.steps == TENTH:
                self.result["tenth"] = now - self.started
            elif self.steps == self.warm:
                self.since, self.rows = now, 0
            else:
                self.result["rows_per_second"] = (self.rows + batch.rows) / (now - self.since)
                self.result["between_ms"] = 1e3 * sorted(self.between)[len(self.between) // 2]
                if torch.cuda.is_available():
                    self.result["peak_gb"] = torch.cuda.max_memory_reserved() / 1e9
                raise Stop
        if self.steps > self.warm:
            self.rows += batch.rows
        self.ended = time.perf_counter()


def start(stage: str, settings: Settings, tiny: bool) -> dict[str, float]:
    clock = _Clock(psutil.Process().create_time(), tiny)
    fit(make_module(stage, settings), settings, clock)
    return clock.result


def run(settings: Settings, die_at: int) -> dict[str, str]:
    """Both compile and deterministic, which `panollava train` refuses on a GPU."""
    checked: Any = train
    checked.check_deterministic = lambda *_: None
    write = Curves.on_train_batch_end

    def die(self: Curves, trainer: Any, module: Any, *rest: Any) -> None:
        write(self, trainer, module, *rest)
        if module.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Curves.on_train_batch_end = die  # type: ignore[method-assign]
    train.train(STAGES["resampler"], settings)
    content = paths.weights_file("resampler").read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("start", "train"))
    parser.add_argument("which")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--set", action="append", default=[], help="KEY=JSON")
    options = parser.parse_args()
    changes = {key: json.loads(text) for key, text in (each.split("=") for each in options.set)}
    if options.tiny:  # without a GPU: the same steps, run again instead of replayed
        modules: list[Any] = [lightning_module, train]
        for module in modules:
            module.needs_few_shapes = lambda _: True
        modules[0].make_recorder = lambda *_: Rerun()
    if options.what == "start":
        result: Any = start(options.which, gpu_project.load(options.tiny, **changes), options.tiny)
    else:
        from helpers import change, settings_for

        settings = change(
            settings_for(Path("small/towers")),
            data__dir="small/data",
            stage__resampler__batch_size=4,
            stage__resampler__accumulate=2,
            stage__resampler__epochs=4,
            stage__vision__epochs=0,
            machine__save_every=1,
            **{f"stage__{name}__max_text_length": 99 for name in ("resampler", "finetune")},
            **{name.replace("trainer.", "trainer__"): value for name, value in changes.items()},
        )
        if options.which == "prepare":
            from helpers import save_data, save_towers
            from panollava.data.prepare import prepare_project

            save_towers(Path("small/towers"))
            save_data(Path("small/data"))
            prepare_project(settings)
            train.train(STAGES["vision"], settings)
            result = {}
        else:
            result = run(settings, int(options.which))
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
