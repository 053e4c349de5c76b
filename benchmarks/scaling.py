"""How time and peak memory grow with the panoramas of `prepare` and of a training epoch, with the
rows of a panorama, and with its views. Each point is measured in a process of its own.

    python benchmarks/scaling.py --out lines.json --parts rows --plot docs/scaling.png

Points are kept in a file next to `--out`, so that parts can be measured separately."""

import dataclasses
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
from measure import PANOLLAVA, Line, options_parser, report, run, time_alternately
from panollava import paths
from photos import save_photos
from training import Steps

Points = list[tuple[float, float, float]]  # size, seconds, GB
OVERLAPS = {4: 0.0, 8: 0.5, 16: 0.75}  # by the number of views
PARTS = {
    "prepare": "panoramas of prepare, 2048 x 1024",
    "epoch": "panoramas of an epoch of resampler, demo",
    "rows": "rows of a panorama, step of finetune, real size",
    "views": "views of a panorama, step of resampler, real size",
}


def main() -> None:
    parser = options_parser(__doc__, repeats=3)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--plot", type=Path, help="the picture to write, of all parts")
    parser.add_argument(
        "--step", nargs=3, metavar=("STAGE", "ROWS", "VIEWS"), help="only time this step"
    )
    options = parser.parse_args()
    if options.step:
        stage, rows, count = options.step
        options.out.write_text(str(seconds_of_step(stage, int(rows), int(count), options.repeats)))
        return
    points: dict[str, Points] = {}
    file = options.out and options.out.with_suffix(".points.json")
    if file and file.is_file():
        points = json.loads(file.read_text())
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            points[part] = MEASURES[part](Path(folder), options.repeats)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(points))
    report([line for part in points for line in compare(PARTS[part], points[part])], options.out)
    if options.plot:
        plot(points, options.plot)


def compare(name: str, points: Points) -> list[Line]:
    """The largest size against the smallest. The limit is a linear fit of the other sizes."""
    x, seconds, memory = np.array(points).T
    linear_seconds, linear_memory = (
        float(np.polyval(np.polyfit(x[:-1], y[:-1], 1), x[-1])) for y in (seconds, memory)
    )
    name = f"{name}: {x[-1]:g} against {x[0]:g}"
    return [
        Line(name, "s", seconds[-1], seconds[0], limit=linear_seconds, at_most=1.1),
        Line(name, "GB", memory[-1], memory[0], limit=max(linear_memory, memory[0])),
    ]


def plot(points: dict[str, Points], file: Path) -> None:
    figure, panels = pyplot.subplots(1, len(points), figsize=(4 * len(points), 3))
    for panel, (part, values) in zip(np.atleast_1d(panels), points.items(), strict=True):
        x, seconds, memory = zip(*values, strict=True)
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


def measure_prepare(folder: Path, repeats: int) -> Points:
    photos = save_photos(folder, ((2048, 1024),))
    points: Points = []
    for count in (16, 64, 256):
        project = prepare.make_project(folder / str(count), photos, count)
        points.append((count, *run_repeatedly(["prepare"], project, repeats)))
    return points


def measure_epoch(folder: Path, repeats: int) -> Points:
    points: Points = []
    for count in (32, 128, 512):
        project = folder / str(count)
        pipeline.make_demo(project, train=count)
        run([*PANOLLAVA, "train", "vision", "--epochs", "0"], project)
        command = ["train", "resampler", "--epochs", "1"]
        points.append((count, *run_repeatedly(command, project, repeats)))
    return points


def run_repeatedly(arguments: list[str], folder: Path, repeats: int) -> tuple[float, float]:
    """Median seconds and largest peak (GB) of a command of panollava."""
    done = []
    for _ in range(repeats):
        # Otherwise the next run would find a finished training and not repeat it.
        shutil.rmtree(folder / paths.RESUME, ignore_errors=True)
        done.append(run([*PANOLLAVA, *arguments], folder))
    seconds, memory = zip(*done, strict=True)
    return statistics.median(seconds), max(memory)


def measure_rows(folder: Path, repeats: int) -> Points:
    return [(rows, *run_step(folder, "finetune", rows, 8, repeats)) for rows in (1, 2, 4, 8, 16)]


def measure_views(folder: Path, repeats: int) -> Points:
    return [(count, *run_step(folder, "resampler", 3, count, repeats)) for count in OVERLAPS]


def run_step(
    folder: Path, stage: str, rows: int, view_count: int, repeats: int
) -> tuple[float, float]:
    """Seconds and peak GB of a step, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--out", "seconds"]
    command += ["--repeats", str(repeats), "--step", stage, str(rows), str(view_count)]
    _, memory = run(command, folder)
    return float((folder / "seconds").read_text()), memory


def seconds_of_step(stage: str, rows: int, view_count: int, repeats: int) -> float:
    overlap = OVERLAPS[view_count]
    views = dataclasses.replace(real_size.VIEWS, overlap=overlap)
    example = real_size.make_example(1, rows, view_settings=views)
    steps = Steps(stage, example, view_settings=views)
    return time_alternately(partial(steps.take, steps.our_loss), repeats=repeats)[0]


MEASURES = {
    "prepare": measure_prepare,
    "epoch": measure_epoch,
    "rows": measure_rows,
    "views": measure_views,
}

if __name__ == "__main__":
    main()
