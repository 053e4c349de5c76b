"""What `data.store: panoramas` costs: how much features differ from those of views of the pictures,
and what storing, and sampling views when they are read, takes of a core.

    python benchmarks/stored_panoramas.py --pictures FOLDER   # real photos, not synthetic ones
    python benchmarks/stored_panoramas.py --all               # other qualities and subsampling

Features are those of the demo's encoder, for views of 64 pixels, and for views of 224 pixels in
nine pieces of 64. Differences are root mean squares over tokens, as a share of the features'
spread. They are compared with what JPEG explains: the same JPEG settings at the size at which
pictures are decoded for the views, where nothing is scaled afterwards."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from measure import ROOT, Line, options_parser, report
from panollava import config, paths
from panollava.data import images
from panollava.data.images import read_panorama, stored_jpeg
from panollava.geometry.views import Sampler, layout
from panollava.model.encoder import Encoder, load_encoder
from photos import save_photos

PIECE = 64  # pixels, the demo encoder's views
SETTINGS = [(quality, "RGB", chroma) for quality in (70, 80, 90, 95) for chroma in ("420", "444")]


def main() -> None:
    parser = options_parser(__doc__, repeats=5)
    parser.add_argument("--pictures", type=Path, help="a folder of panoramas (*.jpg)")
    parser.add_argument("--all", action="store_true", help="see above")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    lines: list[Line] = []
    with TemporaryDirectory() as folder:
        given = options.pictures
        photos = sorted(given.glob("*.jpg")) if given else save_photos(Path(folder))
        for size in (PIECE, 224):
            sampler = Sampler(layout(config.Views("e2p", size, 90.0, 0.5, 0.0, False)), size)
            for settings in SETTINGS if options.all else [images._STORED_AS]:
                images._STORED_AS = settings
                lines += measure_difference(photos, sampler)
        if not options.all:
            lines += measure_time(photos, sampler, options.repeats)
    report(lines, options.out)


def measure_difference(photos: list[Path], sampler: Sampler) -> Iterator[Line]:
    pretrained = config.load_settings(ROOT / paths.PARAMS).model.encoder
    path = str(ROOT / pretrained.path)
    encoder = load_encoder(dataclasses.replace(pretrained, path=path), PIECE).eval()
    width = sampler.panorama_width
    decoded = [read_panorama(photo, width) for photo in photos]
    jpegs = [stored_jpeg(photo, width) for photo in photos]
    alone = [simplejpeg.encode_jpeg(np.ascontiguousarray(p), *images._STORED_AS) for p in decoded]
    reference, stored, explained = (
        np.concatenate([features(encoder, sampler.sample(each)) for each in panoramas])
        for panoramas in (
            decoded,
            [read_panorama(jpeg, width) for jpeg in jpegs],
            [read_panorama(jpeg, width) for jpeg in alone],
        )
    )
    quality, _, chroma = images._STORED_AS
    name = f"stored as JPEG, quality {quality}, {':'.join(chroma)}"
    megabytes = sum(map(len, jpegs)) / len(jpegs) / 1e6
    name += f", views of {sampler.size} pixels"
    yield Line(f"{name}: size", "MB", megabytes)
    name += ", features"
    (ours, cosine), (limit, limit_cosine) = (
        compare(reference, other) for other in (stored, explained)
    )
    yield Line(f"{name}: difference (limit: JPEG)", "", ours, limit=limit, at_most=1)
    yield Line(f"{name}: cosine (limit: JPEG)", "", cosine, limit=limit_cosine)


@torch.inference_mode()
def features(encoder: Encoder, views: NDArray[np.uint8]) -> NDArray:
    """Of all patch tokens: (tokens, features)."""
    count = views.shape[1] // PIECE
    first = (views.shape[1] - count * PIECE) // 2
    kept = slice(first, first + count * PIECE)
    inside = torch.from_numpy(views[:, kept, kept])
    pieces = inside.reshape(-1, count, PIECE, count, PIECE, 3).transpose(2, 3)
    tokens = encoder(pieces.reshape(1, -1, PIECE, PIECE, 3))
    return tokens.reshape(-1, encoder.width).numpy()


def compare(one: NDArray, other: NDArray) -> tuple[float, float]:
    """Root mean square difference as a share of the spread, and the mean cosine, both about the
    mean of all tokens."""
    a, b = one - one.mean(axis=0), other - one.mean(axis=0)
    share = np.sqrt(np.square(a - b).sum() / np.square(a).sum())
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(share), float(cosine.mean())


def measure_time(photos: list[Path], sampler: Sampler, repeats: int) -> Iterator[Line]:
    """Panoramas per second and core, by CPU time. Views of 224 pixels."""
    width = sampler.panorama_width
    jpegs = [stored_jpeg(photo, width) for photo in photos]
    ways: dict[str, Callable[[int], object]] = {
        "views of a picture": lambda i: sampler.sample(read_panorama(photos[i], width)),
        "stored panorama of a picture": lambda i: stored_jpeg(photos[i], width),
        "views of a stored panorama": lambda i: sampler.sample(read_panorama(jpegs[i], width)),
    }
    widths = [read_panorama(photo, images.MAX_PIXELS).shape[1] for photo in photos]
    for name, way in ways.items():
        for size in sorted(set(widths)):
            chosen = [i for i, each in enumerate(widths) if each == size]
            seconds = []
            for _ in range(repeats):
                start = time.process_time()
                for index in chosen:
                    way(index)
                seconds.append((time.process_time() - start) / len(chosen))
            what = f"{name}, {size} x {size // 2}, views of {sampler.size} pixels"
            yield Line(what, "panoramas per s and core", 1 / min(seconds))


if __name__ == "__main__":
    main()
