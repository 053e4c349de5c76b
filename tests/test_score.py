"""Promises about scoring another model's answers, on small prepared rows of the demo."""

import csv
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from helpers import ROOT
from panollava import paths
from panollava.cli import main as cli
from panollava.demo.questions import QUERIES, answer
from panollava.demo.scenes import make_scene
from panollava.evaluation.facts import find_reader
from panollava.evaluation.metrics import (
    NO_PICTURE,
    compute_details,
    group_references,
    rolled_name,
)
from panollava.files import read_prepared_rows, write_csv

Row = tuple[str, str, str]  # url, query, prediction

SCENES = [make_scene(2, index) for index in range(6)]
FILE = Path("theirs.csv")
HEADER = ("url", "query", "prediction")
KEYS = [(index, topic) for index in range(len(SCENES)) for topic in QUERIES]


def predictions(template: int, first_scene: int = 0) -> list[Row]:
    """Correct answers, but panorama 0 is described as the panorama `first_scene`."""
    return [
        (
            f"images/{index}.jpg",
            QUERIES[topic],
            answer(SCENES[index or first_scene], topic, template),
        )
        for index, topic in KEYS
    ]


THEIRS, OURS = predictions(2, first_scene=1), predictions(1)
URL, QUERY, TEXT = THEIRS[0]


@pytest.fixture(autouse=True)
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the demo's parameters and two references for each query of the test split. The
    second one describes another panorama, because facts are those of the first one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", paths.PARAMS)
    table = [
        (index, row, f"images/{index}.jpg", QUERIES[topic], answer(SCENES[index - row], topic, row))
        for index, topic in KEYS
        for row in (0, 1)
    ]
    write_rows(table)


def write_rows(table: list[tuple[int, int, str, str, str]]) -> None:
    columns = ["panorama", "row", "url", "query", "annotation"]
    write_csv(paths.PREPARED / "test/rows.csv", pd.DataFrame(table, columns=columns))


def write(rows: list[Row], file: Path = FILE, header: tuple[str, ...] = HEADER) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows([header, *rows])


def score(rows: list[Row] = THEIRS) -> dict[str, dict[str, Any]]:
    """What the command writes for a file of these rows."""
    write(rows)
    cli.main(["score", str(FILE), "--json", "scores.json"])
    return json.loads(Path("scores.json").read_text())


def error(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["score", str(FILE)])
    assert end.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_scores_equal_those_of_pycocoevalcap() -> None:
    def joined(text: str) -> str:  # these texts need no better tokenizer
        return " ".join(re.findall("[a-z]+", text))

    rows = pd.read_csv(paths.PREPARED / "test/rows.csv")
    targets = {
        key: [joined(text) for text in texts]
        for key, texts in rows.groupby(["url", "query"], sort=False)["annotation"]
    }
    outputs = {(url, query): [joined(text)] for url, query, text in THEIRS}
    theirs = score()["theirs"]
    bleu, _ = Bleu(4).compute_score(targets, outputs, verbose=0)
    assert [theirs[f"bleu_{order}"] for order in (1, 2, 3, 4)] == bleu
    assert theirs["rouge_l"] == Rouge().compute_score(targets, outputs)[0]
    assert theirs["cider_d"] == Cider().compute_score(targets, outputs)[0]
    assert 0.1 < theirs["bleu_4"] < theirs["rouge_l"] < 1 and theirs["captions"] == len(KEYS)


def test_facts_and_the_grounding_gap_are_scored_too() -> None:
    write(OURS, paths.PREDICTIONS)
    scores = score()
    assert scores["ours"]["facts"]["scene"]["f1"] == 1
    assert SCENES[0].kind != SCENES[1].kind
    assert scores["theirs"]["facts"]["scene"]["f1"] == pytest.approx(5 / 6)
    for details in scores.values():
        gap = details["cider_d"] - details["swapped"]["cider_d"]
        assert details["grounding_gap"]["cider_d"] == pytest.approx(gap) and gap > 0.5
        assert details["interval"]["cider_d"].keys() == {"low", "high"}


