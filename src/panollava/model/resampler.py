"""The resampler: pooled patch tokens and their directions into features for the projector."""

import torch
from torch import Tensor, nn

from panollava.config import Resampler
from panollava.errors import UserError


class MLPResampler(nn.Module):
    """Linear, layer norm, GELU, linear, token by token.

    Where each token looks stands beside its features: as the encoding of its ray, which depends on
    neither the order nor the number of views; as a learned vector for each view; or not at all."""

    directions: Tensor

    def __init__(self, features: int, width: int, directions: Tensor, position: str) -> None:
        """`directions`: (views, grid, grid, encoding), see `sphere.encode_direction`; `position`:
        ray, view or none."""
        super().__init__()
        if position == "view":
            learned = torch.randn(len(directions), 1, 1, directions.shape[-1])
            self.directions = nn.Parameter(learned)
        else:
            known = directions if position == "ray" else directions[..., :0]
            self.register_buffer("directions", known.float(), persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(features + self.directions.shape[-1], width),
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(batch, views, grid, grid, features) -> (batch, views * grid * grid, width)."""
        directions = self.directions.expand(*features.shape[:-1], -1)
        tokens = torch.cat([features, directions.to(features.dtype)], dim=-1)
        return self.layers(tokens).flatten(1, 3)


RESAMPLERS = {"mlp": MLPResampler}
POSITIONS = ("ray", "view", "none")


def build_resampler(settings: Resampler, features: int, directions: Tensor) -> nn.Module:
    """Raises UserError for an unknown `model.resampler.type` or `position`."""
    if settings.type not in RESAMPLERS:
        raise UserError(
            f"model.resampler.type: unknown resampler '{settings.type}'; "
            f"known are {', '.join(RESAMPLERS)}"
        )
    if settings.position not in POSITIONS:
        raise UserError(
            f"model.resampler.position: expected {', '.join(POSITIONS[:-1])} or {POSITIONS[-1]}, "
            f"found '{settings.position}'"
        )
    return RESAMPLERS[settings.type](features, settings.width, directions, settings.position)
