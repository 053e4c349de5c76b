"""Reads panoramas that are stored in shards: files of a fixed number of panoramas each, so that any
number of processes and machines can make them (see `shard_work`).

A shard set is a folder with a manifest, which lists the shards in order with their hashes. The
shards lie in the same folder, or stay in `data.store_dir`."""

import bisect
import contextlib
import functools
import hashlib
import importlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from panollava import config, paths
from panollava.errors import UserError
from panollava.files import open_array, write_json, write_text
from panollava.provenance.fingerprint import file_sha256

MANIFEST, DIGEST = "manifest.json", "digest.txt"
_MAX_OPEN = 256  # files
_HASHING_THREADS = 4
_VERIFIED = paths.CACHE / "shards.json"


class Shard(NamedTuple):
    file: str  # relative to the folder of the shards
    panoramas: int
    bytes: int
    sha256: str


class _Manifest(NamedTuple):
    digest: str  # of all shards' content
    folder: str | None  # of the shards; None: that of the manifest
    shape: list[int]  # of each panorama
    dtype: str
    code: str  # a digest, see `write_manifest`
    shards: list[Shard]


class Shards:
    """The panoramas of a shard set, read like an array: as views, features or the bytes of JPEG
    files."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the set, or one of its shards, is missing or incomplete."""
        self.folder, manifest = folder, _read_manifest(folder)
        self.digest, self.code, self.shards = manifest.digest, manifest.code, manifest.shards
        self.starts = np.cumsum([0, *(shard.panoramas for shard in self.shards)])
        # Those of one array with all panoramas. Without a meaning for JPEG files.
        self.shape = (len(self), *manifest.shape)
        self.dtype = np.dtype(manifest.dtype)
        place = folder if manifest.folder is None else Path(manifest.folder)
        self.files = [place / shard.file for shard in self.shards]
        for file, shard in zip(self.files, self.shards, strict=True):
            self._check_size(file, shard.bytes)
        self._starts: list[int] = self.starts.tolist()
        self._open = functools.lru_cache(_MAX_OPEN)(self._open_shard)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, panorama: int) -> Any:
        number, place = self.locate(panorama)
        return self._open(number)[place]

    def locate(self, panorama: int) -> tuple[int, int]:
        """The number of its shard, and its place there."""
        if not 0 <= panorama < len(self):
            raise IndexError(f"{self.folder}: panorama {panorama} of {len(self)}")
        number = bisect.bisect_right(self._starts, panorama) - 1
        return number, panorama - self._starts[number]

    def __reduce__(self) -> Any:  # for processes that do not share this one's memory
        return Shards, (self.folder,)

    def _open_shard(self, number: int) -> Any:
        file = self.files[number]
        if file.suffix != ".tar":
            return open_array(file)
        tar = _Tar(file)
        if len(tar) != (expected := self.shards[number].panoramas):
            raise self.mismatch(file, f"{len(tar)} pictures instead of the {expected} in")
        return tar

    def _check_size(self, file: Path, expected: int) -> None:
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise self.mismatch(file, "no such file, but it is in") from None
        if size != expected:
            raise self.mismatch(file, f"{size} bytes instead of the {expected} in")

    def mismatch(self, file: Path, fault: str) -> UserError:
        """An error for a file that differs from the manifest, whose path follows `fault`."""
        remedy = f"remove {self.folder} and run: make verify, then dvc repro"
        if file.parent != self.folder:  # DVC would restore the manifest only
            command = file.parents[1].name
            remedy = f"delete it and run: dvc repro --force --single-item {command}"
            remedy += f" (without DVC: panollava {command})"
        return UserError(f"{file}: {fault} {self.folder / MANIFEST}; restore the file, or {remedy}")


class _Tar:
    """The contents of the files in an uncompressed tar file."""

    def __init__(self, path: Path) -> None:
        self._spans: list[tuple[int, int]] = []
        # A damaged header ends it, as the end of the file does.
        with contextlib.suppress(tarfile.TarError), tarfile.open(path, "r:") as tar:
            self._spans += ((member.offset_data, member.size) for member in tar)
        self._bytes = np.memmap(path, mode="r")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> bytes:
        start, size = self._spans[index]
        return self._bytes[start : start + size].tobytes()


