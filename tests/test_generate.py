"""Batched greedy decoding gives the answers of transformers' `generate`."""

from pathlib import Path

import pytest
import torch

from helpers import ROOT, pair_head_rows, random_views, settings_for
from panollava.config import load_settings
from panollava.data.dialogue import Dialogue
from panollava.demo.questions import QUERIES
from panollava.model.generate import _PreallocatedLayer, answer
from panollava.model.panollava import build_model
from panollava.model.precision import autocast, cast_frozen_linears


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_batched_answers_equal_those_of_generate_query_by_query(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Also when some end early and their rows are dropped."""
    monkeypatch.setattr(_PreallocatedLayer, "CHUNK", chunk)
    monkeypatch.chdir(ROOT)
    settings = load_settings(ROOT / "params.yaml")
    model, tokenizer = build_model(settings.model, settings.views)
    dialogue = Dialogue(tokenizer)
    monkeypatch.setattr(dialogue, "decode", list)
    torch.manual_seed(0)
    features = model.eval().features(torch.randint(256, (3, 8, 64, 64, 3)).to(torch.uint8))
    texts = list(QUERIES.values())
    queries = [texts, texts[:1], texts[4:]]
    embed = model.language_model.get_input_embeddings()
    before = embed(torch.tensor([dialogue.text_prefix]))
    model.language_model.generation_config.eos_token_id = None
    endless = []
    for vision, panorama in zip(model.vision_tokens(features), queries, strict=True):
        after = [embed(torch.tensor([dialogue.query(query)])) for query in panorama]
        generated = [
            model.language_model.generate(  # type: ignore[operator]
                inputs_embeds=torch.cat([before, vision[None], query], dim=1),
                max_new_tokens=20,
                do_sample=False,
                pad_token_id=dialogue.pad,
            )
            for query in after
        ]
        endless.append([row.tolist() for (row,) in generated])

    def cut(stop: int) -> list[list[list[int]]]:
        return [
            [row[: row.index(stop)] if stop in row else row for row in rows] for rows in endless
        ]

    def lengths(stop: int) -> set[int]:
        return {len(row) for rows in cut(stop) for row in rows}

    tokens = {token for rows in endless for row in rows for token in row}
    *_, one, other = sorted(tokens, key=lambda token: (len(lengths(token)), token))
    assert min(len(lengths(one)), len(lengths(other))) > 4, "answers of many lengths"
    for stop in (dialogue.stop, one, other):
        monkeypatch.setattr(dialogue, "ends", frozenset([stop]))
        assert answer(model, dialogue, features, queries, max_new_tokens=20) == cut(stop)
    # As many queries as panoramas, but not one of each.
    uneven = answer(model, dialogue, features, [[], texts[:1], texts[4:6]], max_new_tokens=20)
    assert uneven == [[], cut(other)[1], cut(other)[2][:2]]


def test_answers_are_decided_in_float32_also_under_autocast(towers: Path) -> None:
    """Of two rows of the head that are equal in bf16, the second one wins in float32."""
    settings = settings_for(towers)
    model, tokenizer = build_model(settings.model, settings.views)
    model.eval().requires_grad_(False)
    pair_head_rows(model.language_model)
    cast_frozen_linears(model, "bf16-mixed")
    dialogue = Dialogue(tokenizer)
    answers: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch, autocast(torch.device("cpu"), "bf16-mixed"):
        patch.setattr(dialogue, "decode", lambda tokens: answers.append(tokens))
        patch.setattr(dialogue, "ends", frozenset())
        features = model.features(random_views(2))
        answer(model, dialogue, features, [["what", "where"], ["what"]], max_new_tokens=5)
    assert [len(tokens) for tokens in answers] == [5, 5, 5]
    assert all(token % 2 for tokens in answers for token in tokens)
