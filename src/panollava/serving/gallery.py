"""The answers of an evaluation, and the panoramas that a report shows: those answered best, about
the median, and worst."""

import io
import json
from typing import NamedTuple

import pandas as pd

from panollava import paths
from panollava.errors import UserError

SCORES = {"cider_d": "CIDEr-D", "rouge_l": "ROUGE-L"}  # the first one that is known ranks
_EACH = 2  # panoramas
_QUERIES = 12  # of a panorama
_LETTERS = 1000  # of a text
_TEXTS = ("url", "query", "prediction")
_COLUMNS = ("panorama", *_TEXTS, "swapped", "references", *SCORES)


class Row(NamedTuple):
    query: str
    answer: str  # complete: the map of a part of it would be another one
    swapped: str  # the answer about another panorama; empty: no other one was asked
    references: list[str]
    score: float | None


class Panorama(NamedTuple):
    number: int
    url: str
    score: float | None  # mean over all its queries
    rows: list[Row]
    left_out: int  # queries that are not in `rows`


class Gallery(NamedTuple):
    score: str | None  # the name of the score that ranks panoramas
    groups: dict[str, list[Panorama]]

    @property
    def panoramas(self) -> list[Panorama]:
        return [each for group in self.groups.values() for each in group]


def read_predictions(
    content: bytes, place: str, columns: tuple[str, ...] = _COLUMNS
) -> pd.DataFrame:
    """The table in a predictions.csv. `place`: its name in errors.

    Raises:
        UserError: not a table that `evaluate` writes with these columns.
    """
    try:
        table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
        if missing := [name for name in columns if name not in table]:
            raise ValueError(f"no column '{missing[0]}'")
        if table.empty:
            raise ValueError("no rows")
        for name in SCORES:
            if name in columns:
                table[name] = pd.to_numeric(table[name])
        table["panorama"] = table["panorama"].astype(int)
        if "references" in columns:
            table["references"] = [
                [str(text) for text in json.loads(t)] for t in table["references"]
            ]
    except (ValueError, TypeError) as error:  # pandas' own errors are ValueErrors
        raise UserError(
            f"{place}: not what evaluate writes ({str(error).strip()[:200]}); remove it, and run: "
            "dvc repro evaluate"
        ) from None
    return table


def read_project_predictions() -> pd.DataFrame:
    try:
        return read_predictions(paths.PREDICTIONS.read_bytes(), str(paths.PREDICTIONS))
    except FileNotFoundError:
        raise UserError(
            f"{paths.PREDICTIONS}: no such file; run: dvc repro evaluate "
            "(without DVC: panollava evaluate)"
        ) from None


def choose(table: pd.DataFrame) -> Gallery:
    """The best, median and worst panoramas by the mean score of their answers; one of each
    where there are few. Equal ones are in their order."""
    score = next((name for name in SCORES if table[name].notna().any()), None)
    panoramas = table.groupby("panorama")
    ranks = panoramas[score].mean().fillna(0.0) if score else panoramas.size() * 0.0
    order = ranks.sort_values(ascending=False, kind="stable").index.tolist()
    count = min(_EACH, max(1, len(order) // 3))
    best, rest = order[:count], order[count:]
    worst, rest = rest[-count:], rest[:-count]
    first = max(0, (len(rest) - count) // 2)
    groups = {"best": best, "median": rest[first : first + count], "worst": worst}
    return Gallery(
        SCORES[score] if score else None,
        {name: [_panorama(table, n, score) for n in each] for name, each in groups.items() if each},
    )


def _panorama(table: pd.DataFrame, number: int, score: str | None) -> Panorama:
    mine = table[table["panorama"] == number]
    values = [None] * len(mine) if score is None else [_known(each) for each in mine[score]]
    known = [value for value in values if value is not None]
    rows = [
        Row(each.query, each.prediction, each.swapped, each.references, value)
        for each, value in zip(mine.itertuples(), values, strict=True)
    ]
    mean = sum(known) / len(known) if known else None
    return Panorama(number, mine["url"].iloc[0], mean, rows[:_QUERIES], len(rows[_QUERIES:]))


def _known(value: float) -> float | None:
    return None if pd.isna(value) else float(value)


def shorten(text: str) -> str:
    """A text as a page shows it: no longer than needed to tell what it is about."""
    return text if len(text) <= _LETTERS else text[:_LETTERS] + " …"
