"""F1 of the facts that answers state, for data whose answers can be parsed into facts, and
whether these facts rotate with the panorama.

A fact reader parses a query and an answer into facts of several kinds. The facts of the reference
answer are the correct ones."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panollava.evaluation.confidence import interval

Key = tuple[int, str]  # (panorama, query)
Fact = tuple[str, ...]
Facts = dict[str, frozenset[Fact]]  # by kind
PanoramaFacts = dict[int, set[tuple[str, Fact]]]  # (kind, fact), by panorama

READERS = {"demo": "panollava.demo.facts"}  # modules with a READER, by `evaluate.facts`


@dataclass(frozen=True)
class FactReader:
    """`read` maps a query and an answer to facts. Different queries must give different facts, and
    all answers to one query the same kinds. `directions` are the words for directions in facts,
    from the front clockwise in equal steps. `directed` are the kinds of facts that name one; no
    other fact contains these words. `headline` are the kinds whose F1 is a headline number."""

    read: Callable[[str, str], Facts]
    directions: tuple[str, ...]
    directed: frozenset[str]
    headline: tuple[str, ...]

    def read_all(self, answers: Mapping[Key, str]) -> PanoramaFacts:
        """The union of the facts in the answers, by panorama."""
        result: PanoramaFacts = {panorama: set() for panorama, _ in answers}
        for (panorama, query), answer in answers.items():
            for kind, facts in self.read(query, answer).items():
                result[panorama].update((kind, fact) for fact in facts)
        return result

    def maps_directions(self, degrees: float) -> bool:
        """Whether a roll by `degrees` maps directions to directions."""
        return degrees * len(self.directions) % 360 == 0

    def roll(self, facts: PanoramaFacts, degrees: float) -> PanoramaFacts:
        """The facts of the panoramas rolled by `degrees` to the right. Those that name a direction
        are dropped if `degrees` is not a multiple of the step between directions."""
        steps = round(degrees * len(self.directions) / 360) % len(self.directions)
        after = self.directions[steps:] + self.directions[:steps]
        rolled = dict(zip(self.directions, after, strict=True))
        exact = self.maps_directions(degrees)
        return {
            panorama: {
                (kind, tuple(rolled.get(word, word) for word in fact))
                for kind, fact in kinds_and_facts
                if exact or kind not in self.directed
            }
            for panorama, kinds_and_facts in facts.items()
        }


def find_reader(name: str) -> FactReader:
    """The reader that `evaluate.facts` names."""
    return importlib.import_module(READERS[name]).READER


def compare(
    predicted: Sequence[PanoramaFacts], reference: PanoramaFacts
) -> dict[str, dict[str, Any]]:
    """For each kind: micro-averaged `f1`, its 95% interval (`low`, `high`) and `facts`, the number
    of reference facts. Several sets of answers are pooled.

    If every answer states one fact, such as a count, F1 equals accuracy."""
    kinds = {
        kind for each in (*predicted, reference) for facts in each.values() for kind, _ in facts
    }

    def f1_of(kind: str) -> dict[str, Any]:
        counts = [count_facts(facts, reference, lambda k, _: k == kind) for facts in predicted]
        return {**_f1_interval(np.sum(counts, axis=0)), "facts": int(counts[0][:, 2].sum())}

    return {kind: f1_of(kind) for kind in sorted(kinds)}


def rotation(
    reader: FactReader, facts: PanoramaFacts, facts_of_rolled: PanoramaFacts, degrees: float
) -> dict[str, Any]:
    """Consistency of the answers when the panorama is rolled by `degrees`: F1 of the facts stated
    for the rolled panorama against the rolled facts of the original one. F1 is None if there are
    no facts on either side.

    `stays`: invariance of the facts that name no direction. `turns`: equivariance of those that
    do, for angles that map directions to directions."""
    expected = reader.roll(facts, degrees)
    stays = count_facts(facts_of_rolled, expected, lambda kind, _: kind not in reader.directed)
    if not reader.maps_directions(degrees):
        return {"stays": _f1_interval(stays)}
    turns = count_facts(facts_of_rolled, expected, lambda kind, _: kind in reader.directed)
    return {"stays": _f1_interval(stays), "turns": _f1_interval(turns)}


def seam(
    reader: FactReader, reference: PanoramaFacts, predicted_by_roll: Mapping[float, PanoramaFacts]
) -> dict[str, Any]:
    """Accuracy at the panorama's seam (±180°, behind) compared with the other directions: F1 of the
    facts that name it (`at_seam`), of those that name another direction (`elsewhere`), and the
    second minus the first (`gap`).

    `predicted_by_roll`: facts by angle, including 0. Angles that do not map directions to
    directions are left out; `rolls` are the others. Only if these bring every direction to the seam
    once does the gap compare the same objects in every place."""
    behind = reader.directions[len(reader.directions) // 2]
    rolls = [degrees for degrees in predicted_by_roll if reader.maps_directions(degrees)]

    def total(at_seam: bool) -> NDArray:
        """Counts of the directed facts at the seam or elsewhere, summed over rolls."""

        def counted(kind: str, fact: Fact) -> bool:
            return kind in reader.directed and (behind in fact) == at_seam

        counts = [
            count_facts(predicted_by_roll[degrees], reader.roll(reference, degrees), counted)
            for degrees in rolls
        ]
        return np.sum(counts, axis=0)

    at_seam, elsewhere = total(True), total(False)
    return {
        "rolls": rolls,
        "at_seam": _f1_interval(at_seam),
        "elsewhere": _f1_interval(elsewhere),
        "gap": interval(lambda sums: _f1(sums[1]) - _f1(sums[0]), np.stack([at_seam, elsewhere])),
    }


def count_facts(
    predicted: PanoramaFacts, reference: PanoramaFacts, counted: Callable[[str, Fact], bool]
) -> NDArray:
    """(panoramas, 3): numbers of correct, predicted and reference facts, of those `counted`."""
    counts = np.zeros((len(reference), 3), int)
    for row, panorama in enumerate(sorted(reference)):
        outputs, targets = (
            {fact for fact in facts[panorama] if counted(*fact)} for facts in (predicted, reference)
        )
        counts[row] = len(outputs & targets), len(outputs), len(targets)
    return counts


def _f1_interval(counts: NDArray) -> dict[str, Any]:
    """`counts`: (panoramas, 3), see `count_facts`."""
    result = interval(lambda sums: _f1(sums[0]), counts[None])
    return {"f1": result.pop("value"), **result, "facts": int(counts[:, 2].sum())}


def _f1(counts: NDArray) -> NDArray:
    """F1 of (..., 3) counts; NaN if nothing is predicted and nothing is in the reference."""
    correct, predicted, reference = np.moveaxis(counts, -1, 0)
    total = predicted + reference
    return np.where(total > 0, 2 * correct / np.maximum(total, 1), np.nan)
