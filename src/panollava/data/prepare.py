"""Turns rows and panoramas into views. Each panorama is decoded once, and by no other stage."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from panollava import config, paths
from panollava.data.picture_shards import (
    ROLLED,
    PictureShard,
    ShardFormat,
    is_outdated,
    make_shards,
    shard_key,
)
from panollava.data.rows import COLUMNS, SPLITS, read_rows, shared_pictures
from panollava.data.shard_work import Distribute, Part, Record, ShardStore, open_store
from panollava.errors import UserError
from panollava.files import write_csv
from panollava.geometry.views import layout, resampled
from panollava.provenance import code_digest, made_from
from panollava.provenance.fingerprint import fingerprint

log = logging.getLogger(__name__)

READS = ("data", "views", "evaluate.split", "evaluate.rolls")
_FOLDERS = (paths.PANORAMAS, paths.PICTURES)
Table = tuple[pd.DataFrame, pd.DataFrame]  # good rows and rejected ones


def prepare_project(
    settings: config.Settings,
    root: Path = Path(),
    part: Part | None = None,
    merge: bool = False,
    distribute: Distribute | None = None,
) -> None:
    """Write runs/prepared/<split>/{panoramas,rows.csv,rejects.csv} for each split, and
    runs/prepared/<split>/pictures and runs/prepared/rolled of `evaluate.split`. `root`: the
    project's folder.

    The shard sets hold panoramas in the order of their first rows. panoramas: uint8 (views, size,
    size, 3) or a JPEG, see `data.store`. rolled: the views after a roll by each of `evaluate.rolls`
    (degrees to the right) that does not only reorder them, one after the other. pictures: JPEGs for
    people to look at.

    `part`: make only these of the missing shards, and write no outputs. `merge`: make none.
    `distribute`: makes them on other machines.

    Raises:
        UserError: unusable rows or settings, missing shards, or more bad rows than
            `data.max_rejected` allows. rejects.csv is written in that case too.
    """
    folder, out = root / settings.data.dir, root / paths.PREPARED
    if part is None:
        _clear(out)
    # Check all rows before opening pictures, which may take an hour.
    sources = {split: folder / f"{split}.csv" for split in SPLITS}
    hashes = {s: made_from.hash_source(file) for s, file in sources.items()}  # before reading them
    tables = {split: read_rows(file, root) for split, file in sources.items()}
    for split, table in tables.items():
        _check_rejects(settings, root, split, table, writes=part is None)
    shards = _plan_shards(settings, root, tables, part)
    store = open_store("prepare", settings.data.store_dir, root)
    missing = store.missing(shards, merge, is_outdated)
    make = partial(make_shards, store, settings.machine.decode_threads)
    if distribute and missing:
        distribute(make, missing)
    else:
        make(missing)
    if part is not None:
        log.info("part %d of %d: its %d shards are finished", *part, len(shards))
        return
    _warn_of_untracked({p for rows, _ in tables.values() for p in rows["picture"]}, folder)
    digests: dict[str, str] = {}
    for split, table in tables.items():
        mine = [shard for shard in shards if shard.split == split]
        records = store.records([shard.key for shard in mine])
        tables[split] = _set_aside(table, mine, records)
        _check_rejects(settings, root, split, tables[split])
        digests |= _publish(store, out, mine, records)
        _write_rows(out / split / "rows.csv", *tables[split])
    made_from.record_prepared(settings, out, digests, hashes)
    store.close()
    for warning in shared_pictures({split: rows for split, (rows, _) in tables.items()}):
        log.warning("%s", warning)


def _plan_shards(
    settings: config.Settings, root: Path, tables: Mapping[str, Table], part: Part | None
) -> Sequence[PictureShard]:
    """All shards in order, or those of a part."""
    size, code = settings.data.shard_size, code_digest.digest("prepare")
    evaluated, rolls = settings.evaluate.split, tuple(_rolls(settings))
    planned = []
    for split, (rows, _) in tables.items():
        format = ShardFormat(
            settings.views, settings.data.store, rolls if split == evaluated else None
        )
        pictures = rows["picture"].unique()
        for number, first in enumerate(range(0, len(pictures), size)):
            planned.append((split, number, tuple(pictures[first : first + size]), format))
    return [
        PictureShard(*each, shard_key(*each[2:], code, root))
        for each in (part.pick(planned) if part else planned)
    ]


def _set_aside(table: Table, shards: Sequence[PictureShard], records: Sequence[Record]) -> Table:
    """Reject the rows of the pictures that could not be used."""
    rows, rejects = table
    faults = pd.DataFrame(
        [
            (shard.pictures[place], kind, reason)
            for shard, record in zip(shards, records, strict=True)
            for place, kind, reason in record.faults
        ],
        columns=["picture", "kind", "reason"],
    )
    rejects = pd.concat([rejects, rows.merge(faults, on="picture")]).sort_values("row")
    return rows[~rows["picture"].isin(faults["picture"])], rejects


def _write_rows(file: Path, rows: pd.DataFrame, rejects: pd.DataFrame) -> None:
    numbered = rows.assign(panorama=pd.factorize(rows["picture"])[0])
    write_csv(file, numbered[["panorama", "row", *COLUMNS]])
    log.info(
        "%s: %d rows over %d panoramas, %d rejected%s",
        *(file.parent.name, len(rows), rows["picture"].nunique(), len(rejects)),
        f" ({_count_kinds(rejects)})" if len(rejects) else "",
    )


def _publish(
    store: ShardStore, out: Path, shards: Sequence[PictureShard], records: Sequence[Record]
) -> dict[str, str]:
    """Write the shard sets of a split. Returns their digests by folder."""
    digests = {}
    for name, suffix in shards[0].format.files.items():
        folder = ROLLED if name == ROLLED else f"{shards[0].split}/{name}"
        sampled_later = name == paths.PANORAMAS and suffix == ".tar"
        code = fingerprint(code_digest.digest("prepare"), [], {}) if sampled_later else ""
        digests[folder] = store.publish(out / folder, records, suffix, code)
    return digests


def _rolls(settings: config.Settings) -> list[float]:
    """The rolls that are sampled, after noting the others in the log."""
    views, rolls = settings.views, settings.evaluate.rolls
    sampled = resampled(views, rolls)
    if exact := [f"{degrees:g}" for degrees in rolls if degrees not in sampled]:
        log.info(
            "evaluate.rolls: multiples of the view stride (%g degrees) show the same pixels in "
            "another order: %s; their features are not computed again",
            *(360 / len(layout(views).projections), ", ".join(exact)),
        )
    return sampled


def _clear(out: Path) -> None:
    """Remove all outputs, so that a failed run leaves none of an earlier one."""
    made_from.invalidate(out)
    for split in SPLITS:
        for name in ("rows.csv", "rejects.csv"):
            (out / split / name).unlink(missing_ok=True)
    for folder in (out / ROLLED, *(out / s / f for s in SPLITS for f in _FOLDERS)):
        shutil.rmtree(folder, ignore_errors=True)


def _warn_of_untracked(pictures: set[Path], folder: Path) -> None:
    """Warn of pictures outside `folder`/images, the only folder of pictures in dvc.yaml."""
    images = folder / "images"
    if outside := pictures - {file.resolve() for file in images.rglob("*")}:
        log.warning(
            "%d pictures are not in %s, such as %s; DVC tracks only that folder and reruns nothing "
            "when they change: move them there",
            *(len(outside), images, min(outside)),
        )


def _check_rejects(
    settings: config.Settings, root: Path, split: str, table: Table, writes: bool = True
) -> None:
    """Write rejects.csv. Raises UserError if there are too many, or no rows are left."""
    rows, rejects = table
    source, allowed = root / settings.data.dir / f"{split}.csv", settings.data.max_rejected
    listed = "them (panollava check lists all)"
    if writes:
        file = root / paths.PREPARED / split / "rejects.csv"
        write_csv(file, rejects[["row", *COLUMNS, "reason"]])
        listed = f"those listed in {file}"
    total = len(rows) + len(rejects)
    if len(rejects) <= allowed * total and len(rows):
        return
    examples = "; ".join(
        f"row {reject.row} ({reject.url[:200]}): {reject.reason}"
        for reject in rejects.head(3).itertuples()
    )
    limit = f"more than data.max_rejected {allowed:g} allows" if len(rows) else "so none is left"
    raise UserError(
        f"{source}: {len(rejects)} of {total} rows are bad, {limit}: {_count_kinds(rejects)}. "
        f"The first: {examples}. Fix {listed}"
        + (", or raise data.max_rejected" if len(rows) else "")
    )


def _count_kinds(rejects: pd.DataFrame) -> str:
    counts = rejects["kind"].value_counts()
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items())
