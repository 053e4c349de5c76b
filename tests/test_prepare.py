"""Panoramas become views, each decoded once; every row is written or rejected."""

import csv
import io
import logging
import shutil
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import ROOT, SHARED, read_array
from panollava import config
from panollava.data import picture_shards as module
from panollava.data.images import read_panorama, reduced_jpeg, roll
from panollava.data.prepare import prepare_project
from panollava.data.shards import Shards
from panollava.errors import UserError
from panollava.geometry.views import Sampler, layout
from panollava.paths import PREPARED, RESUME, ROLLED

VIEWS = config.Views(strategy="e2p", size=16, fov=90.0, overlap=0.5, pitch=0.0, global_view=False)
Rows = list[tuple[str, str, str]]


def data(max_rejected: float = 0.0, folder: str = "data") -> config.Data:
    return config.Data(folder, max_rejected, store="views", shard_size=2, store_dir=None)


def prepare(
    data: config.Data,
    views: config.Views,
    root: Path,
    rolls: Sequence[float] = (),
    threads: int = 2,
) -> None:
    settings = config.load_settings(ROOT / "params.yaml")
    evaluate = replace(settings.evaluate, split="test", rolls=[*rolls])
    machine = replace(settings.machine, decode_threads=threads)
    prepare_project(
        replace(settings, data=data, views=views, evaluate=evaluate, machine=machine), root
    )


def save_picture(path: Path, seed: int, mode: str = "RGB") -> None:
    """A smooth random panorama."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (5, 10, 3), dtype=np.uint8)
    large = Image.fromarray(small).resize((256, 128), Image.Resampling.BICUBIC)
    large.convert(mode).save(path)


def write_rows(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("url", "query", "annotation"), *rows])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project: train has 3 pictures and 5 rows, valid and test one each."""
    for seed, name in enumerate(("a.jpg", "b.png", "c.jpg", "valid.jpg", "test.jpg")):
        save_picture(tmp_path / "data" / "images" / name, seed)
    names = ["c.jpg", "a.jpg", "c.jpg", "b.png", "a.jpg"]
    folder = tmp_path / "data"
    write_rows(
        folder / "train.csv", [(f"images/{n}", "q", f"answer {i}") for i, n in enumerate(names)]
    )
    write_rows(folder / "valid.csv", [("images/valid.jpg", "q", "a")])
    write_rows(folder / "test.csv", [("images/test.jpg", "q", "a")])
    return tmp_path


def add_rows(root: Path, rows: Rows, split: str = "train") -> None:
    with (root / "data" / f"{split}.csv").open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(
        path, dtype={"url": str, "query": str, "annotation": str}, keep_default_na=False
    )


def reasons(root: Path, split: str = "train") -> list[list[Any]]:
    return read_csv(root / PREPARED / split / "rejects.csv")[["row", "reason"]].values.tolist()


def test_rows_refer_to_the_views_of_their_panoramas(root: Path) -> None:
    prepare(data(), VIEWS, root)
    views = read_array(root / PREPARED / "train/panoramas")
    rows = read_csv(root / PREPARED / "train" / "rows.csv")
    assert (views.dtype, views.shape) == (np.uint8, (3, 8, 16, 16, 3))
    assert list(rows) == ["panorama", "row", "url", "query", "annotation"]
    assert rows["panorama"].tolist() == [0, 1, 0, 2, 1]  # in the order of first appearance
    assert rows["row"].tolist() == [0, 1, 2, 3, 4]
    assert rows["annotation"].tolist() == [f"answer {i}" for i in range(5)]
    sampler = Sampler(layout(VIEWS), 16)
    for panorama, url in zip(rows["panorama"], rows["url"], strict=True):
        picture = read_panorama(root / "data" / url, sampler.panorama_width)
        assert np.array_equal(views[panorama], sampler.sample(picture)), url
    assert list(read_csv(root / PREPARED / "train" / "rejects.csv")) == [
        *("row", "url", "query", "annotation", "reason")
    ]
    assert sorted(path.name for path in (root / PREPARED / "train").iterdir()) == [
        *("panoramas", "rejects.csv", "rows.csv")
    ]


