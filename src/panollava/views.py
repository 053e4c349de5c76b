"""The views of a panorama: which way they look, which are neighbours, and how they are sampled."""

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from panollava import config
from panollava.errors import UserError
from panollava.sphere import Array, Gnomonic, Projection, Window, panorama_position


@dataclass(frozen=True)
class Layout:
    """Views in order, and the pairs of neighbours that see the same directions."""

    projections: tuple[Projection, ...]
    neighbours: tuple[tuple[int, int], ...]


def layout(settings: config.Views) -> Layout:
    """Raises UserError for an unknown strategy or values that it can't use."""
    if settings.strategy not in STRATEGIES:
        raise UserError(
            f"views.strategy: unknown strategy '{settings.strategy}'; "
            f"known are {', '.join(STRATEGIES)}"
        )
    if settings.size < 1:
        raise UserError(f"views.size: expected a positive number of pixels, found {settings.size}")
    if settings.global_view and settings.strategy != "e2p":
        raise UserError(
            f"views.global_view is for strategy e2p alone, found '{settings.strategy}'; "
            "set it to false"
        )
    return STRATEGIES[settings.strategy](settings)


def _e2p(settings: config.Views) -> Layout:
    """Gnomonic views around the horizon, and one of the whole panorama if asked for."""
    if not 0 < settings.fov < 180:
        raise UserError(f"views.fov: a perspective view needs 0 < fov < 180, found {settings.fov}")
    if not -90 <= settings.pitch <= 90:
        raise UserError(f"views.pitch: expected -90..90 degrees, found {settings.pitch}")
    yaws = _ring(settings)
    projections: list[Projection] = [Gnomonic(yaw, settings.pitch, settings.fov) for yaw in yaws]
    if settings.global_view:
        projections.append(Window(0, 0, 360, 180))
    return Layout(tuple(projections), _all_round(len(yaws)))


def _sliding_window(settings: config.Views) -> Layout:
    """Columns of the panorama, `fov` wide and of full height."""
    yaws = _ring(settings)
    windows = tuple(Window(yaw, 0, settings.fov, 180) for yaw in yaws)
    return Layout(windows, _all_round(len(yaws)))


def _cubemap(settings: config.Views) -> Layout:
    """Front, right, back, left, up, down; wider than 90 degrees, the faces overlap."""
    if not 90 <= settings.fov < 180:
        raise UserError(f"views.fov: a cubemap needs 90 <= fov < 180, found {settings.fov}")
    ring = [Gnomonic(yaw, 0, settings.fov) for yaw in (0, 90, 180, 270)]
    caps = [Gnomonic(0, 90, settings.fov), Gnomonic(0, -90, settings.fov)]
    edges = [(side, cap) for cap in (4, 5) for side in range(4)]
    return Layout((*ring, *caps), (*_all_round(4), *edges))


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
    """Yaws of views that go round the horizon in equal strides."""
    if not 0 <= settings.overlap < 1:
        raise UserError(f"views.overlap: expected 0 <= overlap < 1, found {settings.overlap}")
    if not 0 < settings.fov <= 360:
        raise UserError(f"views.fov: expected 0 < fov <= 360 degrees, found {settings.fov}")
    stride = settings.fov * (1 - settings.overlap)
    count = round(360 / stride)
    if count < 1 or abs(count * stride - 360) > 1e-6 * 360:
        near = 1 - 360 / (max(count, 1) * settings.fov)
        raise UserError(
            f"views.fov {settings.fov} with overlap {settings.overlap} makes strides of "
            f"{stride:g} degrees, which don't divide 360; "
            f"for {max(count, 1)} views set views.overlap to {near:g}"
        )
    return [index * 360 / count for index in range(count)]


def _all_round(count: int) -> tuple[tuple[int, int], ...]:
    return tuple((i, (i + 1) % count) for i in range(count)) if count > 1 else ()


def token_rays(layout: Layout, grid: int) -> Array:
    """Rays of the tokens' centres: (views, grid, grid, 3)."""
    return np.stack([projection.rays(grid, grid) for projection in layout.projections])


@dataclass
class Sampler:
    """Samples all views of a panorama at once, with maps made once per panorama size."""

    layout: Layout
    size: int
    _maps: dict[tuple[int, int], tuple[NDArray, NDArray]] = field(default_factory=dict)

    @property
    def panorama_width(self) -> int:
        """The smallest width of a panorama that has a pixel for every pixel of the views."""
        rays = token_rays(self.layout, self.size)
        middle = rays[:, self.size // 2]
        step = np.linalg.norm(np.diff(middle, axis=1), axis=-1).min(initial=np.inf)
        return int(np.ceil(2 * np.pi / step)) if np.isfinite(step) else self.size

    def sample(self, panorama: NDArray) -> NDArray:
        """(height, width, 3), uint8 or float32 -> (views, size, size, 3), bilinear."""
        height, width = panorama.shape[:2]
        if (height, width) not in self._maps:
            self._maps[height, width] = self._make_maps(height, width)
        # One column more on each side makes the seam a place like any other.
        wrapped = cv2.copyMakeBorder(panorama, 0, 0, 1, 1, cv2.BORDER_WRAP)
        views = cv2.remap(
            wrapped,
            *self._maps[height, width],
            interpolation=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        return views.reshape(-1, self.size, self.size, 3)

    def _make_maps(self, height: int, width: int) -> tuple[NDArray, NDArray]:
        """Fixed-point maps of all views, one above the other."""
        position = panorama_position(token_rays(self.layout, self.size))
        x = (position[..., 0] * width + 0.5).astype(np.float32)
        y = (position[..., 1] * height - 0.5).astype(np.float32)
        flat = (-1, self.size)
        return cv2.convertMaps(x.reshape(flat), y.reshape(flat), cv2.CV_16SC2)
