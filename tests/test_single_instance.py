"""Only one process per command and folder."""

import os
from pathlib import Path

import pytest

from panollava.cli import main as cli
from panollava.cli.launch import find_place
from panollava.cli.single_instance import check_first_process, single_instance
from panollava.errors import UserError


def test_a_second_instance_is_refused_with_the_process_id_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with single_instance("prepare"):
        pass
    with single_instance("prepare"):
        with (
            pytest.raises(UserError, match=rf"\(pid {os.getpid()} on \S+\) is already running"),
            single_instance("prepare"),
        ):
            pass
        with single_instance("features"):  # another command
            pass
    # The first one has ended. Its process id, perhaps another one, is no longer named.
    (tmp_path / ".resume/prepare.lock").write_text("123456")
    with (
        single_instance("prepare"),
        pytest.raises(UserError, match=rf"\(pid {os.getpid()} on \S+\) is already running"),
        single_instance("prepare"),
    ):
        pass


def test_parts_run_at_the_same_time_but_not_with_the_same_one_or_the_full_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with single_instance("prepare", "1/3"):
        with single_instance("prepare", "2/3"), single_instance("features"):
            pass
        for shard, holder in (("1/3", ""), (None, "with --shard, most recently 2/3: ")):
            with (
                pytest.raises(UserError, match=rf"\({holder}pid {os.getpid()} on"),
                single_instance("prepare", shard),
            ):
                pass
    with (
        single_instance("prepare"),
        pytest.raises(UserError, match="is already running"),
        single_instance("prepare", "1/3"),
    ):
        pass


LAUNCHES = {
    "srun": {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"},
    "torchrun": {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},
    "MPICH's mpiexec": {"PMI_SIZE": "2", "PMI_RANK": "1"},
}


@pytest.mark.parametrize("command", [["train", "vision"], ["train", "all"], ["prepare"]])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_all_processes_of_a_launch_but_the_first_write_nothing(
    launch: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in LAUNCHES[launch].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="error: .*several processes.*start one process"):
        cli.main(command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train"},  # sbatch, no srun
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        {"RANK": "8"},  # something else, such as that of a LoRA adapter
        {"SLURM_PROCID": ""},
    ],
)
def test_the_first_process_of_a_launch_runs(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_first_process()


def test_a_training_joins_the_processes_of_srun_and_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert find_place() is None
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    slurm = {"STEP_NUM_TASKS": "4", "NTASKS": "4", "PROCID": "3", "LOCALID": "1", "JOB_ID": "54321"}
    for name, value in {
        **slurm,
        "JOB_NAME": "train",
        "NODELIST": "node[07-08]",
        "NTASKS_PER_NODE": "2",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning sets them: remove them afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    place = find_place()
    assert place is not None and place[:4] == (3, 4, 1, "node07") and place.port > 1024
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")  # in a batch script, one process is started
    assert find_place() is None
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    for name, value in {**torchrun, "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert find_place() == (1, 2, 0, "10.0.0.1", 29500, False)
    for name in ("RANK", "LOCAL_RANK"):  # a batch script may set the others
        monkeypatch.delenv(name)
    assert find_place() is None
