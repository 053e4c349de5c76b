"""Kills the pipeline at random moments, resumes it, and compares the results with those of an
uninterrupted run.

A copy of the project with little data and small towers runs `dvc repro` without interruption. In
another copy, SIGKILL ends DVC and all its processes again and again: at a random moment of a stage,
at a random moment of its training, or while a file is being written. When the pipeline has
finished, lock files and metrics must be equal, byte for byte.

    make torture ARGS="--kills 40 --seed 0"
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import Project, copy_project, save_towers

STAGES = (
    *("scenes", "prepare", "vision", "resampler", "features", "finetune", "evaluate"),
    "report",
)
TRAININGS = ("vision", "resampler", "finetune")
WRITES_LONG = (*TRAININGS, "prepare", "features")  # stages that write large files
_STARTS = re.compile(r"Running stage '(?:.*:)?(\w+)'")
_TRAINS = re.compile(r"\d+ epochs, \d+ steps")
# DVC's messages about files that a killed DVC leaves behind, and the file to remove.
LEFTOVERS = (
    (re.compile(r"being blocked by|RWLock-file"), ".dvc/tmp/rwlock"),
    (re.compile(r"dvc\.lock' is (invalid|corrupted)|unable to read: 'dvc\.lock'"), "dvc.lock"),
    (re.compile(r"data/demo/dvc\.lock' is"), "data/demo/dvc.lock"),
)


@dataclass
class Report:
    kills: Counter[str] = field(default_factory=Counter)  # by stage
    moments: Counter[str] = field(default_factory=Counter)
    resumed: dict[str, list[str]] = field(default_factory=dict)  # by stage, "12 of 40"
    removed: Counter[str] = field(default_factory=Counter)  # files, as DVC's messages demand
    passes: int = 0
    good: int = 0  # kills in passes whose results were equal

    def text(self) -> str:
        lines = [f"{'stage':10} {'kills':>5}  resumed from step"]
        for stage in STAGES:
            steps = ", ".join(self.resumed.get(stage, [])) or "-"
            lines.append(f"{stage:10} {self.kills[stage]:5}  {steps}")
        total = self.kills.total()
        moments = ", ".join(f"{count} {moment}" for moment, count in self.moments.items())
        lines.append(f"moments: {moments}")
        for file, count in self.removed.items():
            lines.append(f"removed before resuming: {file}, {count} times")
        lines.append(f"{self.good} of {total} kills led to equal results ({self.passes} passes)")
        return "\n".join(lines)


class Repro:
    """A running `dvc repro`, with its output so far."""

    def __init__(self, project: Project) -> None:
        self.lines: list[tuple[float, str]] = []
        self.stage = ""
        self.process = subprocess.Popen(
            ["dvc", "repro"],
            cwd=project.folder,
            env={**project.environment, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if started := _STARTS.search(line):
                self.stage = started[1]
            self.lines.append((time.monotonic(), line.rstrip()))

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """False if the process ended first."""
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.001)
        return False

    def signal(self, number: int) -> None:
        """Send a signal to DVC and all processes that it started."""
        os.killpg(self.process.pid, number)

    def end(self) -> str:
        """Wait for the end. Returns the output."""
        self.process.wait()
        self._reader.join()
        return "\n".join(line for _, line in self.lines)


@dataclass
class Times:
    """Seconds of an uninterrupted stage."""

    total: float
    training: float = 0.0


def measure(run: Repro) -> dict[str, Times]:
    marks: list[tuple[float, str, bool]] = []
    for at, line in run.lines:
        if started := _STARTS.search(line):
            marks.append((at, started[1], False))
        elif _TRAINS.search(line):
            marks.append((at, marks[-1][1], True))
    marks.append((run.lines[-1][0], "", False))
    times: dict[str, Times] = {}
    for (at, stage, training), (end, _, _) in zip(marks, marks[1:], strict=False):
        if training:
            times[stage].training = end - at
            times[stage].total += end - at
        else:
            times[stage] = Times(end - at)
    return times


def torture(
    folder: Path, towers: Path, kills: int, seed: int, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Kill `kills` times. Raises AssertionError if a run fails or its results differ."""
    generator = random.Random(seed)
    uninterrupted = _copy(folder / "uninterrupted", towers)
    run = Repro(uninterrupted)
    output = run.end()
    assert run.process.returncode == 0, output
    expected, times = uninterrupted.results(), measure(run)
    say("uninterrupted: " + ", ".join(f"{name} {t.total:.0f} s" for name, t in times.items()))
    report = Report()
    while report.kills.total() < kills:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        project = _copy(folder / "killed", towers)
        before = report.kills.total()
        # Two kills of each stage per pass; the last pass has the remaining ones in random stages.
        remaining = kills - before
        targets = generator.sample(STAGES * 2, min(remaining, 2 * len(STAGES)))
        _one_pass(project, sorted(targets, key=STAGES.index), times, generator, report, say)
        report.passes += 1
        results = project.results()
        different = [
            name
            for name in expected.keys() | results.keys()
            if expected.get(name) != results.get(name)
        ]
        assert not different, f"{folder}: these differ after kills: {sorted(different)}"
        report.good += report.kills.total() - before
    return report


