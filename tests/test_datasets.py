"""A published data set comes with one command, exactly as its authors publish it."""

import csv
import dataclasses
import hashlib
import io
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers import SHARED, save_panorama
from panollava.cli import main as cli
from panollava.data import datasets
from panollava.data.datasets import DATASETS, Dataset, fetch_tables
from panollava.data.rows import read_rows
from panollava.errors import UserError

RAW = SHARED / "quic360_raw"
SPLITS = ("train", "valid", "test")


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The folder that the server publishes."""
    (tmp_path / "published").mkdir()
    return tmp_path / "published"


@pytest.fixture
def server(published: Path) -> Iterator[str]:
    yield from serve(published)


def serve(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def dataset(published: Path, server: str) -> Dataset:
    """Two panoramas per split, one of them without an annotation in test."""
    digests = {}
    for split in SPLITS:
        for name in "ab":
            save_panorama(published / f"{split}_{name}.jpg", seed=ord(name))
        text = io.StringIO(newline="")
        missing = "None" if split == "test" else "None of the walls is red."
        csv.writer(text, delimiter="\t", lineterminator="\n").writerows(
            [
                ("url", "query", "annotation"),
                (f"{server}/{split}_a.jpg", "weather", 'It says "rain", twice. '),
                (f"{server}/{split}_b.jpg", "walls", missing),
            ]
        )
        (published / f"{split}.tsv").write_bytes(text.getvalue().encode())
        digests[split] = hashlib.sha256(text.getvalue().encode()).hexdigest()
    return Dataset("data/some", f"{server}/{{split}}.tsv", digests, no_annotation="None")


def fetch(dataset: Dataset, root: Path) -> Path:
    return fetch_tables(dataset, root, rate=1000, pause=0.01)


def tree(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_one_command_downloads_tables_and_pictures(
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(DATASETS, "some", dataset)
    command = ["download", "some", "--rate", "1000"]
    cli.main(command)
    output = capsys.readouterr().err
    assert "test: rows without an annotation, which will be rejected: 1\n" in output
    assert "5 pictures in data/some/images, 0 dead links" in output
    for split in SPLITS:
        rows, rejects = read_rows(tmp_path / f"data/some/{split}.csv", tmp_path)
        assert rows["annotation"].tolist()[0] == 'It says "rain", twice. '
        expected = [[1, "empty annotation"]] if split == "test" else []
        assert rejects[["row", "reason"]].to_numpy().tolist() == expected
    before = tree(tmp_path / "data")
    cli.main(command)
    assert tree(tmp_path / "data") == before


def test_a_table_with_another_content_is_an_error_and_nothing_is_written(
    dataset: Dataset, published: Path, tmp_path: Path
) -> None:
    with (published / "valid.tsv").open("a") as file:
        file.write("x\ty\tz\n")
    with pytest.raises(UserError, match=r"/valid\.tsv: its SHA-256 is [0-9a-f]{64}; expected"):
        fetch(dataset, tmp_path)
    (published / "valid.tsv").unlink()
    with pytest.raises(UserError, match=r"/valid\.tsv: HTTP 404; check the network"):
        fetch(dataset, tmp_path)
    assert not (tmp_path / "data").exists()


def test_a_table_that_exists_is_kept_and_must_have_the_same_rows(
    dataset: Dataset, tmp_path: Path
) -> None:
    folder = fetch(dataset, tmp_path)
    before = tree(folder)
    text = before["test.csv"].decode().replace('"url"', "url")  # other bytes, the same rows
    (folder / "test.csv").write_text(text)
    (folder / "train.csv").unlink()
    fetch(dataset, tmp_path)
    assert tree(folder) == before | {"test.csv": text.encode()}
    (folder / "train.csv").unlink()
    for changed in (text.replace("twice", "once"), text + "a.jpg,q,a\n", text + "a.jpg\n"):
        (folder / "test.csv").write_text(changed)
        with pytest.raises(UserError, match=r"test\.csv: exists and differs .* in row \d; move it"):
            fetch(dataset, tmp_path)
        assert (folder / "test.csv").read_text() == changed
        assert not (folder / "train.csv").exists()


def test_every_data_set_has_a_fixed_version_and_all_splits() -> None:
    for dataset in DATASETS.values():
        assert list(dataset.sha256) == list(SPLITS)
        assert all(len(digest) == 64 for digest in dataset.sha256.values())
        assert "{split}" in dataset.address and "/main/" not in dataset.address


@pytest.mark.skipif(not RAW.is_dir(), reason="needs QuIC-360's published tables")
def test_the_published_tables_of_quic360_are_converted(tmp_path: Path) -> None:
    for address in serve(RAW):
        dataset = dataclasses.replace(DATASETS["quic360"], address=f"{address}/{{split}}.tsv")
        folder = fetch(dataset, tmp_path)
    for split, count in (("train", 9459), ("valid", 1251), ("test", 6246)):
        rows, rejects = read_rows(folder / f"{split}.csv", tmp_path)
        assert len(rows) + len(rejects) == count
        empty = rejects[rejects["reason"] == "empty annotation"]["row"].tolist()
        assert empty == ([2068, 3539, 4363] if split == "test" else [])
        raw = (RAW / f"{split}.tsv").read_bytes().decode()
        published = list(csv.reader(io.StringIO(raw, newline=""), delimiter="\t"))[1:]
        converted = rejects.sort_values("row")[["url", "query", "annotation"]].to_numpy().tolist()
        for row in empty:
            assert published[row][2] == "None"
            published[row][2] = ""
        assert converted == published


def test_the_name_of_a_data_set_is_listed_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["download", "--help"])
    output = capsys.readouterr().out
    assert all(name in output for name in datasets.DATASETS)
