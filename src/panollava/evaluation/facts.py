"""How many of the facts that answers state are true, for data whose answers can be read so; and
whether they turn when the panorama does.

A reader turns a query and an answer into facts of several kinds; those of the reference are the
true ones."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panollava.evaluation.confidence import interval

Key = tuple[int, str]  # (panorama, query)
Fact = tuple[str, ...]
Facts = dict[str, frozenset[Fact]]  # of each kind
FactsOf = dict[int, Facts]  # of each panorama


@dataclass(frozen=True)
class FactReader:
    """`read`: a query and an answer to facts, no two queries to the same fact; every answer to the
    same query speaks of the same kinds. `directions`: the words for them in facts, from the front
    to the right, in equal steps. `directed`: the kinds of facts that name one."""

    read: Callable[[str, str], Facts]
    directions: tuple[str, ...]
    directed: frozenset[str]

    def of_panoramas(self, answers: Mapping[Key, str], keys: Iterable[Key]) -> FactsOf:
        """All that `answers` state of each panorama, of `keys` alone."""
        stated: FactsOf = {}
        for panorama, query in keys:
            own = stated.setdefault(panorama, {})
            for kind, facts in self.read(query, answers[panorama, query]).items():
                own[kind] = own.get(kind, frozenset()) | facts
        return stated

    def turn(self, stated: FactsOf, degrees: float) -> FactsOf:
        """What is to be stated of panoramas turned by `degrees` to the right. Where no direction
        turns into another, only the kinds of facts that name none are left."""
        steps = degrees * len(self.directions) / 360
        if steps != round(steps):
            return {
                panorama: {kind: facts for kind, facts in own.items() if kind not in self.directed}
                for panorama, own in stated.items()
            }
        count = len(self.directions)
        turned = {
            word: self.directions[(index + round(steps)) % count]
            for index, word in enumerate(self.directions)
        }
        return {
            panorama: {
                kind: frozenset(tuple(turned.get(word, word) for word in fact) for fact in facts)
                if kind in self.directed
                else facts
                for kind, facts in own.items()
            }
            for panorama, own in stated.items()
        }

    def names_directions(self, stated: FactsOf) -> bool:
        return any(kind in self.directed for own in stated.values() for kind in own)


READERS = {"demo": "panollava.demo.facts"}  # modules with a READER, by `evaluate.facts`


def find_reader(name: str) -> FactReader:
    """The reader that `evaluate.facts` names."""
    return importlib.import_module(READERS[name]).READER


def compare(said: FactsOf, true: FactsOf) -> dict[str, dict[str, Any]]:
    """For each kind of fact in `true`: `f1` over all facts, the 95% interval of it when panoramas
    are drawn anew (bootstrap, 1000 times, seeded), and the number of true facts. None where there
    is no fact, true or said.

    Where every answer states one fact, as a count, F1 is the share of right answers."""
    kinds = sorted({kind for own in true.values() for kind in own})

    def summary(kind: str) -> dict[str, Any]:
        return _summary(_counts(said, true, lambda own, _: own == kind))

    return {kind: summary(kind) for kind in kinds}


def rotation(
    reader: FactReader, said: FactsOf, said_of_turned: Mapping[float, FactsOf]
) -> dict[str, Any]:
    """Whether answers follow the panorama as it turns. For each angle, F1 of what is said of the
    turned panorama against what is said of it as it is, turned in thought: `stays`, for facts that
    name no direction, and `turns`, for those that do, where a direction turns into another."""
    results: dict[str, Any] = {}
    for degrees, stated in said_of_turned.items():
        expected = reader.turn(said, degrees)
        own = results[f"{degrees:g}"] = {
            "stays": _summary(_counts(stated, expected, lambda k, _: k not in reader.directed))
        }
        if reader.names_directions(expected):
            own["turns"] = _summary(_counts(stated, expected, lambda k, _: k in reader.directed))
    return results


def seam(
    reader: FactReader,
    true: FactsOf,
    said_of_turned: Mapping[float, FactsOf],
) -> dict[str, Any] | None:
    """Whether what lies at the panorama's seam, which is behind, is told as well as the rest: F1
    of the facts that name that direction (`at_seam`) and of those that name another (`elsewhere`),
    and the second less the first (`gap`), over all turns of the same panoramas that put one
    direction in another's place. None if no fact names a direction.

    `said_of_turned`: by angle, 0 among them."""
    back = reader.directions[len(reader.directions) // 2]
    counts = []
    for degrees, stated in said_of_turned.items():
        expected = reader.turn(true, degrees)
        if not reader.names_directions(expected):
            continue
        counts.append(
            [
                _counts(stated, expected, lambda k, f: k in reader.directed and back in f),
                _counts(stated, expected, lambda k, f: k in reader.directed and back not in f),
            ]
        )
    if not counts:
        return None
    at_seam, elsewhere = np.sum(counts, axis=0)
    return {
        "at_seam": _summary(at_seam),
        "elsewhere": _summary(elsewhere),
        "gap": interval(lambda own: _f1(own[1]) - _f1(own[0]), np.stack([at_seam, elsewhere])),
    }


def _counts(said: FactsOf, true: FactsOf, counted: Callable[[str, Fact], bool]) -> NDArray:
    """(panoramas, 3): the counted facts that are said and true, said, and true."""

    def chosen(stated: Facts, kind: str) -> set[Fact]:
        return {fact for fact in stated.get(kind, ()) if counted(kind, fact)}

    counts = np.zeros((len(true), 3), int)
    for row, (panorama, own) in enumerate(sorted(true.items())):
        for kind in own:
            stated, held = chosen(said[panorama], kind), chosen(own, kind)
            counts[row] += len(stated & held), len(stated), len(held)
    return counts


def _summary(counts: NDArray) -> dict[str, Any]:
    """`counts`: (panoramas, 3), see `_counts`."""
    f1 = interval(lambda own: _f1(own[0]), counts[None])
    return {"f1": f1.pop("value"), **f1, "facts": int(counts[:, 2].sum())}


def _f1(counts: NDArray) -> NDArray:
    """F1 of (..., 3) counts; NaN where nothing is true and nothing is said."""
    both, said, true = np.moveaxis(counts, -1, 0)
    total = said + true
    return np.where(total > 0, 2 * both / np.maximum(total, 1), np.nan)
