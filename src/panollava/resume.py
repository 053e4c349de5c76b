"""Unfinished work: where it lies, what it belongs to, and when it is thrown away.

DVC deletes a stage's outputs before it runs the stage, so that what a killed run has done is kept
in `.resume/<stage>-<fingerprint>/`. The fingerprint covers everything that the result depends on;
work of another fingerprint is never used. Finished work stays until the next command, because
DVC may still be killed before it has recorded the stage's outputs."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is slow to import, and every command imports this module
    from torch import Tensor

from panollava import paths

log = logging.getLogger(__name__)

_FINISHED = "finished"


def fingerprint(described: Any, files: Iterable[Path], tensors: Mapping[str, "Tensor"]) -> str:
    """A short hash of anything that JSON can hold, of files' contents and of tensors."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().numpy().view("uint8").data)
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


def mark_finished(folder: Path) -> None:
    (folder / _FINISHED).touch()


def remove_finished() -> None:
    """Called when a command starts: what was finished before has been recorded by now."""
    for mark in sorted(paths.RESUME.glob(f"*/{_FINISHED}")):
        shutil.rmtree(mark.parent)


def _size(folder: Path) -> str:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{total / 1e6:.1f} MB"
