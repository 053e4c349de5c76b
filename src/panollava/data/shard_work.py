"""Makes shards: each one once, whoever makes it. A finished shard is found by the hash of what it
is made from, so that an interrupted command continues with the missing ones, and several processes
and machines can share them."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from panollava import paths
from panollava.data.shards import Shard, mark_verified, write_manifest
from panollava.errors import UserError
from panollava.files import open_array, write_json
from panollava.provenance.fingerprint import file_sha256

log = logging.getLogger(__name__)

# NFS may show a machine for so long that a file is missing which another one has written.
_SEEN_SECONDS = 60.0

Item = TypeVar("Item")


class Planned(Protocol):
    """A shard that is to exist."""

    @property
    def key(self) -> str: ...  # a hash

    @property
    def title(self) -> str: ...  # for messages


PlannedT = TypeVar("PlannedT", bound=Planned)


# Calls a function with some of the shards at a time, on other machines.
Distribute = Callable[[Callable[[Sequence[Any]], object], Sequence[Any]], None]


class Part(NamedTuple):
    """Part `number`, from 1, of `total` of a command's work: every `total`-th shard."""

    number: int
    total: int

    def pick(self, items: Sequence[Item]) -> Sequence[Item]:
        return items[self.number - 1 :: self.total]

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


class Record(NamedTuple):
    """A finished shard."""

    files: dict[str, Shard]  # by suffix
    times: dict[str, int]  # when they were written, in nanoseconds
    faults: list[Any]  # of pictures that could not be used: (place in the shard, kind, reason)


class ShardStore(NamedTuple):
    """The folder of a command's shards, each under a key: the hash of its inputs. It is permanent
    in `data.store_dir`; otherwise it holds unfinished work until the outputs are written."""

    folder: Path
    permanent: bool
    root: Path  # of the project

    def path(self, key: str, suffix: str) -> Path:
        """A file of the shard with this key."""
        return self.folder / key[:2] / f"{key}{suffix}"

    def find(self, key: str) -> Record | None:
        """A finished shard. None: it is missing."""
        try:
            text = self.path(key, ".json").read_text(encoding="utf-8")
            files, times, faults = json.loads(text)
            record = Record(
                {suffix: Shard(*shard) for suffix, shard in files.items()}, times, faults
            )
            sizes = [(self.folder / each.file).stat().st_size for each in record.files.values()]
        except (OSError, ValueError, TypeError, AttributeError):  # missing, or not a record
            return None
        complete = sizes == [each.bytes for each in record.files.values()]
        return record if complete else None

    def missing(
        self,
        shards: Sequence[PlannedT],
        merge: bool,
        again: Callable[[PlannedT, Record], bool] = lambda shard, record: False,
    ) -> list[PlannedT]:
        """Those to make, one for each key. `again`: whether to make a finished one again.

        Raises:
            UserError: some are missing, and `merge` wants none to be made.
        """
        different = {shard.key: shard for shard in shards}.values()
        found = [(shard, self.find(shard.key)) for shard in different]
        if merge:
            if titles := [shard.title for shard, record in found if record is None]:
                raise _missing_error(self.folder.name, titles, len(found))
            return []
        missing = [shard for shard, record in found if record is None or again(shard, record)]
        if finished := len(found) - len(missing):
            log.info("%d of %d shards are finished already", finished, len(found))
        return missing

    def records(self, keys: Sequence[str]) -> list[Record]:
        """Raises UserError for a shard that was removed meanwhile."""
        records, deadline = [], time.monotonic() + _SEEN_SECONDS
        for each in keys:
            while (record := self.find(each)) is None:
                if time.monotonic() > deadline:
                    file = self.path(each, ".json")
                    raise UserError(f"{file}: a finished shard was removed; run the command again")
                time.sleep(0.2)
            records.append(record)
        return records

    def finish(self, key: str, files: Mapping[str, int], faults: Sequence[Any] = ()) -> None:
        """Record a shard whose files are written. `files`: the panoramas in each, by suffix."""
        shards, times = {}, {}
        for suffix, panoramas in files.items():
            file = self.path(key, suffix)
            name, status = file.relative_to(self.folder).as_posix(), file.stat()
            shards[suffix] = Shard(name, panoramas, status.st_size, file_sha256(file))
            times[suffix] = status.st_mtime_ns
        write_json(self.path(key, ".json"), [shards, times, faults], shared=True)

    def publish(self, out: Path, records: Sequence[Record], suffix: str, code: str = "") -> str:
        """Write the shard set `out` of one file of each shard, but for those without panoramas.
        `code`: see `write_manifest`. Returns the set's digest."""
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        found: dict[Path, Shard] = {}
        times: dict[Path, int] = {}
        for number, record in enumerate(records):
            shard = record.files[suffix]
            file = self.folder / shard.file
            if not shard.panoramas:
                continue
            if not self.permanent:
                source, file = file, out / f"{number:06d}{file.suffix}"
                shard = shard._replace(file=file.name)
                _link(source, file)
            found[file], times[file] = shard, record.times[suffix]
        mark_verified(found, times, self.root)
        first = next(iter(found), None)
        shape, dtype = (), "uint8"  # type: tuple[int, ...], str
        if first is not None and first.suffix == ".npy":
            array = open_array(first)
            shape, dtype = array.shape[1:], str(array.dtype)
        place = self.folder if self.permanent else None
        return write_manifest(out, [*found.values()], place, shape, dtype, code)

    def close(self) -> None:
        """All outputs are written: unfinished work may be deleted once DVC has recorded them."""
        if not self.permanent and self.folder.is_dir():
            (self.folder / paths.FINISHED).touch()


def open_store(command: str, store_dir: str | None, root: Path = Path()) -> ShardStore:
    if store_dir is not None:
        return ShardStore(root / store_dir / command, True, root)
    folder = root / paths.RESUME / f"{command}-shards"
    (folder / paths.FINISHED).unlink(missing_ok=True)
    return ShardStore(folder, False, root)


def _missing_error(folder: str, missing: Sequence[str], count: int) -> UserError:
    command = folder.removesuffix("-shards")
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
