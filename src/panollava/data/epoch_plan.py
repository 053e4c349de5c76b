"""The plan of an epoch: for each optimizer step, its panoramas and their rows.

It is a function of (seed, epoch) and of which panoramas each shard holds, so that resuming needs no
stored state."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Step = list[tuple[int, list[int]]]  # (panorama, its rows), each panorama once

SHUFFLED_SHARDS = 64  # whose panoramas are shuffled together
_LOOK_AHEAD = 64  # panoramas searched for one that fills a step


def labeled_rows(panoramas: NDArray[np.integer], share: float) -> NDArray[np.int64]:
    """The numbers of the rows of a random share of the panoramas, at least one. A larger share
    includes a smaller one. `panoramas`: of each row."""
    random_order = np.random.default_rng(0).permutation(pd.unique(panoramas))
    kept = random_order[: max(1, round(share * len(random_order)))]
    return np.flatnonzero(np.isin(panoramas, kept))


class ByPanorama(NamedTuple):
    """Row numbers, those of a panorama together, as arrays."""

    panoramas: NDArray[np.int64]  # in the order of their first rows
    rows: NDArray[np.int64]
    starts: NDArray[np.int64]  # of each panorama's `rows`, and the end


def group_rows(panoramas: NDArray[np.integer], rows: NDArray[np.int64] | None = None) -> ByPanorama:
    """`panoramas`: of each row; `rows`: their numbers (default: from 0)."""
    codes, unique = pd.factorize(panoramas)
    order = np.argsort(codes, kind="stable")
    starts = np.concatenate([[0], np.bincount(codes).cumsum()])
    return ByPanorama(unique, order if rows is None else rows[order], starts)


def shuffle(
    panoramas: NDArray[np.int64], shards: NDArray[np.int64], seed: int, epoch: int
) -> NDArray[np.int64]:
    """The order of an epoch, as indices into `panoramas`: the shards in random order, and the
    panoramas of each `SHUFFLED_SHARDS` of them shuffled, so that few shards are read at a time.

    `shards`: the number of each shard's first panorama, and the end."""
    random, count = np.random.default_rng((seed, epoch)), len(shards) - 1
    if count <= SHUFFLED_SHARDS:
        return random.permutation(len(panoramas))
    window_of_shard = random.permutation(count).argsort() // SHUFFLED_SHARDS
    windows = window_of_shard[np.searchsorted(shards, panoramas, side="right") - 1]
    order = np.argsort(windows, kind="stable")
    for window in np.split(order, np.bincount(windows).cumsum()):
        random.shuffle(window)
    return order


class PlanSize(NamedTuple):
    steps: int
    rows: int
    panoramas: int  # each once per step

    @property
    def rows_per_step(self) -> float:
        """The mean; 0 without steps."""
        return self.rows / max(1, self.steps)

    @property
    def panoramas_per_step(self) -> float:
        """The mean; 0 without steps."""
        return self.panoramas / max(1, self.steps)


class Plan(Sequence[Step]):
    """The steps of an epoch. They are kept as arrays and built when they are read."""

    def __init__(self, groups: ByPanorama, pieces: NDArray, ends: NDArray) -> None:
        """`pieces`: of a panorama's rows, in the order of the steps: its index, and where the
        piece begins and ends in `groups.rows`. `ends`: the number of pieces up to each step."""
        self.groups, self.pieces, self.ends = groups, pieces, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, step: Any) -> Any:
        if isinstance(step, slice):
            return [self[number] for number in range(len(self))[step]]
        step = range(len(self))[step]
        pieces = self.pieces[self.ends[step - 1] if step else 0 : self.ends[step]]
        panoramas = self.groups.panoramas[pieces[:, 0]].tolist()
        rows = (self.groups.rows[start:end].tolist() for _, start, end in pieces.tolist())
        return list(zip(panoramas, rows, strict=True))

    @property
    def size(self) -> PlanSize:
        return PlanSize(len(self), len(self.groups.rows), len(self.pieces))

    def divide(self, parts: int) -> NDArray[np.int64]:
        """The part of each piece, as `divide` does it; parts are numbered through all steps."""
        if parts == 1:
            return np.repeat(np.arange(len(self)), np.diff(self.ends, prepend=0))
        part_of = np.empty(len(self.pieces), dtype=np.int64)
        sizes = (self.pieces[:, 2] - self.pieces[:, 1]).tolist()
        for step, (start, end) in enumerate(pairwise([0, *self.ends.tolist()])):
            for piece, part in _share(sizes[start:end], parts):
                part_of[start + piece] = step * parts + part
        return part_of


