"""Eight 224-pixel views of a photo, and the stage `prepare`: time, quality and memory.

The usual way decodes a photo at full size and samples one view after another: with py360convert,
with pyequilib, or with OpenCV's remap and precomputed maps.

    python benchmarks/prepare.py --pictures FOLDER --against CHECKOUT

compares with the command `prepare` of another checkout instead, in alternating pairs."""

import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(f"{sys.prefix}/bench")  # requirements-bench.txt

import cv2
import equilib
import numpy as np
import py360convert
from numpy.typing import NDArray
from PIL import Image

from measure import PANOLLAVA, ROOT, Line, options_parser, report, run, time_alternately
from panollava import config
from panollava.data.images import read_panorama
from panollava.data.prepare import prepare_project
from panollava.geometry import views
from panollava.geometry.projections import panorama_position
from photos import save_photos

SIZE, FOV = 224, 90.0
LAYOUT = views.layout(config.Views("e2p", SIZE, FOV, 0.5, 0.0, False))
YAWS = [45.0 * index for index in range(8)]
SAMPLER = views.Sampler(LAYOUT, SIZE)
# Goals: speedup over py360convert, of photos of at least this width.
SPEEDUPS = {6000: 7.0, 4096: 3.5, 2048: 3.2}
SUPERSAMPLING = 8  # rays along a pixel's side, for the reference
Way = Callable[[NDArray[np.uint8]], NDArray]


