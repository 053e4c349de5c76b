"""Every row of a CSV file is either read unchanged or rejected with its reason."""

import csv
import errno
import os
from pathlib import Path

import pandas as pd
import pytest

from helpers import SHARED
from panollava.data.images import PictureError
from panollava.data.picture_paths import PictureFinder, picture_file, plain_file
from panollava.data.rows import read_rows
from panollava.errors import UserError

HEADER = "url,query,annotation\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with empty picture files at several places, for a data/train.csv."""
    for name in ("data/images/a.jpg", "data/b.jpg", "photos/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()  # no test here opens it
    return tmp_path


def read(folder: Path, text: str | bytes) -> tuple[pd.DataFrame, pd.DataFrame]:
    file = folder / "data" / "train.csv"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_rows(file, folder)


def test_texts_are_read_unchanged(folder: Path) -> None:
    rows, rejects = read(folder, HEADER + "b.jpg,weather,It rains.\nb.jpg,NA,null\n")
    assert list(rows) == ["row", "url", "query", "annotation", "picture"]
    assert rows.drop(columns="picture").values.tolist() == [
        [0, "b.jpg", "weather", "It rains."],
        [1, "b.jpg", "NA", "null"],
    ]
    assert list(rejects) == ["row", "url", "query", "annotation", "kind", "reason"]
    assert rejects.empty


def test_cells_may_contain_quotes_commas_and_line_breaks(folder: Path) -> None:
    cells = ['He said "yes", twice', "two\nlines", "two\r\nDOS lines", " spaces ", "ünï 全景 🏔"]
    file = folder / "data" / "train.csv"
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows(
            [("url", "query", "annotation"), *(("b.jpg", "q", c) for c in cells)]
        )
    rows, _ = read_rows(file, folder)
    assert rows["annotation"].tolist() == cells
    assert rows["row"].tolist() == [0, 1, 2, 3, 4]


def test_other_columns_and_a_byte_order_mark_are_ignored(folder: Path) -> None:
    text = "\ufeffannotation,id,url,split,query\nIt rains.,7,b.jpg,train,weather\n"
    rows, _ = read(folder, text)
    assert rows[["url", "query", "annotation"]].values.tolist() == [
        ["b.jpg", "weather", "It rains."]
    ]


def test_instruction_and_response_mean_query_and_annotation(folder: Path) -> None:
    rows, _ = read(folder, "url,instruction,response\nb.jpg,weather,It rains.\n")
    assert rows[["query", "annotation"]].values.tolist() == [["weather", "It rains."]]


def test_a_url_is_a_path_from_either_folder_or_a_link(folder: Path) -> None:
    data = folder / "data"
    for url, place in [
        ("b.jpg", "data/b.jpg"),
        ("images/a.jpg", "data/images/a.jpg"),
        ("photos/c.jpg", "photos/c.jpg"),
        ("data/b.jpg", "data/b.jpg"),
        (str(folder / "photos" / "c.jpg"), "photos/c.jpg"),
        ("https://example.org/1/2/a.jpg", "data/images/a.jpg"),
        ("https://example.org/a.jpg?size=k#top", "data/images/a.jpg"),
        ("http://example.org/a.jpg", "data/images/a.jpg"),
    ]:
        assert PictureFinder(data, folder).find(url) == (folder / place).resolve(), url
    for url in ("", ".", "images", "d.jpg", "https://example.org/", "https://example.org/b.jpg"):
        kind = "link not downloaded" if url.startswith("https") else "picture missing"
        with pytest.raises(PictureError, match=f"{kind}$"):
            PictureFinder(data, folder).find(url)


def test_the_folder_of_the_csv_file_takes_precedence_over_the_project(folder: Path) -> None:
    (folder / "b.jpg").touch()
    assert PictureFinder(folder / "data", folder).find("b.jpg") == (folder / "data/b.jpg").resolve()


def test_a_downloaded_picture_takes_precedence_over_one_that_links_may_share(folder: Path) -> None:
    link = "https://example.org/a.jpg"
    downloaded = picture_file(link, folder / "data")
    assert plain_file(link, folder / "data").exists()
    downloaded.touch()
    assert PictureFinder(folder / "data", folder).find(link) == downloaded.resolve()


def test_the_file_of_a_link_has_a_short_name_of_its_own() -> None:
    long = "x" * 300
    links = [f"https://example.org/{place}/{long}.jpg" for place in (1, 2)]
    names = {picture_file(link, Path()).name for link in links}
    assert len(names) == 2
    assert all(len(name) < 150 and name.endswith(".jpg") for name in names)


def test_different_paths_to_one_picture_are_one_picture(folder: Path) -> None:
    names = ["b.jpg", "images/../b.jpg", "data/b.jpg", str(folder / "data" / "b.jpg")]
    rows, _ = read(folder, HEADER + "".join(f"{name},q,a\n" for name in names))
    assert len(set(rows["picture"])) == 1
    assert rows["url"].tolist() == names


def test_a_bad_row_is_rejected_with_its_reason(folder: Path) -> None:
    long = "an annotation among the urls " * 20  # too long for a file name
    rows, rejects = read(
        folder,
        HEADER
        + "b.jpg,q,good\n"
        + "b.jpg,q,\n"
        + "b.jpg,  ,a\n"
        + ",q,a\n"
        + "gone.jpg,q,a\n"
        + "https://example.org/gone.jpg,q,a\n"
        + f"{long},q,a\n"
        + "b.jpg,q,\u200b\ufeff\u3164\n"
        + "b.jpg,q,an annotation, not quoted\n"
        + "b.jpg,q\n"
        + "\n"  # a blank line is not a row
        + "b.jpg,q,good too\n",
    )
    assert rows["row"].tolist() == [0, 10]
    assert rows["annotation"].tolist() == ["good", "good too"]
    assert rejects[["row", "reason"]].values.tolist() == [
        [1, "empty annotation"],
        [2, "empty query"],
        [3, "empty url"],
        [4, "picture missing"],
        [5, "link not downloaded"],
        [6, "picture missing"],
        [7, "empty annotation: only invisible characters"],
        [8, "4 cells instead of 3"],
        [9, "2 cells instead of 3"],
    ]
    assert rejects["url"][3] == "gone.jpg"
    assert rejects["kind"].tolist() == [text.split(":")[0] for text in rejects["reason"]]


@pytest.mark.parametrize("link", [False, True])
def test_a_picture_in_a_folder_without_search_permission_is_not_reported_as_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    url = "https://example.org/a.jpg" if link else "images/a.jpg"
    stat = Path.stat

    def denied(path: Path, **options: bool) -> os.stat_result:
        if path.parent == folder / "data/images":  # root may search any folder
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", denied)
    rows, rejects = read(folder, HEADER + f"{url},q,a\nb.jpg,q,a\n")
    assert rows["url"].tolist() == ["b.jpg"]
    assert rejects[["row", "kind", "reason"]].values.tolist() == [
        [0, "picture cannot be read", "picture cannot be read: Permission denied"]
    ]
    with pytest.raises(PictureError, match=r"data/images/a.*: picture cannot be read: Permission"):
        PictureFinder(folder / "data", folder).find(url)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("url,query,anotation\nb.jpg,q,a\n", r"no column 'annotation'.*is 'anotation' meant\?"),
        (
            "url,query,text\nb.jpg,q,a\n",
            r"no column 'annotation' among 'url, query, text'; expected",
        ),
        ("URL,query,annotation\nb.jpg,q,a\n", r"no column 'url'.*is 'URL' meant\?"),
        ("url,instructon,response\nb.jpg,q,a\n", r"no column 'query'.*is 'instructon' meant\?"),
        ('url\tquery\tannotation\nb.jpg\tq\t"a" b\n', r"not a CSV file, at line 2.*quotation"),
        (
            "b.jpg,q,a\nb.jpg,q,a\n",
            r"no column 'url'.*url,query,annotation or url,instruction,resp",
        ),
        ("url,query,query,annotation\nb.jpg,q,q,a\n", r"2 columns 'query'; keep one"),
        ("", r"no rows; expected a header url,query,annotation and rows"),
        ("\n\n", r"no rows; expected a header"),
        (HEADER, r"no rows; expected a header"),
        (HEADER + 'b.jpg,q,"open\nb.jpg,q,a\n', r"not a CSV file, at line 3.*quotation mark"),
        (HEADER + 'b.jpg,q,"a" b\n', r"not a CSV file, at line 2.*quotation mark"),
        (HEADER.encode() + b"b.jpg,q,caf\xe9\n", r"not UTF-8 at line 2, but probably CP1252"),
    ],
)
def test_a_file_in_another_format_is_an_error(
    folder: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=rf"data/train\.csv: {message}"):
        read(folder, text)


