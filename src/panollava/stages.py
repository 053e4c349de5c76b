"""The table of training stages: where each starts, what it optimizes and what it trains."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Stage:
    name: str
    number: int
    starts_from: str | None  # the stage whose weights it loads; None: only the pretrained towers
    objective: str  # module whose `Objective` class gives data, model and loss
    trains: tuple[str, ...]  # parts of the model, by attribute name
    saves: tuple[str, ...]  # parts that this stage or an earlier one has trained
    reads: tuple[str, ...]  # parameters
    optional: tuple[str, ...] = ()  # parts that it also trains if stage.<name>.<part> is true

    def configured(self, settings: Any, start: Iterable[str]) -> "Stage":
        """The stage with the optional parts that it trains or passes on. `settings`: its section;
        `start`: the parts in the weights that it starts from."""
        trained = tuple(part for part in self.optional if getattr(settings, part))
        saved = tuple(part for part in self.optional if part in (*trained, *start))
        return replace(self, trains=self.trains + trained, saves=self.saves + saved)

    @property
    def reads_features(self) -> bool:
        """True if the encoder is frozen, so that cached features are read instead of views."""
        return "encoder" not in self.trains

    @property
    def log_name(self) -> str:
        return f"stage{self.number}_{self.name}"


# Parameters of every command that runs a trained model.
INFERENCE = ("trainer.accelerator", "trainer.threads", "trainer.precision")

# All of stage.vision except max_text_length, which changes nothing.
_VISION = tuple(
    f"stage.vision.{key}"
    for key in "epochs patience batch_size accumulate lr objective overlap invariance variance "
    "covariance expander temperature".split()
)

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
            reads=("seed", "views", "model.encoder", *_VISION, "trainer"),
        ),
        Stage(
            name="resampler",
            number=2,
            starts_from="vision",
            objective="panollava.training.answer_objective",
            trains=("encoder", "resampler", "projector"),
            saves=("encoder", "resampler", "projector"),
            reads=("seed", "views", "model", "stage.resampler", "trainer"),
            optional=("lora",),
        ),
        Stage(
            name="finetune",
            number=3,
            starts_from="resampler",
            objective="panollava.training.answer_objective",
            trains=("resampler", "projector"),
            saves=("encoder", "resampler", "projector"),
            reads=("seed", "views", "model", "stage.finetune", "trainer"),
            optional=("lora",),
        ),
    )
}


def configured_stages(settings: Any) -> dict[str, Stage]:
    """All stages with their optional parts, as the section `stage` has them."""
    stages, start = {}, ()  # type: tuple[dict[str, Stage], tuple[str, ...]]
    for name, stage in STAGES.items():
        stages[name] = stage.configured(getattr(settings, name), start)
        start = stages[name].saves
    return stages
