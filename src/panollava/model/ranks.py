"""The processes that share a command's work: their numbers (ranks), and exchange between them.

A process that works alone is rank 0 of 1. Nothing here depends on the order in which ranks arrive,
and a rank that dies or hangs is an error that names it."""

import contextlib
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from panollava.errors import UserError

PATIENCE = 50.0  # seconds until a rank counts as hanging
START_PATIENCE = 600.0  # the same until the first exchange, and for work without exchange
FIRST_PATIENCE = 24 * 3600.0  # for what rank 0 does alone; its end is noticed at once
_FAILED = "failed"  # key of the store: rank and cause

Item = TypeVar("Item")
Result = TypeVar("Result")


class LostRank(UserError):
    """Another rank has failed: this one is not the cause."""


@dataclass
class _Ranks:
    rank: int
    count: int
    store: dist.TCPStore
    exchanges: int = 0
    patience: float = START_PATIENCE
    nccl: bool = False
    keys: list[str] = field(default_factory=list)  # of the store, which this rank has set


_ranks: _Ranks | None = None


def rank() -> int:
    return _ranks.rank if _ranks else 0


def count() -> int:
    return _ranks.count if _ranks else 1


@contextlib.contextmanager
def join(store: dist.TCPStore, rank: int, count: int, local_rank: int) -> Iterator[None]:
    """Run the block as a rank. If each has a GPU of its own, NCCL exchanges between them. Otherwise
    gloo does, also between processes on one GPU, which NCCL refuses."""
    global _ranks
    card = None
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(local_rank % gpus)
        card = str(torch.cuda.get_device_properties(local_rank % gpus).uuid)
    _ranks = _Ranks(rank, count, store)
    try:
        cards = gather(card)
        _ranks.nccl = None not in cards and len({*cards}) == count
        backend = "cpu:gloo,cuda:nccl" if _ranks.nccl else "gloo"
        with _exchange(START_PATIENCE):
            limit = timedelta(seconds=START_PATIENCE)
            group = dist.PrefixStore("group", store)
            dist.init_process_group(
                backend, store=group, rank=rank, world_size=count, timeout=limit
            )
        yield
    finally:
        _ranks = None
        if dist.is_initialized():
            dist.destroy_process_group()


def report(store: dist.TCPStore, cause: str) -> None:
    """Tell all ranks why the work ends; the first report counts."""
    store.compare_set(_FAILED, "", cause)


def reported(store: dist.TCPStore, seconds: float = 0) -> str | None:
    """The first report, if there is one within so many seconds."""
    end = time.monotonic() + seconds
    while not store.check([_FAILED]):
        if time.monotonic() >= end:
            return None
        time.sleep(0.1)
    return store.get(_FAILED).decode()


@contextlib.contextmanager
def _exchange(patience: float) -> Iterator[_Ranks]:
    """Raise a LostRank for an exchange in the block that fails."""
    assert _ranks is not None
    _ranks.exchanges += 1
    try:
        _ranks.store.set(f"arrived/{_ranks.rank}", str(_ranks.exchanges))
        yield _ranks
    except RuntimeError as error:  # torch's, of a closed connection or a time limit
        raise LostRank(_cause(_ranks, patience)) from error


def _cause(ranks: _Ranks, patience: float) -> str:
    others = [other for other in range(ranks.count) if other != ranks.rank]
    try:
        if cause := reported(ranks.store, seconds=5):
            return cause
        keys = [f"arrived/{other}" for other in others]
        arrived = [int(ranks.store.get(key)) if ranks.store.check([key]) else 0 for key in keys]
    except RuntimeError:  # rank 0 holds the store
        return "rank 0 has ended or does not answer"
    last = min(arrived)  # others may wait for it
    late = [str(n) for n, at in zip(others, arrived, strict=True) if at == last < ranks.exchanges]
    return (
        f"rank {', '.join(late) or 'unknown'} of {ranks.count} has ended, or has not answered for "
        f"{patience:.0f} seconds; completed work is kept: run the same command again"
    )


def expect_slow_start() -> None:
    """Wait longer for other ranks until the next sum: they may load or compile programs."""
    if _ranks is not None:
        _ranks.patience = START_PATIENCE


def on_first(function: Callable[[], Result]) -> Result:
    """The result of a function that only rank 0 calls, while the others wait."""
    return share(function() if rank() == 0 else None, FIRST_PATIENCE)  # type: ignore[return-value]


