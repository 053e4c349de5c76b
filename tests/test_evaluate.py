"""Promises about an evaluation: what it writes, on small real towers."""

import csv
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from helpers import save_language_model
from panollava import paths
from panollava.cli import main as cli
from panollava.config import load_settings
from panollava.data.batches import read_prepared_rows
from panollava.evaluation import evaluate
from panollava.model import generate
from panollava.model.weights import read_header
from panollava.stages import STAGES
from panollava.training.answer_objective import Objective

TEXTS = ["what\ris it", "where\r\nis it", "two\nlines", ' "quoted", twice ', "NA"]


@pytest.fixture
def trained(project: Path, small_data: Path) -> Path:
    """A project whose stages have run without epochs, with unusual texts in its test split. The
    language model's random weights are large, so that it answers in words."""
    save_language_model(Path("towers/language_model"), spread=0.2)
    shutil.copytree(small_data, "data")
    with Path("data/test.csv").open("a", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows(("images/test_0.jpg", text, text) for text in TEXTS)
    text = paths.PARAMS.read_text().replace(f"dir: {small_data}", "dir: data")
    text = re.sub(r"path: \S+language_model", "path: towers/language_model", text)
    text = text.replace("max_new_tokens: 48", "max_new_tokens: 6")
    paths.PARAMS.write_text(re.sub(r"epochs: \d+", "epochs: 0", text))
    cli.main(["train", "all"])
    return project


def test_an_evaluation_writes_answers_details_and_headline(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["evaluate"])
    output = capsys.readouterr().err
    rows = read_prepared_rows(paths.PREPARED / "test/rows.csv")
    predictions = pd.read_csv(paths.PREDICTIONS, keep_default_na=False)
    rolled = ["turned by 20", "turned by 45", "turned by 180"]
    first = ["panorama", "url", "query", "prediction", "swapped"]
    assert [*predictions] == [*first, *rolled, "references"]
    keys = list(dict.fromkeys(zip(rows["panorama"], rows["query"], strict=True)))
    assert list(zip(predictions["panorama"], predictions["query"], strict=True)) == keys
    references = dict(zip(predictions["query"], predictions["references"], strict=True))
    assert [json.loads(references[text]) for text in TEXTS] == [[text] for text in TEXTS]
    details = json.loads(paths.EVALUATION_DETAILS.read_text())
    assert details["captions"] == len(keys) and details["panoramas"] == 3
    for name in rolled:
        identical = (predictions["prediction"] == predictions[name]).mean()
        assert details["rotation"][name.removeprefix("turned by ")]["identical"] == identical
    metrics = json.loads(paths.EVALUATION.read_text())
    assert metrics["rouge_l"] == details["rouge_l"]
    assert re.search(rf"^rouge_l +{metrics['rouge_l']:.3f}$", output, re.MULTILINE), output


def test_the_prompt_of_the_training_is_the_one_of_the_evaluation(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "the red {query} box"
    paths.PARAMS.write_text(paths.PARAMS.read_text().replace('"{query}"', f'"{prompt}"'))
    asked: list[str] = []

    def answer(model, dialogue, features, queries, *arguments, **options):
        asked.extend(dialogue.tokenizer.decode(dialogue.query(q)) for qs in queries for q in qs)
        return generate.answer(model, dialogue, features, queries, *arguments, **options)

    monkeypatch.setattr(evaluate, "answer", answer)
    cli.main(["evaluate"])
    cli.main(["train", "finetune"])
    header = read_header(paths.weights_file("finetune"))
    assert header["settings"]["model"]["prompt"] == prompt
    settings = load_settings(paths.PARAMS)
    training = Objective(STAGES["finetune"], settings, weights=False)
    decode = training.dialogue.tokenizer.decode
    queries = read_prepared_rows(paths.PREPARED / "test/rows.csv")["query"]
    assert {decode(training.dialogue.query(query)) for query in queries} == set(asked)
    assert all("the red " in text and " box" in text for text in asked)


def test_one_panorama_has_no_grounding_gap(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("data/test.csv").read_text()
    Path("data/test.csv").write_text("\n".join(text.split("\n")[:2]))
    cli.main(["train", "all"])
    cli.main(["evaluate"])
    assert "only one panorama: skipping the grounding gap" in capsys.readouterr().err
    assert "swapped" not in pd.read_csv(paths.PREDICTIONS)
    assert "grounding_gap" not in json.loads(paths.EVALUATION.read_text())
