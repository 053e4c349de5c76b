"""Suspicions about rows, for a person to look at: likely misspellings, repeated rows, pictures in
two splits or under two names, and links that share a file. None of them rejects a row."""

import contextlib
import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from itertools import combinations_with_replacement
from pathlib import Path

import pandas as pd

from panollava.data.rows import COLUMNS, is_link, plain_file, shared_pictures

_RARE = 0.05  # relative to how often the likely intended word occurs
_SIMILARITY = 0.85  # difflib's ratio; 1 is equal
_MIN_LETTERS = 5  # shorter words are similar too often


def find_suspicions(splits: dict[str, pd.DataFrame], folder: Path) -> list[str]:
    """Suspicions about all rows, good and bad, of each split. `folder` holds the CSV files."""
    if not splits:
        return []
    rows = pd.concat(splits.values())
    return [
        *_misspellings(rows),
        *_repeated_rows(splits),
        *shared_pictures(splits),
        *_same_bytes(splits),
        *_name_collisions(rows, folder),
    ]


def _misspellings(rows: pd.DataFrame) -> list[str]:
    """Rare queries similar to a frequent one, and words of queries that are rare in the annotations
    but similar to a frequent word there. Words that differ only in a plural `s` do not count."""
    suspicions = []
    queries = Counter(filter(str.strip, rows["query"]))
    for query, count in sorted(queries.items()):
        if near := _likely_intended(query, count, queries):
            suspicions.append(
                f"query '{query}' ({count} rows): is '{near}' ({queries[near]} rows) meant?"
            )
    words = Counter(
        word for text in rows["annotation"] for word in set(re.findall(r"\w+", text.lower()))
    )
    for word in sorted({word for query in queries for word in re.findall(r"\w+", query.lower())}):
        if near := _likely_intended(word, words[word], words):
            suspicions.append(
                f"'{word}' in queries and in {words[word]} annotations: is '{near}' "
                f"(in {words[near]} annotations) meant?"
            )
    return suspicions


def _likely_intended(text: str, count: int, counts: Counter[str]) -> str | None:
    """A similar text that occurs far more often than `count`."""
    if len(text) < _MIN_LETTERS:
        return None
    frequent = [other for other, n in counts.items() if max(count, 1) <= _RARE * n]
    near = difflib.get_close_matches(text, frequent, n=3, cutoff=_SIMILARITY)
    return next((other for other in near if other.rstrip("s") != text.rstrip("s")), None)


def _repeated_rows(splits: dict[str, pd.DataFrame]) -> list[str]:
    return [
        f"{split}: row {row} repeats an earlier one"
        for split, rows in splits.items()
        for row in rows["row"][rows.duplicated(list(COLUMNS))]
    ]


def _name_collisions(rows: pd.DataFrame, folder: Path) -> list[str]:
    """Links that share a file. Only pictures that `download` did not store can be shared."""
    by_file: dict[Path, list[str]] = {}
    for url in dict.fromkeys(filter(is_link, rows["url"])):
        by_file.setdefault(plain_file(url, folder), []).append(url)
    return [
        f"{len(links)} links share the picture {file.name}, such as {links[0]} and {links[1]}"
        for file, links in by_file.items()
        if len(links) > 1 and file.is_file()
    ]


def _same_bytes(splits: dict[str, pd.DataFrame]) -> list[str]:
    """Pictures that are under two names, in one split or in two."""
    pictures = {split: set(rows["picture"].dropna()) for split, rows in splits.items()}
    groups = _groups(set().union(*pictures.values()), lambda path: path.stat().st_size)
    copies = [group for same_size in groups for group in _groups(same_size, _digest)]
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
