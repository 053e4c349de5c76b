"""Stage objective: what adjacent views see of the same directions is to be alike, by VICReg, or by
InfoNCE on the same correspondences."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from panollava import paths
from panollava.config import Settings
from panollava.data.batches import ViewReader
from panollava.data.packing import Row
from panollava.errors import UserError
from panollava.geometry import views
from panollava.geometry.overlap import correspondences, matched_tokens
from panollava.model.encoder import EncoderOnly, load_encoder, token_centers
from panollava.stages import Stage
from panollava.training import losses


class Objective(nn.Module):
    """Statistics are those of the whole step, in however many parts it is computed."""

    readers: dict[str, ViewReader]

    def __init__(self, stage: Stage, settings: Settings, weights: bool = True) -> None:
        """Without `weights`, the shapes of the pretrained encoder alone."""
        super().__init__()
        own = settings.stage.vision
        self.settings, self.seed = own, settings.seed
        if own.objective not in ("vicreg", "infonce"):
            raise UserError(
                f"stage.vision.objective: expected vicreg or infonce, found '{own.objective}'"
            )
        encoder = load_encoder(settings.model.encoder, settings.views.size, weights)
        layout = views.layout(settings.views)
        size = settings.views.size
        self.view_shape = (len(layout.projections), size, size, 3)
        self.model = EncoderOnly(encoder)
        if own.epochs:  # with none, views needn't overlap
            self.pairs = correspondences(
                layout, token_centers(encoder, settings.views.size), own.overlap
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.expander = _expander(encoder.width, own.expander)

    def open_readers(self) -> None:
        self.readers = {
            split: ViewReader(
                paths.PREPARED / split / "views.npy", self.settings.batch_size, self.seed
            )
            for split in ("train", "valid")
        }

    def describe(self) -> dict[str, Any]:
        """What the pretrained encoder does to a step beside its weights."""
        encoder: Any = self.model.encoder
        return {"encoder": encoder.describe()}

    def blank(self, panoramas: list[list[Row]]) -> Tensor:
        """A part of the shape that `panoramas` have, with nothing in it."""
        return torch.empty((len(panoramas), *self.view_shape), dtype=torch.uint8)

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.parameters()), "lr": self.settings.lr}]

    def count(self, batch: Tensor) -> int:
        """Panoramas of a part."""
        return len(batch)

    def step(self, parts: list[Tensor], backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """Leave the gradient of the step's loss, and return the loss and its parts.

        Several parts are computed twice, as in GradCache (Gao et al., 2021): once to have all
        features for the statistics, once to carry the loss's gradient on into the encoder."""
        if len(parts) == 1:
            x, y = self._matched(parts[0])
            result = self._losses(x, y)
            backward(result["loss"])
            return {name: value.detach() for name, value in result.items()}
        states, matched = [], []
        with torch.no_grad():
            for part in parts:
                states.append(_random_state(part.device))
                matched.append(self._matched(part))
        x = torch.cat([x for x, _ in matched]).requires_grad_()
        y = torch.cat([y for _, y in matched]).requires_grad_()
        result = self._losses(x, y)
        gradients = torch.autograd.grad(result["loss"], (x, y))
        sizes = [len(x) for x, _ in matched]
        split = [g.split(sizes) for g in gradients]
        for part, state, *gradient in zip(parts, states, *split, strict=True):
            _set_random_state(state, part.device)  # what drops out must be the same
            again = self._matched(part)
            backward(sum((z * g).sum() for z, g in zip(again, gradient, strict=True)))
        return {name: value.detach() for name, value in result.items()}

    def validate(self, parts: list[Tensor]) -> tuple[dict[str, Tensor], int]:
        """Sums over panoramas of the loss and of the share of tokens whose counterpart in the
        neighboring view is the nearest of its panorama's, and the panoramas' number."""
        matched = [self._matched(part) for part in parts]
        x, y = (torch.cat(side) for side in zip(*matched, strict=True))
        found = torch.cat([losses.found(*map(self._by_panorama, pair)) for pair in matched])
        count = sum(len(part) for part in parts)
        return {"loss": self._losses(x, y)["loss"] * count, "accuracy": found.sum()}, count

    def _matched(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        self.pairs = self.pairs.to(batch.device)
        x, y = matched_tokens(self.model.encoder(batch), self.pairs)
        return self.expander(x), self.expander(y)

    def _losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        own = self.settings
        if own.objective == "infonce":
            # Of one panorama: all of a step's would take memory as the square of their number.
            x, y = self._by_panorama(x), self._by_panorama(y)
            return losses.infonce(x, y, own.temperature)
        return losses.vicreg(x, y, own.invariance, own.variance, own.covariance)

    def _by_panorama(self, x: Tensor) -> Tensor:
        return x.view(-1, len(self.pairs.matches), x.shape[-1])


def _random_state(device: torch.device) -> list[Tensor]:
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def _expander(features: int, width: int) -> nn.Module:
    """VICReg's expander, without the paper's batch norm: nothing here uses batch statistics."""
    if not width:
        return nn.Identity()
    return nn.Sequential(
        nn.Linear(features, width),
        nn.LayerNorm(width),
        nn.ReLU(),
        nn.Linear(width, width),
    )
