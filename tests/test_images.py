"""A panorama is decoded completely, upright and no larger than needed, or rejected."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, features

from panollava.data.images import PictureError, read_panorama, roll


def smooth(height: int, width: int) -> np.ndarray:
    """Red increases to the right, green downwards; blue is constant."""
    rows, columns = np.mgrid[:height, :width]
    red, green = 40 + 150 * columns / width, 40 + 150 * rows / height
    return np.stack([red, green, np.full_like(red, 99)], axis=-1).round().astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.bmp"])
@pytest.mark.parametrize("width", [1000, 800, 500, 400, 399, 250, 150, 100, 90])
def test_the_scale_is_the_smallest_that_is_wide_enough(
    tmp_path: Path, name: str, width: int
) -> None:
    options = {"quality": 95} if name in ("a.jpg", "a.webp") else {}
    picture = read_panorama(save(tmp_path / name, smooth(400, 800), **options), width)
    decoded = picture.shape[1]
    assert min(width, 800) <= decoded < 2 * width
    assert decoded == width if width in (800, 400, 100) else decoded > width or width > 800
    assert picture.dtype == np.uint8
    assert picture.shape == ((decoded + 1) // 2, decoded, 3)
    assert np.abs(picture.astype(int) - smooth(*picture.shape[:2])).max() <= 6


@pytest.mark.parametrize("size", [(401, 801), (333, 667), (751, 1502)])
def test_odd_sizes_are_decoded_completely(tmp_path: Path, size: tuple[int, int]) -> None:
    for name in ("a.jpg", "a.png"):
        picture = read_panorama(save(tmp_path / name, smooth(*size)), 200)
        assert 200 <= picture.shape[1] < 400
        # A scale that does not divide the size stretches it by less than a pixel: 150 / 200.
        assert np.abs(picture.astype(int) - smooth(*picture.shape[:2])).max() <= 6


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_scale_beyond_an_eighth_is_averaged(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, smooth(400, 800))
    assert [read_panorama(path, width).shape[1] for width in (50, 49, 33, 25)] == [50, 50, 34, 25]


def test_a_roll_moves_the_front_to_the_right_by_the_nearest_column() -> None:
    panorama = np.arange(16)[None].repeat(2, axis=0)  # its front is between columns 7 and 8
    for degrees, columns in ((0, 0), (90, 4), (56, 2), (57, 3), (-90, -4), (350, 0)):
        assert roll(panorama, degrees)[1, (8 + columns) % 16] == 8, degrees


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA", "YCbCr"])
def test_every_8_bit_mode_is_converted_to_rgb(tmp_path: Path, mode: str) -> None:
    name = "a.tif" if mode in ("CMYK", "YCbCr") else "a.png"
    gray = np.repeat(smooth(100, 200)[..., :1], 3, axis=2)
    Image.fromarray(gray).convert(mode).save(tmp_path / name)
    picture = read_panorama(tmp_path / name, 200)
    assert picture.shape == (100, 200, 3)
    if mode not in ("1", "P"):
        assert np.abs(picture.astype(int) - gray).max() <= 3


def test_a_gray_jpeg_is_converted_to_rgb(tmp_path: Path) -> None:
    gray = smooth(100, 200)[..., 0]
    picture = read_panorama(save(tmp_path / "a.jpg", gray, quality=95), 100)
    assert picture.shape == (50, 100, 3)
    assert (picture[..., 0] == picture[..., 1]).all()
    assert np.abs(picture[..., 0].astype(int) - gray[::2, ::2]).max() <= 4


@pytest.mark.parametrize("bits", ["uint16", "int32", "float32"])
def test_more_than_8_bits_are_rejected_rather_than_clipped(tmp_path: Path, bits: str) -> None:
    deep = (np.arange(20000).reshape(100, 200) * 3).astype(bits)
    path = save(tmp_path / "a.tif", deep)
    with pytest.raises(PictureError, match=r"a\.tif: not 8 bits: pixels of mode .*8 bits per"):
        read_panorama(path, 100)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(smooth(200, 400))
    turns = Image.Transpose
    stored = {
        1: [],
        2: [turns.FLIP_LEFT_RIGHT],
        3: [turns.ROTATE_180],
        4: [turns.FLIP_TOP_BOTTOM],
        5: [turns.TRANSPOSE],
        6: [turns.ROTATE_90],
        7: [turns.TRANSVERSE],
        8: [turns.ROTATE_270],
    }[orientation]
    for turn in stored:
        upright = upright.transpose(turn)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    upright.save(tmp_path / "a.jpg", exif=exif, quality=95)
    picture = read_panorama(tmp_path / "a.jpg", 100)
    assert picture.shape == (50, 100, 3)
    assert np.abs(picture.astype(int) - smooth(50, 100)).max() <= 6


@pytest.mark.parametrize("size", [(400, 400), (200, 406), (200, 394), (400, 200), (1, 1)])
def test_a_picture_that_is_not_2_to_1_is_rejected(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(tmp_path / "a.jpg", smooth(*size))
    with pytest.raises(PictureError, match=rf"a\.jpg: not 2:1: {size[1]} x {size[0]} pixels"):
        read_panorama(path, 100)


@pytest.mark.parametrize("width", [397, 403])
def test_one_percent_from_2_to_1_is_accepted(tmp_path: Path, width: int) -> None:
    assert read_panorama(save(tmp_path / "a.jpg", smooth(200, width)), 400).shape[0] == 200


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.99])
def test_a_truncated_picture_is_rejected(tmp_path: Path, name: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 400, 3), dtype=np.uint8)
    path = save(tmp_path / name, noise)
    complete = path.read_bytes()
    path.write_bytes(complete[: int(share * len(complete))])
    for width in (400, 50):
        with pytest.raises(PictureError, match=rf"{name}: (broken picture|not a picture)"):
            read_panorama(path, width)


def test_a_file_that_is_not_a_picture_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404 Not Found</html>")
    with pytest.raises(PictureError, match=r"page\.jpg: not a picture$"):
        read_panorama(tmp_path / "page.jpg", 100)
    with pytest.raises(PictureError, match=r"gone\.jpg: picture missing"):
        read_panorama(tmp_path / "gone.jpg", 100)
    with pytest.raises(PictureError, match=r": picture cannot be read: Is a directory$"):
        read_panorama(tmp_path, 100)


def test_a_reason_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    """Reasons are part of the pipeline's outputs, which must be the same on every machine."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 400, 3), dtype=np.uint8)
    complete = save(tmp_path / "complete.jpg", noise).read_bytes()
    for content in (
        complete[: len(complete) // 2],
        b"nothing",
        save(tmp_path / "b.png", noise[:50]).read_bytes(),
    ):
        reasons = set()
        for folder in (tmp_path / "one", tmp_path / "another"):
            folder.mkdir(exist_ok=True)
            (folder / "a.jpg").write_bytes(content)
            with pytest.raises(PictureError) as error:
                read_panorama(folder / "a.jpg", 100)
            reasons.add(error.value.reason)
            assert str(error.value) == f"{folder / 'a.jpg'}: {error.value.reason}"
        assert len(reasons) == 1
        assert str(tmp_path) not in reasons.pop()


def test_large_panoramas_give_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Pillow warns of 16,384 x 8,192 pixels by default, a common size of panoramas."""
    Image.new("L", (16384, 8192), 77).save(tmp_path / "a.jpg", quality=30)
    assert read_panorama(tmp_path / "a.jpg", 1000).shape == (512, 1024, 3)
    assert not recwarn.list


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}]
)
@pytest.mark.parametrize("width", [3000, 1400, 700, 350, 130])
def test_skipping_invisible_rows_does_not_change_the_rows_above(
    tmp_path: Path, width: int, options: dict[str, Any]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (703, 1409, 3), dtype=np.uint8)
    for mode in ("RGB", "L"):
        path = tmp_path / f"{mode}.jpg"
        Image.fromarray(noise).convert(mode).save(path, quality=90, **options)
        complete = read_panorama(path, width)
        for fraction in (0.0, 0.3, 0.75, 0.9, 1.0):
            part = read_panorama(path, width, fraction)
            assert part.shape == complete.shape
            rows = min(len(complete), int(fraction * len(complete)) + 2)  # two more, to interpolate
            assert np.array_equal(part[:rows], complete[:rows])
            assert part.any(axis=(1, 2)).mean() < fraction + 0.3


def test_fill_bytes_before_a_jpeg_marker_are_skipped(tmp_path: Path) -> None:
    """The standard allows them, although they look like markers themselves."""
    jpeg = save(tmp_path / "a.jpg", smooth(800, 1600), quality=90, comment=b"x" * 500).read_bytes()
    at = jpeg.index(b"\xff\xfe")
    (tmp_path / "filled.jpg").write_bytes(jpeg[:at] + b"\xff" * 3 + jpeg[at:])
    part = read_panorama(tmp_path / "filled.jpg", 1600, 0.5)
    assert np.array_equal(part, read_panorama(tmp_path / "a.jpg", 1600, 0.5))
    assert not part[600:].any()


@pytest.mark.parametrize("name", ["a.png", "upside down.jpg"])
def test_rows_that_cannot_be_skipped_are_read(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    path = save(tmp_path / name, smooth(400, 800), exif=exif)
    assert np.array_equal(read_panorama(path, 800, 0.5), read_panorama(path, 800))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.9, 0.99, 0.9999])
def test_a_picture_truncated_in_invisible_rows_is_rejected(tmp_path: Path, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 800, 3), dtype=np.uint8)
    for progressive in (False, True):
        path = save(tmp_path / "a.jpg", noise, progressive=progressive)
        complete = path.read_bytes()
        path.write_bytes(complete[: int(share * len(complete))])
        with pytest.raises(PictureError, match=r"a\.jpg: (broken picture|not a picture)"):
            read_panorama(path, 400, 0.5)


def decoded_by_pillow(path: Path, width: int) -> np.ndarray:
    """Empty if Pillow rejects the file."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (width, 1))
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return np.zeros(0)


@pytest.mark.parametrize("size", [(200, 400), (201, 403), (333, 667), (751, 1502), (17, 34)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_jpeg_has_the_same_pixels_as_with_pillow(
    tmp_path: Path, size: tuple[int, int], subsampling: int
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    path = save(tmp_path / "a.jpg", noise, subsampling=subsampling)
    for width in (size[1], size[1] // 2, size[1] // 2 + 1, size[1] // 3, size[1] // 8):
        if width > 8:
            assert np.array_equal(read_panorama(path, width), decoded_by_pillow(path, width))


def test_a_cmyk_jpeg_is_converted_to_rgb(tmp_path: Path) -> None:
    Image.fromarray(smooth(200, 400)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    picture = read_panorama(tmp_path / "a.jpg", 100, 0.5)
    assert np.abs(picture.astype(int) - smooth(50, 100)).max() <= 6


@pytest.mark.parametrize("progressive", [False, True])
def test_a_damaged_jpeg_is_treated_as_by_pillow(tmp_path: Path, progressive: bool) -> None:
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (20, 40, 3), dtype=np.uint8))
    path = tmp_path / "a.jpg"
    noise.resize((400, 200)).save(path, progressive=progressive)
    complete = path.read_bytes()
    rejected = 0
    for trial in range(300):
        damaged, at = bytearray(complete), int(random.integers(2, len(complete) - 4))
        if trial % 3 == 0:
            damaged[at] = random.integers(256)
        elif trial % 3 == 1:
            del damaged[at : random.integers(at, len(complete) - 2)]
        else:
            damaged[at : at + 2] = b"\xff\xd9"  # an early end marker
        path.write_bytes(damaged)
        expected = decoded_by_pillow(path, 200)
        if expected.shape != (100, 200, 3):
            rejected += 1
            with pytest.raises(PictureError):
                read_panorama(path, 200)
        else:
            assert np.array_equal(read_panorama(path, 200), expected)
    assert 3 < rejected < 100


def test_junk_between_header_segments_is_skipped(tmp_path: Path) -> None:
    """As Pillow and libjpeg do."""
    path = save(tmp_path / "a.jpg", smooth(200, 400))
    jpeg = path.read_bytes()
    at = jpeg.index(b"\xff\xdb")  # the first table
    path.write_bytes(jpeg[:at] + b"\x00\x01\x02" + jpeg[at:])
    assert np.array_equal(read_panorama(path, 200), decoded_by_pillow(path, 200))
    assert read_panorama(path, 200).any()


def test_a_picture_in_memory_has_the_pixels_of_its_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (351, 703, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg"):
        path = save(tmp_path / name, noise)
        for width, fraction in ((703, 0.75), (350, 1.0), (65, 0.75)):
            expected = read_panorama(path, width, fraction)
            assert np.array_equal(read_panorama(path.read_bytes(), width, fraction), expected)
    with pytest.raises(PictureError, match="^picture: not a picture$"):
        read_panorama(b"", 100)
    with pytest.raises(PictureError, match="^picture: broken picture: "):
        read_panorama(path.read_bytes()[:9999], 350)


def test_a_picture_of_too_many_pixels_is_rejected_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.png", smooth(200, 400))
    assert read_panorama(path, 100, max_pixels=80_000).any()
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="too large: 400 x 200 pixels, limit 79,999 in all"):
        read_panorama(path, 100, max_pixels=79_999)


@pytest.mark.parametrize("kind", ["EPS", "PCX"])
def test_formats_that_no_panorama_has_are_not_opened(tmp_path: Path, kind: str) -> None:
    """Pillow runs Ghostscript to read EPS."""
    path = save(tmp_path / "a.jpg", smooth(200, 400), format=kind)
    with pytest.raises(PictureError, match=r"a\.jpg: not a picture$"):
        read_panorama(path, 100)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot read AVIF")
def test_a_damaged_avif_is_a_broken_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.avif", smooth(100, 200))
    content = path.read_bytes()
    media = content.index(b"mdat") + 4
    path.write_bytes(content[:media] + bytes(len(content) - media))
    with pytest.raises(PictureError, match=r"a\.avif: broken picture: Failed to decode"):
        read_panorama(path, 100)
