"""Writing a file as a whole or not at all, and the machine's faults in words that help: a full
disk, a place that can't be written, too little memory."""

import contextlib
import csv
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from panollava.errors import UserError

if TYPE_CHECKING:  # pandas is slow to import, and every command imports this module
    import pandas as pd

_REMEDIES = {
    errno.ENOSPC: "free some space: `du -sh .dvc/cache .resume runs` shows what is large, "
    "`dvc gc --workspace` removes results of no use to the present state",
    errno.EDQUOT: "ask for a larger quota, or remove files of yours",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    errno.EROFS: "make the file system writable, or work in a copy elsewhere",
    errno.EACCES: "give yourself the right to write there (`ls -ld` shows who has it)",
    errno.EPERM: "give yourself the right to write there (`ls -ld` and `lsattr -d` show more)",
    errno.ENOTDIR: "there is a file where a folder is needed: move it away",
    errno.EEXIST: "there is a file where a folder is needed: move it away",
    errno.EISDIR: "there is a folder where a file is needed: move it away",
    errno.ENOMEM: "close other programs, or take a machine with more memory",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
}
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory"
    r"|DataLoader worker .* is killed by signal: (Killed|Bus error)|insufficient shared memory",
    re.IGNORECASE,
)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to. It is renamed to `path` when the block ends well; else
    `path` is as it was.

    Raises:
        UserError: the disk is full, or the place can't be written.
    """
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise told(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # the place itself may be what is wrong
            beside.unlink(missing_ok=True)


def write_csv(path: Path, table: "pd.DataFrame") -> None:
    """Write a table, as a whole or not at all, so that pandas reads its texts back as they are."""
    # All text is quoted: pandas leaves a lone carriage return bare, and reads it as the row's end.
    with whole(path) as beside:
        table.to_csv(beside, index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")


@contextlib.contextmanager
def faults_told(less_memory: str) -> Iterator[None]:
    """Raise the machine's faults in the block as UserErrors. `less_memory`: what to do where
    memory runs out."""
    try:
        yield
    except OSError as error:
        raise told(error) from error
    except (MemoryError, RuntimeError) as error:
        if (reason := memory_fault(error)) is None:
            raise
        raise UserError(
            f"out of memory: {less_memory}. What is done is kept: run the same command again "
            f"afterwards. ({reason})"
        ) from error


def memory_fault(error: MemoryError | RuntimeError) -> str | None:
    """What the error says in one line, if it is one of too little memory."""
    # The cause says by which signal a loader's worker was killed.
    said = " ".join(f"{error} {error.__cause__ or ''}".split())
    if isinstance(error, RuntimeError) and not _NO_MEMORY.search(said):
        return None
    return said[:300] or type(error).__name__


def told(error: OSError, path: Path | None = None) -> UserError:
    """An error of the system, with the place (`path` where it names none) and a remedy."""
    place = error.filename or path
    remedy = _REMEDIES.get(error.errno or 0, "see to it")
    return UserError(
        f"{f'{place}: ' if place else ''}{error.strerror or error}; {remedy}. What is done is "
        "kept: run the same command again afterwards"
    )
