"""Tokens of prepared rows: computed once, by all cores, and kept in .cache/tokens-<key>/.

The key is a hash of everything that the tokens depend on, so that an entry is never outdated. The
`_KEPT` entries that were used last are kept."""

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm import tqdm

from panollava import paths
from panollava.data import dialogue as dialogue_module
from panollava.data.batches import StepLoader
from panollava.data.dialogue import Dialogue
from panollava.data.packing import Row, Rows
from panollava.errors import UserError, as_user_error
from panollava.files import read_prepared_rows, write_array, write_text
from panollava.provenance.fingerprint import fingerprint

log = logging.getLogger(__name__)

_KEPT = 16
_CHUNK = 4096  # rows that a process tokenizes at a time
_MAX_PROCESSES = 32
_PREFIX = f"{platform.node()}@"  # of temporary folders; no part of a name of a machine
_ARRAYS = ("tokens", "starts", "panoramas")  # of Rows


def open_rows(file: Path, dialogue: Dialogue, truncate: bool) -> Rows:
    """The tokens of a rows.csv, memory-mapped. A row without answer tokens, which is an error, has
    no tokens at all; see `check_rows`.

    Raises UserError if the file is missing, or the cache cannot be written."""
    if not file.is_file():
        read_prepared_rows(file)  # raises the error
    if (key := _key(file, dialogue, truncate)) is None:
        return tokenize(read_prepared_rows(file), dialogue, truncate)
    folder = paths.CACHE / f"tokens-{key}"
    if (rows := _open(folder)) is None:
        try:
            with _lock():
                # Another process, such as another rank, may have written it meanwhile.
                if (rows := _open(folder)) is None:
                    rows = _make(folder, file, dialogue, truncate)
        except OSError as error:
            raise as_user_error(error, folder) from error
    with contextlib.suppress(OSError):  # it may have been deleted: mapped files remain readable
        os.utime(folder)
    return rows


def check_rows(
    rows: Rows,
    used: NDArray,
    read: Callable[[], pd.DataFrame],
    place: str,
    dialogue: Dialogue,
    truncate: bool,
) -> None:
    """Raises the UserError of the first of the rows `used` that has no answer tokens. `read`: the
    table; `place`: its file, in the message."""
    faulty = used[rows.answers[used] == 0]
    if len(faulty):
        row: Any = read().iloc[faulty[0]]
        dialogue.row(row.query, row.annotation, place_of(place, row), truncate)


def place_of(file: Path | str, row: Any) -> str:
    return f"{file}, row {row.row} ({row.url})"


def tokenize(table: pd.DataFrame, dialogue: Dialogue, truncate: bool) -> Rows:
    """The tokens of a table's rows, in memory; else as `open_rows`."""
    parts = list(_tokenize(table, dialogue, truncate, ""))
    tokens, lengths = map(np.concatenate, zip(*parts, strict=True))
    starts = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
    return Rows(tokens, starts, table["panorama"].to_numpy(np.int32))


def _key(file: Path, dialogue: Dialogue, truncate: bool) -> str | None:
    """None for a tokenizer whose content cannot be hashed."""
    tokenizer: Any = dialogue.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        return None
    options = ("split_special_tokens", "clean_up_tokenization_spaces")
    content = {
        "tokenizer": [type(tokenizer).__module__, type(tokenizer).__qualname__, backend.to_str()],
        "special": repr((tokenizer.special_tokens_map, tokenizer.added_tokens_decoder)),
        "options": [getattr(tokenizer, name, None) for name in options],
        "template": [dialogue.before, dialogue.between, dialogue.opening, dialogue.lead],
        "ends": [dialogue.stop, *sorted(dialogue.ends)],
        "max_text_length": dialogue.max_text_length if truncate else None,
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    code = [Path(__file__), Path(dialogue_module.__file__)]
    return fingerprint(content, [file, *code], {})


def _open(folder: Path) -> Rows | None:
    """None: there is no such entry, or it is damaged."""
    try:
        digest = (folder / "digest.txt").read_text()
        rows = Rows(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS))
    except FileNotFoundError:
        if folder.is_dir():
            log.warning("%s: incomplete; tokenizing the rows again", folder)
        return None
    except (ValueError, EOFError):
        digest = ""
    if not digest or rows.digest != digest:
        log.warning("%s: damaged; tokenizing the rows again", folder)
        return None
    return rows


