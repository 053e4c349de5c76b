"""Language models of many kinds, small and with random weights: packed losses and answers from a
shared cache equal those of separate sequences."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from helpers import (
    ROWS,
    change,
    packed_loss,
    random_views,
    save_tokenizer,
    separate_losses,
    settings_for,
)
from panollava.config import Settings
from panollava.data.dialogue import Dialogue
from panollava.data.packing import pack
from panollava.errors import UserError
from panollava.model.generate import answer
from panollava.model.network import Network, build_model
from panollava.model.precision import autocast, cast_frozen_linears
from panollava.planning.lengths import check_lengths

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # With the default one, random weights hardly attend, and repeat one token.
    "initializer_range": 0.3,
}
# Together: attention without SDPA and with sinks, experts, logits scaled or capped, scaled
# embeddings, learned positions.
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
        "init_std": 0.3,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
}


def with_language_model(folder: Path, towers: Path, kind: str, **values: Any) -> Settings:
    """Settings with the encoder of `towers` and a small language model of type `kind`."""
    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder)
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    kind_of_config: Any = CONFIG_MAPPING[kind]
    config = kind_of_config(vocab_size=len(tokenizer), **tokens, **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = settings_for(towers)
    pretrained = dataclasses.replace(settings.model.language_model, path=str(folder))
    model = dataclasses.replace(settings.model, language_model=pretrained)
    return dataclasses.replace(settings, model=model)


def built(settings: Settings) -> tuple[Network, Dialogue]:
    model, tokenizer = build_model(settings.model, settings.views, seed=0)
    return model.eval(), Dialogue(tokenizer, 99)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_answers_equal_those_of_separate_sequences(
    kind: str, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dialogue = built(with_language_model(tmp_path, towers, kind, **KINDS[kind]))
    views = random_views(2)
    with torch.no_grad():
        packed = float(packed_loss(model, dialogue, views, ROWS))
        separate = separate_losses(model, dialogue, views)
    assert packed == pytest.approx(sum(separate), rel=1e-5)

    monkeypatch.setattr(dialogue, "decode", list)
    monkeypatch.setattr(dialogue, "whole_characters", list)
    monkeypatch.setattr(dialogue, "ends", frozenset())
    steps: list[torch.Tensor] = []
    logits_of = model.logits

    def recorded(hidden: torch.Tensor) -> torch.Tensor:
        steps.append(logits_of(hidden))
        return steps[-1]

    monkeypatch.setattr(model, "logits", recorded)
    queries = [[query for query, _ in rows] for rows in ROWS]
    with torch.no_grad():
        features = model.features(views)
        vision = model.vision_tokens(features)
        answers = answer(model, dialogue, features, queries, max_new_tokens=6)
        decoded = iter(torch.stack(steps, dim=1))  # of each query, the logits of its answer
        for panorama, texts in enumerate(queries):
            for query, (text, _) in zip(texts, answers[panorama], strict=True):
                tokens = list(text)
                after = model.embed(torch.tensor([dialogue.query(query) + tokens]))
                before = model.embed(torch.tensor([dialogue.text_prefix]))
                embedded = torch.cat([before, vision[panorama : panorama + 1], after], dim=1)
                logits = model.language_model(inputs_embeds=embedded).logits[0]
                expected = logits[-len(tokens) - 1 : -1]
                assert expected.argmax(dim=-1).tolist() == tokens
                assert (next(decoded) - expected).abs().max() < 1e-3 * expected.std()


@pytest.mark.parametrize("kind", KINDS)
def test_linears_cast_to_bf16_compute_what_autocast_does(
    kind: str, towers: Path, tmp_path: Path
) -> None:
    model, dialogue = built(with_language_model(tmp_path, towers, kind, **KINDS[kind]))
    views = random_views(2)
    with torch.no_grad(), autocast(torch.device("cpu"), "bf16-mixed"):
        loss = packed_loss(model, dialogue, views, ROWS)
        cast_frozen_linears(model, "bf16-mixed")
        assert torch.equal(packed_loss(model, dialogue, views, ROWS), loss)


def test_a_language_model_that_cannot_process_packed_rows_is_an_error(
    towers: Path, tmp_path: Path
) -> None:
    settings = with_language_model(tmp_path, towers, "bloom", hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(
        UserError, match=r"language_model.path: .* a 'bloom' model, cannot process packed rows"
    ):
        build_model(settings.model, settings.views)


def test_a_language_model_that_ignores_the_mask_is_an_error(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As remote code from a hub may."""
    settings = with_language_model(tmp_path, towers, "gemma2", **SMALL)
    hidden_states = Network.hidden_states

    def unmasked(self: Network, embedded: Any, mask: Any, positions: Any, **cache: Any) -> Any:
        return hidden_states(self, embedded, torch.ones_like(mask), positions, **cache)

    monkeypatch.setattr(Network, "hidden_states", unmasked)
    with pytest.raises(
        UserError, match="computes different logits for packed rows than for separate"
    ):
        build_model(settings.model, settings.views)


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("gemma3_text", {"sliding_window": 40}), ("gpt2", {"n_positions": 40})],
)
def test_a_sequence_that_is_too_long_is_an_error(
    kind: str, limit: dict[str, int], towers: Path, tmp_path: Path
) -> None:
    settings = with_language_model(tmp_path, towers, kind, **{**KINDS[kind], **limit})
    model, dialogue = built(settings)
    features = model.features(random_views(1))
    with pytest.raises(UserError, match=r"attends to 40 tokens.*lower evaluate.max_new_tokens"):
        answer(model, dialogue, features, [["what"]], max_new_tokens=8)
    rows = [[dialogue.row("what", "left")]]
    packed = pack(dialogue.text_prefix, 4 * 8, rows, dialogue.pad)
    with pytest.raises(UserError, match="attends to 40 tokens"):
        model.check_length(packed.tokens.shape[1], "")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a layer", "is missing"),
        ("all", "is missing"),
        ("a shape", r"has shape \(\d+, \d+\), expected \(\d+, \d+\)"),
        ("more", "is not in the model"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(
    kind: str, name: str, problem: str, towers: Path, tmp_path: Path
) -> None:
    settings = with_language_model(tmp_path, towers, kind, **KINDS[kind])
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    stack = next(key.partition(".1.")[0] for key in weights if ".1." in key)
    layer = {key: value for key, value in weights.items() if key.startswith(f"{stack}.1.")}
    if name == "a layer":
        weights = {key: value for key, value in weights.items() if key not in layer}
    elif name == "all":
        weights = {f"other.{key}": value for key, value in weights.items()}
    elif name == "a shape":
        matrix = next(key for key, value in layer.items() if value.ndim == 2)
        weights[matrix] = weights[matrix][:-1].clone()
    else:
        more = {k.replace(f"{stack}.1.", f"{stack}.2."): v.clone() for k, v in layer.items()}
        weights |= more
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"model.language_model.path: {tmp_path}.*{problem}"):
        built(settings)


