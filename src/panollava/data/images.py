"""Reading panoramas: the one place that opens an image file."""

import math
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from panollava.errors import UserError

# A panorama may be larger than what Pillow takes for an attack; this is 32,768 x 16,384.
Image.MAX_IMAGE_PIXELS = 1 << 29

_RATIO_TOLERANCE = 0.01
# Of JPEG (ITU-T T.81, table B.1): markers of a frame's header, without those of tables among them.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset(range(0xC0)) | frozenset(range(0xD0, 0xDB))  # or a scan's start
_END_OF_IMAGE = b"\xff\xd9"
_BLOCKS = 64  # rows


def read_panorama(path: Path, width: int, until: float = 1.0) -> NDArray[np.uint8]:
    """Decode at the smallest scale whose width is at least `width` (or in full, if that is less):
    uint8 (height, width, 3), upright as its EXIF data says. Rows below the share `until` of the
    height may be left black.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size; what is left of the scale, and the whole of
    it in other formats, is averaged. A scale that doesn't divide the width stretches the panorama
    by less than one of its pixels.

    Raises:
        UserError: missing, broken, cut off, of more than 8 bits, or not 2:1. The message is
            `path: reason`.
    """
    try:
        with Image.open(path) as picture:
            _check(path, picture)
            ordinary = _is_ordinary(picture)
            full = picture.height
            picture.draft("RGB", (width, 1))
            if ordinary and picture.width < 2 * width:
                panorama = _decode(path.read_bytes(), full, picture.size, until)
                if panorama is not None:
                    return panorama
            return _read(picture, width)
    except FileNotFoundError:
        raise UserError(f"{path}: picture missing") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a picture that can be read") from None
    except OSError as error:
        # Of an error of the system only what doesn't name the file once more.
        raise UserError(f"{path}: broken picture: {error.strerror or error}") from None
    except (EOFError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: broken picture: {error}") from None


def _read(picture: Image.Image, width: int) -> NDArray[np.uint8]:
    ImageOps.exif_transpose(picture, in_place=True)
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    factor = rgb.width // width
    return np.asarray(rgb.reduce(factor) if factor > 1 else rgb)


def _is_ordinary(picture: Image.Image) -> bool:
    """A JPEG, in color or grey, that is stored upright."""
    jpeg = picture.format in ("JPEG", "MPO") and picture.mode in ("RGB", "L")
    return jpeg and _orientation(picture) == 1


def _decode(
    jpeg: bytes, full: int, size: tuple[int, int], until: float
) -> NDArray[np.uint8] | None:
    """What `_read` gives of an ordinary JPEG of `full` rows, rows below `until` left black, sooner:
    libjpeg-turbo without Pillow's copies, and without those rows. `size`: width and height to
    decode at. None where something is wrong, which is for Pillow to say."""
    if not jpeg.endswith(_END_OF_IMAGE):
        return None
    width, height = size
    panorama = np.zeros((height, width, 3), np.uint8)
    # A row's colors are of the next one too.
    rows = math.ceil(full * until + 4 * full / height)
    shortened = _with_height(jpeg, rows)
    try:
        simplejpeg.decode_jpeg_header(shortened)
    except ValueError:  # of the same words, but before a pixel is decoded
        return None
    try:
        simplejpeg.decode_jpeg(shortened, "RGB", min_width=width, buffer=panorama)
    except ValueError as error:
        # The rows that the header doesn't claim are such data, found when all others are decoded.
        if not str(error).startswith("Corrupt JPEG data: "):
            return None
    return panorama


def _with_height(jpeg: bytes, rows: int) -> bytes:
    """A JPEG whose header claims `rows` of its rows, or some more: a decoder stops there."""
    at = 2
    while jpeg[at] == 0xFF and (marker := jpeg[at + 1]) not in _WITHOUT_LENGTH:
        if marker == 0xFF:  # filled up
            at += 1
            continue
        if marker in _START_OF_FRAME:
            place = slice(at + 5, at + 7)
            height = int.from_bytes(jpeg[place])
            # Whole blocks of any subsampling.
            claimed = min(height, -(-rows // _BLOCKS) * _BLOCKS)
            return jpeg[: place.start] + claimed.to_bytes(2) + jpeg[place.stop :]
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    return jpeg


def roll(panorama: NDArray, degrees: float) -> NDArray:
    """The panorama turned to the right, by whole pixels: what was in front is then at `degrees`."""
    columns = round(degrees / 360 * panorama.shape[1])
    return np.roll(panorama, columns, axis=1) if columns else panorama


def _check(path: Path, picture: Image.Image) -> None:
    width, height = picture.size
    if _orientation(picture) >= 5:  # stored on its side
        width, height = height, width
    if abs(width / height - 2) > 2 * _RATIO_TOLERANCE:
        raise UserError(
            f"{path}: not 2:1: {width} x {height} pixels, "
            "where a whole equirectangular panorama is twice as wide as high"
        )
    if picture.mode.startswith(("I", "F")):  # converting them would cut off all above 255
        raise UserError(
            f"{path}: not 8 bits: pixels of mode {picture.mode}; save it with 8 bits a channel"
        )


def _orientation(picture: Image.Image) -> int:
    """1..8: 1 is upright, 2 mirrored."""
    return picture.getexif().get(ExifTags.Base.Orientation, 1)
