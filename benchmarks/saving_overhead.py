"""What saving checkpoints costs: the same training with and without it, alternately.

The stage is `vision`, on random panoramas, with an encoder whose steps take about 0.1 s on two
cores. `save_every` is that of params.yaml. The last line is the share of time that saving adds.

    python benchmarks/saving_overhead.py --steps 200 --repeats 5
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pytorch_lightning as pl

from helpers import save_encoder, save_panorama, write_rows
from measure import ROOT
from panollava.config import Settings, load_settings
from panollava.data.prepare import prepare_project
from panollava.training.checkpoints import Checkpoints
from panollava.training.curves import Curves, open_tracker
from panollava.training.lightning_module import LitStage
from training_loop import fit, make_module

EPOCHS = 4


def make_project(folder: Path, batch_size: int, steps: int) -> Settings:
    """The project's settings, with a random encoder and panoramas in `folder`."""
    encoder = save_encoder(folder / "encoder", 64, width=192)
    for split, count in (("train", steps // EPOCHS * batch_size), ("valid", 2), ("test", 1)):
        names = [f"images/{split}_{index}.jpg" for index in range(count)]
        for index, name in enumerate(names):
            save_panorama(folder / "data" / name, index)
        write_rows(folder / f"data/{split}.csv", [(name, "what", "a ball.") for name in names])
    changes = {
        "data.dir": str(folder / "data"),
        "views.size": 64,
        "model.encoder.path": str(encoder),
        "stage.vision.batch_size": batch_size,
        "stage.vision.epochs": EPOCHS,
    }
    return load_settings(ROOT / "params.yaml", changes=changes)


def train(settings: Settings, work: Path | None) -> tuple[float, int]:
    """Seconds and steps of a training that saves to `work`, or not at all."""
    module = make_module("vision", settings)
    trainer, track = settings.trainer, open_tracker(None, "", {})
    callbacks: list[pl.Callback] = [Curves(Path("curves"), trainer.log_every, track)]
    if work is None:
        callbacks.append(NextEpoch())
    else:
        work.mkdir(exist_ok=True)
        callbacks.append(Checkpoints(work, trainer.keep_checkpoints, settings.machine.save_every))
    start = time.perf_counter()
    fit(module, settings, *callbacks)
    return time.perf_counter() - start, module.step


class NextEpoch(pl.Callback):
    """What `Checkpoints` does in addition to saving."""

    def on_validation_end(self, trainer: pl.Trainer, module: LitStage) -> None:  # type: ignore[override]
        if not trainer.sanity_checking:
            module.epoch, module.epoch_step = module.epoch + 1, 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5, help="timed trainings of each kind")
    parser.add_argument("--batch", type=int, default=7, help="panoramas per step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        settings = make_project(folder, options.batch, options.steps)
        prepare_project(settings)
        with_saving, without = [], []
        for repeat in range(options.repeats + 1):
            saved, steps = train(settings, folder / "work")
            plain, _ = train(settings, None)
            if repeat:  # the first one warms up
                with_saving.append(saved)
                without.append(plain)
        size = max(file.stat().st_size for file in (folder / "work").iterdir())
    shares = [100 * (one / other - 1) for one, other in zip(with_saving, without, strict=True)]
    sys.stdout.write(
        f"{steps} steps of {statistics.median(without) / steps:.3f} s; checkpoints of "
        f"{size / 1e6:.1f} MB every {settings.machine.save_every} steps and after each of "
        f"{EPOCHS} epochs\n"
        f"without saving {statistics.median(without):.2f} s, with saving "
        f"{statistics.median(with_saving):.2f} s (medians of {options.repeats})\n"
        f"saving adds {statistics.median(shares):.1f} % "
        f"({min(shares):.1f} to {max(shares):.1f})\n"
    )


if __name__ == "__main__":
    main()
