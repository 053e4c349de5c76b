"""A panorama is read whole, upright and no larger than needed, or refused with its fault."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, features

from panollava.data.images import read_panorama
from panollava.errors import UserError


def smooth(height: int, width: int) -> np.ndarray:
    """Brightness rises to the right and downwards, red and green; blue is flat."""
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
    found = picture.shape[1]
    assert min(width, 800) <= found < 2 * width
    assert found == width if width in (800, 400, 100) else found > width or width > 800
    assert picture.dtype == np.uint8
    assert picture.shape == ((found + 1) // 2, found, 3)
    assert np.abs(picture.astype(int) - smooth(*picture.shape[:2])).max() <= 6


@pytest.mark.parametrize("size", [(401, 801), (333, 667), (751, 1502)])
def test_odd_sizes_lose_nothing(tmp_path: Path, size: tuple[int, int]) -> None:
    for name in ("a.jpg", "a.png"):
        picture = read_panorama(save(tmp_path / name, smooth(*size)), 200)
        assert 200 <= picture.shape[1] < 400
        # A scale that doesn't divide the size stretches it by less than a pixel: 150 / 200.
        assert np.abs(picture.astype(int) - smooth(*picture.shape[:2])).max() <= 6


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA", "YCbCr"])
def test_every_mode_of_8_bits_becomes_rgb(tmp_path: Path, mode: str) -> None:
    name = "a.tif" if mode in ("CMYK", "YCbCr") else "a.png"
    grey = np.repeat(smooth(100, 200)[..., :1], 3, axis=2)
    Image.fromarray(grey).convert(mode).save(tmp_path / name)
    picture = read_panorama(tmp_path / name, 200)
    assert picture.shape == (100, 200, 3)
    if mode not in ("1", "P"):
        assert np.abs(picture.astype(int) - grey).max() <= 3


def test_a_grey_jpeg_becomes_rgb(tmp_path: Path) -> None:
    grey = smooth(100, 200)[..., 0]
    picture = read_panorama(save(tmp_path / "a.jpg", grey, quality=95), 100)
    assert picture.shape == (50, 100, 3)
    assert (picture[..., 0] == picture[..., 1]).all()
    assert np.abs(picture[..., 0].astype(int) - grey[::2, ::2]).max() <= 4


@pytest.mark.parametrize("bits", ["uint16", "int32", "float32"])
def test_more_than_8_bits_are_refused_rather_than_cut_off(tmp_path: Path, bits: str) -> None:
    deep = (np.arange(20000).reshape(100, 200) * 3).astype(bits)
    path = save(tmp_path / "a.tif", deep)
    with pytest.raises(UserError, match=r"a\.tif: not 8 bits: pixels of mode .*8 bits a channel"):
        read_panorama(path, 100)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_as_its_exif_data_says(tmp_path: Path, orientation: int) -> None:
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


@pytest.mark.parametrize("size", [(400, 400), (200, 420), (200, 390), (400, 200), (1, 1)])
def test_what_is_not_2_to_1_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(tmp_path / "a.jpg", smooth(*size))
    with pytest.raises(UserError, match=rf"a\.jpg: not 2:1: {size[1]} x {size[0]} pixels"):
        read_panorama(path, 100)


@pytest.mark.parametrize("width", [397, 403])
def test_one_percent_from_2_to_1_is_let_pass(tmp_path: Path, width: int) -> None:
    assert read_panorama(save(tmp_path / "a.jpg", smooth(200, width)), 400).shape[0] == 200


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.99])
def test_a_picture_that_was_cut_off_is_refused(tmp_path: Path, name: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 400, 3), dtype=np.uint8)
    path = save(tmp_path / name, noise)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    for width in (400, 50):
        with pytest.raises(UserError, match=rf"{name}: (broken picture|not a picture)"):
            read_panorama(path, width)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404 Not Found</html>")
    with pytest.raises(UserError, match=r"page\.jpg: not a picture that can be read"):
        read_panorama(tmp_path / "page.jpg", 100)
    with pytest.raises(UserError, match=r"gone\.jpg: picture missing"):
        read_panorama(tmp_path / "gone.jpg", 100)
    with pytest.raises(UserError, match=r": broken picture: Is a directory$"):
        read_panorama(tmp_path, 100)


def test_a_reason_is_the_same_wherever_the_picture_lies(tmp_path: Path) -> None:
    """Reasons go into an output of the pipeline, which must not depend on the machine's folders."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 400, 3), dtype=np.uint8)
    whole = save(tmp_path / "whole.jpg", noise).read_bytes()
    for content in (
        whole[: len(whole) // 2],
        b"nothing",
        save(tmp_path / "b.png", noise[:50]).read_bytes(),
    ):
        reasons = set()
        for folder in (tmp_path / "one", tmp_path / "another"):
            folder.mkdir(exist_ok=True)
            (folder / "a.jpg").write_bytes(content)
            with pytest.raises(UserError) as error:
                read_panorama(folder / "a.jpg", 100)
            reasons.add(str(error.value).removeprefix(f"{folder / 'a.jpg'}: "))
        assert len(reasons) == 1
        assert str(tmp_path) not in reasons.pop()


def test_large_panoramas_are_no_attack(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """16,384 x 8,192, which Pillow warns of, is what today's cameras stitch."""
    Image.new("L", (16384, 8192), 77).save(tmp_path / "a.jpg", quality=30)
    assert read_panorama(tmp_path / "a.jpg", 1000).shape == (512, 1024, 3)
    assert not recwarn.list


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}]
)
@pytest.mark.parametrize("width", [3000, 1400, 700, 350, 130])
def test_rows_that_nobody_looks_at_change_nothing_above_them(
    tmp_path: Path, width: int, options: dict[str, Any]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (703, 1409, 3), dtype=np.uint8)
    for mode in ("RGB", "L"):
        path = tmp_path / f"{mode}.jpg"
        Image.fromarray(noise).convert(mode).save(path, quality=90, **options)
        whole = read_panorama(path, width)
        for until in (0.0, 0.3, 0.75, 0.9, 1.0):
            part = read_panorama(path, width, until)
            assert part.shape == whole.shape
            rows = min(len(whole), int(until * len(whole)) + 2)  # with those beside, to interpolate
            assert np.array_equal(part[:rows], whole[:rows])
            assert part.any(axis=(1, 2)).mean() < until + 0.3


