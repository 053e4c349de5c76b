"""Reads tables as programs write them: CSV with commas, semicolons or tabs, in UTF-8, or in UTF-16
with a byte order mark. Says what any other file is, and how to make a table of it."""

import codecs
import csv
import difflib
import io
import re
from pathlib import Path

from panollava.errors import UserError
from panollava.files import GIT_LFS_POINTER, is_git_lfs_pointer

_ALIASES = {"query": "instruction", "annotation": "response"}
_DELIMITERS = ",;\t"
_OTHER_DELIMITERS = "|:^~\x1f，；、"  # full-width ones too, as Chinese and Japanese keyboards write

_UNPACK = "unpack it first"
_EXPORT = "export it as CSV in UTF-8 from the program that wrote it"
_FORMATS: tuple[tuple[bytes, str, str], ...] = (  # how such a file starts, what it is, what to do
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"PK\x03\x04", "an Excel workbook (xlsx) or a zip archive", _EXPORT),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook (xls)", _EXPORT),
    (b"{\\rtf", "a document (RTF)", _EXPORT),
    (b"%PDF", "a PDF document", _EXPORT),
    (b"PAR1", "a Parquet file", _EXPORT),
    (b"ARROW1", "an Arrow file", _EXPORT),
    (b"SQLite format 3", "an SQLite database", _EXPORT),
    (codecs.BOM_UTF32_LE, "UTF-32 text", "save it as UTF-8: iconv -f UTF-32 -t UTF-8"),
    (codecs.BOM_UTF32_BE, "UTF-32 text", "save it as UTF-8: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xd8\xff", "a picture (JPEG)", "put a table there"),
    (b"\x89PNG", "a picture (PNG)", "put a table there"),
)
_HTML = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
# Encodings with what nearly all characters beyond ASCII are in their texts. The order matters: the
# bytes of one language are often valid, but odd, in another's encoding.
_ENCODINGS = (
    ("CP1252", "Western European Windows", "(?<![À-ÿ])[À-ÿ](?![À-ÿ])|[‘-”–—…°€]"),
    ("CP932", "Japanese Windows", "[ぁ-ヿ一-龠、。？]"),
    ("CP949", "Korean Windows", "[가-힣]"),
    ("CP1251", "Cyrillic Windows", "[а-яё]"),
    ("GB2312", "Chinese", "[一-龠、。，？！]"),
    ("BIG5", "Chinese of Taiwan", "[一-龠、。，？！]"),
)


