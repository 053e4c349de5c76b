"""Promises about an evaluation: what it writes, on small real towers."""

import csv
import json
import re
import shutil
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import change, run_stage, save_language_model
from panollava import paths
from panollava.cli import main as cli
from panollava.config import Settings, load_settings
from panollava.data.images import read_panorama, roll
from panollava.data.prepare import prepare_project
from panollava.evaluation.evaluate import evaluate
from panollava.files import read_prepared_rows
from panollava.geometry.views import Sampler, layout
from panollava.model import generate
from panollava.model.network import build_model
from panollava.model.weights import load_weights, read_header
from panollava.stages import STAGES
from panollava.training.answer_objective import Objective
from panollava.training.features import write_features

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
    limits = "batch_size: 4 # panoramas per batch\n  max_new_tokens: 48"
    assert limits in text
    text = text.replace(limits, "batch_size: 2\n  max_new_tokens: 6")
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
    rolled = [f"turned by {degrees}" for degrees in (20, 45, 90, 180, 270)]
    first = ["panorama", "url", "query", "prediction", "swapped"]
    scores = ["rouge_l", "cider_d"]
    assert [*predictions] == [*first, *rolled, "without picture", "references", *scores]
    keys = list(dict.fromkeys(zip(rows["panorama"], rows["query"], strict=True)))
    assert list(zip(predictions["panorama"], predictions["query"], strict=True)) == keys
    references = dict(zip(predictions["query"], predictions["references"], strict=True))
    assert [json.loads(references[text]) for text in TEXTS] == [[text] for text in TEXTS]
    details = json.loads(paths.EVALUATION_DETAILS.read_text())
    assert details["captions"] == len(keys) and details["panoramas"] == 3
    for name in rolled:
        identical = (predictions["prediction"] == predictions[name]).mean()
        assert details["rotation"][name.removeprefix("turned by ")]["identical"] == identical
    for name in scores:
        assert predictions[name].mean() == pytest.approx(details[name])
    by_query = pd.read_csv(paths.SCORES_BY_QUERY, keep_default_na=False).set_index("query")
    for query, asked in predictions.groupby("query"):
        assert by_query.loc[query, "panoramas"] == len(asked)
        assert by_query.loc[query, "cider_d"] == pytest.approx(asked["cider_d"].mean())
    metrics = json.loads(paths.EVALUATION.read_text())
    assert metrics["rouge_l"] == details["rouge_l"]
    assert re.search(rf"^rouge_l +{metrics['rouge_l']:.3f}$", output, re.MULTILINE), output


