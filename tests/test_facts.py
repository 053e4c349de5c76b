"""Promises about facts: they rotate with the panorama, and F1 has an interval."""

from dataclasses import replace

import pytest

from panollava.demo.questions import QUERIES, answer
from panollava.demo.scenes import DIRECTIONS, Scene, make_scene
from panollava.evaluation.facts import PanoramaFacts, compare, find_reader, rotation, seam

READER = find_reader("demo")


def rolled(scene: Scene, quarters: int) -> Scene:
    return replace(
        scene,
        objects=tuple(
            replace(o, direction=DIRECTIONS[(DIRECTIONS.index(o.direction) + quarters) % 4])
            for o in scene.objects
        ),
    )


def stated(scenes: list[Scene], template: int = 0) -> PanoramaFacts:
    texts = {
        (index, query): answer(scene, topic, template)
        for index, scene in enumerate(scenes)
        for topic, query in QUERIES.items()
    }
    return READER.read_all(texts)


SCENES = [make_scene(1, index) for index in range(40)]


@pytest.mark.parametrize("quarters", [0, 1, 2, 3, 5, -1])
def test_facts_roll_with_the_scene(quarters: int) -> None:
    expected = stated([rolled(scene, quarters) for scene in SCENES], template=1)
    assert READER.roll(stated(SCENES), 90.0 * quarters) == expected


def test_f1_falls_with_missing_and_with_wrong_facts() -> None:
    def facts(*words: str) -> PanoramaFacts:
        return {0: {("colors", (word,)) for word in words}}

    result = compare([facts("red", "blue")], facts("red", "green", "yellow"))
    assert result["colors"]["f1"] == 2 * 1 / (2 + 3) and result["colors"]["facts"] == 3


def test_the_interval_of_a_rare_fact_leaves_out_resamples_without_it() -> None:
    nothing: PanoramaFacts = {index: set() for index in range(100)}
    rare: PanoramaFacts = {**nothing, 3: {("colors", ("red",))}}
    assert compare([nothing], rare)["colors"] == {"f1": 0, "low": 0, "high": 0, "facts": 1}


def test_answers_without_facts_have_no_consistency() -> None:
    nothing: PanoramaFacts = {index: set() for index in range(10)}
    none = {"f1": None, "low": None, "high": None, "facts": 0}
    assert rotation(READER, nothing, nothing, 45) == {"stays": none}


def test_a_roll_between_directions_keeps_only_undirected_kinds() -> None:
    rolled_facts = READER.roll(stated(SCENES), 45)
    kinds = {kind for facts in rolled_facts.values() for kind, _ in facts}
    assert kinds == {"scene", "colors", "count"}


def test_directed_facts_must_roll_with_the_panorama_to_be_consistent() -> None:
    original = stated(SCENES)
    correct = stated([rolled(scene, 1) for scene in SCENES])
    good = rotation(READER, original, correct, 90)
    assert good["turns"]["f1"] == good["stays"]["f1"] == 1
    between = rotation(READER, original, original, 45)
    assert between["stays"]["f1"] == 1 and "turns" not in between
    blind = rotation(READER, original, original, 90)
    # No two objects of a scene have the same color.
    assert blind["stays"]["f1"] == 1 and blind["turns"]["f1"] == 0
    half = {index: (original if index % 2 else correct)[index] for index in original}
    turns = rotation(READER, original, half, 90)["turns"]
    assert 0.3 < turns["low"] < turns["f1"] < turns["high"] < 0.7


def test_the_seam_gap_is_found_at_the_seam_only() -> None:
    """A model that never mentions what is behind has a gap of 1. One that never mentions what is
    on the left has no gap at the seam."""
    by_roll = {90.0 * q: stated([rolled(scene, q) for scene in SCENES]) for q in range(4)}
    perfect = seam(READER, stated(SCENES), by_roll)
    assert perfect["gap"]["value"] == 0 and perfect["at_seam"]["f1"] == 1
    assert perfect["rolls"] == [0, 90, 180, 270]
    assert seam(READER, stated(SCENES), {**by_roll, 20.0: stated(SCENES)}) == perfect
    # Over the four rolls, every object is at the seam once and elsewhere three times.
    assert perfect["elsewhere"]["facts"] == 3 * perfect["at_seam"]["facts"]

    def without(direction: str) -> dict[float, PanoramaFacts]:
        return {
            degrees: {
                panorama: {(kind, fact) for kind, fact in facts if direction not in fact}
                for panorama, facts in predicted.items()
            }
            for degrees, predicted in by_roll.items()
        }

    behind = seam(READER, stated(SCENES), without("behind"))
    assert behind["gap"]["value"] == behind["gap"]["low"] == 1
    left = seam(READER, stated(SCENES), without("left"))
    assert left["at_seam"]["f1"] == 1 and left["gap"]["high"] < 0


def test_f1_is_computed_by_kind() -> None:
    wrong = "desert" if SCENES[0].kind != "desert" else "hall"
    predicted = stated([replace(SCENES[0], kind=wrong), *SCENES[1:]])
    result = compare([predicted], stated(SCENES))
    assert result["scene"]["f1"] == 39 / 40 and result["scene"]["facts"] == 40
    assert {kind for kind, score in result.items() if score["f1"] < 1} == {"scene"}
