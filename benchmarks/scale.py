"""The model of cost in docs/scale.md: coefficients per panorama, row or shard, and their check.

    python benchmarks/scale.py prepare [--pictures FOLDER]   # real photos instead of synthetic ones
    python benchmarks/scale.py features rows manifest hash

Each coefficient is the slope of a line through some sizes. The line is checked at a larger size,
which was not used to fit it. Times are seconds of a core (CPU time), the least of some repeats."""

import argparse
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import cv2
import numpy as np
import torch
from PIL import Image

from helpers import change
from measure import PANOLLAVA, ROOT, Line, options_parser, report
from panollava import paths
from panollava.config import load_settings
from panollava.data.prepare import prepare_project
from panollava.data.rows import read_rows
from panollava.data.shard_work import ShardStore
from panollava.data.shards import MANIFEST, Shard, Shards, write_manifest
from panollava.files import write_array
from panollava.provenance.fingerprint import file_sha256
from panollava.training import features
from photos import make_photo, save_photos
from pipeline import make_demo

PICTURES = (16, 32, 64, 128)  # panoramas of `prepare`; the last size is the check
PANORAMAS = (64, 128, 256, 512)  # of `features`
TABLES = (10_000, 30_000, 100_000, 300_000)  # rows, three for a panorama
SHARDS = (300, 1_000, 3_000, 10_000)
SHARD_BYTES = (64 << 20, 128 << 20, 256 << 20, 1 << 30)
NEAR = 0.15  # of the prediction


def main() -> None:
    parser = options_parser(__doc__, repeats=3)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--pictures", type=Path, help="a folder of panoramas (*.jpg)")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"unknown part '{min(unknown)}'; the parts are {', '.join(PARTS)}")
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    lines: list[Line] = []
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            lines += PARTS[part](Path(folder), options)
    report(lines, options.out)


def fit(
    name: str, unit: str, scale: float, points: Sequence[tuple[float, float]], of: str = "s"
) -> list[Line]:
    """The slope per unit of size, times `scale`, and the check of the line at the last size."""
    sizes, values = np.array(points).T
    # The largest sizes are measured best, relative to their size.
    slope, start = np.polyfit(sizes[:-1], values[:-1], 1, w=1 / sizes[:-1] ** 0.5)
    predicted = start + slope * sizes[-1]
    return [
        Line(f"{name}: each", unit, slope * scale),
        Line(
            f"{name}: {sizes[-1]:g}, predicted from {sizes[0]:g}-{sizes[-2]:g} (limit)",
            *(of, values[-1]),
            limit=predicted,
            ratio=values[-1] / predicted,
            at_least=1 - NEAR,
            at_most=1 + NEAR,
        ),
    ]


def least(
    function: Callable[[int], object], sizes: Sequence[int], repeats: int
) -> list[tuple[float, float]]:
    """The least CPU seconds of this process for each size, measured in turns."""
    seconds = dict.fromkeys(sizes, float("inf"))
    function(sizes[0])
    for _ in range(repeats):
        for size in sizes:
            start = time.process_time()
            function(size)
            seconds[size] = min(seconds[size], time.process_time() - start)
    return [*seconds.items()]


