"""Downloads the pictures that rows link to into `images` beside the CSV files, checks each, and
lists the dead links.

Pictures are written atomically, so an interrupted download resumes with the missing ones. The
result depends only on what the links contain: not on the order of arrival, retries or pauses, nor
on how processes share the links."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from panollava import paths
from panollava.config import Count, checked
from panollava.data import http_client, rows
from panollava.data.images import PictureError, read_panorama
from panollava.data.picture_paths import (
    NOT_DOWNLOADED,
    UNREADABLE,
    PictureFinder,
    address,
    is_link,
    picture_file,
)
from panollava.data.shard_work import Part
from panollava.errors import UserError
from panollava.files import write_csv, write_json

log = logging.getLogger(__name__)

_OUR_NAME = re.compile(r".*-[0-9a-f]{16}(\.[A-Za-z0-9]{1,5})?(\.part)?")  # see picture_file


def download(
    folder: Path,
    root: Path,
    connections: int,
    rate: float,
    pause: float,
    give_up: bool,
    part: Part | None = None,
    merge: bool = False,
) -> None:
    """Download the links of all splits of `folder` into `folder`/images, and write the url and
    reason of each dead link to `folder`/rejects.csv, in the order of the rows.

    `rate`: requests per second; `pause`: seconds before the second attempt, doubled before each
    further one. `give_up`: treat links as dead when no complete response arrives. `part`: download
    only these links, and write no rejects.csv. `merge`: download none; those that parts found dead
    are dead.

    Raises:
        UserError: unusable rows or options, parts that are missing, or downloads that failed
            (unless `give_up`). All complete pictures are kept for the next run.
    """
    checked(Count, connections, "--connections")
    client = http_client.HttpClient(rate, pause)
    links, wanted = _links(folder, root)
    (folder / "rejects.csv").unlink(missing_ok=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    parts = _Parts(root, links)
    mine = list(links) if part is None else part.pick(list(links))
    todo = [link for link in mine if links[link] is None]
    if part is not None:
        dead = {}
        parts.forget(part)
    else:
        dead = parts.dead()
        todo = [link for link in todo if link not in dead]
    if merge and todo:
        raise UserError(
            f"--merge: {len(todo)} of {len(links)} links are not downloaded, such as {todo[0]}; "
            f"{parts.missing()}"
        )
    if part is None:
        _clear(folder, wanted)
    log.info("%d links, %d of them already downloaded", len(mine), len(mine) - len(todo))
    found, failed = _download_all(todo, folder, connections, client)
    if failed and not give_up:
        for link, reason in failed.items():
            log.info("failed: %s: %s", link, reason, extra={"file_only": True})
        first = next(iter(failed))
        raise UserError(
            f"{len(failed)} of {len(mine)} downloads failed after {http_client.ATTEMPTS} attempts "
            f"(for example {first}: {failed[first]}). Complete pictures are kept: re-run the same "
            "command later, or treat these links as dead with --give-up"
        )
    dead |= found | dict.fromkeys(failed, "no complete response")
    if part is not None:
        parts.finish(part, dead)
        log.info("part %d of %d: %d links, %d of them dead", *part, len(mine), len(dead))
        return
    rejects = [(link, dead[link]) for link in links if links[link] is None and link in dead]
    write_csv(folder / "rejects.csv", pd.DataFrame(rejects, columns=["url", "reason"]))
    parts.remove()
    log.info(
        "%d pictures in %s, %d dead links in %s",
        *(len(links) - len(rejects), folder / "images", len(rejects), folder / "rejects.csv"),
    )


class _Parts:
    """The dead links that processes with a part of the links have found: a file for each of these
    processes that has finished."""

    def __init__(self, root: Path, links: Iterable[str]) -> None:
        digest = hashlib.sha256("\n".join(links).encode()).hexdigest()
        self._folder = root / paths.RESUME / f"download-{digest[:16]}"

    def finish(self, part: Part, dead: dict[str, str]) -> None:
        write_json(self._file(part), dead)

    def forget(self, part: Part) -> None:
        self._file(part).unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def dead(self) -> dict[str, str]:
        files = (file.read_text(encoding="utf-8") for file in sorted(self._folder.glob("*.json")))
        return {link: reason for file in files for link, reason in json.loads(file).items()}

    def missing(self) -> str:
        """What to do about links that no process has finished."""
        finished = [tuple(map(int, f.stem.split("-of-"))) for f in self._folder.glob("*.json")]
        for total in sorted({total for _, total in finished}):
            numbers = {number for number, each in finished if each == total}
            if left := [f"{n}/{total}" for n in range(1, total + 1) if n not in numbers]:
                return f"not finished: --shard {', '.join(left[:20])}"
        return "no process with --shard I/N has finished with these rows"

    def _file(self, part: Part) -> Path:
        return self._folder / f"{part.number}-of-{part.total}.json"


def _links(folder: Path, root: Path) -> tuple[dict[str, Path | None], set[Path]]:
    """The addresses of all rows that are otherwise good, in order, with their pictures if present;
    and the present pictures of all rows, good or bad, links or paths."""
    links: dict[str, Path | None] = {}
    wanted: set[Path] = set()
    finder = PictureFinder(folder, root)
    for split in rows.SPLITS:
        good, rejects = rows.read_rows(folder / f"{split}.csv", root)
        wanted |= set(good["picture"])
        for url in rejects["url"].unique():
            try:
                wanted.add(finder.find(url))
            except PictureError as error:
                if error.kind == UNREADABLE:  # it may be there: nothing may be removed
                    raise
        missing = rejects[rejects["kind"] == NOT_DOWNLOADED].assign(picture=None)
        both = pd.concat([good, missing]).sort_values("row")
        links |= {address(row.url): row.picture for row in both.itertuples() if is_link(row.url)}
    return links, wanted


def _clear(folder: Path, wanted: set[Path]) -> None:
    """Remove incomplete pictures, and downloaded pictures of links that are no longer in any row.
    Pictures under other names are not ours and stay."""
    for file in sorted((folder / "images").iterdir()):
        if _OUR_NAME.fullmatch(file.name) and file.resolve() not in wanted:
            file.unlink()


def _download_all(
    links: list[str], folder: Path, connections: int, client: http_client.HttpClient
) -> tuple[dict[str, str], dict[str, str]]:
    """Download many links at once. Returns the reasons of the dead and of the failed ones, in the
    order of `links`."""
    dead: dict[str, str] = {}
    failed: dict[str, str] = {}
    paths = {link: picture_file(link, folder) for link in links}
    with ThreadPoolExecutor(connections) as pool:
        futures = {
            pool.submit(client.download, link, path, _check_picture): link
            for link, path in paths.items()
        }
        bar = tqdm(as_completed(futures), desc="pictures", total=len(links), disable=None)
        try:
            for future in bar:
                try:
                    future.result()
                except http_client.DeadLinkError as error:
                    dead[futures[future]] = str(error)
                except http_client.DownloadFailedError as error:
                    failed[futures[future]] = str(error)
                bar.set_postfix(dead=len(dead), MB=client.received // 1_000_000, refresh=False)
        finally:
            client.stop()
            pool.shutdown(cancel_futures=True)
    return dead, {link: failed[link] for link in links if link in failed}


def _check_picture(path: Path, complete: bool) -> None:
    try:
        read_panorama(path, width=256)
    except PictureError as error:
        if error.kind == "not 2:1":  # a picture's size is at the start of its file
            raise http_client.DeadLinkError(error.reason) from None
        kind = http_client.DeadLinkError if complete else http_client.AttemptFailedError
        # The details depend on how many bytes arrived; the kind does not.
        raise kind(error.kind) from None
