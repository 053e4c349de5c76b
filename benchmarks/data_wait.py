"""The share of a training step that is spent waiting for data, on the demo.

    python benchmarks/data_wait.py [--threads 1] [--stages vision resampler finetune]

Ways to keep the data: one shard with all panoramas, which is one array; shards of 128; stored
panoramas (`data.store: panoramas`), whose views two loader workers sample. They train in turns.
Workers and training share the processor's cores: with `--threads 1`, training leaves them one."""

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import pytorch_lightning as pl

from helpers import change
from measure import PANOLLAVA, Line, options_parser, report, time_alternately
from panollava import paths
from panollava.config import Settings, load_settings
from panollava.data.batches import StepLoader, gather
from panollava.data.prepare import prepare_project
from panollava.data.shards import Shards
from pipeline import make_demo
from training_loop import STEPS, Stop, fit, make_module

WAYS: dict[str, dict[str, Any]] = {
    "one array": {"data__shard_size": 10**6},
    "shards of 128": {"data__shard_size": 128},
    "stored panoramas, two workers": {"data__store": "panoramas", "machine__loader_workers": 2},
}
LARGEST_SHARE = {"one array": 0.02, "shards of 128": 0.02, "stored panoramas, two workers": 0.05}
BATCH = 12  # panoramas


def main() -> None:
    parser = options_parser(__doc__, repeats=5)
    parser.add_argument("--threads", type=int, default=2, help="of the training")
    parser.add_argument("--stages", nargs="*", default=["vision", "resampler", "finetune"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        projects = make_projects(Path(folder), "finetune" in options.stages)
        lines: list[Line] = []
        for stage in options.stages:
            lines += measure_stage(projects, stage, options.threads, options.repeats)
        lines += measure_reading(projects, options.repeats)
    report(lines, options.out)


def make_projects(folder: Path, with_features: bool) -> dict[str, Path]:
    """The demo, prepared in each way, maybe with features of an encoder that is not trained."""
    projects = {way: folder / str(number) for number, way in enumerate(WAYS)}
    first, *others = projects.values()
    make_demo(first)
    for other in others:
        other.mkdir()
        for name in ("data", "towers", "params.yaml"):
            (other / name).symlink_to(first / name)
    for way, project in projects.items():
        prepare_project(settings_of(way, project), project)
    for command in ("train vision", "train resampler", "features") if with_features else ():
        for way in ("one array", "shards of 128"):
            more = ["--epochs", "0"] if command.startswith("train") else []
            subprocess.run(
                [*PANOLLAVA, *command.split(), *more],
                cwd=projects[way],
                check=True,
                capture_output=True,
            )
    return projects


def settings_of(way: str, project: Path, threads: int = 2) -> Settings:
    settings = load_settings(project / paths.PARAMS)
    return change(settings, trainer__threads=threads, **WAYS[way])


def measure_stage(
    projects: dict[str, Path], stage: str, threads: int, repeats: int
) -> Iterator[Line]:
    ways = [way for way in WAYS if stage != "finetune" or "panoramas" not in way]
    shares: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            with contextlib.chdir(projects[way]):
                shares[way].append(waiting(settings_of(way, Path(), threads), stage))
    for way, found in shares.items():
        waited, total = map(statistics.median, zip(*found, strict=True))
        share = statistics.median(a / b for a, b in found)
        name = f"waiting for data, {stage}, {way}, {threads} threads"
        yield Line(f"{name}: ms per step", "ms", 1e3 * waited, limit=1e3 * total)
        yield Line(f"{name}: share of the step", "", share, at_most=LARGEST_SHARE[way])


class _Times(pl.Callback):
    """Seconds of steps, each from the end of the one before, and of their waiting for data."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.waits: list[float] = []
        self.waited: list[float] = []  # of each step

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())
        self.waited.append(sum(self.waits))
        self.waits.clear()
        if len(self.ends) > STEPS:
            raise Stop

    @contextlib.contextmanager
    def watch_loaders(self) -> Iterator[None]:
        start_iterator = StepLoader.__iter__

        def iterate(loader: StepLoader) -> Iterator[Any]:
            batches = start_iterator(loader)
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                self.waits.append(time.perf_counter() - start)
                if batch is None:
                    return
                yield batch

        StepLoader.__iter__ = iterate  # type: ignore[method-assign]
        try:
            yield
        finally:
            StepLoader.__iter__ = start_iterator  # type: ignore[method-assign]


def waiting(settings: Settings, stage: str) -> tuple[float, float]:
    """Mean seconds of waiting per step, and of a step. The first one, for which workers start, does
    not count."""
    times = _Times()
    with times.watch_loaders():
        fit(make_module(stage, settings), settings, times)
    steps = np.diff(times.ends)
    return float(np.mean(times.waited[1:])), float(np.mean(steps))


def measure_reading(projects: dict[str, Path], repeats: int) -> Iterator[Line]:
    """Random batches from files that the system has in memory."""
    folders = {
        "views": paths.PREPARED / "train" / paths.PANORAMAS,
        "features": paths.FEATURES / "train",
    }
    for name, folder in folders.items():
        if not (projects["one array"] / folder).is_dir():
            continue
        array, shards = (Shards(projects[way] / folder) for way in ("one array", "shards of 128"))
        assert len(array.shards) == 1 and len(shards.shards) > 1
        order = np.random.default_rng(0).permutation(len(array))[: len(array) // BATCH * BATCH]
        batches = order.reshape(-1, BATCH).tolist()

        def read(source: Shards, batches: list[list[int]] = batches) -> None:
            for batch in batches:
                gather(source, batch)

        whole, parts = time_alternately(
            partial(read, array), partial(read, shards), repeats=9 * repeats
        )
        each = 1e6 / len(order)
        yield Line(
            f"reading {name} of a panorama: shards of 128 against one array",
            *("us", parts * each, whole * each),
            at_least=0.97,
        )


if __name__ == "__main__":
    main()
