"""Unfinished work: where it lies, what it belongs to, and when it is thrown away.

DVC deletes a stage's outputs before it runs the stage, so that what a killed run has done is kept
in `.resume/<stage>-<fingerprint>/`. The fingerprint covers everything that the result depends on;
work of another fingerprint is never used. Finished work stays until another command starts,
because DVC may still be killed before it has recorded the stage's outputs."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is slow to import, and every command imports this module
    from torch import Tensor

from panollava import paths
from panollava.errors import UserError

log = logging.getLogger(__name__)

_FINISHED = "finished"


def fingerprint(described: Any, files: Iterable[Path], tensors: Mapping[str, "Tensor"]) -> str:
    """A short hash of anything that JSON can hold, of files' contents and of tensors."""
    import torch

    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        own = tensor.detach().cpu().contiguous().flatten()
        digest.update(own.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def work_folder(stage: str, key: str) -> Path:
    """The folder of a run's unfinished work; that of other runs of the stage is removed."""
    own = paths.RESUME / f"{stage}-{key}"
    for other in sorted(paths.RESUME.glob(f"{stage}-*")):
        if other != own:
            log.info("removing %s, the work of another run (%s)", other, _size(other))
            shutil.rmtree(other)
    own.mkdir(parents=True, exist_ok=True)
    return own


def check_unfinished(stage: str, key: str) -> None:
    """Raises UserError if this run of the stage has no work to go on from."""
    own = paths.RESUME / f"{stage}-{key}"
    if any(own.glob("*.ckpt")):
        return
    if own.is_dir():
        raise UserError(
            f"--resume: stage '{stage}' was stopped before a step was saved (every "
            "machine.save_every steps, and at Ctrl-C); leave out --resume to start anew"
        )
    others = ", ".join(str(path) for path in sorted(paths.RESUME.glob(f"{stage}-*")))
    raise UserError(
        f"--resume: stage '{stage}' has no unfinished work to go on from"
        + (f"; {others} is of other parameters, data or code" if others else "")
        + "; give the options of the run that was stopped, or leave out --resume to start anew"
    )


def mark_finished(folder: Path) -> None:
    (folder / _FINISHED).touch()


def remove_finished(but_of: str | None) -> None:
    """Called when a command starts: what was finished before it has been recorded by now, but
    perhaps not the work of the same stage, `but_of`."""
    for mark in sorted(paths.RESUME.glob(f"*/{_FINISHED}")):
        if not mark.parent.name.startswith(f"{but_of}-"):
            shutil.rmtree(mark.parent)


@contextlib.contextmanager
def alone(command: str) -> Iterator[None]:
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


def _size(folder: Path) -> str:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{total / 1e6:.1f} MB"