def main() -> None:
    parser = options_parser(__doc__, repeats=7)
    parser.add_argument("--pictures", type=Path, help="a folder of panoramas (*.jpg)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="see above")
    parser.add_argument("--pairs", type=int, default=20, help="with --against")
    parser.add_argument("--count", type=int, default=1200, help="panoramas, with --against")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = sorted(options.pictures.glob("*.jpg")) if options.pictures else save_photos(folder)
        if options.against:
            lines = [compare_with(options.against, folder, photos, options.count, options.pairs)]
        else:
            lines = [line for photo in photos for line in measure_photo(photo, options.repeats)]
            lines += measure_stage(folder, photos, options.repeats)
    report(lines, options.out)


def decode(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def decode_scaled(path: Path) -> None:
    """The part of our time that the JPEG library takes."""
    with Image.open(path) as picture:
        picture.draft("RGB", (SAMPLER.panorama_width, SAMPLER.panorama_width // 2))
        picture.load()


def with_py360convert(panorama: NDArray[np.uint8]) -> NDArray:
    return np.stack([py360convert.e2p(panorama, FOV, yaw, 0, (SIZE, SIZE)) for yaw in YAWS])


_EQUILIB = equilib.Equi2Pers(height=SIZE, width=SIZE, fov_x=FOV)


def with_equilib(panorama: NDArray[np.uint8]) -> NDArray:
    channels_first = np.ascontiguousarray(panorama.transpose(2, 0, 1))
    rotations = [{"yaw": -np.radians(yaw), "pitch": 0.0, "roll": 0.0} for yaw in YAWS]
    return np.stack([_EQUILIB(channels_first, rots=r).transpose(1, 2, 0) for r in rotations])


def with_remap(maps: list[tuple[NDArray, NDArray]], panorama: NDArray[np.uint8]) -> NDArray:
    border = cv2.BORDER_WRAP
    return np.stack([cv2.remap(panorama, *m, cv2.INTER_LINEAR, borderMode=border) for m in maps])


def maps(panorama: NDArray, *axes: NDArray, shift: float = 0) -> list[tuple[NDArray, NDArray]]:
    """OpenCV's maps of the eight views, from the (x, y) of their pixels' centers on the image
    plane. `shift`: in pixels of the panorama."""
    height, width = panorama.shape[:2]
    x, y = np.meshgrid(*axes)
    result = []
    for yaw in np.radians(YAWS):
        ahead, right = np.cos(yaw) - x * np.sin(yaw), np.sin(yaw) + x * np.cos(yaw)
        position = panorama_position(np.stack([right, -y, ahead], axis=-1))
        columns = position[..., 0] * width - 0.5 + shift
        rows = position[..., 1] * height - 0.5 + shift
        result.append((columns.astype(np.float32), rows.astype(np.float32)))
    return result


# Where each way places the first and the last pixel on the image plane, from -1 to 1.
ENDS = {
    "ours": (-1 + 1 / SIZE, 1 - 1 / SIZE),  # centers of cells
    "remap": (-1 + 1 / SIZE, 1 - 1 / SIZE),
    "py360convert": (-1.0, 1.0),  # points, the outer ones on the edge
    "pyequilib": (-1.0, 1 - 2 / SIZE),  # upper left corners of cells
}
SHIFTS = {"pyequilib": 1.0}  # it reads the panorama one pixel too far down and to the right


def reference(panorama: NDArray[np.uint8], way: str) -> NDArray[np.float32]:
    """The views by supersampling: each pixel is the mean over rays across its area."""
    first, last = ENDS[way]
    step = (last - first) / (SIZE - 1)
    inside = (np.arange(SUPERSAMPLING) + 0.5) / SUPERSAMPLING - 0.5
    axis = ((first + step * np.arange(SIZE))[:, None] + step * inside).ravel()
    samples = with_remap(maps(panorama, axis, axis, shift=SHIFTS.get(way, 0)), panorama)
    cells = samples.reshape(len(YAWS), SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING, 3)
    return cells.mean(axis=(2, 4), dtype=np.float32)


def psnr(one: NDArray, other: NDArray) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(10 * np.log10(255**2 / np.square(one.astype(np.float32) - other).mean()))


def measure_photo(path: Path, repeats: int) -> list[Line]:
    panorama = decode(path)
    height, width = panorama.shape[:2]
    axis = np.linspace(*ENDS["remap"], SIZE)
    usual: dict[str, Way] = {
        "py360convert": with_py360convert,
        "pyequilib": with_equilib,
        "remap": partial(with_remap, maps(panorama, axis, axis)),
    }

    def ours() -> NDArray[np.uint8]:
        return SAMPLER.sample(read_panorama(path, SAMPLER.panorama_width))

    def decoded_and_sampled(way: Way) -> NDArray:
        return way(decode(path))

    quality = {"ours": psnr(ours(), reference(panorama, "ours"))}
    for name, way in usual.items():
        quality[name] = psnr(way(panorama), reference(panorama, name))
        assert quality[name] > 15, f"{path}: {name} shows different views"
    functions = [partial(decoded_and_sampled, way) for way in usual.values()]
    time, limit, *others = time_alternately(
        ours, partial(decode_scaled, path), *functions, repeats=repeats
    )
    name = f"views, {width} x {height}"
    lines = []
    for peer, other in zip(usual, others, strict=True):
        goal = _goal(width) if peer == "py360convert" else 1.0
        line = Line(f"{name}, {peer}", "ms", 1e3 * time, 1e3 * other, at_least=goal)
        lines.append(line)
    lines.append(
        Line(f"{name}, scaled decoding", "ms", 1e3 * time, limit=1e3 * limit, at_most=1.15)
    )
    for peer in usual:
        ratio = 10 ** ((quality["ours"] - quality[peer]) / 20)
        line = Line(f"{name}, PSNR, {peer}", "dB", quality["ours"], quality[peer], ratio=ratio)
        lines.append(line._replace(at_least=1.0))
    return lines


def _goal(width: int) -> float | None:
    return next((goal for least, goal in SPEEDUPS.items() if width >= least), None)


def compare_with(checkout: Path, folder: Path, photos: list[Path], count: int, pairs: int) -> Line:
    """The command `prepare` of this checkout and of another one, with one thread."""
    projects = {
        root.resolve(): make_project(folder / name, photos, count, root, threads=1)
        for name, root in {"ours": ROOT, "other": checkout}.items()
    }
    times: dict[Path, list[float]] = {root: [] for root in projects}
    for pair in range(pairs):
        order = list(projects.items())
        for root, project in order if pair % 2 else order[::-1]:
            command = [sys.executable, str(root / "src/run.py"), "prepare"]
            times[root].append(run(command, project)[0])
    ours, other = times.values()
    ratio = statistics.median(b / a for a, b in zip(ours, other, strict=True))
    seconds = statistics.median(ours), statistics.median(other)
    name = f"prepare, {count} photos, against {checkout.resolve().name}, {pairs} pairs"
    return Line(name, "s", *seconds, ratio=ratio, at_least=0.8)


def measure_stage(folder: Path, photos: list[Path], repeats: int) -> list[Line]:
    """The command `prepare`: time with one and with two threads, memory with more panoramas."""
    smaller = [photo for photo in photos if photo.stat().st_size < 1e6] or photos
    timed = make_project(folder / "timed", photos, 192)
    projects = [make_project(folder / str(count), smaller, count) for count in (16, 64)]

    def prepare(threads: int) -> None:
        settings = config.load_settings(timed / "params.yaml")
        machine = dataclasses.replace(settings.machine, decode_threads=threads)
        prepare_project(dataclasses.replace(settings, machine=machine), timed)

    two, one = time_alternately(
        partial(prepare, 2), partial(prepare, 1), repeats=max(1, repeats // 2)
    )
    memory = [run([*PANOLLAVA, "prepare"], project)[1] for project in projects]
    return [
        Line("prepare, 192 photos, two threads against one", "s", two, one, at_least=1.8),
        Line(
            "prepare, peak memory: 64 panoramas against 16",
            *("GB", memory[1], memory[0]),
            limit=memory[0],
            at_most=1.05,
        ),
    ]


def make_project(
    folder: Path, photos: list[Path], count: int, root: Path = ROOT, threads: int = 2
) -> Path:
    """`count` panoramas with one row each: one in valid, one in test, the others in train. They
    are links to copies of the photos. The settings are those of the checkout at `root`."""
    (folder / "data/images").mkdir(parents=True)
    for index in range(count):
        image, first = (folder / f"data/images/{each}.jpg" for each in (index, index % len(photos)))
        if index < len(photos):
            shutil.copyfile(photos[index], image)
        else:
            os.link(first, image)
    for split, panoramas in (("train", range(2, count)), ("valid", [0]), ("test", [1])):
        rows = "".join(f"images/{index}.jpg,what,a place.\n" for index in panoramas)
        (folder / f"data/{split}.csv").write_text("url,query,annotation\n" + rows)
    params = (root / "presets/quic360.yaml").read_text()
    params = params.replace("dir: data/quic360", "dir: data")
    (folder / "params.yaml").write_text(params.replace("threads: 8", f"threads: {threads}"))
    return folder


if __name__ == "__main__":
    main()
