"""What a stage optimizes: the interface of objectives, building one, and freezing the parts of the
model that do not train."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from tabulate import tabulate
from torch import Tensor, nn

from panollava.config import Settings
from panollava.data.batches import Reader, StepBatch
from panollava.errors import UserError
from panollava.model.precision import cast_frozen_linears
from panollava.model.weights import count_parameters
from panollava.stages import Stage
from panollava.training.tower_layers import checkpoint_layers

# From rows of this device's parts to those of all parts, in their order, and the number of this
# device's first row.
Gather = Callable[[list[Tensor]], tuple[Tensor, int]]


def one_device(tensors: list[Tensor]) -> tuple[Tensor, int]:
    """The `Gather` of a device that computes all parts."""
    return torch.cat(tensors), 0


class StageObjective(Protocol):
    """See `vicreg_objective` and `answer_objective`."""

    model: nn.Module
    curves: tuple[str, ...]  # names of a step's values, "loss" first
    joint: bool  # a part's terms depend on the other parts
    readers: dict[str, Reader]  # by split

    def open_readers(self) -> None: ...
    def describe(self) -> dict[str, Any]: ...
    def row_counts(self) -> dict[str, int]: ...  # what the stage's metrics say of its rows
    def blank(self, panoramas: list) -> Any: ...
    def parameter_groups(self) -> list[dict]: ...  # name, params, lr
    def terms(
        self, batch: StepBatch, seeds: Sequence[int | None], gather: Gather
    ) -> Iterator[tuple[Tensor, Tensor] | None]:
        """Of each part in turn: its term of the step's loss, to be differentiated, and its terms of
        `curves`. Both add up over the parts. None: an empty part.

        `seeds`: of the parts' random numbers; None: go on with the current ones. `gather`: the
        parts of other devices, too."""

    def validate(self, parts: list) -> tuple[dict[str, Tensor], int]: ...


def load_objective(stage: Stage, settings: Settings, weights: bool = True) -> Any:
    """`weights` False: build the towers from their configurations, without weights."""
    return importlib.import_module(stage.objective).Objective(stage, settings, weights)


def checked_groups(objective: Any) -> list[dict]:
    """The objective's parameter groups.

    Raises:
        UserError: a trained parameter is in no group or in several, or a group trains nothing.
    """
    groups = objective.parameter_groups()
    found: dict[int, list[str]] = {}  # names of groups, by parameter
    for group in groups:
        trained = [p for p in group["params"] if p.requires_grad]
        if not trained:
            raise UserError(f"parameter group '{group['name']}': the stage trains nothing in it")
        for parameter in trained:
            found.setdefault(id(parameter), []).append(group["name"])
    for name, parameter in objective.named_parameters():
        names = found.get(id(parameter), [])
        if parameter.requires_grad and len(names) != 1:
            raise UserError(
                f"the stage trains '{name}', which must be in one parameter group of the optimizer"
                f" but is in {' and '.join(names) or 'none'}; see {objective.__module__}"
            )
    return groups


def prepare_parts(model: nn.Module, stage: Stage, precision: str, checkpointing: bool) -> str:
    """Freeze the parts that the stage does not train, cast frozen linear layers to `precision`, and
    enable gradient checkpointing if asked for. Returns the table of parts."""
    parts = freeze_all_but(model, stage.trains)
    cast_frozen_linears(model, precision, keep=(*stage.trains, *stage.saves))
    if checkpointing:
        checkpoint_layers(model)
    return parts


def freeze_all_but(model: nn.Module, trains: tuple[str, ...]) -> str:
    """Freeze all parts (children) of `model` except those named. Returns the table of parts.

    Frozen parts are in evaluation mode: no dropout, no update of statistics.

    Raises:
        UserError: a name matches no part, or a part without parameters.
    """
    parts = dict(model.named_children())
    counts = count_parameters(model)
    for name in trains:
        if not counts.get(name):
            raise UserError(
                f"the stage trains '{name}', but the model's parts are {', '.join(parts)}"
            )
    for part in parts.values():
        part.requires_grad_(False).eval()
    for name in trains:  # afterwards, because an adapter is also inside the language model
        parts[name].requires_grad_(True).train()
    rows = [(name, "trains" if name in trains else "frozen", counts[name]) for name in parts]
    return tabulate(rows, ("part", "", "parameters"), tablefmt="plain", intfmt=",")
