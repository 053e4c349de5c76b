"""Decodes panoramas to arrays, upright and no larger than needed, many at once, and rolls them."""

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image
from tqdm import tqdm

from panollava.data.picture_files import (
    IN_MEMORY,
    MAX_PIXELS,
    check_panorama,
    check_picture,
    exif_times,
    gpano_tags,
    open_picture,
    rgb_profile,
)
from panollava.data.picture_files import PictureError as PictureError  # for those who read pictures

_JPEG_WIDTH = 2048  # of `reduced_jpeg`, at most
_JPEG_BYTES = 1 << 19
_JPEG_QUALITIES = (85, 60, 35, 10)
_STORED_WIDTH = 1448  # of `stored_jpeg`, at least, and less than twice as much
_STORED_AS = (80, "RGB", "444")  # views differ less than at 90 with 4:2:0, which needs more bytes

Item = TypeVar("Item")
Result = TypeVar("Result")
_BACKGROUND = (0, 0, 0, 255)  # behind transparent pixels
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_END_OF_IMAGE, _START_OF_SCAN, _ADOBE = 0xD9, 0xDA, 0xEE  # JPEG markers (ITU-T T.81, table B.1)
_NOT_NEEDED = {*range(0xE0, 0xF0), 0xFE} - {_ADOBE}  # metadata and comments
_BASELINE = (0xC0, 0xC1)
_EXTRANEOUS = re.compile(rf"(\d+) extraneous bytes before marker 0x{_END_OF_IMAGE:x}")
_READ_AHEAD = 16  # bytes that a JPEG decoder may have taken from behind the last pixel