def test_a_missing_file_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data/valid\.csv: no such file; data\.dir must contain"):
        read_rows(folder / "data" / "valid.csv", folder)
    with pytest.raises(UserError, match=r"data: cannot be read"):
        read_rows(folder / "data", folder)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize(
    ("split", "total", "links", "empty"),
    [("train", 9459, 3007, []), ("valid", 1251, 400, []), ("test", 6246, 393, [2068, 3539, 4363])],
)
def test_every_row_of_the_published_data_is_read(
    split: str, total: int, links: int, empty: list[int]
) -> None:
    """Without pictures, all are rejected, each with its reason."""
    rows, rejects = read_rows(SHARED / "quic360_full" / f"{split}.csv", Path())
    assert rows.empty
    assert rejects["row"].tolist() == list(range(total))
    assert rejects["url"].nunique() == links
    assert rejects.groupby("reason")["row"].size().to_dict() == {
        "link not downloaded": total - len(empty)
    } | ({"empty annotation": len(empty)} if empty else {})
    assert rejects[rejects["reason"] == "empty annotation"]["row"].tolist() == empty


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize(
    ("split", "total", "pictures"), [("train", 87, 5), ("valid", 18, 1), ("test", 33, 2)]
)
def test_all_rows_of_the_small_real_data_are_good(split: str, total: int, pictures: int) -> None:
    rows, rejects = read_rows(SHARED / "quic360_mini" / f"{split}.csv", Path())
    assert (len(rows), len(rejects), rows["picture"].nunique()) == (total, 0, pictures)
