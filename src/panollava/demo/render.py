"""Rendering a scene as an equirectangular panorama by ray casting, one ray per pixel.

Axes are those of `geometry.sphere`: x right, y up, z forward. Lengths are in meters."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from panollava.demo.scenes import COLORS, EYE, KINDS, Object, Scene
from panollava.geometry.projections import panorama_rays
from panollava.geometry.sphere import Array, cell_centers, rays_from_angles


def render(scene: Scene, height: int) -> NDArray[np.uint8]:
    """The scene as an equirectangular panorama: (height, 2 * height, 3)."""
    rays = _rays(height)
    light = rays_from_angles(*np.radians(np.array(scene.light)))
    picture = _surroundings(scene.kind, height) * scene.shade
    depth = np.full(len(rays), np.inf)
    # Cast rays only where they can hit an object.
    near = {item: _near(item, height) for item in scene.objects}
    for item in scene.objects:
        _add_shadow(item, rays, near[item], picture)
    for item in scene.objects:
        hit, normal = _cast(item, rays[near[item]])
        visible = hit < depth[near[item]]
        at = near[item][visible]
        depth[at] = hit[visible]
        shading = 0.6 + 0.4 * np.clip(normal[visible] @ light, 0, 1)
        picture[at] = np.array(COLORS[item.color]) * shading[:, None]
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8).reshape(height, -1, 3)


@cache
def _rays(height: int) -> Array:
    """(pixels, 3)."""
    return panorama_rays(height, 2 * height).reshape(-1, 3)


def _near(item: Object, height: int) -> NDArray[np.intp]:
    """Indices of the pixels in whose columns the object may be."""
    yaw = 360 * cell_centers(2 * height) - 180
    offset = np.abs((yaw - item.yaw + 180) % 360 - 180)
    columns = offset < np.degrees(np.arctan2(item.size, item.distance)) + 5
    return np.flatnonzero(np.tile(columns, height))


@cache
def _surroundings(kind: str, height: int) -> Array:
    """Ground, and walls with a ceiling or a sky: (pixels, 3)."""
    indoors, ground, horizon, top = KINDS[kind]
    x, y, z = _rays(height).T
    down = y < 0
    with np.errstate(divide="ignore"):
        far = np.where(down, -EYE / y, np.inf)
    if indoors:  # a square room, 9 m wide and 3 m high
        wall = 4.5 / np.maximum(np.abs(x), np.abs(z)).clip(1e-9)
        level = EYE + wall * y
        floor, ceiling = down & (far < wall), level > 3
        side = np.where(np.abs(x) > np.abs(z), 0.92, 1.0)  # walls alternate in brightness
        picture = np.array(horizon) * side[:, None]
        picture[ceiling] = top
    else:
        floor = down
        blend = np.clip(y, 0, 1)[:, None] ** 0.6
        picture = np.array(horizon) * (1 - blend) + np.array(top) * blend
    picture[floor] = ground
    if indoors:
        tiles = (np.floor(x[floor] * far[floor]) + np.floor(z[floor] * far[floor])) % 2
        picture[floor] *= 1 - 0.06 * tiles[:, None]
    return picture


def _base(item: Object) -> Array:
    """The point on the ground under the object's center."""
    direction = rays_from_angles(np.radians(item.yaw), np.zeros(()))
    return direction * item.distance + np.array([0.0, -EYE, 0.0])


def _add_shadow(item: Object, rays: Array, near: NDArray[np.intp], picture: Array) -> None:
    """Darken the ground under the object."""
    down = near[rays[near, 1] < -1e-3]
    ground = rays[down] * (-EYE / rays[down, 1])[:, None] - _base(item)
    distance = np.hypot(ground[:, 0], ground[:, 2]) / item.size
    picture[down] *= (1 - 0.45 * np.clip(1.5 * (0.9 - distance), 0, 1))[:, None]


def _cast(item: Object, rays: Array) -> tuple[Array, Array]:
    """Distances to the object (infinite where a ray misses it) and its normals there."""
    rotation = _rotation(item.rotation)
    origin = -_base(item) @ rotation  # the camera in the object's axes, whose base is at 0
    hit, normal = _SOLIDS[item.shape](origin, rays @ rotation, item.size)
    return hit, normal @ rotation.T


def _rotation(degrees: float) -> Array:
    cosine, sine = rays_from_angles(np.radians(degrees), np.zeros(()))[[2, 0]]
    return np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])


def _nearer_root(a: Array, b: Array, c: Array) -> Array:
    """The nearer root of a t^2 + 2 b t + c; infinite where there is none in front."""
    discriminant = b * b - a * c
    root = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
    return np.where((discriminant > 0) & (root > 0), root, np.inf)


def _points(origin: Array, rays: Array, hit: Array) -> Array:
    """Where the rays hit; the origin where they miss."""
    return origin + rays * np.where(np.isfinite(hit), hit, 0)[:, None]


def _cut(origin: Array, rays: Array, hit: Array, size: float) -> Array:
    """The distances, infinite where the rays hit below or above the solid."""
    level = _points(origin, rays, hit)[:, 1]
    return np.where((level >= 0) & (level <= size), hit, np.inf)


# Each solid: camera (3,), rays (count, 3) in the solid's axes, and its size -> distances and
# normals.
def _ball(origin: Array, rays: Array, size: float) -> tuple[Array, Array]:
    offset = origin - np.array([0, size / 2, 0])
    hit = _nearer_root(np.ones(len(rays)), rays @ offset, offset @ offset - size**2 / 4)
    return hit, (_points(origin, rays, hit) - np.array([0, size / 2, 0])) / (size / 2)


def _box(origin: Array, rays: Array, size: float) -> tuple[Array, Array]:
    low, high = np.array([-size / 2, 0, -size / 2]), np.array([size / 2, size, size / 2])
    with np.errstate(divide="ignore"):
        one, other = (low - origin) / rays, (high - origin) / rays
    enter, leave = np.minimum(one, other), np.maximum(one, other).min(axis=1)
    first = enter.max(axis=1)
    hit = np.where((first < leave) & (first > 0), first, np.inf)
    side = np.arange(3) == enter.argmax(axis=1)[:, None]
    return hit, np.where(side, -np.sign(rays), 0)


def _cylinder(origin: Array, rays: Array, size: float) -> tuple[Array, Array]:
    flat, eye = rays[:, [0, 2]], origin[[0, 2]]
    radius = 0.35 * size
    side = _nearer_root((flat**2).sum(1), flat @ eye, eye @ eye - radius**2)
    side = _cut(origin, rays, side, size)
    with np.errstate(divide="ignore"):
        lid = (size - origin[1]) / rays[:, 1]
    spot = _points(origin, rays, lid)[:, [0, 2]]
    lid = np.where((lid > 0) & ((spot**2).sum(1) <= radius**2), lid, np.inf)
    hit = np.minimum(side, lid)
    normal = _points(origin, rays, hit) / radius * np.array([1, 0, 1])
    normal[lid < side] = (0, 1, 0)
    return hit, normal


def _cone(origin: Array, rays: Array, size: float) -> tuple[Array, Array]:
    slope = 0.5  # radius at the base over height
    offset = origin - np.array([0, size, 0])
    weights = np.array([1, -(slope**2), 1])
    hit = _nearer_root(rays**2 @ weights, (rays * offset) @ weights, (offset**2) @ weights)
    hit = _cut(origin, rays, hit, size)
    normal = (_points(origin, rays, hit) - np.array([0, size, 0])) * weights
    return hit, normal / np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-9)


_SOLIDS = {"ball": _ball, "box": _box, "cone": _cone, "cylinder": _cylinder}
