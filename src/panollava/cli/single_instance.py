"""One process at a time for each command (or each part of its work) in a folder, and one process of
a parallel launch."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

from panollava import paths
from panollava.errors import UserError

# Variables that number the processes of one launch: srun's, torchrun's, Open MPI's and MPICH's.
# RANK may be set for other reasons, so it counts only together with torchrun's WORLD_SIZE.
_RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def check_first_process() -> None:
    """Raises UserError in all processes but the first of a launch of several, which would do the
    same work in the same folder."""
    names = [*_RANKS, *(["RANK"] if os.environ.get("WORLD_SIZE", "1") != "1" else [])]
    for name in names:
        if (rank := os.environ.get(name) or "0") != "0":
            raise UserError(
                f"{name}={rank}: several processes of this command were started; start one process "
                "(srun and torchrun may start several of train, features and evaluate), or give "
                "each its --shard"
            )


@contextlib.contextmanager
def single_instance(command: str, part: object = None) -> Iterator[None]:
    """Only one process at a time runs the block in this folder, or one for each `part`. When DVC is
    killed, the command that it started keeps running, and would write the same files as the next
    one. Processes may be on other machines that share the folder.

    Raises UserError if another process runs it."""
    paths.RESUME.mkdir(exist_ok=True)
    process = f"pid {os.getpid()} on {socket.gethostname()}"
    with contextlib.ExitStack() as stack:
        if part is None:
            stack.enter_context(_lock(command, fcntl.LOCK_EX, process))
        else:
            name = f"{command} {part}".replace("/", " of ")
            stack.enter_context(_lock(name, fcntl.LOCK_EX, process))
            parts = f"with --shard, most recently {part}: {process}"
            stack.enter_context(_lock(command, fcntl.LOCK_SH, parts))
        yield


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Wait until no other process runs the block in this folder."""
    paths.RESUME.mkdir(exist_ok=True)
    with (paths.RESUME / f"{name}.lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _lock(name: str, kind: int, process: str) -> Iterator[None]:
    with (paths.RESUME / f"{name}.lock").open("a+") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)  # released when the process ends
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another panollava process ({file.read()}) is already running this command here; "
                "wait for it to finish, or kill it"
            ) from None
        file.truncate(0)
        file.write(process)
        file.flush()
        yield
