"""Promises about metrics: the headline is small, complete and taken from the details."""

from dataclasses import replace
from typing import Any

import pytest

from panollava.demo.questions import QUERIES, answer
from panollava.demo.scenes import DIRECTIONS, Scene, make_scene
from panollava.evaluation.captions import score
from panollava.evaluation.confidence import interval_of_mean
from panollava.evaluation.facts import FactReader, Key, find_reader
from panollava.evaluation.grounding import swapped_answers
from panollava.evaluation.metrics import compute_details, headline, rolled_name

ROLLS = [20.0, 45.0, 180.0]
SCENES = [make_scene(2, index) for index in range(12)]


def texts(scenes: list[Scene], template: int = 0) -> dict[Key, str]:
    return {
        (index, query): answer(scene, topic, template)
        for index, scene in enumerate(scenes)
        for topic, query in QUERIES.items()
    }


def opposite(scene: Scene) -> Scene:
    """The scene rolled by 180 degrees."""
    objects = (
        replace(item, direction=DIRECTIONS[(DIRECTIONS.index(item.direction) + 2) % 4])
        for item in scene.objects
        if item.direction
    )
    return replace(scene, objects=tuple(objects))


REFERENCES = {
    key: [text, other]
    for (key, text), other in zip(texts(SCENES).items(), texts(SCENES, 1).values(), strict=True)
}
ANSWERS = {
    "prediction": texts(SCENES),
    "without picture": texts([SCENES[0]] * len(SCENES)),
    **{rolled_name(degrees): texts(SCENES) for degrees in ROLLS[:2]},
    rolled_name(180): texts([opposite(scene) for scene in SCENES]),
}


def measure(
    reader: FactReader | None, answers: dict[str, dict[Key, str]] = ANSWERS, rolls: Any = ROLLS
) -> tuple[dict[str, Any], dict[str, Any]]:
    details = compute_details(answers, REFERENCES, rolls, reader)
    return details, headline(details, reader)


def leaves(metrics: dict[str, Any]) -> list[Any]:
    return [
        leaf
        for value in metrics.values()
        for leaf in (leaves(value) if isinstance(value, dict) else [value])
    ]


def test_the_headline_of_the_demo_fits_on_one_screen() -> None:
    _, metrics = measure(find_reader("demo"))
    assert all(type(leaf) is float for leaf in leaves(metrics)) and len(leaves(metrics)) == 13
    assert metrics.keys() == {
        "bleu_4", "rouge_l", "cider_d", "grounding_gap", "rotation", "seam", "facts"
    }  # fmt: skip
    assert metrics["rotation"] == {"stays": 1, "turns": 1} and metrics["seam"] == 0
    assert set(metrics["facts"].values()) == {1}


def test_facts_that_others_contain_are_no_headline_numbers() -> None:
    details, metrics = measure(find_reader("demo"))
    assert details["facts"].keys() - metrics["facts"].keys() == {"colors"}
    assert [*metrics["facts"]] == [*find_reader("demo").headline]


def test_the_headline_is_taken_from_the_details() -> None:
    details, metrics = measure(find_reader("demo"))
    assert metrics["rouge_l"] == details["rouge_l"]
    assert details["grounding_gap"]["headline"] == "cider_d"
    difference = details["cider_d"] - details["swapped"]["cider_d"]
    assert metrics["grounding_gap"] == details["grounding_gap"]["cider_d"]
    assert metrics["grounding_gap"] == pytest.approx(difference) and difference > 0
    assert details["facts"]["around"]["f1"] == 1 > details["swapped"]["facts"]["around"]["f1"]
    assert details["rotation"].keys() == {"20", "45", "180"}
    assert details["rotation"]["180"]["identical"] < details["rotation"]["45"]["identical"] == 1


def test_the_swapped_answers_are_those_of_other_panoramas() -> None:
    """Their scores are the means over the draws, and their facts are pooled over them."""
    details, _ = measure(find_reader("demo"))
    swaps = swapped_answers(ANSWERS["prediction"])
    scores = [score(swapped, REFERENCES) for swapped in swaps]
    for name in ("bleu_4", "rouge_l", "cider_d"):
        values = [draw.values[name] for draw in scores]
        assert len(set(values)) == 5
        assert details["swapped"][name] == pytest.approx(sum(values) / 5)
    assert details["swapped"]["rouge_l"] < 0.9 * details["rouge_l"]
    reader = find_reader("demo")
    reference = reader.read_all(ANSWERS["prediction"])
    correct = sum(
        len(reader.read_all(swapped)[panorama] & {f for f in facts if f[0] == "scene"})
        for swapped in swaps
        for panorama, facts in reference.items()
    )
    scene = details["swapped"]["facts"]["scene"]
    assert scene["f1"] == pytest.approx(correct / (5 * len(SCENES)))
    assert scene["low"] < scene["f1"] < scene["high"] and scene["facts"] == len(SCENES)


