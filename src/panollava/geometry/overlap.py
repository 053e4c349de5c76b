"""Correspondences between the tokens of neighboring views, and the features of matched tokens.
Which views are neighbors is decided in `views`, how features are compared in `losses`."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

from panollava.errors import UserError
from panollava.geometry.projections import bilinear_weights, grid_position
from panollava.geometry.sphere import Array, angles_from_rays, cell_centers
from panollava.geometry.views import Layout

# Of one pair: positions (grid, grid, 2) in the target's grid, in tokens, and a mask (grid, grid).
Match = tuple[Array, NDArray[np.bool_]]


class Correspondences(NamedTuple):
    """Where the source's tokens are in the target's grid: for each pair of neighbors, first from
    its first view to its second one, then in the other direction."""

    source: Tensor  # (2 x pairs,) int64: index of a view
    target: Tensor  # (2 x pairs,) int64
    # (2 x pairs, source's tokens, target's tokens) float32: bilinear weights, 0 where masked.
    weights: Tensor
    mask: Tensor  # (2 x pairs, grid, grid) bool: the target sees the source's token
    matches: Tensor  # (matches,) int64: flat indices where the mask is true
    counts: tuple[int, int]  # matches of each direction

    def to(self, device: torch.device) -> "Correspondences":
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), self)


def correspondences(layout: Layout, centers: Array, mode: str) -> Correspondences:
    """Match the tokens of neighboring views in both directions. `centers`: of a view's tokens, as
    fractions of its side, see `views.token_centers`.

    `mode` exact: project the ray of each source token into the target. naive: pair the right half
    of a view's columns with the left half of the next view's, index by index. That is right for
    strips of the panorama, wrong for perspective views, and a baseline for comparison.

    Raises:
        UserError: no token is matched, or naive for views that are not side by side.
    """
    match = _exact if mode == "exact" else _naive
    ordered = [*layout.neighbors, *((second, first) for first, second in layout.neighbors)]
    pairs = [match(layout, pair, centers) for pair in ordered]
    forward, backward = np.array([mask.sum() for _, mask in pairs], int).reshape(2, -1).sum(axis=1)
    if not (forward and backward):
        raise UserError(
            f"neighboring views share no token ({len(centers)} x {len(centers)} each); use a "
            "strategy with several views, raise views.fov or views.overlap, or set "
            "stage.vision.epochs to 0"
        )
    source, target = torch.tensor(ordered).unbind(dim=1)
    mask = np.stack([mask for _, mask in pairs])
    weights = np.stack([_weights(*pair) for pair in pairs]).astype(np.float32)
    matches = torch.from_numpy(np.flatnonzero(mask))
    counts = int(forward), int(backward)
    return Correspondences(
        source, target, torch.from_numpy(weights), torch.from_numpy(mask), matches, counts
    )


def _weights(position: Array, mask: NDArray[np.bool_]) -> Array:
    """(grid, grid, 2) positions (x, y), in tokens from the first one's center -> (tokens, tokens):
    a row of weights for each position. Rows sum to 1; those of masked positions are 0."""
    weights = bilinear_weights(position, len(mask)) * mask[..., None]
    return weights.reshape(mask.size, mask.size)


def _exact(layout: Layout, pair: tuple[int, int], centers: Array) -> Match:
    source, target = (layout.projections[view] for view in pair)
    position = grid_position(target, source.rays(centers, centers), centers)
    return position.place, position.between


def _naive(layout: Layout, pair: tuple[int, int], centers: Array) -> Match:
    center = cell_centers(1)
    rays = np.stack([layout.projections[view].rays(center, center) for view in pair])
    _, pitch = angles_from_rays(rays)
    if not np.isclose(*pitch).all():
        raise UserError(
            "stage.vision.overlap: naive needs views side by side (strategies e2p and "
            "sliding_window), but some neighbors are above or below; set it to exact"
        )
    grid = len(centers)
    half = grid // 2
    source, target = slice(grid - half, grid), slice(half)  # columns
    if pair not in layout.neighbors:  # the reverse of one
        source, target = target, source
    index = np.arange(grid, dtype=np.float64)
    position = np.zeros((grid, grid, 2))
    position[:, source] = np.stack(np.meshgrid(index[target], index), axis=-1)
    mask = np.zeros((grid, grid), dtype=bool)
    mask[:, source] = True
    return position, mask


def matched_tokens(grids: Tensor, pairs: Correspondences) -> tuple[Tensor, Tensor]:
    """Features of the same directions in the first and in the second view of each pair.

    One of the two is a token; the other is interpolated bilinearly, which lowers its variance. Over
    both directions, each result has as many of either kind.

    (batch, views, grid, grid, features) -> two of (matches, features), in order of panorama,
    direction, pair, row and column. `grids` and `pairs` must be on one device. Differentiable in
    `grids`. A matrix product, because the gradient of `grid_sample` is not deterministic on a
    GPU."""
    batch, width = grids.shape[0], grids.shape[-1]
    tokens = grids.flatten(2, 3)
    # In half precision, rounded weights would read at other places.
    dtype = torch.promote_types(grids.dtype, torch.float32)
    with torch.autocast(grids.device.type, enabled=False):
        target = pairs.weights.to(dtype) @ tokens[:, pairs.target].to(dtype)
    target = target.reshape(batch, -1, width).to(grids.dtype)
    source = tokens[:, pairs.source].reshape(batch, -1, width)
    first, second = source[:, pairs.matches].split(pairs.counts, dim=1)
    read_in_second, read_in_first = target[:, pairs.matches].split(pairs.counts, dim=1)
    sides = (first, read_in_first), (read_in_second, second)
    x, y = (torch.cat(side, dim=1).flatten(0, 1) for side in sides)
    return x, y
