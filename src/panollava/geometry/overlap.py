"""Where two neighboring views look the same way, and the features that they have there. Which
views are neighbors is decided in `views`, what is done with the features in `losses`."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panollava.errors import UserError
from panollava.geometry.sphere import Array, angles_from_rays, cell_centers
from panollava.geometry.views import Layout

Match = tuple[Array, NDArray[np.bool_]]  # position and mask of one pair of neighbors


class Correspondences(NamedTuple):
    """For each pair of neighbors, where the target sees the source's tokens."""

    source: Tensor  # (pairs,) int64: index of a view
    target: Tensor  # (pairs,) int64
    # (pairs, tokens, tokens) float32: how much each of the target's tokens counts where one of
    # the source's looks, which is bilinear; nothing where the target doesn't see it.
    weights: Tensor
    mask: Tensor  # (pairs, grid, grid) bool: the target sees the token
    seen: Tensor  # (matches,) int64: where the flat mask is true

    def to(self, device: torch.device) -> "Correspondences":
        return Correspondences(*(tensor.to(device) for tensor in self))


def correspondences(layout: Layout, centers: Array, mode: str) -> Correspondences:
    """Match the tokens of neighbors. `centers`: of a view's grid of equal tokens, which begins at
    its upper left corner, as fractions of its side (`encoder.token_centers`).

    `exact`: the ray of each source token is projected into the target. `naive`: the right half
    of a view's columns against the left half of the next one's, index by index, as if overlapping
    views were a flat panorama cut up; wrong for perspective views, and here to be compared with.

    Raises:
        UserError: unknown mode, views that share no token, or naive for views that don't stand
            side by side.
    """
    if mode not in ("exact", "naive"):
        raise UserError(f"stage.vision.overlap: expected exact or naive, found '{mode}'")
    match = _exact if mode == "exact" else _naive
    found = [match(layout, pair, centers) for pair in layout.neighbors]
    if not any(mask.any() for _, mask in found):
        raise UserError(
            f"the views share no token of their {len(centers)} x {len(centers)}, so that the "
            "vision stage has nothing to compare: use a strategy of several views, widen views.fov "
            "or raise views.overlap; or set stage.vision.epochs to 0"
        )
    source, target = torch.tensor(layout.neighbors).unbind(dim=1)
    mask = np.stack([mask for _, mask in found])
    weights = np.stack([_bilinear(*own) for own in found]).astype(np.float32)
    arrays = map(torch.from_numpy, (weights, mask, np.flatnonzero(mask)))
    return Correspondences(source, target, *arrays)


def _bilinear(position: Array, mask: NDArray[np.bool_]) -> Array:
    """(tokens, tokens): a row for each position in a grid, (x, y) in tokens from the first one's
    center. Rows sum to 1, but for those that the mask leaves out."""
    grid = len(mask)
    along_x, along_y = (
        np.maximum(0, 1 - np.abs(position[..., axis, None] - np.arange(grid))) for axis in (0, 1)
    )
    weights = along_y[..., :, None] * along_x[..., None, :] * mask[..., None, None]
    return weights.reshape(grid * grid, grid * grid)


def _exact(layout: Layout, pair: tuple[int, int], centers: Array) -> Match:
    source, target = (layout.projections[view] for view in pair)
    position, inside = target.position(source.rays(centers, centers))
    grid = len(centers)
    position /= 2 * grid * centers[0]  # of the view -> of its tokens, which may leave a margin
    # Bilinear reading needs four tokens around it: stay within the centers of the outer ones.
    edge = 0.5 / grid - 1e-9
    inside &= ((position >= edge) & (position <= 1 - edge)).all(axis=-1)
    return grid * position - 0.5, inside


def _naive(layout: Layout, pair: tuple[int, int], centers: Array) -> Match:
    middle = cell_centers(1)
    _, (one, other) = angles_from_rays(
        np.concatenate([layout.projections[view].rays(middle, middle) for view in pair])
    )
    if not np.isclose(one, other).all():
        raise UserError(
            "stage.vision.overlap: naive needs views that stand side by side (strategies e2p and "
            "sliding_window), but these have neighbors above and below; set it to exact"
        )
    grid = len(centers)
    half = grid // 2
    own = np.arange(grid, dtype=np.float64)
    position = np.stack(np.meshgrid(np.roll(own, grid - half), own), axis=-1)
    mask = np.zeros((grid, grid), dtype=bool)
    mask[:, grid - half :] = True
    return position, mask


def matched_tokens(grids: Tensor, pairs: Correspondences) -> tuple[Tensor, Tensor]:
    """Features of the source's tokens, and what the target's grid reads there bilinearly.

    (batch, views, grid, grid, features) -> two of (matches, features), in order of panorama,
    pair, row and column. Differentiable in `grids`, which lie where `pairs` do. Products and not
    `grid_sample`, whose gradient differs from run to run on a GPU."""
    batch, width = grids.shape[0], grids.shape[-1]
    tokens = grids.flatten(2, 3)
    # Half precision would read elsewhere, by up to a part in 256 of what lies between.
    dtype = torch.promote_types(grids.dtype, torch.float32)
    with torch.autocast(grids.device.type, enabled=False):
        read = pairs.weights.to(dtype) @ tokens[:, pairs.target].to(dtype)
    read = read.reshape(batch, -1, width).to(grids.dtype)
    source = tokens[:, pairs.source].reshape(batch, -1, width)
    return source[:, pairs.seen].flatten(0, 1), read[:, pairs.seen].flatten(0, 1)
