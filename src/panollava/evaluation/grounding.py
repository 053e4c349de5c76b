"""The grounding gap: how much the scores drop if each answer is swapped for another panorama's
answer to the same query. It is near 0 for a model that ignores the panorama."""

from collections.abc import Mapping, Sequence

import numpy as np

from panollava.evaluation.captions import Scores
from panollava.evaluation.facts import Key

DERANGEMENTS = 5  # swaps whose scores are averaged, since another panorama's answer may be right


def swapped_answers(answers: Mapping[Key, str]) -> list[dict[Key, str]]:
    """`DERANGEMENTS` times, the answers of other panoramas: in each, a query's answers are moved
    along a random cycle of the panoramas that were asked it. Queries asked of one panorama only
    are left out; without any other, the list is empty."""
    panoramas_of: dict[str, list[int]] = {}
    for panorama, query in answers:
        panoramas_of.setdefault(query, []).append(panorama)
    shared = {query: asked for query, asked in panoramas_of.items() if len(asked) > 1}
    return [
        {
            (panorama, query): answers[partner, query]
            for query, asked in shared.items()
            for panorama, partner in _derange(asked, (number, *query.encode()))
        }
        for number in range(DERANGEMENTS if shared else 0)
    ]


def _derange(panoramas: list[int], seed: tuple[int, ...]) -> list[tuple[int, int]]:
    """Each panorama with its partner: the one before it in a random cycle."""
    cycle = np.random.default_rng(seed).permutation(panoramas).tolist()
    return [(panorama, cycle[index - 1]) for index, panorama in enumerate(cycle)]


def mean_scores(draws: Sequence[Scores]) -> Scores:
    """Means of the scores that all draws have, in total and for each key."""
    first = draws[0]
    values = {
        name: float(np.mean([draw.values[name] for draw in draws]))
        for name, value in first.values.items()
        if isinstance(value, float) and all(name in draw.values for draw in draws)
    }
    each = {
        name: {key: float(np.mean([draw.each[name][key] for draw in draws])) for key in keys}
        for name, keys in first.each.items()
        if name in values
    }
    return Scores(values, each)


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
