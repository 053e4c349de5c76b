"""Promises about facts: they turn as the panorama does, and are counted with an interval."""

from dataclasses import replace

import pytest

from panollava.demo.questions import QUERIES, answer, spell
from panollava.demo.scenes import DIRECTIONS, Scene, make_scene
from panollava.errors import UserError
from panollava.evaluation.facts import FactsOf, compare, find_reader, rotation, seam

READER = find_reader("demo")


def turned(scene: Scene, quarters: int) -> Scene:
    return replace(
        scene,
        objects=tuple(
            replace(o, direction=DIRECTIONS[(DIRECTIONS.index(o.direction) + quarters) % 4])
            for o in scene.objects
        ),
    )


def stated(scenes: list[Scene], template: int = 0) -> FactsOf:
    texts = {
        (index, spell(query)): spell(answer(scene, topic, template))
        for index, scene in enumerate(scenes)
        for topic, query in QUERIES.items()
    }
    return READER.of_panoramas(texts, texts)


SCENES = [make_scene(1, index) for index in range(40)]


@pytest.mark.parametrize("quarters", [0, 1, 2, 3, 5, -1])
def test_facts_turn_as_the_scene_does(quarters: int) -> None:
    expected = stated([turned(scene, quarters) for scene in SCENES], template=1)
    assert READER.turn(stated(SCENES), 90.0 * quarters) == expected


def test_the_interval_of_a_rare_fact_is_of_the_draws_that_have_it() -> None:
    nothing: FactsOf = {index: {"colors": frozenset()} for index in range(100)}
    rare: FactsOf = {**nothing, 3: {"colors": frozenset({("red",)})}}
    assert compare(nothing, rare)["colors"] == {"f1": 0, "low": 0, "high": 0, "facts": 1}


def test_who_says_nothing_is_not_consistent() -> None:
    nothing: FactsOf = {index: {"colors": frozenset()} for index in range(10)}
    none = {"f1": None, "low": None, "high": None, "facts": 0}
    assert rotation(READER, nothing, {45.0: nothing}) == {"45": {"stays": none}}


def test_between_directions_only_facts_without_one_are_left() -> None:
    kinds = {kind for own in READER.turn(stated(SCENES), 45).values() for kind in own}
    assert kinds == {"scene", "colors", "count"}


def test_answers_that_turn_are_consistent_and_answers_that_stay_are_not() -> None:
    own = stated(SCENES)
    right = stated([turned(scene, 1) for scene in SCENES])
    good = rotation(READER, own, {90.0: right, 45.0: own})
    assert good["90"]["turns"]["f1"] == good["90"]["stays"]["f1"] == 1
    assert good["45"]["stays"]["f1"] == 1 and "turns" not in good["45"]
    blind = rotation(READER, own, {90.0: own})["90"]
    # No two objects of a scene have the same color.
    assert blind["stays"]["f1"] == 1 and blind["turns"]["f1"] == 0
    for_half = {index: (own if index % 2 else right)[index] for index in own}
    some = rotation(READER, own, {90.0: for_half})["90"]["turns"]
    assert 0.3 < some["low"] < some["f1"] < some["high"] < 0.7


def test_the_gap_at_the_seam_is_found_and_no_other() -> None:
    """A model that says nothing of what is behind has a gap of 1; one that says nothing of what is
    on the left has none at the seam."""
    turns = {90.0 * q: stated([turned(scene, q) for scene in SCENES]) for q in range(4)}
    own = seam(READER, stated(SCENES), turns)
    assert own and own["gap"]["value"] == 0 and own["at_seam"]["f1"] == 1
    # Over all four turns, every object is once at the seam, and three times elsewhere.
    assert own["elsewhere"]["facts"] == 3 * own["at_seam"]["facts"]

    def without(direction: str) -> dict[float, FactsOf]:
        return {
            degrees: {
                panorama: {
                    kind: frozenset(fact for fact in facts if direction not in fact)
                    for kind, facts in kinds.items()
                }
                for panorama, kinds in said.items()
            }
            for degrees, said in turns.items()
        }

    behind = seam(READER, stated(SCENES), without("behind"))
    assert behind and behind["gap"]["value"] == behind["gap"]["low"] == 1
    left = seam(READER, stated(SCENES), without("left"))
    assert left and left["at_seam"]["f1"] == 1 and left["gap"]["high"] < 0


def test_what_is_said_is_compared_by_kind() -> None:
    true = stated(SCENES)
    said = stated(
        [replace(SCENES[0], kind="desert" if SCENES[0].kind != "desert" else "hall"), *SCENES[1:]]
    )
    counted = compare(said, true)
    assert counted["scene"]["f1"] == 39 / 40 and counted["scene"]["facts"] == 40
    assert {kind for kind, own in counted.items() if own["f1"] < 1} == {"scene"}


def test_an_unknown_reader_is_an_error_that_names_the_known() -> None:
    with pytest.raises(UserError, match=r"evaluate\.facts: unknown reader of facts 'x'.*demo"):
        find_reader("x")
