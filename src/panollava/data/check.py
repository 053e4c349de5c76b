"""Everything that is wrong with a folder of rows and pictures, found at once and before any
training: faults, which set a row aside, and suspicions, which a person should look at."""

import dataclasses
import difflib
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from panollava.config import Count, Share, checked
from panollava.data.images import read_panorama
from panollava.data.prepare import SPLITS, in_order
from panollava.data.rows import COLUMNS, NOT_DOWNLOADED, is_link, plain_file, read_rows
from panollava.errors import UserError
from panollava.logs import table

log = logging.getLogger(__name__)

_RARE = 0.05  # of how often the word that is meant occurs
_LOOKS_LIKE = 0.85  # difflib's ratio: 1 is equal
_LONG = 5  # letters: shorter words look alike too often


@dataclass(frozen=True)
class Fault:
    """`row` counts the rows below the header from 0; None: the whole file."""

    split: str
    row: int | None
    url: str
    reason: str


@dataclass
class Report:
    """`links`: to be downloaded still; they are no faults as long as there is no `images`."""

    folder: str
    max_rejected: float
    rows: dict[str, int] = field(default_factory=dict)  # by split, as the next two
    pictures: dict[str, int] = field(default_factory=dict)
    links: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    suspicions: list[str] = field(default_factory=list)

    def shares(self) -> dict[str, float]:
        """The share of each split's rows that is bad: 1 if the file can't be read."""
        bad = Counter(fault.split for fault in self.faults)
        return {split: bad[split] / count if count else 1.0 for split, count in self.rows.items()}

    @property
    def passed(self) -> bool:
        return all(share <= self.max_rejected and share < 1 for share in self.shares().values())

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "bad_share": self.shares(), **dataclasses.asdict(self)}


def check(folder: Path, root: Path, workers: int, max_rejected: float) -> Report:
    """Read all rows and decode all pictures of `folder`.

    Raises:
        UserError: no such folder, or an impossible `workers` or `max_rejected`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one that holds {', '.join(SPLITS)}.csv")
    checked(Count, workers, "--workers")
    checked(Share, max_rejected, "--max-rejected")
    report = Report(str(folder), max_rejected)
    good: dict[str, pd.DataFrame] = {}
    everything: dict[str, pd.DataFrame] = {}
    fetched = (folder / "images").is_dir()
    for split in SPLITS:
        try:
            rows, rejects = read_rows(folder / f"{split}.csv", root)
        except UserError as error:
            report.rows[split] = report.pictures[split] = report.links[split] = 0
            report.faults.append(Fault(split, None, "", str(error).removeprefix(f"{folder}/")))
            continue
        waiting = rejects["reason"].eq(NOT_DOWNLOADED) & (not fetched)
        good[split], everything[split] = rows, pd.concat([rows, rejects]).sort_values("row")
        report.rows[split] = len(everything[split])
        report.pictures[split] = rows["picture"].nunique()
        report.links[split] = rejects["url"][waiting].nunique()
        report.faults += _faults(split, rejects[~waiting])
    broken = _broken_pictures([p for rows in good.values() for p in rows["picture"]], workers)
    for split, rows in good.items():
        late = rows[rows["picture"].isin(list(broken))]
        report.faults += _faults(split, late.assign(reason=late["picture"].map(broken)))
    order = {split: place for place, split in enumerate(SPLITS)}
    report.faults.sort(key=lambda fault: (order[fault.split], fault.row or 0))
    if everything:
        texts = pd.concat(everything.values())
        report.suspicions += [*_misspelt(texts), *_repeated(everything)]
        report.suspicions += [*_in_two_splits(everything), *_under_one_name(texts, folder)]
    return report


def show(report: Report) -> None:
    """Log the report as tables; `passed` decides how it ends."""
    if report.faults:
        header = ("split", "row", "reason", "url")
        cells = [
            (fault.split, "-" if fault.row is None else fault.row, fault.reason, fault.url[:100])
            for fault in report.faults
        ]
        log.info("faults, with rows counted from 0 below the header:\n%s", table(cells, header))
    if report.suspicions:
        log.info("to be looked at:\n%s", "\n".join(f"- {each}" for each in report.suspicions))
    bad = Counter(fault.split for fault in report.faults)
    counts = [
        (split, rows, bad[split], f"{report.shares()[split]:.2%}", report.pictures[split])
        + (report.links[split],)
        for split, rows in report.rows.items()
    ]
    titles = ("split", "rows", "bad", "share", "pictures", "links to download")
    log.info("%s", table(counts, titles))
    worst = max(report.shares().values())
    if not report.passed:
        raise UserError(
            f"{report.folder}: {worst:.2%} of a split's rows are bad, where "
            f"{report.max_rejected:.2%} may be (--max-rejected); mend the rows listed above"
        )
    if any(report.links.values()):
        log.info("passed; the links are still to be downloaded, and some may be dead")
    else:
        log.info("passed; prepare takes it from data.max_rejected: %.4f on", _up(worst))


def write_json(report: Report, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.as_json(), indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _up(share: float) -> float:
    """Four decimals, never fewer than the share."""
    return -(-share * 10_000 // 1) / 10_000


def _faults(split: str, rows: pd.DataFrame) -> list[Fault]:
    return [Fault(split, row.row, row.url, row.reason) for row in rows.itertuples()]


def _broken_pictures(paths: list[Path], workers: int) -> dict[Path, str]:
    """The reasons of those pictures that can't be read, each decoded once."""

    def read(path: Path) -> str | None:
        try:
            read_panorama(path, width=256)
        except UserError as error:
            return str(error).removeprefix(f"{path}: ")
        return None

    once = list(dict.fromkeys(paths))
    results = in_order(read, once, workers)
    bar = tqdm(results, desc="pictures", total=len(once), delay=2, disable=None)
    return {path: reason for path, reason in zip(once, bar, strict=True) if reason is not None}


