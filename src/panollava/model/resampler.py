"""The resampler: pools patch tokens, and maps them and their directions to features for the
projector."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class MLPResampler(nn.Module):
    """Linear, layer norm, GELU, linear, for each token.

    A position is appended to a token's features. ray: the encoding of its direction, which depends
    on neither the order nor the number of views. view: a learned vector for its view."""

    directions: Tensor

    def __init__(self, features: int, width: int, directions: Tensor, position: str) -> None:
        """`directions`: (views, grid, grid, encoding), see `sphere.encode_direction`."""
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


def pool_tokens(grids: Tensor, side: int) -> Tensor:
    """Average pooling over side x side squares: (..., grid, grid, features) ->
    (..., ceil(grid / side), ceil(grid / side), features). Squares at the right and lower edges may
    be incomplete."""
    leading, (grid, _, width) = grids.shape[:-3], grids.shape[-3:]
    flat = grids.reshape(-1, grid, grid, width).permute(0, 3, 1, 2)
    pooled = functional.avg_pool2d(flat, side, ceil_mode=True)
    return pooled.permute(0, 2, 3, 1).reshape(*leading, *pooled.shape[2:], width)
