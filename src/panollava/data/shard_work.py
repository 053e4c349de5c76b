"""Makes shards: each one once, whoever makes it. A finished shard is found by the hash of what it
is made from, so that an interrupted command continues with the missing ones, and several processes
and machines can share them."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from panollava import paths
from panollava.data.shards import Shard, remember, write_manifest
from panollava.errors import UserError
from panollava.files import open_array, write_json
from panollava.provenance.fingerprint import file_sha256

# NFS may show a machine for so long that a file is missing which another one has written.
_SEEN_SECONDS = 60.0

Item = TypeVar("Item")


class Part(Protocol):
    @property
    def made_from(self) -> str: ...  # a hash


PartT = TypeVar("PartT", bound=Part)


class Share(NamedTuple):
    """The `number`th, counted from 1, of `total` shares of a command's shards."""

    number: int
    total: int

    def pick(self, items: Sequence[Item]) -> Sequence[Item]:
        return items[self.number - 1 :: self.total]

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


class Record(NamedTuple):
    """A finished shard."""

    files: dict[str, Shard]  # by the ends of their names
    times: dict[str, int]  # when they were written, in nanoseconds
    notes: list[Any]  # what else is known of its panoramas


class Workshop(NamedTuple):
    """The folder in which a command makes shards. They stay in `data.store_dir`; without it, they
    are unfinished work until the command has written its outputs."""

    folder: Path
    stays: bool
    root: Path  # of the project

    def path(self, made_from: str, end: str) -> Path:
        """A file of the shard that is made from what has this hash."""
        return self.folder / made_from[:2] / f"{made_from}{end}"

    def find(self, made_from: str) -> Record | None:
        """A finished shard. None: it is missing."""
        try:
            text = self.path(made_from, ".json").read_text(encoding="utf-8")
            files, times, notes = json.loads(text)
            record = Record({end: Shard(*shard) for end, shard in files.items()}, times, notes)
            sizes = [(self.folder / each.file).stat().st_size for each in record.files.values()]
        except (OSError, ValueError, TypeError, AttributeError):  # missing, or not a record
            return None
        complete = sizes == [each.bytes for each in record.files.values()]
        return record if complete else None

    def missing(
        self, shards: Sequence[PartT], again: Callable[[PartT, Record], bool] | None = None
    ) -> list[PartT]:
        """Those to make: one of each that are made from the same. `again`: whether to make a
        finished one again."""

        def is_missing(shard: PartT) -> bool:
            record = self.find(shard.made_from)
            return record is None or bool(again and again(shard, record))

        different = {shard.made_from: shard for shard in shards}
        return [shard for shard in different.values() if is_missing(shard)]

    def records(self, made_from: Sequence[str]) -> list[Record]:
        """Raises UserError for a shard that was removed meanwhile."""
        records, deadline = [], time.monotonic() + _SEEN_SECONDS
        for each in made_from:
            while (record := self.find(each)) is None:
                if time.monotonic() > deadline:
                    file = self.path(each, ".json")
                    raise UserError(f"{file}: a finished shard was removed; run the command again")
                time.sleep(0.2)
            records.append(record)
        return records

    def finish(self, made_from: str, files: Mapping[str, int], notes: Sequence[Any] = ()) -> None:
        """Record a shard whose files are written. `files`: the panoramas in each, by the ends of
        their names."""
        shards, times = {}, {}
        for end, panoramas in files.items():
            file = self.path(made_from, end)
            name, status = file.relative_to(self.folder).as_posix(), file.stat()
            shards[end] = Shard(name, panoramas, status.st_size, file_sha256(file))
            times[end] = status.st_mtime_ns
        write_json(self.path(made_from, ".json"), [shards, times, notes], shared=True)

    def publish(self, out: Path, records: Sequence[Record], end: str, code: str = "") -> str:
        """Write the shard set `out` of one file of each shard, but for those without panoramas.
        `code`: see `write_manifest`. Returns the set's digest."""
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        found: dict[Path, Shard] = {}
        times: dict[Path, int] = {}
        for number, record in enumerate(records):
            shard = record.files[end]
            file = self.folder / shard.file
            if not shard.panoramas:
                continue
            if not self.stays:
                source, file = file, out / f"{number:06d}{file.suffix}"
                shard = shard._replace(file=file.name)
                _link(source, file)
            found[file], times[file] = shard, record.times[end]
        remember(found, times, self.root)
        first = next(iter(found), None)
        shape, dtype = (), "uint8"  # type: tuple[int, ...], str
        if first is not None and first.suffix == ".npy":
            array = open_array(first)
            shape, dtype = array.shape[1:], str(array.dtype)
        place = self.folder if self.stays else None
        return write_manifest(out, [*found.values()], place, shape, dtype, code)

    def close(self) -> None:
        """All outputs are written: unfinished work may be deleted once DVC has recorded them."""
        if not self.stays and self.folder.is_dir():
            (self.folder / paths.FINISHED).touch()


def open_workshop(command: str, store_dir: str | None, root: Path = Path()) -> Workshop:
    if store_dir is not None:
        return Workshop(root / store_dir / command, True, root)
    folder = root / paths.RESUME / f"{command}-shards"
    (folder / paths.FINISHED).unlink(missing_ok=True)
    return Workshop(folder, False, root)


def missing_error(command: str, missing: Sequence[str], count: int) -> UserError:
    """`missing`: descriptions of shards."""
    examples = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    return UserError(
        f"--merge: {len(missing)} of {count} shards are missing ({examples}); make them with: "
        f"panollava {command} --shard I/N"
    )


def _link(source: Path, target: Path) -> None:
    """Another name for the same file, or a copy: runs/ may be on another file system, or on one
    without links. The source may belong to several shard sets, and may be needed again if this
    process is killed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)  # keeps the time of change, see `verify`
