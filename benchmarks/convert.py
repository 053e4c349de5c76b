"""Panoramas that are leveled, and cubes that become panoramas: time and quality of `convert`.

Against py360convert, which has no command and levels nothing: its sampler gets the places of the
pixels. Against ffmpeg's filter v360 with one thread, if ffmpeg is installed. Quality is compared
with a supersampled reference. The others have their pixels elsewhere: of the references for several
places, the one closest to their result is taken."""

import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(f"{sys.prefix}/bench")  # requirements-bench.txt

import cv2
import numpy as np
import py360convert
from numpy.typing import NDArray
from PIL import Image
from py360convert.utils import EquirecSampler

from measure import PANOLLAVA, Line, options_parser, report, run, time_alternately
from panollava.geometry.projections import PANORAMA, panorama_position
from panollava.geometry.reprojection import CUBE, Face, Reprojection, cube_faces
from panollava.geometry.sphere import cell_centers, rotation
from photos import make_photo

PICTURES, WIDTH = 20, 6000
QUALITY_WIDTH = 1024
ROTATION, ANGLES = ("yaw", "pitch", "roll"), (20.0, 10.0, 5.0)
V360 = {
    "level": f"v360=e:e:yaw={-ANGLES[0]:g}:pitch={-ANGLES[1]:g}:roll={-ANGLES[2]:g}:rorder=rpy",
    "cube": "v360=c3x2:e",  # its order is rludfb
}
ROWS = ("rlu", "dfb")
SUPERSAMPLING = 8  # rays along a pixel's side, for the reference
SECONDS = 2.0  # goal for a picture, decoding and encoding included
Way = Callable[[NDArray[np.uint8]], NDArray]


def main() -> None:
    parser = options_parser(__doc__, repeats=5)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    lines = [*measure_quality(), *measure_samplers(options.repeats)]
    with tempfile.TemporaryDirectory() as name:
        lines += measure_commands(Path(name))
    report(lines, options.out)