def read_records(
    file: Path, columns: tuple[str, ...], if_missing: str
) -> tuple[list[str], dict[str, int], list[list[str]]]:
    """The header, the index of each of `columns` in it, and all other records, without blank lines.

    The header tells which of comma, semicolon and tab separates the columns. Spaces around a cell
    in quotation marks are dropped; other cells are unchanged.

    Raises:
        UserError: no file (the message ends in `if_missing`), not a table, no rows, or a missing
            column.
    """
    text = read_text(file, if_missing)
    if text.lstrip()[:1] in ("{", "["):
        raise UserError(
            f"{file}: JSON instead of a table; convert it: panollava convert-rows FILE.json OUT.csv"
        )
    delimiter = _delimiter(file, text, columns)
    # Strict: an open quotation mark would swallow all rows up to the next one.
    lines = io.StringIO(_without_spaces_around_quotes(text, delimiter), newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        records = [record for record in reader if record]
    except csv.Error as error:
        raise UserError(
            f"{file}: not a CSV file, at line {reader.line_num}: {error}; "
            "look for a missing or extra quotation mark above it"
        ) from None
    if len(records) < 2:
        raise UserError(f"{file}: no rows; expected a header {','.join(columns)} and rows")
    header = [title.strip() for title in records[0]]
    return header, _find_columns(file, header, columns), records[1:]


def read_text(file: Path, if_missing: str) -> str:
    """A file of UTF-8, or of UTF-16 with a byte order mark. Raises UserError: see read_records."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {if_missing}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if is_git_lfs_pointer(data):
        raise UserError(f"{file}: {GIT_LFS_POINTER}")
    if _HTML.match(data):
        raise UserError(
            f"{file}: a web page (HTML) instead of a table; download the file itself (on GitHub, "
            "the link 'Raw')"
        )
    for start, kind, remedy in _FORMATS:
        if data.startswith(start):
            raise UserError(f"{file}: {kind} instead of a table; {remedy}")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif codec := _utf16_without_mark(data):
        raise UserError(f"{file}: UTF-16 without a byte order mark; {_save_as_utf8(file, codec)}")
    else:
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(file, data, error)) from None
    if text.startswith("\ufeff"):
        raise UserError(
            f"{file}: starts with two byte order marks; remove them: "
            f"sed 's/\\xef\\xbb\\xbf//g' {file.name} > new.csv"
        )
    return text


def _utf16_without_mark(data: bytes) -> str | None:
    """A header in UTF-16 has a null byte before or after each letter."""
    start = data[:32]
    first, second = (start[place::2].count(0) * 2 / max(len(start), 1) for place in (0, 1))
    if second > 0.6 and first < 0.2:
        return "UTF-16LE"
    return "UTF-16BE" if first > 0.6 and second < 0.2 else None


def _not_utf8(file: Path, data: bytes, error: UnicodeDecodeError) -> str:
    if error.encoding != "utf-8":
        return f"{file}: broken UTF-16 ({error.reason} at byte {error.start}); get the file anew"
    line = data.count(b"\n", 0, error.start) + 1
    lenient = data.decode("utf-8", "replace")
    broken = lenient.count("\N{REPLACEMENT CHARACTER}")
    if sum(character > "\x7f" for character in lenient) > 2 * broken:
        return (
            f"{file}: UTF-8 with broken characters, the first at line {line} (byte {error.start}); "
            "correct them, or get the file anew"
        )
    for codec, name, letters in _ENCODINGS:
        try:
            text = data.decode(codec)
        except UnicodeDecodeError:
            continue
        if len(re.findall(letters, text)) >= 0.8 * len(re.findall(r"[^\0-\x7f]", text)):
            likely = f"not UTF-8 at line {line}, but probably {codec} ({name})"
            return f"{file}: {likely}; {_save_as_utf8(file, codec)}"
    return f"{file}: not UTF-8 at line {line} (byte {error.start}); save it as UTF-8"


def _save_as_utf8(file: Path, codec: str) -> str:
    return f"save it as UTF-8: iconv -f {codec} -t UTF-8 '{file.name}' > new.csv"


def _delimiter(file: Path, text: str, columns: tuple[str, ...]) -> str:
    """What separates the titles of the header line."""
    header = text.lstrip().splitlines()[0] if text.strip() else ""
    if re.match(r'"?sep=', header, re.IGNORECASE):
        raise UserError(f"{file}: line 1 is '{header[:20]}', which only Excel reads; delete it")
    known = {*columns, *(_ALIASES.get(name, name) for name in columns)}

    def titles(delimiter: str) -> int:
        return len(known & {title.strip(' "') for title in header.split(delimiter)})

    best = max(_DELIMITERS + _OTHER_DELIMITERS, key=titles)  # the first one if there are none
    if best in _OTHER_DELIMITERS and titles(best) > 1:
        raise UserError(
            f"{file}: columns are separated by {best!r}; use commas, semicolons or tabs"
        )
    return best if best in _DELIMITERS else ","


def _without_spaces_around_quotes(text: str, delimiter: str) -> str:
    """`a.jpg, "what?" , "a room."` as `a.jpg,"what?","a room."`: otherwise the quotation marks
    would be part of the cell."""
    if not re.search(rf'(^|[{delimiter}\r\n]) +"|" +([{delimiter}\r\n]|$)', text):
        return text
    # Each match takes in all of a quoted cell, so that none starts inside of one.
    cell = rf'(^|[{delimiter}\r\n]) *+("(?:[^"]++|"")*+") *+(?=[{delimiter}\r\n]|$)'
    return re.sub(cell, r"\1\2", text)


def _find_columns(file: Path, header: list[str], columns: tuple[str, ...]) -> dict[str, int]:
    places = {}
    for name in columns:
        names = [name, _ALIASES.get(name, name)]
        title = next((title for title in names if title in header), None)
        if title is None:
            by_lower = {title.lower(): title for title in header}
            near = [difflib.get_close_matches(known, by_lower, n=1) for known in names]
            hint = next((f" (is '{by_lower[match[0]]}' meant?)" for match in near if match), "")
            aliases = ",".join(_ALIASES.get(column, column) for column in columns)
            raise UserError(
                f"{file}: no column '{name}' among '{', '.join(header)[:200]}'{hint}; expected "
                f"{','.join(columns)} or {aliases}; rename the column"
            )
        if header.count(title) > 1:
            raise UserError(f"{file}: {header.count(title)} columns '{title}'; keep one")
        places[name] = header.index(title)
    return places
