"""Signs that a 2:1 picture is no complete, upright, equirectangular panorama. None is certain:
`check` reports them for a person to look at."""

from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from panollava.data.picture_files import number

# What pictures with a sign may be, and what to do.
SIGNS = {
    "stereo": "may be stereo pairs; take one eye with: panollava convert --eye left",
    "fisheye": "may be raw fisheye circles; stitch them with the camera's program",
    "part": "may be parts of a panorama, or no panoramas; use whole ones",
    "projection": "may not be equirectangular; export them as equirectangular",
    "tags": "have GPano tags of another picture; look whether they are whole",
    "tilt": "may be tilted; viewers disagree on the signs: panollava convert --level metadata",
    "black": "are black",
    "one color": "are of one color",
}
_HEIGHT = 128  # to look for circles at
_MAX_SHIFT = 3  # columns between the two eyes of a stereo pair, of 128
_ALIKE = 0.15  # of the halves' variance; panoramas: 0.4 to 3
_DARK, _CONTRAST = 30, 20  # gray values of 255
_MIN_STEP, _STEP_RATIO = 15, 2  # of gray values at the edges; panoramas: at most 0.7 in ratio
_UNEVEN, _VERY_UNEVEN = 20, 35  # standard deviation along a pole's row; panoramas: 1 to 20
Array = NDArray[np.float32]


def find_signs(panorama: NDArray[np.uint8], tags: dict[str, str]) -> dict[str, str]:
    """Each sign (a key of SIGNS) with how it was seen, in a decoded picture and its GPano tags."""
    return dict([*_in_tags(tags), *_in_pixels(panorama)])


def _in_tags(tags: dict[str, str]) -> Iterator[tuple[str, str]]:
    projection = tags.get("ProjectionType", "")
    if projection and projection.lower() != "equirectangular":
        yield "projection", f"GPano:ProjectionType is {projection[:40]}"
    angles = {name: number(tags, name) for name in ("PosePitchDegrees", "PoseRollDegrees")}
    if any(abs(angle) > 0 for angle in angles.values()):
        yield "tilt", ", ".join(f"GPano:{name} is {a:g}" for name, a in angles.items() if a)
    part = [number(tags, f"CroppedAreaImage{side}Pixels") for side in ("Width", "Height")]
    if abs(part[0] - 2 * part[1]) > 0.04 * part[1]:
        yield "tags", f"they are of a part of {part[0]:g} x {part[1]:g} pixels"


def _in_pixels(panorama: NDArray[np.uint8]) -> Iterator[tuple[str, str]]:
    small = cv2.resize(panorama, (2 * _HEIGHT, _HEIGHT), interpolation=cv2.INTER_AREA)
    gray = small.mean(axis=-1, dtype=np.float32)
    if gray.max() < _DARK:
        yield "black", f"no pixel is brighter than {gray.max():.0f} of 255"
        return
    if gray.std() < 1:
        yield "one color", f"its pixels differ by {np.ptp(gray):.0f} of 255"
        return
    coarse = cv2.resize(gray, (_HEIGHT, _HEIGHT // 2), interpolation=cv2.INTER_AREA)
    if _has_circles(gray):
        yield "fisheye", "it is black around two circles"
    elif _are_alike(*np.split(coarse, 2, axis=1)):
        yield "stereo", "its left and right halves are alike"
    elif _are_alike(*np.split(coarse, 2)):
        yield "stereo", "its upper and lower halves are alike"
    elif seen := _edges(panorama.astype(np.float32)):
        yield "part", seen


def _are_alike(one: Array, other: Array) -> bool:
    """Whether two halves differ by little of what varies in both directions in them, so that a
    sky above every ground is not taken for likeness. The eyes of a stereo pair see near things
    some columns apart."""
    for shift in range(-_MAX_SHIFT, _MAX_SHIFT + 1):
        width = one.shape[1] - abs(shift)
        a, b = one[:, max(shift, 0) :][:, :width], other[:, max(-shift, 0) :][:, :width]
        variance = sum(min(half.var(axis=0).mean(), half.var(axis=1).mean()) for half in (a, b))
        if np.square(a - b).mean() < _ALIKE * variance:
            return True
    return False


def _has_circles(gray: Array) -> bool:
    """Black corners around a circle in each half, in rows where the circles are not black."""
    center = (_HEIGHT - 1) / 2
    away = np.abs(np.arange(_HEIGHT) - center)
    radius: Array = np.tile(np.hypot(away[:, None], away) / (_HEIGHT / 2), 2)
    outside = radius > 1.15
    inside = (radius < 0.9) & outside.any(axis=1, keepdims=True)
    around, within = gray[outside], gray[inside]
    return bool(np.quantile(around, 0.95) < _DARK and within.mean() > around.mean() + _CONTRAST)


def _edges(panorama: Array) -> str | None:
    """How the picture's edges differ from a panorama's: left and right they are neighbors, and at
    the top and at the bottom one point each."""
    steps = np.abs(np.diff(panorama, axis=1)).mean(axis=(0, 2))
    usual = np.quantile(steps, 0.98, method="higher")
    step = np.abs(panorama[:, 0] - panorama[:, -1]).mean()
    uneven = panorama[[0, -1]].std(axis=1).mean(axis=1).max()
    if step > max(_MIN_STEP, _STEP_RATIO * usual) and uneven > _UNEVEN:
        return f"its left and right edges differ by {step:.0f} of 255"
    if uneven > _VERY_UNEVEN:
        return f"its top or bottom row, a pole, varies by {uneven:.0f} of 255"
    return None
