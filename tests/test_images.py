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


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "cmyk.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path: Path, name: str, orientation: int) -> None:
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
    stored_picture = upright.convert("CMYK") if name == "cmyk.jpg" else upright
    stored_picture.save(tmp_path / name, exif=exif, quality=95)
    picture = read_panorama(tmp_path / name, 100)
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
    picture = read_panorama(tmp_path / "a.jpg", 100)
    assert np.abs(picture.astype(int) - smooth(50, 100)).max() <= 6


def test_a_picture_in_memory_has_the_pixels_of_its_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (351, 703, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg"):
        path = save(tmp_path / name, noise)
        for width in (703, 350, 65):
            expected = read_panorama(path, width)
            assert np.array_equal(read_panorama(path.read_bytes(), width), expected)
    with pytest.raises(PictureError, match="^picture: not a picture$"):
        read_panorama(b"", 100)
    with pytest.raises(PictureError, match="^picture: cut off: "):
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
