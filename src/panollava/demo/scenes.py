"""The demo's panoramas: rooms and landscapes with a few colored objects at known directions.

A scene is a function of (seed, index), and is rendered by casting one ray a pixel."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from panollava.geometry.sphere import cell_centers, panorama_rays, rays_from_angles

COLORS = {
    "red": (0.85, 0.08, 0.08),
    "green": (0.05, 0.55, 0.12),
    "blue": (0.10, 0.20, 0.90),
    "yellow": (0.98, 0.88, 0.05),
    "purple": (0.55, 0.10, 0.65),
    "orange": (1.00, 0.48, 0.02),
}
SHAPES = ("ball", "box", "cone", "cylinder")
DIRECTIONS = ("front", "right", "behind", "left")  # yaw 0, 90, 180, 270
# kind: indoors, ground, wall or horizon, ceiling or zenith
KINDS = {
    "room": (True, (0.50, 0.33, 0.20), (0.88, 0.83, 0.72), (0.96, 0.95, 0.92)),
    "hall": (True, (0.45, 0.47, 0.50), (0.62, 0.70, 0.76), (0.85, 0.87, 0.90)),
    "garden": (False, (0.42, 0.62, 0.28), (0.80, 0.90, 0.98), (0.35, 0.60, 0.92)),
    "desert": (False, (0.86, 0.74, 0.52), (0.96, 0.92, 0.84), (0.60, 0.76, 0.92)),
}
EYE = 1.2  # metres above the ground
WITHIN = 30  # degrees off a direction that an object in it may be
CLEAR = 60  # degrees off a direction that all others must be


@dataclass(frozen=True)
class Object:
    """A solid on the ground, `size` metres wide and high."""

    color: str
    shape: str
    direction: str | None  # None: between two of them
    yaw: float  # degrees, of its center
    distance: float  # metres
    size: float
    turn: float  # degrees about the vertical


@dataclass(frozen=True)
class Scene:
    kind: str
    objects: tuple[Object, ...]  # in the order of DIRECTIONS; the largest is much the largest
    light: tuple[float, float]  # yaw and pitch in degrees, from where it comes
    shade: float  # brightness of the surroundings, about 1

    @property
    def indoors(self) -> bool:
        return KINDS[self.kind][0]

    @property
    def largest(self) -> Object:
        return max(self.objects, key=lambda item: item.size)

    def is_clear(self, direction: str) -> bool:
        """Whether one object is plainly in this direction, or none is."""
        near = [off for item in self.objects if (off := apart(item.yaw, direction)) < CLEAR]
        return not near or (len(near) == 1 and near[0] <= WITHIN)

    def at(self, direction: str) -> Object | None:
        return next((item for item in self.objects if item.direction == direction), None)


def make_scene(seed: int, index: int) -> Scene:
    """One to four objects of different colors, at most one in each direction, no two closer than
    45 degrees."""
    random = np.random.default_rng((seed, index))
    count = int(random.choice([1, 2, 3, 4], p=[0.15, 0.25, 0.3, 0.3]))
    places = sorted(random.choice(4, count, replace=False))
    while True:
        yaws = [90 * place + random.uniform(-WITHIN, WITHIN) for place in places]
        gaps = [(b - a) % 360 for a, b in zip(yaws, yaws[1:] + yaws[:1], strict=True)]
        if count == 1 or min(gaps) >= 45:
            break
    largest = random.integers(count)
    colors = random.choice(list(COLORS), count, replace=False)
    objects = tuple(
        Object(
            color=str(color),
            shape=str(random.choice(SHAPES)),
            direction=DIRECTIONS[place],
            yaw=(yaw + 180) % 360 - 180,
            distance=random.uniform(2.2, 2.7),
            size=random.uniform(1.2, 1.3) if item == largest else random.uniform(0.75, 0.9),
            turn=random.uniform(0, 90),
        )
        for item, (place, yaw, color) in enumerate(zip(places, yaws, colors, strict=True))
    )
    light = (random.uniform(-180, 180), random.uniform(35, 65))
    return Scene(str(random.choice(list(KINDS))), objects, light, random.uniform(0.85, 1.05))


def turn(scene: Scene, degrees: float) -> Scene:
    """The objects as they lie when the panorama is turned to the right: an object may then be
    between two directions."""
    moved = tuple(
        replace(item, yaw=(item.yaw + degrees + 180) % 360 - 180) for item in scene.objects
    )
    turned = replace(scene, objects=moved)

    def direction(item: Object) -> str | None:
        near = (name for name in DIRECTIONS if apart(item.yaw, name) <= WITHIN)
        return next(filter(turned.is_clear, near), None)

    objects = tuple(replace(item, direction=direction(item)) for item in moved)
    return replace(turned, objects=objects)


def apart(yaw: float, direction: str) -> float:
    """Degrees between them, 0..180."""
    return abs((yaw - 90 * DIRECTIONS.index(direction) + 180) % 360 - 180)


def render(scene: Scene, height: int) -> NDArray[np.uint8]:
    """The scene as an equirectangular panorama: (height, 2 * height, 3)."""
    rays = _rays(height)
    light = rays_from_angles(*np.radians(np.array(scene.light)))
    picture = _surroundings(scene.kind, height) * scene.shade
    depth = np.full(len(rays), np.inf)
    # Only rays that can meet an object are cast at it.
    near = {item: _near(item, height) for item in scene.objects}
    for item in scene.objects:
        _shadow(item, rays, near[item], picture)
    for item in scene.objects:
        hit, normal = _cast(item, rays[near[item]])
        seen = hit < depth[near[item]]
        at = near[item][seen]
        depth[at] = hit[seen]
        shading = 0.6 + 0.4 * np.clip(normal[seen] @ light, 0, 1)
        picture[at] = np.array(COLORS[item.color]) * shading[:, None]
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8).reshape(height, -1, 3)


@cache
def _rays(height: int) -> NDArray[np.float64]:
    """(pixels, 3)."""
    return panorama_rays(height, 2 * height).reshape(-1, 3)


def _near(item: Object, height: int) -> NDArray[np.intp]:
    """The pixels in whose columns the object may be."""
    yaw = 360 * cell_centers(2 * height) - 180
    apart = np.abs((yaw - item.yaw + 180) % 360 - 180)
    columns = apart < np.degrees(np.arctan2(item.size, item.distance)) + 5
    return np.flatnonzero(np.tile(columns, height))


@cache
def _surroundings(kind: str, height: int) -> NDArray[np.float64]:
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
        side = np.where(np.abs(x) > np.abs(z), 0.92, 1.0)  # walls in turn darker and lighter
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


def _place(item: Object) -> NDArray[np.float64]:
    """The point on the ground under the object's center."""
    yaw = np.radians(item.yaw)
    direction = rays_from_angles(yaw, np.zeros(()))
    return direction * item.distance + np.array([0.0, -EYE, 0.0])


