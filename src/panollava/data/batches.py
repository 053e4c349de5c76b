"""Batches: the plan of an epoch, readers for what `prepare` and `features` wrote, and a DataLoader.

An epoch's plan lists, for each optimizer step, the panoramas and their rows. It is a function of
(seed, epoch) and of which panoramas each shard holds, so that resuming needs no stored state.

The loader's workers ignore Ctrl-C, SIGTERM and SIGUSR1; only the main process reacts to them,
because it needs the workers until it has saved its work. Then it sends them SIGTERM itself. Workers
exit when the main process is killed."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from panollava.data.packing import Packed, Row, Rows, pack
from panollava.data.shapes import Shape, fit
from panollava.data.shards import DIGEST, Shards
from panollava.errors import UserError

if TYPE_CHECKING:  # so that a change of the prompt does not rerun the vision stage
    from panollava.data.dialogue import Dialogue

Step = list[tuple[int, list[int]]]  # (panorama, its rows), each panorama once

SHUFFLED_SHARDS = 64  # whose panoramas are shuffled together
_LOOK_AHEAD = 64  # panoramas searched for one that fills a step
_TURN_STREAM = 1  # makes the seed differ from that of an epoch's plan, also for panorama 0
# Only on Linux can a worker see which process sent a signal.
_BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} if sys.platform == "linux" else set()
_POLL_SECONDS = 2.0

BatchT = TypeVar("BatchT", covariant=True)


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


def tree_sum(parts: Iterator[list[Any] | None], count: int) -> Any:
    """Sum over `count` parts, each a list of tensors, by a binary tree over their numbers, so that
    each half of the parts can be summed on another device. None: nothing to add. Changes tensors
    in place; holds at most log2(count) + 1 lists."""
    if count == 1:
        return next(parts)
    half = count - 1 if count % 2 else count // 2
    left, right = tree_sum(parts, half), tree_sum(parts, count - half)
    if left is None or right is None:
        return left or right
    pairs = zip(left, right, strict=True)
    return [b if a is None else a if b is None else a.add_(b) for a, b in pairs]


class Reader(Protocol[BatchT]):
    """Plans a split's epochs and loads the parts of a step."""

    files: tuple[Path, ...]  # that tell what it reads, panoramas by their digest
    array: Shards

    def plan(self, epoch: int | None) -> Plan: ...

    def count(self, step: Step) -> int: ...  # what the step's loss is a mean over

    def size(self, part: Step) -> Shape: ...

    def sizes(self, plan: Plan, parts: int) -> Counter[Shape]: ...  # of steps in so many parts

    def load(self, part: Step, epoch: int | None = None, shape: Shape | None = None) -> BatchT: ...


class StepBatch(NamedTuple):
    parts: list[Any]  # batches, None: an empty part
    divisor: int  # of its loss: the count of the complete step, see Reader
    rows: int  # of the complete step; vision: panoramas


class StepDataset(Dataset[StepBatch], Generic[BatchT]):
    """Some steps of an epoch, each in `accumulate` parts of which some are loaded: all of them, or
    those of one process. Without steps, the epoch's first one. Parts are filled up to one of the
    `shapes` if there are any."""

    def __init__(
        self,
        reader: Reader[BatchT],
        epoch: int | None,
        accumulate: int,
        steps: slice = slice(None),
        parts: range | None = None,
        shapes: Sequence[Shape] = (),
    ) -> None:
        self.reader, self.plan = reader, reader.plan(epoch)
        numbers = range(len(self.plan))
        self.epoch, self.numbers = epoch, numbers[steps] or numbers[:1]
        self.accumulate, self.shapes = accumulate, shapes
        self.parts = range(accumulate) if parts is None else parts

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> StepBatch:
        step, reader = self.plan[self.numbers[index]], self.reader
        divided = divide(step, self.accumulate)
        parts = [divided[number] for number in self.parts]
        loaded = [self._load(part) if part else None for part in parts]
        return StepBatch(loaded, reader.count(step), sum(len(rows) for _, rows in step))

    def _load(self, part: Step) -> BatchT:
        shape = fit(self.reader.size(part), self.shapes) if self.shapes else None
        return self.reader.load(part, self.epoch, shape)


def labeled_rows(panoramas: NDArray[np.integer], share: float) -> NDArray[np.int64]:
    """The numbers of the rows of a random share of the panoramas, at least one. A larger share
    includes a smaller one. `panoramas`: of each row."""
    random_order = np.random.default_rng(0).permutation(pd.unique(panoramas))
    kept = random_order[: max(1, round(share * len(random_order)))]
    return np.flatnonzero(np.isin(panoramas, kept))


class ViewReader:
    """Reads views without rows; the batch size counts panoramas."""

    def __init__(self, views: Shards, batch_size: int, seed: int) -> None:
        self.files, self.array = (views.folder / DIGEST,), views
        self.plan = Plans(group_rows(np.arange(len(views))), batch_size, seed, views.starts)

    def count(self, step: Step) -> int:
        """Panoramas."""
        return len(step)

    def size(self, part: Step) -> Shape:
        return Shape(len(part))

    def sizes(self, plan: Plan, parts: int) -> Counter[Shape]:
        numbers = np.bincount(plan.divide(parts)).tolist()
        return Counter(Shape(number) for number in numbers if number)

    def load(self, part: Step, epoch: int | None = None, shape: Shape | None = None) -> Tensor:
        """uint8 (panoramas, views, size, size, 3). Never filled up, because losses between views
        are statistics over all panoramas: full steps and the last one have at most four sizes."""
        return gather(self.array, [panorama for panorama, _ in part])


