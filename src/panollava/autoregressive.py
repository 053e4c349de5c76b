"""Stage objective: cross-entropy on the answer tokens, rows packed behind their panorama."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from panollava import paths
from panollava.config import Settings, TextStage
from panollava.data import TextBatch, TextReader
from panollava.dialogue import Dialogue
from panollava.model import build_model
from panollava.stage import Stage

log = logging.getLogger(__name__)


class Objective(nn.Module):
    """The mean over all supervised tokens of a step, in however many parts it is computed."""

    def __init__(self, stage: Stage, settings: Settings) -> None:
        super().__init__()
        own: TextStage = getattr(settings.stage, stage.name)
        self.settings = own
        self.model, tokenizer = build_model(settings.model, settings.views, settings.seed)
        dialogue = Dialogue(tokenizer, own.max_text_length)
        self.prefix = len(dialogue.prefix)
        # A frozen encoder has run already: its features are read instead of views.
        self.sees = "encoder" in stage.trains
        directions = self.model.resampler.get_buffer("directions")
        self.readers = {}
        for split in ("train", "valid"):
            views = paths.PREPARED / split / "views.npy"
            vision = views if self.sees else paths.FEATURES / f"{split}.npy"
            reader = TextReader(
                vision,
                paths.PREPARED / split / "rows.csv",
                dialogue,
                directions[..., 0].numel(),
                own.batch_size,
                settings.seed,
            )
            self.readers[split] = reader
            if reader.cut:
                log.warning(
                    "%s: %d of %d answers are cut to max_text_length %d",
                    split,
                    reader.cut,
                    len(reader.rows),
                    own.max_text_length,
                )

    def parameter_groups(self) -> list[dict]:
        rate = self.settings.lr
        rest = [*self.model.resampler.parameters(), *self.model.projector.parameters()]
        groups: list[dict] = [{"params": rest, "lr": rate}]
        if self.sees:
            own = rate if self.settings.encoder_lr is None else self.settings.encoder_lr
            groups.append({"params": list(self.model.encoder.parameters()), "lr": own})
        return groups

    def count(self, batch: TextBatch) -> int:
        """Rows of a part."""
        return batch.rows

    def step(self, parts: list[TextBatch], backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """Leave the gradient of the step's loss, and return the loss."""
        tokens = sum(len(part.packed.labels) for part in parts)
        loss = torch.zeros((), device=parts[0].vision.device)
        for part in parts:
            share = self._loss_sum(part) / tokens
            backward(share)
            loss += share.detach()
        return {"loss": loss}

    def validate(self, parts: list[TextBatch]) -> tuple[Tensor, int]:
        """The loss summed over answer tokens, and their number."""
        total = torch.stack([self._loss_sum(part) for part in parts]).sum()
        return total, sum(len(part.packed.labels) for part in parts)

    def _loss_sum(self, part: TextBatch) -> Tensor:
        features = self.model.features(part.vision) if self.sees else part.vision
        return self.model.loss_sum(features, part.packed, self.prefix)