def _shadow(
    item: Object, rays: NDArray[np.float64], near: NDArray[np.intp], picture: NDArray[np.float64]
) -> None:
    """A soft dark spot on the ground under the object."""
    down = near[rays[near, 1] < -1e-3]
    ground = rays[down] * (-EYE / rays[down, 1])[:, None] - _place(item)
    distance = np.hypot(ground[:, 0], ground[:, 2]) / item.size
    picture[down] *= (1 - 0.45 * np.clip(1.5 * (0.9 - distance), 0, 1))[:, None]


def _cast(
    item: Object, rays: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances to the object (infinite where it isn't met) and its normals there."""
    turn = _turned(item.turn)
    origin = -_place(item) @ turn  # the eye, in the object's axes, its foot at 0
    local = rays @ turn
    hit, normal = _SOLIDS[item.shape](origin, local, item.size)
    return hit, normal @ turn.T


def _turned(degrees: float) -> NDArray[np.float64]:
    cosine, sine = rays_from_angles(np.radians(degrees), np.zeros(()))[[2, 0]]
    return np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])


def _quadratic(a, b, c):  # type: ignore[no-untyped-def]
    """The nearer root of a t^2 + 2 b t + c; infinite where there is none in front."""
    inside = b * b - a * c
    root = (-b - np.sqrt(np.maximum(inside, 0))) / a
    return np.where((inside > 0) & (root > 0), root, np.inf)


def _points(origin, rays, hit):  # type: ignore[no-untyped-def]
    return origin + rays * np.where(np.isfinite(hit), hit, 0)[:, None]


def _ball(origin, rays, size):  # type: ignore[no-untyped-def]
    offset = origin - np.array([0, size / 2, 0])
    hit = _quadratic(np.ones(len(rays)), rays @ offset, offset @ offset - size**2 / 4)
    return hit, (_points(origin, rays, hit) - np.array([0, size / 2, 0])) / (size / 2)


def _box(origin, rays, size):  # type: ignore[no-untyped-def]
    low, high = np.array([-size / 2, 0, -size / 2]), np.array([size / 2, size, size / 2])
    with np.errstate(divide="ignore"):
        one, other = (low - origin) / rays, (high - origin) / rays
    enter, leave = np.minimum(one, other), np.maximum(one, other).min(axis=1)
    axis = enter.argmax(axis=1)
    first = enter.max(axis=1)
    hit = np.where((first < leave) & (first > 0), first, np.inf)
    normal = np.zeros_like(rays)
    index = np.arange(len(rays))
    normal[index, axis] = -np.sign(rays[index, axis])
    return hit, normal


def _cylinder(origin, rays, size):  # type: ignore[no-untyped-def]
    flat, eye = rays[:, [0, 2]], origin[[0, 2]]
    radius = 0.35 * size
    side = _quadratic((flat**2).sum(1), flat @ eye, eye @ eye - radius**2)
    level = origin[1] + np.where(np.isfinite(side), side, 0) * rays[:, 1]
    side = np.where((level >= 0) & (level <= size), side, np.inf)
    with np.errstate(divide="ignore"):
        lid = (size - origin[1]) / rays[:, 1]
    spot = _points(origin, rays, lid)[:, [0, 2]]
    lid = np.where((lid > 0) & ((spot**2).sum(1) <= radius**2), lid, np.inf)
    hit = np.minimum(side, lid)
    normal = _points(origin, rays, hit) / radius * np.array([1, 0, 1])
    normal[lid < side] = (0, 1, 0)
    return hit, normal


def _cone(origin, rays, size):  # type: ignore[no-untyped-def]
    slope = 0.5  # radius at the foot over height
    offset = origin - np.array([0, size, 0])
    weights = np.array([1, -(slope**2), 1])
    hit = _quadratic(rays**2 @ weights, (rays * offset) @ weights, (offset**2) @ weights)
    level = origin[1] + np.where(np.isfinite(hit), hit, 0) * rays[:, 1]
    hit = np.where((level >= 0) & (level <= size), hit, np.inf)
    normal = (_points(origin, rays, hit) - np.array([0, size, 0])) * weights
    return hit, normal / np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-9)


_SOLIDS = {"ball": _ball, "box": _box, "cone": _cone, "cylinder": _cylinder}
