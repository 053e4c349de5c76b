"""Stage objective: cross-entropy on the answer tokens, rows packed behind their panorama."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from panollava import paths
from panollava.config import Settings
from panollava.data.batches import TextBatch, TextReader
from panollava.data.dialogue import Dialogue
from panollava.data.packing import Row, pack
from panollava.errors import UserError
from panollava.geometry.views import layout
from panollava.model.encoder import encoder_grid
from panollava.model.language_model import check_length, end_tokens
from panollava.model.panollava import build_model
from panollava.model.pretrained import describe_config
from panollava.stages import Stage

log = logging.getLogger(__name__)


class Objective(nn.Module):
    """The mean over all supervised tokens of a step, in however many parts it is computed."""

    readers: dict[str, TextReader]

    def __init__(self, stage: Stage, settings: Settings, weights: bool = True) -> None:
        """Without `weights`, the shapes of the pretrained towers alone."""
        super().__init__()
        own: Any = getattr(settings.stage, stage.name)
        self.settings, self.seed = own, settings.seed
        if not 0 < own.labeled <= 1:
            raise UserError(
                f"stage.{stage.name}.labeled: expected a share above 0 and up to 1, "
                f"found {own.labeled:g}"
            )
        self.model, tokenizer = build_model(
            settings.model, settings.views, settings.seed, weights=weights
        )
        ends = end_tokens(self.model.language_model)
        self.dialogue = Dialogue(tokenizer, own.max_text_length, ends)
        self.prefix = len(self.dialogue.text_prefix)
        # A frozen encoder has run already: its features are read instead of views.
        self.sees = not stage.reads_features
        self.size = settings.views.size
        encoder: Any = self.model.encoder
        grid = encoder_grid(encoder, self.size, settings.model.resampler.pool)
        views = len(layout(settings.views).projections)
        self.features = (views, grid, grid, encoder.width)  # of a panorama
        self.vision_tokens = views * grid * grid

    def open_readers(self) -> None:
        """Raises UserError for files that aren't there, and for a row that leaves no answer."""
        own, self.readers = self.settings, {}
        for split in ("train", "valid"):
            views = paths.PREPARED / split / "views.npy"
            vision = views if self.sees else paths.FEATURES / f"{split}.npy"
            reader = TextReader(
                vision,
                paths.PREPARED / split / "rows.csv",
                self.dialogue,
                self.vision_tokens,
                own.batch_size,
                self.seed,
                own.labeled if split == "train" else 1.0,
            )
            self.readers[split] = reader
            if reader.truncated:
                log.warning(
                    "%s: %d of %d answers are cut to max_text_length %d",
                    split,
                    reader.truncated,
                    len(reader.rows),
                    own.max_text_length,
                )
            longest = max(map(len, reader.rows), default=0)
            check_length(
                self.model.language_model,
                self.prefix + self.vision_tokens + longest,
                f"lower the stage's max_text_length ({own.max_text_length})",
            )

    def describe(self) -> dict[str, Any]:
        """What the pretrained towers do to a step beside their weights."""
        encoder: Any = self.model.encoder
        return {
            "encoder": encoder.describe(),
            "language_model": describe_config(self.model.language_model),
            "prefix": self.dialogue.text_prefix,
            "rows": {
                split: [(row.query, row.answer) for row in reader.rows]
                for split, reader in self.readers.items()
            },
        }

    def blank(self, panoramas: list[list[Row]]) -> TextBatch:
        """A part of the shape that `panoramas` have, with nothing in its views or features."""
        count = len(panoramas)
        if self.sees:
            shape = (count, self.features[0], self.size, self.size, 3)
            vision = torch.empty(shape, dtype=torch.uint8)
        else:
            vision = torch.empty((count, *self.features))
        packed = pack(self.dialogue.text_prefix, self.vision_tokens, panoramas, self.dialogue.pad)
        return TextBatch(vision, packed, sum(map(len, panoramas)))

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
            share = self.model.loss_sum(self._seen(part), part.packed, self.prefix) / tokens
            backward(share)
            loss += share.detach()
        return {"loss": loss}

    def validate(self, parts: list[TextBatch]) -> tuple[dict[str, Tensor], int]:
        """Sums over answer tokens of the loss and of those that are predicted right from the true
        ones before them, and the tokens' number."""
        loss = right = torch.zeros((), device=parts[0].vision.device)
        for part in parts:
            labels = part.packed.labels
            logits = self.model.answer_logits(self._seen(part), part.packed, self.prefix)
            loss = loss + functional.cross_entropy(logits, labels, reduction="sum")
            right = right + (logits.argmax(dim=-1) == labels).sum()
        return {"loss": loss, "accuracy": right}, sum(len(part.packed.labels) for part in parts)

    def _seen(self, part: TextBatch) -> Tensor:
        """The encoder's features of the part's panoramas."""
        return self.model.features(part.vision) if self.sees else part.vision
