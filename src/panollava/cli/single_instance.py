"""One process at a time for each command in a folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from panollava import paths
from panollava.errors import UserError


@contextlib.contextmanager
def single_instance(command: str) -> Iterator[None]:
    """The block runs in one process at a time in this folder. Where DVC alone was killed, its
    command runs on, and would write the same files as the next one.

    Raises UserError if there is such a process."""
    paths.RESUME.mkdir(exist_ok=True)
    with (paths.RESUME / f"{command}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"process {file.read()} is at work on the same in this folder; "
                "wait until it is done, or end it (kill it), and run the command again"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
