"""Rows in QuIC-360's format: reading and checking. A bad row is set aside with its reason; what
the pictures hold is checked by whoever opens them."""

import contextlib
import csv
import difflib
import hashlib
import re
from pathlib import Path, PurePosixPath

import pandas as pd

from panollava.errors import UserError

COLUMNS = ("url", "query", "annotation")
NOT_DOWNLOADED = "link not downloaded"
_ALIASES = {"query": "instruction", "annotation": "response"}
_LINKS = ("http://", "https://")


def read_rows(file: Path, root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Good rows, with columns row, url, query, annotation and picture (an absolute path), and
    rejected ones, with row, url, query, annotation and reason. `row` counts the rows below the
    header from 0, as QuIC-360's own lists do. `root`: the project's folder.

    A reason names no folder, so that it is the same on every machine.

    Raises:
        UserError: no file, not CSV in UTF-8, a missing column, or no row at all.
    """
    header, records = _read(file)
    places = _find_columns(file, header)
    pictures: dict[str, Path | None] = {}
    rows, rejects = [], []
    for number, record in enumerate(records):
        padded = record + [""] * (len(header) - len(record))
        cells = {"row": number} | {name: padded[place] for name, place in places.items()}
        url = padded[places["url"]]
        if url not in pictures:
            pictures[url] = find_picture(url, file.parent, root)
        if len(record) != len(header):
            rejects.append(cells | {"reason": f"{len(record)} cells instead of {len(header)}"})
        elif empty := [name for name in COLUMNS if not padded[places[name]].strip()]:
            rejects.append(cells | {"reason": f"empty {empty[0]}"})
        elif pictures[url] is None:
            missing = NOT_DOWNLOADED if is_link(url) else "picture missing"
            rejects.append(cells | {"reason": missing})
        else:
            rows.append(cells | {"picture": pictures[url]})
    return (
        pd.DataFrame(rows, columns=["row", *COLUMNS, "picture"]),
        pd.DataFrame(rejects, columns=["row", *COLUMNS, "reason"]),
    )


def is_link(url: str) -> bool:
    return url.startswith(_LINKS)


def picture_file(link: str, folder: Path) -> Path:
    """Where the download leaves the picture of `link`, for a CSV in `folder`: no other link has
    the same file, also where a file system takes `A.jpg` and `a.jpg` for one."""
    name = PurePosixPath(_own_name(link))
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", name.stem)[:100]
    suffix = name.suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,5}", name.suffix) else ""
    return folder / "images" / f"{stem}-{hashlib.sha256(link.encode()).hexdigest()[:16]}{suffix}"


def plain_file(link: str, folder: Path) -> Path:
    """Where a picture of `link` may lie that was collected in another way: under its own name,
    which other links may have as well."""
    return folder / "images" / _own_name(link)


def _own_name(link: str) -> str:
    return re.split(r"[?#]", link, maxsplit=1)[0].rsplit("/", 1)[-1]


def find_picture(url: str, folder: Path, root: Path) -> Path | None:
    """The file that `url` stands for: a path, absolute or from the CSV's folder or the project's
    root, or a link, whose picture lies in `images` beside the CSV."""
    if is_link(url):
        candidates = [picture_file(url, folder), plain_file(url, folder)]
    else:
        candidates = [folder / url, root / url]  # an absolute path stands for itself
    for path in candidates:
        # No path at all, such as an annotation among the urls, which is too long a name.
        with contextlib.suppress(OSError):
            if path.is_file():
                return path.resolve()
    return None


def _read(file: Path) -> tuple[list[str], list[list[str]]]:
    """The header and all other records; blank lines are none."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
            if "\t" in first and "," not in first:
                raise UserError(
                    f"{file}: its columns are separated by tabs; expected commas "
                    "(data/quic360/README.md has the lines that convert such a file)"
                )
            lines.seek(0)
            # Strict: an open quotation mark would swallow all rows up to the next one.
            reader = csv.reader(lines, strict=True)
            try:
                records = [record for record in reader if record]
            except csv.Error as error:
                raise UserError(
                    f"{file}: not a CSV file, at line {reader.line_num}: {error}; "
                    "look for a quotation mark too many or too few above it"
                ) from None
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such file; data.dir must hold train.csv, valid.csv and test.csv"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not a CSV file in UTF-8: {error.reason} at byte {error.start}; "
            "save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from None
    if not records:
        raise UserError(f"{file}: empty; expected a header {','.join(COLUMNS)} and rows")
    if len(records) == 1:
        raise UserError(f"{file}: a header without rows; expected at least one row")
    return records[0], records[1:]


def _find_columns(file: Path, header: list[str]) -> dict[str, int]:
    """Where each of COLUMNS stands."""
    places = {}
    for name in COLUMNS:
        names = [name, _ALIASES.get(name, name)]
        found = next((known for known in names if known in header), None)
        if found is None:
            by_lower = {title.strip().lower(): title for title in header}
            near = [difflib.get_close_matches(known, by_lower, n=1) for known in names]
            hint = next((f" (is '{by_lower[title[0]]}' meant?)" for title in near if title), "")
            raise UserError(
                f"{file}: no column '{name}' among '{', '.join(header)}'{hint}; expected "
                "url,query,annotation or url,instruction,response; rename the column"
            )
        if header.count(found) > 1:
            raise UserError(f"{file}: {header.count(found)} columns '{found}'; keep one")
        places[name] = header.index(found)
    return places
