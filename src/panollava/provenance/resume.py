"""Unfinished work: where it lies, what it belongs to, and when it is thrown away.

DVC deletes a stage's outputs before it runs the stage, so that what a killed run has done is kept
in `.resume/<stage>-<fingerprint>/`. The fingerprint covers everything that the result depends on;
work of another fingerprint is never used. Finished work stays until another command starts,
because DVC may still be killed before it has recorded the stage's outputs."""

import logging
import shutil
from pathlib import Path

from panollava import paths
from panollava.errors import UserError

log = logging.getLogger(__name__)

_FINISHED = "finished"


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


def remove_finished(except_stage: str | None) -> None:
    """Called when a command starts: what was finished before it has been recorded by now, but
    perhaps not the work of the same stage, `except_stage`."""
    for mark in sorted(paths.RESUME.glob(f"*/{_FINISHED}")):
        if not mark.parent.name.startswith(f"{except_stage}-"):
            shutil.rmtree(mark.parent)


def _size(folder: Path) -> str:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{total / 1e6:.1f} MB"