def ours(kind: str, width: int) -> Reprojection:
    height = width // 2
    if kind == "level":
        return Reprojection((Face(PANORAMA, 0, 0, width, height),), ANGLES, height, width)
    return Reprojection(cube_faces(ROWS, width // 4), (0, 0, 0), height, width)


def with_py360convert(kind: str, width: int) -> Way:
    """Its maps are computed once, and its sampler takes one channel."""
    height, order = width // 2, 1
    if kind == "cube":
        return partial(cube_with_py360convert, width)
    position = panorama_position(PANORAMA.rays(*grid(width)) @ rotation(*ANGLES))
    x, y = (
        (position[..., axis] * length - 0.5).astype(np.float32)
        for axis, length in ((0, width), (1, height))
    )
    sampler = EquirecSampler(x, y, order)
    return lambda picture: np.stack(
        [sampler(np.ascontiguousarray(picture[..., channel])) for channel in range(3)], axis=-1
    )


def cube_with_py360convert(width: int, picture: NDArray[np.uint8]) -> NDArray:
    side, order = width // 4, "".join(ROWS).upper()
    squares = {
        letter: picture[row * side : (row + 1) * side, column * side : (column + 1) * side]
        for letter, (row, column) in zip(order, np.ndindex(2, 3), strict=True)
    }
    return py360convert.c2e(squares, width // 2, width, cube_format="dict")


def with_v360(kind: str, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    with tempfile.TemporaryDirectory() as name:
        file, out = Path(name, "in.png"), Path(name, "out.png")
        Image.fromarray(picture).save(file, compress_level=1)
        run([*ffmpeg(file), "-vf", f"format=gbrp,{V360[kind]},format=rgb24", out], Path(name))
        return np.asarray(Image.open(out))


def ffmpeg(pictures: Path) -> list[str | Path]:
    options = "-y -loglevel error -threads 1 -filter_threads 1 -i".split()
    return ["ffmpeg", *options, pictures]


def grid(width: int, at: tuple[float, float] = (0.5, 0.5)) -> tuple[NDArray, NDArray]:
    """Fractions of a panorama's width and height, at a place within each pixel."""
    x, y = (np.arange(n) + a for n, a in zip((width, width // 2), at, strict=True))
    return x / width, y / (width // 2)


def points(width: int, at: tuple[float, float]) -> tuple[NDArray, NDArray]:
    """Like `grid`, for pixels whose outer ones are on the panorama's edge."""
    x, y = (np.arange(n) + a - 0.5 for n, a in zip((width, width // 2), at, strict=True))
    return x / (width - 1), y / (width // 2 - 1)


def quarters(width: int, at: tuple[float, float]) -> tuple[NDArray, NDArray]:
    """Like `grid`, for pixels that are a quarter of a pixel from their upper left corners."""
    return grid(width, (at[0] - 0.25, at[1] - 0.25))


# Where a way may have its pixels, and how many of the picture's pixels further it reads.
PLACES = [(places, shift) for places in (grid, points, quarters) for shift in (0.0, 0.5)]


def reference(
    kind: str, picture: NDArray[np.uint8], width: int, places: Callable, shift: float
) -> NDArray:
    """Each pixel is the mean over rays across its area. `shift`: in pixels of the picture."""
    total = np.zeros((width // 2, width, 3), np.float32)
    steps = cell_centers(SUPERSAMPLING)
    source = picture.astype(np.float32)
    for x in steps:
        for y in steps:
            rays = PANORAMA.rays(*places(width, (x, y)))
            total += sample(kind, source, rays, shift)
    return total / SUPERSAMPLING**2


def sample(kind: str, source: NDArray[np.float32], rays: NDArray, shift: float) -> NDArray:
    height, width = source.shape[:2]
    if kind == "level":
        position = panorama_position(rays @ rotation(*ANGLES)) * (width, height) - 0.5 + shift
        position[..., 1] = position[..., 1].clip(0, height - 1)
    else:
        faces = cube_faces(ROWS, width // 3)
        centers = np.stack([f.projection.rays(*np.full((2, 1), 0.5)).ravel() for f in faces], 1)
        nearest = np.argmax(rays @ centers, axis=-1)
        position = np.empty((*rays.shape[:-1], 2))
        for index, face in enumerate(faces):
            mine = nearest == index
            place = face.projection.position(rays[mine])[0] * face.width - 0.5 + shift
            position[mine] = place.clip(0, face.width - 1) + (face.left, face.top)
    x, y = (position[..., axis].astype(np.float32) for axis in (0, 1))
    return cv2.remap(source, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def psnr(one: NDArray, other: NDArray) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(10 * np.log10(255**2 / np.square(one.astype(np.float32) - other).mean()))


def cube_of(panorama: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A picture of the panorama on the faces of a cube."""
    height, width = panorama.shape[:2]
    rows = []
    for letters in ROWS:
        row = []
        for letter in letters:
            rays = CUBE[letter].rays(cell_centers(side), cell_centers(side))
            place = panorama_position(rays) * (width, height) - 0.5
            x, y = (place[..., axis].astype(np.float32) for axis in (0, 1))
            row.append(cv2.remap(panorama, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP))
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows)


def measure_quality() -> list[Line]:
    panorama, lines = make_photo(QUALITY_WIDTH, QUALITY_WIDTH // 2, 0), []
    for kind in ("level", "cube"):
        picture = panorama if kind == "level" else cube_of(panorama, QUALITY_WIDTH // 4)
        references = [reference(kind, picture, QUALITY_WIDTH, *place) for place in PLACES]
        best = psnr(ours(kind, QUALITY_WIDTH).sample(picture), references[0])
        others = {"py360convert": with_py360convert(kind, QUALITY_WIDTH)}
        if shutil.which("ffmpeg"):
            others["v360"] = partial(with_v360, kind)
        for peer, way in others.items():
            result = way(picture)
            other = max(psnr(result, each) for each in references)
            assert other > 15, f"{peer} shows something else"
            ratio = 10 ** ((best - other) / 20)
            name = f"convert, {kind}, PSNR, {peer}"
            lines.append(Line(name, "dB", best, other, ratio=ratio, at_least=1.0))
    return lines


def measure_samplers(repeats: int) -> list[Line]:
    """From an array to an array, maps computed before."""
    panorama, lines = make_photo(WIDTH, WIDTH // 2, 0), []
    for kind in ("level", "cube"):
        picture = panorama if kind == "level" else cube_of(panorama, WIDTH // 4)
        ways = (
            partial(ours(kind, WIDTH).sample, picture),
            partial(with_py360convert(kind, WIDTH), picture),
        )
        times = time_alternately(*ways, repeats=repeats)
        name = f"convert, {kind}, {WIDTH} x {WIDTH // 2}, sampling, py360convert"
        ours_ms, other_ms = (1e3 * seconds for seconds in times)
        lines.append(Line(name, "ms", ours_ms, other_ms, at_least=1.0))
    return lines


def measure_commands(folder: Path) -> list[Line]:
    """Seconds per picture of whole runs, with decoding, encoding and computing the maps."""
    panorama, lines = make_photo(WIDTH, WIDTH // 2, 0), []
    for kind, options in (
        ("level", [f"--{name}={a:g}" for name, a in zip(ROTATION, ANGLES, strict=True)]),
        ("cube", ["--layout=strip", f"--faces={''.join(ROWS)}"]),
    ):
        pictures = folder / kind
        pictures.mkdir()
        picture = panorama if kind == "level" else cube_of(panorama, WIDTH // 4)
        Image.fromarray(picture).save(pictures / "00.jpg", quality=88)
        for index in range(1, PICTURES):
            shutil.copyfile(pictures / "00.jpg", pictures / f"{index:02d}.jpg")
        command: list[str | Path] = [*PANOLLAVA, "convert", pictures, folder / f"{kind}-ours"]
        seconds = run([*command, "--workers=1", *options], folder)[0] / PICTURES
        name = f"convert, {kind}, {PICTURES} pictures of {WIDTH} x {WIDTH // 2}"
        lines.append(Line(name, "s each", seconds, at_most=SECONDS))
        if shutil.which("ffmpeg"):
            results = folder / f"{kind}-ffmpeg"
            results.mkdir()
            command = [*ffmpeg(pictures / "%02d.jpg"), "-vf", V360[kind], "-threads", "1"]
            command += ["-q:v", "2", results / "%02d.jpg"]
            other = run(command, folder)[0] / PICTURES
            lines.append(Line(f"{name}, v360", "s each", seconds, other, at_least=1.0))
    return lines


if __name__ == "__main__":
    main()
