"""One process at a time for each command in a folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from panollava import paths
from panollava.errors import UserError


@contextlib.contextmanager
def single_instance(command: str) -> Iterator[None]:
    """Only one process at a time runs the block in this folder. When DVC is killed, the command
    that it started keeps running, and would write the same files as the next one.

    Raises UserError if another process runs it."""
    paths.RESUME.mkdir(exist_ok=True)
    with (paths.RESUME / f"{command}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another panollava process (pid {file.read()}) is already running this command "
                "here; wait for it to finish, or kill it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
