"""Pictures of many kinds become upright 2:1 panoramas; what cannot be one is refused with the
reason, and nothing is ever overwritten."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from pillow_heif import register_heif_opener

from panollava.cli.main import main
from panollava.data.convert import convert
from panollava.data.images import (
    Picture,
    PictureError,
    read_gpano_tags,
    read_panorama,
    read_picture,
)
from panollava.data.panorama_files import save_panorama
from panollava.data.upright import LAYOUTS, Conversion, make_upright
from panollava.errors import UserError
from panollava.geometry.projections import panorama_rays
from panollava.geometry.reprojection import CROSSES, CUBE, cube_faces
from panollava.geometry.sphere import cell_centers, rotation

register_heif_opener()  # to save pictures

HEIGHT, WIDTH, SIDE = 256, 512, 128
TIMES: dict[int, str] = {
    ExifTags.Base.DateTimeOriginal: "2020:02:03 04:05:06",
    ExifTags.Base.OffsetTimeOriginal: "+02:00",
    ExifTags.Base.SubsecTimeOriginal: "07",
}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    'syntax-ns#"><rdf:Description rdf:about="" xmlns:GPano="http://ns.google.com/photos/1.0/'
    'panorama/" {}/></rdf:RDF></x:xmpmeta>'
)


def colors(rays: np.ndarray) -> np.ndarray:
    """Directions as colors, uint8; no part of the sphere is dark."""
    return np.rint(140 + 110 * rays).astype(np.uint8)


def directions(pixels: np.ndarray) -> np.ndarray:
    rays = (pixels.astype(float) - 140) / 110
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


WORLD = colors(panorama_rays(HEIGHT, WIDTH))


def angle(pixels: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Degrees between what pixels say and rays, (...). Colors are exact to 0.5 degrees."""
    chord = np.linalg.norm(directions(pixels) - rays, axis=-1)
    return np.degrees(2 * np.arcsin(chord / 2))


def gpano(**tags: object) -> bytes:
    return XMP.format(" ".join(f'GPano:{name}="{value}"' for name, value in tags.items())).encode()


def crop_tags(left: int, top: int, width: int, height: int, full: int = WIDTH) -> dict[str, object]:
    return {
        "ProjectionType": "equirectangular",
        "FullPanoWidthPixels": full,
        "FullPanoHeightPixels": full // 2,
        "CroppedAreaImageWidthPixels": width,
        "CroppedAreaImageHeightPixels": height,
        "CroppedAreaLeftPixels": left,
        "CroppedAreaTopPixels": top,
    }


def picture(pixels: np.ndarray, **tags: object) -> Picture:
    return Picture(pixels, {name: str(value) for name, value in tags.items()}, Image.Exif(), None)


def save(path: Path, pixels: np.ndarray = WORLD, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jpg", ".heic"):
        options = {"quality": 98, **options}
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]
    return path


def upright(pixels: np.ndarray, conversion: Conversion, **tags: object) -> np.ndarray:
    return make_upright([picture(pixels, **tags)], conversion).panorama


# What a picture is


def test_a_part_is_placed_by_its_tags_and_its_unseen_share_reported() -> None:
    left, top, width, height = 100, 60, 200, 90
    part = WORLD[top : top + height, left : left + width]
    made = make_upright([picture(part, **crop_tags(left, top, width, height))], Conversion())
    np.testing.assert_array_equal(made.panorama[top : top + height, left : left + width], part)
    black = (made.panorama == 0).all(axis=-1)
    assert black.sum() == black.size - part.shape[0] * part.shape[1]
    pitch = np.pi * (cell_centers(HEIGHT) - 0.5)
    share = (black * np.cos(pitch)[:, None]).sum() / (WIDTH * np.cos(pitch).sum())
    assert made.notes == [f"placed in the full sphere, {share:.1%} of which nobody saw: black"]


@pytest.mark.parametrize("left", [400, -112])
def test_a_part_may_continue_beyond_the_seam(left: int) -> None:
    part = np.roll(WORLD, -left, axis=1)[:, :200]
    whole = upright(part, Conversion(), **crop_tags(left, 0, 200, HEIGHT))
    seen = whole.any(axis=-1)
    assert seen.sum() == 200 * HEIGHT
    np.testing.assert_array_equal(whole[seen], WORLD[seen])


