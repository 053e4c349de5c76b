"""What a user waits for besides the work itself: the first training step of the demo, the data of a
batch, and a `dvc repro` that has nothing to do."""

import contextlib
import dataclasses
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import copy_project, save_towers
from measure import PANOLLAVA, ROOT, Line, options_parser, report
from panollava import paths
from panollava.config import load_settings
from panollava.data.prepare import prepare_project
from panollava.demo.dataset import make_scenes
from panollava.demo.settings import load_demo_settings
from training_loop import step_times


def main() -> None:
    options = options_parser(__doc__, repeats=3).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        make_demo(demo)
        lines = measure_first_steps(demo, options.repeats)
        lines.append(measure_waiting(demo))
        lines.append(measure_idle_repro(Path(folder), options.repeats))
    report(lines, options.out)


def make_demo(folder: Path, train: int | None = None) -> None:
    """The demo with prepared data and untrained stages. `train`: a smaller number of panoramas."""
    (folder / "data").mkdir(parents=True)
    (folder / "towers").symlink_to(ROOT / "data/demo/towers")
    demo = load_demo_settings(ROOT / "data/demo/params.yaml")
    if train is not None:
        scenes = dataclasses.replace(demo.scenes, train=train, valid=8, test=1)
        demo = dataclasses.replace(demo, scenes=scenes)
    make_scenes(demo, folder / "data")
    params = (ROOT / "params.yaml").read_text()
    params = params.replace("data/demo/towers", "towers").replace("dir: data/demo", "dir: data")
    (folder / "params.yaml").write_text(params)
    settings = load_settings(folder / "params.yaml")
    prepare_project(settings, folder)


def measure_first_steps(folder: Path, repeats: int) -> list[Line]:
    """From the start of Python to the end of the first step, which writes the first point of a
    curve. Each stage is then run with no epochs, so that the next one can start."""
    lines = []
    for stage in ("vision", "resampler"):
        curve = folder / paths.curves_folder(stage) / "plots/metrics/train/loss.tsv"
        seconds = [seconds_until(curve, ["train", stage], folder) for _ in range(repeats)]
        what = f"from the start of python to the first step of {stage}, demo"
        lines.append(Line(what, "s", statistics.median(seconds), at_most=6.0))
        command = [*PANOLLAVA, "train", stage, "--epochs", "0"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return lines


def seconds_until(file: Path, arguments: list[str], folder: Path) -> float:
    """Seconds until a command of panollava writes `file`. The command is killed then."""
    file.unlink(missing_ok=True)
    start = time.perf_counter()
    with (folder / "output.log").open("w") as output:
        process = subprocess.Popen(
            [*PANOLLAVA, *arguments], cwd=folder, stdout=output, stderr=output
        )
    while not file.is_file():
        assert process.poll() is None, (folder / "output.log").read_text()
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    process.send_signal(signal.SIGKILL)
    process.wait()
    return seconds


def measure_waiting(folder: Path) -> Line:
    with contextlib.chdir(folder):
        between, inside = step_times(load_settings(paths.PARAMS))
    what = "between two steps of resampler, demo, against the step"
    return Line(what, "ms", 1e3 * between, limit=1e3 * inside, at_most=0.02)


def measure_idle_repro(folder: Path, repeats: int) -> Line:
    """With as many files as the demo, after a run with small towers."""
    project = copy_project(folder / "project", save_towers(folder / "small"), data=None)
    scenes = dataclasses.asdict(load_demo_settings(ROOT / "data/demo/params.yaml").scenes)
    project.set("data/demo/params.yaml", height=32, **scenes)
    project.set("params.yaml", batch_size=400, max_new_tokens=4)
    project.repro()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        ran = project.repro()
        seconds.append(time.perf_counter() - start)
        assert not ran, ran
    what = "dvc repro with nothing to do"
    return Line(what, "s", statistics.median(seconds), at_most=2.5)


if __name__ == "__main__":
    main()
