"""Promises about metrics: the headline is small, complete and taken from the details."""

from dataclasses import replace
from typing import Any

import pytest

from panollava.demo.questions import QUERIES, answer
from panollava.demo.scenes import DIRECTIONS, Scene, make_scene
from panollava.evaluation.facts import FactReader, Key, find_reader
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
    "swapped": texts(SCENES[6:] + SCENES[:6]),
    **{rolled_name(degrees): texts(SCENES) for degrees in ROLLS[:2]},
    rolled_name(180): texts([opposite(scene) for scene in SCENES]),
}


def measure(
    reader: FactReader | None, answers: dict[str, dict[Key, str]] = ANSWERS, rolls: Any = ROLLS
) -> tuple[dict[str, Any], dict[str, Any]]:
    details = compute_details(answers, REFERENCES, rolls, reader)
    return details, headline(details)


def leaves(metrics: dict[str, Any]) -> list[Any]:
    return [
        leaf
        for value in metrics.values()
        for leaf in (leaves(value) if isinstance(value, dict) else [value])
    ]


def test_the_headline_of_the_demo_fits_on_one_screen() -> None:
    _, metrics = measure(find_reader("demo"))
    assert all(type(leaf) is float for leaf in leaves(metrics)) and len(leaves(metrics)) <= 16
    assert metrics.keys() == {
        "bleu_4", "rouge_l", "cider_d", "grounding_gap", "rotation", "seam", "facts"
    }  # fmt: skip
    assert metrics["rotation"] == {"stays": 1, "turns": 1} and metrics["seam"] == 0
    assert len(metrics["facts"]) == 7 and set(metrics["facts"].values()) == {1}


def test_the_headline_is_taken_from_the_details() -> None:
    details, metrics = measure(find_reader("demo"))
    assert metrics["rouge_l"] == details["rouge_l"]
    assert details["grounding_gap"]["headline"] == "cider_d"
    difference = details["cider_d"] - details["swapped"]["cider_d"]
    assert metrics["grounding_gap"] == details["grounding_gap"]["cider_d"] == difference > 0
    assert details["facts"]["around"]["f1"] == 1 > details["swapped"]["facts"]["around"]["f1"]
    assert details["rotation"].keys() == {"20", "45", "180"}
    assert details["rotation"]["180"]["identical"] < details["rotation"]["45"]["identical"] == 1


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
    assert metrics["grounding_gap"] == details["rouge_l"] - details["swapped"]["rouge_l"]


def test_what_cannot_be_computed_is_left_out() -> None:
    prediction = {"prediction": ANSWERS["prediction"]}
    details, metrics = measure(find_reader("demo"), prediction, rolls=[])
    assert not {"grounding_gap", "swapped", "rotation"} & (metrics.keys() | details.keys())
    silent = dict.fromkeys(REFERENCES, "")
    details, metrics = measure(None, {"prediction": silent, "swapped": silent}, rolls=[])
    assert metrics == {} and details["captions"] == len(REFERENCES)
    assert details["grounding_gap"]["headline"] is None
