"""The demo's fact reader: parses the facts that an answer states from its text."""

import re

from panollava.demo.questions import NUMBERS, PLACES, QUERIES
from panollava.demo.scenes import COLORS, DIRECTIONS, KINDS, SHAPES
from panollava.evaluation.facts import FactReader, Facts

DIRECTED = frozenset({"color_by_direction", "color_shape_by_direction", "largest", "around"})
# "colors" is left out: "color_by_direction" contains it.
HEADLINE = ("scene", "color_by_direction", "color_shape_by_direction", "count", "largest", "around")

_TOPICS = {query: topic for topic, query in QUERIES.items()}
_DIRECTION = {place: direction for direction, places in PLACES.items() for place in places}
_THING = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_PLACE = rf"({'|'.join(_DIRECTION)})"
_WORD = {  # topics whose facts are single words
    "scene": rf"\b({'|'.join(KINDS)})\b",
    "colors": rf"\b({'|'.join(COLORS)})\b",
    "count": rf"\b({'|'.join(NUMBERS)}) objects?\b",
}


def read_facts(query: str, answer: str) -> Facts:
    """The facts that `answer` states, by kind. The kinds depend on the query only; a kind without
    facts has an empty set."""
    topic = _TOPICS.get(query)
    if topic in _WORD:
        return {topic: frozenset((word,) for word in re.findall(_WORD[topic], answer))}
    things = re.findall(_THING, answer)[:1]
    if topic in DIRECTIONS:
        return {
            "color_by_direction": frozenset((topic, color) for color, _ in things),
            "color_shape_by_direction": frozenset((topic, *thing) for thing in things),
        }
    if topic == "largest":
        places = [_DIRECTION[place] for place in re.findall(_PLACE, answer)[:1]]
        return {"largest": frozenset((*thing, *places) for thing in things)}
    if topic == "around":
        objects = re.findall(rf"{_PLACE} an? {_THING}", answer)
        return {"around": frozenset((_DIRECTION[place], *thing) for place, *thing in objects)}
    return {}


READER = FactReader(read_facts, DIRECTIONS, DIRECTED, HEADLINE)
