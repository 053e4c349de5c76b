"""Files written atomically (text, JSON, CSV, .npy, tar), reading prepared rows and arrays, and
recognizing git-lfs pointers."""

import contextlib
import csv
import io
import json
import os
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panollava.errors import UserError, as_user_error

if TYPE_CHECKING:  # both are slow to import, and every command imports this module
    import pandas as pd
    from numpy.typing import NDArray

GIT_LFS_POINTER = "a git-lfs pointer: run git lfs pull"  # for error messages
_POINTER_STARTS = tuple(
    f"version https://{host}.github.com/spec/".encode() for host in ("git-lfs", "hawser")
)


@contextlib.contextmanager
def atomic_write(path: Path, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` to write to. It is renamed to `path` when the block succeeds;
    otherwise `path` stays as it was. `shared`: other processes may write `path` at the same time.

    Raises:
        UserError: the disk is full, or `path` cannot be written.
    """
    unique = f".{uuid.uuid4().hex}" if shared else ""
    temporary = path.with_name(f"{path.name}{unique}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise as_user_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be the problem
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, shared: bool = False) -> None:
    """UTF-8 text, atomically."""
    with atomic_write(path, shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, shared: bool = False) -> None:
    """Indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", shared)


def write_csv(path: Path, table: "pd.DataFrame") -> None:
    """A table, atomically, quoted so that pandas reads its texts back unchanged."""
    # All text is quoted: pandas leaves a lone carriage return bare, and reads it as the row's end.
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


@contextlib.contextmanager
def write_array(path: Path, shared: bool = False) -> Iterator[Callable[["NDArray"], None]]:
    """A function that appends rows, (rows, ...), to the .npy file at `path`, written atomically.
    The first rows decide shape and type; without any the shape is (0,).

    Memory does not grow with the file. The file is not memory-mapped while it is written: a full
    disk would then kill the process without a message."""
    import numpy as np

    count, shape, dtype = 0, (), np.dtype(np.uint8)
    with atomic_write(path, shared) as temporary, temporary.open("wb") as file:

        def write_header() -> None:  # NumPy pads it to one length for every count
            descr = np.lib.format.dtype_to_descr(dtype)
            header = {"descr": descr, "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)

        def append(rows: "NDArray") -> None:
            nonlocal count, shape, dtype
            if count == 0:
                shape, dtype = rows.shape[1:], rows.dtype
                file.seek(0)
                write_header()
            if (rows.shape[1:], rows.dtype) != (shape, dtype):
                raise ValueError(f"rows of {shape}, {dtype}; got {rows.shape[1:]}, {rows.dtype}")
            file.write(np.ascontiguousarray(rows).data)
            count += len(rows)

        yield append
        file.seek(0)
        write_header()


@contextlib.contextmanager
def write_tar(path: Path, shared: bool = False) -> Iterator[Callable[[str, bytes], None]]:
    """A function that appends a file, its name and content, to the uncompressed tar file at `path`,
    written atomically. Equal files give equal bytes."""
    with atomic_write(path, shared) as temporary, tarfile.open(temporary, "w:") as tar:

        def append(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        yield append


def open_array(path: Path) -> "NDArray":
    """A memory-mapped .npy file. Raises UserError if it is missing or damaged."""
    import numpy as np

    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that writes it: dvc repro") from None
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{path}: not a complete .npy file ({error}); remove it and run: "
            "make verify, then dvc repro"
        ) from None


def read_prepared_rows(path: Path) -> "pd.DataFrame":
    """Columns panorama, row, url, query, annotation; all text unchanged."""
    import pandas as pd

    try:
        texts = dict.fromkeys(("url", "query", "annotation"), str)
        return pd.read_csv(path, dtype=texts, keep_default_na=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run: dvc repro prepare") from None


def is_git_lfs_pointer(file: Path | bytes) -> bool:
    """Whether a file (its path or its first bytes) is the text that git-lfs leaves in place of a
    file that was not fetched. False if it cannot be read."""
    if isinstance(file, Path):
        try:
            with file.open("rb") as opened:
                file = opened.read(64)
        except OSError:
            return False
    return file.startswith(_POINTER_STARTS)
