"""The memory of an optimizer step, found without computing it: the stage's own code runs on fake
tensors, which have a shape and a device and no content, and what is alive is counted."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from panollava.data.packing import Row
from panollava.model.device import autocast
from panollava.training.objective import StageObjective


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a step, from the second one on."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's two moments
    activations: int  # and all else that is alive at the peak

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def step_memory(
    objective: StageObjective, parts: list[list[list[Row]]], precision: str, device: torch.device
) -> StepMemory:
    """Of a step in `parts`: each a list of panoramas, which are lists of rows.

    `objective` was made without weights; its parts are frozen and checkpointed as in training.
    No parts: nothing is trained."""
    trained = sum(p.nbytes for p in _parameters(objective) if p.requires_grad)
    weights = sum(p.nbytes for p in _parameters(objective))
    if not parts:
        return StepMemory(weights, 0, 0, 0)
    # Geometry is real, small, and taken as if it were fake.
    with FakeTensorMode(allow_non_fake_inputs=True), LiveStorage() as alive:
        _make_fake(objective, device)
        held = alive.now
        batches = [_to(objective.blank(part), device) for part in parts]
        with autocast(device, precision):
            objective.step(batches, Tensor.backward)
        peak = alive.peak - held
    # Gradients grow while activations go, so that both are never there in full with one part.
    return StepMemory(weights, trained, 2 * trained, max(0, peak - trained))


def _parameters(objective: StageObjective) -> Iterator[nn.Parameter]:
    assert isinstance(objective, nn.Module)
    yield from objective.parameters()


def _make_fake(objective: Any, device: torch.device) -> None:
    objective.to_empty(device=device)
    for module in objective.modules():
        if isinstance(module, PreTrainedModel):
            module.tie_weights()


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, tuple):  # a named one
        return type(batch)(*(_to(value, device) for value in batch))
    return batch


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of all storages that come up in the block and are alive, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
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

        def gone(_: weakref.ref) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
