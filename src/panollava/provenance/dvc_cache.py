"""DVC's cache, looked through for files that are not what their names say.

DVC believes a cache file that is read-only, as it leaves them: one that was changed by hand, or by
a bad disk, is handed out again, and even takes the place of a good result of the same name."""

import hashlib
import logging
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger(__name__)


def delete_corrupted(cache: Path) -> list[Path]:
    """Remove the files under `cache` (such as .dvc/cache/files/md5) whose MD5 isn't their name,
    and return them. `dvc repro` makes them again."""
    files = sorted(file for file in cache.glob("??/*") if file.is_file())
    damaged = []
    for file in tqdm(files, desc="cache", delay=2, disable=None):
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "md5").hexdigest()
        if found != file.parent.name + file.name.removesuffix(".dir"):
            damaged.append(file)
            file.unlink()
            log.warning("%s: damaged, and removed", file)
    log.info("%d files in %s, %d damaged", len(files), cache, len(damaged))
    if damaged:
        log.info(
            "remove the results that are damaged as well (dvc status names them), then: dvc repro"
        )
    return damaged
