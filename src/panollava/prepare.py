"""Rows and panoramas into views: each panorama is decoded once, and never again."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from panollava import config
from panollava.errors import UserError
from panollava.pictures import read_panorama
from panollava.rows import COLUMNS, read_rows
from panollava.views import Sampler, layout

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
Item, Result = TypeVar("Item"), TypeVar("Result")


def prepare(data: config.Data, views: config.Views, out: Path, root: Path) -> None:
    """Write `out`/<split>/{views.npy,rows.csv,rejects.csv} for each split.

    Raises:
        UserError: unusable rows or settings, or more bad rows than `data.max_rejected` allows.
    """
    if not Path(data.dir).is_dir():
        raise UserError(f"data.dir: no folder '{data.dir}'; give one that holds train.csv, ...")
    sampler = Sampler(layout(views), views.size)
    cv2.setNumThreads(1)  # the threads are those that decode
    pictures: dict[str, set[str]] = {}
    for split in SPLITS:
        rows = _prepare_split(split, data, sampler, out / split, root)
        pictures[split] = set(rows["picture"])
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        if shared := pictures[one] & pictures[other]:
            log.warning("%d pictures are both in %s and in %s", len(shared), one, other)


def _prepare_split(
    split: str, data: config.Data, sampler: Sampler, out: Path, root: Path
) -> pd.DataFrame:
    csv = Path(data.dir) / f"{split}.csv"
    rows, rejects = read_rows(csv, root)
    total = len(rows) + len(rejects)
    out.mkdir(parents=True, exist_ok=True)
    paths = list(dict.fromkeys(rows["picture"]))
    kept, broken = _write_views(out / "views.npy", paths, sampler, data.workers, split)
    bad = rows["picture"].isin(list(broken))
    late = rows[bad].assign(reason=rows[bad]["picture"].map(broken))
    rejects = pd.concat([rejects, late.drop(columns="picture")]).sort_values("row")
    rows = rows[~bad].assign(panorama=rows[~bad]["picture"].map(kept))
    rejects.to_csv(out / "rejects.csv", index=False)
    _check_rejects(csv, out / "rejects.csv", rejects, total, data.max_rejected)
    rows[["panorama", "row", *COLUMNS]].to_csv(out / "rows.csv", index=False)
    log.info(
        "%s: %d rows over %d panoramas, %d rejected", split, len(rows), len(kept), len(rejects)
    )
    return rows


def _write_views(
    out: Path, paths: list[str], sampler: Sampler, workers: int, split: str
) -> tuple[dict[str, int], dict[str, str]]:
    """Write the views of all readable pictures in order; return their places in the array, and
    what is wrong with the others."""
    width = sampler.panorama_width

    def sample(path: str) -> NDArray[np.uint8] | str:
        try:
            return sampler.sample(read_panorama(Path(path), width))
        except UserError as error:
            return str(error)

    kept: dict[str, int] = {}
    broken: dict[str, str] = {}
    beside = out.with_name(out.name + ".part")
    shape = (len(sampler.layout.projections), sampler.size, sampler.size, 3)
    with beside.open("wb") as file:
        _write_header(file, 0, shape)
        results = _in_order(sample, paths, workers)
        bar = tqdm(results, desc=f"views, {split}", total=len(paths), unit="panorama")
        for path, views in zip(paths, bar, strict=True):
            if isinstance(views, str):
                broken[path] = views
            else:
                kept[path] = len(kept)
                file.write(views.tobytes())
        file.seek(0)
        _write_header(file, len(kept), shape)
    os.replace(beside, out)
    return kept, broken


def _write_header(file, count: int, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    """The header of a .npy file. It has the same length for every count."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Results in the order of the items, computed by threads a few items ahead, so that memory
    doesn't grow with the number of items."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _check_rejects(
    csv: Path, file: Path, rejects: pd.DataFrame, total: int, allowed: float
) -> None:
    if len(rejects) <= allowed * total and len(rejects) < total:
        return
    reasons = rejects["reason"].str.replace(r"^.*?: ", "", regex=True).value_counts()
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.head(5).items())
    first = rejects.iloc[0]
    raise UserError(
        f"{csv}: {len(rejects)} of {total} rows are bad ({listed}), more than data.max_rejected "
        f"{allowed:g} allows; the first is row {first['row']} ({first['url']}): "
        f"{first['reason']}. All are listed in {file}: mend them, or raise data.max_rejected"
    )
