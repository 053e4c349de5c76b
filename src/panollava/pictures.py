"""Reading panoramas: the one place that opens an image file."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from panollava.errors import UserError

# A panorama may be larger than what Pillow takes for an attack; this is 32,768 x 16,384.
Image.MAX_IMAGE_PIXELS = 1 << 29

_RATIO_TOLERANCE = 0.01


def read_panorama(path: Path, width: int) -> NDArray[np.uint8]:
    """Decode at the smallest scale whose width is at least `width` (or in full, if that is less):
    uint8 (height, width, 3), upright as its EXIF data says.

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
            picture.draft("RGB", (width, width // 2))
            ImageOps.exif_transpose(picture, in_place=True)
            rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
            factor = rgb.width // width
            return np.asarray(rgb.reduce(factor) if factor > 1 else rgb)
    except FileNotFoundError:
        raise UserError(f"{path}: picture missing") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a picture that can be read") from None
    except OSError as error:
        # Of an error of the system only what doesn't name the file once more.
        raise UserError(f"{path}: broken picture: {error.strerror or error}") from None
    except (EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: broken picture: {error}") from None


def roll(panorama: NDArray, degrees: float) -> NDArray:
    """The panorama turned to the right, by whole pixels: what was in front is then at `degrees`."""
    columns = round(degrees / 360 * panorama.shape[1])
    return np.roll(panorama, columns, axis=1) if columns else panorama


def _check(path: Path, picture: Image.Image) -> None:
    width, height = picture.size
    if picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # stored on its side
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