def measure_prepare(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """One thread decodes, samples and writes; hashing and reading the rows are included."""
    photos = [*options.pictures.glob("*.jpg")] if options.pictures else save_photos(folder)
    by_width: dict[int, list[Path]] = {}
    for photo in sorted(photos):
        by_width.setdefault(Image.open(photo).width, []).append(photo.resolve())
    for width, group in sorted(by_width.items()):
        megabytes = sum(photo.stat().st_size for photo in group) / len(group) / 1e6
        yield Line(f"pictures of {width} x {width // 2}, {len(group)} photos", "MB", megabytes)
        for store in ("views", "panoramas"):
            projects = {
                count: make_project(folder / f"{width}-{store}-{count}", group, count)
                for count in PICTURES
            }

            def prepare(count: int, store: str = store, projects: dict = projects) -> None:
                settings = load_settings(projects[count] / paths.PARAMS)
                settings = change(settings, data__store=store, machine__decode_threads=1)
                shutil.rmtree(projects[count] / paths.RESUME, ignore_errors=True)
                prepare_project(settings, projects[count])

            name = f"prepare, {width} x {width // 2}, data.store: {store}"
            yield from fit(name, "ms of a core", 1e3, least(prepare, PICTURES, options.repeats))
            stored = projects[PICTURES[-1]] / paths.PREPARED / "train" / paths.PANORAMAS
            size = sum(shard.bytes for shard in Shards(stored).shards) / len(Shards(stored))
            yield Line(f"{name}: stored", "MB a panorama", size / 1e6)
            for project in projects.values():
                shutil.rmtree(project)


def make_project(folder: Path, photos: Sequence[Path], count: int) -> Path:
    """`count` panoramas of train with one row each, which are links to copies of the photos, and
    one of each other split, in the profile of the real size."""
    (folder / "data/images").mkdir(parents=True)
    for index in range(count + 2):
        image, first = (folder / f"data/images/{i}.jpg" for i in (index, index % len(photos)))
        if index < len(photos):
            shutil.copyfile(photos[index], image)
        else:
            os.link(first, image)
    for split, panoramas in (("train", range(count)), ("valid", [count]), ("test", [count + 1])):
        rows = "".join(f"images/{index}.jpg,what,a place.\n" for index in panoramas)
        (folder / f"data/{split}.csv").write_text("url,query,annotation\n" + rows)
    text = (ROOT / "presets/quic360.yaml").read_text()
    (folder / paths.PARAMS).write_text(text.replace("dir: data/quic360", "dir: data"))
    return folder


def measure_features(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """The demo's encoder, one thread, from stored views."""
    make_demo(folder, train=PANORAMAS[-1])
    for stage in ("vision", "resampler"):
        command = [*PANOLLAVA, "train", stage, "--epochs", "0"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    with contextlib.chdir(folder):
        settings = change(load_settings(paths.PARAMS), trainer__threads=1)
        model, inputs = features._Model(settings, None), features._open_inputs(settings)
        store = ShardStore(folder / "features", True, folder)

        def write(count: int) -> None:
            shard = features.FeatureShard("train", range(count), f"{count:016x}")
            model.write(store, [shard], inputs)

        points = least(write, PANORAMAS, options.repeats)
        yield from fit("features, demo's encoder", "ms of a core", 1e3, points)
        (file,) = store.folder.rglob(f"{PANORAMAS[-1]:016x}.npy")
        stored = file.stat().st_size / PANORAMAS[-1] / 1e6
        yield Line(f"features, demo, {settings.model.features}: stored", "MB a panorama", stored)


def measure_rows(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """Every command that makes shards reads all rows first, and asks for each picture's size."""
    photo = make_photo(32, 16, 0).tobytes()  # only the size of the file is read
    (folder / "data/images").mkdir(parents=True)
    for count in TABLES:
        lines = ["url,query,annotation\n"]
        for row in range(count):
            picture = folder / f"data/images/{row // 3}.jpg"
            if not picture.exists():
                picture.write_bytes(photo)
            lines.append(
                f"images/{row // 3}.jpg,what is here {row % 7},a place with {row} things.\n"
            )
        (folder / f"data/{count}.csv").write_text("".join(lines))

    def read(count: int) -> None:
        rows, _ = read_rows(folder / f"data/{count}.csv", folder)
        assert len(rows) == count

    peaks = []
    for count in TABLES:  # a peak never falls, but each of these is higher
        read(count)
        peaks.append((count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))
    yield from fit("reading rows: memory", "kB a row", 1e6, peaks, of="GB")
    yield from fit("reading rows", "us of a core", 1e6, least(read, TABLES, options.repeats))


def measure_manifest(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """Opening a shard set reads its manifest and asks for the size of each shard."""
    with write_array(folder / "shard.npy") as append:
        append(np.zeros((1, 1), np.uint8))
    size = (folder / "shard.npy").stat().st_size
    digest = file_sha256(folder / "shard.npy")
    shards = []
    for number in range(SHARDS[-1]):
        name = f"{number % 256:02x}/{number:016x}.npy"
        (folder / "store" / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / "shard.npy", folder / "store" / name)
        shards.append(Shard(name, 512, size, digest))
    for count in SHARDS:
        (folder / str(count)).mkdir()
        write_manifest(folder / str(count), shards[:count], folder / "store", (1,), "uint8")

    def open_set(count: int) -> None:
        assert len(Shards(folder / str(count))) == 512 * count

    points = least(open_set, SHARDS, options.repeats)
    yield from fit("opening a manifest, per shard", "us of a core", 1e6, points)
    file = folder / str(SHARDS[-1]) / MANIFEST
    yield Line("manifest", "bytes a shard", file.stat().st_size / SHARDS[-1])


def measure_hash(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """Shards are hashed when they are made, and again after they were changed or
    copied."""
    for size in SHARD_BYTES:
        with (folder / str(size)).open("wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))

    def read(size: int) -> None:
        file_sha256(folder / str(size))

    yield from fit("hashing a byte", "s of a core per GB", 1e9, least(read, SHARD_BYTES, 1))


PARTS: dict[str, Callable[[Path, argparse.Namespace], Iterator[Line]]] = {
    "prepare": measure_prepare,
    "features": measure_features,
    "rows": measure_rows,
    "manifest": measure_manifest,
    "hash": measure_hash,
}

if __name__ == "__main__":
    main()
