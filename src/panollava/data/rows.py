"""Reads rows in QuIC-360's CSV format and finds their pictures, without opening these. A bad row is
set aside with its reason."""

import errno
import hashlib
import re
import stat
from functools import cache
from itertools import combinations
from pathlib import Path, PurePosixPath

import pandas as pd

from panollava.data.images import PictureError
from panollava.data.tables import read_records

SPLITS = ("train", "valid", "test")
COLUMNS = ("url", "query", "annotation")
NOT_DOWNLOADED = "link not downloaded"
_LINKS = ("http://", "https://")
_NO_SUCH_PATH = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


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

    @cache
    def locate(url: str) -> Path | PictureError:
        try:
            picture = find_picture(url, file.parent, root)
        except PictureError as error:
            return error
        kind = NOT_DOWNLOADED if is_link(url) else "picture missing"
        return picture or PictureError(Path(url), kind)

    rows, rejects = [], []
    for number, record in enumerate(records):
        padded = record + [""] * (len(header) - len(record))
        cells = {"row": number} | {name: padded[place] for name, place in places.items()}
        picture = locate(padded[places["url"]])
        if len(record) != len(header):
            reason = f"{len(record)} cells instead of {len(header)}"
            rejects.append(cells | {"kind": reason, "reason": reason})
        elif empty := [name for name in COLUMNS if not padded[places[name]].strip()]:
            rejects.append(cells | {"kind": f"empty {empty[0]}", "reason": f"empty {empty[0]}"})
        elif isinstance(picture, PictureError):
            rejects.append(cells | {"kind": picture.kind, "reason": picture.reason})
        else:
            rows.append(cells | {"picture": picture})
    return (
        pd.DataFrame(rows, columns=["row", *COLUMNS, "picture"]),
        pd.DataFrame(rejects, columns=["row", *COLUMNS, "kind", "reason"]),
    )


def is_link(url: str) -> bool:
    return url.startswith(_LINKS)


def picture_file(link: str, folder: Path) -> Path:
    """Where `download` stores the picture of `link`, for a CSV file in `folder`. No other link has
    the same file, even if the file system ignores case."""
    name = PurePosixPath(_last_part(link))
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", name.stem)[:100]
    suffix = name.suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,5}", name.suffix) else ""
    return folder / "images" / f"{stem}-{hashlib.sha256(link.encode()).hexdigest()[:16]}{suffix}"


def plain_file(link: str, folder: Path) -> Path:
    """Where a picture of `link` may be that was collected in another way: under the last part of
    its address, which other links may share."""
    return folder / "images" / _last_part(link)


def _last_part(link: str) -> str:
    return re.split(r"[?#]", link, maxsplit=1)[0].rsplit("/", 1)[-1]


def find_picture(url: str, folder: Path, root: Path) -> Path | None:
    """The file for `url`; None if there is none. A path is absolute or relative to the CSV file's
    folder or the project's root. The picture of a link is in `images` beside the CSV file.

    Raises:
        PictureError: a file that may exist cannot be examined, such as one in a folder without
            search permission.
    """
    if is_link(url):
        candidates = [picture_file(url, folder), plain_file(url, folder)]
    else:
        candidates = [folder / url, root / url]  # both are `url` itself if it is absolute
    for path in candidates:
        try:
            if stat.S_ISREG(path.stat().st_mode):
                return path.resolve()
        except ValueError:  # not a path: it contains a null character
            pass
        except OSError as error:
            # A url that is too long for a path may be an annotation in the wrong column.
            if error.errno not in _NO_SUCH_PATH:
                detail = error.strerror or str(error)
                raise PictureError(path, "picture cannot be read", detail) from None
    return None


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
