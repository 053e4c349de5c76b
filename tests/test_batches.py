"""Sums over the parts of a step, and rolls of a panorama. The loader's workers are tested as real
processes with real signals."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import torch

from helpers import ROOT
from panollava.data.batches import tree_sum, turns


@pytest.mark.parametrize("empty", [(), (5, 6, 7), (1, 2, 3, 4, 5, 6, 7)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
def test_the_halves_of_a_step_can_be_summed_by_themselves(
    count: int, empty: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((count, 1000), generator=generator) * 1e3

    def total(first: int, count: int) -> torch.Tensor | None:
        parts = range(first, first + count)
        lists = iter([None if n in empty else [values[n].clone()] for n in parts])
        result = tree_sum(lists, count)
        assert next(lists, "none left") == "none left"
        return None if result is None else result[0]

    complete = total(0, count)
    assert complete is not None
    shares = count
    while shares % 2 == 0:
        shares //= 2
        halves = [total(first, shares) for first in range(0, count, shares)]
        while len(halves) > 1:  # as devices add what they have, in pairs
            pairs = zip(halves[::2], halves[1::2], strict=True)
            halves = [a if b is None else b if a is None else a + b for a, b in pairs]
        assert halves[0] is not None and torch.equal(halves[0], complete)
    if count == 8 and not empty:
        assert not torch.equal(complete, values.sum(0))  # the order matters


def test_turns_are_a_function_of_seed_epoch_and_panorama() -> None:
    panoramas = list(range(400))
    drawn = turns(5, 1, panoramas, strides=8)
    assert turns(5, 1, panoramas[::-3], 8) == drawn[::-3]  # of nothing else that is in the step
    for seed, epoch in ((5, 2), (6, 1), (1, 5)):
        equal = sum(a == b for a, b in zip(drawn, turns(seed, epoch, panoramas, 8), strict=True))
        assert 20 < equal < 90  # an eighth of 400, as by chance
    counts = [drawn.count(shift) for shift in range(8)]
    assert sum(counts) == 400 and min(counts) > 25


def test_turns_have_random_numbers_of_their_own() -> None:
    """Not those that order an epoch's panoramas, which NumPy gives for any zeros after the seed."""
    plans = [int(np.random.default_rng((seed, 1)).integers(2**20)) for seed in range(20)]
    assert all(turns(seed, 1, [0], 2**20) != [number] for seed, number in enumerate(plans))


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
if input() == "continue":
    print(sum(batches))
"""

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
Main = tuple[subprocess.Popen[str], list[psutil.Process]]


WAIT = pytest.param(("range(1000)", "next(batches)"), id="workers wait")


@pytest.fixture(params=[WAIT])
def main(request: pytest.FixtureRequest) -> Iterator[Main]:
    """A process with two loader workers, and the workers."""
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
    for one in (process, *workers):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_ignore_signals_to_the_process_group(main: Main, number: signal.Signals) -> None:
    process, workers = main
    for worker in workers:
        worker.send_signal(number)
    output, errors = process.communicate("continue\n", timeout=30)
    assert process.returncode == 0 and int(output) == sum(range(1000)) and not errors


def test_workers_exit_with_a_main_process_that_stops_early(main: Main) -> None:
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
def test_workers_exit_when_the_main_process_is_killed(main: Main) -> None:
    process, workers = main
    process.kill()
    process.wait()
    _, running = psutil.wait_procs(workers, timeout=30)
    assert not running


KILLED_WORKER = """
import os
from panollava.errors import system_errors_as_user_errors
from panollava.data.batches import StepLoader
class Kills:
    def __len__(self):
        return 1
    def __getitem__(self, index):
        os.kill(os.getpid(), NUMBER)
with system_errors_as_user_errors("lower machine.loader_workers"):
    list(StepLoader(Kills(), workers=1, pin_memory=False))
"""


@pytest.mark.parametrize(
    ("number", "is_memory"),
    [(signal.SIGKILL, True), (signal.SIGBUS, True), (signal.SIGSEGV, False)],
)
def test_a_worker_killed_by_the_system_is_reported_as_out_of_memory(
    number: signal.Signals, is_memory: bool
) -> None:
    # In a new process: Lightning resets signal handlers after a training, and so removes PyTorch's
    # handler, which reports how a worker exited.
    result = subprocess.run(
        [sys.executable, "-c", KILLED_WORKER.replace("NUMBER", str(int(number)))],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "killed by signal" in result.stderr
    message = result.stderr.splitlines()[-1]
    assert ("UserError: out of memory: lower machine.loader_workers" in message) == is_memory
