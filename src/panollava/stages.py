"""The table of training stages: where each starts, what it optimizes and what it trains."""

from dataclasses import dataclass

from panollava.errors import UserError


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
