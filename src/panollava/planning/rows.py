"""The rows that a training would read: those that `prepare` wrote, if they belong to the CSV files
in `data.dir`, otherwise those of the CSV files."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from panollava import paths
from panollava.config import Settings
from panollava.data.dialogue import Dialogue
from panollava.data.epoch_plan import labeled_rows
from panollava.data.packing import Rows
from panollava.data.picture_paths import NOT_DOWNLOADED
from panollava.data.rows import COLUMNS, read_rows
from panollava.data.shards import Shards
from panollava.data.token_cache import check_rows, open_rows, place_of, tokenize
from panollava.files import read_prepared_rows
from panollava.provenance.made_from import is_prepared_from


class SplitRows:
    """A split's rows, which are read when they are needed."""

    def __init__(self, file: Path, table: pd.DataFrame | None = None) -> None:
        """`table`: the rows of a CSV file; None: `file` was written by `prepare`."""
        self.file, self._table = file, table
        self._tokens: dict[int | None, Rows] = {}  # by the limit that answers are cut to

    def read(self) -> pd.DataFrame:
        return read_prepared_rows(self.file) if self._table is None else self._table

    def tokenize(
        self, dialogue: Dialogue, truncate: bool, labeled: float = 1.0, place: str = ""
    ) -> tuple[Rows, NDArray[np.int64]]:
        """Tokens, and the numbers of the rows of a share `labeled` of the panoramas. Raises
        UserError for one of these without answer tokens; the message begins with `place`."""
        limit = dialogue.max_text_length if truncate else None
        if limit not in self._tokens:
            self._tokens[limit] = (
                open_rows(self.file, dialogue, truncate)
                if self._table is None
                else tokenize(self._table, dialogue, truncate)
            )
        rows = self._tokens[limit]
        used = labeled_rows(rows.panoramas, labeled)
        check_rows(rows, used, self.read, f"{place}{self.file}", dialogue, truncate)
        return rows, used

    def shards(self, size: int) -> NDArray[np.int64]:
        """The number of each shard's first panorama, and the end. `size`: `data.shard_size`."""
        if self._table is None:
            return Shards(self.file.parent / paths.PANORAMAS).starts
        count = self._table["panorama"].nunique()
        return np.append(np.arange(0, count, size), count)

    def place(self, row: int) -> str:
        """Where the user finds it."""
        return place_of(self.file, self.read().iloc[row])


def read_split(settings: Settings, split: str) -> SplitRows | None:
    """Those written by `prepare` if they belong to the CSV in `data.dir`, otherwise those of the
    CSV, including rows not yet downloaded. None: no CSV."""
    file = Path(settings.data.dir) / f"{split}.csv"
    if not file.is_file():
        return None
    prepared = paths.PREPARED / split / "rows.csv"
    rejected = prepared.with_name("rejects.csv")
    if is_prepared_from(file, prepared.parent):
        return SplitRows(prepared)
    rows, rejects = read_rows(file, Path())
    if prepared.is_file() and rejected.is_file():
        written = read_prepared_rows(prepared), read_prepared_rows(rejected)
        if _texts(*written) == _texts(rows, rejects):
            return SplitRows(prepared)
    pending = rejects[rejects["reason"] == NOT_DOWNLOADED]
    rows = pd.concat([rows, pending]).sort_values("row")
    return SplitRows(file, rows.assign(panorama=pd.factorize(rows["url"])[0]))


def _texts(*tables: pd.DataFrame) -> set[tuple[Any, ...]]:
    """Row numbers and texts of all tables."""
    columns = ["row", *COLUMNS]
    return {row for table in tables for row in table[columns].itertuples(index=False, name=None)}
