"""Language models of many kinds, small and with random weights: rows packed behind one panorama,
and answers from one cache, are what the model itself makes of each row alone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from conftest import save_tokenizer, settings_for
from panollava.config import Settings
from panollava.data.dialogue import Dialogue
from panollava.data.packing import pack
from panollava.errors import UserError
from panollava.model.generate import answer
from panollava.model.panollava import PanoLLaVA, build_model
from test_model import ROWS, loss_of, random_views, separate_losses

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
# What each does that others don't: attention without SDPA, with sinks, experts, logits scaled or
# capped, scaled embeddings, learned positions.
KINDS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 400},
    "gemma": SMALL,
    "gemma2": {**SMALL, "final_logit_softcapping": 0.3, "sliding_window": 400},
    "gemma3_text": {**SMALL, "sliding_window": 400, "layer_types": None},
    "gpt_oss": {**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 400},
    "granite": {**SMALL, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "cohere": {**SMALL, "logit_scale": 0.0625},
    "phi3": SMALL,
    "qwen3": SMALL,
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def with_language_model(folder: Path, towers: Path, kind: str, **values: Any) -> Settings:
    """Settings of a model with the encoder of `towers` and a language model of that kind."""
    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder)
    known = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    kind_of_config: Any = CONFIG_MAPPING[kind]
    config = kind_of_config(vocab_size=len(tokenizer), **known, **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = settings_for(towers)
    own = dataclasses.replace(settings.model.language_model, path=str(folder))
    model = dataclasses.replace(settings.model, language_model=own)
    return dataclasses.replace(settings, model=model)


def built(settings: Settings) -> tuple[PanoLLaVA, Dialogue]:
    model, tokenizer = build_model(settings.model, settings.views, seed=0)
    return model.eval(), Dialogue(tokenizer, 99)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_and_asked_as_it_would_be_alone(
    kind: str, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dialogue = built(with_language_model(tmp_path, towers, kind, **KINDS[kind]))
    views = random_views(2)
    with torch.no_grad():
        together = float(loss_of(model, dialogue, views, ROWS))
        alone = separate_losses(model, dialogue, views)
    assert together == pytest.approx(sum(alone), rel=1e-5)

    monkeypatch.setattr(dialogue, "decode", list)
    monkeypatch.setattr(dialogue, "stop", -1)
    queries = [[query for query, _ in own] for own in ROWS]
    with torch.no_grad():
        features = model.features(views)
        vision = model.vision_tokens(features)
        said = answer(model, dialogue, features, queries, max_new_tokens=6)
        for panorama, own in enumerate(queries):
            for query, text in zip(own, said[panorama], strict=True):
                tokens = list(text)
                after = model.embed(torch.tensor([dialogue.query(query) + tokens]))
                before = model.embed(torch.tensor([dialogue.prefix]))
                embedded = torch.cat([before, vision[panorama : panorama + 1], after], dim=1)
                logits = model.language_model(inputs_embeds=embedded).logits[0]
                assert logits[-len(tokens) - 1 : -1].argmax(dim=-1).tolist() == tokens


def test_one_that_cannot_keep_rows_apart_is_an_error(towers: Path, tmp_path: Path) -> None:
    settings = with_language_model(tmp_path, towers, "bloom", hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(UserError, match=r"language_model.path: .* a 'bloom' model, .* packed rows"):
        build_model(settings.model, settings.views)


def test_one_that_lets_rows_see_each_other_is_an_error(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attention that takes a mask for something else, as one of a hub's own code may."""
    settings = with_language_model(tmp_path, towers, "gemma2", **SMALL)
    hidden_states = PanoLLaVA.hidden_states

    def unmasked(self: PanoLLaVA, embedded: Any, mask: Any, positions: Any, **cache: Any) -> Any:
        return hidden_states(self, embedded, torch.ones_like(mask), positions, **cache)

    monkeypatch.setattr(PanoLLaVA, "hidden_states", unmasked)
    with pytest.raises(UserError, match="gives packed rows other logits than each by itself"):
        build_model(settings.model, settings.views)


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("gemma3_text", {"sliding_window": 40}), ("gpt2", {"n_positions": 40})],
)
def test_a_panorama_that_is_too_long_for_it_is_an_error(
    kind: str, limit: dict[str, int], towers: Path, tmp_path: Path
) -> None:
    settings = with_language_model(tmp_path, towers, kind, **{**KINDS[kind], **limit})
    model, dialogue = built(settings)
    features = model.features(random_views(1))
    with pytest.raises(UserError, match=r"attends to 40 tokens.*lower evaluate.max_new_tokens"):
        answer(model, dialogue, features, [["what"]], max_new_tokens=8)
    rows = [[dialogue.row("what", "left")]]
    packed = pack(dialogue.prefix, 4 * 8, rows, dialogue.pad)
    with pytest.raises(UserError, match="attends to 40 tokens"):
        model.check_length(packed.tokens.shape[1], "")
