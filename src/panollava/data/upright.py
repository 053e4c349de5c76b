"""Makes an upright 2:1 panorama of a decoded picture: a part of the sphere, a stereo pair, the
faces of a cube, or a tilted panorama."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from panollava.data.images import Picture
from panollava.data.picture_files import (
    IN_MEMORY,
    MAX_PIXELS,
    CroppedArea,
    PictureError,
    cropped_area,
    is_2_to_1,
    is_alike,
    number,
)
from panollava.data.picture_suspicions import find_signs
from panollava.geometry.projections import PANORAMA
from panollava.geometry.reprojection import (
    CROSSES,
    MAX_SIDE,
    Face,
    Reprojection,
    cube_faces,
)

STEREO = ("top-bottom", "side-by-side", "vr180")
LAYOUTS = ("panorama", *STEREO, "cross", "strip", "faces")
_FACE_ORDER = "rlu", "dfb"  # six files in one picture
_POSE = {"PosePitchDegrees": "pitch", "PoseRollDegrees": "roll"}
_OTHER_LAYOUTS = (
    "stereo pairs need --eye, cube faces --layout; fisheye circles must be stitched first"
)
_EYES = {"top-bottom": 1.0, "side-by-side": 4.0}  # by ratio of the pair; 2:1 may be any
_STEREO_RATIOS = {"top-bottom": (1, 2), "side-by-side": (4, 2), "vr180": (2,)}
Pixels = NDArray[np.uint8]  # (height, width, 3)
Angles = tuple[float, float, float]  # yaw, pitch, roll in degrees


@dataclass(frozen=True)
class Conversion:
    """What is done to every picture. `faces`: the order of a strip's faces by rows, letters of
    `reprojection.CUBE`; upper case: upside down. `angles`: yaw, pitch and roll of the camera;
    None: those of the GPano tags. `form`: of the files, jpg or png."""

    layout: str = "panorama"
    eye: str | None = None
    faces: str = ""
    angles: Angles | None = (0.0, 0.0, 0.0)
    form: str = "jpg"


class Upright(NamedTuple):
    panorama: Pixels
    pose: dict[str, str]  # GPano tags of the panorama's pose
    notes: list[str]  # what was done


def make_upright(pictures: Sequence[Picture], conversion: Conversion) -> Upright:
    """`pictures`: one, or six faces in the order of `face_letters`.

    Raises:
        PictureError: the picture is of another layout, a raw fisheye photo, or too large.
    """
    pixels, tags = pictures[0].pixels, pictures[0].gpano
    faces: tuple[Face, ...] = ()
    notes = []
    if conversion.layout in ("cross", "strip", "faces"):
        if conversion.layout == "faces":
            pixels = _in_one(pictures)
        faces = _cube(pixels, conversion)
        notes.append(f"made of six faces of {faces[0].width} pixels")
    else:
        notes += _check_signs(pixels, tags, conversion)
        if conversion.eye:
            pixels, note = _take_eye(pixels, conversion)
            notes.append(note)
        elif area := cropped_area(tags, pixels.shape[1], pixels.shape[0]):
            pixels, unseen = _place(pixels, area)
            notes.append(_unseen(unseen))
        elif not is_2_to_1(pixels.shape[1], pixels.shape[0]):
            raise PictureError(IN_MEMORY, "not 2:1", f"{_size(pixels)} pixels; {_OTHER_LAYOUTS}")
    angles, pose = _angles(tags, conversion.angles)
    if any(angles):
        names = zip(("yaw", "pitch", "roll"), angles, strict=True)
        notes.append("leveled by " + ", ".join(f"{name} {a:g}" for name, a in names if a))
    elif conversion.angles is None:
        notes.append("no tilt in its GPano tags")
    elif tilt := [f"{name} {tags[name]}" for name in _POSE if name in pose and number(tags, name)]:
        notes.append(f"still tilted ({', '.join(tilt)}); --level metadata would level it")
    return Upright(_reproject(pixels, faces, angles), pose, notes)


def face_letters() -> str:
    """The order in which `make_upright` expects six faces."""
    return "".join(_FACE_ORDER)


def _check_signs(pixels: Pixels, tags: dict[str, str], conversion: Conversion) -> list[str]:
    """Notes of signs that the picture is of another layout.

    Raises:
        PictureError: fisheye circles, or not equirectangular by its tags.
    """
    step = max(1, pixels.shape[1] // 2048)  # averaging all pixels takes a tenth of the time
    small = cv2.resize(pixels[::step, ::step], (512, 256), interpolation=cv2.INTER_AREA)
    signs = find_signs(small.astype(np.uint8, copy=False), tags)
    if "projection" in signs:
        detail = f"{signs['projection']}; export it as equirectangular"
        raise PictureError(IN_MEMORY, "not equirectangular", detail)
    if "fisheye" in signs and is_2_to_1(pixels.shape[1], pixels.shape[0]):
        detail = "stitch them with the camera's program, or with ffmpeg's filter v360=dfisheye:e"
        raise PictureError(IN_MEMORY, "raw fisheye circles", detail)
    if "stereo" in signs and not conversion.eye:
        return [f"may be a stereo pair ({signs['stereo']}); --eye takes one eye"]
    return []


def _take_eye(pixels: Pixels, conversion: Conversion) -> tuple[Pixels, str]:
    """One eye, stretched to 2:1 or, of 180 degrees, placed in the full sphere."""
    height, width = pixels.shape[:2]
    layout, ratio = conversion.layout, width / height
    if layout == "panorama":
        layout = next((form for form, r in _EYES.items() if is_alike(ratio, r)), "")
    if not any(is_alike(ratio, expected) for expected in _STEREO_RATIOS.get(layout, ())):
        detail = f"{_size(pixels)} pixels; name the pair's layout: --layout {', '.join(STEREO)}"
        raise PictureError(IN_MEMORY, "not clearly a stereo pair", detail)
    halves = np.array_split(pixels, 2, axis=0 if layout == "top-bottom" else 1)
    eye = np.ascontiguousarray(halves[0 if conversion.eye == "left" else 1])
    note = f"{conversion.eye} eye of a {layout} pair"
    if layout != "vr180":
        return eye, note
    side = eye.shape[0]
    panorama, unseen = _place(eye, CroppedArea(2 * side, side, side / 2, 0))
    return panorama, f"{note}, {_unseen(unseen)}"


def _unseen(share: float) -> str:
    return f"placed in the full sphere, {share:.1%} of which nobody saw: black"


def _place(pixels: Pixels, area: CroppedArea) -> tuple[Pixels, float]:
    """The full sphere, black where the picture does not show it, and the share of that.

    Raises:
        PictureError: it does not fit.
    """
    if area.full_width > 2 * MAX_PIXELS**0.5:
        detail = f"a sphere of {area.full_width:.0f} pixels around; save the picture smaller"
        raise PictureError(IN_MEMORY, "too large", detail)
    height, width = pixels.shape[:2]
    lowest, tolerance = area.full_height - height, area.full_height / 100
    if not (
        is_2_to_1(area.full_width, area.full_height)
        and width <= area.full_width + 2 * tolerance
        and -tolerance <= area.top <= lowest + tolerance
        and abs(area.left) <= area.full_width
    ):
        numbers = " ".join(f"{name} {value:.0f}," for name, value in area._asdict().items())
        detail = f"{_size(pixels)} pixels do not fit: {numbers} correct the tags with exiftool"
        raise PictureError(IN_MEMORY, "contradictory GPano tags", detail)
    full_height = max(round(area.full_width / 2), height, math.ceil(width / 2))
    panorama = np.zeros((full_height, 2 * full_height, 3), np.uint8)
    top = min(max(round(area.top), 0), full_height - height)
    panorama[top : top + height, :width] = pixels
    # A part may continue beyond the seam.
    panorama = np.roll(panorama, round(area.left), axis=1)
    upper, lower = np.cos(np.pi * np.array([top, top + height]) / full_height)
    return panorama, float(1 - width / (2 * full_height) * (upper - lower) / 2)


def _in_one(pictures: Sequence[Picture]) -> Pixels:
    """Six faces in one picture, by `_FACE_ORDER`."""
    sizes = {_size(picture.pixels) for picture in pictures}
    height, width = pictures[0].pixels.shape[:2]
    if len(sizes) > 1 or height != width:
        detail = f"{', '.join(sorted(sizes))} pixels; save them as squares of one size"
        raise PictureError(IN_MEMORY, "cube faces of several sizes", detail)
    first, second = (
        np.concatenate([picture.pixels for picture in row], axis=1)
        for row in (pictures[:3], pictures[3:])
    )
    return np.concatenate([first, second])


def _cube(pixels: Pixels, conversion: Conversion) -> tuple[Face, ...]:
    height, width = pixels.shape[:2]
    if conversion.layout == "cross":
        arrangements = list(CROSSES)
    else:
        order = face_letters() if conversion.layout == "faces" else conversion.faces
        arrangements = [
            tuple(order[start : start + columns] for start in range(0, 6, columns))
            for columns in (6, 3, 2, 1)
        ]
    for rows in arrangements:
        side = width // len(rows[0])
        if (width, height) == (side * len(rows[0]), side * len(rows)):
            return cube_faces(rows, side)
    known = ", ".join(f"{len(rows[0])} x {len(rows)}" for rows in arrangements)
    detail = f"{width} x {height} pixels; a {conversion.layout} has {known} squares"
    raise PictureError(IN_MEMORY, f"no {conversion.layout} of cube faces", detail)


def _angles(tags: dict[str, str], angles: Angles | None) -> tuple[Angles, dict[str, str]]:
    """The angles to undo, and the GPano tags of the pose that stays."""
    kept = {name: tags[name] for name in ("PoseHeadingDegrees", *_POSE) if name in tags}
    kept = {name: value for name, value in kept.items() if math.isfinite(number(tags, name))}
    if angles is None:
        pitch, roll = (float(kept.get(name, 0)) for name in _POSE)
        return (0.0, pitch, roll), {k: v for k, v in kept.items() if k not in _POSE}
    return angles, {} if any(angles) else kept


def _reproject(pixels: Pixels, faces: tuple[Face, ...], angles: Angles) -> Pixels:
    height, width = pixels.shape[:2]
    if not faces and width == 2 * height and not any(angles):
        return pixels
    if max(height, width) > MAX_SIDE:
        detail = f"{_size(pixels)} pixels, limit {MAX_SIDE:,} each way; save it smaller"
        raise PictureError(IN_MEMORY, "too large", detail)
    if faces:
        out = 2 * faces[0].width
    else:  # an eye may be squeezed to half of its width or height
        out = height if width < 1.5 * height else round(width / 2)
        faces = (Face(PANORAMA, 0, 0, width, height),)
    return _reprojection(faces, angles, out, 2 * out).sample(pixels)


@functools.lru_cache(maxsize=2)  # 108 MB for 6000 x 3000 pixels
def _reprojection(faces: tuple[Face, ...], angles: Angles, height: int, width: int) -> Reprojection:
    return Reprojection(faces, angles, height, width)


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
