"""Picture files: the formats that are read, whether a file is complete, and what its EXIF and XMP
metadata say about the panorama. `images.py` decodes the pixels."""

import contextlib
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from panollava.errors import UserError
from panollava.files import GIT_LFS_POINTER, is_git_lfs_pointer

IN_MEMORY = Path("picture")  # the name of a picture without a file, in errors
MAX_PIXELS = 1 << 30

warnings.filterwarnings("ignore", module=r"PIL\.")  # of metadata, which is not read
Image.MAX_IMAGE_PIXELS = None  # checked below, with a remedy
# Bytes of text and color profile, uncompressed: cameras and editors write more than Pillow allows.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 27

_RATIO_TOLERANCE = 0.01
_CONVERTIBLE = (1, 4, 6, 1 / 6)  # of stereo pairs and cube faces; others are those of photos
# No others, because Pillow runs a program to read EPS. JPEG includes MPO.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "TGA")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_FILE_STARTS = {
    **{b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WebP", b"GIF8": "GIF"},
    **{b"II*\0": "TIFF", b"MM\0*": "TIFF", b"\0\0\0\x0cjP": "JPEG 2000"},
}
_OTHER_FORMATS = {
    **{b"v/1\x01": "OpenEXR", b"#?RADIANCE": "Radiance HDR", b"8BPS": "Photoshop"},
    **{b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL"},
}
_CONVERT = "convert it to PNG, for example with ImageMagick: magick FILE OUT.png"
_OTHERWISE = "if other programs show it, save it as JPEG or PNG"
_CUT_OFF = re.compile("truncated|premature end|end of file|cut off", re.IGNORECASE)
_DECODING_ERRORS = (
    *(OSError, EOFError, RuntimeError, SyntaxError, ValueError, LookupError, ArithmeticError),
    *(TypeError, AttributeError, AssertionError, struct.error, zlib.error),
)
_SUBFILE_TYPE, _DNG_VERSION = 254, 50706  # TIFF tags
_TIMES = [
    tag for tag in ExifTags.Base if tag.name.startswith(("DateTime", "OffsetTime", "SubsecTime"))
]
_GPANO_TAG = re.compile(r"(?<!/)GPano:(\w+)(?:\s*=\s*[\"']|>)\s*([^\"'<]*)")


# Kinds of faults that may end without a change of the file: permissions, a network, a decoder that
# is installed.
TEMPORARY = {"picture missing", "picture cannot be read", "format not supported"}


class PictureError(UserError):
    """A picture that is not a usable panorama. The message is `path: kind: detail`.

    Kinds are a few phrases, such as "picture missing", "link not downloaded", "not a picture",
    "broken picture", "cut off", "too large", "not 2:1" and "part of a panorama". `reason` is kind
    and detail; it names no folder, so that it is the same on every machine."""

    def __init__(self, path: Path, kind: str, detail: str = "") -> None:
        self.kind = kind
        self.reason = f"{kind}: {detail}" if detail else kind
        super().__init__(f"{path}: {self.reason}")


@contextlib.contextmanager
def open_picture(picture: Path | bytes) -> Iterator[tuple[Image.Image, bytes]]:
    """The picture in a file, or in a file's content, not yet decoded, and that content. Errors of
    decoders in the block become PictureErrors too.

    Raises:
        PictureError: missing, unreadable, broken, cut off, or of a format that is not read.
    """
    path = IN_MEMORY if isinstance(picture, bytes) else picture
    try:
        content = picture if isinstance(picture, bytes) else picture.read_bytes()
    except FileNotFoundError:
        raise PictureError(path, "picture missing") from None
    except OSError as error:
        raise PictureError(path, "picture cannot be read", error.strerror or str(error)) from None
    if is_git_lfs_pointer(content):
        raise PictureError(path, *GIT_LFS_POINTER.split(": "))
    try:
        formats = (*_FORMATS, "HEIF") if _is_heif(content) and _can_read_heif(path) else _FORMATS
        with Image.open(io.BytesIO(content), formats=formats) as opened:
            _check_end(opened.format, content)
            yield opened, content
    except UnidentifiedImageError:
        raise _unidentified(path, content) from None
    except _DECODING_ERRORS as error:
        kind = "cut off" if _CUT_OFF.search(str(error)) else "broken picture"
        raise PictureError(path, kind, str(error) or type(error).__name__) from None


def check_panorama(path: Path, picture: Image.Image, max_pixels: int = MAX_PIXELS) -> int:
    """The picture's EXIF orientation, 1..8.

    Raises:
        PictureError: as `check_picture`; not 2:1, or part of a panorama.
    """
    orientation = check_picture(path, picture, max_pixels)
    width, height = upright_size(picture, orientation)
    if area := cropped_area(gpano_tags(picture), width, height):
        detail = (
            f"its GPano tags place {width} x {height} pixels in a sphere of "
            f"{area.full_width:.0f} x {area.full_height:.0f}; make it whole with: panollava convert"
        )
        raise PictureError(path, "part of a panorama", detail)
    if not is_2_to_1(width, height):
        detail = f"{width} x {height} pixels; an equirectangular panorama is twice as wide as high"
        if orientation >= 5:
            detail = (
                f"{width} x {height} pixels by its EXIF orientation {orientation}; if it is "
                f"upright without ({height} x {width}), remove the tag: exiftool -Orientation= FILE"
            )
        elif any(is_alike(width / height, ratio) for ratio in _CONVERTIBLE):
            detail += "; stereo pairs and cube faces become one with: panollava convert"
        raise PictureError(path, "not 2:1", detail)
    return orientation


def check_picture(path: Path, picture: Image.Image, max_pixels: int = MAX_PIXELS) -> int:
    """The picture's EXIF orientation, 1..8. PNG is decoded, because EXIF may follow its pixels.

    Raises:
        PictureError: too large, a raw photo, or pixels that are neither RGB nor gray of 8 or 16
            bits.
    """
    width, height = picture.size
    if width * height > max_pixels:
        detail = f"{width} x {height} pixels, limit {max_pixels:,} in all; save it smaller"
        raise PictureError(path, "too large", detail)
    tags = getattr(picture, "tag_v2", {})
    if _DNG_VERSION in tags or tags.get(_SUBFILE_TYPE) == 1:
        detail = "its first page is a thumbnail; develop and stitch it, and save it as JPEG or PNG"
        raise PictureError(path, "raw photo (DNG)", detail)
    if picture.mode in ("F", "LAB", "HSV") or (picture.mode == "I" and picture.format != "PPM"):
        detail = f"pixels of mode {picture.mode}; save it as RGB with 8 or 16 bits per channel"
        raise PictureError(path, "not 8 or 16 bits", detail)
    if picture.format == "PNG" and "exif" not in picture.info:
        picture.load()
    return _orientation(picture)


def upright_size(picture: Image.Image, orientation: int) -> tuple[int, int]:
    """Width and height of a picture, which may be stored on its side."""
    width, height = picture.size
    # Pillow has turned the size of TIFF.
    return (height, width) if orientation >= 5 and picture.format != "TIFF" else (width, height)


def is_alike(ratio: float, other: float) -> bool:
    return abs(ratio / other - 1) <= _RATIO_TOLERANCE


def is_2_to_1(width: float, height: float) -> bool:
    return bool(height) and is_alike(width / height, 2)


def gpano_tags(picture: Image.Image) -> dict[str, str]:
    """Google's photo sphere tags of the XMP metadata, without their prefix `GPano:`."""
    xmp = picture.info.get("xmp") or picture.info.get("XML:com.adobe.xmp")
    text = xmp.decode(errors="replace") if isinstance(xmp, bytes) else str(xmp)
    return {name: value.strip() for name, value in _GPANO_TAG.findall(text)}


def exif_times(picture: Image.Image) -> Image.Exif:
    """What a picture's EXIF says of when it was taken, and nothing else."""
    times = Image.Exif()
    with contextlib.suppress(*_DECODING_ERRORS):
        exif = picture.getexif()
        details = exif.get_ifd(ExifTags.IFD.Exif)
        for tags, copy in ((exif, times), (details, times.get_ifd(ExifTags.IFD.Exif))):
            copy.update({tag: str(tags[tag])[:64] for tag in _TIMES if tag in tags})
    return times


def rgb_profile(picture: Image.Image) -> bytes | None:
    profile = picture.info.get("icc_profile")
    return profile if profile and profile[16:20] == b"RGB " else None


def number(tags: dict[str, str], name: str) -> float:
    """NaN if there is no such tag or it is no finite number."""
    with contextlib.suppress(KeyError, ValueError):
        if math.isfinite(value := float(tags[name])):
            return value
    return math.nan


class CroppedArea(NamedTuple):
    """Where a part of a panorama is in the full sphere, in the part's pixels."""

    full_width: float
    full_height: float
    left: float
    top: float


def cropped_area(tags: dict[str, str], width: int, height: int) -> CroppedArea | None:
    """Of a picture of `width` x `height` pixels, by its GPano tags; NaN for missing ones. None: it
    is no part. Tags that describe a part of other proportions than the picture's are of an earlier
    version of it."""
    full = [number(tags, f"FullPano{side}Pixels") for side in ("Width", "Height")]
    part = [number(tags, f"CroppedAreaImage{side}Pixels") for side in ("Width", "Height")]
    is_part = any(0 < p < (1 - _RATIO_TOLERANCE) * f for p, f in zip(part, full, strict=True))
    if not is_part or abs(part[0] * height - part[1] * width) > 0.02 * part[1] * width:
        return None
    place = (number(tags, f"CroppedArea{side}Pixels") for side in ("Left", "Top"))
    return CroppedArea(*(value * width / part[0] for value in (*full, *place)))


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1..8: 1 is upright, 2 mirrored. All else that a file may contain there is
    taken for 1, as viewers do."""
    orientation: Any = 1
    with contextlib.suppress(*_DECODING_ERRORS):
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    if picture.format == "TIFF":  # Pillow has set its size by any number of this value
        orientation = getattr(picture, "tag_v2", {}).get(ExifTags.Base.Orientation)
        return int(orientation) if orientation in range(1, 9) else 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _is_heif(content: bytes) -> bool:
    return content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS


def _can_read_heif(path: Path) -> bool:
    try:
        import pillow_heif  # slow to import, and rarely needed
    except ImportError:
        detail = f"HEIC needs pillow-heif: pip install pillow-heif, or {_CONVERT}"
        raise PictureError(path, "format not supported", detail) from None
    # A thumbnail is not the picture.
    pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    return True


def _check_end(kind: str | None, content: bytes) -> None:
    """What Pillow does not check: a cut after the last pixel, and checksums of PNG.

    Raises:
        ValueError: cut off, or a wrong checksum.
    """
    if kind == "GIF" and not content.rstrip(b"\0").endswith(b";"):
        raise ValueError("cut off before its end")
    if kind != "PNG":
        return
    at, view = 8, memoryview(content)
    while (end := at + 12 + int.from_bytes(content[at : at + 4])) <= len(content):
        name = content[at + 4 : at + 8]
        # Chunks whose names start with a capital letter are needed to decode the picture.
        if name[0] & 32 == 0 and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(
            content[end - 4 : end]
        ):
            raise ValueError(f"wrong checksum of its part {name.decode(errors='replace')}")
        if name == b"IEND":
            return
        at = end
    raise ValueError("cut off before its end")


def _unidentified(path: Path, content: bytes) -> PictureError:
    """The error for a file that Pillow does not recognize."""
    for start, name in _OTHER_FORMATS.items():
        if content.startswith(start):
            return PictureError(path, "format not supported", f"{name}; {_CONVERT}")
    known = [name for start, name in _FILE_STARTS.items() if content.startswith(start)]
    if content[4:8] == b"ftyp":
        if not _is_heif(content) and content[8:12] not in (b"avif", b"avis"):
            detail = "a video or raw photo; save pictures of it as JPEG or PNG (ffmpeg for videos)"
            return PictureError(path, "format not supported", detail)
        known = ["HEIC or AVIF"]
    if known:
        detail = f"a {known[0]} that is damaged, cut off or of an unusual kind; {_OTHERWISE}"
        return PictureError(path, "broken picture", detail)
    return PictureError(path, "not a picture")
