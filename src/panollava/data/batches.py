"""Batches: readers for what `prepare` and `features` wrote, and a DataLoader. Which panoramas and
rows form a step is the business of `epoch_plan`.

The loader's workers ignore Ctrl-C, SIGTERM and SIGUSR1; only the main process reacts to them,
because it needs the workers until it has saved its work. Then it sends them SIGTERM itself. Workers
exit when the main process is killed."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from panollava.data.epoch_plan import Plan, Plans, Step, divide, group_rows
from panollava.data.packing import Packed, Row, Rows, pack
from panollava.data.shapes import Shape, fit
from panollava.data.shards import DIGEST, Shards
from panollava.errors import UserError

if TYPE_CHECKING:  # so that a change of the prompt does not rerun the vision stage
    from panollava.data.dialogue import Dialogue

_TURN_STREAM = 1  # makes the seed differ from that of an epoch's plan, also for panorama 0
# Only on Linux can a worker see which process sent a signal.
_BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} if sys.platform == "linux" else set()
_POLL_SECONDS = 2.0

BatchT = TypeVar("BatchT", covariant=True)


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