class TextBatch(NamedTuple):
    vision: Tensor  # views or features of each panorama
    packed: Packed


class TextReader:
    """Reads panoramas (views or features) with their rows packed; the batch size counts rows."""

    def __init__(
        self,
        vision: Shards,
        file: Path,
        rows: Rows,
        used: NDArray[np.int64],
        dialogue: "Dialogue",
        vision_tokens: int,
        batch_size: int,
        seed: int,
        strides: int | None,
    ) -> None:
        """`rows`: tokens of `file`, of which those with the numbers `used` are read. `strides`:
        between views all around; roll each panorama by a number of them in training, see `turns`.
        None: do not."""
        self.files, self.array = (vision.folder / DIGEST, file), vision
        self.rows, self.dialogue, self.vision_tokens = rows, dialogue, vision_tokens
        self.seed, self.strides = seed, strides
        self.truncated = int((rows.ends[used] != dialogue.stop).sum())
        panoramas = rows.panoramas[used]
        if panoramas.max() >= len(vision):
            raise UserError(
                f"{vision.folder}: contains {len(vision)} panoramas, but {file} refers to panorama "
                f"{panoramas.max()}; run: dvc repro"
            )
        groups = group_rows(panoramas, used)
        self.plan = Plans(groups, batch_size, seed, vision.starts)

    def count(self, step: Step) -> int:
        """Answer tokens."""
        return int(sum(self.rows.answers[rows].sum() for _, rows in step))

    def size(self, part: Step) -> Shape:
        longest = max(self.rows.lengths[rows].sum() for _, rows in part)
        prefix = len(self.dialogue.text_prefix) + self.vision_tokens
        return Shape(len(part), prefix + int(longest), self.count(part))

    def sizes(self, plan: Plan, parts: int) -> Counter[Shape]:
        part_of, (_, starts, ends) = plan.divide(parts), plan.pieces.T
        tokens, answers = (
            np.append(0, counts[plan.groups.rows].cumsum(dtype=np.int64))
            for counts in (self.rows.lengths, self.rows.answers)
        )
        longest = np.zeros(part_of.max() + 1, dtype=np.int64)
        np.maximum.at(longest, part_of, tokens[ends] - tokens[starts])
        longest += len(self.dialogue.text_prefix) + self.vision_tokens
        supervised = np.bincount(part_of, answers[ends] - answers[starts]).astype(np.int64)
        table = np.stack([np.bincount(part_of), longest, supervised], axis=1)
        sizes, times = np.unique(table[table[:, 0] > 0], axis=0, return_counts=True)
        return Counter(dict(zip(map(Shape._make, sizes.tolist()), times.tolist(), strict=True)))

    def _rows(self, part: Step) -> list[list[Row]]:
        return [[self.rows[index] for index in rows] for _, rows in part]

    def load(self, part: Step, epoch: int | None = None, shape: Shape | None = None) -> TextBatch:
        """`epoch`: of the training; None: validation, in which no panorama is rolled. `shape`: fill
        up to it with blank panoramas and padding, without any loss."""
        packed = pack(
            self.dialogue.text_prefix,
            self.vision_tokens,
            self._rows(part),
            self.dialogue.pad,
            shape,
        )
        panoramas = [panorama for panorama, _ in part]
        vision = gather(self.array, panoramas)
        if self.strides and epoch is not None:
            shifts = turns(self.seed, epoch, panoramas, self.strides)
            vision = torch.stack([*map(roll_views, vision, shifts, repeat(self.strides))])
        if blank := len(packed.tokens) - len(vision):
            vision = torch.cat([vision, vision.new_zeros(blank, *vision.shape[1:])])
        return TextBatch(vision, packed)


def roll_views(vision: Tensor, shift: int, count: int) -> Tensor:
    """The views of one panorama, or its features, after a roll by `shift` strides of the ring of
    `count` views. A stride is one view, or the tokens of its columns: (views or tokens, ...)."""
    return vision.roll(shift * (len(vision) // count), dims=0)


def turns(seed: int, epoch: int, panoramas: list[int], strides: int) -> list[int]:
    """By how many view strides each panorama is rolled in an epoch: uniform in 0 to `strides` - 1,
    a function of (seed, epoch, panorama)."""
    generators = (np.random.default_rng((seed, epoch, p, _TURN_STREAM)) for p in panoramas)
    return [int(generator.integers(strides)) for generator in generators]


def gather(array: Shards | NDArray, index: list[int], map: Callable[..., Any] = map) -> Tensor:
    """Panoramas' views or features, copied into memory; float16 becomes float32. `map`: that of a
    pool of threads, which read them at the same time."""
    rows = np.stack([*map(array.__getitem__, index)])
    return torch.from_numpy(rows if rows.dtype != np.float16 else rows.astype(np.float32))


class StepLoader(DataLoader):
    """A DataLoader over a dataset of batches, whose workers ignore Ctrl-C, SIGTERM and SIGUSR1."""

    def __init__(self, dataset: Any, workers: int, pin_memory: bool) -> None:
        super().__init__(  # no batch size: the items are batches
            dataset, None, num_workers=workers, pin_memory=pin_memory, worker_init_fn=_init_worker
        )

    def __iter__(self) -> Any:
        # Workers inherit the blocked signals from their start.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(worker: int) -> None:
    if _BLOCKED:
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # PyTorch's own watchdog runs only between two items. It also misses a main process that was
    # killed before the watchdog started.
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent.pid:
        received = signal.sigtimedwait({signal.SIGTERM}, _POLL_SECONDS)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)