def test_our_answers_scored_like_another_model_s_have_the_scores_of_the_evaluation(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = cycle(["the blue box is left.", *TEXTS, "", "the red box is"])

    def speak(model: Any, dialogue: Any, features: Any, queries: Any, *_: Any) -> Any:
        return [[generate.Answer(next(answers), False) for _ in asked] for asked in queries]

    monkeypatch.setattr("panollava.model.panollava.answer", speak)
    cli.main(["evaluate"])
    cli.main(["score", str(paths.PREDICTIONS), "--json", "scores.json"])
    scores = json.loads(Path("scores.json").read_text())
    details = json.loads(paths.EVALUATION_DETAILS.read_text())
    assert details["rouge_l"] > 0 and details["cider_d"] > 0 and details["grounding_gap"]
    for name in ("no_picture", "rotation", "seam", "cut_answers"):  # these need the model
        del details[name]
    assert scores == {"theirs": details, "ours": details}


def test_the_prompt_of_the_training_is_the_one_of_the_evaluation(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "the red {query} box"
    paths.PARAMS.write_text(paths.PARAMS.read_text().replace('"{query}"', f'"{prompt}"'))
    asked: list[str] = []

    def answer(model, dialogue, features, queries, *arguments, **options):
        asked.extend(dialogue.tokenizer.decode(dialogue.query(q)) for qs in queries for q in qs)
        return generate.answer(model, dialogue, features, queries, *arguments, **options)

    monkeypatch.setattr("panollava.model.panollava.answer", answer)
    cli.main(["train", "resampler"])
    cli.main(["features"])
    cli.main(["train", "finetune"])
    cli.main(["evaluate"])
    header = read_header(paths.weights_file("finetune"))
    assert header["settings"]["model"]["prompt"] == prompt
    settings = load_settings(paths.PARAMS)
    training = Objective(STAGES["finetune"], settings, weights=False)
    decode = training.dialogue.tokenizer.decode
    queries = read_prepared_rows(paths.PREPARED / "test/rows.csv")["query"]
    assert {decode(training.dialogue.query(query)) for query in queries} == set(asked)
    assert all("the red " in text and " box" in text for text in asked)


def test_swapped_answers_are_looked_up_and_queries_without_a_picture_asked_once(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, list[list[str]]]] = []

    def record(model: Any, dialogue: Any, features: Any, queries: Any, *options: Any) -> Any:
        asked.append((features is None, queries))
        return generate.answer(model, dialogue, features, queries, *options)

    monkeypatch.setattr("panollava.model.panollava.answer", record)
    cli.main(["evaluate"])
    table = pd.read_csv(paths.PREDICTIONS, keep_default_na=False)
    queries = list(dict.fromkeys(table["query"]))
    with_picture = [texts for blind, batch in asked if not blind for texts in batch]
    assert sum(map(len, with_picture)) == 6 * len(table)  # the panoramas themselves and five rolls
    assert [text for blind, batch in asked if blind for texts in batch for text in texts] == queries
    assert all(len(batch) <= 2 for _, batch in asked)
    answers = {(row.panorama, row.query): row.prediction for row in table.itertuples()}
    shared = 0
    for query, rows in table.groupby("query"):
        assert rows["without picture"].nunique() == 1
        for panorama, swapped in zip(rows["panorama"], rows["swapped"], strict=True):
            others = {answers[p, query] for p in rows["panorama"] if p != panorama} or {""}
            assert swapped in others
        shared += len(rows) if len(rows) > 1 else 0
    gap = json.loads(paths.EVALUATION_DETAILS.read_text())["grounding_gap"]
    assert (gap["captions"], gap["left_out"]) == (shared, len(table) - shared) and shared > 3


def test_answers_that_were_cut_are_counted(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those to the panoramas themselves: all others are cut."""
    batches = iter(range(99))

    def cut_two(*arguments: Any) -> Any:
        itself = next(batches) < 2  # three panoramas are two batches
        queries, answers = arguments[3], generate.answer(*arguments)
        assert all(found.cut for texts in answers for found in texts), "it ends no answer"
        return [
            [
                found._replace(cut=not itself or query in TEXTS[:2])
                for query, found in zip(*pair, strict=True)
            ]
            for pair in zip(queries, answers, strict=True)
        ]

    monkeypatch.setattr("panollava.model.panollava.answer", cut_two)
    cli.main(["evaluate"])
    assert json.loads(paths.EVALUATION.read_text())["cut_answers"] == 2
    assert json.loads(paths.EVALUATION_DETAILS.read_text())["cut_answers"] == 2
    rows = len(pd.read_csv(paths.PREDICTIONS))
    message = f"2 of {rows} answers are cut at evaluate.max_new_tokens 6"
    assert message in capsys.readouterr().err


def test_one_panorama_has_no_grounding_gap(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("data/test.csv").read_text()
    Path("data/test.csv").write_text("\n".join(text.split("\n")[:2]))
    cli.main(["train", "all"])
    cli.main(["evaluate"])
    assert "asked of two panoramas: skipping the grounding gap" in capsys.readouterr().err
    assert set(pd.read_csv(paths.PREDICTIONS, keep_default_na=False)["swapped"]) == {""}
    assert "grounding_gap" not in json.loads(paths.EVALUATION.read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"views__pitch": 25.0},
        {"views__pitch": -60.0, "views__fov": 120.0},
        {"views__strategy": "sliding_window"},
        {"views__strategy": "cubemap"},
        {"views__global_view": True},
        {"model__tokens": "sphere"},
        {"model__tokens": "sphere", "views__pitch": 25.0},
        {"model__tokens": "sphere", "views__strategy": "cubemap"},
        {"model__tokens": "sphere", "views__global_view": True},
    ],
    ids=str,
)
def test_answers_to_a_roll_are_about_the_rolled_panorama(
    settings: Settings, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of answers, the mean features of each view (or of the cells at each yaw), against
    those of panoramas that are really rolled, sampled and encoded."""

    def means(features: torch.Tensor) -> list[list[float]]:
        """A view has 2 x 2 tokens, a yaw 4 cells."""
        return features.reshape(-1, 4, features.shape[-1]).mean(dim=1)[:, :4].tolist()

    def describe(model: Any, dialogue: Any, features: Any, queries: Any, *_: Any) -> Any:
        if features is None:  # without a picture
            return [[generate.Answer("", False)] * len(asked) for asked in queries]
        return [
            [generate.Answer(json.dumps(means(vision)), False)] * len(asked)
            for vision, asked in zip(features, queries, strict=True)
        ]

    rolls = [20.0, 45.0, -90.0, 200.0, 180.0, 270.0]
    settings = change(settings, evaluate__rolls=rolls, trainer__threads=1)
    settings = change(settings, **changes, **{f"stage__{name}__epochs": 0 for name in STAGES})
    prepare_project(settings)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    write_features(settings)
    run_stage("finetune", settings)
    monkeypatch.setattr("panollava.model.panollava.answer", describe)
    evaluate(settings)
    model, _ = build_model(settings.model, settings.views)
    stage = STAGES["finetune"]
    load_weights(paths.weights_file("finetune"), model, stage.saves, stage)
    sampler = Sampler(layout(settings.views), settings.views.size)
    for row in pd.read_csv(paths.PREDICTIONS).to_dict("records"):
        picture = Path(settings.data.dir) / row["url"]
        panorama = read_panorama(picture, sampler.panorama_width)
        for degrees in (0, *rolls):
            rolled = torch.from_numpy(sampler.sample(roll(panorama, degrees)))
            with torch.inference_mode():
                expected = means(model.eval().features(rolled[None])[0])
            answer = row[f"turned by {degrees:g}" if degrees else "prediction"]
            assert np.abs(np.array(json.loads(answer)) - expected).max() < 1e-3
