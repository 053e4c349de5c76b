"""Published data sets whose tables `panollava download NAME` fetches and converts."""

import hashlib
import logging
import tempfile
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pandas as pd

from panollava.data.http_client import (
    AttemptFailedError,
    DeadLinkError,
    DownloadFailedError,
    HttpClient,
)
from panollava.data.rows import COLUMNS
from panollava.data.tables import read_records
from panollava.errors import UserError
from panollava.files import write_csv

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    folder: str  # of the converted tables, from the project's root
    address: str  # of a table, with {split}; a fixed version
    sha256: dict[str, str]  # of the table of each split
    no_annotation: str  # what the authors wrote for a missing annotation


_QUIC360 = (
    "https://raw.githubusercontent.com/Silviase/QuIC-360/b6057f9504236a96a3d209058f213e669c81ce25"
)
DATASETS = {
    "quic360": Dataset(
        "data/quic360",
        f"{_QUIC360}/dataset/raw/{{split}}.tsv",
        {
            "train": "593f4816616acfcc2c11ae18edf2c75be885ffb82273c98b99de25dba4e0cef9",
            "valid": "1e8a90b3f4935698e8b7c06fd446359da55e23ea46616148fd2516f8a63bf652",
            "test": "75d4342019f92392db3c8c6865343de94e6c1b9b748c4098c3f697216c79e840",
        },
        no_annotation="None",
    )
}


def fetch_tables(dataset: Dataset, root: Path, rate: float, pause: float) -> Path:
    """Download the tables of all splits, check them, and write them as CSV files to the data set's
    folder, which is returned. A missing annotation becomes an empty one, which `check` and
    `prepare` reject. Files that exist already stay, and must hold the same rows.
    `rate`, `pause`: see `download`.

    Raises:
        UserError: a table cannot be downloaded or has another content, or a file with other rows
            exists. Nothing has been written then.
    """
    folder, client = root / dataset.folder, HttpClient(rate, pause)
    tables = {}
    with tempfile.TemporaryDirectory() as name:
        for split in dataset.sha256:
            source = Path(name) / f"{split}.tsv"
            _download(dataset, split, source, client)
            tables[split] = _rows(source)
    for split, table in tables.items():
        missing = table["annotation"] == dataset.no_annotation
        table.loc[missing, "annotation"] = ""
        if rows := ", ".join(map(str, table.index[missing])):
            log.info("%s: rows without an annotation, which will be rejected: %s", split, rows)
        _refuse_others(folder / f"{split}.csv", table)
    for split, table in tables.items():
        if not (file := folder / f"{split}.csv").exists():
            write_csv(file, table)
        log.info("%s: %d rows in %s", split, len(table), file)
    return folder


def _download(dataset: Dataset, split: str, path: Path, client: HttpClient) -> None:
    link = dataset.address.format(split=split)

    def validate(file: Path, complete: bool) -> None:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != dataset.sha256[split]:
            kind = DeadLinkError if complete else AttemptFailedError
            raise kind(f"its SHA-256 is {digest}; expected {dataset.sha256[split]}")

    try:
        client.download(link, path, validate)
    except (DeadLinkError, DownloadFailedError) as error:
        raise UserError(
            f"{link}: {error}; check the network and run the same command again"
        ) from None


def _rows(file: Path) -> pd.DataFrame:
    header, places, records = read_records(file, COLUMNS, "")
    padded = [record + [""] * (len(header) - len(record)) for record in records]
    rows = [[record[places[name]] for name in COLUMNS] for record in padded]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _refuse_others(file: Path, table: pd.DataFrame) -> None:
    if not file.exists():
        return
    found, expected = (each.to_numpy().tolist() for each in (_rows(file), table))
    if found != expected:
        pairs = enumerate(zip_longest(found, expected))
        first = next(row for row, (one, other) in pairs if one != other)
        raise UserError(
            f"{file}: exists and differs from the published table, first in row {first}; move it "
            "away and run the same command again"
        )
