"""What saving costs: the same training with and without it, turn by turn in one process.

The stage is `vision`, on random panoramas and an encoder whose steps take about 0.1 s on two
cores; `save_every` is that of params.yaml. The last line is the share that saving adds.

    python benchmarks/saving_overhead.py --steps 200 --turns 5
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import pytorch_lightning as pl
import torch

from conftest import ROOT, save_encoder, save_panorama, write_rows
from panollava.config import Settings, load_settings
from panollava.data.prepare import prepare_project
from panollava.stages import find_stage
from panollava.training import train
from panollava.training.checkpoints import Checkpoints
from panollava.training.curves import Curves, open_tracker
from panollava.training.lightning_module import LitStage
from panollava.training.objective import freeze_all_but
from panollava.training.vicreg_objective import Objective

EPOCHS = 4


def small_settings(folder: Path, batch: int, steps: int) -> Settings:
    """Of the project, with towers and data under `folder`."""
    settings = load_settings(ROOT / "params.yaml")
    encoder = dataclasses.replace(
        settings.model.encoder, path=str(save_encoder(folder / "encoder", 64, width=192))
    )
    vision = dataclasses.replace(settings.stage.vision, batch_size=batch, epochs=EPOCHS)
    for split, count in (("train", steps // EPOCHS * batch), ("valid", 2), ("test", 1)):
        names = [f"images/{split}_{index}.jpg" for index in range(count)]
        for index, name in enumerate(names):
            save_panorama(folder / "data" / name, index)
        write_rows(folder / f"data/{split}.csv", [(name, "what", "a ball.") for name in names])
    return dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, dir=str(folder / "data")),
        views=dataclasses.replace(settings.views, size=64),
        model=dataclasses.replace(settings.model, encoder=encoder),
        stage=dataclasses.replace(settings.stage, vision=vision),
    )


def seconds(settings: Settings, work: Path | None) -> tuple[float, int]:
    """Of one training, without what comes before it, and its steps. `work`: where it saves."""
    own, stage = settings.stage.vision, find_stage("vision")
    objective: Any = Objective(stage, settings)
    objective.open_readers()
    freeze_all_but(objective.model, stage.trains)
    module = LitStage(
        objective, settings.trainer, settings.machine, own.epochs, own.accumulate, settings.seed
    )
    track = open_tracker(None, "", {})
    callbacks: list[pl.Callback] = [Curves(Path("curves"), settings.trainer.log_every, track)]
    if work:
        work.mkdir(exist_ok=True)
        trainer = settings.trainer
        callbacks.append(Checkpoints(work, trainer.keep_checkpoints, settings.machine.save_every))
    start = time.perf_counter()
    if work is None:
        callbacks.append(NextEpoch())
    train._fit(module, settings.trainer, own.epochs, callbacks)
    return time.perf_counter() - start, module.step


class NextEpoch(pl.Callback):
    """What `Checkpoints` does besides saving."""

    def on_validation_end(self, trainer: pl.Trainer, module: LitStage) -> None:  # type: ignore[override]
        module.epoch, module.epoch_step = module.epoch + 1, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch", type=int, default=7, help="panoramas a step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = small_settings(folder, options.batch, options.steps)
        os.chdir(folder)
        torch.set_num_threads(settings.trainer.threads)
        prepare_project(settings)
        with_saving, without = [], []
        for turn in range(options.turns + 1):
            saved, steps = seconds(settings, folder / "work")
            plain, _ = seconds(settings, None)
            if turn:  # the first one warms up
                with_saving.append(saved)
                without.append(plain)
        size = max(file.stat().st_size for file in (folder / "work").iterdir())
    ratios = np.array(with_saving) / np.array(without)
    sys.stdout.write(
        f"{steps} steps of {statistics.median(without) / steps:.3f} s; checkpoints of "
        f"{size / 1e6:.1f} MB every {settings.machine.save_every} steps, and after each of "
        f"{EPOCHS} epochs\n"
        f"without saving {statistics.median(without):.2f} s, with it "
        f"{statistics.median(with_saving):.2f} s (medians of {options.turns})\n"
        f"saving adds {100 * (statistics.median(ratios) - 1):.1f} % "
        f"({100 * (min(ratios) - 1):.1f} to {100 * (max(ratios) - 1):.1f})\n"
    )


if __name__ == "__main__":
    main()