def _copy(folder: Path, towers: Path) -> Project:
    """With trainings of some seconds that save often."""
    project = copy_project(folder, towers, data=None)
    project.set("params.yaml", epochs=4, batch_size=4, save_every=5, log_every=5)
    project.commit("longer")
    return project


def _one_pass(
    project: Project,
    targets: list[str],
    times: dict[str, Times],
    generator: random.Random,
    report: Report,
    say: Callable[[str], None],
) -> None:
    """Run the pipeline to its end, with a kill in each of `targets`."""
    while True:
        run = Repro(project)
        killed = _kill(run, project, targets, times, generator, report)
        output = run.end()
        for stage, step in re.findall(
            r"stage \d, (\w+): starts.*?(?:resuming from step ([\d of]+)|\Z)", output, re.S
        ):
            if step:
                report.resumed.setdefault(stage, []).append(step.strip())
        if killed:
            report.kills[run.stage] += 1
            report.moments[killed] += 1
            say(f"killed {run.stage}, {killed}")
        elif run.process.returncode == 0:
            return
        else:
            file = next((file for message, file in LEFTOVERS if message.search(output)), None)
            assert file, output
            say(f"removed {file}")
            report.removed[file] += 1
            (project.folder / file).unlink()


def _kill(
    run: Repro,
    project: Project,
    targets: list[str],
    times: dict[str, Times],
    generator: random.Random,
    report: Report,
) -> str:
    """Kill the run in the next target. Returns the kind of moment, or "" if the run ended first."""

    def reached() -> bool:
        while targets and run.stage in STAGES and _after(run.stage, targets[0]):
            targets.pop(0)
        return bool(targets) and run.stage == targets[0]

    if not run.wait_until(reached):
        return ""
    stage = targets.pop(0)
    moment, delay = "at any moment", generator.uniform(0, 0.9 * times[stage].total)
    if stage in WRITES_LONG and generator.random() < 0.5:
        moment = "while a file is written"
    if stage in TRAININGS and generator.random() < 0.5:
        moment, delay = "in training", generator.uniform(0, times[stage].training)
        if not run.wait_until(lambda: bool(_TRAINS.search(run.lines[-1][1]))):
            return ""
    deadline = time.monotonic() + delay
    if not run.wait_until(lambda: time.monotonic() > deadline):
        return ""
    if moment == "while a file is written" and not run.wait_until(
        lambda: _writes(project.folder) or _after(run.stage, stage)
    ):
        return ""
    run.signal(signal.SIGKILL)
    return moment


def _after(stage: str, other: str) -> bool:
    return stage in STAGES and STAGES.index(stage) > STAGES.index(other)


def _writes(folder: Path) -> bool:
    folders = (".resume", "runs", "metrics/evaluate")
    return any(next((folder / name).rglob("*.part"), None) for name in folders)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        towers = save_towers(folder / "towers")
        report = torture(folder, towers, options.kills, options.seed, _say)
    _say(report.text())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
