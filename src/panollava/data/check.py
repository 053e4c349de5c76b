"""Checks a folder of rows and pictures before any training, and reports everything at once: faults,
which reject a row, and suspicions, which a person should look at."""

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from panollava.config import Count, Share, checked
from panollava.data.images import PictureError, map_pictures, read_gpano_tags, read_panorama
from panollava.data.picture_paths import NOT_DOWNLOADED
from panollava.data.picture_suspicions import SIGNS, find_signs
from panollava.data.rows import SPLITS, read_rows
from panollava.data.suspicions import find_copies, find_suspicions
from panollava.errors import UserError

log = logging.getLogger(__name__)

_SHOWN = 200  # suspicions on the console
_EXAMPLES = 5  # pictures in a line


def _zero_counts() -> dict[str, int]:
    return dict.fromkeys(SPLITS, 0)


@dataclass(frozen=True)
class Fault:
    """`row` counts the rows below the header from 0; None: the whole file."""

    split: str
    row: int | None
    url: str
    reason: str


@dataclass
class Report:
    """`rows`, `pictures` and `links` are counts per split. `links` are still to be downloaded; they
    are not faults while there is no folder `images`. `signs`: by picture, each sign that it is no
    complete panorama, with how it was seen. `rows_only`: no picture was decoded."""

    folder: str
    max_rejected: float
    rows: dict[str, int] = field(default_factory=_zero_counts)
    pictures: dict[str, int] = field(default_factory=_zero_counts)
    links: dict[str, int] = field(default_factory=_zero_counts)
    faults: list[Fault] = field(default_factory=list)
    suspicions: list[str] = field(default_factory=list)
    signs: dict[str, dict[str, str]] = field(default_factory=dict)
    rows_only: bool = False

    def bad(self) -> Counter[str]:
        """Bad rows per split."""
        return Counter(fault.split for fault in self.faults)

    def shares(self) -> dict[str, float]:
        """The share of bad rows per split; 1 if the file cannot be read."""
        bad = self.bad()
        return {split: bad[split] / count if count else 1.0 for split, count in self.rows.items()}

    @property
    def passed(self) -> bool:
        return all(share <= self.max_rejected and share < 1 for share in self.shares().values())

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "bad_share": self.shares(), **dataclasses.asdict(self)}


def check(
    folder: Path, root: Path, workers: int, max_rejected: float, rows_only: bool = False
) -> Report:
    """Read all rows of `folder` and, unless `rows_only`, decode all pictures.

    Raises:
        UserError: no such folder, or an invalid `workers` or `max_rejected`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one that contains {', '.join(SPLITS)}.csv")
    checked(Count, workers, "--workers")
    checked(Share, max_rejected, "--max-rejected")
    report = Report(str(folder), max_rejected, rows_only=rows_only)
    splits = {}
    for split in SPLITS:
        try:
            splits[split] = pd.concat(read_rows(folder / f"{split}.csv", root)).sort_values("row")
        except UserError as error:
            report.faults.append(Fault(split, None, "", str(error)))
    broken, signs = ({}, {}) if rows_only else _check_pictures(splits.values(), workers)
    downloaded = (folder / "images").is_dir()
    for split, rows in splits.items():
        waiting = rows["kind"].eq(NOT_DOWNLOADED) & (not downloaded)
        report.rows[split] = len(rows)
        report.pictures[split] = rows["picture"].nunique()
        report.links[split] = rows["url"][waiting].nunique()
        reasons = rows["reason"].astype(object).fillna(rows["picture"].map(broken))
        bad = rows.assign(reason=reasons)[reasons.notna() & ~waiting]
        report.faults += [Fault(split, row.row, row.url, row.reason) for row in bad.itertuples()]
    report.faults.sort(key=lambda fault: SPLITS.index(fault.split))
    report.signs = {_short(path, folder): found for path, found in signs.items()}
    report.suspicions = find_suspicions(splits, folder, root)
    if not rows_only:
        report.suspicions += [*find_copies(splits), *_summarize(report.signs)]
    return report


def show(report: Report) -> None:
    """Log the report as tables. Raises UserError if it has not passed."""
    if report.faults:
        cells = [
            (fault.split, fault.row, fault.reason, _one_line(fault.url, 100))
            for fault in report.faults
        ]
        header = ("split", "row", "reason", "url")
        # A url may look like a number.
        text = tabulate(cells, header, "plain", missingval="-", disable_numparse=[2, 3])
        log.info("faults (rows count from 0 below the header):\n%s", text)
    if suspicions := report.suspicions:
        shown = [f"- {_one_line(text)}" for text in suspicions[:_SHOWN]]
        if more := len(suspicions) - _SHOWN:
            shown += [f"- and {more} more: --json FILE has all of them"] * (more > 0)
        log.info("suspicions:\n%s", "\n".join(shown))
    bad, shares = report.bad(), report.shares()
    pictures, links = report.pictures, report.links
    counts = [
        (split, rows, bad[split], shares[split], pictures[split], links[split])
        for split, rows in report.rows.items()
    ]
    titles = ("split", "rows", "bad", "share", "pictures", "links to download")
    log.info("%s", tabulate(counts, titles, "plain", intfmt=",", floatfmt=".2%"))
    worst = max(shares.values())
    if not report.passed:
        raise UserError(
            f"{report.folder}: {worst:.2%} of a split's rows are bad; --max-rejected allows "
            f"{report.max_rejected:.2%}. Fix the rows listed above"
        )
    if report.rows_only:
        log.info("passed; no picture was opened (--rows-only)")
    elif any(report.links.values()):
        log.info("passed; the links are not downloaded yet, and some may be dead")
    else:
        limit = math.ceil(worst * 10_000) / 10_000
        log.info("passed; `prepare` accepts it with data.max_rejected >= %.4f", limit)


def _one_line(text: str, length: int = 300) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")[:length]


def _check_pictures(
    splits: Iterable[pd.DataFrame], workers: int
) -> tuple[dict[Path, str], dict[Path, dict[str, str]]]:
    """Decode the pictures of all splits once each. Returns the reasons of those with a fault, and
    the signs of others that they are not complete panoramas."""

    def read(path: Path) -> str | dict[str, str]:
        try:
            return find_signs(read_panorama(path, width=256), read_gpano_tags(path))
        except PictureError as error:
            return error.reason

    paths = list(dict.fromkeys(path for rows in splits for path in rows["picture"].dropna()))
    broken, signs = {}, {}
    for path, result in map_pictures(read, paths, workers, "pictures"):
        if isinstance(result, str):
            broken[path] = result
        elif result:
            signs[path] = result
    return broken, signs


def _short(path: Path, folder: Path) -> str:
    """Relative to `folder` if it is below it."""
    parent = folder.resolve()
    return str(path.relative_to(parent) if path.is_relative_to(parent) else path)


def _summarize(signs: dict[str, dict[str, str]]) -> list[str]:
    """A line for each sign, with some of the pictures that show it."""
    lines = []
    for sign, meaning in SIGNS.items():
        shown = [f"{name} ({found[sign]})" for name, found in signs.items() if sign in found]
        if shown:
            more = f", and {len(shown) - _EXAMPLES} more" if len(shown) > _EXAMPLES else ""
            lines.append(f"{len(shown)} pictures {meaning}: {', '.join(shown[:_EXAMPLES])}{more}")
    return lines
