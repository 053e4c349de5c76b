"""Stage objective: VICReg, or InfoNCE, between what adjacent views see of the same directions."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from panollava import paths
from panollava.config import Settings
from panollava.data.batches import ViewReader
from panollava.data.packing import Row
from panollava.geometry import views
from panollava.geometry.overlap import correspondences, matched_tokens
from panollava.model.encoder import EncoderOnly, load_encoder
from panollava.stages import Stage
from panollava.training import losses


class Objective(nn.Module):
    """VICReg's statistics are those of all panoramas of a step. They do not depend on the step's
    division into parts."""

    readers: dict[str, ViewReader]

    def __init__(self, stage: Stage, settings: Settings, weights: bool = True) -> None:
        """`weights` False: build the encoder from its configuration, without weights."""
        super().__init__()
        self.stage_settings, self.seed = settings.stage.vision, settings.seed
        size = settings.views.size
        encoder = load_encoder(settings.model.encoder, size, weights)
        layout = views.layout(settings.views)
        self.view_shape = (len(layout.projections), size, size, 3)
        self.model = EncoderOnly(encoder)
        if self.stage_settings.epochs:  # without training, views need not overlap
            centers = views.token_centers(encoder.patch, size)
            self.pairs = correspondences(layout, centers, self.stage_settings.overlap)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.expander = _expander(encoder.width, self.stage_settings.expander)

    def open_readers(self) -> None:
        """Raises UserError for a missing or damaged file."""
        self.readers = {
            split: ViewReader(
                paths.PREPARED / split / "views.npy", self.stage_settings.batch_size, self.seed
            )
            for split in ("train", "valid")
        }

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

    def count(self, batch: Tensor) -> int:
        """Panoramas of a part."""
        return len(batch)

    def step(self, parts: list[Tensor], backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """Accumulate the gradient of the step's loss. Returns the loss and its terms.

        Several parts are computed twice, as in GradCache (Gao et al., 2021): first without
        gradients, for the statistics over all features, then to propagate the gradient of the loss
        into the encoder."""
        if len(parts) == 1:
            x, y = self._matched(parts[0])
            result = self._losses(x, y)
            backward(result["loss"])
            return {name: value.detach() for name, value in result.items()}
        device = parts[0].device
        gpus = [device] if device.type == "cuda" else []
        # Both passes must use the same dropout masks.
        with torch.no_grad(), torch.random.fork_rng(gpus):
            matched = [self._matched(part) for part in parts]
        x, y = (torch.cat(side).requires_grad_() for side in zip(*matched, strict=True))
        result = self._losses(x, y)
        gradients = torch.autograd.grad(result["loss"], (x, y))
        sizes = [len(x) for x, _ in matched]
        for part, *gradient in zip(parts, *(g.split(sizes) for g in gradients), strict=True):
            recomputed = self._matched(part)
            backward(sum((z * g).sum() for z, g in zip(recomputed, gradient, strict=True)))
        return {name: value.detach() for name, value in result.items()}

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

    def _matched(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Expanded features of the same directions in adjacent views, each (matches, features)."""
        self.pairs = self.pairs.to(batch.device)
        x, y = matched_tokens(self.model.encoder(batch), self.pairs)
        return self.expander(x), self.expander(y)

    def _losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        settings = self.stage_settings
        if settings.objective == "infonce":
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
