"""Failures of the machine and of files: the error message, what is kept, and that the same command
works afterwards."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import Project
from panollava import paths
from panollava.cli.main import main
from panollava.model.weights import read_header
from panollava.training.answer_objective import Objective

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def project(finished: Project) -> Iterator[Project]:
    """The finished project. Its results must be the same after the test."""
    expected = finished.results()
    yield finished
    finished.repro()
    assert finished.results() == expected


def fails(project: Project, *command: str, limit: str = "") -> str:
    """The last line of output of a command that must fail. `limit`: a bash command to run first."""
    line = " ".join(("exec", "python", "src/run.py", *command))
    output = project.run("bash", "-c", f"{limit}\n{line}\n", check=False)
    assert "Traceback" not in output, output
    assert "internal error" not in output, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: "), output
    return last


FILES = {  # command: (outputs that DVC removes first, largest file in kB, the file that is named)
    "prepare": ("runs/prepared", 50, r"\.resume/prepare-shards/\w+/\w+\.npy"),
    "train vision": ("runs/vlm_vision", 100, r"\.resume/vision-\w+/start\.ckpt"),
    "features": ("runs/features", 10, r"\.resume/features-shards/\w+/\w+\.npy"),
}


@pytest.mark.parametrize("command", FILES)
def test_a_file_that_gets_too_large_is_named(project: Project, command: str) -> None:
    outputs, limit, name = FILES[command]
    shutil.rmtree(project.folder / outputs)
    shutil.rmtree(project.folder / ".resume")
    last = fails(project, *command.split(), limit=f"ulimit -f {limit}")
    assert re.search(rf"{name}: File too large; raise the limit", last), last
    assert not list(project.folder.rglob("*.part"))


def test_unfinished_work_of_other_code_is_not_resumed(project: Project) -> None:
    command = ("python", "src/run.py", "train", "vision")
    training, evaluation = (
        ("src/panollava/training/vicreg_objective.py", "len(part)"),
        ("src/panollava/evaluation/evaluate.py", "len("),
    )
    project.run(*command)
    for file, old in (evaluation, training):
        project.replace(file, old, f"+{old}")
        output = project.run(*command)
        project.replace(file, f"+{old}", old)
        resumed = file == evaluation[0]
        assert ("resuming from step" in output) == resumed, file
        assert ("the work of another run" in output) != resumed, file


def mounted(folder: Path, *options: str) -> bool:
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True)
    return done.returncode == 0


def test_a_full_disk_is_named_and_the_last_good_state_stays(project: Project) -> None:
    """The disk has room for one checkpoint, but not for two."""
    work, results = project.folder / ".resume", project.folder / "runs/vlm_resampler"
    (checkpoint,) = (results / "checkpoints").iterdir()
    size = checkpoint.stat().st_size * 3 // 2
    shutil.rmtree(results)
    shutil.rmtree(work)
    work.mkdir()
    if not mounted(work, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        pytest.skip("no right to mount a file system")
    try:
        last = fails(project, "train", "resampler")
        assert re.search(r"\.ckpt: No space left on device; free some space", last), last
        assert not list(work.rglob("*.part")) and list(work.glob("resampler-*/progress.ckpt"))
        subprocess.run(["mount", "-o", "remount,size=50m", str(work)], check=True)
        output = project.run("python", "src/run.py", "train", "resampler")
        assert "resuming from step 1 of" in output
    finally:
        subprocess.run(["umount", str(work)], check=True)


def test_a_read_only_folder_is_named(project: Project) -> None:
    folder = project.folder / "runs"
    if not mounted(folder, "--bind", str(folder)):
        pytest.skip("no right to mount a file system")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        last = fails(project, "features")
        assert "runs/features" in last and "Read-only file system; make the file system" in last
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("runs/features", "features"),
        ("metrics/vision", "train vision"),
        ("logs", "prepare"),
        (".resume", "digest"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_named(
    project: Project, folder: str, command: str
) -> None:
    place = project.folder / folder
    shutil.rmtree(place)
    place.touch()
    last = fails(project, *command.split())
    assert folder in last and "a file exists where a folder is needed" in last, last
    place.unlink()


def no_memory_of_the_processor(*_: Any) -> None:
    torch.empty(1 << 50)


def no_memory_of_a_gpu(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def no_memory_of_an_array(*_: Any) -> None:
    np.empty(1 << 50)


@pytest.mark.parametrize(
    "allocate", [no_memory_of_the_processor, no_memory_of_a_gpu, no_memory_of_an_array]
)
def test_out_of_memory_says_what_to_lower_and_keeps_the_steps(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog, allocate: Callable[..., None]
) -> None:
    monkeypatch.chdir(project.folder)
    shutil.rmtree(".resume", ignore_errors=True)
    terms, calls = Objective.terms, 0

    def third_fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return allocate() if calls == 3 else terms(*arguments)

    monkeypatch.setattr(Objective, "terms", third_fails)
    with pytest.raises(SystemExit):
        main(["train", "resampler"])
    message = caplog.records[-1].getMessage()
    wanted = r"out of memory: peak use was .* Set (stage\.resampler\.accumulate|trainer\.grad)"
    assert re.match(wanted, message), message
    main(["train", "resampler"])
    assert "resuming from step 2 of" in caplog.text


def test_a_truncated_result_is_named_and_comes_back_from_the_cache(project: Project) -> None:
    file = project.folder / paths.weights_file("vision")
    whole = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(whole[:5000])
    last = fails(project, "train", "resampler")
    assert "vlm_vision/model_final.safetensors: not a readable" in last and "dvc repro" in last
    output = project.run("dvc", "repro")
    assert "Stage 'vision' is cached" in output and "Running stage" not in output
    assert file.read_bytes() == whole


def test_a_result_of_another_architecture_is_named(project: Project) -> None:
    file = project.folder / paths.weights_file("vision")
    file.chmod(0o644)
    weights = {name: tensor[..., :1].contiguous() for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"panollava": json.dumps(read_header(file))})
    last = fails(project, "train", "resampler")
    assert "model_final.safetensors: does not match the model: " in last, last
    file.unlink()


def test_a_corrupted_cache_file_is_deleted_and_recreated(project: Project) -> None:
    """DVC trusts a read-only cache file."""
    lock = (project.folder / "dvc.lock").read_text()
    found = re.search(r"vlm_vision/model_final\.safetensors\n.*\n\s+md5: (\w\w)(\w+)", lock)
    assert found
    cached = project.folder / ".dvc/cache/files/md5" / found[1] / found[2]
    cached.chmod(0o644)
    cached.write_bytes(cached.read_bytes()[:5000])
    cached.chmod(0o444)
    result = project.folder / paths.weights_file("vision")
    result.unlink()
    assert "Running stage" not in project.run("dvc", "repro")  # a limitation of DVC
    assert result.stat().st_size == 5000
    output = project.run("python", "src/run.py", "verify")
    assert f"{cached}: corrupted; deleted" in output
    result.unlink()
    assert project.repro() == {"vision"}
