"""Fuzzing of what reads pictures: changed files of all formats are read or refused with a reason,
in child processes. An internal error, a crash or a hang is a fault; the exit status is then 1.

    python benchmarks/fuzz_pictures.py --files 20000 --seed 0 --keep faults

File `index` of a seed is the same in every run."""

import argparse
import io
import multiprocessing
import os
import struct
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image
from pillow_heif import register_heif_opener
from tabulate import tabulate

from panollava.data.images import PictureError, read_gpano_tags, read_panorama
from panollava.data.picture_suspicions import find_signs

LIMIT = 60  # seconds for a file; also the start of a child, which imports Python's packages
FAULTS = ("internal error", "crash", "hang")
XMP = (
    b'<rdf:Description xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" '
    b'GPano:FullPanoWidthPixels="96" GPano:FullPanoHeightPixels="48" GPano:PosePitchDegrees="1" '
    b'GPano:CroppedAreaImageWidthPixels="96" GPano:CroppedAreaImageHeightPixels="48"/>'
)
FORMATS: dict[str, dict[str, Any]] = {
    **{"a.jpg": {}, "progressive.jpg": {"progressive": True}, "a.mpo": {}, "a.png": {}},
    **{"restart.jpg": {"restart_marker_rows": 1}, "lossless.webp": {"lossless": True}},
    **{"a.webp": {}, "a.avif": {}, "a.heic": {}, "a.tif": {}, "a.bmp": {}, "a.gif": {}},
    **{"lzw.tif": {"compression": "tiff_lzw"}, "jpeg.tif": {"compression": "jpeg"}},
    **{"deflate.tif": {"compression": "tiff_adobe_deflate"}, "a.jp2": {}, "a.ppm": {}, "a.tga": {}},
}
WITH_EXIF, WITH_XMP = "jpg mpo png webp avif heic", "jpg webp avif heic"


class Outcome(NamedTuple):
    number: int
    file: str
    kind: str  # read, refused: ..., or one of FAULTS
    detail: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for the files with faults")
    options = parser.parse_args()
    start = time.perf_counter()
    outcomes = fuzz(options.files, options.seed, options.processes)
    counts = Counter(outcome.kind for outcome in outcomes)
    sys.stdout.write(tabulate(counts.most_common(), ("outcome", "files"), "plain") + "\n")
    sys.stdout.write(f"{len(outcomes)} files in {time.perf_counter() - start:.0f} s\n")
    faults = [outcome for outcome in outcomes if outcome.kind in FAULTS]
    for fault in faults:
        sys.stdout.write(f"\n{fault.kind}: file {fault.number}, {fault.file}\n{fault.detail}\n")
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            name = f"{options.seed}-{fault.number}-{fault.file}"
            (options.keep / name).write_bytes(changed_file(options.seed, fault.number)[1])
    sys.exit(bool(faults))


def fuzz(files: int, seed: int, processes: int = 1) -> list[Outcome]:
    """The outcome of each file, in order."""
    children = [
        Child(range(first, files, processes), seed) for first in range(min(processes, files))
    ]
    while any(child.is_running for child in children):
        multiprocessing.connection.wait(
            [child.outcomes for child in children if child.is_running], timeout=1
        )
        for child in children:
            child.poll()
    return sorted(outcome for child in children for outcome in child.done)


class Child:
    """A process that reads files, started anew after a crash or a hang."""

    def __init__(self, indices: range, seed: int) -> None:
        self.indices, self.seed = indices, seed
        self.done: list[Outcome] = []
        self._start()

    def _start(self) -> None:
        self.is_running = len(self.done) < len(self.indices)
        if self.is_running:
            context = multiprocessing.get_context("spawn")
            self.outcomes, other = context.Pipe(duplex=False)
            rest = self.indices[len(self.done) :]
            self.process = context.Process(target=read_files, args=(rest, self.seed, other))
            self.process.start()
            other.close()
            self.seen = time.monotonic()

    def poll(self) -> None:
        """Take what the child has sent; count a file for which it sends nothing as a fault."""
        try:
            while self.is_running and self.outcomes.poll():
                self.done.append(self.outcomes.recv())
                self.seen = time.monotonic()
                self.is_running = len(self.done) < len(self.indices)
        except EOFError:
            self.process.join()
            self._fail("crash", f"exit status {self.process.exitcode}")
        else:
            if self.is_running and time.monotonic() - self.seen > LIMIT:
                self.process.kill()
                self._fail("hang", f"no outcome in {LIMIT} s")

    def _fail(self, kind: str, detail: str) -> None:
        index = self.indices[len(self.done)]
        self.done.append(Outcome(index, changed_file(self.seed, index)[0], kind, detail))
        self._start()


