"""Stage objective: cross-entropy on the answer tokens of rows packed behind their panorama."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from panollava import paths
from panollava.config import Settings
from panollava.data.batches import StepBatch, TextBatch, TextReader
from panollava.data.dialogue import Dialogue
from panollava.data.epoch_plan import labeled_rows
from panollava.data.packing import Row, pack
from panollava.data.shards import Shards, open_views
from panollava.data.token_cache import check_rows, open_rows
from panollava.errors import UserError
from panollava.files import read_prepared_rows
from panollava.geometry.views import forms_ring, layout
from panollava.model.language_model import check_embedding, end_tokens
from panollava.model.network import build_model
from panollava.model.pretrained import describe_config
from panollava.stages import Stage
from panollava.training.objective import Gather

log = logging.getLogger(__name__)


class Objective(nn.Module):
    """The mean over all answer tokens of a step. It does not depend on the step's division into
    parts."""

    curves, joint = ("loss",), False
    readers: dict[str, TextReader]

    def __init__(self, stage: Stage, settings: Settings, weights: bool = True) -> None:
        """`weights` False: build the towers from their configurations, without weights."""
        super().__init__()
        self.stage_settings: Any = getattr(settings.stage, stage.name)
        self.seed = settings.seed
        if self.stage_settings.turn and not forms_ring(settings.views):
            raise UserError(
                f"stage.{stage.name}.turn: only the views of e2p without global_view and of "
                "sliding_window can be rolled exactly; set it to false"
            )
        self.model, tokenizer = build_model(
            settings.model, settings.views, settings.seed, weights, lora="lora" in stage.saves
        )
        ends = end_tokens(self.model.language_model)
        length, prompt = self.stage_settings.max_text_length, settings.model.prompt
        self.dialogue = Dialogue(tokenizer, length, ends, prompt)
        check_embedding(self.model.language_model, self.dialogue)
        self.text_prefix = len(self.dialogue.text_prefix)  # tokens before the image
        self.reads_features = stage.reads_features  # instead of views
        encoder: Any = self.model.encoder
        size, views = settings.views.size, len(layout(settings.views).projections)
        shape = self.model.resampler.pooling.shape
        self.vision_tokens = self.model.resampler.tokens
        pixels, features = (views, size, size, 3), (*shape, encoder.width)
        self.vision_shape = features if self.reads_features else pixels
        self.views = settings.views
        self.strides = views if self.stage_settings.turn else None  # of a turn

    def open_readers(self) -> None:
        """Raises UserError for a missing file, and for a row without an answer token."""
        settings, self.readers = self.stage_settings, {}
        batch_size = settings.batch_size
        limit = f"lower the stage's max_text_length ({settings.max_text_length})"
        # Validation rows are not truncated: stages with other limits have comparable losses.
        for split, labeled, truncate, remedy in (
            ("train", settings.labeled, True, limit),
            ("valid", 1.0, False, "shorten the longest row of valid.csv"),
        ):
            folder = paths.PREPARED / split
            if self.reads_features:
                vision = Shards(paths.FEATURES / split)
            else:
                vision = open_views(folder / paths.PANORAMAS, self.views)
            file = folder / "rows.csv"
            rows = open_rows(file, self.dialogue, truncate)
            used = labeled_rows(rows.panoramas, labeled)
            read = partial(read_prepared_rows, file)
            check_rows(rows, used, read, str(file), self.dialogue, truncate)
            self.readers[split] = reader = TextReader(
                *(vision, file, rows, used, self.dialogue, self.vision_tokens),
                *(batch_size, self.seed, self.strides),
            )
            if reader.truncated:
                log.warning(
                    "%s: %d of %d answers are cut to max_text_length %d",
                    *(split, reader.truncated, len(used), settings.max_text_length),
                )
            longest = int(rows.lengths[used].max(initial=0))
            self.model.check_length(self.text_prefix + self.vision_tokens + longest, remedy)

    def describe(self) -> dict[str, Any]:
        """What a step depends on besides parameters, files and weights."""
        encoder: Any = self.model.encoder
        return {
            "encoder": encoder.describe(),
            "language_model": describe_config(self.model.language_model),
            "prefix": self.dialogue.text_prefix,
            "rows": {split: reader.rows.digest for split, reader in self.readers.items()},
        }

    def row_counts(self) -> dict[str, int]:
        """Training rows whose answers are cut to `max_text_length`."""
        return {"truncated_rows": self.readers["train"].truncated}

    def blank(self, panoramas: list[list[Row]]) -> TextBatch:
        """A part with the rows of `panoramas` and uninitialized views or features."""
        dtype = torch.float32 if self.reads_features else torch.uint8
        vision = torch.empty((len(panoramas), *self.vision_shape), dtype=dtype)
        packed = pack(self.dialogue.text_prefix, self.vision_tokens, panoramas, self.dialogue.pad)
        return TextBatch(vision, packed)

    def parameter_groups(self) -> list[dict]:
        settings, model = self.stage_settings, self.model
        connector = [*model.resampler.parameters(), *model.projector.parameters()]
        groups: list[dict] = [{"name": "connector", "params": connector, "lr": settings.lr}]
        if not self.reads_features:
            encoder = list(model.encoder.parameters())
            groups.append({"name": "encoder", "params": encoder, "lr": settings.encoder_lr})
        if self.stage_settings.lora:
            adapter = list(model.lora.parameters())
            groups.append({"name": "lora", "params": adapter, "lr": settings.lora_lr})
        return groups

    def terms(
        self, batch: StepBatch, seeds: Sequence[int | None], gather: Gather
    ) -> Iterator[tuple[Tensor, Tensor] | None]:
        """A part's loss, summed over its answer tokens, over the number of those of the step."""
        for part, seed in zip(batch.parts, seeds, strict=True):
            if seed is not None:
                torch.manual_seed(seed)
            if part is None:
                yield None
                continue
            loss = self.model.loss_sum(self._features(part), part.packed, self.text_prefix)
            term = loss / batch.divisor
            yield term, term.detach()[None]

    def validate(self, parts: list[TextBatch]) -> tuple[dict[str, Tensor], int]:
        """Loss and number of correct predictions under teacher forcing, both summed over the answer
        tokens, and the number of answer tokens."""
        loss = correct = torch.zeros((), device=parts[0].vision.device)
        for part in parts:
            labels = part.packed.labels
            logits = self.model.answer_logits(self._features(part), part.packed, self.text_prefix)
            loss = loss + functional.cross_entropy(logits, labels, reduction="sum")
            correct = correct + (logits.argmax(dim=-1) == labels).sum()
        return {"loss": loss, "accuracy": correct}, sum(len(part.packed.labels) for part in parts)

    def _features(self, part: TextBatch) -> Tensor:
        return part.vision if self.reads_features else self.model.features(part.vision)
