"""Turns rows and panoramas into views. Each panorama is decoded once, and by no other stage."""

import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from panollava import config, paths
from panollava.data.images import (
    PictureError,
    map_pictures,
    read_panorama,
    reduced_jpeg,
    roll,
)
from panollava.data.rows import COLUMNS, SPLITS, read_rows, shared_pictures
from panollava.errors import UserError
from panollava.files import atomic_write, write_array, write_csv
from panollava.geometry.views import Sampler, layout, resampled
from panollava.provenance import made_from
from panollava.provenance.fingerprint import file_sha256

log = logging.getLogger(__name__)

READS = ("data", "views", "evaluate.split", "evaluate.rolls")
Views = NDArray[np.uint8]  # (views, size, size, 3)


def prepare_project(settings: config.Settings, root: Path = Path()) -> None:
    """Write runs/prepared/<split>/{views.npy,rows.csv,rejects.csv} for each split,
    runs/prepared/rolled.npy, and pictures/ of `evaluate.split`. `root`: the project's folder.

    views.npy is uint8 (panoramas, views, size, size, 3), with panoramas in the order of their first
    rows. rolled.npy has, for each panorama of `evaluate.split`, its views after a roll by each of
    `evaluate.rolls` (degrees to the right) that does not only reorder them. pictures/<panorama>.jpg
    are its panoramas, for people to look at.

    Raises:
        UserError: unusable rows or settings, or more bad rows than `data.max_rejected` allows.
            rejects.csv is written in that case too.
    """
    folder, out = root / settings.data.dir, root / paths.PREPARED
    allowed, threads = settings.data.max_rejected, settings.machine.decode_threads
    sampler = Sampler(layout(settings.views), settings.views.size)
    rolls = _rolls(settings)
    _clear(out)
    # Check all rows before opening pictures, which may take an hour.
    splits, tables = {}, {}
    for split in SPLITS:
        csv = folder / f"{split}.csv"
        tables[split] = file_sha256(csv) if csv.is_file() else ""
        splits[split] = read_rows(folder / f"{split}.csv", root)
        _check_rejects(folder / f"{split}.csv", *splits[split], out / split, allowed)
    _warn_of_untracked({p for rows, _ in splits.values() for p in rows["picture"]}, folder)
    cv2.setNumThreads(1)  # the decoding threads keep all cores busy
    for split, (rows, rejects) in splits.items():
        pictures, is_evaluated = rows["picture"].unique(), split == settings.evaluate.split
        rolled = rolls if is_evaluated else None
        faults = _write_views(out / split, pictures, sampler, threads, rolled)
        rejects = pd.concat([rejects, rows.merge(faults, on="picture")]).sort_values("row")
        rows = rows[~rows["picture"].isin(faults["picture"])]
        _check_rejects(folder / f"{split}.csv", rows, rejects, out / split, allowed)
        rows = rows.assign(panorama=pd.factorize(rows["picture"])[0])
        write_csv(out / split / "rows.csv", rows[["panorama", "row", *COLUMNS]])
        splits[split] = rows, rejects
        log.info(
            "%s: %d rows over %d panoramas, %d rejected%s",
            *(split, len(rows), rows["picture"].nunique(), len(rejects)),
            f" ({_count_kinds(rejects)})" if len(rejects) else "",
        )
    made_from.record_prepared(settings, out, tables)
    for warning in shared_pictures({split: rows for split, (rows, _) in splits.items()}):
        log.warning("%s", warning)


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
    (out / "rolled.npy").unlink(missing_ok=True)
    for split in SPLITS:
        for name in ("views.npy", "rows.csv", "rejects.csv"):
            (out / split / name).unlink(missing_ok=True)
        if (pictures := out / split / paths.PICTURES).is_dir():
            shutil.rmtree(pictures)


def _warn_of_untracked(pictures: set[Path], folder: Path) -> None:
    """Warn of pictures outside `folder`/images, the only folder of pictures in dvc.yaml."""
    images = folder / "images"
    if outside := pictures - {file.resolve() for file in images.rglob("*")}:
        log.warning(
            "%d pictures are not in %s, such as %s; DVC tracks only that folder and reruns nothing "
            "when they change: move them there",
            *(len(outside), images, min(outside)),
        )


def _write_views(
    out: Path, pictures: Sequence[Path], sampler: Sampler, threads: int, rolls: list[float] | None
) -> pd.DataFrame:
    """Write views.npy with the good pictures in order; unless `rolls` is None, also rolled.npy and
    the pictures reduced. Returns picture, kind and reason of the others."""

    def sample(path: Path) -> tuple[list[Views], bytes] | PictureError:
        try:
            panorama = read_panorama(path, sampler.panorama_width)
        except PictureError as error:
            return error
        views = [sampler.sample(roll(panorama, degrees)) for degrees in (0, *(rolls or ()))]
        return views, b"" if rolls is None else reduced_jpeg(panorama)

    count = 0
    rolled = nullcontext() if rolls is None else write_array(out.parent / "rolled.npy")
    faults = []
    with write_array(out / "views.npy") as append, rolled as append_rolled:
        for path, result in map_pictures(sample, pictures, threads, f"views, {out.name}"):
            if isinstance(result, PictureError):
                faults.append((path, result.kind, result.reason))
                continue
            views, jpeg = result
            append(views[0][None])
            if append_rolled and rolls:
                append_rolled(np.stack(views[1:]))
            if jpeg:
                with atomic_write(out / paths.PICTURES / paths.picture_name(count)) as temporary:
                    temporary.write_bytes(jpeg)
            count += 1
    return pd.DataFrame(faults, columns=["picture", "kind", "reason"])


def _check_rejects(
    source: Path, rows: pd.DataFrame, rejects: pd.DataFrame, out: Path, allowed: float
) -> None:
    """Write rejects.csv. Raises UserError if there are too many, or no rows are left."""
    file = out / "rejects.csv"
    write_csv(file, rejects[["row", *COLUMNS, "reason"]])
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
        f"The first: {examples}. Fix those listed in {file}"
        + (", or raise data.max_rejected" if len(rows) else "")
    )


def _count_kinds(rejects: pd.DataFrame) -> str:
    counts = rejects["kind"].value_counts()
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items())
