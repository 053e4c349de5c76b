"""The pictures that rows link to: fetched once each into `images` beside the CSV files, checked,
and the dead links listed.

A picture is in its place only when it has come whole, so that a killed download goes on with what
is missing. What is left in the end depends on what the links hold, and not on the order in which
pictures arrive, on how often a server had to be asked, or on the pauses between."""

import csv
import logging
import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from http import HTTPStatus
from pathlib import Path

import pandas as pd
import requests
from tqdm import tqdm
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from panollava.data.images import read_panorama
from panollava.data.rows import NOT_DOWNLOADED, find_picture, is_link, picture_file, read_rows
from panollava.errors import UserError

log = logging.getLogger(__name__)

ATTEMPTS = 6  # for a whole answer of a server
_WAITS = 30  # times that a server may ask for patience with one link
_LONGEST_PAUSE = 60.0  # seconds between two attempts
_LONGEST_WAIT = 600.0  # seconds that a server may ask to wait
_TIMEOUT = (10.0, 30.0)  # seconds to connect, and between two pieces of an answer
_DEADLINE = 600.0  # seconds for a whole picture
_LARGEST = 1 << 28  # bytes of a picture
_PIECE = 1 << 16
_AGENT = "PanoLLaVA (pictures of a research data set, each fetched once)"
_OWN_NAME = re.compile(r".*-[0-9a-f]{16}(\.[A-Za-z0-9]{1,5})?(\.part)?")  # of rows.picture_file


def download(
    folder: Path,
    splits: tuple[str, ...],
    root: Path,
    connections: int,
    rate: float,
    pause: float,
    give_up: bool,
) -> None:
    """Fetch the links of `folder`/<split>.csv into `folder`/images, and write
    `folder`/rejects.csv, with url and reason of each dead link, in the order of the rows.

    `rate`: requests a second; `pause`: seconds before the second attempt, doubled before each
    further one. `give_up`: take links for dead whose servers give no whole answer.

    Raises:
        UserError: unusable rows or settings, or servers that give no whole answer; all that was
            fetched is kept for the next run then.
    """
    if connections < 1 or rate <= 0 or pause < 0:
        raise UserError(
            "download: expected at least 1 connection, a rate above 0 and a pause of at least 0, "
            f"found {connections}, {rate:g} and {pause:g}"
        )
    links, wanted = _links(folder, splits, root)
    _clear(folder, wanted)
    todo = [link for link, picture in links.items() if picture is None]
    log.info("%d links, %d of them fetched before", len(links), len(links) - len(todo))
    dead, unanswered = _fetch_all(todo, folder, connections, _Gate(rate), pause)
    if unanswered and not give_up:
        first = min(unanswered, key=todo.index)
        for link in sorted(unanswered, key=todo.index):
            log.info("no whole answer: %s: %s", link, unanswered[link], extra={"file_only": True})
        raise UserError(
            f"{len(unanswered)} of {len(links)} links gave no whole answer in {ATTEMPTS} attempts, "
            f"such as {first} ({unanswered[first]}). What was fetched is kept: run the same "
            "command again later; --give-up takes these links for dead"
        )
    dead |= dict.fromkeys(unanswered, "no whole answer")
    _write_rejects(folder / "rejects.csv", [(link, dead[link]) for link in links if link in dead])
    log.info(
        "%d pictures in %s, %d dead links, listed in %s",
        *(len(links) - len(dead), folder / "images", len(dead), folder / "rejects.csv"),
    )


def _links(
    folder: Path, splits: tuple[str, ...], root: Path
) -> tuple[dict[str, Path | None], set[Path]]:
    """The links of all rows without another fault, in their order, with their pictures that are
    there; and the pictures of all rows, whatever their faults, links or not."""
    links: dict[str, Path | None] = {}
    wanted: set[Path] = set()
    for split in splits:
        rows, rejects = read_rows(folder / f"{split}.csv", root)
        found = (find_picture(url, folder, root) for url in rejects["url"].unique())
        wanted |= {*rows["picture"], *filter(None, found)}
        missing = rejects[rejects["reason"] == NOT_DOWNLOADED].assign(picture=None)
        both = pd.concat([rows, missing]).sort_values("row")
        links |= {row.url: row.picture for row in both.itertuples() if is_link(row.url)}
    return links, wanted


def _clear(folder: Path, wanted: set[Path]) -> None:
    """Remove the list of dead links, halves of pictures, and pictures of links that no row names
    any more; a picture that was put there under another name isn't touched."""
    (folder / "rejects.csv").unlink(missing_ok=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for file in sorted((folder / "images").iterdir()):
        if _OWN_NAME.fullmatch(file.name) and file.resolve() not in wanted:
            file.unlink()


def _write_rejects(file: Path, rejects: list[tuple[str, str]]) -> None:
    beside = file.with_name(file.name + ".part")
    with beside.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines, lineterminator="\n").writerows([("url", "reason"), *rejects])
    os.replace(beside, file)


