"""`panollava check --look`: one HTML file with pictures and texts for a person to look through."""

import base64
import hashlib
import random
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jinja2
import numpy as np
import pandas as pd

from panollava.data.check import Report
from panollava.data.images import PictureError, read_panorama
from panollava.data.prepare import map_pictures
from panollava.data.rows import read_rows
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
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
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


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ folder }}: panoramas and rows</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 0 auto; padding: 16px;
    overflow-wrap: break-word; }
  h1, h2 { line-height: 1.25; }
  .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px; }
  .cards > div { border: 1px solid #8886; border-radius: 8px; padding: 8px; min-width: 0; }
  img, .none { width: 100%; aspect-ratio: 2; border-radius: 4px; background: #8883; }
  .none { display: grid; place-content: center; }
  .note { font-weight: 600; }
  .quiet { opacity: 0.75; font-size: 0.9em; }
  table { border-collapse: collapse; }
  td, th { text-align: left; padding: 2px 16px 2px 0; vertical-align: top; }
  .number { text-align: right; font-variant-numeric: tabular-nums; }
  .scroll { overflow-x: auto; }
</style>
{% macro card_of(card) %}
<div>
  {% if card.image %}
  <img src="{{ card.image }}" alt="{{ card.name }}" loading="lazy" width="320" height="160">
  {% else %}
  <div class="none">not shown</div>
  {% endif %}
  <div class="quiet">{{ card.name }}</div>
  {% for note in card.notes %}
  <div class="note">{{ note }}</div>
  {% endfor %}
  {% for place, query, annotation in card.rows %}
  <div><span class="quiet">{{ place }}:</span> <b>{{ query }}</b> {{ annotation }}</div>
  {% endfor %}
</div>
{% endmacro %}
{% macro of(shown, all) %}
{% if shown < all %}
<p class="quiet">The first {{ shown }} of {{ all }}.</p>
{% endif %}
{% endmacro %}
<h1>{{ folder }}</h1>
<p>{% for split, count in splits.items() %}{{ split }}: {{ count }} rows. {% endfor %}
{{ pictures }} pictures, {{ all_faults }} faults, {{ all_suspicions }} suspicions.</p>
<h2>Suspicions</h2>
{{ of(suspicions | length, all_suspicions) }}
<ul>
{% for text in suspicions %}
  <li>{{ text }}</li>
{% else %}
  <li>None.</li>
{% endfor %}
</ul>
<h2>Suspect pictures</h2>
{{ of(suspects | length, all_suspects) }}
<div class="cards">
{% for card in suspects %}
{{ card_of(card) }}
{% else %}
<p>None.</p>
{% endfor %}
</div>
<h2>Samples of the other pictures</h2>
<div class="cards">
{% for card in samples %}
{{ card_of(card) }}
{% else %}
<p>None.</p>
{% endfor %}
</div>
<h2>Rows per query</h2>
{{ of(queries | length, all_queries) }}
<table>
{% for query, count in queries %}
  <tr><td class="number">{{ count }}</td><td>{{ query }}</td></tr>
{% endfor %}
</table>
<h2>Text lengths</h2>
{% if tokens %}
<p>Tokens of a query with its prompt and annotation, of {{ tokens.rows }} rows of train: median
{{ tokens.quantiles[0] }}, 95% at most {{ tokens.quantiles[1] }}, longest {{ tokens.quantiles[2] }}.
Longer ones than max_text_length are cut.</p>
<div class="scroll"><table>
  <tr><th>stage</th><th>max_text_length</th><th>longer rows</th><th>share</th></tr>
{% for stage, limit, longer, share in tokens.stages %}
  <tr><td>{{ stage }}</td><td class="number">{{ limit }}</td><td class="number">{{ longer }}</td>
  <td class="number">{{ share }}</td></tr>
{% endfor %}
</table></div>
{% else %}
<p>Not counted. {{ lengths.missing }}</p>
{% endif %}
<h2>Faults</h2>
{{ of(faults | length, all_faults) }}
<div class="scroll"><table>
{% for split, row, reason, url in faults %}
  <tr><td>{{ split }}</td><td class="number">{{ "" if row is none else row }}</td>
  <td>{{ reason }}</td><td>{{ url }}</td></tr>
{% else %}
  <tr><td>None.</td></tr>
{% endfor %}
</table></div>
</html>
"""
_NO_ROWS = pd.DataFrame(columns=["row", "url", "query", "annotation", "picture", "split"])


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
    for group in _equal_files(by_picture):
        for picture in group:
            names = ", ".join(other.name for other in group if other != picture)
            notes.setdefault(picture, []).append(f"the same bytes as {names[:_CHARACTERS]}")
    return {picture: notes[picture] for picture in sorted(notes) if picture in by_picture}


def _equal_files(pictures: Iterable[Path]) -> list[list[Path]]:
    by_size: dict[int, list[Path]] = {}
    by_digest: dict[bytes, list[Path]] = {}
    for picture in pictures:
        if picture.is_file():
            by_size.setdefault(picture.stat().st_size, []).append(picture)
    for group in by_size.values():
        for picture in group if len(group) > 1 else ():
            digest = hashlib.sha256(picture.read_bytes()).digest()
            by_digest.setdefault(digest, []).append(picture)
    return [group for group in by_digest.values() if len(group) > 1]


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
