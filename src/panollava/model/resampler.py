"""Resamplers: pool patch tokens, and map them and their directions to features for the projector.

`RESAMPLERS` in network.py lists them; perceiver.py has the largest."""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from panollava import config
from panollava.errors import UserError
from panollava.geometry.sphere import encode_direction
from panollava.geometry.token_sphere import merge_matrix
from panollava.geometry.views import layout, token_centers, token_rays


class Pooling(nn.Module):
    """From the patch tokens of a panorama's views to its vision tokens: averages over squares of
    each view, or cells of the sphere, which merge the views (model.tokens: views or sphere).

    No cells merge a global view: its pooled tokens follow them. `rays` are those of the tokens,
    (*shape, 3), where the shape is (views, grid, grid) or (tokens,)."""

    matrix: Tensor | None  # (tokens, patch tokens of all views) float32; None: views are pooled

    def __init__(self, settings: config.Model, views: config.Views, patch: int) -> None:
        """`patch`: pixels along a patch of the encoder. Raises UserError for views that cannot be
        merged."""
        super().__init__()
        self.side = settings.resampler.pool
        views_layout, matrix = layout(views), None
        rays = token_rays(views_layout, token_centers(patch, views.size, self.side))
        if settings.tokens == "sphere":
            centers = token_centers(patch, views.size)
            cells, cell_rays = merge_matrix(
                views_layout.projections, settings.sphere_rows, settings.sphere_columns, centers
            )
            merged = cells.shape[1] // len(centers) ** 2  # views
            each = torch.eye(len(centers) ** 2).unflatten(0, (len(centers), len(centers)))
            pooled = [pool_tokens(each, self.side).flatten(0, 1)] * (len(rays) - merged)
            matrix = torch.block_diag(torch.from_numpy(cells).float(), *pooled)
            rays = np.concatenate([cell_rays, rays[merged:].reshape(-1, 3)])
        self.rays, self.shape = rays, rays.shape[:-1]
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, grids: Tensor) -> Tensor:
        """(batch, views, grid, grid, features) -> (batch, *shape, features)."""
        if self.matrix is None:
            return pool_tokens(grids, self.side)
        # In half precision, rounded weights would read at other places.
        with torch.autocast(grids.device.type, enabled=False):
            return self.matrix @ grids.flatten(1, 3).float()


class Resampler(nn.Module):
    """Base of all resamplers: normalized features of each pooled token, to which an encoding of its
    position is added. So its weight does not depend on the features' number and scale.

    ray: the encoding of a token's direction, which depends on neither the order nor the number of
    views. view: a learned vector for its view."""

    width: int  # features of an output
    mean_square: float  # of the outputs before training, about
    directions: Tensor

    def __init__(self, features: int, settings: config.Resampler, pooling: Pooling) -> None:
        """`features`: of a pooled token. Raises UserError for settings that do not fit."""
        super().__init__()
        self.pooling = pooling
        directions = torch.from_numpy(encode_direction(pooling.rays, settings.direction_degree))
        if settings.position == "view":
            if pooling.matrix is not None:
                raise UserError(
                    "model.resampler.position: tokens merged on the sphere belong to no view; set "
                    "it to ray, or model.tokens to views"
                )
            learned = torch.randn(len(directions), 1, 1, directions.shape[-1])
            self.directions = nn.Parameter(learned)
        else:
            self.register_buffer("directions", directions.float(), persistent=False)
        self.content = self.normalize(features, settings.width)
        self.width = self.content[-1].normalized_shape[0]  # type: ignore[index,assignment]
        self.position = None
        if settings.position != "none":
            self.position = nn.Linear(directions.shape[-1], self.width, bias=False)

    def normalize(self, features: int, width: int) -> nn.Sequential:
        """The layers before the position is added. The last one is a LayerNorm."""
        return nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width))

    @property
    def tokens(self) -> int:
        """Vision tokens of a panorama."""
        return math.prod(self.pooling.shape)

    @property
    def fewer_tokens(self) -> str:
        """How to get fewer of them."""
        if self.pooling.matrix is not None:
            return "lower model.sphere_rows"
        return "use fewer views, raise model.resampler.pool"

    def forward(self, features: Tensor) -> Tensor:
        """Pooled features (batch, *shape, features) -> (batch, tokens, width)."""
        hidden = self.content(features)
        if self.position is not None:
            hidden = hidden + self.position(self.directions)
        return hidden.flatten(1, -2)


class MLPResampler(Resampler):
    """The first layer of an MLP, whose second one is the projector: linear, layer norm and GELU,
    for each token."""

    mean_square = 0.43  # the GELU of normally distributed values

    def forward(self, features: Tensor) -> Tensor:
        return functional.gelu(super().forward(features))


class LinearResampler(Resampler):
    """Only normalizes the features, so that the projector is the only layer, as in LLaVA 1. Its
    outputs have the encoder's width."""

    mean_square = 1.0

    def normalize(self, features: int, width: int) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(features))


def pool_tokens(grids: Tensor, side: int) -> Tensor:
    """Average pooling over side x side squares: (..., grid, grid, features) ->
    (..., ceil(grid / side), ceil(grid / side), features). Squares at the right and lower edges may
    be incomplete."""
    leading, (grid, _, width) = grids.shape[:-3], grids.shape[-3:]
    flat = grids.reshape(-1, grid, grid, width).permute(0, 3, 1, 2)
    pooled = functional.avg_pool2d(flat, side, ceil_mode=True)
    return pooled.permute(0, 2, 3, 1).reshape(*leading, *pooled.shape[2:], width)