def open_views(folder: Path, settings: config.Views) -> Shards:
    """The views in a shard set of `prepare`, which stores them or the panoramas themselves.

    Raises UserError, see `Shards`."""
    if not any(shard.file.endswith(".tar") for shard in _read_manifest(folder).shards):
        return Shards(folder)
    # The digest of stored panoramas covers this code, so that a training does not depend on code
    # for pictures if views are stored.
    module = importlib.import_module("panollava.data.sampled_views")
    return module.SampledViews(folder, settings)


def write_manifest(
    out: Path,
    shards: Sequence[Shard],
    place: Path | None,
    shape: Sequence[int],
    dtype: str,
    code: str = "",
) -> str:
    """Write the manifest of a shard set, and its digest for DVC, which depends on what the shards
    contain, but not on where they are. Returns the digest.

    `place`: the folder of the shards (None: `out`); `shape`, `dtype`: of each panorama; `code`: a
    digest of the code that reads the shards, if that is more than reading an array."""
    content = {"shape": [*shape], "dtype": dtype, "code": code}
    hashes = [[shard.panoramas, shard.sha256] for shard in shards]
    digest = hashlib.sha256(json.dumps([content, hashes]).encode()).hexdigest()
    head = {"digest": digest, "folder": None if place is None else str(place), **content}
    lines = ",\n".join(f"    {json.dumps(shard)}" for shard in shards)
    text = json.dumps({**head, "shards": []}, indent=2)
    write_text(out / MANIFEST, text.replace('"shards": []', f'"shards": [\n{lines}\n  ]') + "\n")
    write_text(out / DIGEST, f"{digest}\n")
    return digest


def _read_manifest(folder: Path) -> _Manifest:
    file = folder / MANIFEST
    remedy = "run the stage that writes it: dvc repro"
    try:
        manifest = _Manifest(**json.loads(file.read_text(encoding="utf-8")))
        return manifest._replace(shards=[Shard(*shard) for shard in manifest.shards])
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {remedy}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not a manifest ({error}); remove it, and {remedy}") from None


def verify(sets: Sequence[Shards]) -> None:
    """Compare the contents of shards with their manifests. A file is read only if its size or its
    time of change is another one than when it was last read or written.

    Raises:
        UserError: a shard has changed.
    """
    known = _read_verified()
    todo = [
        (each, file, shard, state[1])
        for each in sets
        for file, shard in zip(each.files, each.shards, strict=True)
        if known.get(str(file.absolute())) != (state := _state(file, shard))
    ]
    files: dict[Path, Shard] = {}
    times: dict[Path, int] = {}
    pool = ThreadPoolExecutor(_HASHING_THREADS)
    try:
        hashes = pool.map(file_sha256, [file for _, file, _, _ in todo])
        bar = tqdm(hashes, desc="checking shards", total=len(todo), delay=2, disable=None)
        for (each, file, shard, time), found in zip(todo, bar, strict=True):
            if found != shard.sha256:
                raise each.mismatch(file, "other content than in")
            files[file], times[file] = shard, time
    finally:  # Ctrl-C too: neither read all other files, nor read these again
        pool.shutdown(cancel_futures=True)
        mark_verified(files, times)


def mark_verified(
    files: Mapping[Path, Shard], times: Mapping[Path, int], root: Path = Path()
) -> None:
    """Note for `verify` that these files had the contents of these shards at these times of change,
    in nanoseconds."""
    if files:
        before = _read_verified(root)
        known = {name: state for name, state in before.items() if Path(name).exists()}
        new = {
            str(file.absolute()): [shard.bytes, times[file], shard.sha256]
            for file, shard in files.items()
        }
        write_json(root / _VERIFIED, known | new, shared=True)


def _state(file: Path, shard: Shard) -> list[Any]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, shard.sha256]


def _read_verified(root: Path = Path()) -> dict[str, list[Any]]:
    try:
        return dict(json.loads((root / _VERIFIED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
