"""Tasks on a real Ray cluster of several nodes on this machine."""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers import results, results_of_one_process
from panollava import paths
from panollava.cli import cluster, cluster_check
from panollava.cli import main as cli
from panollava.errors import UserError
from panollava.files import write_text

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """The first node is the one that this process is part of."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray")  # short: it holds the paths of sockets
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        head = {**node, "include_dashboard": False}
        started = Cluster(initialize_head=True, head_node_args=head)
        started.add_node(**node)
        yield started
        started.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where tasks find this file
    (tmp_path / "params.yaml").write_text("seed: 1")
    return tmp_path


def connect(nodes: Any, gpus: int = 0, files: Sequence[Path] = ()) -> Any:
    needs = cluster.Needs(4, gpus, lambda shards: files)
    return cluster.connect(nodes.address, needs, [Path("work")])


def write(numbers: list[int]) -> None:
    for number in numbers:
        write_one(number)


def write_one(number: int) -> None:
    """Of 10: a file. Of 11: a fault of the data, of 12: of the program, of 13: of Python."""
    with Path("log").open("a") as file:
        file.write(f"{number} {os.getpid()}\n")
    time.sleep(0.4)
    match number:
        case 11:
            raise UserError("picture 11: not a picture; remove it")
        case 12:
            raise ValueError("twelve")
        case 13:
            os.kill(os.getpid(), signal.SIGKILL)
    write_text(Path(f"out/{number}"), f"{number}")


def log() -> list[tuple[int, int]]:
    """Number and process of each attempt."""
    if not Path("log").is_file():
        return []
    return [(int(n), int(pid)) for n, pid in map(str.split, Path("log").read_text().splitlines())]


def attempts() -> list[int]:
    return [number for number, _ in log()]


def test_an_error_of_the_data_is_reported_and_not_tried_again(nodes: Any, folder: Path) -> None:
    with connect(nodes) as run:
        with pytest.raises(UserError, match="^picture 11: not a picture; remove it$"):
            run(write, [11])
        with pytest.raises(ValueError, match="twelve"):
            run(write, [12])
    assert attempts() == [11, 12]


def test_a_task_that_kills_its_process_again_and_again_is_an_error(
    nodes: Any, folder: Path, monkeypatch
) -> None:
    monkeypatch.setattr(cluster, "_MAX_RETRIES", 1)
    with connect(nodes) as run, pytest.raises(UserError, match="a task failed 2 times"):
        run(write, [13])
    assert attempts() == [13, 13]


def test_few_tasks_wait_and_all_end_with_the_command(nodes: Any, folder: Path, monkeypatch) -> None:
    waiting, wait = [], ray.wait

    def counted(tasks: list, **options: Any) -> Any:
        waiting.append(len(tasks))
        return wait(tasks, **options)

    monkeypatch.setattr(ray, "wait", counted)
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        while not list(Path("out").glob("*")):
            time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)

    # Where the tests run in the background of a shell, Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), connect(nodes) as run:
        threading.Thread(target=interrupt).start()
        run(write, range(100, 1100))
    assert max(waiting) <= 4  # two for each of two CPUs
    time.sleep(0.5)
    before = len(list(Path("out").iterdir()))
    time.sleep(1.5)
    assert len(list(Path("out").iterdir())) == before < 12


def test_a_machine_with_another_folder_is_named(nodes: Any, folder: Path, monkeypatch) -> None:
    """Machines that see another file at the same place than the one that runs the command does."""
    monkeypatch.setattr(cluster_check, "_VISIBLE_SECONDS", 0.5)
    start_of = cluster_check._start_of
    monkeypatch.setattr(
        cluster_check, "_start_of", lambda path: start_of(path) and b"what the driver sees"
    )
    with (
        pytest.raises(UserError, match=rf"machine \S+: {folder} holds other files.*mount"),
        connect(nodes) as run,
    ):
        run(write, [1])


def test_a_machine_whose_files_are_not_seen_here_is_named(
    nodes: Any, folder: Path, monkeypatch
) -> None:
    monkeypatch.setattr(cluster_check, "_VISIBLE_SECONDS", 0.5)
    monkeypatch.setattr(
        cluster_check, "_answer", lambda token, node: token.with_name(f"{token.name}-elsewhere")
    )
    with (
        pytest.raises(UserError, match=rf"machine \S+: {folder}/work holds other files"),
        connect(nodes) as run,
    ):
        run(write, [1])


def test_a_file_that_a_machine_does_not_see_is_an_error(
    nodes: Any, folder: Path, monkeypatch
) -> None:
    """Here: a picture that changes while tasks run."""
    picture = folder / "pictures/1.jpg"
    picture.parent.mkdir()
    picture.write_bytes(b"one")
    with connect(nodes, files=[picture]) as run:
        run(write, [1])
        check = cluster.check_machines

        def change(*arguments: Any) -> None:
            check(*arguments)
            picture.write_bytes(b"two")

        monkeypatch.setattr(cluster, "check_machines", change)
        with pytest.raises(UserError, match=rf"machine \S+: {picture.parent} holds other files"):
            run(write, [2])
    assert attempts() == [1]


def test_a_task_on_a_gpu_makes_several_shards(nodes: Any, folder: Path) -> None:
    """Its process ends with it, so that no process keeps the memory of a GPU."""
    node = nodes.add_node(num_cpus=1, num_gpus=1, object_store_memory=80 << 20)
    try:
        with connect(nodes, gpus=1) as run:
            run(write, range(100, 116))
    finally:
        nodes.remove_node(node)
    by_process = Counter(pid for _, pid in log())
    assert sorted(by_process.values()) == [2] * 8


def test_a_machine_with_other_versions_is_named(nodes: Any, folder: Path, monkeypatch) -> None:
    versions = cluster_check._versions() | {"torch": "1.0"}
    monkeypatch.setattr(cluster_check, "_versions", lambda: versions)
    with (
        pytest.raises(UserError, match=r"machine \S+: torch: .*, but 1.0 where the command runs"),
        connect(nodes) as run,
    ):
        run(write, [1])


def test_a_cluster_without_a_gpu_is_an_error(nodes: Any, folder: Path) -> None:
    with (
        pytest.raises(UserError, match="no machine of the cluster has a GPU"),
        connect(nodes, gpus=1),
    ):
        pass


@pytest.fixture
def victim(nodes: Any) -> Iterator[psutil.Process]:
    """The process of one more node."""
    node = nodes.add_node(num_cpus=1, object_store_memory=80 << 20)
    yield psutil.Process(node.all_processes["raylet"][0].process.pid)
    nodes.remove_node(node, allow_graceful=False)


def kill_machine(raylet: psutil.Process) -> None:
    for process in (raylet, *raylet.children(recursive=True)):
        process.kill()


def test_a_machine_that_is_lost_changes_no_result(
    nodes: Any, victim: psutil.Process, divided_project: Path
) -> None:
    expected = results_of_one_process()
    for command in ("prepare", "features"):
        shutil.rmtree(paths.RESUME / f"{command}-shards", ignore_errors=True)

    def lose() -> None:
        while not list(paths.RESUME.glob("prepare-shards/*/*.json")):
            time.sleep(0.01)
        for process in victim.children():
            process.suspend()  # with a task, or with the next one
        time.sleep(1)
        kill_machine(victim)

    thread = threading.Thread(target=lose)
    thread.start()
    cli.main(["prepare", "--ray", nodes.address])
    thread.join()
    cli.main(["features", "--ray", nodes.address])
    assert results() == expected
    assert not list(paths.RESUME.glob(".shared*"))


def test_tasks_of_a_machine_that_is_lost_run_again(
    nodes: Any, victim: psutil.Process, folder: Path
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with connect(nodes) as run:
        assert signal.getsignal(signal.SIGTERM) is handler

        def kill() -> None:
            while not {pid for _, pid in log()} & {child.pid for child in victim.children()}:
                time.sleep(0.05)
            kill_machine(victim)

        thread = threading.Thread(target=kill)
        thread.start()
        run(write, range(10))
        thread.join()
    assert sorted(Path("out").iterdir()) == [Path(f"out/{number}") for number in range(10)]
    assert len(attempts()) > 10, "no task was repeated"
    assert {file.name for file in folder.iterdir()} == {"params.yaml", "log", "out", "work"}
    assert not list(Path("work").iterdir())
    assert signal.getsignal(signal.SIGTERM) is handler
