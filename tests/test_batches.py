"""Plans of an epoch divide all rows into steps. The loader's workers are tested as real processes
with real signals."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from helpers import ROOT
from panollava.data import batches
from panollava.data.batches import (
    SHUFFLED_SHARDS,
    Plan,
    divide,
    group_rows,
    plan_epoch,
    tree_sum,
    turns,
)

RowsOf = dict[int, list[int]]  # the rows of each panorama


def plan_of(rows: RowsOf, batch_size: int, seed: int, epoch: int | None, *shards: int) -> Plan:
    """`shards`: the number of each shard's first panorama (default: one shard has all)."""
    panoramas = np.repeat([*rows], [len(each) for each in rows.values()])
    groups = group_rows(panoramas, np.concatenate([*rows.values()]))
    starts = np.array([*(shards or [0]), max(rows) + 1])
    return plan_epoch(groups, batch_size, seed, epoch, starts)


def random_rows(seed: int) -> RowsOf:
    """1 to 9 rows for each of 200 panoramas."""
    generator, rows, at = random.Random(seed), {}, 0
    for panorama in range(200):
        count = generator.randint(1, 9)
        rows[panorama] = list(range(at, at + count))
        at += count
    return rows


def test_every_row_is_in_exactly_one_step_of_an_epoch() -> None:
    rows = random_rows(0)
    for epoch in (None, 0, 1):
        steps = plan_of(rows, 8, 0, epoch)
        pairs = [(panorama, row) for step in steps for panorama, part in step for row in part]
        assert sorted(pairs) == [(panorama, row) for panorama in rows for row in rows[panorama]]
        assert all(sum(len(part) for _, part in step) <= 8 for step in steps)


def test_a_panorama_s_rows_stay_in_one_step_if_they_fit() -> None:
    rows = {panorama: numbers[:8] for panorama, numbers in random_rows(1).items()}
    steps = plan_of(rows, 8, 0, 0)
    assert sorted(panorama for step in steps for panorama, _ in step) == list(rows)


@pytest.mark.parametrize("batch_size", [1, 16, 40])
def test_a_step_takes_the_first_panoramas_that_fit_among_the_next_64(batch_size: int) -> None:
    generator = random.Random(0)
    counts = [generator.choice([10, *[30] * 60, 45]) for _ in range(1000)]  # few fill a step of 40
    ends = np.cumsum(counts).tolist()
    rows = {
        n: list(range(end - count, end))
        for n, (count, end) in enumerate(zip(counts, ends, strict=True))
    }
    order = list(rows)
    order = [order[i] for i in np.random.default_rng((0, 1)).permutation(len(order))]
    waiting = [
        (panorama, rows[panorama][at : at + batch_size])
        for panorama in order
        for at in range(0, len(rows[panorama]), batch_size)
    ]
    for step in plan_of(rows, batch_size, 0, 1):
        expected: list[tuple[int, list[int]]] = []
        while fits := [
            (panorama, indices)
            for panorama, indices in waiting[:64]
            if sum(len(i) for _, i in expected) + len(indices) <= batch_size
            and all(panorama != other for other, _ in expected)
        ]:
            expected.append(fits[0])
            waiting.remove(fits[0])
        assert step == expected
    assert not waiting


def test_steps_are_nearly_full() -> None:
    rows = random_rows(2)
    steps = plan_of(rows, 16, 0, 0)
    assert len(steps) <= 1.05 * sum(map(len, rows.values())) / 16


