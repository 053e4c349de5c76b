"""Exchange between real processes over gloo: sums, gathered rows, and ranks that end or hang."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest
import torch
import torch.distributed as dist

from panollava.data.batches import tree_sum
from panollava.model import ranks

Function = Callable[[], Any]


LIMIT = timedelta(seconds=60)


def run(count: int, function: Function) -> list[Any]:
    """What `function` returns in each of `count` processes, or the error that it raises.

    They are forked from a process without threads: pytest's may have some, whose locks would stay
    locked in a copy."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cloudpickle", "torch.distributed"])
    server = dist.TCPStore("127.0.0.1", 0, count, True, LIMIT, wait_for_workers=False)
    results = context.Queue()
    pickled = cloudpickle.dumps(function)  # pickle does not take local functions
    processes = [
        context.Process(target=work, args=(rank, count, server.port, pickled, results))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=120) for _ in range(count - function_ends(function)))
    finally:
        for process in processes:
            process.kill()
    return [found.get(rank) for rank in range(count)]


def work(rank: int, count: int, port: int, pickled: bytes, results: Any) -> None:
    store = dist.TCPStore("127.0.0.1", port, count, False, LIMIT)
    try:
        with ranks.join(store, rank, count, rank):
            results.put((rank, cloudpickle.loads(pickled)()))
    except Exception as error:  # noqa: BLE001 - the test looks at it
        results.put((rank, error))
    results.close()
    results.join_thread()
    os._exit(0)


def function_ends(function: Function) -> int:
    """Processes that give no result."""
    return getattr(function, "lost", 0)


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def leaves() -> list[list[torch.Tensor | None] | None]:
    """Eight parts: some empty, some without a gradient, and sums that depend on the order."""
    generator = torch.Generator().manual_seed(0)
    parts: list[list[torch.Tensor | None] | None] = [
        [torch.randn(3, 5, generator=generator) * 1e3, torch.randn((), generator=generator), None]
        for _ in range(8)
    ]
    parts[2] = parts[6] = parts[7] = None
    parts[1][1] = None  # type: ignore[index]
    parts[0][0][0, 0] = -0.0  # type: ignore[index]
    for part in parts[1:]:
        if part is not None:
            part[0][0, 0] = -0.0  # type: ignore[index]
    return parts


LIKE = [torch.empty(3, 5), torch.empty(()), torch.empty(2)]


@pytest.mark.parametrize("count", [2, 4, 8])
def test_any_number_of_ranks_has_the_bits_of_one(count: int) -> None:
    expected = tree_sum(iter(leaves()), 8)

    def add() -> Any:
        share = 8 // ranks.count()
        own = leaves()[ranks.rank() * share :][:share]
        sums = ranks.sum_in_pairs(tree_sum(iter(own), share), LIKE)
        return [None if each is None else each.numpy().tobytes() for each in sums]

    bits = [None if each is None else each.numpy().tobytes() for each in expected]
    assert bits[2] is None
    assert run(count, add) == [bits] * count


def test_rows_and_values_are_put_together_in_the_order_of_ranks() -> None:
    def gather() -> Any:
        rank = ranks.rank()
        tensors = [] if rank == 1 else [torch.full((rank + 1, 2), float(rank))] * 2
        rows, first = ranks.gather_rows(tensors, torch.device("cpu"))
        shared, doubled = ranks.share(rank + 5), [*ranks.map_in_turn(lambda n: 2 * n, range(7))]
        return rows[:, 0].tolist(), first, ranks.gather(rank), shared, doubled

    rows = [0.0] * 2 + [2.0] * 6
    for rank, first in enumerate([0, 2, 2]):
        assert run(3, gather)[rank] == (rows, first, [0, 1, 2], 5, [0, 2, 4, 6, 8, 10, 12])


def test_only_rank_0_calls_what_is_to_be_done_once() -> None:
    def call() -> Any:
        return ranks.on_first(os.getpid), os.getpid()

    (first, own), (second, other) = run(2, call)
    assert first == own == second != other


def test_a_rank_that_hangs_is_named() -> None:
    def hang() -> Any:
        ranks.PATIENCE = 2.0
        ranks.sum_in_pairs(None, LIKE)
        if ranks.rank() == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(ranks.LostRank) as raised:
            ranks.sum_in_pairs(None, LIKE)
        return str(raised.value), time.monotonic() - start

    hang.lost = 1  # type: ignore[attr-defined]
    for found in run(4, hang)[:3]:
        message, seconds = found
        assert "rank 3 of 4 has ended, or has not answered for 2 seconds" in message, message
        assert seconds < 20


def test_a_rank_that_is_killed_is_named() -> None:
    def die() -> Any:
        ranks.sum_in_pairs(None, LIKE)
        if ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(ranks.LostRank) as raised:
            ranks.sum_in_pairs(None, LIKE)
        return str(raised.value)

    die.lost = 1  # type: ignore[attr-defined]
    assert "rank 1 of 2 has ended" in run(2, die)[0]


def test_the_cause_that_a_rank_reports_is_the_error_of_all() -> None:
    def fail() -> Any:
        ranks.sum_in_pairs(None, LIKE)
        if ranks.rank() == 1:
            assert ranks._ranks is not None
            ranks.report(ranks._ranks.store, "rank 1: no memory")
            ranks.report(ranks._ranks.store, "rank 1: something later")
            os._exit(1)
        with pytest.raises(ranks.LostRank) as raised:
            ranks.gather(1)  # through the store, whose connections stay
        return str(raised.value)

    fail.lost = 1  # type: ignore[attr-defined]
    assert run(2, fail)[0] == "rank 1: no memory"


def test_one_process_exchanges_nothing() -> None:
    assert (ranks.rank(), ranks.count()) == (0, 1)
    assert ranks.share(3) == 3 and ranks.gather(3) == [3] and ranks.on_first(lambda: 4) == 4
    assert [*ranks.map_in_turn(str, range(3))] == ["0", "1", "2"]
