import errno
from pathlib import Path

import pytest

from panollava.errors import (
    UserError,
    as_user_error,
    out_of_memory_reason,
    system_errors_as_user_errors,
)


def test_a_system_error_names_its_file_and_what_to_do() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "views.npy")
    message = str(as_user_error(full, Path("ignored")))
    assert message.startswith("views.npy: No space left on device; free some space: `du -sh ")
    assert message.endswith(". Completed work is kept; re-run the same command afterwards")
    unknown = OSError(errno.EIO, "Input/output error")
    assert str(as_user_error(unknown, Path("runs"))).startswith(
        "runs: Input/output error; check the disk or file system. "
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("Out of memory"),
        RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "),
    ],
)
def test_too_little_memory_gives_the_hint(error: Exception) -> None:
    with (
        pytest.raises(UserError, match="out of memory: lower batch_size. Completed work is kept"),
        system_errors_as_user_errors("lower batch_size"),
    ):
        raise error


def test_the_cause_of_an_error_may_be_too_little_memory() -> None:
    """A loader's error only says that a worker exited; its cause names the signal."""
    error = RuntimeError("DataLoader worker (pid(s) 3) exited unexpectedly")
    error.__cause__ = RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. ")
    assert "killed by signal" in str(out_of_memory_reason(error))
    error.__cause__ = RuntimeError("DataLoader worker (pid 3) is killed by signal: Aborted. ")
    assert out_of_memory_reason(error) is None


def test_other_errors_are_raised_unchanged() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as raised, system_errors_as_user_errors("lower batch_size"):
        raise error
    assert raised.value is error
