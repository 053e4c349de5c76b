"""The grounding gap compares scores with those for another panorama."""

import pytest

from panollava.evaluation.captions import Scores
from panollava.evaluation.grounding import grounding_gap, reported_score, swapped_panoramas


@pytest.mark.parametrize("count", [2, 3, 10])
def test_every_panorama_is_swapped_for_a_different_one(count: int) -> None:
    partners = swapped_panoramas(count).tolist()
    assert sorted(partners) == list(range(count))
    assert all(partner != panorama for panorama, partner in enumerate(partners))


def test_the_gap_is_the_drop_of_the_scores_that_both_have() -> None:
    scores = Scores({"bleu_4": 0.5, "cider_d": 3.0, "captions": 2}, {"cider_d": {1: 2.0, 2: 4.0}})
    swapped = Scores({"cider_d": 1.0, "captions": 2}, {"cider_d": {1: 1.5, 2: 0.5}})
    gap = grounding_gap(scores, swapped)
    assert gap.values == {"cider_d": 2.0} and gap.each == {"cider_d": {1: 0.5, 2: 3.5}}
    assert reported_score(gap) == "cider_d"
    assert reported_score(Scores({"rouge_l": 0.1}, {})) == "rouge_l"
    assert reported_score(Scores({}, {})) is None