def share(value: Result, patience: float | None = None) -> Result:
    """Rank 0's value."""
    return value if _ranks is None else gather(value, patience, only_from_first=True)[0]


def gather(
    value: Result, patience: float | None = None, only_from_first: bool = False
) -> list[Result]:
    """The values of all ranks, in their order."""
    if _ranks is None:
        return [value]
    patience = patience or _ranks.patience
    with _exchange(patience) as ranks:
        keys = [f"value/{ranks.exchanges}/{each}" for each in range(ranks.count)]
        own = keys[ranks.rank]
        if only_from_first:
            keys = keys[:1]
        if own in keys:
            ranks.store.set(own, pickle.dumps(value))  # type: ignore[arg-type]
        _wait(ranks.store, keys, patience)
        values = [pickle.loads(ranks.store.get(key)) for key in keys]
        if not only_from_first:
            _forget(ranks)
        if own in keys:
            ranks.keys.append(own)
    return values


def _forget(ranks: _Ranks) -> None:
    """Delete what all ranks have read: each has begun an exchange after it."""
    while ranks.keys:
        ranks.store.delete_key(ranks.keys.pop())


def _wait(store: dist.TCPStore, keys: list[str], patience: float) -> None:
    """Until all keys are set. Raises RuntimeError if that takes too long, or a rank has failed."""
    start = time.monotonic()
    while not store.check(keys):
        seconds = time.monotonic() - start
        if seconds > patience or reported(store):
            raise RuntimeError(f"no answer for {seconds:.0f} seconds")
        time.sleep(min(0.05, 0.0002 + seconds / 10))


def map_in_turn(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`function` of each item, in their order; ranks take items in turn."""
    for first in range(0, len(items), count()):
        chunk = items[first : first + count()]
        own = function(chunk[rank()]) if rank() < len(chunk) else None
        yield from gather(own, START_PATIENCE)[: len(chunk)]  # type: ignore[misc]


def sum_in_pairs(
    tensors: Sequence[Tensor | None] | None, like: Sequence[Tensor]
) -> list[Tensor | None]:
    """Sum over ranks by recursive doubling: exchange and add with rank ± 1, then ± 2, ± 4, ..., so
    that all ranks have the same bits, those of a binary tree over the ranks. `like`: tensors of
    the same shapes. What is None in all ranks remains None."""
    tensors = [None] * len(like) if tensors is None else tensors
    # Nothing is -0: x + -0 has the bits of x for every x.
    parts = [
        torch.full_like(b, -0.0) if a is None else a for a, b in zip(tensors, like, strict=True)
    ]
    present = torch.tensor([float(a is not None) for a in tensors], device=parts[0].device)
    flat = torch.cat([part.detach().flatten().float() for part in [*parts, present]])
    distance = 1
    while distance < count():
        flat += _swap(flat, rank() ^ distance)
        distance *= 2
    if _ranks is not None:
        _ranks.patience = PATIENCE
        _forget(_ranks)
    *sums, present = flat.split([part.numel() for part in [*parts, present]])
    return [
        part.view_as(b) if there else None
        for part, b, there in zip(sums, like, present.tolist(), strict=True)
    ]


def _swap(flat: Tensor, partner: int) -> Tensor:
    """The partner's tensor of the same shape, for this one."""
    assert _ranks is not None
    through_host = flat.is_cuda and not _ranks.nccl
    sent = flat.cpu().pin_memory() if through_host else flat
    received = torch.empty_like(sent, pin_memory=through_host)
    with _exchange(_ranks.patience) as ranks:
        both = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
        for work in dist.batch_isend_irecv(both):
            work.wait(timedelta(seconds=ranks.patience))
    return received.to(flat.device)


def gather_rows(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, int]:
    """The rows of all ranks' tensors, in the order of ranks, and the number of this rank's first
    one. A rank may have none."""
    if _ranks is None:
        return torch.cat([*tensors]), 0
    shapes = gather([tuple(tensor.shape) for tensor in tensors])
    columns = next(shape[1:] for of_rank in shapes for shape in of_rank)
    rows = [sum(shape[0] for shape in of_rank) for of_rank in shapes]
    parts = [torch.empty((number, *columns), device=device) for number in rows]
    if tensors:
        parts[rank()] = torch.cat([*tensors])
    with _exchange(_ranks.patience) as ranks:
        for source in range(ranks.count):
            if rows[source]:
                dist.broadcast(parts[source], source)
    return torch.cat(parts), sum(rows[: rank()])
