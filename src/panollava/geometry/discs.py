"""Discs on the sphere: where views can be painted over, and a map from a value for each disc."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from panollava.geometry.projections import Projection, panorama_rays
from panollava.geometry.sphere import Array, rays_from_angles


def disc_centers(rays: Array, spacing: float, radius: float) -> Array:
    """Directions about `spacing` degrees apart, wherever a disc of `radius` degrees has any of the
    `rays` (..., 3): (discs, 3).

    They are points of a Fibonacci lattice (Gonzalez, 2010), which covers the sphere evenly."""
    count = round(4 * np.pi / np.radians(spacing) ** 2)
    index = np.arange(count) + 0.5
    golden = (1 + np.sqrt(5)) / 2
    lattice = rays_from_angles(2 * np.pi * index / golden, np.arcsin(1 - 2 * index / count))
    return lattice[disc_masks(rays.reshape(-1, 3), lattice, radius).any(axis=1)]


def disc_masks(rays: Array, centers: Array, radius: float) -> NDArray[np.bool_]:
    """Which rays, (..., 3), are within `radius` degrees of each center: (discs, ...)."""
    return np.moveaxis(rays @ centers.T, -1, 0) > np.cos(np.radians(radius))


def map_discs(
    values: Array, centers: Array, projections: Sequence[Projection], width: float, height: int
) -> NDArray[np.float32]:
    """Values of discs as an equirectangular map, (height, 2 * height): at each pixel, the mean over
    all discs, weighted by a Gaussian of `width` degrees. 0 where no view looks."""
    rays = panorama_rays(height, 2 * height)
    weights = np.exp((rays @ centers.T - 1) / np.radians(width) ** 2)
    mean = weights @ values / weights.sum(axis=-1)
    return np.where(seen(projections, rays), mean, 0).astype(np.float32)


def seen(projections: Sequence[Projection], rays: Array) -> NDArray[np.bool_]:
    """Whether a view looks in the direction of each ray, (..., 3) -> (...)."""
    return np.any([projection.position(rays)[1] for projection in projections], axis=0)
