"""Projections: the mapping between rays and the points of a view or of the panorama.

Their fields (yaw, pitch, fov, extents) are in degrees."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from panollava.geometry.sphere import (
    Array,
    angles_from_rays,
    cell_centers,
    rays_from_angles,
    rotation,
)


class Projection(Protocol):
    """A view, as a mapping between its points and rays."""

    def rays(self, x: Array, y: Array) -> Array:
        """Unit rays of the points at the fractions x of its width and y of its height, from its
        upper left corner: (len(y), len(x), 3)."""

    def position(self, rays: Array) -> tuple[Array, NDArray[np.bool_]]:
        """(..., 3) -> fractions (x, y) of the view from its upper left corner, (..., 2), and
        whether the ray falls inside the view, (...). The fractions of a ray behind a perspective
        view are meaningless."""


@dataclass(frozen=True)
class Gnomonic:
    """A square perspective view: yaw, pitch and field of view (fov) in degrees."""

    yaw: float
    pitch: float
    fov: float

    def rays(self, x: Array, y: Array) -> Array:
        half = np.tan(np.radians(self.fov) / 2)
        x, y = np.meshgrid((2 * x - 1) * half, (1 - 2 * y) * half)
        rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ self._rotation().T
        return rays / np.linalg.norm(rays, axis=-1, keepdims=True)

    def position(self, rays: Array) -> tuple[Array, NDArray[np.bool_]]:
        half = np.tan(np.radians(self.fov) / 2)
        x, y, z = np.moveaxis(rays @ self._rotation().astype(rays.dtype, copy=False), -1, 0)
        front = z > 0
        depth = np.where(front, z, 1) * half
        position = np.stack([(1 + x / depth) / 2, (1 - y / depth) / 2], axis=-1)
        return position, front & ((position >= 0) & (position <= 1)).all(axis=-1)

    def _rotation(self) -> Array:
        return rotation(self.yaw, self.pitch, roll=0)


@dataclass(frozen=True)
class Window:
    """A rectangle of the equirectangular panorama: center and extent in degrees."""

    yaw: float
    pitch: float
    width: float
    height: float

    def rays(self, x: Array, y: Array) -> Array:
        yaw = self.yaw + (x - 0.5) * self.width
        pitch = self.pitch + (0.5 - y) * self.height
        return rays_from_angles(np.radians(yaw)[None, :], np.radians(pitch)[:, None])

    def position(self, rays: Array) -> tuple[Array, NDArray[np.bool_]]:
        yaw, pitch = np.degrees(angles_from_rays(rays))
        x = ((yaw - self.yaw + 180) % 360 - 180) / self.width + 0.5
        y = 0.5 - (pitch - self.pitch) / self.height
        position = np.stack([x, y], axis=-1)
        inside: NDArray[np.bool_] = np.all((position >= 0) & (position <= 1), axis=-1)
        return position, inside


class GridPosition(NamedTuple):
    """Where rays, (...), fall in a view's grid of tokens."""

    place: Array  # (..., 2): x and y in tokens, from the first one's center
    seen: NDArray[np.bool_]  # inside the view
    # Within the centers of the outer tokens: bilinear interpolation needs four tokens.
    between: NDArray[np.bool_]


def grid_position(projection: Projection, rays: Array, centers: Array) -> GridPosition:
    """`centers`: of a view's tokens, as fractions of its side, see `views.token_centers`."""
    position, seen = projection.position(rays)
    grid = len(centers)
    position /= 2 * grid * centers[0]  # of the view -> of its tokens, which may leave a margin
    edge = 0.5 / grid - 1e-9
    between = seen & ((position >= edge) & (position <= 1 - edge)).all(axis=-1)
    return GridPosition(grid * position - 0.5, seen, between)


def bilinear_weights(place: Array, grid: int) -> Array:
    """Places (..., 2) in a grid of tokens, see `GridPosition` -> (..., grid * grid): the weight of
    each token. They sum to 1 within the centers of the outer tokens."""
    along_x, along_y = (
        np.maximum(0, 1 - np.abs(place[..., axis, None] - np.arange(grid))) for axis in (0, 1)
    )
    weights = along_y[..., :, None] * along_x[..., None, :]
    return weights.reshape(*place.shape[:-1], grid * grid)


PANORAMA = Window(0, 0, 360, 180)


def panorama_rays(height: int, width: int) -> Array:
    """Rays of an equirectangular panorama's pixels: (height, width, 3)."""
    return PANORAMA.rays(cell_centers(width), cell_centers(height))


def panorama_position(rays: Array) -> Array:
    """Rays (..., 3) -> fractions (x, y) of an equirectangular panorama from its upper left corner,
    (..., 2), x in [0, 1)."""
    yaw, pitch = angles_from_rays(rays)
    return np.stack([(yaw / (2 * np.pi) + 0.5) % 1, 0.5 - pitch / np.pi], axis=-1)