@pytest.mark.parametrize(("batch_size", "panoramas"), [(16, 5), (8, 2), (3, 1)])
def test_with_3_rows_per_panorama_steps_hold_whole_panoramas(
    batch_size: int, panoramas: int
) -> None:
    """`batch_size` is an upper bound: 16 gives 15 rows, 8 gives 6."""
    rows = {panorama: list(range(3 * panorama, 3 * panorama + 3)) for panorama in range(40)}
    steps = plan_of(rows, batch_size, 0, 0)
    assert all(len(step) == panoramas for step in steps)
    size = steps.size
    assert size == (40 // panoramas, 120, 40)
    assert (size.rows_per_step, size.panoramas_per_step) == (3 * panoramas, panoramas)


def test_an_epoch_s_plan_is_a_function_of_seed_and_epoch() -> None:
    rows = random_rows(3)
    plans = [[*plan_of(rows, 8, *which)] for which in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2] and plans[0] != plans[3]


def panoramas_of(plan: Plan) -> list[int]:
    """In the order of the steps."""
    return [panorama for step in plan for panorama, _ in step]


def test_up_to_64_shards_are_shuffled_as_one() -> None:
    """Also if some panoramas have no rows, and shards no panoramas."""
    rows = {panorama: [panorama] for panorama in range(0, 3000, 3)}
    for count in (1, 2, 63, 64):
        shards = [*range(0, 3000, -(-3000 // count))]
        assert 64 >= len(shards) > count - 3
        order = np.random.default_rng((5, 2)).permutation(1000)
        assert panoramas_of(plan_of(rows, 1, 5, 2, *shards)) == [*(3 * order)]


def test_more_shards_are_shuffled_64_at_a_time() -> None:
    """All panoramas of some 64 shards come before those of the next ones, in a random order."""
    panoramas = np.sort(np.random.default_rng(0).permutation(10_000)[:6000])
    rows = {int(panorama): [number] for number, panorama in enumerate(panoramas)}
    shards = [*range(0, 10_000, 50)]
    orders = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        orders.append(panoramas_of(plan_of(rows, 1, seed, epoch, *shards)))
        assert sorted(orders[-1]) == sorted(rows)
        shard_of = np.array(orders[-1]) // 50
        windows, at = [], 0
        while at < len(shard_of):
            window: set[int] = set()
            while at < len(shard_of) and len(window | {shard_of[at]}) <= SHUFFLED_SHARDS:
                window.add(int(shard_of[at]))
                at += 1
            windows.append(window)
        assert [*map(len, windows)] == [64, 64, 64, 8]
        assert set.union(*windows) == set(range(200))
        first = shard_of[: 64 * 25].tolist()
        assert sum(one != other for one, other in pairwise(first)) > 1500  # shuffled within
        assert max(windows[0]) - min(windows[0]) > 100  # of shards in random order
    assert orders[0] == orders[1] and orders[0] not in orders[2:]


def test_validation_keeps_the_order_of_panoramas() -> None:
    rows = {panorama: [panorama] for panorama in range(1000)}
    assert panoramas_of(plan_of(rows, 7, 0, None, *range(0, 1000, 10))) == [*rows]


def test_a_plan_is_made_once_and_its_steps_are_built_when_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int | None] = []

    def count(groups: Any, batch_size: int, seed: int, epoch: int | None, shards: Any) -> Plan:
        made.append(epoch)
        return plan_epoch(groups, batch_size, seed, epoch, shards)

    monkeypatch.setattr(batches, "plan_epoch", count)
    plans = batches.Plans(group_rows(np.repeat(np.arange(9), 3)), 6, 0, np.array([0, 9]))
    for epoch in (1, 0, 0, 0, None, None, 1):
        plan = plans(epoch)
        assert plan.size == (5, 27, 9) and len(plan[1:3]) == 2 and plan[-1] == [*plan][4]
    assert made == [1, 0, None, 1]
    with pytest.raises(IndexError):
        plan[5]


def test_planning_takes_a_few_microseconds_per_panorama_and_no_lists() -> None:
    """However many panoramas there are."""
    counts = np.random.default_rng(0).integers(1, 6, 200_000)
    groups = group_rows(np.repeat(np.arange(len(counts)), counts))
    start = time.process_time()
    plan = plan_epoch(groups, 36, 0, 0, np.array([0, len(counts)]))
    assert time.process_time() - start < 5e-6 * len(counts)
    assert plan.pieces.nbytes + plan.ends.nbytes < 30 * len(counts)


def test_a_panorama_with_more_rows_than_a_step_is_divided() -> None:
    steps = plan_of({0: list(range(20))}, 8, 0, 0)
    assert [len(part) for step in steps for _, part in step] == [8, 8, 4]


def test_the_parts_of_a_step_contain_all_its_rows() -> None:
    step = plan_of(random_rows(4), 16, 0, 0)[0]
    for parts in (1, 2, 3, 50):
        shares = divide(step, parts)
        assert len(shares) == parts and all(shares[: len(step)]) and not any(shares[len(step) :])
        assert sorted(sum(shares, [])) == sorted(step)


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
