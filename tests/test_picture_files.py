"""Every common file of a panorama is read, and a file that is damaged or holds no whole panorama is
refused with the reason."""

import io
import shutil
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image
from pillow_heif import register_heif_opener

from helpers import SHARED
from panollava.data.images import PictureError, convert_panorama, read_panorama
from panollava.files import GIT_LFS_POINTER

register_heif_opener()  # to save pictures

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of odd metadata

FORMATS: dict[str, dict[str, Any]] = {
    "a.jpg": {"quality": 95},
    "progressive.jpg": {"quality": 95, "progressive": True},
    "restart.jpg": {"quality": 95, "restart_marker_rows": 2},
    "mpo.jpg": {"format": "MPO", "quality": 95},
    "a.png": {},
    "a.webp": {"quality": 95},
    "lossless.webp": {"lossless": True},
    "a.tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "deflate.tif": {"compression": "tiff_adobe_deflate"},
    "jpeg.tif": {"compression": "jpeg", "quality": 95},
    "a.avif": {"quality": 95},
    "a.heic": {"quality": 95},
    "a.bmp": {},
    "a.gif": {},
    "a.jp2": {},
    "a.ppm": {},
}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    'syntax-ns#"><rdf:Description rdf:about="" xmlns:GPano="http://ns.google.com/photos/1.0/'
    'panorama/" {0}>{1}</rdf:Description></rdf:RDF></x:xmpmeta>'
)


def smooth(height: int = 64, width: int = 128) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    channels = [40 + 150 * columns / width, 40 + 150 * rows / height, 0 * rows + 99]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def rough(height: int = 64, width: int = 128) -> np.ndarray:
    """A panorama whose file is not tiny."""
    noise = np.random.default_rng(0).integers(-20, 20, (height, width, 3))
    return (smooth(height, width) + noise).clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, name: str = "a.jpg", **options: Any) -> bytes:
    content = io.BytesIO()
    options = FORMATS.get(name, {}) | options
    content.name = name
    Image.fromarray(pixels).save(content, **options)
    return content.getvalue()


def difference(picture: np.ndarray, expected: np.ndarray) -> float:
    assert picture.shape == expected.shape
    return float(np.abs(picture.astype(int) - expected).mean())


def reason(content: bytes | Path, width: int = 128) -> str:
    """Why it is refused; "" if it is read."""
    try:
        read_panorama(content, width)
    except PictureError as error:
        return error.reason
    return ""


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read(name: str) -> None:
    limit = 8 if name == "a.gif" else 4  # 256 colors
    assert difference(read_panorama(encode(smooth(), name), 128), smooth()) < limit
    reduced = read_panorama(encode(smooth(), name), 32)
    assert difference(reduced, smooth(16, 32)) < limit


