"""Decodes the pictures of a shard and writes what later stages read of them."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL
import simplejpeg

from panollava import config, paths
from panollava.data.images import (
    PictureError,
    map_pictures,
    read_panorama,
    reduced_jpeg,
    roll,
    stored_jpeg,
)
from panollava.data.picture_files import TEMPORARY
from panollava.data.shard_work import Record, ShardStore
from panollava.files import write_array, write_tar
from panollava.geometry.views import Sampler, layout
from panollava.provenance.fingerprint import fingerprint

ROLLED = paths.ROLLED.name


class ShardFormat(NamedTuple):
    """What is written of each panorama."""

    views: config.Views
    store: str  # data.store
    rolls: tuple[float, ...] | None  # of the evaluated split, degrees; None: of another split

    @property
    def files(self) -> dict[str, str]:
        """The ends of the names of a shard's files, by shard set."""
        files = {paths.PANORAMAS: ".npy" if self.store == "views" else ".tar"}
        if self.rolls is not None:
            files |= {ROLLED: ".rolled.npy", paths.PICTURES: ".pictures.tar"}
        return files


class PictureShard(NamedTuple):
    split: str
    number: int
    pictures: tuple[Path, ...]
    format: ShardFormat
    key: str  # see `shard_key`

    @property
    def title(self) -> str:
        return f"{self.split} {self.number}"


def shard_key(pictures: Sequence[Path], format: ShardFormat, code: str, root: Path) -> str:
    """A hash of what a shard is made from. Pictures count as the same if their paths, sizes and
    times of change are. `code`: a digest of the code that makes shards; `root`: the project's
    folder, so that it may be moved."""
    files = []
    for picture in pictures:
        status = picture.stat()
        files.append((os.path.relpath(picture, root), status.st_size, status.st_mtime_ns))
    versions = [cv2.__version__, PIL.__version__, simplejpeg.__version__, np.__version__]
    steps = [dataclasses.asdict(format.views), format.store, format.rolls]
    described = [code, versions, *steps, files]
    return fingerprint(described, [], {})


def is_outdated(shard: PictureShard, record: Record) -> bool:
    """Whether a picture that could not be read when the shard was made can be read now, though
    neither its size nor its time has changed."""
    for place, kind, reason in record.faults:
        if kind in TEMPORARY:
            try:
                read_panorama(shard.pictures[place], width=256)
            except PictureError as error:
                if error.reason == reason:
                    continue
            return True
    return False


def make_shards(store: ShardStore, threads: int, shards: Sequence[PictureShard]) -> None:
    """Write the files of shards. A picture that cannot be used is noted in the shard's record, by
    its place in the shard, with kind and reason."""
    if not shards:
        return
    cv2.setNumThreads(1)  # the decoding threads keep all cores busy
    jobs = [(picture, shard.format) for shard in shards for picture in shard.pictures]
    results = map_pictures(_convert, jobs, threads, "panoramas")
    for shard in shards:
        _write(store, shard, (result for _, result in islice(results, len(shard.pictures))))


def _convert(job: tuple[Path, ShardFormat]) -> dict[str, Any] | PictureError:
    """What each shard set gets of a picture: rows of an array, or a JPEG."""
    path, format = job
    sampler = _sampler(format.views)
    try:
        if format.store == "views":
            panorama = read_panorama(path, sampler.panorama_width)
            stored: Any = sampler.sample(panorama)[None]
        else:
            stored = stored_jpeg(path, sampler.panorama_width)
    except PictureError as error:
        return error
    if format.rolls is None:
        return {paths.PANORAMAS: stored}
    if format.store == "panoramas":
        panorama = read_panorama(stored, sampler.panorama_width)
    rolled = [sampler.sample(roll(panorama, degrees)) for degrees in format.rolls]
    return {
        paths.PANORAMAS: stored,
        ROLLED: np.stack(rolled) if rolled else [],
        paths.PICTURES: reduced_jpeg(panorama),
    }


_sampler = functools.cache(lambda views: Sampler(layout(views), views.size))


def _write(
    store: ShardStore, shard: PictureShard, results: Iterator[dict[str, Any] | PictureError]
) -> None:
    files = shard.format.files
    counts, faults = dict.fromkeys(files.values(), 0), []
    with ExitStack() as stack:
        append: dict[str, Any] = {}
        for name, suffix in files.items():
            write: Any = write_tar if suffix.endswith(".tar") else write_array
            file = store.path(shard.key, suffix)
            append[name] = stack.enter_context(write(file, shared=True))
        for place, result in enumerate(results):
            if isinstance(result, PictureError):
                faults.append((place, result.kind, result.reason))
                continue
            for name, content in result.items():
                if isinstance(content, bytes):
                    append[name](f"{place:06d}.jpg", content)
                elif len(content):
                    append[name](content)
                counts[files[name]] += 1 if isinstance(content, bytes) else len(content)
    store.finish(shard.key, counts, faults)
