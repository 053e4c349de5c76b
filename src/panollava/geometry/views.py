"""The views of a panorama: their directions, which of them are neighbors, and sampling them.
How neighbors overlap is computed in `overlap`."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from panollava import config
from panollava.errors import UserError
from panollava.geometry.projections import (
    PANORAMA,
    Gnomonic,
    Projection,
    Window,
    panorama_position,
)
from panollava.geometry.sphere import Array, cell_centers


@dataclass(frozen=True)
class Layout:
    """Views in order, and the index pairs of neighboring views, each pair once."""

    projections: tuple[Projection, ...]
    neighbors: tuple[tuple[int, int], ...]


def layout(settings: config.Views) -> Layout:
    """The views of a strategy. Raises UserError for settings that do not fit together."""
    if settings.strategy != "e2p":
        for name, unset in (("global_view", "false"), ("pitch", "0")):
            if getattr(settings, name):
                raise UserError(
                    f"views.{name} is only for strategy e2p, but views.strategy is "
                    f"'{settings.strategy}'; set views.{name} to {unset}"
                )
    return STRATEGIES[settings.strategy](settings)


def _e2p(settings: config.Views) -> Layout:
    """Gnomonic views in a ring, optionally followed by one of the whole panorama."""
    if settings.fov >= 180:
        raise UserError(f"views.fov: strategy e2p needs fov < 180, found {settings.fov:g}")
    yaws = _ring(settings)
    ring = [Gnomonic(yaw, settings.pitch, settings.fov) for yaw in yaws]
    global_view = [PANORAMA] if settings.global_view else []
    return Layout((*ring, *global_view), _ring_pairs(len(yaws)))


def _cubemap(settings: config.Views) -> Layout:
    """Front, right, back, left, up, down. Faces wider than 90 degrees overlap."""
    if not 90 <= settings.fov < 180:
        raise UserError(
            f"views.fov: strategy cubemap needs 90 <= fov < 180, found {settings.fov:g}"
        )
    ring = [Gnomonic(yaw, 0, settings.fov) for yaw in (0, 90, 180, 270)]
    caps = [Gnomonic(0, 90, settings.fov), Gnomonic(0, -90, settings.fov)]
    edges = [(side, cap) for cap in (4, 5) for side in range(4)]
    return Layout((*ring, *caps), (*_ring_pairs(4), *edges))


def _sliding_window(settings: config.Views) -> Layout:
    """Vertical strips of the panorama, `fov` wide and of full height, in a ring."""
    yaws = _ring(settings)
    windows = tuple(Window(yaw, 0, settings.fov, 180) for yaw in yaws)
    return Layout(windows, _ring_pairs(len(yaws)))


def _resize(settings: config.Views) -> Layout:
    """One view: the whole panorama."""
    return Layout((PANORAMA,), ())


STRATEGIES = {
    "e2p": _e2p,
    "cubemap": _cubemap,
    "sliding_window": _sliding_window,
    "resize": _resize,
}


def _ring(settings: config.Views) -> list[float]:
    """Yaws, in degrees, of views around the horizon in equal strides."""
    stride = settings.fov * (1 - settings.overlap)
    count = round(360 / stride)
    if abs(count * stride - 360) > 1e-6 * 360:
        count = max(count, math.ceil(360 / settings.fov))  # fewer would leave gaps
        raise UserError(
            f"views.fov {settings.fov:g} with views.overlap {settings.overlap:g} gives strides of "
            f"{stride:g} degrees, which do not divide 360; "
            f"for {count} views set views.overlap to {1 - 360 / (count * settings.fov):.9g}"
        )
    return [index * 360 / count for index in range(count)]


def _ring_pairs(count: int) -> tuple[tuple[int, int], ...]:
    """Each view and the next one, the last and the first included."""
    pairs = count if count > 2 else count - 1  # of two views, each is next to the other only once
    return tuple((i, (i + 1) % count) for i in range(pairs))


def forms_ring(settings: config.Views) -> bool:
    """Whether the views are one ring of equal strides, so that a roll of the panorama by a stride
    shows the same pixels in the next view each."""
    return settings.strategy in ("e2p", "sliding_window") and not settings.global_view


def view_shift(settings: config.Views, degrees: float) -> int | None:
    """By how many places `np.roll` has to move the views to give those of the panorama rolled by
    `degrees` to the right. None: they show other pixels."""
    if not forms_ring(settings):
        return None
    count = len(layout(settings).projections)
    strides = degrees * count / 360
    return round(strides) % count if abs(strides - round(strides)) < 1e-6 else None


def resampled(settings: config.Views, rolls: Sequence[float]) -> list[float]:
    """Those of `rolls`, in degrees, that do not only reorder the views."""
    return [degrees for degrees in rolls if view_shift(settings, degrees) is None]


def token_centers(patch: int, size: int, pool: int = 1) -> Array:
    """Centers of the tokens along the side of a view of `size` pixels, pooled pool x pool, as
    fractions of the side from its left or upper end. Patches that do not fill the view leave a
    margin at the other end, and the last token may cover fewer patches."""
    patches = size // patch
    first = np.arange(0, patches, pool)
    last = np.minimum(first + pool, patches)
    return (first + last) / 2 / (size / patch)


def token_rays(layout: Layout, centers: Array) -> Array:
    """Rays of tokens (or pixels) with these centers, as fractions of a view's side, in x and y:
    (views, len(centers), len(centers), 3)."""
    return np.stack([projection.rays(centers, centers) for projection in layout.projections])


class Sampler:
    """Samples all views of a panorama, with maps cached per panorama size. Thread-safe. `size` is
    the views' side in pixels."""

    def __init__(self, layout: Layout, size: int) -> None:
        self.layout, self.size = layout, size
        rays = token_rays(layout, cell_centers(size))
        self.panorama_width = _decode_width(rays)
        self.position = panorama_position(rays)  # (views, size, size, 2)
        # Photos come in many sizes: without a limit, their maps would fill the memory.
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
        x = (self.position[..., 0] * width + 0.5).astype(np.float32)
        y = (self.position[..., 1] * height + 0.5).astype(np.float32)
        flat = (-1, self.size)
        points, fractions = cv2.convertMaps(x.reshape(flat), y.reshape(flat), cv2.CV_16SC2)
        return points.reshape(*x.shape, 2), fractions.reshape(x.shape)


def _decode_width(rays: Array) -> int:
    """The smallest width, in pixels, to decode a panorama at.

    Views are closest to supersampled ones where the panorama's pixels are as fine as the finest
    along the views' middle rows and columns. A decoder scales by powers of 2. Of two sizes, the
    nearer by ratio is better: the smaller one, if it is at least 1/sqrt(2) of that width."""
    middle = rays.shape[1] // 2
    lines = rays[:, middle], rays[:, :, middle]
    steps = [np.linalg.norm(np.diff(line, axis=1), axis=-1).min(initial=np.pi) for line in lines]
    return math.ceil(2 * np.pi / min(steps) / math.sqrt(2))


def _pad(panorama: NDArray) -> NDArray:
    """Add one pixel on each side, with what the sphere has there: across the seam, and over the
    poles on the opposite meridian."""
    padded = np.pad(panorama, ((1, 1), (1, 1), (0, 0)), mode="wrap")
    width = panorama.shape[1]
    opposite = (np.arange(-1, width + 1) - width // 2) % width + 1
    padded[0], padded[-1] = padded[1, opposite], padded[-2, opposite]
    return padded
