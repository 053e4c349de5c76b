"""Questions about a scene, and their answers as text. `facts` parses answers back into facts."""

import re

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
    "scene": "what kind of place is this ?",
    "colors": "which colors do the objects have ?",
    **{direction: f"what is {PLACES[direction][0]} ?" for direction in DIRECTIONS},
    "count": "how many objects are there ?",
    "largest": "which object is the largest ?",
    "around": "what is all around ?",
}
TEMPLATES = 3  # phrasings of every answer


def has_answer(scene: Scene, topic: str) -> bool:
    """False if the answer would need the direction of an object between two directions."""
    if topic in DIRECTIONS:
        return scene.is_clear(topic)
    if topic == "largest":
        return scene.largest.direction is not None
    if topic == "around":
        return all(item.direction is not None for item in scene.objects)
    return True


def answer(scene: Scene, topic: str, template: int) -> str:
    """The correct answer to a query of QUERIES, in one of TEMPLATES phrasings."""
    if topic == "scene":
        where = "indoors" if scene.indoors else "outdoors"
        return (
            f"this is a {scene.kind} , {where} .",
            f"it is a {scene.kind} , {where} .",
            f"a {scene.kind} , seen {where} .",
        )[template]
    if topic in ("colors", "count"):
        colors = {item.color for item in scene.objects}
        listed = _enumerate([name for name in COLORS if name in colors])
    if topic == "colors":
        return (
            f"the objects are {listed} .",
            f"the colors are {listed} .",
            f"they are {listed} .",
        )[template]
    if topic == "count":  # the objects are listed before their number
        number = NUMBERS[len(scene.objects)]
        objects = f"{listed} , {number} {'object' if len(scene.objects) == 1 else 'objects'}"
        return (
            f"{objects} .",
            f"one can see {objects} .",
            f"{objects} in the {scene.kind} .",
        )[template]
    if topic == "largest":
        largest = scene.largest
        assert largest.direction is not None, "the largest object is between two directions"
        place = PLACES[largest.direction][0]
        return (
            f"the largest is the {_named(largest)} {place} .",
            f"it is the {_named(largest)} {place} .",
            f"the {_named(largest)} {place} is the largest .",
        )[template]
    if topic == "around":
        phrases = [
            f"{PLACES[direction][template == 1]} {_article(item)}"
            for direction in DIRECTIONS
            if (item := scene.at(direction)) is not None
        ]
        return f"{'one can see ' if template == 2 else ''}{' , '.join(phrases)} ."
    item = scene.at(topic)
    thing = "nothing" if item is None else _article(item)
    one, other = PLACES[topic]
    return (
        f"{one} there is {thing} .",
        f"{other} there is {thing} .",
        f"{one} one can see {thing} .",
    )[template]


def rows(scene: Scene, url: str, references: int, choice: int) -> list[tuple[str, str, str]]:
    """(url, query, answer): `references` answers in different phrasings to every query that has
    one. `choice` seeds the phrasings."""
    random = np.random.default_rng(choice)
    return [
        (url, spell(query), spell(answer(scene, topic, int(template))))
        for topic, query in QUERIES.items()
        if has_answer(scene, topic)
        for template in random.permutation(TEMPLATES)[:references]
    ]


def spell(words: str) -> str:
    """Remove the spaces before punctuation marks."""
    return re.sub(r" ([,.?])", r"\1", words)


def _named(item: Object) -> str:
    return f"{item.color} {item.shape}"


def _article(item: Object) -> str:
    return f"{'an' if item.color[0] in 'aeiou' else 'a'} {_named(item)}"


def _enumerate(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{' , '.join(words[:-1])} and {words[-1]}"
