"""Several processes end in the bytes of one, and all of them end when one fails."""

import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers import ROOT, Project, change, copy_project
from panollava.cli import launch
from panollava.cli import main as cli
from panollava.cli.launch import check_count
from panollava.config import Settings
from panollava.errors import UserError
from torture import Repro

PARTS = 4


def project_of(folder: Path, towers: Path, data: Path, devices: int) -> Project:
    project = copy_project(folder, towers, data)
    project.set("params.yaml", accumulate=PARTS, threads=1, devices=devices)
    return project


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_number_of_processes_ends_in_the_same_bytes_also_after_a_kill(
    tmp_path: Path, towers: Path, small_data: Path
) -> None:
    alone, two, killed = (
        project_of(tmp_path / name, towers, small_data, devices)
        for name, devices in (("alone", 1), ("two", 2), ("killed", 2))
    )
    assert alone.repro() == two.repro()
    assert two.results() == alone.results()
    run = Repro(killed)
    assert run.wait_until(lambda: any(killed.folder.glob(".resume/vision-*/progress.ckpt")))
    children = psutil.Process(run.process.pid).children(recursive=True)
    run.signal(signal.SIGKILL)
    run.end()
    assert not psutil.wait_procs(children, timeout=10)[1]  # rank 1 ends, too
    killed.set("params.yaml", devices=4)
    output = killed.run("dvc", "repro")
    assert re.search(r"resuming from step \d+ of", output), output
    assert killed.results() == alone.results()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_early_stopping_and_adapters_end_in_the_same_bytes_on_several_processes(
    tmp_path: Path, towers: Path, small_data: Path
) -> None:
    """The first stage, which learns nothing, ends after one epoch, and two of three are left."""
    results = []
    for devices in (1, 2):
        project = project_of(tmp_path / str(devices), towers, small_data, devices)
        project.set("params.yaml", epochs=3)
        for old, new in (
            ("patience: null", "patience: 1"),
            ("lr: 2.0e-5", "lr: 0.0"),
            ("lora: false", "lora: true"),
        ):
            project.replace("params.yaml", old, new)
        output = project.run(sys.executable, "src/run.py", "train", "all")
        assert output.count("no lower validation loss in 1 epochs (patience); trained 1 of 3") == 1
        assert len([*(project.folder / "logs").iterdir()]) == 1
        files = [*project.folder.glob("runs/vlm_*/**/*"), *project.folder.glob("metrics/**/*")]
        results.append(
            {
                str(file.relative_to(project.folder)): file.read_bytes()
                for file in files
                if file.is_file() and "speed" not in file.parts
            }
        )
    assert b"lora." in results[0]["runs/vlm_finetune/model_final.safetensors"]
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, towers: Path, small_data: Path) -> Project:
    folder = tmp_path_factory.mktemp("devices") / "project"
    project = project_of(folder, towers, small_data, 2)
    project.set("params.yaml", save_every=1, log_every=1)
    project.run(sys.executable, "src/run.py", "prepare")
    return project


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kill", r"error: rank 1 was killed by SIGKILL"),
        ("hang", r"error: rank 1 of 2 has ended, or has not answered for 5 seconds"),
        ("error", r"error: rank 1: internal error \(ValueError\)"),
        ("nan", r"error: step 3, rank 1: loss is nan"),
        ("full", r"error: progress.ckpt: No space left"),
        ("terminate", r"step 3 of 4 is saved"),
    ],
)
def test_a_fault_of_one_rank_ends_all_and_keeps_the_last_good_step(
    prepared: Project, fault: str, message: str
) -> None:
    shutil.rmtree(prepared.folder / ".resume", ignore_errors=True)
    command = (sys.executable, str(ROOT / "tests/faulty.py"), "train", "vision")
    output = prepared.run(*command, check=False, environment={"FAULT": fault})
    assert time.time() - (prepared.folder / "fault").stat().st_mtime < 60
    assert re.search(message, output), output
    assert len(re.findall("^error: ", output, re.MULTILINE)) == 1, output
    assert not any("faulty.py" in " ".join(p.info["cmdline"] or ()) for p in mine())
    assert not (prepared.folder / "runs/vlm_vision/model_final.safetensors").exists()
    (work,) = (prepared.folder / ".resume").glob("vision-*")
    names = {file.name.split("-")[0] for file in work.glob("*.ckpt")}
    assert names == {"start.ckpt", "epoch=00", *(["progress.ckpt"] if fault == "terminate" else ())}
    if fault not in ("kill", "terminate"):
        return
    step = 3 if fault == "terminate" else 2
    output = prepared.run(sys.executable, "src/run.py", "train", "vision", "--devices", "1")
    assert f"resuming from step {step} of 4" in output
    shutil.rmtree(prepared.folder / "runs/vlm_vision")


