"""`panollava ask` answers questions about panoramas."""

import io
import json
import shutil
from pathlib import Path

import pytest

from panollava import PanoLLaVA
from panollava.cli import main as cli
from panollava.data.dialogue import Dialogue
from panollava.errors import UserError
from panollava.model.generate import GREEDY, Sampling
from panollava.serving.ask import ask, split_arguments

RESULT = "runs/vlm_finetune"


@pytest.fixture
def in_project(shared_project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shared_project)
    return shared_project


def pictures(count: int) -> list[str]:
    return [f"small/data/images/test_{index}.jpg" for index in range(count)]


def test_the_command_prints_the_model_s_answers(
    in_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in in_project.rglob("*") if ".git" not in path.parts)
    files, questions = pictures(2), ["what", "the red box"]
    cli.main(["ask", files[0], questions[0], files[1], questions[1], "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = PanoLLaVA.from_pretrained(RESULT)
    expected = [
        {"panorama": file, "query": question, "answer": text, "cut": row["cut"]}
        for (file, (question, text)), row in zip(
            (
                (file, pair)
                for file in files
                for pair in zip(questions, model.answer(file, questions), strict=True)
            ),
            rows,
            strict=True,
        )
    ]
    assert rows == expected
    cli.main(["ask", files[0], questions[0]])
    assert capsys.readouterr().out == rows[0]["answer"] + "\n"
    cli.main(["ask", *files, questions[0]])
    lines = [files[0], rows[0]["answer"], files[1], rows[2]["answer"]]
    assert capsys.readouterr().out.splitlines() == lines
    # It needs no project, so it writes nothing.
    assert before == sorted(path for path in in_project.rglob("*") if ".git" not in path.parts)


def test_arguments_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jpg", "a.PNG", "notes.txt"):
        Path(name).write_bytes(b"")
    Path("folder").mkdir()
    shutil.copy("b.jpg", "folder/inside.jpg")
    shutil.copy("notes.txt", "folder")
    given = ["what?", "b.jpg", "folder", "a.PNG", "is it in a.b?", "x" * 5000, "notes.txt"]
    panoramas, questions = split_arguments(given)
    assert [*map(str, panoramas)] == ["b.jpg", "folder/inside.jpg", "a.PNG", "notes.txt"]
    assert questions == ["what?", "is it in a.b?", "x" * 5000]
    Path("empty").mkdir()
    for arguments, message in (
        (["c.jpg", "what?"], "c.jpg: no such picture"),
        (["what?"], "no panorama; expected: panollava ask"),
        (["b.jpg"], "no question; expected: panollava ask"),
        (["empty", "what?"], "empty: no pictures in this folder"),
    ):
        with pytest.raises(UserError, match=message):
            split_arguments(arguments)


def test_words_are_written_as_they_come(in_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.pieces: list[str] = []

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.pieces.append(text)
            return super().write(text)

    model = PanoLLaVA.from_pretrained(RESULT)
    monkeypatch.setattr(Dialogue, "decode", lambda self, tokens: " ".join(map(str, tokens)))
    monkeypatch.setattr(Dialogue, "whole_characters", lambda self, tokens: tokens)
    out, plain, file = Terminal(), io.StringIO(), Path(pictures(1)[0])
    ask(model, [file], ["what", "where"], 5, GREEDY, out=out)
    ask(model, [file], ["what", "where"], 5, GREEDY, out=plain)
    assert out.getvalue() == plain.getvalue()
    words = [piece.strip() for piece in out.pieces if piece.strip()]
    assert words == plain.getvalue().split() and len(words) > 4


def test_a_picture_that_is_no_panorama_is_an_error_after_the_others(
    in_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.jpg"
    wrong.write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["ask", str(wrong), pictures(1)[0], "what", "--json"])
    captured = capsys.readouterr()
    assert f"{wrong}: not a picture" in captured.err
    assert "1 of 2 panoramas could not be read" in str(stopped.value)
    (row,) = map(json.loads, captured.out.splitlines())
    assert row["panorama"] == pictures(1)[0]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "-1", "--temperature: expected a number from 0, found -1.0"),
        ("--top-p", "0", "--top-p: expected a number above 0, at most 1, found 0.0"),
        ("--max-new-tokens", "0", "--max-new-tokens: expected at least 1, found 0"),
        ("--seed", "-1", "--seed: expected from 0 to 4294967295, found -1"),
        ("--model", "nowhere", "nowhere: no such file"),
    ],
)
def test_wrong_options_are_errors(in_project: Path, option: str, value: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        cli.main(["ask", pictures(1)[0], "what", option, value])


def test_sampled_answers_follow_the_seed(in_project: Path) -> None:
    model = PanoLLaVA.from_pretrained(RESULT)
    file = pictures(1)[0]

    def sample(questions: list[str], **options: float) -> list[str]:
        return model.answer(file, questions, 8, Sampling(**options))  # type: ignore[arg-type]

    greedy = sample(["what"])
    assert sample(["what"], temperature=1e-6, seed=3) == greedy
    assert sample(["what"], temperature=9.0, top_p=1e-9, seed=3) == greedy
    (first,) = sample(["what"], temperature=2.0, seed=1)
    assert (first,) == tuple(sample(["what"], temperature=2.0, seed=1)) != tuple(greedy)
    assert len({*sample(["what"] * 8, temperature=2.0)}) > 4
    # Those beside it do not change it.
    assert sample(["where", "what"], temperature=2.0, seed=0)[1] == first
