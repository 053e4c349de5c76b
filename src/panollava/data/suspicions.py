"""Suspicions about rows, for a person to look at: likely misspellings, odd texts, repeated rows,
pictures in two splits or under two names, and links that share a file. None rejects a row."""

import contextlib
import hashlib
from collections.abc import Callable, Hashable, Iterable
from itertools import combinations_with_replacement
from pathlib import Path

import pandas as pd

from panollava.data.misspellings import find_misspellings
from panollava.data.picture_paths import PictureFinder, is_link, plain_file
from panollava.data.rows import COLUMNS, shared_pictures
from panollava.data.texts import find_odd_texts


def find_suspicions(splits: dict[str, pd.DataFrame], folder: Path, root: Path) -> list[str]:
    """Suspicions about all rows, good and bad, of each split. `folder` holds the CSV files, `root`
    is the project's folder."""
    if not splits:
        return []
    rows = pd.concat(splits.values())
    return [
        *find_misspellings(rows),
        *find_odd_texts(splits),
        *_repeated_rows(splits),
        *shared_pictures(splits),
        *_other_spellings(rows, PictureFinder(folder, root)),
        *_name_collisions(rows, folder),
    ]


def _repeated_rows(splits: dict[str, pd.DataFrame]) -> list[str]:
    suspicions = []
    for split, rows in splits.items():
        again = rows["row"][rows.duplicated(list(COLUMNS))].tolist()
        if len(again) == 1:
            suspicions.append(f"{split}: row {again[0]} repeats an earlier one")
        elif again:
            first = ", ".join(map(str, again[:10]))
            suspicions.append(f"{split}: {len(again)} rows repeat earlier ones: {first}, ...")
    return suspicions


def _other_spellings(rows: pd.DataFrame, finder: PictureFinder) -> list[str]:
    found = rows[rows["picture"].notna()].drop_duplicates("url")
    other = [row for row in found.itertuples() if not finder.named_exactly(row.url)]
    if not other:
        return []
    first = f"'{other[0].url}', found as {other[0].picture.name}"
    return [f"{len(other)} urls spell the name of their picture in another way, such as {first}"]


def _name_collisions(rows: pd.DataFrame, folder: Path) -> list[str]:
    """Links that share a file. Only pictures that `download` did not store can be shared."""
    by_file: dict[Path, list[str]] = {}
    for url in dict.fromkeys(filter(is_link, rows["url"])):
        by_file.setdefault(plain_file(url, folder), []).append(url)
    images = folder / "images"
    # Names are compared with a listing: some are too long to look for.
    names = {file.name for file in images.iterdir()} if images.is_dir() else set()
    return [
        f"{len(links)} links share the picture {file.name}, such as {links[0]} and {links[1]}"
        for file, links in by_file.items()
        if len(links) > 1 and file.name in names
    ]


def find_copies(splits: dict[str, pd.DataFrame]) -> list[str]:
    """Pictures that are under two names, in one split or in two."""
    pictures = {split: set(rows["picture"].dropna()) for split, rows in splits.items()}
    copies = equal_files(set().union(*pictures.values()))
    suspicions = []
    for one, other in combinations_with_replacement(pictures, 2):
        pairs = [
            (a, b)
            for group in copies
            for a in sorted(group & pictures[one])
            for b in sorted(group & pictures[other])
            if a != b and (one != other or a < b)
        ]
        if pairs:
            where = f"both in {one}" if one == other else f"one in {one} and one in {other}"
            suspicions.append(
                f"{len(pairs)} pairs of pictures have the same bytes under two names, {where}, "
                f"such as {pairs[0][0]} and {pairs[0][1]}"
            )
    return suspicions


def equal_files(paths: Iterable[Path]) -> list[set[Path]]:
    """Groups of files with the same bytes."""
    same_size = _groups(paths, lambda path: path.stat().st_size)
    return [group for files in same_size for group in _groups(files, _digest)]


def _groups(paths: Iterable[Path], key: Callable[[Path], Hashable]) -> list[set[Path]]:
    """The paths with equal keys, where there are two or more. Files that cannot be read are left
    out: they are faults."""
    groups: dict[Hashable, set[Path]] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            groups.setdefault(key(path), set()).add(path)
    return [group for group in groups.values() if len(group) > 1]


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
