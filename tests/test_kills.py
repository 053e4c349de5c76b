"""The pipeline killed, and interrupted, by real signals."""

import re
import signal
from pathlib import Path

import psutil
import pytest

from helpers import copy_project
from torture import TRAININGS, Repro, torture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_pipeline_killed_at_random_moments_ends_in_the_same_bytes(
    tmp_path: Path, towers: Path
) -> None:
    report = torture(tmp_path, towers, kills=7, seed=3)
    assert report.good == report.kills.total() == 7, report.text()
    assert set(report.kills) & set(TRAININGS), report.text()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_the_current_step(
    tmp_path: Path, towers: Path, small_data: Path, number: signal.Signals, workers: int
) -> None:
    project = copy_project(tmp_path / "project", towers, small_data)
    project.set("params.yaml", epochs=20, save_every=1000000, log_every=1, loader_workers=workers)
    curve = project.folder / "metrics/vision/plots/metrics/train/loss.tsv"
    run = Repro(project)
    assert run.wait_until(lambda: curve.is_file() and curve.read_text().count("\n") > 4)
    run.signal(number)
    output = run.end()
    saved = re.search(r"step (\d+) of 40 is saved", output)
    assert saved and run.process.returncode != 0, output
    assert "run the same command again" in output and "Traceback" not in output
    assert output.count("stopping after this step") == 1 and "DataLoader worker" not in output
    output = project.run("dvc", "repro", "vision")
    assert f"resuming from step {saved[1]} of 40" in output


def test_a_command_that_outlives_dvc_blocks_the_next_one(
    tmp_path: Path, towers: Path, small_data: Path
) -> None:
    """If only DVC is killed, the training that it started continues."""
    project = copy_project(tmp_path / "project", towers, small_data)
    project.set("params.yaml", epochs=60, save_every=1)
    run = Repro(project)
    assert run.wait_until(lambda: any(project.folder.glob(".resume/vision-*/progress.ckpt")))
    commands = psutil.Process(run.process.pid).children(recursive=True)
    for command in commands:
        command.suspend()  # so that it does not end before the test
    run.process.kill()
    run.process.wait()
    output = project.run("dvc", "repro", "vision", check=False)
    at_work = re.search(r"another panollava process \(pid (\d+) on \S+\) is already", output)
    assert at_work and int(at_work[1]) in {command.pid for command in commands}, output
    run.signal(signal.SIGKILL)
    run.end()
    assert "resuming from step" in project.run("dvc", "repro", "vision")


def test_a_lock_that_a_reused_process_id_holds_can_be_removed(
    tmp_path: Path, towers: Path, small_data: Path
) -> None:
    """DVC removes the lock of a process that has ended, unless its id is in use again."""
    project = copy_project(tmp_path / "project", towers, small_data)
    run = Repro(project)
    assert run.wait_until(lambda: run.stage == "prepare")
    run.signal(signal.SIGKILL)
    run.end()
    lock = project.folder / ".dvc/tmp/rwlock"
    assert str(run.process.pid) in lock.read_text()
    lock.write_text(lock.read_text().replace(f'"pid": {run.process.pid}', '"pid": 1'))
    output = project.run("dvc", "repro", "prepare", check=False)
    assert "is busy, it is being blocked by" in output
    lock.unlink()
    project.run("dvc", "repro", "prepare")
