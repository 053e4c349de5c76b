"""`check --look` writes one self-contained page for a person to look through."""

import html.parser
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import save_whole_panorama, write_rows
from panollava.cli import main as cli
from panollava.data.check import check
from panollava.data.overview import Lengths, write_overview

NONE = Lengths(None, {}, "no tokenizer")


class Page(html.parser.HTMLParser):
    """All text, the pictures' sources, and every address that a browser would fetch."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.images, self.addresses = list[str](), list[str]()
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.images += [value or "" for name, value in attrs if tag == "img" and name == "src"]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def section(page: Page, start: str, end: str) -> str:
    return page.text.split(start, 1)[1].split(end, 1)[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two panoramas per split; train's second is in valid too, and test's are equal files."""
    monkeypatch.chdir(tmp_path)
    for seed, split in enumerate(("train", "valid", "test")):
        for name in "ab":
            path = tmp_path / f"data/images/{split}_{name}.jpg"
            save_whole_panorama(path, seed=2 * seed + ord(name))
        rows = [(f"images/{split}_{name}.jpg", "weather", f"It is {name}.") for name in "ab"]
        if split == "valid":
            rows.append(("images/train_b.jpg", "weather", "It rains."))
        write_rows(tmp_path / f"data/{split}.csv", rows)
    (tmp_path / "data/images/test_b.jpg").write_bytes(
        (tmp_path / "data/images/test_a.jpg").read_bytes()
    )
    return tmp_path / "data"


def look(folder: Path, lengths: Lengths = NONE) -> Page:
    return Page(write(folder, lengths))


def write(folder: Path, lengths: Lengths = NONE) -> Path:
    report = check(folder, folder.parent, 2, 1.0)
    report.signs["images/train_a.jpg"] = {"stereo": "its halves are alike"}
    write_overview(folder.parent / "look.html", folder, folder.parent, report, lengths, 2)
    return folder.parent / "look.html"


def test_the_page_shows_suspects_with_what_is_suspected_and_samples(folder: Path) -> None:
    page = look(folder)
    suspects = section(page, "Suspect pictures", "Samples of the other pictures")
    assert "images/train_a.jpg stereo: its halves are alike" in suspects
    assert "images/train_b.jpg in train and in valid" in suspects
    assert "images/test_a.jpg the same bytes as test_b.jpg" in suspects
    assert "images/test_b.jpg the same bytes as test_a.jpg" in suspects
    samples = section(page, "Samples of the other pictures", "Rows per query")
    assert "images/valid_a.jpg valid 0: weather It is a." in samples
    assert "train" not in samples and "test" not in samples
    assert len(page.images) == 6 and len(set(page.images)) == 5
    assert "1 pictures are in both train and valid" in section(page, "Suspicions", "Suspect")
    assert "7 weather" in section(page, "Rows per query", "Text lengths")
    assert "Not counted. no tokenizer" in page.text


def test_the_page_fetches_nothing_and_is_the_same_each_time(folder: Path) -> None:
    page = look(folder)
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert "script" not in page.tags and "url(" not in page.source and "@import" not in page.source
    assert look(folder).source == page.source


def test_texts_and_names_of_the_data_are_escaped(folder: Path) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }} \x1b[31m'
    name = "<b onload=x>'\".jpg"
    save_whole_panorama(folder / "images" / name, seed=3)
    rows = [(f"images/{name}", evil, evil), (f"images/{evil}", "weather", "It rains.")]
    write_rows(folder / "train.csv", rows)
    page = look(folder)
    assert "script" not in page.tags and "b" in page.tags  # the page's own <b>
    assert evil.replace("\x1b", "\\x1b") in page.text and "\x1b" not in page.source
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert f"images/{name} train 0" in page.text


def test_broken_pictures_and_files_are_shown_as_faults(folder: Path) -> None:
    (folder / "images/train_a.jpg").write_bytes(b"\xff\xd8\xff broken")
    (folder / "valid.csv").write_text("<html>")
    page = look(folder)
    suspects = section(page, "Suspect pictures", "Samples of the other pictures")
    assert re.search(r"not shown images/train_a\.jpg .*picture", suspects)
    faults = page.text.split("Faults")[-1]
    assert "a web page (HTML)" in faults and "train 0" in faults


def test_text_lengths_are_compared_with_each_stage(folder: Path) -> None:
    lengths = Lengths(lambda query, text: len(query) + len(text), {"resampler": 14, "finetune": 15})
    write_rows(folder / "train.csv", [("images/train_a.jpg", "q", "a" * n) for n in range(10, 20)])
    text = look(folder, lengths).text
    assert "of 10 rows of train: median 15, 95% at most 19, longest 20." in text
    assert "resampler 14 6 60.0% finetune 15 5 50.0%" in text


def test_the_page_stays_below_15_mb(folder: Path) -> None:
    """Noise is the largest picture, and quotation marks are the largest text."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(290):
        noise = rng.integers(0, 256, (160, 320, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"images/{number}.jpg", quality=95)
        rows += [(f"images/{number}.jpg", '"' * 500, "<&>" * 500)] * 4
    write_rows(folder / "train.csv", rows)
    write_rows(folder / "valid.csv", rows)  # all are suspects
    page = write(folder).read_bytes()
    assert 9e6 < len(page) < 15e6
    assert 150 < page.count(b"<img") < 290 and b"not shown" in page


def test_the_command_counts_tokens_with_the_projects_tokenizer(
    project: Path, small_data: Path
) -> None:
    cli.main(["check", str(small_data), "--look", "look.html", "--max-rejected", "1"])
    lengths = Page(Path("look.html")).text.split("Text lengths")[1]
    assert re.search(r"rows of train: median \d+, .*vision \d+ .*resampler \d+ .*finetune", lengths)


def test_without_a_project_the_page_says_that_lengths_are_missing(folder: Path) -> None:
    cli.main(["check", "data", "--look", "out/look.html", "--rows-only"])
    assert "Not counted. params.yaml" in Page(Path("out/look.html")).text
