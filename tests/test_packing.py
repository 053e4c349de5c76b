"""Packed rows attend to the shared prefix and to themselves; only answers are supervised."""

import pytest
import torch
from transformers import AutoTokenizer

from panollava.data.dialogue import Dialogue
from panollava.data.packing import PADDING, Row, attention_mask, pack
from panollava.errors import UserError


@pytest.fixture
def dialogue(towers) -> Dialogue:
    return Dialogue(AutoTokenizer.from_pretrained(towers / "language_model"), 64)


def test_a_row_attends_only_to_the_prefix_and_to_itself(dialogue) -> None:
    rows = [dialogue.row("what", "the red box"), dialogue.row("where", "left")]
    packed = pack(dialogue.text_prefix, 5, [rows, rows[:1]], dialogue.pad)
    mask = attention_mask(packed.segments)[:, 0]
    start = len(dialogue.text_prefix) + 5
    for sequence in range(2):
        for i in range(mask.shape[1]):
            query = packed.segments[sequence, i]
            for j in range(mask.shape[2]):
                key = packed.segments[sequence, j]
                expected = j <= i and key != PADDING and key in (0, query)
                assert mask[sequence, i, j] == (expected or i == j)
    assert (packed.segments[1] == PADDING).any()
    second = packed.positions[0][packed.segments[0] == 2]
    assert second.tolist() == list(range(start, start + len(rows[1])))
    assert packed.positions[:, :start].tolist() == [list(range(start))] * 2
    prefix = packed.tokens[:, : len(dialogue.text_prefix)]
    assert prefix.tolist() == [dialogue.text_prefix] * 2
    assert packed.tokens.shape == (2, start + len(rows[0]) + len(rows[1]))


def test_only_answer_tokens_are_supervised(dialogue) -> None:
    rows = [dialogue.row("what", "the red box"), dialogue.row("where", "left")]
    packed = pack(dialogue.text_prefix, 5, [rows[1:], rows], dialogue.pad)
    assert packed.labels.tolist() == rows[1].answer + rows[0].answer + rows[1].answer
    following = packed.tokens.flatten()[packed.predicts + 1]
    assert torch.equal(following, packed.labels)


def test_a_row_without_a_supervised_token_is_an_error() -> None:
    with pytest.raises(UserError, match="no supervised answer token"):
        pack([1], 5, [[Row([2], [3]), Row([2], [])]], pad=0)
