"""Likely misspellings are found in time proportional to the texts."""

import random
import time

import pandas as pd
import pytest

from panollava.data.misspellings import find_misspellings


def suspicions(queries: dict[str, int], annotations: dict[str, int] | None = None) -> list[str]:
    """Each text as often as it says; the annotations of the queries are all different."""
    rows = [(query, f"{number}") for query, count in queries.items() for number in range(count)]
    rows += [("", text) for text, count in (annotations or {}).items() for _ in range(count)]
    return find_misspellings(pd.DataFrame(rows, columns=["query", "annotation"]))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("wether", "weather"),  # a letter is missing
        ("weaather", "weather"),  # twice
        ("waether", "weather"),  # in the wrong order
        ("arthitecture", "architecture"),  # another letter
        ("archtectuer", "architecture"),  # two mistakes
        ("weather?", "weather"),
        ("weather ", "weather"),
        ("light house", "lighthouse"),
        ("how is the wether on the left?", "how is the weather on the left?"),
    ],
)
def test_a_rare_query_similar_to_a_frequent_one(typed: str, meant: str) -> None:
    assert suspicions({meant: 40, typed: 2}) == [
        f"query '{typed}' (2 rows): is '{meant}' (40 rows) meant?"
    ]
    assert not suspicions({meant: 39, typed: 2})  # not rare enough


@pytest.mark.parametrize(
    ("typed", "other"),
    [
        ("cars", "car"),
        ("buildings", "building"),
        ("what color is the cat?", "what color is the car?"),  # too short to tell
        ("what is on the left side?", "what is on the right side?"),
        ("x" * 50, "x" * 51),
        ("x " * 200, "x " * 199),
    ],
)
def test_what_may_well_be_meant_is_not_suspicious(typed: str, other: str) -> None:
    assert not suspicions({other: 100, typed: 1})


def test_the_nearest_frequent_word_of_the_annotations_is_named() -> None:
    found = suspicions({"the harbuor?": 1}, {"A harbour.": 30, "An arbour.": 50, "harbuor": 1})
    assert found == [
        "'harbuor' in queries and in 1 annotations: is 'harbour' (in 30 annotations) meant?"
    ]


def test_the_time_is_proportional_to_the_rows() -> None:
    """Half of the questions are free, half are often repeated. If all were compared with all, four
    times the rows would take sixteen times the time."""
    rng = random.Random(0)
    syllables = "ta ro min sel ka ber lo shi ver ton ing er al pre con dis den ous ty ra".split()
    words = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(5000)]

    def seconds(count: int) -> float:
        often = [" ".join(rng.choices(words, k=6)) for _ in range(count // 50)]
        queries = [" ".join(rng.choices(words, k=6)) for _ in range(count // 2)]
        queries += [rng.choice(often) for _ in range(count - len(queries))]
        texts = [" ".join(rng.choices(words, k=10)) for _ in queries]
        rows = pd.DataFrame({"query": queries, "annotation": texts})
        start = time.process_time()
        find_misspellings(rows)
        return time.process_time() - start

    seconds(500)
    assert seconds(8000) < 8 * seconds(2000)
