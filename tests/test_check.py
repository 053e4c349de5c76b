"""`check` reports everything at once, and separates faults from suspicions."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import SHARED, save_whole_panorama, write_rows
from panollava.cli import main as cli
from panollava.data.check import Report, check
from panollava.data.picture_paths import picture_file, plain_file

LINK = "https://example.org/{}.jpg"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three splits of 20 good rows over two pictures each."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "valid", "test"):
        for name in "ab":
            save_whole_panorama(
                tmp_path / f"data/images/{split}_{name}.jpg", seed=ord(name) + ord(split[1])
            )
        rewrite(tmp_path / "data", split, [])
    return tmp_path / "data"


def rewrite(folder: Path, split: str, more: list[tuple[str, str, str]]) -> None:
    """Twenty good rows, and more after them."""
    rows = [
        (f"images/{split}_{'ab'[row % 2]}.jpg", "weather", f"The sky is gray {row}.")
        for row in range(20)
    ]
    write_rows(folder / f"{split}.csv", rows + more)


def run(folder: Path, max_rejected: float = 0.15) -> Report:
    return check(folder, folder.parent, 2, max_rejected)


def test_a_good_folder_passes(folder: Path) -> None:
    report = run(folder, max_rejected=0)
    assert report.passed and not report.faults and not report.suspicions
    assert report.rows == {"train": 20, "valid": 20, "test": 20}
    assert report.pictures == {"train": 2, "valid": 2, "test": 2}


def test_all_faults_of_rows_and_pictures_are_listed_at_once(folder: Path) -> None:
    save_whole_panorama(folder / "images/cut.jpg", seed=3, height=256)
    complete = (folder / "images/cut.jpg").read_bytes()
    (folder / "images/cut.jpg").write_bytes(complete[: len(complete) // 2])
    (folder / "images/page.jpg").write_text("<html>")
    more = [
        ("images/gone.jpg", "q", "a"),
        ("images/cut.jpg", "q", "a"),
        ("images/train_a.jpg", "q", " "),
        ("images/page.jpg", "q", "a"),
        (LINK.format("dead"), "q", "a"),
        ("images/cut.jpg", "q", "b"),
    ]
    rewrite(folder, "train", more)
    (folder / "valid.csv").write_text("url,query\nimages/valid_a.jpg,q\n")
    rewrite(folder, "test", [("", "q", "a")])
    report = run(folder)
    assert [(fault.split, fault.row, fault.reason.split(":")[0]) for fault in report.faults] == [
        ("train", 20, "picture missing"),
        ("train", 21, "cut off"),
        ("train", 22, "empty annotation"),
        ("train", 23, "not a picture"),
        ("train", 24, "link not downloaded"),
        ("train", 25, "cut off"),
        ("valid", None, f"{folder}/valid.csv"),
        ("test", 20, "empty url"),
    ]
    assert not report.passed


def test_links_are_faults_only_after_the_download(folder: Path) -> None:
    linked = folder.parent / "links"
    for split in ("train", "valid", "test"):
        write_rows(linked / f"{split}.csv", [(LINK.format(split + c), "q", c) for c in "xyz"])
    report = run(linked, max_rejected=0)
    assert report.passed and report.links == {"train": 3, "valid": 3, "test": 3}
    for split in ("train", "valid", "test"):
        for c in "xy":
            save_whole_panorama(picture_file(LINK.format(split + c), linked), seed=1)
    report = run(linked, max_rejected=0.3)
    assert [(fault.row, fault.reason) for fault in report.faults] == [
        (2, "link not downloaded")
    ] * 3
    assert not report.passed and run(linked, max_rejected=0.34).passed


@pytest.mark.parametrize("allowed", [0.15, 1])
def test_a_split_without_a_good_row_never_passes(folder: Path, allowed: float) -> None:
    (folder / "valid.csv").write_text("url,query\nimages/valid_a.jpg,q\n")
    report = run(folder, allowed)
    assert report.shares() == {"train": 0, "valid": 1, "test": 0} and not report.passed
    write_rows(folder / "valid.csv", [("images/gone.jpg", "q", "a")])
    assert not run(folder, allowed).passed


def test_suspicions_are_listed_but_fail_nothing(folder: Path) -> None:
    one, other = (f"https://example.org/{side}/same.jpg" for side in (1, 2))
    save_whole_panorama(plain_file(one, folder), seed=9)
    rewrite(
        folder,
        "train",
        [
            ("images/train_a.jpg", "wether", "It rains."),
            ("images/train_a.jpg", "weather", "The sky is gray 0."),
            ("images/valid_a.jpg", "weather", "The sky is blue."),
            (one, "weather", "It snows."),
            (other, "weather", "It snows."),
        ],
    )
    report = run(folder, max_rejected=0)
    assert report.passed
    expected = (
        "query 'wether' (1 rows): is 'weather'",
        "train: row 21 repeats an earlier one",
        "1 pictures are in both train and valid",
        "2 links share the picture same.jpg",
    )
    assert len(report.suspicions) == len(expected)
    for text, start in zip(report.suspicions, expected, strict=True):
        assert text.startswith(start)


def test_pictures_that_may_be_no_panoramas_are_suspicions(folder: Path) -> None:
    """Each sign has one line, whose pictures the report has with all their signs."""
    for index in range(7):
        Image.fromarray(np.full((64, 128, 3), 30 * index, np.uint8)).save(
            folder / f"images/plain_{index}.png"
        )
    more = [(f"images/plain_{index}.png", "weather", f"Plain {index}.") for index in range(7)]
    rewrite(folder, "valid", more)
    report = run(folder, max_rejected=0)
    assert report.passed
    black, plain = report.suspicions
    expected = "1 pictures are black: images/plain_0.png (no pixel is brighter than 0 of 255)"
    assert black == expected
    assert plain.startswith("6 pictures are of one color: images/plain_1.png (its pixels differ by")
    assert plain.endswith("images/plain_5.png (its pixels differ by 0 of 255), and 1 more")
    assert list(report.signs) == [f"images/plain_{index}.png" for index in range(7)]
    assert list(report.signs["images/plain_0.png"]) == ["black"]


def test_a_picture_under_two_names_is_found_by_its_bytes(folder: Path) -> None:
    images = folder / "images"
    shutil.copy(images / "train_a.jpg", images / "copy.jpg")
    shutil.copy(images / "train_a.jpg", images / "more.jpg")
    shutil.copy(images / "train_b.jpg", images / "train_c.jpg")
    same_size = bytearray((images / "train_b.jpg").read_bytes())
    same_size[-30] ^= 1
    (images / "other.jpg").write_bytes(same_size)
    names = ("copy", "more", "other")
    rewrite(folder, "test", [(f"images/{name}.jpg", "q", f"It is a {name}.") for name in names])
    rewrite(folder, "train", [("images/train_c.jpg", "q", "It rains.")])
    start = "pairs of pictures have the same bytes under two names"
    assert [line for line in run(folder).suspicions if "bytes" in line] == [
        f"1 {start}, both in train, such as {images}/train_b.jpg and {images}/train_c.jpg",
        f"2 {start}, one in train and one in test, such as {images}/train_a.jpg and "
        f"{images}/copy.jpg",
        f"1 {start}, both in test, such as {images}/copy.jpg and {images}/more.jpg",
    ]


def test_a_query_that_most_rows_misspell_is_detected_from_the_annotations(folder: Path) -> None:
    texts = ["The architecture is gothic."] * 20
    write_rows(
        folder / "train.csv",
        [("images/train_a.jpg", "arthitecture", f"{text} {i}") for i, text in enumerate(texts)],
    )
    (suspicion,) = run(folder).suspicions
    assert "'arthitecture' in queries" in suspicion and "is 'architecture'" in suspicion


def test_odd_texts_and_spellings_of_urls_are_suspicions(folder: Path) -> None:
    name = "images/train_a.jpg"
    rewrite(
        folder,
        "train",
        [
            (name, "<image>\nwhat is this?", "A room ."),
            (name, " what? ", "A wall.\n"),
            (name, "what is left?", "A\u200b do\u00ador."),
            (name, "what is right?", "None"),
            (name, "what is it?", "n/a"),
            (name, "what else?", "Caf\ufffd"),
            (name, "what?", "\u200b\ufeff"),
            ("images\\TRAIN_A.jpg", "where?", "Here."),
            (name, "ما هذا؟ 🧭", "\u202bغرفة\u202c حمراء 👨\u200d👩\u200d👧 ☀\ufe0f"),
            (name, "\x1b[31mwhy?", "Red."),
        ],
    )
    report = run(folder, max_rejected=0.1)
    assert report.passed and [fault.reason for fault in report.faults] == [
        "empty annotation: only invisible characters"
    ]
    assert report.suspicions == [
        "1 query has spaces before or after the text: train, row 21",
        "1 query has invisible characters (U+001B, control character): train, row 29",
        "1 query has the text '<image>', which stands for no picture here: train, row 20",
        "1 annotation has spaces before or after the text: train, row 21",
        "2 annotations have invisible characters (U+200B, zero width space): train, row 22 is the "
        "first",
        "1 annotation has lost characters (U+FFFD): train, row 25",
        "2 annotations have only 'None', as programs write for an empty cell: train, row 23 is the "
        "first",
        "1 urls spell the name of their picture in another way, such as 'images\\TRAIN_A.jpg', "
        "found as train_a.jpg",
    ]


def test_links_with_long_last_parts_are_checked(folder: Path) -> None:
    for split in ("train", "valid", "test"):
        links = [f"https://example.org/{split}/{'a' * 300}.jpg?w={width}" for width in (1, 2)]
        rewrite(folder, split, [(link, "weather", f"It rains {link[-1]}.") for link in links])
    report = run(folder)
    assert [fault.reason for fault in report.faults] == 6 * ["link not downloaded"]
    assert not report.suspicions


def test_rows_only_opens_no_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "images/train_a.jpg").write_text("<html>")
    cli.main(["check", str(folder), "--rows-only", "--max-rejected", "0"])
    assert "passed; no picture was opened (--rows-only)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["check", str(folder), "--max-rejected", "0"])


def test_many_suspicions_are_cut_on_the_console_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}" * 4 for i in range(300)]
    rows = [("images/train_a.jpg", "weather", " ".join(words) + f" {row}") for row in range(20)]
    rows += [("images/train_a.jpg", f"{word[:-1]}X\ny", f"It {word}.") for word in words]
    write_rows(folder / "train.csv", rows)
    file = folder.parent / "report.json"
    cli.main(["check", str(folder), "--rows-only", "--json", str(file)])
    output = capsys.readouterr().err
    found = len(json.loads(file.read_text())["suspicions"])
    assert found > 250 and f"- and {found - 200} more: --json FILE has all of them" in output
    assert output.count("\n- ") == 201


def test_words_that_may_well_be_meant_are_not_suspicious(folder: Path) -> None:
    """Short words, plurals, and words or queries that are not rare enough."""
    annotations = [f"A sandy beach with buildings and a harbour {row}." for row in range(40)]
    rows = [("images/train_a.jpg", "weather", text) for text in annotations]
    rows += [("images/train_a.jpg", query, "It is gray.") for query in ("sand", "building")]
    rows += [("images/train_a.jpg", "harbor", f"The harbor {row}.") for row in range(4)]
    many = " ".join(["colour"] * 40)  # codespell:ignore colour
    rows.append(("images/train_a.jpg", "color", many))
    rows += [(LINK.format(f"{side}/same"), "weather", "It snows.") for side in (1, 2)]
    write_rows(folder / "train.csv", rows)
    assert not run(folder).suspicions


def test_the_command_writes_json_and_exits_with_status_1_for_too_many_faults(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(folder, "test", [("images/gone.jpg", "q", "a")])
    file = folder.parent / "out/report.json"
    command = ["check", str(folder), "--json", str(file)]
    cli.main(command)
    assert json.loads(file.read_text())["passed"] is True
    output = capsys.readouterr().err
    assert re.search(r"test +20  picture missing +images/gone\.jpg\n", output)
    assert re.search(r"test +21 +1 +4\.76% +2 +0\n", output)
    assert "data.max_rejected >= 0.0477" in output  # 1 of 21
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--max-rejected", "0.04"])
    assert stopped.value.code == 1
    report = json.loads(file.read_text())
    assert report["passed"] is False
    assert report["faults"] == [
        {"split": "test", "row": 20, "url": "images/gone.jpg", "reason": "picture missing"}
    ]


def test_a_missing_folder_is_an_error(folder: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main(["check", "no/such/folder"])
    (log,) = (folder.parent / "logs").glob("check_*.log")
    assert "no/such/folder: no such folder" in log.read_text()


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--workers", "0", "expected at least 1, found 0"),
        ("--max-rejected", "1.5", "expected at most 1, found 1.5"),
    ],
)
def test_an_invalid_option_is_an_error(
    folder: Path, option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", str(folder), option, value])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {option}: {expected}"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_the_published_data_passes_with_its_known_faults() -> None:
    report = check(SHARED / "quic360_full", Path(), 2, 0.15)
    assert report.passed
    assert [(fault.split, fault.row, fault.reason) for fault in report.faults] == [
        ("test", row, "empty annotation") for row in (2068, 3539, 4363)
    ]
    assert report.links == {"train": 3007, "valid": 400, "test": 393}
    assert [text.split(" (")[0] for text in report.suspicions] == [
        "'arthitecture' in queries and in 4 annotations: is 'architecture'",
        "115 annotations have spaces before or after the text: train, row 109 is the first",
        "test: row 2426 repeats an earlier one",
    ]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_the_small_real_data_passes_without_a_fault() -> None:
    report = check(SHARED / "quic360_mini", Path(), 2, 0)
    assert report.passed and not report.faults
    (tilted,) = report.suspicions
    assert tilted.startswith("1 pictures may be tilted") and "PosePitchDegrees is 2.2" in tilted
    assert report.pictures == {"train": 5, "valid": 1, "test": 2}
