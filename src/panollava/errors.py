"""UserError, the exception for errors that the user can fix, and system errors converted to it: a
full disk, a missing permission, too little memory."""

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "free some space: `du -sh .dvc/cache .resume runs` shows what is large, "
    "`dvc gc --workspace` removes results that the workspace does not use",
    errno.EDQUOT: "ask for a larger quota, or remove some of your files",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    errno.EROFS: "make the file system writable, or work in a copy elsewhere",
    errno.EACCES: "get write permission there (`ls -ld` shows who has it)",
    errno.EPERM: "get write permission there (`ls -ld` and `lsattr -d` show more)",
    errno.ENOTDIR: "a file exists where a folder is needed: move it away",
    errno.EEXIST: "a file exists where a folder is needed: move it away",
    errno.EISDIR: "a folder exists where a file is needed: move it away",
    errno.ENOMEM: "close other programs, or use a machine with more memory",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
}
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory"
    r"|could not create a primitive"  # oneDNN without memory
    r"|DataLoader worker .* is killed by signal: (Killed|Bus error)|insufficient shared memory",
    re.IGNORECASE,
)
_RERUN = "Completed work is kept; re-run the same command afterwards"


class UserError(Exception):
    """An error that the user can fix. The message names the place, the value found, what was
    expected and what to do; the command line prints it without a traceback and exits with status
    1."""


def as_user_error(error: OSError, path: Path | None = None) -> UserError:
    """A system error with its place (`path` where it names none) and a remedy."""
    place = error.filename or path
    remedy = _REMEDIES.get(error.errno or 0, "check the disk or file system")
    return UserError(
        f"{f'{place}: ' if place else ''}{error.strerror or error}; {remedy}. {_RERUN}"
    )


@contextlib.contextmanager
def system_errors_as_user_errors(memory_hint: str) -> Iterator[None]:
    """Raise system errors in the block as UserErrors. `memory_hint`: what to do when memory runs
    out."""
    try:
        yield
    except OSError as error:
        raise as_user_error(error) from error
    except (MemoryError, RuntimeError) as error:
        if (reason := out_of_memory_reason(error)) is None:
            raise
        raise UserError(f"out of memory: {memory_hint}. {_RERUN}. ({reason})") from error


def out_of_memory_reason(error: MemoryError | RuntimeError) -> str | None:
    """The error's message on one line if memory ran out, else None."""
    # The cause names the signal that killed a loader's worker.
    message = " ".join(f"{error} {error.__cause__ or ''}".split())
    if isinstance(error, RuntimeError) and not _NO_MEMORY.search(message):
        return None
    return message[:300] or type(error).__name__
