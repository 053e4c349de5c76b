"""The client's pauses. Downloads from a real server are tested in test_download.py."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import requests

from panollava.data.http_client import HttpClient, RateLimiter, _BusyError, _check_status


def test_a_request_to_wait_halves_the_rate_and_never_raises_it() -> None:
    for rate, halved in ((10, 5), (4, 2), (1.5, 1), (0.2, 0.2)):
        limiter = RateLimiter(rate)
        limiter.pause(0.5)
        limiter.pause(0.5)  # from another request at the same time
        assert 1 / limiter.interval == pytest.approx(halved)


def test_a_shorter_pause_does_not_end_a_longer_one() -> None:
    limiter = RateLimiter(1000)
    started = time.monotonic()
    limiter.pause(0.3)
    limiter.pause(0.01)
    limiter.wait()
    assert time.monotonic() - started >= 0.3


def test_each_attempt_waits_twice_as_long_up_to_a_minute() -> None:
    client = HttpClient(rate=10, backoff=2)
    for attempts, seconds in ((1, 2), (2, 4), (4, 16), (9, 60)):
        waits = [client._backoff_after(attempts) for _ in range(50)]
        assert 0.5 * seconds <= min(waits) < max(waits) <= 1.5 * seconds


def test_retry_after_is_a_number_of_seconds_or_a_date() -> None:
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1))
    for retry_after, seconds in (("7", 7), (in_an_hour, 3600), ("soon", None), (None, None)):
        response = requests.Response()
        response.status_code = 429
        if retry_after is not None:
            response.headers["Retry-After"] = retry_after
        with pytest.raises(_BusyError) as busy:
            _check_status(response)
        assert busy.value.seconds == (seconds and pytest.approx(seconds, abs=60))
