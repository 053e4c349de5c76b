"""`panollava check --look`: one HTML file with pictures and texts for a person to look through."""

import base64
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jinja2
import numpy as np
import pandas as pd

from panollava.data.check import Report
from panollava.data.images import PictureError, map_pictures, read_panorama
from panollava.data.rows import read_rows
from panollava.data.suspicions import equal_files
from panollava.data.texts import is_blank
from panollava.errors import UserError
from panollava.files import write_text
from panollava.logs import printable

# These keep the file below 15 MB.
_PICTURE_BYTES = 9_000_000  # of all pictures, as base64
_SUSPECTS, _SAMPLES, _TEXTS, _QUERIES = 400, 200, 300, 100
_ROWS, _CHARACTERS = 3, 200  # shown of a picture, and of each text
_MAX_COUNTED = 20_000  # rows whose tokens are counted
_SIZE = (320, 160)
_NO_ROWS = pd.DataFrame(columns=["row", "url", "query", "annotation", "picture", "split"])


class Lengths(NamedTuple):
    """`tokens` gives the tokens of a query with its annotation; `limits` are each stage's
    max_text_length. `missing`: why there are none."""

    tokens: Callable[[str, str], int] | None
    limits: dict[str, int]
    missing: str = ""


class _Card(NamedTuple):
    name: str
    image: str  # data URI; empty if the picture cannot be shown
    notes: list[str]
    rows: list[tuple[str, str, str]]  # split and number, query, annotation


def write_overview(
    file: Path, folder: Path, root: Path, report: Report, lengths: Lengths, workers: int
) -> None:
    """Write suspicions, suspect pictures, samples, rows per query and text lengths of `folder`."""
    splits = {}
    for split in report.rows:
        try:
            splits[split] = pd.concat(read_rows(folder / f"{split}.csv", root)).sort_values("row")
        except UserError:  # one of the report's faults
            continue
    rows = pd.concat([table.assign(split=split) for split, table in splits.items()] or [_NO_ROWS])
    by_picture = dict(list(rows.dropna(subset="picture").groupby("picture", sort=True)))
    suspects = _suspects(by_picture, folder, report)
    others = sorted(by_picture.keys() - suspects.keys())
    samples = sorted(random.Random(0).sample(others, min(_SAMPLES, len(others))))
    shown = [*list(suspects)[:_SUSPECTS], *samples]
    cards = _cards(shown, suspects, by_picture, folder, workers)
    queries = rows["query"].value_counts(sort=True)
    order = sorted(queries.items(), key=lambda item: (-item[1], item[0]))
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
        Path(__file__).with_suffix(".html.jinja").read_text(encoding="utf-8")
    )
    text = page.render(
        folder=folder,
        splits={split: len(table) for split, table in splits.items()},
        pictures=len(by_picture),
        faults=[(f.split, f.row, f.reason, _cut(f.url)) for f in report.faults[:_TEXTS]],
        all_faults=len(report.faults),
        suspicions=[_cut(text) for text in report.suspicions[:_TEXTS]],
        all_suspicions=len(report.suspicions),
        suspects=cards[: len(shown) - len(samples)],
        all_suspects=len(suspects),
        samples=cards[len(shown) - len(samples) :],
        queries=[(_cut(str(query)), count) for query, count in order[:_QUERIES]],
        all_queries=len(queries),
        tokens=_token_table(rows[rows["split"] == "train"], lengths),
        lengths=lengths,
    )
    write_text(file, printable(text))


def _suspects(
    by_picture: dict[Path, pd.DataFrame], folder: Path, report: Report
) -> dict[Path, list[str]]:
    """What is suspected of each picture, faults included, in the order of their names."""
    notes: dict[Path, list[str]] = {}
    reasons = {(fault.split, fault.row): fault.reason for fault in report.faults}
    for picture, rows in by_picture.items():
        places = zip(rows["split"], rows["row"], strict=True)
        found = sorted({reasons[place] for place in places if place in reasons})
        if found:
            notes.setdefault(picture, []).extend(found)
        for one, other in combinations(rows["split"].unique(), 2):
            notes.setdefault(picture, []).append(f"in {one} and in {other}")
    for name, signs in report.signs.items():
        picture = (folder / name).resolve()
        notes.setdefault(picture, []).extend(f"{sign}: {seen}" for sign, seen in signs.items())
    for group in equal_files(by_picture):
        for picture in group:
            names = ", ".join(sorted(other.name for other in group if other != picture))
            notes.setdefault(picture, []).append(f"the same bytes as {names[:_CHARACTERS]}")
    return {picture: notes[picture] for picture in sorted(notes) if picture in by_picture}


def _cards(
    pictures: list[Path],
    notes: dict[Path, list[str]],
    by_picture: dict[Path, pd.DataFrame],
    folder: Path,
    workers: int,
) -> list[_Card]:
    cards, room, parent = [], _PICTURE_BYTES, folder.resolve()
    for path, image in map_pictures(_thumbnail, pictures, workers, "pictures to look at"):
        room -= len(image)
        rows = [
            (f"{row.split} {row.row}", _cut(row.query), _cut(row.annotation))
            for row in by_picture[path].head(_ROWS).itertuples()
        ]
        name = path.relative_to(parent) if path.is_relative_to(parent) else path
        cards.append(_Card(_cut(str(name)), image if room > 0 else "", notes.get(path, []), rows))
    return cards


def _thumbnail(path: Path) -> str:
    """A data URI, or nothing if the picture cannot be decoded."""
    try:
        panorama = read_panorama(path, _SIZE[0])
    except PictureError:
        return ""
    small = cv2.resize(panorama, _SIZE, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 75])
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.tobytes()).decode()}"


def _token_table(rows: pd.DataFrame, lengths: Lengths) -> dict[str, Any]:
    """Quantiles of the rows' tokens, and for each stage its limit and how many rows are longer."""
    good = rows[~(rows["query"].map(is_blank) | rows["annotation"].map(is_blank))]
    if lengths.tokens is None or good.empty:
        return {}
    good = good.sample(min(_MAX_COUNTED, len(good)), random_state=0)
    pairs = zip(good["query"], good["annotation"], strict=True)
    counts = np.array([lengths.tokens(query, annotation) for query, annotation in pairs])
    return {
        "rows": len(good),
        "quantiles": [int(count) for count in np.quantile(counts, [0.5, 0.95, 1])],
        "stages": [
            (stage, limit, int((counts > limit).sum()), f"{(counts > limit).mean():.1%}")
            for stage, limit in lengths.limits.items()
        ],
    }


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + " …"
