"""What a user waits for beside the work itself: the first training step of the demo, a batch's
data, and a `dvc repro` that finds nothing to do."""

import argparse
import contextlib
import dataclasses
import importlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pytorch_lightning as pl
import torch

from conftest import save_encoder, save_language_model
from measure import Line, write
from panollava import config, paths
from panollava.data.prepare import prepare
from panollava.demo.dataset import make_scenes
from panollava.demo.settings import load_demo_settings
from panollava.stages import find_stage
from panollava.training import train
from project import copy_project

ROOT = Path(__file__).parents[1]
STEPS = 20  # whose data are waited for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    out = options.out.resolve()  # the folder changes
    with tempfile.TemporaryDirectory() as name:
        demo = Path(name) / "demo"
        make_demo(demo)
        lines = first_steps(demo, options.turns)
        lines.append(waiting(demo))
        lines.append(nothing_to_do(Path(name) / "project", options.turns))
    write(out, lines)


def make_demo(folder: Path, train: int | None = None) -> None:
    """The demo with its data prepared, and nothing trained. `train`: its panoramas, if fewer."""
    (folder / "data").mkdir(parents=True)
    (folder / "towers").symlink_to(ROOT / "data/demo/towers")
    demo = load_demo_settings(ROOT / "data/demo/params.yaml")
    if train is not None:
        scenes = dataclasses.replace(demo.scenes, train=train, valid=8, test=1)
        demo = dataclasses.replace(demo, scenes=scenes)
    make_scenes(demo, folder / "data")
    profile = (ROOT / "params.yaml").read_text()
    profile = profile.replace("data/demo/towers", "towers").replace("dir: data/demo", "dir: data")
    (folder / "params.yaml").write_text(profile)
    settings = config.load_settings(folder / "params.yaml")
    prepare(settings.data, settings.views, folder / paths.PREPARED, folder)


def first_steps(folder: Path, turns: int) -> list[Line]:
    """From the start of Python to the end of the first step, which writes the first point of a
    curve. A stage of no epochs passes on what it starts from, so that the next one can start."""
    lines = []
    for stage in ("vision", "resampler"):
        curve = folder / paths.curves_folder(stage) / "plots/metrics/train/loss.tsv"
        seconds = [until(curve, ["train", stage], folder) for _ in range(turns)]
        what = f"from python to the first step of {stage}, demo"
        lines.append(Line(what, "s", statistics.median(seconds), at_most=6.0))
        command = [sys.executable, str(ROOT / "src/run.py"), "train", stage, "--epochs", "0"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return lines


def until(file: Path, command: list[str], folder: Path) -> float:
    """Seconds until a command writes a file, after which the command is stopped."""
    file.unlink(missing_ok=True)
    start = time.perf_counter()
    with (folder / "output.log").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "src/run.py"), *command],
            cwd=folder,
            stdout=output,
            stderr=output,
        )
    while not file.is_file():
        assert process.poll() is None, (folder / "output.log").read_text()
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    process.send_signal(signal.SIGKILL)
    process.wait()
    return seconds


class Enough(Exception):
    pass


class Gaps(pl.Callback):
    """Time between the steps, which is that of waiting for the next one's data and all else that
    is not the step, and time in them."""

    def __init__(self) -> None:
        self.between: list[float] = []
        self.inside: list[float] = []
        self.since: float | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        now = time.perf_counter()
        if self.since is not None:
            self.between.append(now - self.since)
        self.since = now

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.since is not None
        now = time.perf_counter()
        self.inside.append(now - self.since)
        self.since = now
        if len(self.inside) > STEPS:
            raise Enough


def waiting(folder: Path) -> Line:
    os.chdir(folder)
    between, inside = gaps(config.load_settings(folder / "params.yaml"))
    what = "between two steps of resampler, demo, against the step"
    return Line(what, "ms", 1e3 * between, limit=1e3 * inside, at_most=0.02)


def gaps(settings: config.Settings, name: str = "resampler") -> tuple[float, float]:
    """Median seconds between two steps of a real training, and in them."""
    torch.set_num_threads(settings.trainer.threads)
    stage = find_stage(name)
    objective: Any = importlib.import_module(stage.objective).Objective(stage, settings)
    objective.open_readers()
    module = train.make_module(stage, settings, objective)
    found = Gaps()
    with contextlib.suppress(Enough):
        train._fit(module, settings.trainer, getattr(settings.stage, name).epochs, [found])
    return statistics.median(found.between), statistics.median(found.inside)


def nothing_to_do(folder: Path, turns: int) -> Line:
    """A pipeline with as many files as the demo's, once it has run on small towers."""
    save_encoder(folder.parent / "small/encoder", size=32)
    save_language_model(folder.parent / "small/language_model")
    project = copy_project(folder, folder.parent / "small", data=None)
    scenes = dataclasses.asdict(load_demo_settings(ROOT / "data/demo/params.yaml").scenes)
    project.set("data/demo/params.yaml", height=32, **scenes)
    project.set("params.yaml", batch_size=400, max_new_tokens=4)
    project.repro()
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        ran = project.repro()
        seconds.append(time.perf_counter() - start)
        assert not ran, ran
    what = "dvc repro with nothing to do"
    return Line(what, "s", statistics.median(seconds), at_most=2.5)


if __name__ == "__main__":
    main()
