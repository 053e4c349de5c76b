"""The resampler: pools patch tokens, and maps them and their directions to features for the
projector."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class MLPResampler(nn.Module):
    """The first layer of an MLP, whose second one is the projector: linear, layer norm, GELU and
    layer norm, for each token.

    A position is added to the normalized features, so that its weight does not depend on their
    number and scale. ray: the encoding of a token's direction, which depends on neither the order
    nor the number of views. view: a learned vector for its view."""

    directions: Tensor

    def __init__(self, features: int, width: int, directions: Tensor, position: str) -> None:
        """`directions`: (views, grid, grid, encoding), see `sphere.encode_direction`."""
        super().__init__()
        if position == "view":
            learned = torch.randn(len(directions), 1, 1, directions.shape[-1])
            self.directions = nn.Parameter(learned)
        else:
            self.register_buffer("directions", directions.float(), persistent=False)
        self.content = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width))
        self.position = None
        if position != "none":
            self.position = nn.Linear(directions.shape[-1], width, bias=False)
        self.output = nn.Sequential(nn.GELU(), nn.LayerNorm(width))

    def forward(self, features: Tensor) -> Tensor:
        """(batch, views, grid, grid, features) -> (batch, views * grid * grid, width). Before
        training, each token has mean 0 and variance 1."""
        hidden = self.content(features)
        if self.position is not None:
            hidden = hidden + self.position(self.directions)
        return self.output(hidden).flatten(1, 3)


RESAMPLERS = {"mlp": MLPResampler}


def pool_tokens(grids: Tensor, side: int) -> Tensor:
    """Average pooling over side x side squares: (..., grid, grid, features) ->
    (..., ceil(grid / side), ceil(grid / side), features). Squares at the right and lower edges may
    be incomplete."""
    leading, (grid, _, width) = grids.shape[:-3], grids.shape[-3:]
    flat = grids.reshape(-1, grid, grid, width).permute(0, 3, 1, 2)
    pooled = functional.avg_pool2d(flat, side, ceil_mode=True)
    return pooled.permute(0, 2, 3, 1).reshape(*leading, *pooled.shape[2:], width)
