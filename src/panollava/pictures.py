"""Reading panoramas: the one place that opens an image file."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from panollava.errors import UserError

# A panorama may be larger than what Pillow takes for an attack; this is 32,768 x 16,384.
Image.MAX_IMAGE_PIXELS = 1 << 29

_RATIO_TOLERANCE = 0.01


def read_panorama(path: Path, width: int) -> NDArray[np.uint8]:
    """Decode at the smallest scale whose width is at least `width`: (height, width, 3).

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size; what is left of the scale, and that of
    other formats, is averaged.

    Raises:
        UserError: missing, broken or cut off, no picture, or not twice as wide as high.
    """
    try:
        with Image.open(path) as picture:
            _check_ratio(path, picture)
            picture.draft("RGB", (width, width // 2))
            oriented = ImageOps.exif_transpose(picture)
            factor = max(1, oriented.width // width)
            rgb = oriented.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: picture missing") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a picture that can be read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: broken picture: {error}") from None
    return np.asarray(rgb.reduce(factor) if factor > 1 else rgb)


def _check_ratio(path: Path, picture: Image.Image) -> None:
    width, height = picture.size
    if picture.getexif().get(0x0112, 1) >= 5:  # stored on its side
        width, height = height, width
    if abs(width / height - 2) > 2 * _RATIO_TOLERANCE:
        raise UserError(
            f"{path}: {width} x {height} pixels is not 2:1, as a whole equirectangular panorama is"
        )