def test_markers_may_be_filled_up(tmp_path: Path) -> None:
    """As the standard lets them be, with bytes that look like a marker of their own."""
    jpeg = save(tmp_path / "a.jpg", smooth(800, 1600), quality=90, comment=b"x" * 500).read_bytes()
    at = jpeg.index(b"\xff\xfe")
    (tmp_path / "filled.jpg").write_bytes(jpeg[:at] + b"\xff" * 3 + jpeg[at:])
    part = read_panorama(tmp_path / "filled.jpg", 1600, 0.5)
    assert np.array_equal(part, read_panorama(tmp_path / "a.jpg", 1600, 0.5))
    assert not part[600:].any()


@pytest.mark.parametrize("name", ["a.png", "upside down.jpg"])
def test_where_rows_cannot_be_left_out_they_are_read(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    path = save(tmp_path / name, smooth(400, 800), exif=exif)
    assert np.array_equal(read_panorama(path, 800, 0.5), read_panorama(path, 800))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.9, 0.99, 0.9999])
def test_a_picture_cut_off_where_nobody_looks_is_refused(tmp_path: Path, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 800, 3), dtype=np.uint8)
    for progressive in (False, True):
        path = save(tmp_path / "a.jpg", noise, progressive=progressive)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=r"a\.jpg: (broken picture|not a picture)"):
            read_panorama(path, 400, 0.5)


def as_pillow_has_it(path: Path, width: int) -> np.ndarray:
    """Empty if it finds it broken."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (width, 1))
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return np.zeros(0)


@pytest.mark.parametrize("size", [(200, 400), (201, 403), (333, 667), (751, 1502), (17, 34)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_jpeg_has_the_pixels_that_pillow_gives_it(
    tmp_path: Path, size: tuple[int, int], subsampling: int
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    path = save(tmp_path / "a.jpg", noise, subsampling=subsampling)
    for width in (size[1], size[1] // 2, size[1] // 2 + 1, size[1] // 3, size[1] // 8):
        if width > 8:
            assert np.array_equal(read_panorama(path, width), as_pillow_has_it(path, width))


def test_a_jpeg_for_print_becomes_rgb(tmp_path: Path) -> None:
    Image.fromarray(smooth(200, 400)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    picture = read_panorama(tmp_path / "a.jpg", 100, 0.5)
    assert np.abs(picture.astype(int) - smooth(50, 100)).max() <= 6


@pytest.mark.parametrize("progressive", [False, True])
def test_a_damaged_jpeg_is_what_pillow_takes_it_for(tmp_path: Path, progressive: bool) -> None:
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (20, 40, 3), dtype=np.uint8))
    path = tmp_path / "a.jpg"
    noise.resize((400, 200)).save(path, progressive=progressive)
    whole = path.read_bytes()
    refused = 0
    for turn in range(300):
        damaged, at = bytearray(whole), int(random.integers(2, len(whole) - 4))
        if turn % 3 == 0:
            damaged[at] = random.integers(256)
        elif turn % 3 == 1:
            del damaged[at : random.integers(at, len(whole) - 2)]
        else:
            damaged[at : at + 2] = b"\xff\xd9"  # the end, too early
        path.write_bytes(damaged)
        wanted = as_pillow_has_it(path, 200)
        if wanted.shape != (100, 200, 3):
            refused += 1
            with pytest.raises(UserError):
                read_panorama(path, 200)
        else:
            assert np.array_equal(read_panorama(path, 200), wanted)
    assert 3 < refused < 100


def test_a_fault_of_the_header_hides_no_pixel(tmp_path: Path) -> None:
    """Bytes between two segments: Pillow, like libjpeg, passes over them."""
    path = save(tmp_path / "a.jpg", smooth(200, 400))
    jpeg = path.read_bytes()
    at = jpeg.index(b"\xff\xdb")  # the first table
    path.write_bytes(jpeg[:at] + b"\x00\x01\x02" + jpeg[at:])
    assert np.array_equal(read_panorama(path, 200), as_pillow_has_it(path, 200))
    assert read_panorama(path, 200).any()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_a_broken_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.avif", smooth(100, 200))
    whole, media = path.read_bytes(), path.read_bytes().index(b"mdat") + 4
    path.write_bytes(whole[:media] + bytes(len(whole) - media))
    with pytest.raises(UserError, match=r"a\.avif: broken picture: Failed to decode"):
        read_panorama(path, 100)