def test_a_part_that_was_saved_smaller_than_its_tags_say_is_placed_too() -> None:
    part = WORLD[64:192, 128:384]
    tags = crop_tags(4 * 128, 4 * 64, 4 * 256, 4 * 128, 4 * WIDTH)
    whole = upright(part, Conversion(), **tags)
    np.testing.assert_array_equal(whole[64:192, 128:384], part)


@pytest.mark.parametrize(
    "wrong",
    [
        {"CroppedAreaTopPixels": 200},
        {"CroppedAreaLeftPixels": "left"},
        {"CroppedAreaLeftPixels": 10**9},
        {"FullPanoHeightPixels": 1000},
    ],
)
def test_contradictory_tags_are_refused(wrong: dict[str, object]) -> None:
    part = WORLD[60:150, 100:300]
    with pytest.raises(PictureError, match="contradictory GPano tags: 200 x 90 pixels do not fit"):
        upright(part, Conversion(), **(crop_tags(100, 60, 200, 90) | wrong))


def test_a_huge_sphere_is_refused_before_it_is_made() -> None:
    tags = crop_tags(0, 0, 2, 1, 2 * 10**6)
    with pytest.raises(PictureError, match="too large"):
        upright(WORLD, Conversion(), **tags)


STEREO = {
    "top-bottom": (0, WORLD),
    "side-by-side": (1, WORLD),
    "top-bottom, squeezed": (0, colors(panorama_rays(HEIGHT // 2, WIDTH))),
    "side-by-side, squeezed": (1, colors(panorama_rays(HEIGHT, WIDTH // 2))),
}


@pytest.mark.parametrize("layout", STEREO)
@pytest.mark.parametrize("eye", ["left", "right"])
def test_one_eye_of_a_stereo_pair_is_taken(layout: str, eye: str) -> None:
    axis, seen = STEREO[layout]
    other = 255 - seen
    pair = np.concatenate([seen, other] if eye == "left" else [other, seen], axis=axis)
    whole = upright(pair, Conversion(layout.split(",")[0], eye))
    assert whole.shape == WORLD.shape
    assert angle(whole, panorama_rays(HEIGHT, WIDTH)).max() < 1.2  # two pixels are one, squeezed
    if "squeezed" not in layout:  # then the proportions tell the layout
        np.testing.assert_array_equal(whole, seen)
        np.testing.assert_array_equal(upright(pair, Conversion(eye=eye)), seen)


def test_an_eye_of_180_degrees_is_placed_in_the_middle() -> None:
    front = WORLD[:, WIDTH // 4 : -WIDTH // 4]
    made = make_upright(
        [picture(np.concatenate([255 - front, front], axis=1))], Conversion("vr180", "right")
    )
    np.testing.assert_array_equal(made.panorama[:, WIDTH // 4 : -WIDTH // 4], front)
    assert made.panorama[:, : WIDTH // 4].max() == 0
    assert "50.0% of which nobody saw" in made.notes[0]


@pytest.mark.parametrize(("height", "width"), [(256, 512), (300, 400)])
def test_an_eye_of_an_unclear_pair_is_refused(height: int, width: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    with pytest.raises(PictureError, match=f"{width} x {height} pixels; name the pair's layout"):
        upright(noise, Conversion(eye="left"))


def cube(rows: tuple[str, ...]) -> np.ndarray:
    """A picture of the world on a cube's faces."""
    pixels = np.zeros((len(rows) * SIDE, len(rows[0]) * SIDE, 3), np.uint8)
    for face in cube_faces(rows, SIDE):
        square = colors(face.projection.rays(cell_centers(SIDE), cell_centers(SIDE)))
        square = square[::-1, ::-1] if face.is_upside_down else square
        pixels[face.top : face.top + SIDE, face.left : face.left + SIDE] = square
    return pixels


@pytest.mark.parametrize(
    "rows", [*CROSSES, ("frblud",), tuple("lfrbud"), ("rlu", "dfb"), ("rl", "Ud", "fb")]
)
def test_a_cube_is_made_a_panorama(rows: tuple[str, ...]) -> None:
    is_cross = "." in rows[0]
    conversion = Conversion("cross") if is_cross else Conversion("strip", faces="".join(rows))
    assert angle(upright(cube(rows), conversion), panorama_rays(HEIGHT, WIDTH)).max() < 0.9


def test_a_picture_of_other_proportions_is_no_cross_and_no_strip() -> None:
    with pytest.raises(PictureError, match="512 x 256 pixels; a cross has 4 x 3, 3 x 4 squares"):
        upright(WORLD, Conversion("cross"))
    with pytest.raises(PictureError, match="a strip has 6 x 1, 3 x 2, 2 x 3, 1 x 6 squares"):
        upright(WORLD, Conversion("strip", faces="rludfb"))


def test_angles_and_tags_level_a_panorama() -> None:
    angles = (0.0, 17.0, -121.0)
    camera = colors(panorama_rays(HEIGHT, WIDTH) @ rotation(*angles).T)  # what each pixel saw
    tags = {"PosePitchDegrees": 17, "PoseRollDegrees": -121, "PoseHeadingDegrees": 5}
    asked = make_upright([picture(camera)], Conversion(angles=angles))
    by_tags = make_upright([picture(camera, **tags)], Conversion(angles=None))
    assert angle(asked.panorama, panorama_rays(HEIGHT, WIDTH)).max() < 0.9
    np.testing.assert_array_equal(asked.panorama, by_tags.panorama)
    assert asked.notes == by_tags.notes == ["leveled by pitch 17, roll -121"]
    assert by_tags.pose == {"PoseHeadingDegrees": "5"}


def test_tags_of_a_tilt_are_kept_and_named_unless_leveling_is_asked_for() -> None:
    made = make_upright([picture(WORLD, PosePitchDegrees=9)], Conversion())
    np.testing.assert_array_equal(made.panorama, WORLD)
    assert made.pose == {"PosePitchDegrees": "9"}
    assert made.notes == ["still tilted (PosePitchDegrees 9); --level metadata would level it"]


def test_a_part_is_leveled_after_it_is_placed() -> None:
    camera = colors(panorama_rays(HEIGHT, WIDTH) @ rotation(0, 20, 0).T)
    tags = crop_tags(0, 30, WIDTH, 200) | {"PosePitchDegrees": 20}
    whole = upright(camera[30:230], Conversion(angles=None), **tags)
    # The edges of what was seen are blended with black.
    error = angle(whole, panorama_rays(HEIGHT, WIDTH))[whole.min(axis=-1) > 28]
    assert error.size > 0.6 * HEIGHT * WIDTH
    assert np.quantile(error, 0.98) < 0.9


def test_a_panorama_that_is_nearly_2_to_1_becomes_exactly_so() -> None:
    whole = upright(colors(panorama_rays(HEIGHT + 1, WIDTH)), Conversion())
    assert whole.shape == WORLD.shape
    assert angle(whole, panorama_rays(HEIGHT, WIDTH)).max() < 1.2


def test_raw_fisheye_circles_and_other_projections_are_refused() -> None:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    radius = np.hypot(rows - HEIGHT / 2, columns % HEIGHT - HEIGHT / 2) / (HEIGHT / 2)
    circles = np.where(radius[..., None] < 1, WORLD, 0).astype(np.uint8)
    with pytest.raises(PictureError, match="raw fisheye circles: stitch them"):
        upright(circles, Conversion())
    with pytest.raises(PictureError, match="not equirectangular: GPano:ProjectionType is cylind"):
        upright(WORLD, Conversion(), ProjectionType="cylindrical")
    with pytest.raises(PictureError, match="not 2:1: 300 x 300 pixels; stereo pairs need --eye"):
        upright(WORLD[:200, :200].repeat(2, 0)[:300].repeat(2, 1)[:, :300], Conversion())


def test_a_likely_stereo_pair_is_named() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    eye = np.asarray(Image.fromarray(noise).resize((256, 256)))
    notes = make_upright([picture(np.concatenate([eye, eye], axis=1))], Conversion()).notes
    assert notes[0].startswith("may be a stereo pair (its left and right halves are alike)")


# Files


def test_output_files_describe_themselves_and_keep_the_time(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.DateTime] = "2020:02:04 00:00:00"
    exif[ExifTags.Base.Make] = "a camera"
    exif.get_ifd(ExifTags.IFD.Exif).update(TIMES)
    part = WORLD[60:150, 100:300]
    profile = b"\0" * 16 + b"RGB " + b"\0" * 108
    xmp = gpano(**crop_tags(100, 60, 200, 90), PoseHeadingDegrees=12)
    file = save(tmp_path / "a.jpg", part, exif=exif, xmp=xmp, icc_profile=profile)
    for form in ("jpg", "png"):
        convert([file], tmp_path / form, Conversion(form=form), 1)
        result = tmp_path / form / f"a.{form}"
        assert read_gpano_tags(result) == {
            "ProjectionType": "equirectangular",
            "UsePanoramaViewer": "True",
            "FullPanoWidthPixels": "512",
            "FullPanoHeightPixels": "256",
            "CroppedAreaImageWidthPixels": "512",
            "CroppedAreaImageHeightPixels": "256",
            "CroppedAreaLeftPixels": "0",
            "CroppedAreaTopPixels": "0",
            "PoseHeadingDegrees": "12",
        }
        with Image.open(result) as opened:
            assert opened.format == {"jpg": "JPEG", "png": "PNG"}[form]
            kept = opened.getexif()
            assert kept[ExifTags.Base.DateTime] == "2020:02:04 00:00:00"
            assert ExifTags.Base.Make not in kept
            assert dict(kept.get_ifd(ExifTags.IFD.Exif)) == TIMES
            assert opened.info["icc_profile"] == profile
        assert read_panorama(result, WIDTH).shape == WORLD.shape


def test_every_format_16_bits_and_turned_pictures_are_converted(tmp_path: Path) -> None:
    import cv2

    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    files = [
        save(tmp_path / "heic.heic"),
        save(tmp_path / "tiff.tif"),
        save(tmp_path / "webp.webp", lossless=True),
        save(tmp_path / "turned.jpg", np.rot90(WORLD), exif=turned, subsampling=0),
        tmp_path / "deep.png",
        tmp_path / "deeptiff.tif",
    ]
    for file in files[-2:]:
        cv2.imwrite(str(file), WORLD[..., ::-1].astype(np.uint16) * 257)
    convert(files, tmp_path / "out", Conversion(form="png"), 2)
    for file in files:
        made = read_picture(tmp_path / "out" / f"{file.stem}.png").pixels
        assert np.abs(made.astype(int) - WORLD).mean() < 2, file.name


def test_one_bad_file_does_not_stop_the_rest(tmp_path: Path) -> None:
    good = [save(tmp_path / f"in/{name}.jpg") for name in "ab"]
    bad = tmp_path / "in/bad.jpg"
    bad.write_bytes(good[0].read_bytes()[:2000])
    inputs = [good[0], bad, tmp_path / "missing.png", good[1]]
    with pytest.raises(UserError, match="2 of 4 panoramas could not be made") as error:
        convert(inputs, tmp_path / "out", Conversion(), 1)
    assert f"- {bad}: cut off" in str(error.value)
    assert f"- {tmp_path / 'missing.png'}: picture missing" in str(error.value)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("names", [("a.png", "a.webp"), ("A.png", "a.bmp"), ("é.png", "é.bmp")])
def test_colliding_names_are_refused_before_anything_is_written(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    for name in ("first.png", *names):
        save(tmp_path / "in" / name)
    with pytest.raises(UserError, match="would all be written to one file"):
        convert([tmp_path / "in"], tmp_path / "out", Conversion(), 1)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    save(tmp_path / "in/a.png"), save(tmp_path / "in/b.png")
    other = save(tmp_path / "out/b.jpg", 255 - WORLD)
    before = other.read_bytes()
    with pytest.raises(UserError, match=r"b\.jpg: exists, .* Nothing was written"):
        convert([tmp_path / "in"], tmp_path / "out", Conversion(), 1)
    assert other.read_bytes() == before
    assert not (tmp_path / "out/a.jpg").exists()


def test_another_conversion_or_another_picture_is_no_finished_result(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png")
    convert([file], tmp_path / "out", Conversion(), 1)
    with pytest.raises(UserError, match="not the result of this conversion"):
        convert([file], tmp_path / "out", Conversion(angles=(0, 5, 0)), 1)
    save(file, 255 - WORLD)
    with pytest.raises(UserError, match="not the result of this conversion"):
        convert([file], tmp_path / "out", Conversion(), 1)


def test_an_interrupted_run_continues_and_leaves_no_half_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [save(tmp_path / f"in/{name}.png") for name in "abc"]
    saved = []

    def interrupted(path: Path, *arguments: Any) -> None:
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        save_panorama(path, *arguments)

    monkeypatch.setattr("panollava.data.convert.save_panorama", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(files, tmp_path / "out", Conversion(), 1)
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert tmp_path / "out/a.jpg" in finished
    assert tmp_path / "out/b.jpg" not in finished
    convert(files, tmp_path / "out", Conversion(), 1)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.jpg", "b.jpg", "c.jpg"]
    assert all(file.stat().st_mtime_ns == at for file, at in finished.items())


def test_folders_are_searched_and_results_are_not_taken_for_pictures(tmp_path: Path) -> None:
    for name in ("a.png", "deep/a.png", "deep/notes.txt"):
        save(tmp_path / name) if name.endswith("png") else (tmp_path / name).write_text("no")
    for _ in range(2):
        convert([tmp_path], tmp_path / "out", Conversion(), 1)
    made = sorted((tmp_path / "out").rglob("*.*"))
    assert made == [tmp_path / "out/a.jpg", tmp_path / "out/deep/a.jpg"]


FACES = {"f": "front", "r": "right", "b": "back", "l": "left", "u": "up", "d": "down"}
AXES = {"f": "pz", "r": "px", "b": "nz", "l": "nx", "u": "py", "d": "ny"}


def square(letter: str) -> np.ndarray:
    return colors(CUBE[letter].rays(cell_centers(SIDE), cell_centers(SIDE)))


@pytest.mark.parametrize(
    ("name", "made"),
    [
        (lambda letter: f"lake_{FACES[letter]}.png", "lake.png"),
        (lambda letter: f"lake at noon-{letter.upper()}.png", "lake at noon.png"),
        (lambda letter: f"lake/{FACES[letter]}.png", "lake.png"),
        (lambda letter: f"lake/{AXES[letter]}.png", "lake.png"),
    ],
)
def test_six_files_become_a_panorama_by_their_names(
    tmp_path: Path, name: Callable[[str], str], made: str
) -> None:
    for letter in FACES:
        save(tmp_path / "in" / name(letter), square(letter))
    convert([tmp_path / "in"], tmp_path / "out", Conversion("faces", form="png"), 1)
    pixels = read_panorama(tmp_path / "out" / made, WIDTH)
    assert angle(pixels, panorama_rays(HEIGHT, WIDTH)).max() < 0.9


def test_missing_and_unequal_faces_are_named(tmp_path: Path) -> None:
    for letter in "frbl":
        save(tmp_path / "in" / f"lake_{letter}.png", square(letter))
    for letter in FACES:
        save(tmp_path / "in" / f"sea_{letter}.png", square(letter)[: SIDE - (letter == "d")])
    save(tmp_path / "in/other.png")
    with pytest.raises(UserError, match="3 of 3 panoramas could not be made") as error:
        convert([tmp_path / "in"], tmp_path / "out", Conversion("faces"), 1)
    for reason in (
        "lake_r.png: cube faces missing: up, down",
        "sea_r.png: cube faces of several sizes: 128 x 127, 128 x 128 pixels",
        "other.png: no face of a cube by its name",
    ):
        assert reason in str(error.value)


def test_the_command_has_an_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(tmp_path / "a.png")
    main(["convert", str(file), str(tmp_path / "out"), "--pitch", "10", "--workers", "1"])
    assert f"{file} -> {tmp_path / 'out/a.jpg'}: 512 x 256 pixels; leveled by pitch 10" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as status:
        main(["convert", str(file), str(tmp_path / "missing.png"), str(tmp_path / "more")])
    assert "could not be made" in str(status.value.code)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layout vr180", "needs --eye"),
        ("--layout cross --eye left", "--eye: there is none"),
        ("--layout strip", "needs --faces"),
        ("--layout strip --faces rludff", "found 'rludff'"),
        ("--faces rludfb", "only for --layout strip"),
        ("--level metadata --pitch 3", "choose one of them"),
        ("--pitch nan", "expected degrees"),
        ("--layout sphere", f"expected one of {', '.join(LAYOUTS)}"),
        ("--workers 0", "--workers"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: str, message: str) -> None:
    file = save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as status:
        main(["convert", str(file), str(tmp_path / "out"), *options.split()])
    assert message in str(status.value.code)
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f" {layout}" in text for layout in LAYOUTS)


def test_a_file_is_no_folder_to_write_to(tmp_path: Path) -> None:
    for out in (save(tmp_path / "b.png"), tmp_path / "new.jpg"):
        with pytest.raises(UserError, match="the last argument must be a folder"):
            convert([save(tmp_path / "a.png")], out, Conversion(), 1)
