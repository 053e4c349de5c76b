"""Stage objective: VICReg, or InfoNCE, between what adjacent views see of the same directions."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from panollava import paths
from panollava.config import Settings
from panollava.data.batches import StepBatch, ViewReader
from panollava.data.packing import Row
from panollava.data.shards import open_views
from panollava.geometry import views
from panollava.geometry.overlap import correspondences, matched_tokens
from panollava.model.encoder import EncoderOnly, load_encoder
from panollava.stages import Stage
from panollava.training import losses
from panollava.training.objective import Gather

_VICREG = ("loss", "invariance", "variance", "covariance")


class Objective(nn.Module):
    """VICReg's statistics are those of all panoramas of a step. They do not depend on the step's
    division into parts."""

    curves: tuple[str, ...]
    readers: dict[str, ViewReader]

    def __init__(self, stage: Stage, settings: Settings, weights: bool = True) -> None:
        """`weights` False: build the encoder from its configuration, without weights."""
        super().__init__()
        self.stage_settings, self.seed = settings.stage.vision, settings.seed
        self.views, size = settings.views, settings.views.size
        encoder = load_encoder(settings.model.encoder, size, weights)
        layout = views.layout(settings.views)
        self.view_shape = (len(layout.projections), size, size, 3)
        self.model = EncoderOnly(encoder)
        self.infonce = self.stage_settings.objective == "infonce"
        self.curves = ("loss", "retrieval_accuracy") if self.infonce else _VICREG
        self.joint = not self.infonce
        if self.stage_settings.epochs:  # without training, views need not overlap
            centers = views.token_centers(encoder.patch, size)
            self.pairs = correspondences(layout, centers, self.stage_settings.overlap)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.expander = _expander(encoder.width, self.stage_settings.expander)

    def open_readers(self) -> None:
        """Raises UserError for a missing or damaged file."""
        folders = {split: paths.PREPARED / split / paths.PANORAMAS for split in ("train", "valid")}
        opened = {split: open_views(folder, self.views) for split, folder in folders.items()}
        size = self.stage_settings.batch_size
        self.readers = {split: ViewReader(each, size, self.seed) for split, each in opened.items()}

    def describe(self) -> dict[str, Any]:
        """What a step depends on besides parameters, files and weights."""
        return {"encoder": self.model.encoder.describe()}

    def row_counts(self) -> dict[str, int]:
        return {}

    def blank(self, panoramas: list[list[Row]]) -> Tensor:
        """A part with uninitialized views of as many panoramas."""
        return torch.empty((len(panoramas), *self.view_shape), dtype=torch.uint8)

    def parameter_groups(self) -> list[dict]:
        parameters = list(self.parameters())  # the expander's, too
        return [{"name": "encoder", "params": parameters, "lr": self.stage_settings.lr}]

    def terms(
        self, batch: StepBatch, seeds: Sequence[int | None], gather: Gather
    ) -> Iterator[tuple[Tensor, Tensor] | None]:
        parts = [pair for pair in zip(batch.parts, seeds, strict=True) if pair[0] is not None]
        if self.infonce:
            yield from self._infonce_terms(parts, batch.divisor)
        else:
            yield from self._vicreg_terms(parts, gather)
        yield from [None] * (len(seeds) - len(parts))  # empty parts are the last ones

    def _infonce_terms(
        self, parts: list[tuple[Tensor, int | None]], count: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The mean over a part's panoramas, times their share of the step's."""
        for part, seed in parts:
            result = self._losses(*self._matched(part, seed))
            values = torch.stack([result[name] for name in self.curves]) * (len(part) / count)
            yield values[0], values.detach()

    def _vicreg_terms(
        self, parts: list[tuple[Tensor, int | None]], gather: Gather
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The loss is that of all features of the step, so each part is computed twice, as in
        GradCache (Gao et al., 2021): for its features, and to propagate the loss's gradient into
        the encoder. Only the first part's graph is kept. The values are its terms."""
        features: list[tuple[Tensor, ...]] = []
        graph: tuple[Tensor, ...] = ()
        for part, seed in reversed(parts):
            graph = ()  # frees that of the part after
            graph = self._matched(part, seed)  # with gradients: the same kernels both times
            features.insert(0, tuple(z.detach().float() for z in graph))
        (x, first), (y, _) = (gather([pair[side] for pair in features]) for side in (0, 1))
        result = self._losses(x.requires_grad_(), y.requires_grad_())
        gradients = torch.autograd.grad(result["loss"], (x, y))
        values = torch.stack([result[name].detach() for name in self.curves])
        if first:
            values = torch.zeros_like(values)
        for part, seed in parts:
            graph = graph or self._matched(part, seed)
            end = first + len(graph[0])
            loss = sum((z * g[first:end]).sum() for z, g in zip(graph, gradients, strict=True))
            yield loss, values  # type: ignore[misc]
            first, graph, values = end, (), torch.zeros_like(values)

    def validate(self, parts: list[Tensor]) -> tuple[dict[str, Tensor], int]:
        """Loss and top-1 retrieval accuracy between adjacent views, both summed over panoramas, and
        the number of panoramas."""
        matched = [self._matched(part) for part in parts]
        x, y = (torch.cat(side) for side in zip(*matched, strict=True))
        retrieved = [
            torch.stack([losses.top1_retrieval(*group) for group in self._groups(*pair)]).mean(0)
            for pair in matched
        ]
        count = sum(len(part) for part in parts)
        loss = self._losses(x, y)["loss"] * count
        return {"loss": loss, "accuracy": torch.cat(retrieved).sum()}, count

    def _matched(self, batch: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Expanded features of the same directions in adjacent views, each (matches, features).
        `seed`: of dropout masks."""
        if seed is not None:
            torch.manual_seed(seed)
        self.pairs = self.pairs.to(batch.device)
        x, y = matched_tokens(self.model.encoder(batch), self.pairs)
        return self.expander(x), self.expander(y)

    def _losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        settings = self.stage_settings
        if self.infonce:
            results = [losses.infonce(*group, settings.temperature) for group in self._groups(x, y)]
            names = results[0]
            return {name: torch.stack([each[name] for each in results]).mean() for name in names}
        return losses.vicreg(x, y, settings.invariance, settings.variance, settings.covariance)

    def _groups(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples that are compared with each other, (panoramas, matches, features): those of a
        panorama, because over a step memory would grow with the square of its panoramas, and of one
        direction, because the other reads between the same tokens."""
        sides = (z.view(-1, len(self.pairs.matches), z.shape[-1]) for z in (x, y))
        return zip(*(side.split(self.pairs.counts, dim=1) for side in sides), strict=True)


def _expander(features: int, width: int) -> nn.Module:
    """VICReg's expander with layer norm instead of the paper's batch norm: the model uses no batch
    statistics."""
    if not width:
        return nn.Identity()
    first, second = nn.Linear(features, width), nn.Linear(width, width)
    return nn.Sequential(first, nn.LayerNorm(width), nn.ReLU(), second)
