"""The grounding gap: how much the scores drop if each panorama is swapped for another one. It is
near 0 for a model that ignores the panorama."""

import numpy as np
from numpy.typing import NDArray

from panollava.evaluation.captions import Scores


def swapped_panoramas(count: int) -> NDArray[np.intp]:
    """The panorama that is shown in the place of each: the one half of the split further on."""
    return np.roll(np.arange(count), count // 2)


def grounding_gap(scores: Scores, swapped: Scores) -> Scores:
    """Differences of all scores that both have."""
    gaps = {
        name: scores.values[name] - value
        for name, value in swapped.values.items()
        if isinstance(value, float) and name in scores.values
    }
    each = {
        name: {key: value - swapped.each[name][key] for key, value in values.items()}
        for name, values in scores.each.items()
        if name in swapped.each
    }
    return Scores(gaps, each)


def reported_score(gap: Scores) -> str | None:
    """The score whose gap is a headline number: CIDEr-D, or ROUGE-L if that is unknown."""
    return next((name for name in ("cider_d", "rouge_l") if name in gap.values), None)