def _fetch_all(
    links: list[str], folder: Path, connections: int, gate: "_Gate", pause: float
) -> tuple[dict[str, str], dict[str, str]]:
    """Fetch the links, many at once; the reasons of the dead and of the unanswered ones."""
    dead: dict[str, str] = {}
    unanswered: dict[str, str] = {}
    fetcher = _Fetcher(gate, pause)
    with ThreadPoolExecutor(connections) as pool:
        futures = {
            pool.submit(fetcher.fetch, link, picture_file(link, folder)): link for link in links
        }
        bar = tqdm(as_completed(futures), desc="pictures", total=len(links), disable=None)
        try:
            for future in bar:
                try:
                    future.result()
                except _DeadError as error:
                    dead[futures[future]] = str(error)
                except _UnansweredError as error:
                    unanswered[futures[future]] = str(error)
                bar.set_postfix(dead=len(dead), MB=fetcher.bytes // 1_000_000, refresh=False)
        finally:
            gate.stop.set()
            pool.shutdown(cancel_futures=True)
    return dead, unanswered


class _DeadError(Exception):
    """The link leads to no panorama, however often it is asked. The reason is the same then."""


class _UnansweredError(Exception):
    """No whole answer came, which may be otherwise tomorrow."""


class _FailedError(Exception):
    """An attempt failed."""


class _BusyError(Exception):
    """The server asks for patience: the seconds, or None where it says no time."""

    def __init__(self, status: int, seconds: float | None) -> None:
        super().__init__(f"HTTP {status}")
        self.seconds = seconds


class _Gate:
    """Lets requests through one by one, at most so many a second, and none while a server asks
    to wait. A server that had to ask is asked half as often from then on, down to once a second."""

    def __init__(self, rate: float) -> None:
        self.stop = threading.Event()
        self._interval = 1 / rate
        self._turn = threading.Lock()
        self._free = self._closed = 0.0

    def wait(self) -> None:
        with self._turn:
            while (seconds := max(self._free, self._closed) - time.monotonic()) > 0:
                self.sleep(seconds)
            self._free = time.monotonic() + self._interval

    def close(self, seconds: float) -> None:
        now = time.monotonic()
        if now > self._closed:  # once for all the requests that were under way
            self._interval = max(self._interval, min(2 * self._interval, 1.0))
        self._closed = max(self._closed, now + seconds)

    def sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise _UnansweredError("stopped")


class _Fetcher:
    """Fetches links in threads, each with connections of its own."""

    def __init__(self, gate: _Gate, pause: float) -> None:
        self.gate, self.pause = gate, pause
        self.bytes = 0  # fetched so far, for the progress bar alone
        self._local = threading.local()

    def fetch(self, link: str, path: Path) -> None:
        """Leave the picture at `path`, or raise _DeadError or _UnansweredError."""
        failed = waited = 0
        while True:
            self.gate.wait()
            try:
                self._attempt(link, path)
                return
            except _BusyError as error:
                waited += 1
                seconds = self._pause(waited) if error.seconds is None else error.seconds
                if waited > _WAITS or seconds > _LONGEST_WAIT:
                    raise _UnansweredError(str(error)) from None
                self.gate.close(seconds)
            except _FailedError as error:
                failed += 1
                log.info("attempt %d: %s: %s", failed, link, error, extra={"file_only": True})
                if failed == ATTEMPTS:
                    raise _UnansweredError(str(error)) from None
                self.gate.sleep(self._pause(failed))

    def _pause(self, count: int) -> float:
        """Twice as long each time, and never two threads for the same time."""
        return min(self.pause * 2 ** (count - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1.5)

    def _attempt(self, link: str, path: Path) -> None:
        beside = path.with_name(path.name + ".part")
        try:
            sized = self._receive(link, beside)
            try:
                read_panorama(beside, width=256)
            except UserError as error:
                reason = str(error).removeprefix(f"{beside}: ")
                # How a picture is broken tells how much of it came; that it is, is enough.
                kind = reason.split(", ")[0] if reason.startswith("not 2:1") else None
                kind = kind or reason.split(":")[0]
                if sized or kind.startswith("not 2:1"):
                    raise _DeadError(kind) from None
                raise _FailedError(kind) from None
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def _receive(self, link: str, path: Path) -> bool:
        """Write the body of the answer; whether the server said how long it is, and so it came
        whole."""
        started = time.monotonic()
        try:
            with self._session().get(link, stream=True, timeout=_TIMEOUT) as response:
                _check_status(response)
                length = response.headers.get("Content-Length", "")
                size = 0
                with path.open("wb") as file:
                    # One byte too few is an error of urllib3's.
                    for piece in response.iter_content(_PIECE):
                        size += len(piece)
                        self.bytes += len(piece)
                        if size > _LARGEST:
                            raise _DeadError(f"more than {_LARGEST >> 20} MB")
                        if time.monotonic() - started > _DEADLINE or self.gate.stop.is_set():
                            raise _FailedError("too slow")
                        file.write(piece)
                return bool(length)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):
            raise _DeadError("not an address") from None
        except requests.exceptions.TooManyRedirects:
            raise _DeadError("too many redirects") from None
        except requests.RequestException as error:
            raise _FailedError(f"{type(error).__name__}: {error}") from None
        except ValueError:  # of a link, or of a redirect, whose address requests lets pass
            raise _DeadError("not an address") from None
        except OSError as error:
            raise UserError(f"{path}: can't be written: {error.strerror}") from None

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            session = self._local.session = requests.Session()
            session.headers["User-Agent"] = _AGENT
            session.max_redirects = 5
        return self._local.session


def _check_status(response: requests.Response) -> None:
    status = response.status_code
    if status == HTTPStatus.OK:
        return
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        asked = response.headers.get("Retry-After")
        if asked is not None or status == HTTPStatus.TOO_MANY_REQUESTS:
            raise _BusyError(status, _seconds(asked))
    if status >= 500 or status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY):
        raise _FailedError(f"HTTP {status}")
    raise _DeadError(f"HTTP {status}")


def _seconds(asked: str | None) -> float | None:
    """Retry-After, which is a number of seconds or a date."""
    if asked is None:
        return None
    try:
        return Retry().parse_retry_after(asked)
    except InvalidHeader:
        return None