def _misspelt(rows: pd.DataFrame) -> list[str]:
    """Rare queries that look like a frequent one, and words of queries that annotations hardly
    use while they often use one that looks alike. Words that differ in a plural `s` are not
    meant."""
    queries = Counter(filter(str.strip, rows["query"]))
    found = []
    for query, count in sorted(queries.items()):
        if near := _frequent_one(query, count, queries):
            found.append(
                f"query '{query}' ({count} rows): is '{near}' ({queries[near]} rows) meant?"
            )
    words = Counter(
        word for text in rows["annotation"] for word in set(re.findall(r"\w+", text.lower()))
    )
    for word in sorted({word for query in queries for word in re.findall(r"\w+", query.lower())}):
        if near := _frequent_one(word, words[word], words):
            found.append(
                f"'{word}' in queries, and in {words[word]} annotations: is '{near}' "
                f"(in {words[near]} annotations) meant?"
            )
    return found


def _frequent_one(text: str, count: int, among: Counter[str]) -> str | None:
    """What looks like `text` and occurs far more often."""
    if len(text) < _LONG:
        return None
    often = [other for other, n in among.items() if max(count, 1) <= _RARE * n]
    near = difflib.get_close_matches(text, often, n=3, cutoff=_LOOKS_LIKE)
    singular = [other for other in near if other.rstrip("s") != text.rstrip("s")]
    return singular[0] if singular else None


def _repeated(splits: dict[str, pd.DataFrame]) -> list[str]:
    return [
        f"{split}: row {row} repeats an earlier one"
        for split, rows in splits.items()
        for row in rows["row"][rows.duplicated(list(COLUMNS))]
    ]


def _in_two_splits(splits: dict[str, pd.DataFrame]) -> list[str]:
    # A link that has no picture yet stands for itself.
    pictures = {
        name: set(rows["picture"].where(rows["picture"].notna(), rows["url"]).astype(str))
        for name, rows in splits.items()
    }
    return [
        f"{len(shared)} pictures are both in {one} and in {other}, such as {min(shared)}"
        for one, other in combinations(pictures, 2)
        if (shared := pictures[one] & pictures[other])
    ]


def _under_one_name(rows: pd.DataFrame, folder: Path) -> list[str]:
    """Links that share a file, which only pictures collected by hand can."""
    by_file: dict[Path, list[str]] = {}
    for url in dict.fromkeys(filter(is_link, rows["url"])):
        by_file.setdefault(plain_file(url, folder), []).append(url)
    return [
        f"{len(links)} links share the picture {file.name}, such as {links[0]} and {links[1]}"
        for file, links in by_file.items()
        if len(links) > 1 and file.is_file()
    ]
