"""Downloads from a local HTTP server that misbehaves like real ones."""

import csv
import hashlib
import io
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT, SHARED, write_rows
from panollava.data import http_client
from panollava.data.download import download
from panollava.data.http_client import ATTEMPTS
from panollava.data.picture_paths import picture_file, plain_file
from panollava.data.rows import read_rows
from panollava.data.shard_work import Part
from panollava.errors import UserError

SPLITS = ("train", "valid", "test")


@cache
def jpeg(seed: int, width: int = 64, height: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def number(path: str) -> int:
    return int(hashlib.sha256(path.encode()).hexdigest()[:8], 16)


def content(path: str) -> bytes:
    """A different picture for each path and query."""
    return jpeg(number(path) % 50) + path.encode()  # bytes after a JPEG's end are ignored


class Server(ThreadingHTTPServer):
    """Its response depends on the first folder of the path. `requested` counts requests, `served`
    complete pictures."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requested: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.times: list[float] = []
        self.closed_until = 0.0
        self.too_early = 0  # requests while clients should wait
        self.agent = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the client was killed


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requested[self.path] += 1
            count = self.server.requested[self.path]
            self.server.times.append(time.monotonic())
            self.server.agent = self.headers["User-Agent"]
        kind, first = self.path.split("/")[1], count == 1
        getattr(self, f"_{kind}", self._good)(first)

    def _good(self, first: bool = True) -> None:
        self._send(content(self.path))
        with self.server.lock:
            self.server.served[self.path] += 1

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _drop(self, first: bool) -> None:
        if first:
            self.close_connection = True
        else:
            self._good()

    def _late(self, first: bool) -> None:
        time.sleep(0.3)
        self._good()

    def _cut(self, first: bool) -> None:
        if not first:
            return self._good()
        body = content(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True

    def _cutquietly(self, first: bool) -> None:
        """Without a length, so that only the picture shows that bytes are missing."""
        if not first:
            return self._good()
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content(self.path)[:400])
        self.close_connection = True

    def _error(self, first: bool) -> None:
        if first:
            self._send(b"oops", 500)
        else:
            self._good()

    def _hasty(self, first: bool) -> None:
        if first:
            self._send(b"", 408)
        else:
            self._good()

    def _full(self, first: bool) -> None:
        """Asks to wait more often than a download is attempted."""
        if self.server.requested[self.path] <= ATTEMPTS + 1:
            self._send(b"", 503, Retry_After="0")
        else:
            self._good()

    def _closed(self, first: bool) -> None:
        self._send(b"", 429, Retry_After="0")

    def _tomorrow(self, first: bool) -> None:
        self._send(b"", 429, Retry_After="86400")

    def _moved(self, first: bool) -> None:
        self._send(b"", 302, Location=self.path.replace("/moved/", "/to/"))

    def _astray(self, first: bool) -> None:
        self._send(b"", 302, Location="http://a..b/c.jpg")

    def _garbled(self, first: bool) -> None:
        self._send(b"", 302, Location="/caf\xe9.jpg")  # in Latin-1

    def _round(self, first: bool) -> None:
        self._send(b"", 302, Location=self.path)

    def _busy(self, first: bool) -> None:
        """The first request makes the server ask all clients to wait for a second."""
        with self.server.lock:
            now = time.monotonic()
            if self.server.closed_until == 0:
                self.server.closed_until = now + 1
            elif now < self.server.closed_until - 0.5:
                self.server.too_early += 1
            closed = now < self.server.closed_until
        if closed:
            self._send(b"", 429, Retry_After="1")
        else:
            self._good()

    def _gone(self, first: bool) -> None:
        self._send(b"no such photo", 404)

    def _removed(self, first: bool) -> None:
        self._send(b"", 410)

    def _page(self, first: bool) -> None:
        self._send(b"<html>This photo is private</html>")

    def _narrow(self, first: bool) -> None:
        self._send(jpeg(1, 60, 45))

    def _spoilt(self, first: bool) -> None:
        self._send(content(self.path)[:500])

    def _large(self, first: bool) -> None:
        self._send(bytes(2 << 20))

    def _never(self, first: bool) -> None:
        self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def write_links(folder: Path, links: list[str], rows: int = 1) -> None:
    """The links over three splits, `rows` rows each."""
    for index, split in enumerate(SPLITS):
        cells = [(link, "what", f"answer {row}") for link in links[index::3] for row in range(rows)]
        write_rows(folder / f"{split}.csv", cells)


def get(
    folder: Path,
    give_up: bool = False,
    connections: int = 8,
    rate: float = 1000,
    pause: float = 0.01,
    part: Part | None = None,
    merge: bool = False,
) -> None:
    download(folder, folder, connections, rate, pause, give_up, part, merge)


def rejects(folder: Path) -> dict[str, str]:
    with (folder / "rejects.csv").open(newline="") as lines:
        return {row["url"]: row["reason"] for row in csv.DictReader(lines)}


def tree(folder: Path) -> dict[str, bytes]:
    files = [*(folder / "images").iterdir(), folder / "rejects.csv"]
    return {file.name: file.read_bytes() for file in files}


def check_pictures(folder: Path, server: Server, links: list[str]) -> None:
    """Exactly these links are downloaded, each with its content."""
    files = {picture_file(link, folder): link for link in links}
    assert set((folder / "images").iterdir()) == files.keys()
    for file, link in files.items():
        path = link.removeprefix(server.address).replace("/moved/", "/to/")
        assert file.read_bytes() == content(path), link


def test_each_link_is_downloaded_once_from_a_server_that_misbehaves(
    server: Server, tmp_path: Path
) -> None:
    kinds = ["at", "drop", "late", "cut", "cutquietly", "error", "hasty", "moved"]
    good = [f"{server.address}/{kind}/{name}.jpg" for kind in kinds for name in "abc"]
    dead = {
        "gone": "HTTP 404",
        "removed": "HTTP 410",
        "page": "not a picture",
        "narrow": "not 2:1: 60 x 45 pixels; an equirectangular panorama is twice as wide as high",
        "spoilt": "cut off",
        "round": "too many redirects",
        "astray": "not an address",
        "garbled": "not an address",
    }
    hosts = ("[", "a..b", "a" * 64)
    links = [*good, *(f"{server.address}/{kind}/d.jpg" for kind in dead)]
    links += [f"http://{host}/e.jpg" for host in hosts]
    links = sorted(links, key=number)
    write_links(tmp_path, links, rows=3)
    get(tmp_path)
    check_pictures(tmp_path, server, good)
    reasons = {link.split("/")[-2]: reason for link, reason in rejects(tmp_path).items()}
    assert reasons == dead | dict.fromkeys(hosts, "not an address")
    assert set(server.served.values()) == {1}
    assert max(server.requested[f"/{kind}/a.jpg"] for kind in kinds) == 2
    assert server.requested["/gone/d.jpg"] == server.requested["/narrow/d.jpg"] == 1
    for split in SPLITS:
        rows, bad = read_rows(tmp_path / f"{split}.csv", tmp_path)
        assert set(bad["url"]) == set(bad["url"]) & rejects(tmp_path).keys()
        assert len(rows) + len(bad) == 3 * len(links[SPLITS.index(split) :: 3])


def test_the_result_does_not_depend_on_the_order_of_arrival(server: Server, tmp_path: Path) -> None:
    kinds = ["late", "at", "drop", "gone", "narrow", "cut", "removed"]
    links = [f"{server.address}/{kind}/{name}.jpg" for name in range(9) for kind in kinds]
    trees = []
    for connections in (1, 7, 20):
        folder = tmp_path / str(connections)
        write_links(folder, links)
        get(folder, connections=connections)
        trees.append(tree(folder))
        server.requested.clear()
    assert trees[0] == trees[1] == trees[2]
    order = [link for index in range(3) for link in links[index::3]]
    assert list(rejects(folder)) == [link for link in order if re.search("gone|narrow|rem", link)]


def test_a_second_run_downloads_only_missing_pictures(server: Server, tmp_path: Path) -> None:
    links = [f"{server.address}/at/{name}.jpg" for name in range(9)]
    write_links(tmp_path, links)
    get(tmp_path)
    before = tree(tmp_path)
    picture_file(links[4], tmp_path).unlink()
    (tmp_path / "images" / (picture_file("http://x/old.jpg", tmp_path).name + ".part")).touch()
    picture_file("http://x/no_row_names_it.jpg", tmp_path).touch()
    get(tmp_path)
    assert tree(tmp_path) == before
    assert {path for path, count in server.requested.items() if count == 2} == {"/at/4.jpg"}


def test_links_that_end_in_the_same_name_are_different_pictures(
    server: Server, tmp_path: Path
) -> None:
    links = [f"{server.address}/{path}" for path in ("1/a.jpg", "2/a.jpg", "1/A.jpg", "1/a.jpg?k")]
    write_links(tmp_path, links)
    get(tmp_path)
    check_pictures(tmp_path, server, links)
    names = {file.name.lower() for file in (tmp_path / "images").iterdir()}
    assert len(names) == len(links)


def test_a_picture_from_another_source_is_used_and_kept(server: Server, tmp_path: Path) -> None:
    links = [f"{server.address}/at/{name}.jpg" for name in range(6)]
    write_links(tmp_path, links)
    picture = plain_file(links[0], tmp_path)
    picture.parent.mkdir()
    picture.write_bytes(b"from another source")
    get(tmp_path)
    assert picture.read_bytes() == b"from another source"
    assert server.requested.keys() == {f"/at/{name}.jpg" for name in range(1, 6)}


def test_a_picture_in_any_row_is_kept_even_if_the_row_is_bad(
    server: Server, tmp_path: Path
) -> None:
    """The names look like those of downloaded pictures."""
    link, images = f"{server.address}/at/fetched.jpg", tmp_path / "images"
    names = [f"pano-{number:016x}.jpg" for number in range(4)]
    rows = [(f"images/{names[0]}", "q", "a"), (f"images/{names[1]}", "q", ""), (link, "q", "")]
    rows += [(f"{images}/{names[2]}", "q", "a"), ("images/linked.jpg", "q", "a")]
    for split in SPLITS:
        write_rows(tmp_path / f"{split}.csv", rows)
    images.mkdir()
    kept = [*(images / name for name in names), picture_file(link, tmp_path)]
    for picture in kept:
        picture.write_bytes(jpeg(1))
    (images / "linked.jpg").symlink_to(names[3])
    unnamed = images / f"pano-{4:016x}.jpg"
    unnamed.touch()
    get(tmp_path)
    assert set(images.iterdir()) == {*kept, images / "linked.jpg"}
    assert not server.requested


def test_a_second_run_keeps_symbolic_links_into_a_cache(server: Server, tmp_path: Path) -> None:
    """DVC creates them if cache.type is symlink."""
    links = [f"{server.address}/at/{name}.jpg" for name in range(3)]
    write_links(tmp_path, links)
    get(tmp_path)
    for link in links:
        picture = picture_file(link, tmp_path)
        picture.rename(tmp_path / str(number(link)))
        picture.symlink_to(tmp_path / str(number(link)))
    get(tmp_path)
    check_pictures(tmp_path, server, links)
    assert set(server.requested.values()) == {1}


def test_no_requests_are_sent_while_a_server_asks_to_wait(server: Server, tmp_path: Path) -> None:
    links = [f"{server.address}/busy/{name}.jpg" for name in range(60)]
    write_links(tmp_path, links)
    started = time.monotonic()
    get(tmp_path, connections=4)
    assert time.monotonic() - started > 1
    check_pictures(tmp_path, server, links)
    assert server.too_early <= 4  # already under way
    assert rejects(tmp_path) == {}


@pytest.mark.timeout(60)  # a client that obeys waits for a day
def test_a_request_to_wait_is_no_failed_attempt_but_is_not_obeyed_for_ever(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [f"{server.address}/{place}.jpg" for place in ("full/a", "at/b", "at/c")]
    write_links(tmp_path, good)
    get(tmp_path)
    check_pictures(tmp_path, server, good)
    monkeypatch.setattr(http_client, "_MAX_WAITS", 3)
    write_links(tmp_path, [*good, *(f"{server.address}/{k}/d.jpg" for k in ("closed", "tomorrow"))])
    with pytest.raises(UserError, match="2 of 5 downloads failed .*HTTP 429"):
        get(tmp_path)
    assert server.requested["/closed/d.jpg"] == 4 and server.requested["/tomorrow/d.jpg"] == 1


def test_a_file_may_be_neither_too_large_nor_too_slow(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_MAX_BYTES", 1 << 20), ("_DEADLINE", 0.2), ("ATTEMPTS", 2)):
        monkeypatch.setattr(http_client, name, value)
    good, large, late = (f"{server.address}/{kind}/a.jpg" for kind in ("at", "large", "late"))
    write_links(tmp_path, [good, large, late])
    get(tmp_path, give_up=True)
    assert rejects(tmp_path) == {large: "more than 1 MB", late: "no complete response"}
    assert server.requested["/large/a.jpg"] == 1 and server.requested["/late/a.jpg"] == 2


def test_the_rate_limit_is_kept(server: Server, tmp_path: Path) -> None:
    write_links(tmp_path, [f"{server.address}/at/{name}.jpg" for name in range(30)])
    get(tmp_path, rate=20)
    assert server.times[-1] - server.times[0] > 29 / 20 * 0.95
    within = [sum(t <= other < t + 0.5 for other in server.times) for t in server.times]
    assert max(within) <= 12
    assert "PanoLLaVA" in server.agent


def test_a_failed_download_is_an_error_and_complete_pictures_are_kept(
    server: Server, tmp_path: Path
) -> None:
    """A network that is down must not cause dead links."""
    good = [f"{server.address}/at/{name}.jpg" for name in range(5)]
    links = [*good, f"{server.address}/never/a.jpg"]
    write_links(tmp_path, links)
    (tmp_path / "rejects.csv").write_text("of an earlier run")
    with pytest.raises(UserError, match=r"1 of 6 downloads failed after 6 .*/never/a.jpg.*re-run"):
        get(tmp_path)
    assert server.requested["/never/a.jpg"] == ATTEMPTS
    assert not (tmp_path / "rejects.csv").exists()
    check_pictures(tmp_path, server, good)
    get(tmp_path, give_up=True)
    assert rejects(tmp_path) == {links[-1]: "no complete response"}
    assert set(server.served.values()) == {1}


def test_parts_of_any_number_give_the_files_of_one_process(server: Server, tmp_path: Path) -> None:
    kinds = ["at", "gone", "drop", "narrow", "moved"]
    links = [f"{server.address}/{kind}/{name}.jpg" for name in range(4) for kind in kinds]
    trees = []
    for count in (0, 1, 3, 7):
        folder = tmp_path / str(count)
        write_links(folder, links)
        parts = [Part(number, count) for number in range(1, count + 1)]
        with ThreadPoolExecutor() as pool:  # at the same time
            for done in [pool.submit(get, folder, part=part) for part in parts]:
                done.result()
        get(folder, merge=count > 0)
        trees.append(tree(folder))
        assert max(server.requested[f"/{kind}/0.jpg"] for kind in ("at", "gone", "moved")) == 1
        assert not list(folder.glob(".resume/*"))
        server.requested.clear()
    assert trees[0] == trees[1] == trees[2] == trees[3]


def test_merging_names_the_parts_that_are_not_finished(server: Server, tmp_path: Path) -> None:
    kinds = ["at", "gone", "to", "never"]  # of the four parts
    order = [f"{server.address}/{kind}/{name}.jpg" for name in range(3) for kind in kinds]
    write_links(tmp_path, [order[number % 3 * 4 + number // 3] for number in range(12)])
    with pytest.raises(UserError, match=r"12 of 12 links are not .*no process with --shard I/N"):
        get(tmp_path, merge=True)
    get(tmp_path, part=Part(1, 4))
    get(tmp_path, part=Part(3, 4))
    with pytest.raises(UserError, match="downloads failed after 6 attempts"):
        get(tmp_path, part=Part(4, 4))
    unfinished = r"--merge: 6 of 12 links are not downloaded, such as .*: --shard 2/4, 4/4$"
    with pytest.raises(UserError, match=unfinished):
        get(tmp_path, merge=True)
    get(tmp_path, part=Part(2, 4))
    get(tmp_path, part=Part(4, 4), give_up=True)
    server.requested.clear()
    get(tmp_path, merge=True)
    assert not server.requested
    assert list(rejects(tmp_path)) == [url for url in order if re.search("gone|never", url)]


def test_a_part_removes_nothing_of_the_others(server: Server, tmp_path: Path) -> None:
    links = [f"{server.address}/at/{name}.jpg" for name in range(4)]
    write_links(tmp_path, links)
    part = tmp_path / "images" / (picture_file(links[0], tmp_path).name + ".part")
    unnamed = picture_file("http://x/no_row_names_it.jpg", tmp_path)
    part.parent.mkdir()
    for file in (part, unnamed):
        file.touch()
    get(tmp_path, part=Part(2, 2))
    assert part.exists() and unnamed.exists()
    get(tmp_path)  # all of the rest, and merging
    check_pictures(tmp_path, server, links)
    assert set(server.requested.values()) == {1}


def test_a_part_that_starts_again_tries_its_dead_links_again(
    server: Server, tmp_path: Path
) -> None:
    links = [f"{server.address}/{kind}/0.jpg" for kind in ("at", "gone", "never")]
    write_links(tmp_path, links)
    for _ in range(2):
        get(tmp_path, part=Part(1, 1), give_up=True)
    assert server.requested["/gone/0.jpg"] == 2
    with pytest.raises(UserError, match="downloads failed"):
        get(tmp_path, part=Part(1, 1))
    with pytest.raises(UserError, match="2 of 3 links are not downloaded"):
        get(tmp_path, merge=True)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("connections", 0, "at least 1"), ("rate", 0, "greater than 0"), ("pause", -1, "at least 0")],
)
def test_an_invalid_option_is_an_error(
    tmp_path: Path, option: str, value: float, expected: str
) -> None:
    with pytest.raises(UserError, match=f"--{option}: expected .*{expected}"):
        get(tmp_path, **{option: value})  # type: ignore[arg-type]


def published(server: Server) -> dict[str, list[tuple[str, str, str]]]:
    """QuIC-360's rows with links to the local server: one in ten is dead, one in five needs a
    second attempt or a redirect."""
    kinds = "gone at drop cut at moved at error at narrow".split() + ["at"] * 10

    def place(link: str) -> str:
        kind = kinds[number(link) % len(kinds)]
        if number(link) % 400 == 1:
            kind = "busy" if number(link) % 800 == 1 else "late"
        return link.replace("https://live.staticflickr.com", f"{server.address}/{kind}")

    tables = {}
    for split in SPLITS:
        if SHARED.is_dir():
            with (SHARED / f"quic360_full/{split}.csv").open(newline="", encoding="utf-8") as lines:
                rows = list(csv.reader(lines))[1:]
        else:
            names = range(300 if split == "train" else 50)
            link = "https://live.staticflickr.com/1/{}_{}_o.jpg"
            rows = [[link.format(split, name // 2), "q", "a"] for name in names]
        tables[split] = [(place(url), query, text) for url, query, text in rows]
    return tables


@pytest.mark.slow
def test_downloading_the_published_data_survives_kills(server: Server, tmp_path: Path) -> None:
    """No picture is lost or downloaded twice, and exactly the dead links are rejected."""
    tables = published(server)
    for split, rows in tables.items():
        write_rows(tmp_path / f"data/{split}.csv", rows)
    links = list(dict.fromkeys(url for rows in tables.values() for url, _, _ in rows))
    dead = [link for link in links if "/gone/" in link or "/narrow/" in link]
    good = [link for link in links if link not in set(dead)]
    assert len(links) > 100 and 0.05 < len(dead) / len(links) < 0.15
    command = [sys.executable, str(ROOT / "src/run.py"), "download", "data", "--rate", "5000"]
    command += ["--pause", "0.05"]
    kills = 0
    for share in (0.2, 0.5, 0.8):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while len(server.served) < share * len(good) and process.poll() is None:
            time.sleep(0.02)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills == 3 and not (tmp_path / "data/rejects.csv").exists()
    last = subprocess.run(command, cwd=tmp_path, text=True, stderr=subprocess.PIPE, check=False)
    assert last.returncode == 0, last.stderr
    check_pictures(tmp_path / "data", server, good)
    assert list(rejects(tmp_path / "data")) == dead
    # Only downloads under way at a kill were repeated.
    again = [path for path, count in server.served.items() if count > 1]
    assert len(again) <= 16 * kills
    assert set(server.served.values()) <= {1, 2}
    assert server.too_early <= 16
