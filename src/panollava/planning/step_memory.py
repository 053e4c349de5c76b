"""The heaviest optimizer steps of a training stage, and the memory that one needs.

Nothing is computed: the stage's own code runs on fake tensors, which have a shape and a device but
no content, and the bytes of live storage are counted."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from panollava.config import Settings
from panollava.data.batches import StepBatch, tree_sum
from panollava.data.dialogue import Dialogue
from panollava.data.epoch_plan import ByPanorama, PlanSize, divide, group_rows, plan_epoch
from panollava.data.packing import Row
from panollava.model.precision import autocast
from panollava.planning.rows import SplitRows
from panollava.stages import Stage
from panollava.training.objective import one_device

Part = list[list[Row]]  # the rows of each of its panoramas


@dataclass(frozen=True)
class Workload:
    """What a stage trains on."""

    size: PlanSize | None  # of all epochs; None: unknown without rows
    reads_rows: bool  # otherwise only panoramas
    heaviest: list[list[Part]]  # candidate steps; which one needs most memory depends on the model
    prefix: int  # tokens before the rows of a sequence; 0: the stage has no sequences

    @property
    def panoramas_at_once(self) -> int:
        """Maximum per part of a step."""
        return max((len(part) for step in self.heaviest for part in step), default=0)

    @property
    def longest_sequence(self) -> int:
        """Tokens; 0 if the stage has no sequences."""
        parts = [part for step in self.heaviest for part in step]
        return self.prefix and self.prefix + max(map(_longest, parts), default=0)


def find_workload(
    objective: Any, settings: Settings, stage: Stage, accumulate: int, train: SplitRows | None
) -> Workload:
    """The steps of all epochs, each in `accumulate` parts. `train`: the split's rows. None assumes
    one full-length row per panorama, an upper bound.

    Raises UserError for a row whose query leaves no room for the answer."""
    stage_settings = getattr(settings.stage, stage.name)
    dialogue = getattr(objective, "dialogue", None)  # None: the stage reads no text
    rows, groups = _group_rows(dialogue, stage_settings, train)
    count = len(groups.panoramas)
    shards = train.shards(settings.data.shard_size) if train else np.array([0, count])
    sizes = [PlanSize(0, 0, 0)]

    def steps() -> Iterator[list[Part]]:
        for epoch in range(stage_settings.epochs):
            plan = plan_epoch(groups, stage_settings.batch_size, settings.seed, epoch, shards)
            sizes.append(plan.size)
            for step in plan:
                parts = divide(step, accumulate)
                yield [[[rows[number] for number in numbers] for _, numbers in p] for p in parts]

    prefix = len(dialogue.text_prefix) + objective.vision_tokens if dialogue else 0
    heaviest = _heaviest(steps(), prefix)
    size = None if train is None else PlanSize(*map(sum, zip(*sizes, strict=True)))
    return Workload(size, dialogue is not None, heaviest, prefix)


def _group_rows(
    dialogue: Dialogue | None, stage_settings: Any, train: SplitRows | None
) -> tuple[Sequence[Row], ByPanorama]:
    if train is None:
        length = dialogue.max_text_length if dialogue else 1
        count = stage_settings.batch_size
        return [Row([0], [0] * (length - 1))] * count, group_rows(np.arange(count))
    if dialogue is None:
        panoramas = train.read()["panorama"].unique()
        return [Row([], [])] * len(panoramas), group_rows(panoramas)
    rows, used = train.tokenize(dialogue, True, stage_settings.labeled)
    return rows, group_rows(rows.panoramas[used], used)


def _heaviest(steps: Iterable[list[Part]], prefix: int) -> list[list[Part]]:
    """The step with the largest part in tokens, and the one in answer tokens, which need logits."""

    def tokens(part: Part) -> int:
        return len(part) * (prefix + _longest(part)) if prefix else len(part)

    def answer_tokens(part: Part) -> int:
        return sum(len(row.answer) for rows in part for row in rows)

    best: dict[Any, tuple[int, list[Part]]] = {}
    for step in steps:
        for size in (tokens, answer_tokens):
            value = max(map(size, step))
            if size not in best or value > best[size][0]:
                best[size] = value, step
    first, *others = [step for _, step in best.values()] or [[]]
    return [first, *(step for step in others if step is not first)] if first else []


def _longest(part: Part) -> int:
    """Tokens of rows in the part's longest sequence."""
    return max((sum(map(len, rows)) for rows in part), default=0)


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a step, from the second step on."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's two moments
    activations: int  # and everything else that is alive at the peak

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def step_memory(
    objective: Any, step: list[Part], precision: str, device: torch.device
) -> StepMemory:
    """The memory of one step, given as its parts. Without parts, only the weights are held.

    `objective` was built without weights; its parts are frozen and checkpointed as in training."""
    trained = sum(p.nbytes for p in objective.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in objective.parameters())
    if not step:
        return StepMemory(weights, 0, 0, 0)
    # The view geometry consists of real tensors; they are small, and are treated as fake ones.
    with FakeTensorMode(allow_non_fake_inputs=True), LiveStorage() as storage:
        _make_fake(objective, device)
        before = storage.current
        blank = [objective.blank(part) if part else None for part in step]
        batches = tree_map_only(Tensor, lambda tensor: tensor.to(device), blank)
        with autocast(device, precision):
            run_step(objective, batches)
        peak = storage.peak - before
    # With one part, gradients grow while activations are freed: both are never complete at once.
    return StepMemory(weights, trained, 2 * trained, max(0, peak - trained))


def run_step(objective: Any, parts: list[Any], divisor: int = 1) -> Any:
    """A step as in training: the gradients of what is trained, and the values."""
    trained = [p for p in objective.parameters() if p.requires_grad]

    def differentiate(loss: Tensor, values: Tensor) -> list[Tensor | None]:
        loss.backward()
        gradients = [p.grad for p in trained]
        objective.zero_grad()
        return [*gradients, values]

    batch, seeds = StepBatch(parts, divisor, 1), [0] * len(parts)
    terms = objective.terms(batch, seeds, one_device)
    return tree_sum((each and differentiate(*each) for each in terms), len(parts))


def _make_fake(objective: Any, device: torch.device) -> None:
    for module in objective.modules():
        module.to_empty(device=device, recurse=False)  # once, although an adapter has two places
    for module in objective.modules():
        if isinstance(module, PreTrainedModel):
            module.tie_weights()


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of all storages that are created or returned in the block and still alive,
    each once: `current` and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: weakref.ref) -> None:
            del self._storages[key]
            self.current -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.current += size
        self.peak = max(self.peak, self.current)