def read_files(indices: range, seed: int, outcomes: Connection) -> None:
    """The child: sends an outcome for each file."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # some decoders write there
    for index in indices:
        name, content = changed_file(seed, index)
        outcomes.send(Outcome(index, name, *read(content, (24, 96)[index % 2])))


def read(content: bytes, width: int) -> tuple[str, str]:
    """Kind and detail of what `check` and `prepare` do with a file."""
    try:
        panorama = read_panorama(content, width)
        if panorama.dtype != np.uint8 or panorama.ndim != 3 or panorama.shape[2] != 3:
            return "internal error", f"an array of {panorama.dtype}, {panorama.shape}"
        find_signs(panorama, read_gpano_tags(content))
    except PictureError as error:
        return f"refused: {error.kind}", error.reason
    except Exception:  # noqa: BLE001 - it is what this looks for
        return "internal error", traceback.format_exc()
    return "read", ""


def changed_file(seed: int, index: int) -> tuple[str, bytes]:
    """A name and a content. A PNG's checksums are mended in half of the files, so that changes get
    beyond them."""
    random = np.random.default_rng([seed, index])
    files = good_files()
    name = str(random.choice(list(files)))
    content = files[name]
    for _ in range(random.integers(1, 4)):
        change = CHANGES[random.integers(len(CHANGES))]
        if content:
            content = change(content, random)
    if name.endswith("png") and random.random() < 0.5:
        content = with_checksums(content)
    return name, content


@cache
def good_files() -> dict[str, bytes]:
    """A small panorama with EXIF and XMP in each format, with 16 bits and transparency in some."""
    register_heif_opener()
    random = np.random.default_rng(0)
    pixels = cv2.resize(random.integers(0, 256, (6, 12, 4), np.uint8), (96, 48))
    picture, exif = Image.fromarray(pixels[..., :3]), Image.Exif()
    exif[0x112], exif[0x10F], exif[0x11A] = 3, "a camera", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
    files = {}
    for name, options in FORMATS.items():
        kind = name.rpartition(".")[2]
        options = options | ({"exif": exif.tobytes()} if kind in WITH_EXIF else {})
        files[name] = _encode(picture, name, options | ({"xmp": XMP} if kind in WITH_XMP else {}))
    for name, mode in {"cmyk.jpg": "CMYK", "gray.jpg": "L", "palette.png": "P"}.items():
        files[name] = _encode(picture.convert(mode), name, {})
    for name in ("alpha.png", "alpha.webp", "alpha.tif", "alpha.heic", "alpha.avif"):
        files[name] = _encode(Image.fromarray(pixels), name, {})
    deep = pixels.astype(np.uint16) * 257
    for name, part in {"16.png": deep, "16.tif": deep[..., :3], "gray.png": deep[..., 0]}.items():
        files[name] = cv2.imencode(name[-4:], part)[1].tobytes()
    return files


def _encode(picture: Image.Image, name: str, options: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    content.name = name
    picture.save(content, **options)
    return content.getvalue()


def with_checksums(png: bytes) -> bytes:
    parts, at = [png[:8]], 8
    while at + 12 <= len(png) and (end := at + 8 + int.from_bytes(png[at : at + 4])) <= len(png):
        parts += [png[at:end], struct.pack(">L", zlib.crc32(png[at + 4 : end]))]
        at = end + 4
    return b"".join((*parts, png[at:]))


def _part(content: bytes, random: Generator) -> tuple[int, int]:
    """Start and end, of a short part more often than of a long one."""
    length = int(len(content) ** random.random())
    start = int(random.integers(len(content) - length + 1))
    return start, start + length


def set_bytes(content: bytes, random: Generator) -> bytes:
    changed = bytearray(content)
    for at in random.integers(len(content), size=random.integers(1, 6)):
        changed[at] = random.integers(256)
    return bytes(changed)


def flip_bit_at_start(content: bytes, random: Generator) -> bytes:
    changed = bytearray(content)
    changed[random.integers(min(300, len(content)))] ^= 1 << int(random.integers(8))
    return bytes(changed)


def set_number(content: bytes, random: Generator) -> bytes:
    numbers = (0, 1, 2, 8, 0x7F, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)
    number = numbers[random.integers(len(numbers))]
    size, order = int(random.choice([2, 4])), ("big", "little")[random.integers(2)]
    at = int(random.integers(max(1, min(len(content), int(random.choice([400, 1 << 30]))) - 4)))
    return content[:at] + (number % 256**size).to_bytes(size, order) + content[at + size :]


def cut(content: bytes, random: Generator) -> bytes:
    return content[: random.integers(len(content))]


def cut_and_close(content: bytes, random: Generator) -> bytes:
    return cut(content, random) + content[-int(random.choice([1, 2, 12])) :]


def delete(content: bytes, random: Generator) -> bytes:
    start, end = _part(content, random)
    return content[:start] + content[end:]


def insert(content: bytes, random: Generator) -> bytes:
    at = int(random.integers(len(content)))
    return content[:at] + random.bytes(int(random.choice([1, 2, 16, 300]))) + content[at:]


def repeat(content: bytes, random: Generator) -> bytes:
    start, end = _part(content, random)
    return content[:end] + content[start:end] * int(random.integers(1, 4)) + content[end:]


def clear(content: bytes, random: Generator) -> bytes:
    start, end = _part(content, random)
    return content[:start] + bytes((random.choice([0, 255]),)) * (end - start) + content[end:]


def splice(content: bytes, random: Generator) -> bytes:
    others = list(good_files().values())
    other = others[random.integers(len(others))]
    return cut(content, random) + other[random.integers(len(other)) :]


CHANGES: list[Callable[[bytes, Generator], bytes]] = [
    *(set_bytes, flip_bit_at_start, set_number, cut, cut_and_close),
    *(delete, insert, repeat, clear, splice),
]

if __name__ == "__main__":
    main()