def test_scores_equal_those_that_an_evaluation_writes() -> None:
    """With rolls and answers without a picture, whose scores are left out."""
    texts = {
        (index, QUERIES[topic]): row[2] for (index, topic), row in zip(KEYS, THEIRS, strict=True)
    }
    blind = dict.fromkeys(texts, "a red ball.")
    answers = {"prediction": texts, NO_PICTURE: blind, rolled_name(90): texts}
    references = group_references(read_prepared_rows(paths.PREPARED / "test/rows.csv"))
    details = compute_details(answers, references, [90], find_reader("demo"))
    for name in ("no_picture", "rotation", "seam"):
        del details[name]
    assert len(details["facts"]) > 5 and score()["theirs"] == details


def test_what_answers_alone_do_not_tell_is_left_out() -> None:
    assert not {"rotation", "seam", "no_picture", "cut_answers"} & score()["theirs"].keys()


def test_facts_are_scored_only_if_there_is_a_reader() -> None:
    text = paths.PARAMS.read_text()
    assert "facts: demo" in text
    paths.PARAMS.write_text(text.replace("facts: demo", "facts: null"))
    theirs = score()["theirs"]
    assert "facts" not in theirs and "facts" not in theirs["swapped"]


def test_both_stand_beside_each_other_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    write(OURS, paths.PREDICTIONS)
    scores = score()
    output = capsys.readouterr().err
    assert re.search("^ +theirs +ours$", output, re.MULTILINE), output
    for name in ("bleu_4", "rouge_l", "cider_d"):
        both = rf"{scores['theirs'][name]:.3f} +{scores['ours'][name]:.3f}"
        assert re.search(rf"^{name} +{both}$", output, re.MULTILINE), output
    assert re.search(r"^facts\.scene +0\.833 +1\.000$", output, re.MULTILINE), output
    assert re.search(r"^grounding_gap( +\d\.\d{3}){2}$", output, re.MULTILINE), output


