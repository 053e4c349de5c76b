"""Every row of a CSV file is either read as it stands or set aside with its reason."""

import csv
from pathlib import Path

import pandas as pd
import pytest

from panollava.data.rows import find_picture, read_rows
from panollava.errors import UserError

SHARED = Path(__file__).parents[2] / "shared"
HEADER = "url,query,annotation\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with data/train.csv to be written, and pictures at several places."""
    for name in ("data/images/a.jpg", "data/b.jpg", "photos/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()  # what is in it is not looked at here
    return tmp_path


def read(folder: Path, text: str | bytes) -> tuple[pd.DataFrame, pd.DataFrame]:
    file = folder / "data" / "train.csv"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_rows(file, folder)


def test_rows_are_read_as_they_stand(folder: Path) -> None:
    rows, rejects = read(folder, HEADER + "b.jpg,weather,It rains.\nb.jpg,NA,null\n")
    assert list(rows) == ["row", "url", "query", "annotation", "picture"]
    assert rows.drop(columns="picture").values.tolist() == [
        [0, "b.jpg", "weather", "It rains."],
        [1, "b.jpg", "NA", "null"],
    ]
    assert list(rejects) == ["row", "url", "query", "annotation", "reason"]
    assert rejects.empty


def test_quotes_commas_and_line_breaks_stay_in_their_cells(folder: Path) -> None:
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


def test_instruction_and_response_are_query_and_annotation(folder: Path) -> None:
    rows, _ = read(folder, "url,instruction,response\nb.jpg,weather,It rains.\n")
    assert rows[["query", "annotation"]].values.tolist() == [["weather", "It rains."]]


def test_a_picture_is_found_wherever_its_url_may_point(folder: Path) -> None:
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
        assert find_picture(url, data, folder) == (folder / place).resolve(), url
    for url in ("", ".", "images", "d.jpg", "https://example.org/", "https://example.org/b.jpg"):
        assert find_picture(url, data, folder) is None, url


def test_the_csv_folder_comes_before_the_project(folder: Path) -> None:
    (folder / "b.jpg").touch()
    assert find_picture("b.jpg", folder / "data", folder) == (folder / "data/b.jpg").resolve()


def test_one_picture_under_several_names_is_one(folder: Path) -> None:
    names = ["b.jpg", "images/../b.jpg", "data/b.jpg", str(folder / "data" / "b.jpg")]
    rows, _ = read(folder, HEADER + "".join(f"{name},q,a\n" for name in names))
    assert len(set(rows["picture"])) == 1
    assert rows["url"].tolist() == names


def test_a_bad_row_is_set_aside_with_its_reason(folder: Path) -> None:
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
        + "b.jpg,q,an annotation, not quoted\n"
        + "b.jpg,q\n"
        + "\n"  # no row, and not counted
        + "b.jpg,q,good too\n",
    )
    assert rows["row"].tolist() == [0, 9]
    assert rows["annotation"].tolist() == ["good", "good too"]
    assert rejects[["row", "reason"]].values.tolist() == [
        [1, "empty annotation"],
        [2, "empty query"],
        [3, "empty url"],
        [4, "picture missing"],
        [5, "link not downloaded"],
        [6, "picture missing"],
        [7, "4 cells instead of 3"],
        [8, "2 cells instead of 3"],
    ]
    assert rejects["url"][3] == "gone.jpg"


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
        ('url\tquery\tannotation\nb.jpg\tq\t"a" b\n', r"its columns are separated by tabs; exp"),
        ("url;query;annotation\nb.jpg;q;a\n", r"no column 'url' among 'url;query;annotation'"),
        (
            "b.jpg,q,a\nb.jpg,q,a\n",
            r"no column 'url'.*url,query,annotation or url,instruction,resp",
        ),
        ("url,query,query,annotation\nb.jpg,q,q,a\n", r"2 columns 'query'; keep one"),
        ("", r"empty; expected a header url,query,annotation"),
        ("\n\n", r"empty; expected a header"),
        (HEADER, r"a header without rows"),
        (HEADER + 'b.jpg,q,"open\nb.jpg,q,a\n', r"not a CSV file, at line 3.*quotation mark"),
        (HEADER + 'b.jpg,q,"a" b\n', r"not a CSV file, at line 2.*quotation mark"),
        (HEADER.encode() + b"b.jpg,q,caf\xe9\n", r"not a CSV file in UTF-8.*at byte \d+; save it"),
        (HEADER.encode("utf-16"), r"not a CSV file in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(folder: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"data/train\.csv: {message}"):
        read(folder, text)


def test_a_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data/valid\.csv: no such file; data\.dir must hold"):
        read_rows(folder / "data" / "valid.csv", folder)
    with pytest.raises(UserError, match=r"data: can't be read"):
        read_rows(folder / "data", folder)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data isn't here")
@pytest.mark.parametrize(
    ("split", "total", "links", "empty"),
    [("train", 9459, 3007, []), ("valid", 1251, 400, []), ("test", 6246, 393, [2068, 3539, 4363])],
)
def test_all_rows_of_the_published_data_are_read(
    split: str, total: int, links: int, empty: list[int]
) -> None:
    """Without the pictures, all are rejected, each for its reason."""
    rows, rejects = read_rows(SHARED / "quic360_full" / f"{split}.csv", Path())
    assert rows.empty
    assert rejects["row"].tolist() == list(range(total))
    assert rejects["url"].nunique() == links
    assert rejects.groupby("reason")["row"].size().to_dict() == {
        "link not downloaded": total - len(empty)
    } | ({"empty annotation": len(empty)} if empty else {})
    assert rejects[rejects["reason"] == "empty annotation"]["row"].tolist() == empty


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data isn't here")
@pytest.mark.parametrize(
    ("split", "total", "pictures"), [("train", 87, 5), ("valid", 18, 1), ("test", 33, 2)]
)
def test_all_rows_of_the_small_real_data_are_good(split: str, total: int, pictures: int) -> None:
    rows, rejects = read_rows(SHARED / "quic360_mini" / f"{split}.csv", Path())
    assert (len(rows), len(rejects), rows["picture"].nunique()) == (total, 0, pictures)
