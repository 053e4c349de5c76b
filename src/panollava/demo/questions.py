"""Questions about a scene, and their answers as text. `facts` parses answers back into facts."""

import numpy as np

from panollava.demo.scenes import COLORS, DIRECTIONS, Object, Scene

NUMBERS = ("no", "one", "two", "three", "four")
PLACES = {  # phrases for a direction
    "front": ("in front", "ahead"),
    "right": ("on the right", "to the right"),
    "behind": ("behind", "at the back"),
    "left": ("on the left", "to the left"),
}
QUERIES = {
    "scene": "what kind of place is this?",
    "colors": "which colors do the objects have?",
    **{direction: f"what is {PLACES[direction][0]}?" for direction in DIRECTIONS},
    "count": "how many objects are there?",
    "largest": "which object is the largest?",
    "around": "what is all around?",
}
TEMPLATES = 3  # phrasings of every answer
_PHRASINGS = {
    "scene": ("this is a {kind}, {}.", "it is a {kind}, {}.", "a {kind}, seen {}."),
    "colors": ("the objects are {}.", "the colors are {}.", "they are {}."),
    "count": ("{}.", "one can see {}.", "{} in the {kind}."),
    "largest": ("the largest is the {}.", "it is the {}.", "the {} is the largest."),
    "around": ("{}.", "{}.", "one can see {}."),
}


def has_answer(scene: Scene, topic: str) -> bool:
    """False if the answer would need the direction of an object between two directions."""
    if topic in DIRECTIONS:
        return scene.is_clear(topic)
    located = {"largest": (scene.largest,), "around": scene.objects}.get(topic, ())
    return all(item.direction is not None for item in located)


def answer(scene: Scene, topic: str, template: int) -> str:
    """The correct answer to a query of QUERIES, in one of TEMPLATES phrasings."""
    if topic in DIRECTIONS:
        item = scene.at(topic)
        verb = "one can see" if template == 2 else "there is"
        thing = "nothing" if item is None else _article(item)
        return f"{PLACES[topic][template == 1]} {verb} {thing}."
    if topic == "scene":
        content = "indoors" if scene.indoors else "outdoors"
    elif topic == "largest":
        largest = scene.largest
        assert largest.direction is not None, "the largest object is between two directions"
        content = f"{largest.color} {largest.shape} {PLACES[largest.direction][0]}"
    elif topic == "around":
        content = ", ".join(
            f"{PLACES[direction][template == 1]} {_article(item)}"
            for direction in DIRECTIONS
            if (item := scene.at(direction)) is not None
        )
    else:
        *others, last = sorted((item.color for item in scene.objects), key=list(COLORS).index)
        content = f"{', '.join(others)} and {last}" if others else last
        if topic == "count":  # the objects are listed before their number
            content += f", {NUMBERS[len(scene.objects)]} {'objects' if others else 'object'}"
    return _PHRASINGS[topic][template].format(content, kind=scene.kind)


def rows(scene: Scene, references: int, choice: int) -> list[tuple[str, str]]:
    """(query, answer): `references` answers in different phrasings to every query that has one.
    `choice` seeds the phrasings."""
    random = np.random.default_rng(choice)
    return [
        (query, answer(scene, topic, int(template)))
        for topic, query in QUERIES.items()
        if has_answer(scene, topic)
        for template in random.permutation(TEMPLATES)[:references]
    ]


def _article(item: Object) -> str:
    return f"{'an' if item.color[0] in 'aeiou' else 'a'} {item.color} {item.shape}"