@pytest.mark.parametrize("ours", [None, OURS[:-1]], ids=["none", "of other rows"])
def test_without_answers_of_ours_only_theirs_are_scored(
    ours: list[Row] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if ours is not None:
        write(ours, paths.PREDICTIONS)
    assert score().keys() == {"theirs"}
    output = capsys.readouterr().err
    assert f"warning: scoring theirs only; {paths.PREDICTIONS}: " in output
    assert re.search("^ +theirs$", output, re.MULTILINE) and "facts.scene" in output


def test_the_order_of_the_rows_and_further_columns_change_nothing() -> None:
    expected = score()
    shuffled = [(text, "more", query, url) for url, query, text in THEIRS]
    random.Random(0).shuffle(shuffled)
    with FILE.open("w", newline="", encoding="utf-8-sig") as lines:
        csv.writer(lines).writerows([("prediction", "more", "query", "url"), *shuffled])
    cli.main(["score", str(FILE), "--json", "scores.json"])
    assert json.loads(Path("scores.json").read_text()) == expected


def test_a_panorama_of_two_addresses_is_one_panorama() -> None:
    """As in the evaluation, which asks it each query once and names one address."""
    expected = score()
    rows = pd.read_csv(paths.PREPARED / "test/rows.csv")
    rows.loc[::2, "url"] = "https://a.b/" + rows.loc[::2, "url"]
    write_rows([*rows.itertuples(index=False, name=None)])
    assert score() == expected
    other = [(f"https://a.b/{url}", query, text) for url, query, text in THEIRS]
    assert score(other) == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (THEIRS[40:], f"40 of 54 answers are missing, the first: {URL}, '{QUERY}'"),
        (
            [*THEIRS, ("no.jpg", QUERY, TEXT), (URL, "what\nnow?", TEXT)],
            f"2 of 56 rows are unknown, the first: row 54 (no.jpg, '{QUERY}')",
        ),
        ([*THEIRS, (URL, "what\nnow?", TEXT)], rf"row 54 ({URL}, 'what\nnow?')"),
        (
            [*THEIRS, THEIRS[3], THEIRS[0], THEIRS[3]],
            "3 of 57 rows repeat a panorama and query, the first: "
            f"row 54 ({URL}, '{THEIRS[3][1]}')",
        ),
        (
            [THEIRS[0], (URL, THEIRS[1][1], "a red", " box"), (URL,), *THEIRS[3:]],
            f"2 of 54 rows do not have 3 cells, the first: row 1 ({URL}, '{THEIRS[1][1]}')",
        ),
        ([("", "", "")], "1 of 1 rows are unknown, the first: row 0 (, '')"),
        ([], "no rows; expected a header url,query,prediction and rows"),
    ],
    ids=["missing", "unknown", "unknown query", "repeated", "cells", "nothing", "no rows"],
)
def test_a_fault_of_rows_names_the_file_a_count_and_the_first(
    rows: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(rows)
    last = error(capsys)
    assert last.startswith(f"error: {FILE}: ") and message in last
    if rows:
        end = "; expected one row for each url and query of runs/prepared/test/rows.csv"
        assert last.endswith(end)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; expected a CSV file with columns url,query,prediction"),
        (b"", "no rows; expected a header url,query,prediction and rows"),
        (b"\n\n", "no rows; expected a header url,query,prediction and rows"),
        (
            b"url,query,predicton\na,b,c\n",
            "no column 'prediction' among 'url, query, predicton' (is 'predicton' meant?); "
            "expected url,query,prediction or url,instruction,prediction; rename the column",
        ),
        (b"query,prediction\nb,c\n", "no column 'url' among 'query, prediction'; expected"),
        (b"url,query,query,prediction\na,b,b,c\n", "2 columns 'query'; keep one"),
        (b"url,query,prediction\na,b,caf\xe9\n", "not UTF-8 at line 2, but probably CP1252"),
        (b'url,query,prediction\na,b,"c\n', "not a CSV file, at line 2: "),
        (b"url|query|prediction\na|b|c\n", "columns are separated by '|'; use commas"),
    ],
    ids=["none", "empty", "blank", "column", "url", "twice", "latin-1", "quotation mark", "pipes"],
)
def test_a_file_that_cannot_be_read_is_an_error(
    content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        FILE.write_bytes(content)
    last = error(capsys)
    assert last.startswith(f"error: {FILE}: ") and message in last


def test_without_prepared_rows_it_says_what_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    write(THEIRS)
    (paths.PREPARED / "test/rows.csv").unlink()
    assert "test/rows.csv: no such file; run: dvc repro prepare" in error(capsys)


def test_empty_predictions_are_counted_in_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    full = score()["theirs"]
    rows = [(url, query, "" if i < 3 else text) for i, (url, query, text) in enumerate(THEIRS)]
    scores = score(rows)["theirs"]
    assert scores["captions"] == len(KEYS) and scores["rouge_l"] < full["rouge_l"]
    assert f"warning: 3 of {len(KEYS)} predictions contain no words" in capsys.readouterr().err


def test_a_file_without_any_answer_has_no_scores(capsys: pytest.CaptureFixture[str]) -> None:
    write(OURS, paths.PREDICTIONS)
    scores = score([(url, query, " ") for url, query, _ in THEIRS])
    assert "cider_d" not in scores["theirs"] and scores["ours"]["cider_d"] > 1
    output = capsys.readouterr().err
    assert "warning: no prediction contains a word" in output and "nan" not in output
    assert re.search(rf"^cider_d +{scores['ours']['cider_d']:.3f}$", output, re.MULTILINE)


def test_torch_is_not_imported() -> None:
    write(THEIRS)
    code = (
        "import sys\nfrom panollava.cli.main import main\n"
        f"main(['score', '{FILE}'])\nassert 'torch' not in sys.modules"
    )
    environment = {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
