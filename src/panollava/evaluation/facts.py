"""F1 of the facts that answers state, for data whose answers can be parsed into facts, and
whether these facts rotate with the panorama.

A fact reader parses a query and an answer into facts of several kinds. The facts of the reference
answer are the correct ones."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panollava.evaluation.confidence import interval

Key = tuple[int, str]  # (panorama, query)
Fact = tuple[str, ...]
Facts = dict[str, frozenset[Fact]]  # by kind
PanoramaFacts = dict[int, Facts]  # by panorama

READERS = {"demo": "panollava.demo.facts"}  # modules with a READER, by `evaluate.facts`


@dataclass(frozen=True)
class FactReader:
    """`read` maps a query and an answer to facts. Different queries must give different facts, and
    all answers to one query the same kinds. `directions` are the words for directions in facts,
    from the front clockwise in equal steps. `directed` are the kinds of facts that name one."""

    read: Callable[[str, str], Facts]
    directions: tuple[str, ...]
    directed: frozenset[str]

    def read_all(self, answers: Mapping[Key, str], keys: Iterable[Key]) -> PanoramaFacts:
        """The union of the facts in the answers to `keys`, by panorama."""
        result: PanoramaFacts = {}
        for panorama, query in keys:
            by_kind = result.setdefault(panorama, {})
            for kind, facts in self.read(query, answers[panorama, query]).items():
                by_kind[kind] = by_kind.get(kind, frozenset()) | facts
        return result

    def roll(self, facts: PanoramaFacts, degrees: float) -> PanoramaFacts:
        """The facts of the panoramas rolled by `degrees` to the right. Kinds that name a direction
        are dropped if `degrees` is not a multiple of the step between directions."""
        count = len(self.directions)
        steps = degrees * count / 360
        exact = steps == round(steps)
        rolled = {
            word: self.directions[(index + round(steps)) % count]
            for index, word in enumerate(self.directions)
        }

        def roll_kind(kind: str, facts: frozenset[Fact]) -> frozenset[Fact]:
            if kind not in self.directed:
                return facts
            return frozenset(tuple(rolled.get(word, word) for word in fact) for fact in facts)

        return {
            panorama: {
                kind: roll_kind(kind, kind_facts)
                for kind, kind_facts in by_kind.items()
                if exact or kind not in self.directed
            }
            for panorama, by_kind in facts.items()
        }

    def has_directed(self, facts: PanoramaFacts) -> bool:
        return any(kind in self.directed for by_kind in facts.values() for kind in by_kind)


def find_reader(name: str) -> FactReader:
    """The reader that `evaluate.facts` names."""
    return importlib.import_module(READERS[name]).READER


def compare(predicted: PanoramaFacts, reference: PanoramaFacts) -> dict[str, dict[str, Any]]:
    """For each kind in `reference`: micro-averaged `f1`, its 95% interval (`low`, `high`) and
    `facts`, the number of reference facts. `f1` is None if there are no facts on either side.

    If every answer states one fact, such as a count, F1 equals accuracy."""
    kinds = sorted({kind for by_kind in reference.values() for kind in by_kind})

    def f1_of(kind: str) -> dict[str, Any]:
        return _f1_interval(_counts(predicted, reference, lambda k, _: k == kind))

    return {kind: f1_of(kind) for kind in kinds}


def rotation(
    reader: FactReader, facts: PanoramaFacts, facts_of_rolled: Mapping[float, PanoramaFacts]
) -> dict[str, Any]:
    """Consistency of the answers when the panorama is rolled, by angle in degrees: F1 of the facts
    stated for the rolled panorama against the rolled facts of the original one.

    `stays`: invariance of the facts that name no direction. `turns`: equivariance of those that
    do, for angles that map directions to directions."""
    results: dict[str, Any] = {}
    for degrees, predicted in facts_of_rolled.items():
        expected = reader.roll(facts, degrees)
        counts = _counts(predicted, expected, lambda kind, _: kind not in reader.directed)
        result = results[f"{degrees:g}"] = {"stays": _f1_interval(counts)}
        if reader.has_directed(expected):
            counts = _counts(predicted, expected, lambda kind, _: kind in reader.directed)
            result["turns"] = _f1_interval(counts)
    return results


def seam(
    reader: FactReader, reference: PanoramaFacts, predicted_by_roll: Mapping[float, PanoramaFacts]
) -> dict[str, Any] | None:
    """Accuracy at the panorama's seam (±180°, behind) compared with the other directions: F1 of the
    facts that name it (`at_seam`), of those that name another direction (`elsewhere`), and the
    second minus the first (`gap`). None if no fact names a direction.

    `predicted_by_roll`: facts by angle, including 0. Angles that do not map directions to
    directions are left out."""
    behind = reader.directions[len(reader.directions) // 2]
    pairs = [(facts, reader.roll(reference, roll)) for roll, facts in predicted_by_roll.items()]
    pairs = [(facts, expected) for facts, expected in pairs if reader.has_directed(expected)]
    if not pairs:
        return None

    def total(counted: Callable[[Fact], bool]) -> NDArray:
        """Counts of the directed facts that are `counted`, summed over rolls."""

        def directed(kind: str, fact: Fact) -> bool:
            return kind in reader.directed and counted(fact)

        return np.sum([_counts(facts, expected, directed) for facts, expected in pairs], axis=0)

    at_seam, elsewhere = total(lambda fact: behind in fact), total(lambda fact: behind not in fact)
    return {
        "at_seam": _f1_interval(at_seam),
        "elsewhere": _f1_interval(elsewhere),
        "gap": interval(lambda sums: _f1(sums[1]) - _f1(sums[0]), np.stack([at_seam, elsewhere])),
    }


def _counts(
    predicted: PanoramaFacts, reference: PanoramaFacts, counted: Callable[[str, Fact], bool]
) -> NDArray:
    """(panoramas, 3): numbers of correct, predicted and reference facts, of those `counted`."""

    def select(facts: Facts, kind: str) -> set[Fact]:
        return {fact for fact in facts.get(kind, ()) if counted(kind, fact)}

    counts = np.zeros((len(reference), 3), int)
    for row, (panorama, by_kind) in enumerate(sorted(reference.items())):
        for kind in by_kind:
            outputs, targets = select(predicted[panorama], kind), select(by_kind, kind)
            counts[row] += len(outputs & targets), len(outputs), len(targets)
    return counts


def _f1_interval(counts: NDArray) -> dict[str, Any]:
    """`counts`: (panoramas, 3), see `_counts`."""
    result = interval(lambda sums: _f1(sums[0]), counts[None])
    return {"f1": result.pop("value"), **result, "facts": int(counts[:, 2].sum())}


def _f1(counts: NDArray) -> NDArray:
    """F1 of (..., 3) counts; NaN if nothing is predicted and nothing is in the reference."""
    correct, predicted, reference = np.moveaxis(counts, -1, 0)
    total = predicted + reference
    return np.where(total > 0, 2 * correct / np.maximum(total, 1), np.nan)
