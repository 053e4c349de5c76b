"""The demo's fact reader: parses the facts that an answer states from its text."""

import re
from collections.abc import Collection

from panollava.demo.questions import NUMBERS, PLACES, QUERIES, spell
from panollava.demo.scenes import COLORS, DIRECTIONS, KINDS, SHAPES
from panollava.evaluation.facts import FactReader, Facts

DIRECTED = frozenset({"color_by_direction", "color_shape_by_direction", "largest", "around"})

_TOPICS = {spell(query): topic for topic, query in QUERIES.items()}
_DIRECTION = {place: direction for direction, places in PLACES.items() for place in places}
_THING = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_PLACE = rf"({'|'.join(_DIRECTION)})"
_NUMBER = rf"\b({'|'.join(NUMBERS)}) objects?\b"


def read_facts(query: str, answer: str) -> Facts:
    """The facts that `answer` states, by kind. The kinds depend on the query only; a kind without
    facts has an empty set."""
    topic = _TOPICS.get(query)
    if topic in DIRECTIONS:
        things = re.findall(_THING, answer)[:1]
        return {
            "color_by_direction": frozenset((topic, color) for color, _ in things),
            "color_shape_by_direction": frozenset((topic, *thing) for thing in things),
        }
    if topic == "scene":
        return {"scene": _words(answer, KINDS)}
    if topic == "colors":
        return {"colors": _words(answer, COLORS)}
    if topic == "count":
        return {"count": frozenset((number,) for number in re.findall(_NUMBER, answer))}
    if topic == "largest":
        places = [_DIRECTION[place] for place in re.findall(_PLACE, answer)[:1]]
        things = re.findall(_THING, answer)[:1]
        return {"largest": frozenset((*thing, *places) for thing in things)}
    if topic == "around":
        objects = re.findall(rf"{_PLACE} an? {_THING}", answer)
        return {"around": frozenset((_DIRECTION[place], *thing) for place, *thing in objects)}
    return {}


def _words(answer: str, known: Collection[str]) -> frozenset[tuple[str, ...]]:
    return frozenset((word,) for word in re.findall(r"\w+", answer) if word in known)


READER = FactReader(read_facts, DIRECTIONS, DIRECTED)
