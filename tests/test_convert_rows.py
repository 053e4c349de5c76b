"""LLaVA's JSON becomes rows; what is not one question about one picture is rejected and counted."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from panollava.cli import main as cli
from panollava.data.convert_rows import convert_rows
from panollava.data.tables import read_records
from panollava.errors import UserError


def entry(query: Any, answer: Any, image: Any = "a.jpg", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": query}, {"from": "gpt", "value": answer}]
    return {"id": "7", "image": image, "conversations": turns, **more}


def save(folder: Path, entries: list[Any], lines: bool = False) -> Path:
    file = folder / "llava.json"
    texts = [json.dumps(each, ensure_ascii=True) for each in entries]
    file.write_text("\n".join(texts) if lines else json.dumps(entries))
    return file


def read(file: Path) -> list[list[str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.reader(lines))[1:]


GOOD = [
    entry("<image>\nWhat is this?", "A room."),
    entry("What is this?\n<image>", ' A room,\n"blue". '),
    entry("Where is <image> this?", "전경 🧭", image=["b c.jpg"]),
    entry("What?", "A room."),
    {
        "images": "https://example.org/a.jpg",
        "messages": [
            {"role": "user", "content": "<image>What?"},
            {"role": "assistant", "content": "A room."},
        ],
    },
]
ROWS = [
    ["a.jpg", "What is this?", "A room."],
    ["a.jpg", "What is this?", ' A room,\n"blue". '],
    ["b c.jpg", "Where is this?", "전경 🧭"],
    ["a.jpg", "What?", "A room."],
    ["https://example.org/a.jpg", "What?", "A room."],
]
TURNS = entry("<image>\nWhat?", "A room.")["conversations"]
BAD = {
    "several turns": entry("", "", conversations=TURNS + TURNS),
    "several pictures": entry("<image><image>\nWhich?", "Both."),
    "no picture": entry("What is love?", "A feeling.", image=None),
    "a video": entry("<video>\nWhat?", "A room.", image="", video="a.mp4"),
    "no conversations": {"image": "a.jpg", "text": "A room."},
    "no answer": entry("", "", conversations=TURNS[:1]),
    "an answer before its question": entry("", "", conversations=TURNS[::-1]),
    "a turn of neither human nor gpt": entry(
        "", "", conversations=[{"from": "system", "value": "Be brief."}, *TURNS]
    ),
    "a turn without a text": entry(["<image>", "What?"], "A room."),
    "<image> in the answer": entry("What?", "<image>"),
    "empty query": entry("<image>\n", "A room."),
    "empty annotation": entry("What?", "\u200b"),
    "a picture that is no file name": entry("What?", "A room.", image={"bytes": "AA=="}),
    "annotation with half a character": entry("What?", "A room \ud83d."),
    "not a JSON object": ["What?", "A room."],
}


@pytest.mark.parametrize("lines", [False, True])
def test_good_entries_are_rows_and_bad_ones_are_listed(
    tmp_path: Path, lines: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    several = entry("<image>\nWhich?", "Both.", image=["a.jpg", "b.jpg"])
    save(tmp_path, [*GOOD, *BAD.values(), several], lines)
    cli.main(["convert-rows", "llava.json", "out/train.csv"])
    assert read(tmp_path / "out/train.csv") == ROWS
    expected = [*BAD, "several pictures"]
    rejects = read(tmp_path / "out/train.rejects.csv")
    assert [(int(number), reason) for number, _, reason in rejects] == [
        (len(ROWS) + place, reason) for place, reason in enumerate(expected)
    ]
    assert rejects[0][1] == "7"
    output = capsys.readouterr().err
    assert (
        f"{len(expected)} entries rejected, see out/train.rejects.csv: 2 x several pict" in output
    )
    assert f"5 of {5 + len(expected)} entries are rows of out/train.csv" in output
    _, _, records = read_records(tmp_path / "out/train.csv", ("url", "query", "annotation"), "")
    assert records == ROWS


def test_without_rejects_there_is_no_file_of_them(tmp_path: Path) -> None:
    convert_rows(save(tmp_path, GOOD), tmp_path / "train.csv")
    assert {file.name for file in tmp_path.iterdir()} == {"llava.json", "train.csv"}


@pytest.mark.parametrize("name", ["train.csv", "train.rejects.csv"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}: exists already"):
        convert_rows(save(tmp_path, [*GOOD, *BAD.values()]), tmp_path / "train.csv")
    assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_line_of_jsonl_is_rejected(tmp_path: Path) -> None:
    file = save(tmp_path, GOOD, lines=True)
    file.write_text(file.read_text()[:-10] + "\r\n\n" + json.dumps(GOOD[0]))
    convert_rows(file, tmp_path / "train.csv")
    assert read(tmp_path / "train.csv") == [*ROWS[:-1], ROWS[0]]
    assert read(tmp_path / "train.rejects.csv") == [["4", "", "not a JSON object"]]


def test_json_of_windows_programs_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(GOOD, ensure_ascii=False), encoding="utf-16")
    convert_rows(tmp_path / "a.json", tmp_path / "train.csv")
    assert read(tmp_path / "train.csv") == ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; name a file in LLaVA's JSON"),
        ("", "empty; expected LLaVA's JSON or JSONL"),
        ("[]", "none of 0 entries can be a row"),
        ('[{"image": "a.jpg"},', "not JSON at line 1, column 21: .*get the file anew"),
        ("[" * 100_000, "nested too deeply"),
        ("url,query,annotation\n", "not JSON at line 1, column 1"),
        ('{"a": 1}\n{"b": 2}', "none of 2 entries can be a row: 2 x no conversations"),
        ('"text"', "none of 1 entries can be a row: 1 x not a JSON object"),
        ("<!DOCTYPE html><html></html>", "a web page"),
    ],
)
def test_another_file_is_an_error_and_writes_nothing(
    tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "llava.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=rf"llava\.json: {message}"):
        convert_rows(file, tmp_path / "train.csv")
    assert [*tmp_path.iterdir()] == [file] * (text is not None)