def test_the_gap_is_measured_on_the_queries_that_several_panoramas_were_asked() -> None:
    """The scores of the others do not enter it."""
    alone = {(0, "who?"): "a red cat.", (1, "why?"): "nothing at all in a hall."}
    answers = {name: {**texts, **alone} for name, texts in ANSWERS.items()}
    references = {**REFERENCES, **{key: ["it was the blue one behind"] for key in alone}}
    details = compute_details(answers, references, ROLLS, find_reader("demo"))
    shared, _ = measure(find_reader("demo"))
    gap = details["grounding_gap"]
    assert (gap["queries"], gap["captions"], gap["left_out"]) == (9, len(REFERENCES), 2)
    assert gap == {**shared["grounding_gap"], "left_out": 2}
    assert details["swapped"] == shared["swapped"]
    assert details["captions"] == len(REFERENCES) + 2
    assert details["cider_d"] - details["swapped"]["cider_d"] != gap["cider_d"]


def test_the_interval_of_the_gap_is_that_of_means_over_the_draws() -> None:
    details, _ = measure(None)
    own = score(ANSWERS["prediction"], REFERENCES).each["rouge_l"]
    swaps = [score(s, REFERENCES).each["rouge_l"] for s in swapped_answers(ANSWERS["prediction"])]
    drops = {key: value - sum(swap[key] for swap in swaps) / 5 for key, value in own.items()}
    expected = interval_of_mean(drops)
    assert details["grounding_gap"]["interval"]["rouge_l"] == pytest.approx(expected)


def test_without_shared_queries_there_is_no_gap(caplog: pytest.LogCaptureFixture) -> None:
    answers = {(0, "what?"): "a red ball.", (1, "where?"): "on the left."}
    references = {key: [text] for key, text in answers.items()}
    details = compute_details({"prediction": answers}, references, [], None)
    assert not {"grounding_gap", "swapped"} & (details.keys() | headline(details, None).keys())
    assert "no query was asked of two panoramas: skipping the grounding gap" in caplog.text


def test_the_answers_without_a_picture_are_scored_like_the_others() -> None:
    details, metrics = measure(find_reader("demo"))
    scores = score(ANSWERS["without picture"], REFERENCES).values
    for name in ("bleu_4", "rouge_l", "cider_d"):
        assert details["no_picture"][name] == scores[name] < details[name]
    kinds = [scene.kind for scene in SCENES]
    assert details["no_picture"]["facts"]["scene"]["f1"] == kinds.count(kinds[0]) / len(kinds)
    assert "no_picture" not in metrics


def test_cut_answers_are_a_headline_number_even_if_there_are_none() -> None:
    details, _ = measure(None)
    assert headline({**details, "cut_answers": 0}, None)["cut_answers"] == 0


def test_warnings_about_answers_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    wordless = {**REFERENCES, (0, QUERIES["count"]): ["..."]}
    silent = {**ANSWERS["prediction"], (1, QUERIES["count"]): "?"}
    compute_details({**ANSWERS, "prediction": silent}, wordless, ROLLS, None)
    assert len(caplog.messages) == 2, caplog.messages


def test_rotation_is_the_mean_over_angles() -> None:
    shifted = texts([replace(scene, kind=SCENES[0].kind) for scene in SCENES])
    details, metrics = measure(find_reader("demo"), {**ANSWERS, rolled_name(45): shifted})
    values = [angle["stays"]["f1"] for angle in details["rotation"].values()]
    assert values[0] == values[2] == 1 > values[1]
    assert metrics["rotation"]["stays"] == pytest.approx(sum(values) / 3)


def test_without_a_fact_reader_rotation_is_agreement() -> None:
    details, metrics = measure(None)
    values = [angle["rouge_l"] for angle in details["rotation"].values()]
    assert metrics["rotation"] == {"rouge_l": pytest.approx(sum(values) / 3)}
    assert not {"facts", "seam"} & (metrics.keys() | details.keys())


def test_without_cider_the_grounding_gap_is_that_of_rouge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("panollava.evaluation.captions._documents_differ", lambda _: False)
    details, metrics = measure(None)
    assert details["grounding_gap"]["headline"] == "rouge_l" and "cider_d" not in metrics
    difference = details["rouge_l"] - details["swapped"]["rouge_l"]
    assert metrics["grounding_gap"] == pytest.approx(difference)


def test_what_cannot_be_computed_is_left_out() -> None:
    details, metrics = measure(find_reader("demo"), {"prediction": ANSWERS["prediction"]}, rolls=[])
    assert not {"no_picture", "rotation"} & (metrics.keys() | details.keys())
    silent = dict.fromkeys(REFERENCES, "")
    details, metrics = measure(None, {"prediction": silent}, rolls=[])
    assert metrics == {} and details["captions"] == len(REFERENCES)
    assert details["grounding_gap"]["headline"] is None
