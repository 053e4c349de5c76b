"""Unfinished work of a training stage: its folder, which run it belongs to, when it is deleted.

DVC deletes a stage's outputs before it runs the stage. A run therefore saves its progress in
`.resume/<stage>-<fingerprint>/`. The fingerprint covers everything that the result depends on, and
work with another fingerprint is never used. Finished work stays until another command starts,
because DVC may still be killed before it records the stage's outputs."""

import logging
import shutil
from pathlib import Path

from panollava import paths
from panollava.errors import UserError

log = logging.getLogger(__name__)


def work_folder(stage: str, fingerprint: str) -> Path:
    """The folder for a run's unfinished work. Deletes the work of the stage's other runs."""
    folder = paths.RESUME / f"{stage}-{fingerprint}"
    for other in _others(folder, stage):
        log.info("deleting %s, the work of another run (%s)", other, _size(other))
        shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_unfinished(stage: str, fingerprint: str) -> None:
    """Raises UserError if there is nothing to resume for this run."""
    folder = paths.RESUME / f"{stage}-{fingerprint}"
    if any(folder.glob("*.ckpt")):
        return
    if folder.is_dir():
        raise UserError(
            f"--resume: stage '{stage}' was stopped before its first save, which follows the "
            "validation of its start; leave out --resume to start again"
        )
    others = ", ".join(map(str, _others(folder, stage)))
    raise UserError(
        f"--resume: nothing to resume for stage '{stage}'"
        + (f"; {others} belongs to other parameters, data or code" if others else "")
        + ". Give the options of the interrupted run, or leave out --resume to start again"
    )


def mark_finished(folder: Path) -> None:
    (folder / paths.FINISHED).touch()


def remove_finished(except_stage: str | None) -> None:
    """Delete finished work when a command starts. By then DVC has recorded its outputs, unless
    DVC was killed and now runs the same stage (`except_stage`) again."""
    for mark in sorted(paths.RESUME.glob(f"*/{paths.FINISHED}")):
        if not mark.parent.name.startswith(f"{except_stage}-"):
            shutil.rmtree(mark.parent)


def _others(folder: Path, stage: str) -> list[Path]:
    return sorted(path for path in paths.RESUME.glob(f"{stage}-*") if path != folder)


def _size(folder: Path) -> str:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{total / 1e6:.1f} MB"
