"""The views of a panorama: which way they look, which are neighbors, and how they are sampled.
What they share is found in `overlap`."""

import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from panollava import config
from panollava.errors import UserError
from panollava.geometry.sphere import (
    Array,
    Gnomonic,
    Projection,
    Window,
    cell_centers,
    panorama_position,
)


@dataclass(frozen=True)
class Layout:
    """Views in order, and the pairs of neighbors that see the same directions."""

    projections: tuple[Projection, ...]
    neighbors: tuple[tuple[int, int], ...]


def layout(settings: config.Views) -> Layout:
    """Raises UserError for an unknown strategy or values that it can't use."""
    if settings.strategy not in STRATEGIES:
        raise UserError(
            f"views.strategy: unknown strategy '{settings.strategy}'; "
            f"known are {', '.join(STRATEGIES)}"
        )
    if settings.size < 1:
        raise UserError(f"views.size: expected a positive number of pixels, found {settings.size}")
    if settings.strategy != "e2p" and settings.global_view:
        raise UserError(
            f"views.global_view is for strategy e2p alone, found '{settings.strategy}'; "
            "set it to false"
        )
    if settings.strategy != "e2p" and settings.pitch != 0:
        raise UserError(
            f"views.pitch is for strategy e2p alone, found {settings.pitch:g} with "
            f"'{settings.strategy}'; set it to 0"
        )
    return STRATEGIES[settings.strategy](settings)


def _e2p(settings: config.Views) -> Layout:
    """Gnomonic views in a ring, and one of the whole panorama if asked for."""
    if not 0 < settings.fov < 180:
        raise UserError(f"views.fov: a perspective view needs 0 < fov < 180, found {settings.fov}")
    if not -90 <= settings.pitch <= 90:
        raise UserError(f"views.pitch: expected -90..90 degrees, found {settings.pitch}")
    yaws = _ring(settings)
    projections: list[Projection] = [Gnomonic(yaw, settings.pitch, settings.fov) for yaw in yaws]
    if settings.global_view:
        projections.append(Window(0, 0, 360, 180))
    return Layout(tuple(projections), _all_round(len(yaws)))


def _cubemap(settings: config.Views) -> Layout:
    """Front, right, back, left, up, down; wider than 90 degrees, the faces overlap."""
    if not 90 <= settings.fov < 180:
        raise UserError(f"views.fov: a cubemap needs 90 <= fov < 180, found {settings.fov}")
    ring = [Gnomonic(yaw, 0, settings.fov) for yaw in (0, 90, 180, 270)]
    caps = [Gnomonic(0, 90, settings.fov), Gnomonic(0, -90, settings.fov)]
    edges = [(side, cap) for cap in (4, 5) for side in range(4)]
    return Layout((*ring, *caps), (*_all_round(4), *edges))


def _sliding_window(settings: config.Views) -> Layout:
    """Columns of the panorama, `fov` wide and of full height, in a ring."""
    yaws = _ring(settings)
    windows = tuple(Window(yaw, 0, settings.fov, 180) for yaw in yaws)
    return Layout(windows, _all_round(len(yaws)))


def _resize(settings: config.Views) -> Layout:
    """The whole panorama as one picture."""
    return Layout((Window(0, 0, 360, 180),), ())


STRATEGIES = {
    "e2p": _e2p,
    "cubemap": _cubemap,
    "sliding_window": _sliding_window,
    "resize": _resize,
}


def _ring(settings: config.Views) -> list[float]:
    """Yaws, in degrees, of views that go round the horizon in equal strides."""
    if not 0 < settings.fov <= 360:
        raise UserError(f"views.fov: expected 0 < fov <= 360 degrees, found {settings.fov}")
    if not 0 <= settings.overlap < 1:
        raise UserError(f"views.overlap: expected 0 <= overlap < 1, found {settings.overlap}")
    stride = settings.fov * (1 - settings.overlap)
    count = round(360 / stride)
    if abs(count * stride - 360) > 1e-6 * 360:
        count = max(count, math.ceil(360 / settings.fov))  # fewer would leave gaps
        raise UserError(
            f"views.fov {settings.fov:g} with views.overlap {settings.overlap:g} makes strides of "
            f"{stride:g} degrees, which don't divide 360; "
            f"for {count} views set views.overlap to {1 - 360 / (count * settings.fov):.9g}"
        )
    return [index * 360 / count for index in range(count)]


