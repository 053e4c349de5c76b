"""Rows and panoramas into views: each panorama is decoded once, and by no other stage."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from panollava import config, paths
from panollava.data.images import read_panorama, roll
from panollava.data.rows import COLUMNS, read_rows
from panollava.errors import UserError
from panollava.files import write_array, write_csv
from panollava.geometry.views import Sampler, layout
from panollava.provenance import made_from

log = logging.getLogger(__name__)

READS = ("data", "views", "evaluate.split", "evaluate.rolls")
SPLITS = ("train", "valid", "test")
Item = TypeVar("Item")
Result = TypeVar("Result")


def prepare_project(settings: config.Settings) -> None:
    """`prepare` in the project's folder, which is the current one."""
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
    """Write `out`/<split>/{views.npy,rows.csv,rejects.csv} for each split, and `out`/rolled.npy:
    for each panorama of `rolled_split` its views when it is turned by each of `rolls`, degrees to
    the right, after each other. `data.dir` is relative to `root`, the project's folder;
    `threads` decode pictures.

    Raises:
        UserError: unusable rows or settings, or more bad rows than `data.max_rejected` allows;
            rejects.csv is written all the same.
    """
    folder = root / data.dir
    _check_settings(data, folder, threads)
    sampler = Sampler(layout(views), views.size)
    # All rows are checked before the first picture is opened, which may take an hour.
    splits = {}
    rolled = out / "rolled.npy"
    rolled.unlink(missing_ok=True)
    made_from.invalidate(out)
    for split in SPLITS:
        _clear(out / split)
        splits[split] = read_rows(folder / f"{split}.csv", root)
        _check_rejects(folder / f"{split}.csv", *splits[split], out / split, data.max_rejected)
    _warn_of_unwatched({p for rows, _ in splits.values() for p in rows["picture"]}, folder)
    cv2.setNumThreads(1)  # the threads are those that decode
    pictures = {}
    for split, (rows, rejects) in splits.items():
        turned = (rolled, rolls) if split == rolled_split else None
        rows, rejects = _write_views(out / split, rows, rejects, sampler, threads, turned)
        _check_rejects(folder / f"{split}.csv", rows, rejects, out / split, data.max_rejected)
        write_csv(out / split / "rows.csv", rows[["panorama", "row", *COLUMNS]])
        pictures[split] = set(rows["picture"])
        rejected = f"{len(rejects)} rejected" + (f" ({_count(rejects)})" if len(rejects) else "")
        log.info(
            "%s: %d rows over %d panoramas, %s", split, len(rows), len(pictures[split]), rejected
        )
    made_from.record_prepared(data, views, out)
    for one, other in combinations(SPLITS, 2):
        if shared := pictures[one] & pictures[other]:
            log.warning(
                "%d pictures are both in %s and in %s, such as %s",
                *(len(shared), one, other, min(shared).name),
            )


def _check_settings(data: config.Data, folder: Path, threads: int) -> None:
    if not folder.is_dir():
        raise UserError(
            f"data.dir: no folder '{folder}'; name one that holds train.csv, valid.csv and test.csv"
        )
    if threads < 1:
        raise UserError(f"machine.decode_threads: expected at least 1, found {threads}")
    if not 0 <= data.max_rejected <= 1:
        raise UserError(
            f"data.max_rejected: expected a share from 0 to 1, found {data.max_rejected}"
        )


def _clear(out: Path) -> None:
    """Leave nothing of an earlier run that a failed one could be taken for."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("views.npy", "rows.csv", "rejects.csv"):
        (out / name).unlink(missing_ok=True)


def _warn_of_unwatched(pictures: set[Path], folder: Path) -> None:
    """Of pictures that aren't in `folder`/images, which is all that dvc.yaml names of them."""
    images = folder / "images"
    if outside := pictures - {file.resolve() for file in images.rglob("*")}:
        log.warning(
            "%d pictures are not in %s, such as %s; DVC watches that folder alone, and runs "
            "nothing again when they change: put them there",
            *(len(outside), images, min(outside)),
        )


def _write_views(
    out: Path,
    rows: pd.DataFrame,
    rejects: pd.DataFrame,
    sampler: Sampler,
    threads: int,
    turned: tuple[Path, Sequence[float]] | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write views.npy: uint8 (panoramas, views, size, size, 3), panoramas in the order of their
    first rows; and if `turned` names a file and angles, the same of each panorama so turned.
    Return the rows with their index into views.npy as `panorama`, and all rejects."""
    rolled, rolls = turned or (None, ())
    paths = list(dict.fromkeys(rows["picture"]))

    def sample(path: Path) -> list[NDArray[np.uint8]] | str:
        try:
            panorama = read_panorama(path, sampler.panorama_width, sampler.visible_fraction)
        except UserError as error:
            return str(error).removeprefix(f"{path}: ")
        return [sampler.sample(roll(panorama, degrees)) for degrees in (0, *rolls)]

    places: dict[Path, int] = {}
    broken: dict[Path, str] = {}
    with ExitStack() as files:
        append = files.enter_context(write_array(out / "views.npy"))
        append_rolled = rolled and files.enter_context(write_array(rolled))
        views = in_order(sample, paths, threads)
        bar = tqdm(views, desc=f"views, {out.name}", total=len(paths), delay=2, disable=None)
        for path, result in zip(paths, bar, strict=True):
            if isinstance(result, str):
                broken[path] = result
                continue
            places[path] = len(places)
            append(result[0][None])
            if append_rolled and rolls:
                append_rolled(np.stack(result[1:]))
    bad = rows["picture"].isin(list(broken))
    good, late = rows[~bad].copy(), rows[bad].drop(columns="picture")
    good["panorama"] = [places[path] for path in good["picture"]]
    late["reason"] = [broken[path] for path in rows["picture"][bad]]
    return good, pd.concat([rejects, late]).sort_values("row")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Results in the order of the items, computed by threads a few items ahead, so that memory
    doesn't grow with the number of items."""
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _check_rejects(
    source: Path, rows: pd.DataFrame, rejects: pd.DataFrame, out: Path, allowed: float
) -> None:
    """Write rejects.csv, and stop if there are too many, or if nothing is left."""
    file = out / "rejects.csv"
    write_csv(file, rejects)
    total = len(rows) + len(rejects)
    if len(rejects) <= allowed * total and len(rows):
        return
    examples = "; ".join(
        f"row {reject.row} ({reject.url[:200]}): {reject.reason}"
        for reject in rejects.head(3).itertuples()
    )
    limit = f"more than data.max_rejected {allowed:g} allows" if len(rows) else "which leaves none"
    raise UserError(
        f"{source}: {len(rejects)} of {total} rows are bad, {limit}: {_count(rejects)}. "
        f"The first: {examples}. All are listed in {file}; mend them"
        + (", or raise data.max_rejected" if len(rows) else "")
    )


def _count(rejects: pd.DataFrame) -> str:
    """How often each kind of reason occurs: what stands before its details."""
    kinds = rejects["reason"].str.split(": ").str[0].value_counts()
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
