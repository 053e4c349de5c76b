"""The grounding gap compares scores with those of another panorama's answers."""

import subprocess
import sys
from collections import Counter

import pytest

from helpers import ROOT
from panollava.evaluation.captions import Scores
from panollava.evaluation.grounding import (
    DERANGEMENTS,
    grounding_gap,
    mean_scores,
    reported_score,
    swapped_answers,
)

# "who" is asked of panorama 4 only; panorama 3 is not asked "where".
QUERIES = {0: ["what", "where"], 1: ["where", "what"], 2: ["what", "where"], 3: ["what"]}
ANSWERS = {
    **{(panorama, q): f"{q} in {panorama}" for panorama, texts in QUERIES.items() for q in texts},
    (4, "who"): "who in 4",
    (4, "what"): "what in 4",
}


def test_a_swapped_answer_is_another_panorama_s_own_answer_to_the_same_query() -> None:
    swaps = swapped_answers(ANSWERS)
    assert len(swaps) == DERANGEMENTS == 5
    for swapped in swaps:
        assert swapped.keys() == ANSWERS.keys() - {(4, "who")}
        for query, askable in (("what", {0, 1, 2, 3, 4}), ("where", {0, 1, 2})):
            partners = {p: int(text.split()[-1]) for (p, q), text in swapped.items() if q == query}
            assert partners.keys() == set(partners.values()) == askable
            assert all(partner != panorama for panorama, partner in partners.items())
        assert all(text.split()[0] == query for (_, query), text in swapped.items())


def test_partners_differ_between_draws_and_between_queries() -> None:
    answers = {(panorama, q): f"{panorama}" for panorama in range(40) for q in ("what", "where")}
    swaps = swapped_answers(answers)
    partners = {
        (number, query): tuple(swapped[panorama, query] for panorama in range(40))
        for number, swapped in enumerate(swaps)
        for query in ("what", "where")
    }
    assert len(set(partners.values())) == 2 * DERANGEMENTS
    # No panorama answers for the same one in most draws.
    assert max(Counter(swapped[0, "what"] for swapped in swaps).values()) <= 2


def test_the_draws_depend_on_nothing_but_the_panoramas_asked() -> None:
    """Not on the process, and not on other queries."""
    code = (
        "from panollava.evaluation.grounding import swapped_answers\n"
        "swapped = swapped_answers({(p, 'what'): str(p) for p in range(9)})[1]\n"
        "print([swapped[p, 'what'] for p in range(9)])"
    )
    alone = subprocess.check_output(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT / "src"), "PYTHONHASHSEED": "7"},
        text=True,
    )
    texts = {(p, query): str(p) for p in range(9) for query in ("where", "what")}
    among_others = swapped_answers(texts)[1]
    assert alone.strip() == str([among_others[p, "what"] for p in range(9)])


def test_two_panoramas_swap_their_answers_in_every_draw() -> None:
    answers = {(3, "what"): "a", (8, "what"): "b"}
    assert swapped_answers(answers) == [{(3, "what"): "b", (8, "what"): "a"}] * DERANGEMENTS


def test_queries_asked_of_one_panorama_only_cannot_be_swapped() -> None:
    assert swapped_answers({(0, "what"): "a", (1, "where"): "b"}) == []


def test_scores_are_averaged_over_draws() -> None:
    one = Scores({"rouge_l": 0.5, "captions": 2, "tokenizer": "t"}, {"rouge_l": {1: 0.0, 2: 1.0}})
    other = Scores({"rouge_l": 0.2, "bleu_4": 0.1, "captions": 2}, {"rouge_l": {1: 0.4, 2: 0.0}})
    mean = mean_scores([one, other])
    assert mean.values == {"rouge_l": pytest.approx(0.35)}  # not bleu_4, which one draw lacks
    assert mean.each == {"rouge_l": {1: pytest.approx(0.2), 2: pytest.approx(0.5)}}


def test_the_gap_is_the_drop_of_the_scores_that_both_have() -> None:
    scores = Scores({"bleu_4": 0.5, "cider_d": 3.0, "captions": 2}, {"cider_d": {1: 2.0, 2: 4.0}})
    swapped = Scores({"cider_d": 1.0, "captions": 2}, {"cider_d": {1: 1.5, 2: 0.5}})
    gap = grounding_gap(scores, swapped)
    assert gap.values == {"cider_d": 2.0} and gap.each == {"cider_d": {1: 0.5, 2: 3.5}}
    assert reported_score(gap) == "cider_d"
    assert reported_score(Scores({"rouge_l": 0.1}, {})) == "rouge_l"
    assert reported_score(Scores({}, {})) is None