def _all_round(count: int) -> tuple[tuple[int, int], ...]:
    return tuple((i, (i + 1) % count) for i in range(count)) if count > 1 else ()


def token_rays(layout: Layout, centers: Array) -> Array:
    """Rays of tokens (or pixels) whose centers are at these fractions of a view's side, across and
    down: (views, len(centers), len(centers), 3)."""
    return np.stack([projection.rays(centers, centers) for projection in layout.projections])


class Sampler:
    """Samples all views of a panorama, with maps made once per panorama size. Threads may share
    one. `size` is the views' side in pixels."""

    def __init__(self, layout: Layout, size: int) -> None:
        self.layout, self.size = layout, size
        rays = token_rays(layout, cell_centers(size))
        self.panorama_width = _least_width(rays)
        self._position = panorama_position(rays)
        self.until = float(self._position[..., 1].max())  # share of the height that is looked at
        # Photos come in many sizes: a limit keeps the maps of all of them from filling the memory.
        self._maps = functools.lru_cache(maxsize=16)(self._make_maps)

    def sample(self, panorama: NDArray) -> NDArray:
        """(height, width, 3) uint8 or float32 -> (views, size, size, 3) of that type, bilinear."""
        points, fractions = self._maps(*panorama.shape[:2])
        padded = _pad(panorama)
        views = np.empty((*points.shape[:3], 3), panorama.dtype)
        for view, point, fraction in zip(views, points, fractions, strict=True):
            cv2.remap(padded, point, fraction, cv2.INTER_LINEAR, dst=view)
        return views

    def _make_maps(self, height: int, width: int) -> tuple[NDArray, NDArray]:
        """Fixed-point maps into the padded panorama: int16 (views, size, size, 2), whole pixels,
        and uint16 (views, size, size), 1/32 pixels as an index of OpenCV's table of weights."""
        # The center of the first pixel is at 0.5 of the panorama, and at 1 of the padded one.
        x = (self._position[..., 0] * width + 0.5).astype(np.float32)
        y = (self._position[..., 1] * height + 0.5).astype(np.float32)
        flat = (-1, self.size)
        points, fractions = cv2.convertMaps(x.reshape(flat), y.reshape(flat), cv2.CV_16SC2)
        return points.reshape(*x.shape, 2), fractions.reshape(x.shape)


def _least_width(rays: Array) -> int:
    """The smallest width at which a panorama should be decoded.

    Views come out closest to their supersampled selves where the panorama's pixels are as fine as
    the finest along the views' middle rows and columns. A decoder halves; of two neighboring
    sizes, the nearer by ratio is better, which is the smaller one down to 1/sqrt(2)."""
    middle = rays.shape[1] // 2
    lines = rays[:, middle], rays[:, :, middle]
    steps = [np.linalg.norm(np.diff(line, axis=1), axis=-1).min(initial=np.pi) for line in lines]
    return math.ceil(2 * np.pi / min(steps) / math.sqrt(2))


def _pad(panorama: NDArray) -> NDArray:
    """One pixel more on each side, as the sphere goes on there: round the seam, and over the
    poles to the opposite meridian."""
    height, width = panorama.shape[:2]
    padded = np.empty((height + 2, width + 2, 3), panorama.dtype)
    padded[1:-1, 1:-1] = panorama
    padded[0, 1:-1] = np.roll(panorama[0], width // 2, axis=0)
    padded[-1, 1:-1] = np.roll(panorama[-1], width // 2, axis=0)
    padded[:, 0], padded[:, -1] = padded[:, -2], padded[:, 1]
    return padded
