"""Turns rows and panoramas into views. Each panorama is decoded once, and by no other stage."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from panollava import config, paths
from panollava.data.images import PictureError, read_panorama, roll
from panollava.data.rows import COLUMNS, read_rows
from panollava.errors import UserError
from panollava.files import write_array, write_csv
from panollava.geometry.views import Sampler, layout
from panollava.provenance import made_from

log = logging.getLogger(__name__)

READS = ("data", "views", "evaluate.split", "evaluate.rolls")
SPLITS = ("train", "valid", "test")
Views = NDArray[np.uint8]  # (views, size, size, 3)
Item = TypeVar("Item")
Result = TypeVar("Result")


def prepare_project(settings: config.Settings) -> None:
    """`prepare` for the project in the current folder."""
    prepare(
        settings.data,
        settings.views,
        paths.PREPARED,
        Path(),
        rolled_split=settings.evaluate.split,
        rolls=settings.evaluate.rolls,
        threads=settings.machine.decode_threads,
    )


def prepare(
    data: config.Data,
    views: config.Views,
    out: Path,
    root: Path,
    rolled_split: str = "test",
    rolls: Sequence[float] = (),
    threads: int = 2,
) -> None:
    """Write `out`/<split>/{views.npy,rows.csv,rejects.csv} for each split, and `out`/rolled.npy.

    views.npy is uint8 (panoramas, views, size, size, 3), with panoramas in the order of their first
    rows. rolled.npy has, for each panorama of `rolled_split`, its views after a roll by each of
    `rolls` (degrees to the right). `root`: the project's folder, to which `data.dir` is relative.
    `threads`: for decoding.

    Raises:
        UserError: unusable rows or settings, or more bad rows than `data.max_rejected` allows.
            rejects.csv is written in that case too.
    """
    folder = root / data.dir
    if not folder.is_dir():
        raise UserError(
            f"data.dir: no folder '{folder}'; name one that contains train.csv, valid.csv and "
            "test.csv"
        )
    sampler = Sampler(layout(views), views.size)
    _clear(out)
    # Check all rows before opening pictures, which may take an hour.
    splits = {}
    for split in SPLITS:
        splits[split] = read_rows(folder / f"{split}.csv", root)
        _check_rejects(folder / f"{split}.csv", *splits[split], out / split, data.max_rejected)
    _warn_of_untracked({p for rows, _ in splits.values() for p in rows["picture"]}, folder)
    cv2.setNumThreads(1)  # the decoding threads keep all cores busy
    for split, (rows, rejects) in splits.items():
        rolled = out / "rolled.npy" if split == rolled_split else None
        pictures = list(dict.fromkeys(rows["picture"]))
        faults = _write_views(out / split, pictures, sampler, threads, rolled, rolls)
        rows, rejects = _set_aside(rows, rejects, faults)
        _check_rejects(folder / f"{split}.csv", rows, rejects, out / split, data.max_rejected)
        rows["panorama"] = pd.factorize(rows["picture"])[0]
        write_csv(out / split / "rows.csv", rows[["panorama", "row", *COLUMNS]])
        splits[split] = rows, rejects
        log.info(
            "%s: %d rows over %d panoramas, %d rejected%s",
            *(split, len(rows), rows["picture"].nunique(), len(rejects)),
            f" ({_count_kinds(rejects)})" if len(rejects) else "",
        )
    made_from.record_prepared(data, views, out)
    _warn_of_shared({split: set(rows["picture"]) for split, (rows, _) in splits.items()})


def _clear(out: Path) -> None:
    """Remove all outputs, so that a failed run leaves none of an earlier one."""
    made_from.invalidate(out)
    (out / "rolled.npy").unlink(missing_ok=True)
    for split in SPLITS:
        for name in ("views.npy", "rows.csv", "rejects.csv"):
            (out / split / name).unlink(missing_ok=True)


def _warn_of_untracked(pictures: set[Path], folder: Path) -> None:
    """Warn of pictures outside `folder`/images, the only folder of pictures in dvc.yaml."""
    images = folder / "images"
    if outside := pictures - {file.resolve() for file in images.rglob("*")}:
        log.warning(
            "%d pictures are not in %s, such as %s; DVC tracks only that folder and reruns nothing "
            "when they change: move them there",
            *(len(outside), images, min(outside)),
        )


def _warn_of_shared(pictures: dict[str, set[Path]]) -> None:
    for one, other in combinations(pictures, 2):
        if shared := pictures[one] & pictures[other]:
            log.warning(
                "%d pictures are in both %s and %s, such as %s",
                *(len(shared), one, other, min(shared).name),
            )


def _write_views(
    out: Path,
    pictures: Sequence[Path],
    sampler: Sampler,
    threads: int,
    rolled: Path | None,
    rolls: Sequence[float],
) -> dict[Path, PictureError]:
    """Write views.npy with the good pictures in order, and `rolled` if it is not None. Returns the
    faults of the others."""
    rolls = rolls if rolled else ()

    def sample(path: Path) -> list[Views] | PictureError:
        try:
            panorama = read_panorama(path, sampler.panorama_width, sampler.visible_fraction)
        except PictureError as error:
            return error
        return [sampler.sample(roll(panorama, degrees)) for degrees in (0, *rolls)]

    rolled_array = write_array(rolled) if rolled else nullcontext()
    faults: dict[Path, PictureError] = {}
    with write_array(out / "views.npy") as append, rolled_array as append_rolled:
        results = map_in_order(sample, pictures, threads)
        bar = tqdm(results, desc=f"views, {out.name}", total=len(pictures), delay=2, disable=None)
        for path, result in zip(pictures, bar, strict=True):
            if isinstance(result, PictureError):
                faults[path] = result
                continue
            append(result[0][None])
            if append_rolled and rolls:
                append_rolled(np.stack(result[1:]))
    return faults


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Results in the order of the items, computed by threads only a few items ahead, so that memory
    does not grow with the number of items."""
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _set_aside(
    rows: pd.DataFrame, rejects: pd.DataFrame, faults: dict[Path, PictureError]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Move the rows of pictures with faults to the rejects."""
    bad = rows["picture"].isin(list(faults))
    late = rows[bad].assign(
        kind=[faults[path].kind for path in rows["picture"][bad]],
        reason=[faults[path].reason for path in rows["picture"][bad]],
    )
    rejects = pd.concat([rejects, late.drop(columns="picture")]).sort_values("row")
    return rows[~bad].copy(), rejects


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
