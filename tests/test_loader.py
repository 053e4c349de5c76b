"""Real worker processes, and real signals."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from conftest import ROOT

MAIN = """
import time
from multiprocessing import active_children
from panollava.data.batches import StepLoader
class Slow:
    def __len__(self):
        return 10
    def __getitem__(self, index):
        time.sleep(1000)
batches = iter(StepLoader(DATASET, workers=2, pin_memory=False))
START
print(*(worker.pid for worker in active_children()), flush=True)
if input() == "go on":
    print(sum(batches))
"""

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
Main = tuple[subprocess.Popen[str], list[psutil.Process]]


WAIT = pytest.param(("range(1000)", "next(batches)"), id="workers wait")


@pytest.fixture(params=[WAIT])
def main(request: pytest.FixtureRequest) -> Iterator[Main]:
    """A process that has workers, and these."""
    dataset, start = request.param
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN.replace("DATASET", dataset).replace("START", start)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    yield process, workers
    for own in (process, *workers):
        with contextlib.suppress(psutil.NoSuchProcess):
            own.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_go_on_when_a_signal_reaches_all(main: Main, number: signal.Signals) -> None:
    process, workers = main
    for worker in workers:
        worker.send_signal(number)
    output, errors = process.communicate("go on\n", timeout=30)
    assert process.returncode == 0 and int(output) == sum(range(1000)) and not errors


def test_workers_end_with_a_main_process_that_is_not_through(main: Main) -> None:
    process, workers = main
    _, errors = process.communicate("end\n", timeout=30)
    assert process.returncode == 0 and not errors
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.parametrize(
    "main",
    [
        WAIT,
        pytest.param(("range(1000)", ""), id="workers start"),
        pytest.param(("Slow()", "time.sleep(1)"), id="workers load"),
    ],
    indirect=True,
)
def test_workers_end_when_the_main_process_is_killed(main: Main) -> None:
    process, workers = main
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


ENDS = """
import os
from panollava.errors import system_errors_as_user_errors
from panollava.data.batches import StepLoader
class Ends:
    def __len__(self):
        return 1
    def __getitem__(self, index):
        os.kill(os.getpid(), NUMBER)
with system_errors_as_user_errors("lower machine.loader_workers"):
    list(StepLoader(Ends(), workers=1, pin_memory=False))
"""


@pytest.mark.parametrize(
    ("number", "told"),
    [(signal.SIGKILL, True), (signal.SIGBUS, True), (signal.SIGSEGV, False)],
)
def test_a_worker_that_the_system_kills_is_told_as_too_little_memory(
    number: signal.Signals, told: bool
) -> None:
    # A process of its own, as each training has: Lightning ends a training with the handlers of
    # signals from before it, without PyTorch's, which says how a worker ended.
    ran = subprocess.run(
        [sys.executable, "-c", ENDS.replace("NUMBER", str(int(number)))],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1 and "killed by signal" in ran.stderr
    raised = ran.stderr.splitlines()[-1]
    assert ("UserError: out of memory: lower machine.loader_workers" in raised) == told