@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_off_file_is_refused_in_every_format(name: str) -> None:
    content = encode(rough(), name)
    if name == "mpo.jpg":  # a second picture may be cut
        content = content[: content.index(b"\xff\xd9") + 2]
    cuts = {*range(1, 40), *range(40, len(content), max(1, len(content) // 60))}
    for cut in cuts:
        assert reason(content[:-cut]), cut
        assert reason(content[:-cut], 32), cut
    assert reason(content[: len(content) // 2]).split(":")[0] in ("cut off", "broken picture")


@pytest.mark.parametrize("name", ["a.jpg", "progressive.jpg", "restart.jpg"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("width", [512, 128, 40])
def test_a_jpeg_that_is_cut_off_and_closed_is_refused(name: str, share: float, width: int) -> None:
    content = encode(rough(256, 512), name)
    scan = content.index(b"\xff\xda") + 20
    cut = content[: scan + int(share * (len(content) - scan))] + b"\xff\xd9"
    assert reason(cut, width).startswith("cut off: ")


# In the others, zeros are valid data.
@pytest.mark.parametrize(
    "name", ["a.jpg", "progressive.jpg", "restart.jpg", "a.png", "lzw.tif", "deflate.tif", "a.gif"]
)
@pytest.mark.parametrize("share", [0.4, 0.7, 0.9])
def test_a_file_whose_end_was_never_written_is_refused(name: str, share: float) -> None:
    """A download that reserves the file's size first leaves zeros."""
    content = encode(rough(256, 512), name)
    start = int(share * len(content))
    zeros = content[:start] + bytes(len(content) - start)
    assert reason(zeros)
    if "jpg" in name:
        assert reason(zeros[:-2] + b"\xff\xd9")


def test_a_png_that_is_cut_off_and_closed_is_refused() -> None:
    content = encode(rough(), "a.png")
    at = content.index(b"IDAT")
    packed = content[at + 4 : -16]
    for share in (0.1, 0.5, 0.99):
        part = b"IDAT" + packed[: int(share * len(packed))]
        chunk = struct.pack(">L", len(part) - 4) + part + struct.pack(">L", zlib.crc32(part))
        assert reason(content[: at - 4] + chunk + content[-12:]).startswith("cut off: ")


def test_a_png_with_a_wrong_checksum_is_refused() -> None:
    content = bytearray(encode(rough(), "a.png"))
    content[content.index(b"IDAT") + 200] ^= 1
    assert reason(bytes(content)) == "broken picture: wrong checksum of its part IDAT"


def test_a_png_without_its_palette_is_refused() -> None:
    content = io.BytesIO()
    Image.fromarray(smooth()).quantize(16).save(content, "PNG")
    png = content.getvalue()
    start, end = png.index(b"PLTE") - 4, png.index(b"IDAT") - 4
    assert reason(png[:start] + png[end:]).startswith("broken picture: ")


def inserted(content: bytes, before: bytes, bytes_: bytes, last: bool = False) -> bytes:
    at = content.rindex(before) if last else content.index(before)
    return content[:at] + bytes_ + content[at:]


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2) + content


@pytest.mark.parametrize("width", [128, 64, 32])
@pytest.mark.parametrize("name", ["a.jpg", "progressive.jpg", "restart.jpg"])
def test_what_decoders_repair_without_loss_is_accepted(name: str, width: int) -> None:
    """libjpeg warns of most of these."""
    content = encode(rough(), name)
    expected = read_panorama(content, width)
    end, table = b"\xff\xd9", b"\xff\xdb"
    unknown_jfif = content.replace(b"JFIF\0\1", b"JFIF\0\3")
    variants = {
        "bytes between segments": inserted(content, table, b"\0\1\2"),
        "fill bytes": inserted(content, table, b"\xff" * 5),
        "bytes behind the end": content + b"8db42d694ccc418790edff439fe026bf" + bytes(5000) + end,
        "zeros before the end": inserted(content, end, bytes(3000), last=True),
        "ones before the end": inserted(content, end, b"\xff" * 300, last=True),
        "a few bytes before the end": inserted(content, end, b"\x12\x34\x56", last=True),
        "an unknown JFIF version": unknown_jfif,
        "a damaged color profile": inserted(
            content, table, segment(0xE2, b"ICC_PROFILE\0\5\2abcd")
        ),
        "several": inserted(inserted(unknown_jfif, end, bytes(99), last=True), table, b"\0\1"),
    }
    if name != "progressive.jpg":
        scan = content.index(b"\xff\xda")
        length = int.from_bytes(content[scan + 2 : scan + 4])
        zeroed = bytearray(content)
        zeroed[scan + length - 1 : scan + length + 2] = bytes(3)
        variants["a scan without parameters"] = bytes(zeroed)
    for title, variant in variants.items():
        assert variant != content, title
        assert np.array_equal(read_panorama(variant, width), expected), title


@pytest.mark.parametrize("name", ["a.jpg", "progressive.jpg", "restart.jpg"])
def test_a_harmless_warning_does_not_hide_another(name: str) -> None:
    content = inserted(encode(rough(), name), b"\xff\xdb", b"\0\1\2")
    cut = content[: 2 * len(content) // 3] + b"\xff\xd9"
    assert reason(cut).startswith("cut off: ")


def test_a_jpeg_that_lost_data_on_the_way_is_refused() -> None:
    """Data are left over behind the last pixel: the decoder has skipped or misread some."""
    content = bytearray(encode(rough(256, 512)))
    start = content.index(b"\xff\xda") + 20
    refused = 0
    for at in range(start, len(content) - 2, (len(content) - start) // 40):
        changed = bytearray(content)
        changed[at] ^= 0x55
        refused += "extraneous bytes before marker 0xd9" in reason(bytes(changed))
    assert refused > 3


@pytest.mark.parametrize("name", FORMATS)
def test_changed_bytes_never_end_in_another_error(name: str) -> None:
    content = encode(rough(32, 64), name)
    random = np.random.default_rng(0)
    for _ in range(40):
        changed = np.frombuffer(content, np.uint8).copy()
        places = random.integers(len(content), size=random.integers(1, 4))
        changed[places] = random.integers(256, size=len(places))
        reason(changed.tobytes())


def png_chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">L", len(content))
        + name
        + content
        + struct.pack(">L", zlib.crc32(name + content))
    )


@pytest.mark.parametrize("size", [3_000_000, 60_000_000])
def test_a_png_with_large_text_or_color_profile_is_read(size: int) -> None:
    content = encode(smooth(), "a.png")
    packed = zlib.compress(b"x" * size)
    for chunk in (
        png_chunk(b"zTXt", b"Raw profile type xmp\0\0" + packed),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed),
        png_chunk(b"iCCP", b"printer\0\0" + packed),
    ):
        picture = read_panorama(content[:33] + chunk + content[33:], 128)
        assert np.array_equal(picture, smooth())


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2", "a.pgm"])
def test_16_bits_are_scaled_to_8_and_never_clipped(name: str) -> None:
    deep = smooth().astype(np.uint16) * 257
    for pixels in (deep, deep[..., 0]):
        if name == "a.pgm" and pixels.ndim == 3:
            continue
        _, content = cv2.imencode(name[1:], pixels[..., ::-1] if pixels.ndim == 3 else pixels)
        expected = smooth() if pixels.ndim == 3 else smooth()[..., :1].repeat(3, axis=2)
        assert difference(read_panorama(content.tobytes(), 128), expected) <= 1


def test_16_bits_with_transparency_are_scaled_to_8() -> None:
    deep = np.dstack([smooth()[..., ::-1], np.full((64, 128), 255)]).astype(np.uint16) * 257
    _, content = cv2.imencode(".png", deep)
    assert difference(read_panorama(content.tobytes(), 128), smooth()) <= 1


def test_12_bits_and_negative_gray_are_scaled_too() -> None:
    """TIFF of 16 bits whose white is 0, as scanners write it."""
    deep = smooth()[..., 0].astype(np.uint16) * 257
    content = io.BytesIO()
    Image.fromarray(65535 - deep).save(content, "TIFF", tiffinfo={262: 0})
    expected = smooth()[..., :1].repeat(3, axis=2)
    assert difference(read_panorama(content.getvalue(), 128), expected) <= 1


@pytest.mark.parametrize("kind", ["int32", "float32"])
def test_other_pixels_are_refused_rather_than_clipped(kind: str) -> None:
    content = io.BytesIO()
    Image.fromarray(smooth()[..., 0].astype(kind)).save(content, "TIFF")
    assert reason(content.getvalue()).startswith("not 8 or 16 bits: pixels of mode ")


def test_heic_of_10_bits_is_scaled_to_8() -> None:
    heif = pytest.importorskip("pillow_heif")
    deep = (smooth().astype(np.uint16) * 257).tobytes()
    content = io.BytesIO()
    heif.encode("RGB;16", (128, 64), deep, content, quality=95)
    assert difference(read_panorama(content.getvalue(), 128), smooth()) < 3


def test_heic_without_pillow_heif_is_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = encode(smooth(), "a.heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "pip install pillow-heif" in reason(content)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.avif", "a.heic", "palette.png"])
def test_transparent_pixels_are_black_whatever_is_below(name: str) -> None:
    opacity = np.full((64, 128), 255, np.uint8)
    opacity[:16] = 0
    pictures = []
    for hidden in ((255, 0, 255), (0, 255, 0)):
        pixels = np.dstack([smooth(), opacity])
        pixels[:16, :, :3] = hidden
        if name == "palette.png":
            content = io.BytesIO()
            Image.fromarray(pixels).quantize(200).save(content, "PNG")
            pictures.append(read_panorama(content.getvalue(), 128))
        else:
            options = {"lossless": True} if name == "a.webp" else {}
            pictures.append(read_panorama(encode(pixels, name, **options), 128))
    for picture in pictures:
        assert picture[:14].max() <= 3
        assert difference(picture[18:], smooth()[18:]) < 6
    half = np.dstack([np.full((64, 128, 3), 200), np.full((64, 128), 128)]).astype(np.uint8)
    assert abs(int(read_panorama(encode(half, "a.png"), 128).mean()) - 100) <= 1


def test_a_transparent_color_of_a_png_is_black() -> None:
    pixels = smooth()
    pixels[:16] = (255, 0, 255)
    picture = read_panorama(encode(pixels, "a.png", transparency=(255, 0, 255)), 128)
    assert not picture[:16].any() and np.array_equal(picture[16:], pixels[16:])


def ifd(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """EXIF: a TIFF header and one directory of entries (tag, type, count, value)."""
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "L", 8)
    body, tail = struct.pack(order + "H", len(entries)), b""
    for tag, kind, count, value in entries:
        place = value.ljust(4, b"\0")
        if len(value) > 4:
            place = struct.pack(order + "L", 14 + 12 * len(entries) + len(tail))
            tail += value
        body += struct.pack(order + "HHL", tag, kind, count) + place
    return b"Exif\0\0" + start + body + bytes(4) + tail


UPSIDE_DOWN = (0x112, 3, 1, b"\3\0")
ODD_EXIF = {
    "empty": (b"Exif\0\0", 1),
    "twice": (b"Exif\0\0" + ifd((0x112, 3, 1, b"\1\0")), 1),
    "negative rational": (ifd(UPSIDE_DOWN, (0x11A, 5, 1, struct.pack("<lL", -1, 0))), 3),
    "zero denominator": (ifd(UPSIDE_DOWN, (0x11A, 5, 1, bytes(8))), 3),
    "two resolutions": (ifd(UPSIDE_DOWN, (0x11A, 5, 2, struct.pack("<4L", 72, 1, 72, 1))), 3),
    "orientation as text": (ifd((0x112, 2, 2, b"3\0")), 1),
    "orientation twice": (ifd((0x112, 3, 2, b"\3\0\3\0")), None),
    "orientation 0": (ifd((0x112, 3, 1, b"\0\0")), 1),
    "orientation 9": (ifd((0x112, 3, 1, b"\t\0")), 1),
    "orientation 65535": (ifd((0x112, 3, 1, b"\xff\xff")), 1),
    "orientation -1": (ifd((0x112, 8, 1, b"\xff\xff")), 1),
    "orientation as a rational": (ifd((0x112, 5, 1, struct.pack("<LL", 3, 1))), 1),
    "orientation as a float": (ifd((0x112, 11, 1, struct.pack("<f", 3))), 1),
    "big-endian": (ifd((0x112, 3, 1, b"\0\3"), order=">"), 3),
    "offset outside": (ifd(UPSIDE_DOWN, (0x10F, 2, 20, b""))[:-4] + b"\xff\xff\1\0", None),
    "cut off": (ifd(UPSIDE_DOWN, (0x10F, 2, 20, b"a camera of some kind"))[:30], None),
    "no directory": (b"Exif\0\0II*\0\x88\x13\0\0", 1),
    "header cut off": (b"Exif\0\0II*", 1),
    "another header": (b"Exif\0\0XY*\0\x08\0\0\0", 1),
    "number for text": (ifd(UPSIDE_DOWN, (0x10F, 4, 1, b"\7\0\0\0")), 3),
    "text for a number": (ifd(UPSIDE_DOWN, (0x128, 2, 2, b"2\0")), 3),
    "pointer as text": (ifd(UPSIDE_DOWN, (0x8769, 2, 6, b"hello\0")), 3),
    "pointer outside": (ifd(UPSIDE_DOWN, (0x8769, 4, 1, struct.pack("<L", 70000))), 3),
    "GPS pointer as text": (ifd(UPSIDE_DOWN, (0x8825, 2, 6, b"hello\0")), 3),
    "huge count": (ifd(UPSIDE_DOWN, (0x10F, 2, 0xFFFFFFFF, b"\x08\0\0\0")), None),
    "unknown type": (ifd(UPSIDE_DOWN, (0x10F, 99, 1, b"\x08\0\0\0")), 3),
}


@pytest.mark.parametrize("title", ODD_EXIF)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_odd_exif_is_ignored_and_the_pixels_are_read(title: str, name: str) -> None:
    exif, orientation = ODD_EXIF[title]
    content = with_exif(smooth(), name, exif)
    pictures = {1: smooth(), 3: smooth()[::-1, ::-1]}
    found = read_panorama(content, 128)
    expected = {orientation} if orientation else {1, 3}  # None: the decoder may not get to it
    if title == "twice" or name == "a.tif":
        expected = {1, 3}
    assert any(difference(found, pictures[each]) < 3 for each in expected)


def with_exif(pixels: np.ndarray, name: str, exif: bytes) -> bytes:
    content = encode(pixels, name)
    if name == "a.jpg":
        return content[:2] + segment(0xE1, exif) + content[2:]
    if name == "a.png":
        return content[:33] + png_chunk(b"eXIf", exif[6:]) + content[33:]
    if name == "a.tif":
        return with_tiff_entry(pixels, exif)
    return encode(pixels, name, exif=exif)


def with_tiff_entry(pixels: np.ndarray, exif: bytes) -> bytes:
    """TIFF has its tags where others have EXIF: the second entry of `exif` in its directory."""
    content = bytearray(encode(pixels, "a.tif"))
    at = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[at : at + 2], "little")
    own = [bytes(content[at + 2 + 12 * i : at + 14 + 12 * i]) for i in range(count)]
    odd = exif[28:40] if len(exif) >= 40 else exif[16:28]
    own = [entry for entry in own if entry[:2] != odd[:2]] + ([odd] if len(odd) == 12 else [])
    directory = struct.pack("<H", len(own)) + b"".join(sorted(own)) + bytes(4)
    content[4:8] = struct.pack("<L", len(content))
    return bytes(content) + directory


def test_a_stitched_panorama_on_its_side_names_the_exif_orientation(tmp_path: Path) -> None:
    for orientation in (5, 6, 7, 8):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        for name in ("a.jpg", "a.png", "a.tif"):
            message = reason(encode(smooth(), name, exif=exif))
            assert message == (
                f"not 2:1: 64 x 128 pixels by its EXIF orientation {orientation}; if it is upright "
                "without (128 x 64), remove the tag: exiftool -Orientation= FILE"
            )


def test_more_than_a_gigapixel_names_the_limit_and_the_remedy() -> None:
    header = struct.pack(">LLBBBBB", 50000, 25000, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    content += png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")
    assert reason(content) == (
        "too large: 50000 x 25000 pixels, limit 1,073,741,824 in all; save it smaller"
    )


def gpano(**values: object) -> bytes:
    return XMP.format(" ".join(f'GPano:{k}="{v}"' for k, v in values.items()), "").encode()


HALF = {
    **{"ProjectionType": "equirectangular", "FullPanoWidthPixels": 256},
    **{"FullPanoHeightPixels": 128, "CroppedAreaImageWidthPixels": 128},
    **{"CroppedAreaImageHeightPixels": 64, "CroppedAreaLeftPixels": 64, "CroppedAreaTopPixels": 32},
}
WHOLE = HALF | {"CroppedAreaImageWidthPixels": 256, "CroppedAreaImageHeightPixels": 128}


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif", "a.heic"])
def test_a_part_of_a_panorama_is_refused_by_its_gpano_tags(name: str) -> None:
    def with_xmp(xmp: bytes, pixels: np.ndarray) -> bytes:
        if name == "a.png":
            chunk = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
            content = encode(pixels, name)
            return content[:33] + chunk + content[33:]
        if name == "a.tif":
            return encode(pixels, name, tiffinfo={700: xmp})
        return encode(pixels, name, xmp=xmp)

    as_elements = "".join(f"<GPano:{k}>{v}</GPano:{k}>" for k, v in HALF.items())
    for xmp in (gpano(**HALF), XMP.format("", as_elements).encode()):
        assert reason(with_xmp(xmp, smooth())) == (
            "part of a panorama: its GPano tags place 128 x 64 pixels in a sphere of 256 x 128; "
            "make it whole with: panollava convert"
        )
    without_poles = HALF | {"CroppedAreaImageWidthPixels": 256}
    content = with_xmp(gpano(**without_poles), smooth(32, 128))
    assert reason(content).startswith("part of a panorama: its GPano tags place 128 x 32 pixels")
    odd = {"FullPanoWidthPixels": "wide", "CroppedAreaImageWidthPixels": ""}
    for tags in (WHOLE, WHOLE | odd, without_poles, {"ProjectionType": "equirectangular"}):
        assert not reason(with_xmp(gpano(**tags), smooth())), tags


def test_a_raw_photo_is_refused() -> None:
    page = Image.fromarray(smooth())
    for tags in ({254: 1, 50706: b"\1\4\0\0"}, {50706: b"\1\4\0\0"}, {254: 1}):
        content = io.BytesIO()
        page.save(content, "TIFF", save_all=True, append_images=[page], tiffinfo=tags)
        assert reason(content.getvalue()).startswith("raw photo (DNG): ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"v/1\x01\2\0\0\0channels", "format not supported: OpenEXR; convert it to PNG"),
        (b"#?RADIANCE\nFORMAT=32", "format not supported: Radiance HDR; convert it to PNG"),
        (b"\xff\x0a\0\0\0\0\0\0\0\0", "format not supported: JPEG XL; convert it to PNG"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "format not supported: a video"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50), "broken picture: a HEIC or AVIF"),
        (b"\xff\xd8\xff\xe0", "broken picture: a JPEG that is damaged"),
        (b"<html>", "not a picture"),
        (b"", "not a picture"),
    ],
)
def test_other_files_are_refused_with_a_remedy(content: bytes, expected: str) -> None:
    assert reason(content).startswith(expected)


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "a.jpg").write_bytes(pointer)
    assert reason(pointer) == reason(tmp_path / "a.jpg") == GIT_LFS_POINTER


def test_a_picture_in_memory_has_the_pixels_of_its_file() -> None:
    opacity = np.full((64, 128), 255, np.uint8)
    opacity[:16] = 0
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for content in (
        encode(np.dstack([smooth(), opacity]), "a.png"),
        encode(smooth()[..., 0].astype(np.uint16) * 257, "a.tif"),
        encode(smooth(), "a.tif", exif=exif),
        encode(smooth(), "a.png", exif=exif),
        with_exif(smooth(), "a.png", ODD_EXIF["pointer as text"][0]),
    ):
        with Image.open(io.BytesIO(content)) as opened:
            assert np.array_equal(convert_panorama(opened, 128), read_panorama(content, 128))


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="needs the shared data")
def test_the_reported_cases_are_right(tmp_path: Path) -> None:
    refused = {
        "01-cut-off": "cut off: ",
        "cropped-2to1.jpg": "part of a panorama: ",
        "zero-denominator.jpg": "not 2:1: 128 x 256 pixels by its EXIF orientation 6",
        "30-theta.dng": "raw photo (DNG): ",
        "36-empty.jpg": "not a picture",
        "36-heic.heic": "broken picture: ",
        "36-pano.exr": "format not supported: ",
    }
    count = 0
    for folder in ("01", "02", "04", "12"):
        for file in next((SHARED / "cases").glob(f"{folder}-*")).iterdir():
            if file.suffix in (".py", ".md"):
                continue
            shutil.copy(file, tmp_path / "picture")
            place = f"{file.parent.name}/{file.name}"
            expected = next((start for part, start in refused.items() if part in place), "")
            for width in (64, 256):
                message = reason(tmp_path / "picture", width)
                assert message.startswith(expected) and bool(message) == bool(expected), file
            count += 1
    assert count > 40
