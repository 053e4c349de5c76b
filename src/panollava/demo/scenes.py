"""What is in the demo's panoramas: places with a few colored objects in known directions.

A scene is a function of (seed, index). `render` turns it into pixels."""

from dataclasses import dataclass, replace

import numpy as np

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
# kind of place: indoors, and the colors of ground, wall or horizon, ceiling or zenith
KINDS = {
    "room": (True, (0.50, 0.33, 0.20), (0.88, 0.83, 0.72), (0.96, 0.95, 0.92)),
    "hall": (True, (0.45, 0.47, 0.50), (0.62, 0.70, 0.76), (0.85, 0.87, 0.90)),
    "garden": (False, (0.42, 0.62, 0.28), (0.80, 0.90, 0.98), (0.35, 0.60, 0.92)),
    "desert": (False, (0.86, 0.74, 0.52), (0.96, 0.92, 0.84), (0.60, 0.76, 0.92)),
}
EYE = 1.2  # height of the camera in meters
TOLERANCE = 30  # degrees: largest angle between an object and its direction
CLEARANCE = 60  # degrees: smallest angle between a direction and the objects of other directions


@dataclass(frozen=True)
class Object:
    """A solid on the ground, `size` meters wide and high."""

    color: str
    shape: str
    direction: str | None  # None: between two directions
    yaw: float  # degrees, of its center
    distance: float  # meters
    size: float
    rotation: float  # degrees about its vertical axis


@dataclass(frozen=True)
class Scene:
    kind: str
    objects: tuple[Object, ...]  # in the order of DIRECTIONS; one is clearly the largest
    light: tuple[float, float]  # yaw and pitch of its source in degrees
    shade: float  # brightness of the surroundings, about 1

    @property
    def indoors(self) -> bool:
        return KINDS[self.kind][0]

    @property
    def largest(self) -> Object:
        return max(self.objects, key=lambda item: item.size)

    def is_clear(self, direction: str) -> bool:
        """Whether it is unambiguous which object, if any, is in this direction."""
        near = [off for item in self.objects if (off := offset(item.yaw, direction)) < CLEARANCE]
        return not near or (len(near) == 1 and near[0] <= TOLERANCE)

    def at(self, direction: str) -> Object | None:
        return next((item for item in self.objects if item.direction == direction), None)


def make_scene(seed: int, index: int) -> Scene:
    """One to four objects of different colors, at most one in each direction, at least 45 degrees
    apart."""
    random = np.random.default_rng((seed, index))
    count = int(random.choice([1, 2, 3, 4], p=[0.15, 0.25, 0.3, 0.3]))
    directions = sorted(random.choice(4, count, replace=False))
    while True:
        yaws = [90 * place + random.uniform(-TOLERANCE, TOLERANCE) for place in directions]
        gaps = [(b - a) % 360 for a, b in zip(yaws, yaws[1:] + yaws[:1], strict=True)]
        if count == 1 or min(gaps) >= 45:
            break
    largest = random.integers(count)
    colors = random.choice(list(COLORS), count, replace=False)
    objects = tuple(
        Object(
            color=str(color),
            shape=str(random.choice(SHAPES)),
            direction=DIRECTIONS[direction],
            yaw=(yaw + 180) % 360 - 180,
            distance=random.uniform(2.2, 2.7),
            size=random.uniform(1.2, 1.3) if item == largest else random.uniform(0.75, 0.9),
            rotation=random.uniform(0, 90),
        )
        for item, (direction, yaw, color) in enumerate(zip(directions, yaws, colors, strict=True))
    )
    light = (random.uniform(-180, 180), random.uniform(35, 65))
    return Scene(str(random.choice(list(KINDS))), objects, light, random.uniform(0.85, 1.05))


def roll_scene(scene: Scene, degrees: float) -> Scene:
    """The objects of a panorama that is rolled to the right. An object may end up between two
    directions; its `direction` is None then."""
    moved = tuple(
        replace(item, yaw=(item.yaw + degrees + 180) % 360 - 180) for item in scene.objects
    )
    rolled = replace(scene, objects=moved)

    def direction(item: Object) -> str | None:
        near = (name for name in DIRECTIONS if offset(item.yaw, name) <= TOLERANCE)
        return next(filter(rolled.is_clear, near), None)

    return replace(
        rolled, objects=tuple(replace(item, direction=direction(item)) for item in moved)
    )


def offset(yaw: float, direction: str) -> float:
    """The angle between a yaw and a direction in degrees, 0..180."""
    return abs((yaw - 90 * DIRECTIONS.index(direction) + 180) % 360 - 180)