def mine() -> list[psutil.Process]:
    return [*psutil.process_iter(["cmdline"])]


@pytest.mark.parametrize(
    ("accumulate", "epochs", "valid"),
    [
        ((4, 4, 4), (1, 1, 1), (1, 2, 4)),
        ((8, 4, 2), (1, 1, 1), (1, 2)),
        ((6, 6, 6), (1, 1, 1), (1, 2)),
        ((1, 4, 4), (1, 1, 1), (1,)),
        ((1, 4, 4), (0, 1, 1), (1, 2, 4)),  # a stage that does not train
    ],
)
def test_a_number_of_devices_has_to_divide_the_parts_of_all_stages(
    settings: Settings, accumulate: tuple[int, ...], epochs: tuple[int, ...], valid: tuple[int, ...]
) -> None:
    names = ("vision", "resampler", "finetune")
    for name, parts, passes in zip(names, accumulate, epochs, strict=True):
        changes = {f"stage__{name}__accumulate": parts, f"stage__{name}__epochs": passes}
        settings = change(settings, **changes)
    for count in range(1, 9):
        if count in valid:
            check_count(settings, count)
            continue
        with pytest.raises(
            UserError, match=f"{count} processes.*valid: {', '.join(map(str, valid))}$"
        ):
            check_count(settings, count)


def test_options_of_the_command_count_for_the_valid_numbers_of_devices(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage that params.yaml leaves out, and the command trains."""
    params = Path("params.yaml")
    text = re.sub(r"accumulate: \d+", "accumulate: 4", params.read_text())
    params.write_text(
        text.replace("accumulate: 4", "accumulate: 1", 1).replace("epochs: 1", "epochs: 0", 1)
    )
    monkeypatch.setattr("panollava.cli.launch._start", lambda *_: pytest.fail("started"))
    with pytest.raises(SystemExit):
        cli.main(["train", "vision", "--epochs", "1", "--devices", "2"])
    assert "2 processes cannot share the parts of a step" in capsys.readouterr().err


def test_incomplete_variables_of_a_launcher_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Kubernetes and left-over shells set them."""
    complete = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}
    for name, value in complete.items():
        monkeypatch.setenv(name, value)
    assert launch.find_place() == (1, 2, 1, "127.0.0.1", 29500, False)
    for name in ("RANK", "LOCAL_RANK"):
        with monkeypatch.context() as patch:
            patch.delenv(name)
            with pytest.raises(UserError, match=f"WORLD_SIZE=2 is set, but {name} is no number"):
                launch.find_place()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE=two is set, but WORLD_SIZE is no number"):
        launch.find_place()


def test_a_port_in_use_or_without_a_listener_is_reported(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_CONNECT_SECONDS", 1.0)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = launch.Place(0, 2, 0, "127.0.0.1", taken.getsockname()[1])
        message = f"127.0.0.1:{place.port}: cannot listen .*; set MASTER_PORT to a free port"
        with pytest.raises(UserError, match=message), launch.first(place, settings, trains=False):
            pass
    with pytest.raises(UserError, match=f"{place.port}: cannot connect to rank 0"):
        launch._connect(place._replace(rank=1))
