"""95% intervals of what is measured over panoramas: these are drawn anew, since the queries of one
panorama are not independent of each other (percentile bootstrap, Efron, 1979)."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000


def interval(value: Callable[[NDArray], NDArray], counts: NDArray) -> dict[str, float | None]:
    """`value` of (groups, ..., counts) summed over panoramas, and its 95% interval when the
    panoramas of (groups, panoramas, counts) are drawn anew, 1000 times, seeded, over the draws that
    have a value. `value`, `low`, `high`: None where there is none."""
    own = value(counts.sum(axis=1))
    if np.isnan(own):
        return {"value": None, "low": None, "high": None}
    drawn = np.random.default_rng(0).integers(counts.shape[1], size=(_RESAMPLES, counts.shape[1]))
    low, high = np.nanquantile(value(counts[:, drawn].sum(axis=2)), (0.025, 0.975))
    return {"value": float(own), "low": float(low), "high": float(high)}


def interval_of_mean(values: Mapping[tuple[int, str], float]) -> dict[str, float | None]:
    """`low` and `high` of the mean over (panorama, query)."""
    places = {panorama: place for place, panorama in enumerate(dict.fromkeys(p for p, _ in values))}
    counts = np.zeros((1, len(places), 2))
    for (panorama, _), value in values.items():
        counts[0, places[panorama]] += value, 1
    found = interval(lambda own: own[0, ..., 0] / own[0, ..., 1], counts)
    return {"low": found["low"], "high": found["high"]}