def test_a_head_of_its_own_must_be_there_and_others_may_be_more(
    towers: Path, tmp_path: Path
) -> None:
    settings = with_language_model(tmp_path, towers, "llama", **SMALL, tie_word_embeddings=False)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "score.weight": torch.zeros(2, 32)}, file, metadata={"format": "pt"})
    built(settings)
    weights.pop("lm_head.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"'lm_head.weight' is missing \(1 tensors differ\)"):
        built(settings)


BEYOND: dict[str, Any] = {
    "padding": lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}),
    "a word": lambda tokenizer: tokenizer.add_tokens(["[BOX]"]),
    "a control token of the prompt": lambda tokenizer: tokenizer.add_special_tokens(
        {"additional_special_tokens": ["assistant"]}
    ),
}


@pytest.mark.parametrize("kind", [*BEYOND, "an unused control token"])
def test_a_token_beyond_the_embedding_is_an_error_before_any_work(
    kind: str, towers: Path, tmp_path: Path
) -> None:
    settings = with_language_model(tmp_path / "tower", towers, "llama", **KINDS["llama"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tower")
    rows = len(tokenizer)
    if kind in BEYOND:
        BEYOND[kind](tokenizer)
    else:  # as Gemma 3's image token in models of text
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    assert len(tokenizer) == rows + 1
    tokenizer.save_pretrained(tmp_path / "tower")
    settings = change(settings, data__dir=str(tmp_path))  # without rows
    if kind in BEYOND:
        with pytest.raises(UserError, match=f"as token {rows}, but the embedding has {rows} rows"):
            check_lengths(settings)
    else:
        check_lengths(settings)
