"""A table is read as programs write it, or refused with what it is and how to save it."""

import codecs
import csv
import gzip
import io
from pathlib import Path

import pytest

from panollava.data.tables import read_records
from panollava.errors import UserError

COLUMNS = ("url", "query", "annotation")
HEADER = "url,query,annotation\n"
ROW = "a.jpg,what is this?,a room.\n"
CELLS = ["a.jpg", "what is this?", "a room."]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


def read(tmp_path: Path, data: str | bytes) -> list[list[str]]:
    file = tmp_path / "train.csv"
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    _, places, records = read_records(file, COLUMNS, "hint")
    return [[record[places[name]] for name in COLUMNS] for record in records]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("delimiter", list(",;\t"))
def test_encodings_and_delimiters_that_programs_write(
    tmp_path: Path, encoding: str, delimiter: str
) -> None:
    cells = [
        ["전경.jpg", 'He said "yes", twice', "a; b,\tc"],
        ["a.jpg", "what?", " two\r\nlines "],
        ["a.jpg", ',"', '" ,'],
    ]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([COLUMNS, *cells])
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    assert read(tmp_path, mark + text.getvalue().encode(encoding)) == cells


@pytest.mark.parametrize("delimiter", list(",;\t"))
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_spaces_around_quotation_marks_are_not_part_of_a_cell(
    tmp_path: Path, delimiter: str, ending: str
) -> None:
    lines = [
        'url, "query", annotation',
        'a.jpg, "what, "" , is; ""this""?" , "a room, and a box."',
        '  "a.jpg" ,unquoted , plain  ',
        'a.jpg,5" tall, 6" wide',
        'a.jpg, "", " inner "  ',
        'a.jpg,"1 , "" ","2"',
    ]
    text = ending.join(lines).replace(",", delimiter)
    expected = [
        ["a.jpg", 'what, " , is; "this"?', "a room, and a box."],
        ["a.jpg", "unquoted ", " plain  "],
        ["a.jpg", '5" tall', ' 6" wide'],
        ["a.jpg", "", " inner "],
        ["a.jpg", '1 , " ', "2"],
    ]
    assert read(tmp_path, text) == [
        [cell.replace(",", delimiter) for cell in cells] for cells in expected
    ]


def test_a_delimiter_is_told_by_the_header_not_by_the_texts(tmp_path: Path) -> None:
    assert read(tmp_path, "url;query;annotation\na.jpg;what, where, when?;a, b, c\n") == [
        ["a.jpg", "what, where, when?", "a, b, c"]
    ]
    notes = "url,query,annotation,a;b;c;d;e\na.jpg,q;r,a\tb,\n"
    assert read(tmp_path, notes) == [["a.jpg", "q;r", "a\tb"]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (POINTER, "a git-lfs pointer: run git lfs pull"),
        (
            gzip.compress((HEADER + ROW).encode(), mtime=0),
            "a gzip archive instead of a table; unpack it",
        ),
        (b"PK\x03\x04\x14\x00\x06\x00", r"an Excel workbook \(xlsx\) or a zip .*export it as CSV"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", r"an Excel workbook \(xls\).*export it"),
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"%PDF-1.7\n", "a PDF document"),
        ("<!DOCTYPE html>\n<html></html>\n", r"a web page \(HTML\).*download the file itself"),
        ("\n  <HTML><body>404</body></HTML>", r"a web page \(HTML\)"),
        ('[{"image": "a.jpg"}]', "JSON instead of a table; convert it: panollava convert-rows"),
        ('{"image": "a.jpg"}\n{"image": "b.jpg"}\n', "JSON instead of a table"),
        ((HEADER + ROW).encode("utf-16-le"), "UTF-16 without a byte.*iconv -f UTF-16LE -t UTF-8"),
        ((HEADER + ROW).encode("utf-16-be"), "UTF-16 without a byte.*iconv -f UTF-16BE"),
        ((HEADER + ROW).encode("utf-32"), "UTF-32 text.*iconv -f UTF-32"),
        ((HEADER + ROW).encode("utf-16")[:-1], "broken UTF-16"),
        (2 * codecs.BOM_UTF8 + (HEADER + ROW).encode(), "starts with two byte order marks"),
        (("\ufeff\ufeff" + HEADER).encode("utf-16-le"), "starts with two byte order marks"),
        ("sep=,\n" + HEADER + ROW, r"line 1 is 'sep=,', which only Excel reads; delete it"),
        ('"sep=;"\nurl;query;annotation\n', r"line 1 is '\"sep=;\"', which only Excel reads"),
        ((HEADER + ROW).replace(",", "|"), r"columns are separated by '\|'; use commas"),
        ((HEADER + ROW).replace(",", "，"), "columns are separated by '，'"),
        ("url query annotation\na.jpg q a\n", "no column 'url'"),
    ],
)
def test_another_file_is_refused_with_what_it_is(
    tmp_path: Path, data: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=rf"train\.csv: {message}") as error:
        read(tmp_path, data)
    assert len(str(error.value).split()) <= 35


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        ("cp949", "무엇입니까?,방입니다."),
        ("cp949", "날씨는 어떻습니까?,하늘이 맑고 나무가 많은 공원입니다."),
        ("cp1252", "what is this?,a café."),
        ("cp1252", "Und das?,Ein grüner Hügel – “schön”."),
        ("cp932", "これは何ですか?,赤い部屋です。"),
        ("cp1251", "Что это?,Красная комната и окно."),
        ("gb2312", "这是什么？,一个红色的房间，里面有一张桌子。"),
        ("cp1251", "где это,красный дом"),
        ("cp1252", "où?,“l’été” à la forêt"),
        ("big5", "這是什麼？,一個紅色的房間，裡面有一張桌子。"),
    ],
)
def test_a_table_in_another_encoding_is_refused_with_how_to_save_it_as_utf8(
    tmp_path: Path, codec: str, text: str
) -> None:
    expected = rf"not UTF-8 at line 3, but probably {codec} .*iconv -f {codec} -t UTF-8 'train.csv'"
    with pytest.raises(UserError, match=f"(?i){expected}"):
        read(tmp_path, (HEADER + ROW + f"a.jpg,{text}\n").encode(codec))


def test_a_broken_character_in_utf8_is_not_another_encoding(tmp_path: Path) -> None:
    data = (HEADER + "a.jpg,무엇입니까?,방입니다.\n" * 3).encode()
    with pytest.raises(UserError, match="UTF-8 with broken characters, the first at line 4"):
        read(tmp_path, data[:-10] + b"\xff" + data[-10:])


def test_an_open_quotation_mark_after_a_space_takes_a_moment_only(tmp_path: Path) -> None:
    text = HEADER + 'a.jpg, "open, ""a""\n' * 20_000 + 'a.jpg, "x", y\n'
    with pytest.raises(UserError, match="not a CSV file"):
        read(tmp_path, text + 'a.jpg,"open\n')