def read_panorama(
    picture: Path | bytes, width: int, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Decode an image file, or what a file contains, at the smallest scale that is at least `width`
    wide, or at full size if the picture is narrower: uint8 (height, width, 3), upright according
    to its EXIF orientation. Transparent pixels become black; color profiles are not applied.

    `max_pixels` of the full size are checked before any pixel is decoded.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size. The rest of the scale, or all of it for other
    formats, is box-averaged. A scale that does not divide the width stretches the panorama by less
    than one of its pixels.

    Raises:
        PictureError: missing, unreadable, broken, cut off, too large, or no complete panorama.
    """
    path = IN_MEMORY if isinstance(picture, bytes) else picture
    with open_picture(picture) as (opened, content):
        orientation = check_panorama(path, opened, max_pixels)
        return _decode(opened, content, orientation, width)


class Picture(NamedTuple):
    """A decoded picture and what its file says of it."""

    pixels: NDArray[np.uint8]  # (height, width, 3), upright
    gpano: dict[str, str]
    times: Image.Exif  # of its EXIF, only when it was taken
    profile: bytes | None  # of RGB colors


def read_picture(path: Path) -> Picture:
    """Decode any picture at full size, like `read_panorama`.

    Raises:
        PictureError: missing, unreadable, broken, cut off or too large.
    """
    with open_picture(path) as (opened, content):
        orientation = check_picture(path, opened)
        # Decoding clears the EXIF of TIFF.
        gpano, times, profile = gpano_tags(opened), exif_times(opened), rgb_profile(opened)
        return Picture(_decode(opened, content, orientation, MAX_PIXELS), gpano, times, profile)


def read_gpano_tags(picture: Path | bytes) -> dict[str, str]:
    """Google's photo sphere tags of a picture. Raises PictureError if it cannot be read."""
    with open_picture(picture) as (opened, _):
        return gpano_tags(opened)


def convert_panorama(picture: Image.Image, width: int) -> NDArray[np.uint8]:
    """Like `read_panorama`, for a picture in memory, which stays as it is."""
    picture.load()  # Pillow turns TIFF in this
    orientation = check_panorama(IN_MEMORY, picture)
    return _finish(_to_rgb(picture), orientation, width)


def roll(panorama: NDArray, degrees: float) -> NDArray:
    """Rotate a panorama about the vertical axis, by whole pixels: its front moves to yaw
    `degrees`, which is to the right."""
    columns = round(degrees / 360 * panorama.shape[1])
    return np.roll(panorama, columns, axis=1) if columns else panorama


def reduced_jpeg(panorama: NDArray[np.uint8]) -> bytes:
    """A JPEG to look at, of (height, width, 3): at most 2048 pixels wide, and of a quality that
    needs at most 512 KiB. Equal pixels give equal bytes."""
    width = min(panorama.shape[1], _JPEG_WIDTH)
    if width < panorama.shape[1]:
        panorama = np.asarray(Image.fromarray(panorama).resize((width, width // 2), reducing_gap=2))
    for quality in _JPEG_QUALITIES:
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(panorama), quality, "RGB", "420")
        if len(jpeg) <= _JPEG_BYTES:
            break
    return jpeg


def stored_jpeg(path: Path, width: int) -> bytes:
    """A panorama as a JPEG to decode again: about 2048 pixels wide, and not below `width`. It has
    one of the scales that a decoder gives, so that no other step blurs it.

    Raises:
        PictureError: see `read_panorama`.
    """
    panorama = np.ascontiguousarray(read_panorama(path, max(width, _STORED_WIDTH)))
    return simplejpeg.encode_jpeg(panorama, *_STORED_AS)


def map_pictures(
    function: Callable[[Item], Result], pictures: Sequence[Item], threads: int, title: str
) -> Iterator[tuple[Item, Result]]:
    """Each picture, or what stands for it, with its result, in order, with a progress bar. Threads
    compute the results only a few pictures ahead, so that memory does not grow with their number.
    """
    bar = tqdm(pictures, desc=title, delay=2, disable=None)
    with ThreadPoolExecutor(threads) as pool:
        futures = ((picture, pool.submit(function, picture)) for picture in bar)
        ahead = deque(islice(futures, 2 * threads))
        while ahead:
            picture, future = ahead.popleft()
            yield picture, future.result()
            ahead.extend(islice(futures, 1))


def _decode(opened: Image.Image, content: bytes, orientation: int, width: int) -> NDArray[np.uint8]:
    """The pixels, upright and box-averaged to at least `width`."""
    if opened.format not in ("JPEG", "MPO"):
        if opened.format == "TIFF":  # Pillow turns it, and would fail at other, odd EXIF
            exif = opened.getexif()
            exif.clear()
            exif[ExifTags.Base.Orientation], orientation = orientation, 1
        return _finish(_to_rgb(opened), orientation, width)
    opened.draft("RGB", (1, width) if orientation >= 5 else (width, 1))
    if opened.mode not in ("RGB", "L"):
        _decode_jpeg(content, opened.size, "CMYK")  # to check it
        return _finish(_to_rgb(opened), orientation, width)
    pixels = _decode_jpeg(content, opened.size, "RGB")
    if orientation == 1 and opened.width < 2 * width:
        return pixels
    return _finish(Image.fromarray(pixels), orientation, width)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        return Image.fromarray(_high_byte(picture)).convert("RGB")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        background = Image.new("RGBA", rgba.size, _BACKGROUND)
        return Image.alpha_composite(background, rgba).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _finish(rgb: Image.Image, orientation: int, width: int) -> NDArray[np.uint8]:
    """Upright, and box-averaged to at least `width`."""
    upright = rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb
    factor = upright.width // width
    return np.asarray(upright.reduce(factor) if factor > 1 else upright)


def _high_byte(picture: Image.Image) -> NDArray[np.uint8]:
    """Gray pixels of 16 bits, or 12 in TIFF, scaled to 8. Pillow would clip them."""
    pixels = np.asarray(picture)
    tags = getattr(picture, "tag_v2", {})
    (bits,) = tags.get(_BITS, (16,))
    high = (pixels >> (bits - 8)).astype(np.uint8)
    is_negative = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    return 255 - high if is_negative else high


def _decode_jpeg(jpeg: bytes, size: tuple[int, int], colors: str) -> NDArray[np.uint8]:
    """Same pixels as Pillow's, but faster, and without accepting what libjpeg warns of: (height,
    width, colors). `size`: width and height to decode at.

    Raises:
        ValueError: libjpeg warns of the picture's data.
    """
    width, height = size
    pixels = np.empty((height, width, len(colors)), np.uint8)
    try:
        simplejpeg.decode_jpeg(jpeg, colors, min_width=width, buffer=pixels)
    except ValueError:
        # Only the first warning is reported. Those of the header are harmless: without their cause,
        # the data must decode without a warning, or with one at its very end.
        jpeg = _without_metadata(jpeg)
        try:
            simplejpeg.decode_jpeg(jpeg, colors, min_width=width, buffer=pixels)
        except ValueError as error:
            if not _is_padding(jpeg, str(error)):
                raise
    return pixels


def _without_metadata(jpeg: bytes) -> bytes:
    """The JPEG without metadata and without bytes between the segments of its header. The first
    scan of a baseline JPEG gets the only parameters that it may have."""
    parts, at, is_baseline = [jpeg[:2]], 2, False
    while (at := jpeg.find(b"\xff", at)) >= 0 and at + 4 <= len(jpeg):
        marker, end = jpeg[at + 1], at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        if marker in (0x00, 0xFF):  # no marker, or a fill byte before one
            at += 1
            continue
        is_baseline = is_baseline or marker in _BASELINE
        if marker == _START_OF_SCAN:
            start = jpeg[at : end - 3] + b"\0\x3f\0" if is_baseline else jpeg[at:end]
            return b"".join((*parts, start, jpeg[end:]))
        if marker not in _NOT_NEEDED:
            parts.append(jpeg[at:end])
        at = end
    return jpeg


def _is_padding(jpeg: bytes, warning: str) -> bool:
    """Whether libjpeg's first warning is of bytes between the last pixel and the end of the image,
    and these are no picture data: a few, or one value repeated from the last pixel on. Other bytes
    there mean that pixels were lost on the way. `jpeg` is without metadata."""
    match = _EXTRANEOUS.search(warning)
    if match is None:
        return False
    scans = jpeg[: jpeg.index(bytes((0xFF, _END_OF_IMAGE)))]
    skipped, repeated = int(match[1]), len(scans) - len(scans.rstrip(scans[-1:]))
    return skipped <= _READ_AHEAD or skipped <= repeated <= skipped + _READ_AHEAD
