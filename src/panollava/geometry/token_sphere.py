"""Vision tokens merged on the sphere: a grid of cells, each of which reads the patch tokens of all
views that see it, so that overlapping views give each direction once."""

from collections.abc import Sequence

import numpy as np

from panollava.errors import UserError
from panollava.geometry.projections import Gnomonic, Projection, bilinear_weights, grid_position
from panollava.geometry.sphere import Array, angles_from_rays, cell_centers, rays_from_angles

_SUBRAYS = 4  # of a cell, along either side
_POWER = 4  # of the cosine between a ray and a view's axis: views count most near their middle


def merge_matrix(
    projections: Sequence[Projection], rows: int, columns: int, centers: Array
) -> tuple[Array, Array]:
    """The weights with which cells read the perspective views, (cells, views * grid * grid), and
    the cells' rays, (cells, 3). `centers`: of a view's tokens, see `views.token_centers`.

    Cells are `columns` equal steps of yaw, the first one in front, and in each, from above, `rows`
    equal steps of sin(pitch). Each averages its sub-rays. A sub-ray is read bilinearly in all views
    that have it within the centers of their outer tokens (if there is none, in all that see it),
    weighted by the cosine of its angle from the view's axis. Weights of a cell sum to 1.

    Raises:
        UserError: no perspective views, a number of columns that the views' stride does not
            divide, or a cell that no view sees.
    """
    views = [projection for projection in projections if isinstance(projection, Gnomonic)]
    if not views:
        raise UserError(
            "model.tokens: sphere needs perspective views; set views.strategy to e2p or cubemap, "
            "or model.tokens to views"
        )
    ring = [view for view in views if view.pitch == views[0].pitch]
    if columns % len(ring):
        nearest = max(1, round(columns / len(ring))) * len(ring)
        raise UserError(
            f"model.sphere_columns: expected a multiple of the {len(ring)} views around the "
            f"horizon, found {columns}; the nearest is {nearest}"
        )
    lowest, highest = _limits(ring) if len(ring) == len(views) else (-np.pi / 2, np.pi / 2)
    rays = _subrays(lowest, highest, rows, columns)
    positions = [grid_position(view, rays, centers) for view in views]
    between = np.stack([position.between for position in positions])
    between |= ~between.any(axis=0)
    axes = [view.rays(cell_centers(1), cell_centers(1))[0, 0] for view in views]
    weights = np.stack(
        [
            np.where(position.seen, rays @ axis, 0) ** _POWER
            for position, axis in zip(positions, axes, strict=True)
        ]
    )
    weights = np.where(between, weights, 0)
    if not (total := weights.sum(axis=0)).all():
        yaw, pitch = np.degrees(angles_from_rays(rays[total == 0][0]))
        raise UserError(
            f"model.tokens: sphere needs views without gaps, but none shows yaw {yaw:.0f}, pitch "
            f"{pitch:.0f}; raise views.overlap, set views.pitch to 0, or model.tokens to views"
        )
    grid = len(centers)
    matrix = [
        # Outside the centers of the outer tokens, those are read.
        (weight[..., None] * bilinear_weights(position.place.clip(0, grid - 1), grid)).mean(axis=1)
        for weight, position in zip(weights / total, positions, strict=True)
    ]
    mean = rays.mean(axis=1)
    return np.concatenate(matrix, axis=1), mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def _limits(ring: Sequence[Gnomonic]) -> tuple[float, float]:
    """The pitches, in radians, between which a ring of views sees every yaw."""
    pitch, half = np.radians(ring[0].pitch), np.radians(ring[0].fov) / 2
    edges = np.clip([pitch - half, pitch + half], -np.pi / 2, np.pi / 2)
    lowest, highest = np.arctan(np.cos(np.pi / len(ring)) * np.tan(edges))
    return lowest, highest


def _subrays(lowest: float, highest: float, rows: int, columns: int) -> Array:
    """(columns * rows, sub-rays of a cell, 3)."""
    sine = 1 - cell_centers(rows * _SUBRAYS)
    pitch = np.arcsin(np.sin(lowest) + sine * (np.sin(highest) - np.sin(lowest)))
    yaw = 2 * np.pi * (cell_centers(columns * _SUBRAYS) - 0.5 / columns)
    rays = rays_from_angles(yaw[:, None], pitch)
    cells = rays.reshape(columns, _SUBRAYS, rows, _SUBRAYS, 3).swapaxes(1, 2)
    return cells.reshape(columns * rows, _SUBRAYS**2, 3)
