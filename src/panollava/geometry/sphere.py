"""Directions on the sphere, as rays and as yaw and pitch (radians), and their encoding.

Rays are (x right, y up, z forward). Yaw grows to the right from the panorama's center, pitch
grows upwards."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rays_from_angles(yaw: Array, pitch: Array) -> Array:
    """Radians, any shape (...) -> unit rays (..., 3)."""
    x, z = np.cos(pitch) * np.sin(yaw), np.cos(pitch) * np.cos(yaw)
    return np.stack([x, np.broadcast_to(np.sin(pitch), x.shape), z], axis=-1)


def angles_from_rays(rays: Array) -> tuple[Array, Array]:
    """Rays of any length (..., 3) -> yaw in [-pi, pi], pitch in [-pi/2, pi/2]."""
    x, y, z = np.moveaxis(rays, -1, 0)
    return np.arctan2(x, z), np.arctan2(y, np.hypot(x, z))


def rotation(yaw: float, pitch: float, roll: float) -> Array:
    """The matrix, (3, 3), from the axes of a camera to the world's, in degrees: turned clockwise by
    `roll`, then upwards by `pitch`, then to the right by `yaw`."""
    cy, cp, cr = np.cos(np.radians((yaw, pitch, roll)))
    sy, sp, sr = np.sin(np.radians((yaw, pitch, roll)))
    about_x = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cr, sr, 0], [-sr, cr, 0], [0, 0, 1]])
    return about_y @ about_x @ about_z


def cell_centers(count: int) -> Array:
    """Centers of `count` equal cells of [0, 1]: (count,)."""
    return (np.arange(count) + 0.5) / count


def encode_direction(rays: Array, degree: int) -> Array:
    """Encoding of directions by sectoral spherical harmonics, smooth over seam and poles.

    The unit ray and, for k = 2..degree, cos(pitch)^k (sin k yaw, cos k yaw):
    (..., 3) -> (..., 3 + 2 (degree - 1))."""
    yaw, pitch = angles_from_rays(rays)
    features = list(np.moveaxis(rays_from_angles(yaw, pitch), -1, 0))
    for k in range(2, degree + 1):
        horizontal = np.cos(pitch) ** k
        features += [horizontal * np.sin(k * yaw), horizontal * np.cos(k * yaw)]
    return np.stack(features, axis=-1)
