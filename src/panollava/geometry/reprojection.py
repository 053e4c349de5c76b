"""Reprojection: pictures of the sphere, tilted panoramas or the faces of a cube, to an upright
equirectangular panorama."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from panollava.geometry.projections import PANORAMA, Gnomonic, Projection, panorama_position
from panollava.geometry.sphere import cell_centers, rotation

# The faces of a cube, by letter. The lower edge of the upper face and the upper edge of the lower
# face are at the front.
CUBE = {
    **{"f": Gnomonic(0, 0, 90), "r": Gnomonic(90, 0, 90), "b": Gnomonic(180, 0, 90)},
    **{"l": Gnomonic(-90, 0, 90), "u": Gnomonic(0, 90, 90), "d": Gnomonic(0, -90, 90)},
}
CROSSES = (  # an upper-case letter: the face is stored upside down
    (".u..", "lfrb", ".d.."),
    (".u.", "lfr", ".d.", ".B."),
)
MAX_SIDE = 32_000  # OpenCV addresses pixels with 16 bits
_TILE = 64  # rows and columns that are sampled together
_MINIFIED = 1.3  # source pixels per pixel from which two samples are averaged
_CACHED_PIXELS = 1 << 26  # maps of larger panoramas are computed again for each: 6 bytes a pixel
Array = NDArray[Any]  # float32, except for the views' rays
Map = tuple[NDArray[Any], NDArray[Any]]


class Face(NamedTuple):
    """A projection and where a picture shows it, in pixels."""

    projection: Projection
    left: int
    top: int
    width: int
    height: int
    is_upside_down: bool = False


def cube_faces(rows: Sequence[str], side: int) -> tuple[Face, ...]:
    """The faces of a picture of squares in rows, such as `CROSSES`. `side`: of a square."""
    return tuple(
        Face(CUBE[letter.lower()], column * side, row * side, side, side, letter.isupper())
        for row, letters in enumerate(rows)
        for column, letter in enumerate(letters)
        if letter != "."
    )


class Reprojection:
    """Samples a panorama of `height` x `width` pixels. `faces`: the whole sphere, by one panorama
    or the faces of a cube. `angles`: yaw, pitch and roll of the camera, see `rotation`. Maps are
    cached. Thread-safe."""

    def __init__(
        self, faces: tuple[Face, ...], angles: tuple[float, float, float], height: int, width: int
    ) -> None:
        self.faces, self.height, self.width = faces, height, width
        self._rotation = rotation(*angles).astype(np.float32)
        self._x: Array = cell_centers(width).astype(np.float32)
        self._y: Array = cell_centers(height).astype(np.float32)
        if height * width <= _CACHED_PIXELS:
            self._maps = functools.cache(self._maps)  # type: ignore[method-assign]

    def sample(self, picture: NDArray) -> NDArray:
        """(picture's height, width, 3) uint8 or float32 -> (height, width, 3) of that type.
        Bilinear; where the picture is finer than the panorama, the mean of two samples."""
        panorama = np.empty((self.height, self.width, 3), picture.dtype)
        for top in range(0, self.height, _TILE):
            rows = panorama[top : top + _TILE]
            first, seconds = self._maps(top)
            _remap(picture, first, rows)
            for columns, second in seconds:
                tiles = np.ascontiguousarray(rows[:, columns])
                other = _remap(picture, second, np.empty_like(tiles))
                rows[:, columns] = cv2.addWeighted(tiles, 0.5, other, 0.5, 0)
        return panorama

    def _maps(self, top: int) -> tuple[Map, list[tuple[slice, Map]]]:
        """Fixed-point maps into the picture of a row of tiles, and of the second samples."""
        points = self._points(top, slice(None))
        seconds = []
        for columns in self._minified(points):
            # Two points of a pixel, on its diagonal.
            points[:, columns] = self._points(top, columns, -0.25)
            seconds.append((columns, _fixed(self._points(top, columns, 0.25))))
        return _fixed(points), seconds

    def _points(self, top: int, columns: slice, shift: float = 0) -> Array:
        """Where pixels, shifted by a part of a pixel, are in the picture: (rows, columns, 2)."""
        x: Array = self._x[columns] + np.float32(shift / self.width)
        y: Array = self._y[top : top + _TILE] + np.float32(shift / self.height)
        rays = PANORAMA.rays(x, y) @ self._rotation
        if len(self.faces) == 1:  # a panorama: it continues beyond its left and right edges
            (face,) = self.faces
            return _in_picture(face, rays, wraps=True)
        centers = [face.projection.rays(*np.full((2, 1), 0.5)).ravel() for face in self.faces]
        nearest = np.argmax(rays @ np.stack(centers, axis=1).astype(rays.dtype), axis=-1)
        points = np.empty((*rays.shape[:-1], 2), np.float32)
        for index, face in enumerate(self.faces):
            if (inside := nearest == index).any():
                points[inside] = _in_picture(face, rays[inside])
        return points

    def _minified(self, points: Array) -> Iterator[slice]:
        """The columns of tiles whose pixels are further apart in the picture than its own."""
        some, right, down = points[:-1:8, :-1:8], points[:-1:8, 1::8], points[1::8, :-1:8]
        steps = np.maximum(*(np.linalg.norm(next - some, axis=-1) for next in (right, down)))
        starts = range(0, self.width, _TILE)
        is_fine = [
            bool(part.size) and bool(np.median(part) > _MINIFIED)
            for part in np.split(steps, [start // 8 for start in starts[1:]], axis=1)
        ]
        for fine, group in itertools.groupby(zip(starts, is_fine, strict=True), key=lambda t: t[1]):
            if fine:
                tiles = [start for start, _ in group]
                yield slice(tiles[0], tiles[-1] + _TILE)


def _in_picture(face: Face, rays: Array, wraps: bool = False) -> Array:
    """Rays (..., 3) -> pixels (x, y) of the picture, (..., 2) float32, (0, 0) being the center of
    its first pixel."""
    if face.projection == PANORAMA:
        position = panorama_position(rays)
    else:
        position, _ = face.projection.position(rays)
    if face.is_upside_down:
        position = 1 - position
    points: Array = (position * (face.width, face.height) - 0.5).astype(np.float32)
    # The nearest pixel of the same face, for the outer half of the pixels at its edges.
    points[..., 1] = points[..., 1].clip(0, face.height - 1) + face.top
    if not wraps:
        points[..., 0] = points[..., 0].clip(0, face.width - 1)
    points[..., 0] += face.left
    return points


def _fixed(points: Array) -> Map:
    x, y = (np.ascontiguousarray(points[..., axis]) for axis in (0, 1))
    return cv2.convertMaps(x, y, cv2.CV_16SC2)


def _remap(picture: NDArray, at: Map, out: NDArray) -> NDArray:
    return cv2.remap(picture, *at, cv2.INTER_LINEAR, dst=out, borderMode=cv2.BORDER_WRAP)
