"""Where two neighbouring views look the same way, and the features that they have there. Which
views are neighbours is decided in `views`, what is done with the features in `losses`."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from panollava.errors import UserError
from panollava.sphere import Array, angles_from_rays, cell_centres
from panollava.views import Layout

Match = tuple[Array, NDArray[np.bool_]]  # position and mask of one pair of neighbours


class Correspondences(NamedTuple):
    """For each pair of neighbours, where the target sees the source's tokens."""

    source: Tensor  # (pairs,) int64: index of a view
    target: Tensor  # (pairs,) int64
    position: Tensor  # (pairs, grid, grid, 2) float32: (x, y) in the target's grid, -1..1 its edges
    mask: Tensor  # (pairs, grid, grid) bool: the target sees the token
    seen: Tensor  # (matches,) int64: where the flat mask is true


def correspondences(layout: Layout, centres: Array, mode: str) -> Correspondences:
    """Match the tokens of neighbours. `centres`: of a view's grid of equal tokens, which begins at
    its upper left corner, as fractions of its side (`encoder.token_centres`).

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
    found = [match(layout, pair, centres) for pair in layout.neighbours]
    if not any(mask.any() for _, mask in found):
        raise UserError(
            f"the views share no token of their {len(centres)} x {len(centres)}, so that the "
            "vision stage has nothing to compare: use a strategy of several views, widen views.fov "
            "or raise views.overlap; or set stage.vision.epochs to 0"
        )
    source, target = torch.tensor(layout.neighbours).unbind(dim=1)
    position = np.stack([position for position, _ in found]).astype(np.float32)
    mask = np.stack([mask for _, mask in found])
    arrays = (position, mask, np.flatnonzero(mask))
    position_, mask_, seen = map(torch.from_numpy, arrays)
    return Correspondences(source, target, position_, mask_, seen)


def _exact(layout: Layout, pair: tuple[int, int], centres: Array) -> Match:
    source, target = (layout.projections[view] for view in pair)
    position, inside = target.position(source.rays(centres, centres))
    grid = len(centres)
    position /= 2 * grid * centres[0]  # of the view -> of its tokens, which may leave a margin
    # Bilinear reading needs four tokens around it: stay within the centres of the outer ones.
    edge = 0.5 / grid - 1e-9
    inside &= ((position >= edge) & (position <= 1 - edge)).all(axis=-1)
    return 2 * position - 1, inside


def _naive(layout: Layout, pair: tuple[int, int], centres: Array) -> Match:
    middle = cell_centres(1)
    _, (one, other) = angles_from_rays(
        np.concatenate([layout.projections[view].rays(middle, middle) for view in pair])
    )
    if not np.isclose(one, other).all():
        raise UserError(
            "stage.vision.overlap: naive needs views that stand side by side (strategies e2p and "
            "sliding_window), but these have neighbours above and below; set it to exact"
        )
    grid = len(centres)
    half = grid // 2
    own = 2 * cell_centres(grid) - 1
    position = np.stack(np.meshgrid(np.roll(own, grid - half), own), axis=-1)
    mask = np.zeros((grid, grid), dtype=bool)
    mask[:, grid - half :] = True
    return position, mask


def matched_tokens(grids: Tensor, pairs: Correspondences) -> tuple[Tensor, Tensor]:
    """Features of the source's tokens, and what the target's grid reads there bilinearly.

    (batch, views, grid, grid, features) -> two of (matches, features), in order of panorama,
    pair, row and column. Differentiable in `grids`."""
    batch, width, device = grids.shape[0], grids.shape[-1], grids.device
    # Half precision would displace the positions by up to a tenth of a token.
    dtype = torch.promote_types(grids.dtype, torch.float32)
    target = grids[:, pairs.target.to(device)].flatten(0, 1).permute(0, 3, 1, 2).to(dtype)
    position = pairs.position.to(device, dtype)
    position = position.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    # Masked tokens may lie anywhere; border keeps them finite.
    read = functional.grid_sample(target, position, padding_mode="border", align_corners=False)
    read = read.permute(0, 2, 3, 1).reshape(batch, -1, width).to(grids.dtype)
    source = grids[:, pairs.source.to(device)].reshape(batch, -1, width)
    index = pairs.seen.to(device)
    return source[:, index].flatten(0, 1), read[:, index].flatten(0, 1)
