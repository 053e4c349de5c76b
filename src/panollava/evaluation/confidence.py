"""95% confidence intervals by a cluster bootstrap over panoramas, because queries about one
panorama are correlated (percentile bootstrap, Efron, 1979)."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000


def interval(statistic: Callable[[NDArray], NDArray], counts: NDArray) -> dict[str, float | None]:
    """`value`, `low` and `high`: a statistic and its interval over 1000 seeded resamples of the
    panoramas. All are None if the statistic is undefined (NaN).

    `counts`: (groups, panoramas, counts). `statistic` maps sums over panoramas, (groups, ...,
    counts), to (...). Resamples for which it is undefined are left out."""
    value = statistic(counts.sum(axis=1))
    if np.isnan(value):
        return {"value": None, "low": None, "high": None}
    size = counts.shape[1]
    resamples = np.random.default_rng(0).integers(size, size=(_RESAMPLES, size))
    values = statistic(counts[:, resamples].sum(axis=2))
    low, high = np.nanquantile(values, (0.025, 0.975))
    return {"value": float(value), "low": float(low), "high": float(high)}


def interval_of_mean(values: Mapping[tuple[int, str], float]) -> dict[str, float | None]:
    """`low` and `high` of the mean of values by (panorama, query)."""
    index = {panorama: i for i, panorama in enumerate(dict.fromkeys(p for p, _ in values))}
    counts = np.zeros((1, len(index), 2))
    for (panorama, _), value in values.items():
        counts[0, index[panorama]] += value, 1
    result = interval(lambda sums: sums[0, ..., 0] / sums[0, ..., 1], counts)
    return {"low": result["low"], "high": result["high"]}
