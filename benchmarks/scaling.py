"""How time and peak memory grow with the panoramas of `prepare` and of an epoch of training, with
the rows of a panorama, and with its views. Each point is a process of its own.

    python benchmarks/scaling.py --out lines.json --parts rows --plot docs/scaling.png

Points are kept beside the lines, so that parts can be measured one at a time."""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.append(f"{sys.prefix}/bench")  # requirements-bench.txt

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib import pyplot

import pipeline
import prepare
import real_size
from measure import Line, in_turns, run, write
from panollava import config, paths
from panollava.geometry import views
from photos import save_photos
from training import Steps

Points = list[tuple[float, float, float]]  # how much, seconds, GB
ROOT = Path(__file__).parents[1]
OVERLAPS = {4: 0.0, 8: 0.5, 16: 0.75}  # by the number of views
PARTS = {
    "prepare": "panoramas of prepare, 2048 x 1024",
    "epoch": "panoramas of an epoch of resampler, demo",
    "rows": "rows of a panorama, step of finetune, real size",
    "views": "views of a panorama, step of resampler, real size",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=3, help="each point is the median of so many")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--plot", type=Path, help="where to draw all parts")
    parser.add_argument("--step", nargs=3, metavar=("STAGE", "ROWS", "VIEWS"), help="take it")
    options = parser.parse_args()
    if options.step:
        stage, rows, count = options.step
        options.out.write_text(str(seconds_of_step(stage, int(rows), int(count), options.turns)))
        return
    file = options.out.with_suffix(".points.json")
    points: dict[str, Points] = json.loads(file.read_text()) if file.is_file() else {}
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            points[part] = MEASURES[part](Path(folder), options.turns)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(points))
    write(options.out, [line for part, own in points.items() for line in lines(PARTS[part], own)])
    if options.plot:
        plot(points, options.plot)


def lines(name: str, points: Points) -> list[Line]:
    """The largest against the smallest; the limit is the line that fits all but the largest."""
    x, seconds, memory = np.array(points).T
    straight, flat = (
        float(np.polyval(np.polyfit(x[:-1], y[:-1], 1), x[-1])) for y in (seconds, memory)
    )
    name = f"{name}: {x[-1]:g} against {x[0]:g}"
    return [
        Line(name, "s", seconds[-1], seconds[0], limit=straight, at_most=1.1),
        Line(name, "GB", memory[-1], memory[0], limit=max(flat, memory[0])),
    ]


def plot(points: dict[str, Points], file: Path) -> None:
    figure, panels = pyplot.subplots(1, len(points), figsize=(4 * len(points), 3))
    for panel, (part, own) in zip(np.atleast_1d(panels), points.items(), strict=True):
        x, seconds, memory = zip(*own, strict=True)
        panel.plot(x, seconds, "o-", color="tab:blue")
        panel.set_ylim(bottom=0)
        panel.set_xlabel(PARTS[part].replace(", ", ",\n", 1))
        panel.set_ylabel("s", color="tab:blue")
        other = panel.twinx()
        other.plot(x, memory, "s--", color="tab:orange")
        other.set_ylim(bottom=0, top=1.5 * max(memory))
        other.set_ylabel("peak GB", color="tab:orange")
    figure.tight_layout()
    figure.savefig(file, dpi=80, metadata={"Software": None})


def of_prepare(folder: Path, turns: int) -> Points:
    photos = save_photos(folder, ((2048, 1024),))
    counts = (16, 64, 256)
    command = [sys.executable, str(ROOT / "src/run.py"), "prepare"]
    return [
        (count, *runs(command, prepare.project(folder / str(count), photos, count), turns))
        for count in counts
    ]


def of_epoch(folder: Path, turns: int) -> Points:
    points: Points = []
    for count in (32, 128, 512):
        own = folder / str(count)
        pipeline.make_demo(own, train=count)
        train = [sys.executable, str(ROOT / "src/run.py"), "train"]
        run([*train, "vision", "--epochs", "0"], own)
        points.append((count, *runs([*train, "resampler", "--epochs", "1"], own, turns)))
    return points


def runs(command: list[str], folder: Path, turns: int) -> tuple[float, float]:
    """Median seconds and largest peak (GB) of a command that runs `turns` times."""
    done = []
    for _ in range(turns):
        # A training that has ended would be found there, and not be repeated.
        shutil.rmtree(folder / paths.RESUME, ignore_errors=True)
        done.append(run(command, folder))
    seconds, memory = zip(*done, strict=True)
    return statistics.median(seconds), max(memory)


def of_rows(folder: Path, turns: int) -> Points:
    return [of_step(folder, "finetune", count, 8, count, turns) for count in (1, 2, 4, 8, 16)]


def of_views(folder: Path, turns: int) -> Points:
    return [of_step(folder, "resampler", 3, count, count, turns) for count in OVERLAPS]


def of_step(
    folder: Path, stage: str, rows: int, views: int, x: float, turns: int
) -> tuple[float, float, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--out", "seconds"]
    command += ["--turns", str(turns), "--step", stage, str(rows), str(views)]
    _, memory = run(command, folder)
    return x, float((folder / "seconds").read_text()), memory


def seconds_of_step(stage: str, rows: int, count: int, turns: int) -> float:
    layout = views.layout(config.Views("e2p", 224, 90.0, OVERLAPS[count], 0.0, False))
    steps = Steps(stage, real_size.make_example(1, rows, layout), layout)
    return in_turns(partial(steps.take, steps.our_loss), turns=turns)[0]


MEASURES = {"prepare": of_prepare, "epoch": of_epoch, "rows": of_rows, "views": of_views}

if __name__ == "__main__":
    main()
