"""--shard, --merge and --ray on the command line."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from helpers import ROOT, results, results_of_one_process
from panollava import paths
from panollava.cli import cluster
from panollava.cli import main as cli
from panollava.data import prepare
from panollava.data.shard_work import open_store
from panollava.errors import UserError
from panollava.provenance.resume import remove_finished
from panollava.training import features


@pytest.mark.parametrize("value", ["0/3", "4/3", "3", "1/0", "1/3/5", "-1/3", "x/3", "1/ 3", ""])
@pytest.mark.parametrize("command", [["prepare"], ["features"], ["download", "data"]])
def test_a_wrong_part_is_an_error(command: list[str], value: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command, f"--shard={value}"])
    message = f"argument --shard: expected I/N with I from 1 to N, found '{value}'"
    assert message in capsys.readouterr().err


def test_the_options_exclude_each_other(capsys: Any) -> None:
    options = ["--shard=1/2", "--merge", "--ray=auto"]
    for command, known in (("prepare", options), ("features", options), ("download", options[:2])):
        place = ["data"] if command == "download" else []
        for one in known:
            for other in set(known) - {one}:
                with pytest.raises(SystemExit):
                    cli.main([command, *place, one, other])
                assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["ray://head:10001", "local", "head", "head:port", ""])
def test_a_wrong_address_is_an_error(value: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.main(["prepare", f"--ray={value}"])
    assert f"expected HOST:PORT of a running cluster, or auto, found '{value}'" in (
        capsys.readouterr().err
    )


LAUNCHES = {
    "srun": {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"},
    "an array": {"SLURM_ARRAY_TASK_ID": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"},
}


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("command", ["prepare", "features"])
def test_every_process_of_a_launch_takes_its_part(
    launch: str, command: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With machine.devices: 2, too: a part is one process."""
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("devices: 1", "devices: 2"))
    for name, value in LAUNCHES[launch].items():
        monkeypatch.setenv(name, value)
    seen = []
    for module, name in ((prepare, "prepare_project"), (features, "write_features")):
        monkeypatch.setattr(module, name, lambda settings, **keywords: seen.append(keywords))
    finished = paths.RESUME / "vision-1/finished"
    finished.parent.mkdir(parents=True)
    finished.touch()
    cli.main([command, "--shard", "3/4"])
    assert seen == [{"part": (3, 4), "merge": False}]
    assert finished.exists(), "another part, or a training, may still need it"
    assert len(list(paths.LOGS.glob(f"{command}_3_of_4_*.log"))) == 1


def test_merging_is_the_work_of_one_process(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    for command in ("prepare", "features"):
        with pytest.raises(SystemExit, match="SLURM_PROCID=2: several processes"):
            cli.main([command, "--merge"])


def test_finished_shards_stay_when_the_command_runs_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "prepare_project", lambda settings, **keywords: None)
    for name in ("prepare-shards", "vision-1"):
        (paths.RESUME / name).mkdir(parents=True)
        (paths.RESUME / name / "finished").touch()
    cli.main(["prepare"])
    assert (paths.RESUME / "prepare-shards").is_dir()
    assert not (paths.RESUME / "vision-1").exists()


def test_no_cluster_and_no_ray_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = cluster.Needs(1, 0, lambda shards: [])
    address = "127.0.0.1:9"
    with (
        pytest.raises(UserError, match=f"--ray {address}: cannot connect"),
        cluster.connect(address, needs, []),
    ):
        pass
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UserError, match=r"--ray needs Ray .*pip install -e \.\[ray\]"),
        cluster.connect(address, needs, []),
    ):
        pass


def test_parts_of_any_number_give_the_files_of_one_process(
    divided_project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = results_of_one_process()
    for count in (1, 3, 7):
        for command in ("prepare", "features"):
            shutil.rmtree(paths.RESUME / f"{command}-shards", ignore_errors=True)
            for number in range(1, count + 1):
                with pytest.raises(SystemExit):
                    cli.main([command, "--merge"])
                assert re.search(r"--merge: \d+ of \d+ shards are missing \(\w+ \d", caplog.text)
                caplog.clear()
                cli.main([command, "--shard", f"{number}/{count}"])
            cli.main([command, "--merge"])
            cli.main([command])  # as DVC does afterwards
            assert "shards are finished already" in caplog.text
        assert results() == expected, count


def test_the_work_of_a_part_is_not_taken_for_finished(divided_project: Path) -> None:
    """With an earlier result of the same command: a training that starts now deletes what is."""
    cli.main(["prepare"])
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("fov: 90", "fov: 80"))
    cli.main(["prepare", "--shard", "1/2"])
    remove_finished(except_stage="vision")
    assert list(paths.RESUME.glob("prepare-shards/*/*.json"))


def test_a_record_that_is_seen_late_is_no_missing_one(divided_project: Path) -> None:
    cli.main(["prepare"])
    expected = results()
    record = next(paths.RESUME.glob("prepare-shards/*/*.json"))
    store = open_store("prepare", None)
    away = record.rename("away.json")
    Timer(0.5, lambda: away.rename(record)).start()
    assert len(store.records([record.stem])) == 1
    cli.main(["prepare", "--merge"])
    assert results() == expected


@pytest.mark.slow
def test_parts_run_at_the_same_time(divided_project: Path) -> None:
    expected = results_of_one_process()
    for command in ("prepare", "features"):
        shutil.rmtree(paths.RESUME / f"{command}-shards", ignore_errors=True)
        processes = [start(command, "--shard", f"{number}/3") for number in (1, 2, 3)]
        for process in processes:
            assert process.wait() == 0, process.stderr and process.stderr.read()
        cli.main([command, "--merge"])
    assert results() == expected


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "src/run.py"), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
