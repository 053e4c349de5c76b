"""Finds corrupted files in DVC's cache: those whose content does not match their name, an MD5.

DVC does not check read-only cache files. It restores a corrupted one into the workspace, and does
not replace it when the stage writes the correct result again."""

import hashlib
import logging
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger(__name__)


def delete_corrupted(cache: Path) -> list[Path]:
    """Delete and return the files of `cache` (such as .dvc/cache/files/md5) whose MD5 does not
    match their name. `dvc repro` recreates them."""
    files = sorted(file for file in cache.glob("??/*") if file.is_file())
    corrupted = []
    for file in tqdm(files, desc="cache", delay=2, disable=None):
        with file.open("rb") as content:
            md5 = hashlib.file_digest(content, "md5").hexdigest()
        if md5 != file.parent.name + file.name.removesuffix(".dir"):
            corrupted.append(file)
            file.unlink()
            log.warning("%s: corrupted; deleted", file)
    log.info("%d files in %s, %d corrupted", len(files), cache, len(corrupted))
    if corrupted:
        log.info(
            "delete the corrupted results in the workspace too (dvc status lists them), then run: "
            "dvc repro"
        )
    return corrupted
