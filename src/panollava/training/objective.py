"""What a training stage optimizes: the interface of objectives, and building one from a stage's row
of the table, with the parts of the model that do not train frozen."""

import importlib
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from panollava.config import Settings
from panollava.data.batches import Reader
from panollava.errors import UserError
from panollava.logs import table
from panollava.model.device import cast_frozen_linears
from panollava.stages import Stage
from panollava.training.tower_layers import checkpoint_layers


class StageObjective(Protocol):
    """What a stage optimizes: see `vicreg` and `autoregressive`."""

    model: nn.Module
    readers: dict[str, Reader]

    def open_readers(self) -> None: ...
    def describe(self) -> dict[str, Any]: ...
    def blank(self, panoramas: list) -> Any: ...
    def parameter_groups(self) -> list[dict]: ...
    def count(self, batch: Any) -> int: ...
    def step(self, parts: list, backward: Callable[[Tensor], None]) -> dict[str, Tensor]: ...
    def validate(self, parts: list) -> tuple[dict[str, Tensor], int]: ...


def load_objective(stage: Stage, settings: Settings, weights: bool = True) -> Any:
    """The stage's objective; without `weights`, with the shapes of the pretrained towers only."""
    return importlib.import_module(stage.objective).Objective(stage, settings, weights)


def prepare_parts(model: nn.Module, stage: Stage, precision: str, checkpointing: bool) -> str:
    """Freeze the parts that the stage does not train, cast frozen linear layers to `precision`, and
    switch gradient checkpointing on if asked for. Returns the table of parts."""
    parts = freeze_all_but(model, stage.trains)
    cast_frozen_linears(model, precision, keep=(*stage.trains, *stage.saves))
    if checkpointing:
        checkpoint_layers(model)
    return parts


def freeze_all_but(model: nn.Module, trains: tuple[str, ...]) -> str:
    """Freeze every part of `model` that `trains` doesn't name, and return the table of parts.

    A part is a child of the model. Frozen parts are put in evaluation mode, so that nothing in
    them changes or drops out.

    Raises:
        UserError: a name that matches no part, or a part without parameters.
    """
    parts = dict(model.named_children())
    rows = []
    for name in trains:
        if name not in parts or not any(True for _ in parts[name].parameters()):
            raise UserError(
                f"the stage trains '{name}', but the model's parts are {', '.join(parts)}"
            )
    for name, part in parts.items():
        training = name in trains
        part.requires_grad_(training).train(training)
        count = sum(parameter.numel() for parameter in part.parameters())
        rows.append((name, "trains" if training else "frozen", f"{count:,}"))
    return table(rows, header=("part", "", "parameters"))
