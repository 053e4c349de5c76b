"""Where two neighbouring views look the same way, exactly, and the features they have there."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from panollava.errors import UserError
from panollava.views import Layout


class Correspondences(NamedTuple):
    """For each pair of neighbours, what the target sees at the source's tokens."""

    source: Tensor  # (pairs,) int64: index of a view
    target: Tensor  # (pairs,) int64
    position: Tensor  # (pairs, grid, grid, 2) float32: (x, y) in the target's grid, -1..1
    mask: Tensor  # (pairs, grid, grid) bool: the target sees the token


def correspondences(layout: Layout, grid: int, mode: str) -> Correspondences:
    """`exact`: each source token's ray is projected into the target's grid. `naive`: the right
    half of a view's columns against the left half of the next one's, index by index.

    Raises:
        UserError: unknown mode, or views that share no token.
    """
    if mode not in ("exact", "naive"):
        raise UserError(f"stage.vision.overlap: expected exact or naive, found '{mode}'")
    found = [_exact(layout, pair, grid) if mode == "exact" else _naive(grid) for pair in layout.neighbours]
    if not any(mask.any() for _, mask in found):
        raise UserError(
            "the views share no token, so that the vision stage has nothing to compare: raise "
            "views.overlap or views.fov, or set stage.vision.epochs to 0"
        )
    pairs = torch.tensor(layout.neighbours)
    return Correspondences(
        pairs[:, 0],
        pairs[:, 1],
        torch.from_numpy(np.stack([position for position, _ in found])).float(),
        torch.from_numpy(np.stack([mask for _, mask in found])),
    )


def _exact(layout: Layout, pair: tuple[int, int], grid: int) -> tuple[np.ndarray, np.ndarray]:
    source, target = (layout.projections[index] for index in pair)
    position, inside = target.position(source.rays(grid, grid))
    # Bilinear reading needs four tokens around it: stay within the centres of the outer ones.
    edge = 0.5 / grid - 1e-9
    inside &= ((position >= edge) & (position <= 1 - edge)).all(axis=-1)
    return 2 * position - 1, inside


def _naive(grid: int) -> tuple[np.ndarray, np.ndarray]:
    half = grid // 2
    centres = (2 * np.arange(grid) + 1) / grid - 1
    x = np.roll(centres, grid - half)
    position = np.stack(np.meshgrid(x, centres), axis=-1)
    mask = np.zeros((grid, grid), dtype=bool)
    mask[:, grid - half :] = True
    return position, mask


def matched_tokens(grids: Tensor, pairs: Correspondences) -> tuple[Tensor, Tensor]:
    """Features of the source's tokens, and what the target's grid reads there bilinearly.

    (batch, views, grid, grid, features) -> two of (matches, features)."""
    batch, _, grid, _, width = grids.shape
    device = grids.device
    source = grids[:, pairs.source.to(device)]
    target = grids[:, pairs.target.to(device)].flatten(0, 1).permute(0, 3, 1, 2)
    position = pairs.position.to(device, grids.dtype)
    position = position.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    read = functional.grid_sample(target, position, padding_mode="border", align_corners=False)
    read = read.permute(0, 2, 3, 1).reshape(batch, -1, grid, grid, width)
    mask = pairs.mask.to(device).expand(batch, -1, -1, -1)
    return source[mask], read[mask]
