"""Reads panoramas from image files, checks them, and rolls them. Only this module opens images."""

import io
import math
import struct
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from panollava.errors import UserError

# Pillow refuses large images as decompression bombs; this allows 32,768 x 16,384 pixels.
Image.MAX_IMAGE_PIXELS = 1 << 29

_RATIO_TOLERANCE = 0.01
# No others, because Pillow runs a program to read EPS. JPEG includes MPO.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "TGA")
# JPEG markers (ITU-T T.81, table B.1). The range of frame headers includes three other markers.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset(range(0xC0)) | frozenset(range(0xD0, 0xDB))  # or the start of a scan
_END_OF_IMAGE = b"\xff\xd9"
_DECODING_ERRORS = (
    *(EOFError, RuntimeError, SyntaxError, ValueError, LookupError, OverflowError, struct.error),
    Image.DecompressionBombError,
)
_IN_MEMORY = Path("picture")  # its name in errors
_JPEG_WIDTH = 2048  # of `reduced_jpeg`, at most
_JPEG_BYTES = 1 << 19
_JPEG_QUALITIES = (85, 60, 35, 10)
_BLOCK_ROWS = 64  # a multiple of the block height for every chroma subsampling


class PictureError(UserError):
    """A picture that is not a usable panorama. The message is `path: kind: detail`.

    Kinds are "picture missing", "link not downloaded", "picture cannot be read" (a system error),
    "not a picture", "broken picture", "too large", "not 2:1" and "not 8 bits". `reason` is kind and
    detail; it names no folder, so that it is the same on every machine."""

    def __init__(self, path: Path, kind: str, detail: str = "") -> None:
        self.kind = kind
        self.reason = f"{kind}: {detail}" if detail else kind
        super().__init__(f"{path}: {self.reason}")


def read_panorama(
    picture: Path | bytes,
    width: int,
    visible_fraction: float = 1.0,
    max_pixels: int | None = None,
) -> NDArray[np.uint8]:
    """Decode an image file, or what a file contains, at the smallest scale that is at least `width`
    wide, or at full size if the picture is narrower: uint8 (height, width, 3), upright according
    to its EXIF orientation.

    `visible_fraction`: the share of the height, from the top, that is needed. Rows below it may
    stay black. `max_pixels` of the full size are checked before any pixel is decoded.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size. The rest of the scale, or all of it for other
    formats, is box-averaged. A scale that does not divide the width stretches the panorama by less
    than one of its pixels.

    Raises:
        PictureError: missing, unreadable, broken, truncated, too large, not 2:1, or more than 8
            bits.
    """
    path = _IN_MEMORY if isinstance(picture, bytes) else picture
    source = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    try:
        with Image.open(source, formats=_FORMATS) as opened:
            _check(path, opened, max_pixels)
            upright = _is_upright_jpeg(opened)
            full_height = opened.height
            opened.draft("RGB", (width, 1))
            if upright and opened.width < 2 * width:
                jpeg = picture if isinstance(picture, bytes) else picture.read_bytes()
                panorama = _decode_jpeg(jpeg, full_height, opened.size, visible_fraction)
                if panorama is not None:
                    return panorama
            return _decode(opened, width)
    except FileNotFoundError:
        raise PictureError(path, "picture missing") from None
    except UnidentifiedImageError:
        raise PictureError(path, "not a picture") from None
    except OSError as error:
        if error.strerror:  # from the system; Pillow's have none
            raise PictureError(path, "picture cannot be read", error.strerror) from None
        raise PictureError(path, "broken picture", str(error)) from None
    except _DECODING_ERRORS as error:
        raise PictureError(path, "broken picture", str(error)) from None


def convert_panorama(picture: Image.Image, width: int) -> NDArray[np.uint8]:
    """Like `read_panorama`, for a picture in memory, which stays as it is."""
    _check(_IN_MEMORY, picture)
    return _decode(picture.copy(), width)


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


def _check(path: Path, picture: Image.Image, max_pixels: int | None = None) -> None:
    width, height = picture.size
    if max_pixels is not None and width * height > max_pixels:
        detail = f"{width} x {height} pixels, limit {max_pixels:,} in all; send it smaller"
        raise PictureError(path, "too large", detail)
    if _orientation(picture) >= 5:  # stored on its side; asking may decode a PNG
        width, height = height, width
    if not height or abs(width / height - 2) > 2 * _RATIO_TOLERANCE:
        detail = f"{width} x {height} pixels; an equirectangular panorama is twice as wide as high"
        raise PictureError(path, "not 2:1", detail)
    if picture.mode.startswith(("I", "F")):  # converting would clip all values above 255
        detail = f"pixels of mode {picture.mode}; save it with 8 bits per channel"
        raise PictureError(path, "not 8 bits", detail)


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1..8: 1 is upright, 2 mirrored."""
    return picture.getexif().get(ExifTags.Base.Orientation, 1)


def _is_upright_jpeg(picture: Image.Image) -> bool:
    """A JPEG in RGB or gray whose rows are stored from top to bottom."""
    jpeg = picture.format in ("JPEG", "MPO") and picture.mode in ("RGB", "L")
    return jpeg and _orientation(picture) == 1


def _decode(picture: Image.Image, width: int) -> NDArray[np.uint8]:
    ImageOps.exif_transpose(picture, in_place=True)
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    factor = rgb.width // width
    return np.asarray(rgb.reduce(factor) if factor > 1 else rgb)


def _decode_jpeg(
    jpeg: bytes, full_height: int, size: tuple[int, int], visible_fraction: float
) -> NDArray[np.uint8] | None:
    """Same pixels as `_decode`, but faster: libjpeg-turbo without Pillow's copies and without the
    rows below `visible_fraction`, which stay black.

    `size`: width and height to decode at. Returns None for a faulty file: Pillow decides then
    whether it is broken."""
    if not jpeg.endswith(_END_OF_IMAGE):
        return None
    width, height = size
    panorama = np.zeros((height, width, 3), np.uint8)
    # Chroma upsampling reads the next row too.
    rows = math.ceil(full_height * visible_fraction + 4 * full_height / height)
    shortened = _with_height(jpeg, rows)
    try:
        simplejpeg.decode_jpeg_header(shortened)
    except ValueError:  # the same messages as below, but before any pixel is decoded
        return None
    try:
        simplejpeg.decode_jpeg(shortened, "RGB", min_width=width, buffer=panorama)
    except ValueError as error:
        # Expected: the rows that the header leaves out are extra data to the decoder. It finds
        # them after decoding all other rows.
        if not str(error).startswith("Corrupt JPEG data: "):
            return None
    return panorama


def _with_height(jpeg: bytes, rows: int) -> bytes:
    """The JPEG with a header that claims only `rows` rows (rounded up to whole blocks), where a
    decoder stops."""
    at = 2
    while jpeg[at] == 0xFF and (marker := jpeg[at + 1]) not in _WITHOUT_LENGTH:
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _START_OF_FRAME:
            place = slice(at + 5, at + 7)
            height = int.from_bytes(jpeg[place])
            claimed = min(height, -(-rows // _BLOCK_ROWS) * _BLOCK_ROWS)
            return jpeg[: place.start] + claimed.to_bytes(2) + jpeg[place.stop :]
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    return jpeg
