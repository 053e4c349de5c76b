"""How many of the facts that answers state are true, for data whose answers can be read so.

A reader turns a query and an answer into facts of several kinds; those of the reference are the
true ones."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from panollava.demo.facts import Facts, read_facts
from panollava.errors import UserError

FactReader = Callable[[str, str], Facts]
Key = tuple[int, str]  # (panorama, query)

READERS: dict[str, FactReader] = {"demo": read_facts}
_RESAMPLES = 1000


def find_reader(name: str) -> FactReader:
    """Raises UserError for an unknown `evaluate.facts`."""
    if name not in READERS:
        raise UserError(
            f"evaluate.facts: unknown reader of facts '{name}'; known are {', '.join(READERS)}, "
            "or null for none"
        )
    return READERS[name]


def compare(
    read: FactReader, answers: Mapping[Key, str], truths: Mapping[Key, str]
) -> dict[str, dict[str, Any]]:
    """For each kind of fact: `f1` over all facts, the 95% interval of it when panoramas are drawn
    anew (bootstrap, 1000 times, seeded), and the number of true facts.

    Where every answer states one fact, as a count, F1 is the share of right answers."""
    counted: dict[str, dict[int, np.ndarray]] = {}
    for (panorama, query), truth in truths.items():
        said = read(query, answers[panorama, query])
        for kind, true in read(query, truth).items():
            counts = np.array([len(true & said[kind]), len(said[kind]), len(true)])
            own = counted.setdefault(kind, {})
            own[panorama] = own.get(panorama, np.zeros(3, int)) + counts
    return {
        kind: _summary(np.stack([own[panorama] for panorama in sorted(own)]))
        for kind, own in sorted(counted.items())
    }


def _summary(counts: np.ndarray) -> dict[str, Any]:
    """`counts`: (panoramas, 3), of facts that are said and true, said, and true."""
    random = np.random.default_rng(0)
    drawn = random.integers(len(counts), size=(_RESAMPLES, len(counts)))
    low, high = np.quantile(_f1(counts[drawn].sum(axis=1)), (0.025, 0.975))
    return {
        "f1": float(_f1(counts.sum(axis=0))),
        "low": float(low),
        "high": float(high),
        "facts": int(counts[:, 2].sum()),
    }


def _f1(counts: np.ndarray) -> np.ndarray:
    """F1 of (..., 3) counts; 1 where nothing is true and nothing is said."""
    both, said, true = np.moveaxis(counts, -1, 0)
    total = said + true
    return np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)
