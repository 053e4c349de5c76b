"""Reads rows in QuIC-360's CSV format and finds their pictures, without opening these. A bad row is
set aside with its reason."""

from functools import cache
from itertools import combinations
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from panollava.data.images import PictureError
from panollava.data.picture_paths import PictureFinder
from panollava.data.tables import read_records
from panollava.data.texts import is_blank

SPLITS = ("train", "valid", "test")
COLUMNS = ("url", "query", "annotation")


def read_rows(file: Path, root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Good rows, with columns row, url, query, annotation and picture (an absolute path), and
    rejected ones, with row, url, query, annotation, kind and reason.

    `row` counts the rows below the header from 0, like QuIC-360's lists. `kind` is one of a
    few phrases; `reason` adds details. Neither names a folder, so that both are the same on every
    machine. `root`: the project's folder.

    Raises:
        UserError: no file, not a table, a missing column, or no rows.
    """
    hint = "data.dir must contain train.csv, valid.csv and test.csv"
    header, places, records = read_records(file, COLUMNS, hint)
    finder = PictureFinder(file.parent, root)

    @cache
    def locate(url: str) -> Path | PictureError:
        try:
            return finder.find(url)
        except PictureError as error:
            return error

    rows, rejects = [], []
    bar = tqdm(records, desc=file.name, delay=2, disable=None)
    for number, record in enumerate(bar):
        padded = record + [""] * (len(header) - len(record))
        cells = {"row": number} | {name: padded[place] for name, place in places.items()}
        picture = locate(padded[places["url"]])
        if len(record) != len(header):
            reason = f"{len(record)} cells instead of {len(header)}"
            rejects.append(cells | {"kind": reason, "reason": reason})
        elif empty := [name for name in COLUMNS if is_blank(padded[places[name]])]:
            kind, text = f"empty {empty[0]}", padded[places[empty[0]]]
            detail = ": only invisible characters" if text.strip() else ""
            rejects.append(cells | {"kind": kind, "reason": kind + detail})
        elif isinstance(picture, PictureError):
            rejects.append(cells | {"kind": picture.kind, "reason": picture.reason})
        else:
            rows.append(cells | {"picture": picture})
    return (
        pd.DataFrame(rows, columns=["row", *COLUMNS, "picture"]),
        pd.DataFrame(rejects, columns=["row", *COLUMNS, "kind", "reason"]),
    )


def shared_pictures(splits: dict[str, pd.DataFrame]) -> list[str]:
    """A warning for each two splits with pictures in common. Links are compared by address until
    they are downloaded."""
    pictures = {
        split: set(rows["picture"].where(rows["picture"].notna(), rows["url"]).astype(str))
        for split, rows in splits.items()
    }
    return [
        f"{len(shared)} pictures are in both {one} and {other}, such as {min(shared)}"
        for one, other in combinations(pictures, 2)
        if (shared := pictures[one] & pictures[other])
    ]
