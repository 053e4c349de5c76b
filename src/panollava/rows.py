"""Rows in QuIC-360's format: reading and checking. A bad row is set aside with its reason."""

import difflib
from pathlib import Path

import pandas as pd

from panollava.errors import UserError

COLUMNS = ("url", "query", "annotation")
_ALIASES = {"instruction": "query", "response": "annotation"}


def read_rows(csv: Path, root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Good rows, with columns row, url, query, annotation, picture, and rejected ones, with
    row, url, query, annotation, reason. `row` counts from 1, without the header.

    Raises:
        UserError: no file, not a CSV file in UTF-8, a missing column, or no row at all.
    """
    table = _read(csv)
    table.insert(0, "row", range(1, len(table) + 1))
    places = {url: find_picture(url, csv.parent, root) for url in table["url"].unique()}
    reasons = [_reason(row, places[row.url], csv) for row in table.itertuples()]
    table["picture"] = [str(places[url] or "") for url in table["url"]]
    bad = pd.Series([reason is not None for reason in reasons], index=table.index)
    rejects = table[bad].drop(columns="picture")
    rejects["reason"] = [reason for reason in reasons if reason is not None]
    return table[~bad].reset_index(drop=True), rejects.reset_index(drop=True)


def find_picture(url: str, folder: Path, root: Path) -> Path | None:
    """The file that `url` stands for: a path, absolute or from the CSV's folder or the project's
    root, or a link, whose file the download leaves in `images` beside the CSV."""
    if url.startswith(("http://", "https://")):
        candidates = [folder / "images" / url.split("?")[0].rsplit("/", 1)[-1]]
    else:
        candidates = [folder / url, root / url]  # an absolute path stands for itself
    return next((path for path in candidates if url and path.is_file()), None)


def _read(csv: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(csv, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{csv}: no such file; data.dir must hold train.csv, valid.csv and test.csv"
        ) from None
    except pd.errors.EmptyDataError:
        raise UserError(f"{csv}: empty; expected a header {','.join(COLUMNS)} and rows") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise UserError(f"{csv}: not a CSV file in UTF-8: {error}") from None
    if "url" in table and not {"query", "annotation"} <= set(table):
        table = table.rename(columns=_ALIASES)
    for name in COLUMNS:
        if name not in table:
            near = difflib.get_close_matches(name, list(table), n=1, cutoff=0.6)
            hint = f"; did you mean it by '{near[0]}'? Rename that column" if near else ""
            raise UserError(
                f"{csv}: no column '{name}' among {', '.join(map(str, table))}{hint}; expected "
                "url,query,annotation or url,instruction,response"
            )
    if table.empty:
        raise UserError(f"{csv}: a header without rows; expected at least one row")
    return table[list(COLUMNS)].copy()


def _reason(row, picture: Path | None, csv: Path) -> str | None:  # type: ignore[no-untyped-def]
    for name in COLUMNS:
        if not getattr(row, name).strip():
            return f"empty {name}"
    if picture is None:
        if row.url.startswith(("http://", "https://")):
            return f"link not downloaded to {csv.parent / 'images'}"
        return "picture missing"
    return None
