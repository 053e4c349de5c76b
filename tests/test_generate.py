"""Batched greedy decoding gives the answers of transformers' `generate`."""

from pathlib import Path

import pytest
import torch

from helpers import ROOT, pair_head_rows, random_views, settings_for
from panollava.config import load_settings
from panollava.data.dialogue import Dialogue
from panollava.demo.questions import QUERIES
from panollava.model import generate
from panollava.model.generate import Answer, Sampling, _PreallocatedLayer, answer
from panollava.model.network import Network, build_model
from panollava.model.precision import autocast, cast_frozen_linears


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> tuple[Network, Dialogue]:
    """The demo's towers, with an untrained resampler."""
    monkeypatch.chdir(ROOT)
    settings = load_settings(ROOT / "params.yaml")
    model, tokenizer = build_model(settings.model, settings.views)
    return model.eval(), Dialogue(tokenizer, 99)


def random_features(model: Network) -> torch.Tensor:
    """Of three panoramas."""
    torch.manual_seed(0)
    return model.features(torch.randint(256, (3, 8, 64, 64, 3)).to(torch.uint8))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_batched_answers_equal_those_of_generate_query_by_query(
    demo: tuple[Network, Dialogue], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Also when some end early and their rows are dropped."""
    monkeypatch.setattr(_PreallocatedLayer, "CHUNK", chunk)
    model, dialogue = demo
    monkeypatch.setattr(dialogue, "decode", list)
    monkeypatch.setattr(dialogue, "whole_characters", list)
    features = random_features(model)
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
    assert min(len(lengths(one)), len(lengths(other))) > 3, "answers of many lengths"

    def tokens_of(queries: list[list[str]]) -> list[list[str]]:
        answers = answer(model, dialogue, features, queries, max_new_tokens=20)
        # An answer is cut if its end token is not among the first 20.
        assert all(a.cut == (len(a.text) == 20) for each in answers for a in each)
        return [[a.text for a in each] for each in answers]

    for stop in (dialogue.stop, one, other):
        monkeypatch.setattr(dialogue, "ends", frozenset([stop]))
        assert tokens_of(queries) == cut(stop)
    # As many queries as panoramas, but not one of each.
    assert tokens_of([[], texts[:1], texts[4:6]]) == [[], cut(other)[1], cut(other)[2][:2]]


@pytest.mark.parametrize("before", [True, False], ids=["text before the image", "none"])
def test_answers_without_a_picture_are_those_to_the_text_alone(
    demo: tuple[Network, Dialogue], monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    model, dialogue = demo
    if not before:  # as chat templates that begin with the user's text
        monkeypatch.setattr(dialogue, "text_prefix", [])
    texts = list(QUERIES.values())
    answers = answer(model, dialogue, None, [[text] for text in texts], max_new_tokens=9)
    for text, [(found, cut)] in zip(texts, answers, strict=True):
        prompt = torch.tensor([dialogue.text_prefix + dialogue.query(text)])
        [generated] = model.language_model.generate(  # type: ignore[operator]
            prompt, max_new_tokens=9, do_sample=False, eos_token_id=[*dialogue.ends]
        ).tolist()
        tokens = generated[prompt.shape[1] :]
        assert found == dialogue.decode(tokens) and cut == (dialogue.stop not in tokens)
    assert len({found for [(found, _)] in answers}) > 3


def test_an_answer_is_cut_if_its_end_token_does_not_fit(demo: tuple[Network, Dialogue]) -> None:
    model, dialogue = demo
    features, queries = random_features(model), [list(QUERIES.values())] * 3
    long = answer(model, dialogue, features, queries, max_new_tokens=48)
    length = {
        (panorama, query): len(dialogue.row(query, text).answer)  # with the end token
        for panorama, texts in enumerate(long)
        for query, (text, _) in zip(queries[panorama], texts, strict=True)
    }
    limit = sorted(length.values())[len(length) // 2]
    short = answer(model, dialogue, features, queries, max_new_tokens=limit)
    cut = [found.cut for texts in short for found in texts]
    assert cut == [tokens > limit for tokens in length.values()] and 0 < sum(cut) < len(cut)
    assert limit in length.values()  # the end token is the last one that fits


def test_an_answer_has_no_half_characters(
    demo: tuple[Network, Dialogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dialogue = demo
    box = dialogue._tokens("빨")
    monkeypatch.setattr(generate, "_decode", lambda *_: [[*box, *box[:2]], box[:2]])
    features = random_features(model)[:1]
    assert answer(model, dialogue, features, [["a", "b"]], max_new_tokens=5) == [
        [("빨", True), ("", False)]
    ]


def test_an_answer_can_be_stopped_beside_others(demo: tuple[Network, Dialogue]) -> None:
    model, dialogue = demo
    arguments = model, dialogue, random_features(model)[:1], [list(QUERIES.values())[:3]]
    (expected,) = answer(*arguments, 12)
    (stopped,) = answer(*arguments, 12, report=lambda index, tokens: index == 1 and len(tokens) > 2)
    assert (stopped[0], stopped[2]) == (expected[0], expected[2])
    assert expected[1].text.startswith(stopped[1].text) and not stopped[1].cut
    assert len(dialogue._tokens(stopped[1].text)) == 3


def test_each_query_can_have_its_seed(demo: tuple[Network, Dialogue]) -> None:
    model, dialogue = demo
    features, query = random_features(model)[:1], "what is behind?"

    def sample(count: int, seed: int | tuple[int, ...]) -> list[Answer]:
        sampling = Sampling(2.0, seed=seed)
        return answer(model, dialogue, features, [[query] * count], 8, sampling)[0]

    assert sample(3, (7, 2, 7)) == [*sample(1, 7), *sample(1, 2), *sample(1, 7)]
    assert sample(2, 7) == sample(2, (7, 8)) and sample(1, 7) != sample(1, 8)


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