def test_rolls_that_only_reorder_the_views_are_not_written(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_rows(root, [("images/c.jpg", "q", "a"), ("images/a.jpg", "q", "a")], split="test")
    with caplog.at_level(logging.INFO):
        prepare(data(), VIEWS, root, rolls=(45, 20, -90, 200))
    sampler = Sampler(layout(VIEWS), 16)
    pictures = [
        read_panorama(root / "data/images" / name, sampler.panorama_width)
        for name in ("test.jpg", "c.jpg", "a.jpg")
    ]
    expected = [sampler.sample(roll(each, degrees)) for each in pictures for degrees in (20, 200)]
    assert np.array_equal(read_array(root / ROLLED), expected)
    (note,) = (text for text in caplog.messages if "evaluate.rolls" in text)
    assert "multiples of the view stride (45 degrees)" in note and ": 45, -90;" in note
    caplog.clear()
    cubemap = replace(VIEWS, strategy="cubemap")
    with caplog.at_level(logging.INFO):
        prepare(data(), cubemap, root, rolls=(90,))
    assert read_array(root / ROLLED).shape == (3, 6, 16, 16, 3)
    assert "evaluate.rolls" not in caplog.text


def test_any_angle_rolls_the_panorama_by_whole_pixels(root: Path) -> None:
    prepare(data(), VIEWS, root, rolls=(20.4,))
    sampler = Sampler(layout(VIEWS), 16)
    picture = read_panorama(root / "data/images/test.jpg", sampler.panorama_width)
    columns = round(20.4 / 360 * picture.shape[1])
    assert np.array_equal(
        read_array(root / ROLLED), [sampler.sample(np.roll(picture, columns, axis=1))]
    )


@pytest.mark.parametrize("rolls", [(), (45, 180)])
def test_without_angles_that_show_new_pixels_nothing_is_rolled(
    root: Path, rolls: tuple[float, ...]
) -> None:
    prepare(data(), VIEWS, root, rolls=rolls)
    assert len(Shards(root / ROLLED)) == 0


def test_texts_are_written_unchanged(root: Path) -> None:
    texts = [
        '"quoted", twice',
        "two\nlines",
        "two\r\nDOS lines",
        "a\rb",
        " spaces ",
        "NA",
        "1.0",
        "全景 🏔",
    ]
    add_rows(root, [("images/a.jpg", text, text) for text in texts])
    prepare(data(), VIEWS, root)
    rows = read_csv(root / PREPARED / "train" / "rows.csv")[5:]
    assert rows["annotation"].tolist() == texts
    assert rows["query"].tolist() == texts


def test_exactly_the_bad_rows_are_rejected_with_their_reasons(root: Path) -> None:
    images = root / "data" / "images"
    complete = (images / "a.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(complete[: len(complete) // 2])
    Image.new("RGB", (200, 200)).save(images / "square.png")
    (images / "page.jpg").write_text("<html>gone</html>")
    save_picture(images / "gray.png", 9, mode="L")
    add_rows(
        root,
        [
            ("images/cut.jpg", "q", "a"),
            ("images/missing.jpg", "q", "a"),
            ("images/gray.png", "q", "a"),
            ("images/square.png", "q", "a"),
            ("images/a.jpg", "q", ""),
            ("images/cut.jpg", "other", "a"),
            ("images/page.jpg", "q", "a"),
            ("https://example.org/x.jpg", "q", "a"),
            ("images/b.png", "q", "the last"),
        ],
    )
    prepare(data(max_rejected=0.5), VIEWS, root)
    rejected = reasons(root)
    assert [row for row, _ in rejected] == [5, 6, 8, 9, 10, 11, 12]
    for (_, reason), start in zip(
        rejected,
        [
            "cut off: Premature end of JPEG file",
            "picture missing",
            "not 2:1: 200 x 200 pixels",
            "empty annotation",
            "cut off: Premature end of JPEG file",
            "not a picture",
            "link not downloaded",
        ],
        strict=True,
    ):
        assert reason.startswith(start)
        assert str(root) not in reason  # the same on every machine
    rows = read_csv(root / PREPARED / "train" / "rows.csv")
    assert rows["row"].tolist() == [0, 1, 2, 3, 4, 7, 13]
    assert rows["panorama"].tolist() == [0, 1, 0, 2, 1, 3, 2]
    views = read_array(root / PREPARED / "train/panoramas")
    assert len(views) == 4
    assert (views[3, ..., 0] == views[3, ..., 1]).all()  # the gray one
    assert views[3].std() > 0


@pytest.mark.parametrize(
    ("allowed", "stops"), [(0.0, True), (0.28, True), (0.29, False), (1.0, False)]
)
def test_more_bad_rows_than_allowed_stop_the_run(root: Path, allowed: float, stops: bool) -> None:
    """2 of 7 rows are bad: one is detected before and one after its picture is opened."""
    (root / "data" / "images" / "page.jpg").write_text("gone")
    add_rows(root, [("images/page.jpg", "q", "a"), ("images/a.jpg", "q", "")])
    if not stops:
        prepare(data(allowed), VIEWS, root)
    else:
        with pytest.raises(UserError) as error:
            prepare(data(allowed), VIEWS, root)
        message = str(error.value)
        assert "train.csv: " in message and f"data.max_rejected {allowed:g}" in message
        assert "1 x empty annotation" in message
        assert f"Fix those listed in {root / PREPARED / 'train' / 'rejects.csv'}" in message
        assert "row 6 (images/a.jpg): empty annotation" in message
        if allowed > 0:
            assert "2 of 7 rows" in message and "1 x not a picture" in message
        assert not (root / PREPARED / "train" / "rows.csv").exists()
    expected = [[5, "not a picture"], [6, "empty annotation"]]
    assert reasons(root) == (expected if allowed > 0 else expected[1:])


def test_bad_rows_are_reported_before_any_picture_is_opened(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "read_panorama", lambda *_: pytest.fail("a picture was opened"))
    add_rows(root, [("images/test.jpg", "q", "")], split="test")
    with pytest.raises(UserError, match=r"test\.csv: 1 of 2 rows are bad.*1 x empty annotation"):
        prepare(data(), VIEWS, root)


def test_a_split_without_good_rows_always_stops_the_run(root: Path) -> None:
    write_rows(root / "data" / "valid.csv", [("gone.jpg", "q", "a"), ("images/valid.jpg", "q", "")])
    with pytest.raises(UserError, match=r"valid\.csv: 2 of 2 rows are bad, so none is left"):
        prepare(data(1.0), VIEWS, root)
    write_rows(root / "data" / "valid.csv", [("images/valid.jpg", "q", "a")])
    (root / "data" / "images" / "valid.jpg").write_text("gone")
    with pytest.raises(UserError, match=r"valid\.csv: 1 of 1 rows are bad, so none is left"):
        prepare(data(1.0), VIEWS, root)


def test_a_failed_run_leaves_no_files_of_an_earlier_run(root: Path) -> None:
    prepare(data(), VIEWS, root)
    (root / "data" / "images" / "a.jpg").write_text("gone")
    with pytest.raises(UserError):
        prepare(data(), VIEWS, root)
    left = {str(path.relative_to(root / PREPARED)) for path in (root / PREPARED).rglob("*.*")}
    assert left == {f"{split}/rejects.csv" for split in ("train", "valid", "test")}


def test_an_interrupted_run_leaves_no_partial_array(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, width: int) -> np.ndarray:
        if path.name == "b.png":
            raise KeyboardInterrupt
        return read_panorama(path, width)

    monkeypatch.setattr(module, "read_panorama", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(data(), VIEWS, root)
    assert not list((root / PREPARED).rglob("*.npy*"))
    assert not list(root.rglob("*.part"))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_picture_is_decoded_once_for_all_its_rows(
    root: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    opened = []

    def counted(path: Path, width: int) -> np.ndarray:
        opened.append(path.name)
        return read_panorama(path, width)

    monkeypatch.setattr(module, "read_panorama", counted)
    # Another path to the same picture.
    add_rows(root, [(f"{root}/data/images/a.jpg", "q", str(i)) for i in range(20)])
    add_rows(root, [("data/images/../images/b.png", "q", "a")])
    prepare(data(), VIEWS, root, threads=threads)
    assert sorted(opened) == ["a.jpg", "b.png", "c.jpg", "test.jpg", "valid.jpg"]
    assert len(read_array(root / PREPARED / "train/panoramas")) == 3


def test_the_number_of_threads_does_not_change_a_byte(root: Path) -> None:
    for seed in range(30):
        save_picture(root / "data" / "images" / f"{seed}.jpg", 100 + seed)
    (root / "data" / "images" / "7.jpg").write_text("gone")
    add_rows(root, [(f"images/{seed}.jpg", "q", "a") for seed in reversed(range(30))])
    results = []
    for threads in (1, 2, 5):
        out = root / PREPARED
        shutil.rmtree(root / RESUME, ignore_errors=True)
        prepare(data(0.5), VIEWS, root, threads=threads)
        files = sorted(p for p in out.glob("*/**/*") if p.is_file())
        results.append({p.relative_to(out): p.read_bytes() for p in files})
    assert len(results[0]) == 36
    assert results[0] == results[1] == results[2]


def test_memory_does_not_grow_with_the_number_of_panoramas(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while one slow picture delays the writing of all later ones."""

    def slow_at_first(path: Path, width: int) -> np.ndarray:
        if path.name == "0.jpg":
            time.sleep(1)
        return read_panorama(path, width)

    monkeypatch.setattr(module, "read_panorama", slow_at_first)
    images = root / "data" / "images"
    for index in range(200):
        shutil.copy(images / "a.jpg", images / f"{index}.jpg")
    views = config.Views("e2p", 96, 90.0, 0.5, 0.0, False)
    peaks = []
    for count in (20, 200):
        rows = [(f"images/{index}.jpg", "q", "a") for index in range(count)]
        write_rows(root / "data" / "train.csv", rows)
        tracemalloc.start()
        prepare(data(), views, root)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    files = (root / PREPARED / "train/panoramas").glob("*.npy")
    assert sum(file.stat().st_size for file in files) > 40e6
    assert peaks[1] < peaks[0] + 3e6


def test_every_strategy_is_prepared(root: Path) -> None:
    for strategy, count in (("e2p", 9), ("cubemap", 6), ("sliding_window", 8), ("resize", 1)):
        views = config.Views(strategy, 16, 90.0, 0.5, 0.0, strategy == "e2p")  # type: ignore[arg-type]
        prepare(data(), views, root)
        assert read_array(root / PREPARED / "train/panoramas").shape == (3, count, 16, 16, 3)


def test_a_picture_in_two_splits_is_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare(data(), VIEWS, root)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    add_rows(root, [("data/images/a.jpg", "q", "a"), ("images/c.jpg", "q", "a")], split="test")
    prepare(data(), VIEWS, root)
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.getMessage() == (
        f"2 pictures are in both train and test, such as {root}/data/images/a.jpg"
    )


def test_pictures_that_dvc_does_not_track_are_one_warning(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Symbolic links inside `images`, as DVC may create them, are tracked."""
    images = root / "data" / "images"
    (images / "more").mkdir()
    (images / "a.jpg").rename(root / "cached")
    (images / "a.jpg").symlink_to(root / "cached")
    save_picture(images / "more" / "d.jpg", 9)
    add_rows(root, [("data/images/more/../more/d.jpg", "q", "a")])
    prepare(data(), VIEWS, root)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for seed, name in enumerate(("data/outside.jpg", "elsewhere/e.jpg"), start=10):
        save_picture(root / name, seed)
    add_rows(root, [("outside.jpg", "q", "a"), ("data/outside.jpg", "q", "a")])
    add_rows(root, [(f"{root}/elsewhere/e.jpg", "q", "a")], split="test")
    prepare(data(), VIEWS, root)
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.getMessage().startswith(
        f"2 pictures are not in {images}, such as {root}/data/outside.jpg; DVC tracks only"
    )


def test_each_split_is_summarized_in_one_line(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_rows(root, [("images/a.jpg", "q", "")])
    with caplog.at_level(logging.INFO):
        prepare(data(0.5), VIEWS, root)
    assert [record.getMessage() for record in caplog.records] == [
        "train: 5 rows over 3 panoramas, 1 rejected (1 x empty annotation)",
        "valid: 1 rows over 1 panoramas, 0 rejected",
        "test: 1 rows over 1 panoramas, 0 rejected",
    ]


def test_a_missing_data_folder_is_an_error(root: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/train\.csv: no such file; data\.dir must"):
        prepare(data(folder="nowhere"), VIEWS, root)


def test_a_missing_split_is_an_error(root: Path) -> None:
    (root / "data" / "test.csv").unlink()
    with pytest.raises(UserError, match=r"test\.csv: no such file"):
        prepare(data(), VIEWS, root)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_views_of_real_panoramas_match_views_of_the_full_picture(tmp_path: Path) -> None:
    """The reference is decoded at full size by Pillow, without shortcuts."""
    folder = SHARED / "quic360_mini"
    views = config.Views("e2p", 224, 90.0, 0.5, 0.0, False)
    prepare(data(folder=str(folder)), views, tmp_path)
    for split, rows, panoramas in (("train", 87, 5), ("valid", 18, 1), ("test", 33, 2)):
        table = read_csv(tmp_path / PREPARED / split / "rows.csv")
        array = read_array(tmp_path / PREPARED / split / "panoramas")
        assert (len(table), array.shape) == (rows, (panoramas, 8, 224, 224, 3))
        assert reasons_of(tmp_path / PREPARED / split) == []
        sampler = Sampler(layout(views), 224)
        for panorama, url in table[["panorama", "url"]].drop_duplicates().values:
            full = np.asarray(Image.open(folder / url).convert("RGB"))
            exact = sampler.sample(cv2.resize(full, (1400, 700), interpolation=cv2.INTER_AREA))
            apart = np.abs(array[panorama].astype(int) - exact)
            assert apart.mean() < 6, url
            assert np.corrcoef(array[panorama].ravel(), exact.ravel())[0, 1] > 0.98, url


def reasons_of(folder: Path) -> list[str]:
    return read_csv(folder / "rejects.csv")["reason"].tolist()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_published_rows_without_their_pictures_are_all_rejected(tmp_path: Path) -> None:
    folder = SHARED / "quic360_full"
    with pytest.raises(UserError, match=r"train\.csv: 9459 of 9459.*9459 x link not downloaded"):
        prepare(data(1.0, folder=str(folder)), VIEWS, tmp_path)
    rejects = read_csv(tmp_path / PREPARED / "train" / "rejects.csv")
    source = read_csv(folder / "train.csv")
    assert rejects[["url", "query", "annotation"]].equals(source[["url", "query", "annotation"]])


def pictures(root: Path) -> Shards:
    return Shards(root / PREPARED / "test/pictures")


def test_the_evaluated_split_is_written_as_small_whole_pictures(root: Path) -> None:
    """With the number of their panorama; a rejected picture has none."""
    for seed in range(3):
        save_picture(root / "data/images" / f"{seed}.jpg", 50 + seed)
    large = Image.open(root / "data/images/2.jpg").resize((1024, 512))
    large.save(root / "data/images/2.jpg")
    (root / "data/images/1.jpg").write_text("gone")
    add_rows(root, [(f"images/{seed}.jpg", "q", "a") for seed in range(3)], "test")
    prepare(data(0.5), VIEWS, root)
    assert len(pictures(root)) == 3
    assert not (root / PREPARED / "train/pictures").exists()
    rows = read_csv(root / PREPARED / "test/rows.csv")
    assert rows["panorama"].tolist() == [0, 1, 2]
    width = Sampler(layout(VIEWS), 16).panorama_width
    for panorama, url in zip(rows["panorama"], rows["url"], strict=True):
        expected = read_panorama(root / "data" / url, width).astype(float)
        jpeg = io.BytesIO(pictures(root)[panorama])
        actual = np.asarray(Image.open(jpeg), float)  # the lower half too, which no view shows
        assert np.abs(actual - expected).mean() < 6, url


def test_the_pictures_have_the_same_bytes_and_none_of_an_earlier_run_stays(root: Path) -> None:
    prepare(data(), VIEWS, root)
    first = pictures(root)
    stray = root / PREPARED / "test/pictures/000007.tar"
    stray.write_bytes(b"")
    shutil.rmtree(root / RESUME)
    prepare(data(), VIEWS, root, threads=1)
    assert not stray.exists()
    assert pictures(root).digest == first.digest and len(first) == 1
    assert b"Exif" not in first[0]


@pytest.mark.parametrize("height", [700, 1500])
def test_a_reduced_picture_is_small_whatever_it_shows(height: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, 2 * height, 3), dtype=np.uint8)
    jpeg = reduced_jpeg(noise)
    assert len(jpeg) <= 1 << 19
    assert Image.open(io.BytesIO(jpeg)).size == (min(2 * height, 2048), min(height, 1024))
