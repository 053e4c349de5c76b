"""The training stages as data: where each starts, what it optimises and what it trains.

No other module knows a stage by name; a new stage is a new row."""

from dataclasses import dataclass

from torch import nn

from panollava.errors import UserError
from panollava.logs import table


@dataclass(frozen=True)
class Stage:
    name: str
    number: int
    starts_from: str | None  # the stage whose weights it loads; None: pretrained towers alone
    objective: str  # module whose `Objective` class gives data, model and loss
    trains: tuple[str, ...]  # parts of the model, by attribute name
    saves: tuple[str, ...]  # parts that have learned something by its end
    reads: tuple[str, ...]  # parameters

    @property
    def reads_features(self) -> bool:
        """Where the encoder is frozen, what it gave is read."""
        return "encoder" not in self.trains


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="vision",
            number=1,
            starts_from=None,
            objective="panollava.training.vicreg_objective",
            trains=("encoder",),
            saves=("encoder",),
            reads=("seed", "views", "model.encoder", "stage.vision", "trainer"),
        ),
        Stage(
            name="resampler",
            number=2,
            starts_from="vision",
            objective="panollava.training.answer_objective",
            trains=("encoder", "resampler", "projector"),
            saves=("encoder", "resampler", "projector"),
            reads=("seed", "views", "model", "stage.resampler", "trainer"),
        ),
        Stage(
            name="finetune",
            number=3,
            starts_from="resampler",
            objective="panollava.training.answer_objective",
            trains=("resampler", "projector"),
            saves=("encoder", "resampler", "projector"),
            reads=("seed", "views", "model", "stage.finetune", "trainer"),
        ),
    )
}


def find_stage(name: str) -> Stage:
    """Raises UserError for a name that is no stage."""
    if name not in STAGES:
        raise UserError(f"unknown stage '{name}'; the stages are {', '.join(STAGES)}")
    return STAGES[name]


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
