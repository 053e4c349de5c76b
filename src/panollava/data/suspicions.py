"""Suspicions about rows, for a person to look at: likely misspellings, repeated rows, pictures in
two splits, and links that share a file. None of them rejects a row."""

import difflib
import re
from collections import Counter
from pathlib import Path

import pandas as pd

from panollava.data.picture_paths import is_link, plain_file
from panollava.data.rows import COLUMNS, shared_pictures

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
