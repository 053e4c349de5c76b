"""The resampler: pooled patch tokens and their directions into features for the projector."""

import torch
from torch import Tensor, nn

from panollava.config import Resampler
from panollava.errors import UserError


class MLPResampler(nn.Module):
    """Linear, layer norm, GELU, linear, token by token.

    Each token's direction is encoded beside its features, so that what it says about where it
    looks depends on neither the order nor the number of views."""

    directions: Tensor

    def __init__(self, features: int, width: int, directions: Tensor) -> None:
        """`directions`: (views, grid, grid, encoding), see `sphere.encode_direction`."""
        super().__init__()
        self.register_buffer("directions", directions.float(), persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(features + directions.shape[-1], width),
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(batch, views, grid, grid, features) -> (batch, views * grid * grid, width)."""
        directions = self.directions.expand(len(features), -1, -1, -1, -1)
        tokens = torch.cat([features, directions.to(features.dtype)], dim=-1)
        return self.layers(tokens).flatten(1, 3)


RESAMPLERS = {"mlp": MLPResampler}


def build_resampler(settings: Resampler, features: int, directions: Tensor) -> nn.Module:
    """Raises UserError for an unknown `model.resampler.type`."""
    if settings.type not in RESAMPLERS:
        raise UserError(
            f"model.resampler.type: unknown resampler '{settings.type}'; "
            f"known are {', '.join(RESAMPLERS)}"
        )
    return RESAMPLERS[settings.type](features, settings.width, directions)