def plan_epoch(
    groups: ByPanorama, batch_size: int, seed: int, epoch: int | None, shards: NDArray[np.int64]
) -> Plan:
    """Divide all rows into steps of at most `batch_size` rows.

    A panorama's rows stay in one step unless there are more than `batch_size` of them, so that
    steps may hold fewer: with 3 rows per panorama and a `batch_size` of 16, 15. `epoch` None keeps
    the order of the panoramas (validation). `shards`: see `shuffle`.
    """
    order = np.arange(len(groups.panoramas))
    if epoch is not None:
        order = shuffle(groups.panoramas, shards, seed, epoch)
    counts = -(-np.diff(groups.starts)[order] // batch_size)  # pieces of each panorama
    panoramas, ends = np.repeat(order, counts), np.repeat(counts.cumsum(), counts)
    starts = groups.starts[panoramas]
    starts += batch_size * (np.arange(len(ends)) - ends + np.repeat(counts, counts))
    stops = np.minimum(starts + batch_size, groups.starts[panoramas + 1])
    chosen, ends = _fill_steps(stops - starts, batch_size)
    return Plan(groups, np.stack([panoramas, starts, stops], axis=1)[chosen], ends)


def _fill_steps(sizes: NDArray[np.int64], batch_size: int) -> tuple[NDArray, NDArray]:
    """Fill each step with the first pieces that fit among the next `_LOOK_AHEAD`. Returns their
    order, and the number of pieces up to each step. Two pieces of a panorama never fit in one step:
    all but its last one fill a step."""
    count, kinds = len(sizes), np.unique(sizes)
    if len(kinds) == 1:
        each = batch_size // int(kinds[0])
        return np.arange(count), np.minimum(np.arange(each, count + each, each), count)
    size_of: list[int] = kinds.tolist()
    kind_of: list[int] = np.searchsorted(kinds, sizes).tolist()
    fitting = np.searchsorted(kinds, np.arange(batch_size + 1), side="right").tolist()
    # By size, the first of the next pieces (`count`: none) and those after it.
    first, others = [count] * len(size_of), [deque[int]() for _ in size_of]
    following, chosen, ends = 0, list[int](), list[int]()
    while len(chosen) < count:
        room = batch_size
        while room:
            while following < min(count, len(chosen) + _LOOK_AHEAD):
                kind = kind_of[following]
                if first[kind] == count:
                    first[kind] = following
                else:
                    others[kind].append(following)
                following += 1
            piece = min(first[: fitting[room]], default=count)
            if piece == count:
                break
            chosen.append(piece)
            kind = kind_of[piece]
            first[kind] = others[kind].popleft() if others[kind] else count
            room -= size_of[kind]
        ends.append(len(chosen))
    return np.array(chosen, dtype=np.int64), np.array(ends, dtype=np.int64)


class Plans:
    """Plans the epochs of a reader. The last plan is kept: it is read by each loader and by the
    validation."""

    def __init__(
        self, groups: ByPanorama, batch_size: int, seed: int, shards: NDArray[np.int64]
    ) -> None:
        self.groups, self.batch_size, self.seed, self.shards = groups, batch_size, seed, shards
        self._last: tuple[int | None, Plan] | None = None

    def __call__(self, epoch: int | None) -> Plan:
        if self._last is None or self._last[0] != epoch:
            self._last = None  # frees it
            plan = plan_epoch(self.groups, self.batch_size, self.seed, epoch, self.shards)
            self._last = epoch, plan
        return self._last[1]


def divide(step: Step, parts: int) -> list[Step]:
    """Divide a step's panoramas into `parts` parts of about equal rows. With fewer panoramas than
    parts, the last parts are empty."""
    shares: list[Step] = [[] for _ in range(parts)]
    for item, part in _share([len(rows) for _, rows in step], parts):
        shares[part].append(step[item])
    return shares


def _share(sizes: list[int], parts: int) -> Iterator[tuple[int, int]]:
    """Items with their parts: the largest ones first, each to the part that has least."""
    loads = [0] * parts
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        lightest = loads.index(min(loads))
        loads[lightest] += sizes[item]
        yield item, lightest
