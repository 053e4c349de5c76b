"""A polite HTTP client for many files: a rate limit, retries with exponential backoff, and respect
for Retry-After. It knows nothing about what it downloads."""

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import requests
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from panollava.config import NotNegative, Positive, checked
from panollava.files import atomic_write

log = logging.getLogger(__name__)

ATTEMPTS = 6  # for one link
_MAX_WAITS = 30  # 429 and 503 responses for one link
_MAX_BACKOFF = 60.0  # seconds between two attempts
_MAX_RETRY_AFTER = 600.0  # seconds
_TIMEOUT = (10.0, 30.0)  # seconds to connect, and between two chunks
_DEADLINE = 600.0  # seconds for one file
_MAX_BYTES = 1 << 28  # of one file
_CHUNK = 1 << 16
_USER_AGENT = "PanoLLaVA (pictures of a research data set, each fetched once)"


class DeadLinkError(Exception):
    """The link does not lead to a usable file; another attempt would give the same reason."""


class DownloadFailedError(Exception):
    """No complete response after all attempts; it may work at another time."""


class AttemptFailedError(Exception):
    """One attempt failed; it is repeated."""


class _BusyError(Exception):
    """The server asks to wait: for `seconds`, or None if it does not say how long."""

    def __init__(self, status: int, seconds: float | None) -> None:
        super().__init__(f"HTTP {status}")
        self.seconds = seconds


class RateLimiter:
    """Lets requests of all threads pass one by one, at most `rate` per second, and none while a
    server asks to wait. Such a pause also halves the rate, down to one per second."""

    def __init__(self, rate: float) -> None:
        self.stopped = threading.Event()
        self.interval = 1 / rate  # seconds
        self._lock = threading.Lock()
        self._next_request = self._paused_until = 0.0

    def wait(self) -> None:
        with self._lock:
            while (seconds := max(self._next_request, self._paused_until) - time.monotonic()) > 0:
                self.sleep(seconds)
            self._next_request = time.monotonic() + self.interval

    def pause(self, seconds: float) -> None:
        now = time.monotonic()
        if now > self._paused_until:  # once for all requests that were under way
            self.interval = max(self.interval, min(2 * self.interval, 1.0))
        self._paused_until = max(self._paused_until, now + seconds)

    def sleep(self, seconds: float) -> None:
        if self.stopped.wait(seconds):
            raise DownloadFailedError("stopped")


class _ThreadSession(threading.local):
    """A session for each thread, because threads may not share one."""

    def __init__(self) -> None:
        self.session = requests.Session()
        self.session.headers["User-Agent"] = _USER_AGENT
        self.session.max_redirects = 5


class HttpClient:
    """Downloads files. Threads may share one; each has its own connections."""

    def __init__(self, rate: float, backoff: float) -> None:
        """`rate`: requests per second; `backoff`: seconds before the second attempt, doubled before
        each further one. Raises UserError for other numbers than above and at least 0."""
        checked(Positive, rate, "--rate")
        checked(NotNegative, backoff, "--pause")
        self.received = 0  # bytes, approximately: for the progress bar only
        self._limiter, self._backoff = RateLimiter(rate), backoff
        self._thread = _ThreadSession()

    def stop(self) -> None:
        """End all downloads that are under way."""
        self._limiter.stopped.set()

    def download(self, link: str, path: Path, validate: Callable[[Path, bool], None]) -> None:
        """Write the file behind `link` to `path`, atomically.

        `validate` gets the temporary file, and whether it is known to be complete. It rejects the
        file with DeadLinkError, or with AttemptFailedError to try again.

        Raises:
            DeadLinkError, DownloadFailedError: there is no usable file.
            UserError: `path` cannot be written.
        """
        failed = waited = 0
        while True:
            self._limiter.wait()
            try:
                with atomic_write(path) as temporary:
                    validate(temporary, self._receive(link, temporary))
                return
            except _BusyError as error:
                waited += 1
                seconds = self._backoff_after(waited) if error.seconds is None else error.seconds
                if waited > _MAX_WAITS or seconds > _MAX_RETRY_AFTER:
                    raise DownloadFailedError(str(error)) from None
                self._limiter.pause(seconds)
            except AttemptFailedError as error:
                failed += 1
                log.info("attempt %d: %s: %s", failed, link, error, extra={"file_only": True})
                if failed == ATTEMPTS:
                    raise DownloadFailedError(str(error)) from None
                self._limiter.sleep(self._backoff_after(failed))

    def _backoff_after(self, attempts: int) -> float:
        """Seconds: twice as long each time, with jitter so that threads do not retry at once."""
        seconds = min(self._backoff * 2 ** (attempts - 1), _MAX_BACKOFF)
        return seconds * random.uniform(0.5, 1.5)

    def _receive(self, link: str, path: Path) -> bool:
        """Write the response's body. Returns whether it is known to be complete, because the
        server sent its length."""
        started = time.monotonic()
        try:
            with self._thread.session.get(link, stream=True, timeout=_TIMEOUT) as response:
                _check_status(response)
                with path.open("wb") as file:
                    # urllib3 raises an error if bytes are missing.
                    for chunk in response.iter_content(_CHUNK):
                        self.received += file.write(chunk)
                        if file.tell() > _MAX_BYTES:
                            raise DeadLinkError(f"more than {_MAX_BYTES >> 20} MB")
                        if time.monotonic() - started > _DEADLINE or self._limiter.stopped.is_set():
                            raise AttemptFailedError("too slow")
                return bool(response.headers.get("Content-Length"))
        except ValueError:  # from requests, or from below it, for an address of link or redirect
            raise DeadLinkError("not an address") from None
        except requests.exceptions.TooManyRedirects:
            raise DeadLinkError("too many redirects") from None
        except requests.RequestException as error:
            raise AttemptFailedError(f"{type(error).__name__}: {error}") from None


def _check_status(response: requests.Response) -> None:
    status = response.status_code
    if status == HTTPStatus.OK:
        return
    retry_after = response.headers.get("Retry-After", "")
    is_busy = status == HTTPStatus.SERVICE_UNAVAILABLE and retry_after
    if is_busy or status == HTTPStatus.TOO_MANY_REQUESTS:
        seconds = None
        with contextlib.suppress(InvalidHeader):  # neither a number of seconds nor a date
            seconds = Retry().parse_retry_after(retry_after)
        raise _BusyError(status, seconds)
    if status >= 500 or status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY):
        raise AttemptFailedError(f"HTTP {status}")
    raise DeadLinkError(f"HTTP {status}")