def _make(folder: Path, file: Path, dialogue: Dialogue, truncate: bool) -> Rows:
    """Write the entry in a temporary folder, which is renamed when it is complete."""
    shutil.rmtree(folder, ignore_errors=True)
    _delete_old(folder.parent)
    temporary = folder.with_name(f"{_PREFIX}{os.getpid()}.part")
    temporary.mkdir()
    try:
        table = read_prepared_rows(file)
        with (
            write_array(temporary / "tokens.npy") as append_tokens,
            write_array(temporary / "starts.npy") as append_starts,
            write_array(temporary / "panoramas.npy") as append_panoramas,
        ):
            append_panoramas(table["panorama"].to_numpy(np.int32))
            append_starts(np.zeros(1, dtype=np.int64))
            end = 0
            for tokens, lengths in _tokenize(table, dialogue, truncate, file.parent.name):
                append_tokens(tokens)
                append_starts(end + lengths.cumsum(dtype=np.int64))
                end += len(tokens)
        rows = Rows(*(np.load(temporary / f"{name}.npy", mmap_mode="r") for name in _ARRAYS))
        write_text(temporary / "digest.txt", rows.digest)
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # written on another machine
                raise
        return rows
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One process of this machine writes at a time."""
    paths.CACHE.mkdir(exist_ok=True)
    with (paths.CACHE / "tokens.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the process ends
        yield


def _delete_old(folder: Path) -> None:
    """Delete what killed processes of this machine have left, and all but the newest entries."""
    for abandoned in folder.glob(f"{_PREFIX}*.part"):
        shutil.rmtree(abandoned, ignore_errors=True)
    entries = sorted(folder.glob("tokens-*/"), key=lambda entry: entry.stat().st_mtime)
    for entry in entries[: 1 - _KEPT]:
        shutil.rmtree(entry, ignore_errors=True)


class _Chunks(Dataset):
    """A table's rows, tokenized in chunks."""

    def __init__(self, table: pd.DataFrame, dialogue: Dialogue, truncate: bool) -> None:
        self.table, self.dialogue, self.truncate = table, dialogue, truncate

    def __len__(self) -> int:
        return -(-len(self.table) // _CHUNK)

    def __getitem__(self, chunk: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """All tokens, and the numbers of those of each query and answer."""
        table = self.table.iloc[chunk * _CHUNK : (chunk + 1) * _CHUNK]
        texts = zip(table["query"], table["annotation"], strict=True)
        rows = [self._row(query, answer) for query, answer in texts]
        parts = [part for row in rows for part in (row.query, row.answer)]
        tokens = np.fromiter(itertools.chain.from_iterable(parts), np.int32)
        return tokens, np.fromiter(map(len, parts), np.int32, len(parts))

    def _row(self, query: str, answer: str) -> Row:
        try:
            return self.dialogue.row(query, answer, truncate=self.truncate)
        except UserError:
            return Row([], [])


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _tokenize(
    table: pd.DataFrame, dialogue: Dialogue, truncate: bool, name: str
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """See `_Chunks`; in order. `name`: of the split."""
    chunks = _Chunks(table, dialogue, truncate)
    workers = min(_cores(), _MAX_PROCESSES, len(chunks) // 2)
    bar = tqdm(total=len(chunks), desc=f"tokens, {name}", delay=2, disable=None)
    # A loader draws a random number, and no result may depend on whether there are tokens already.
    with bar, torch.random.fork_rng(devices=[]):
        for pair in StepLoader(chunks, workers, pin_memory=False):
            tokens, lengths = map(np.asarray, pair)
            yield tokens, lengths
            bar.update()
