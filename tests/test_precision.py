"""Frozen layers in bf16 change no result."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from helpers import ROWS, packed_loss, random_views, settings_for
from panollava.data.dialogue import Dialogue
from panollava.model.network import build_model
from panollava.model.precision import autocast, cast_frozen_linears

TRAINS = ("encoder", "resampler", "projector")


def test_frozen_linears_cast_to_bf16_compute_what_autocast_does(towers: Path) -> None:
    settings = settings_for(towers)
    model, tokenizer = build_model(settings.model, settings.views, seed=0)
    model.eval().language_model.requires_grad_(False)
    dialogue = Dialogue(tokenizer, 64)

    def loss_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        with autocast(torch.device("cpu"), "bf16-mixed"):
            loss = packed_loss(model, dialogue, random_views(2), ROWS)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), grads

    def bf16() -> set[str]:
        return {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}

    loss, grads = loss_and_gradients()
    cast_frozen_linears(model, "32-true", keep=TRAINS)
    assert not bf16()
    cast_frozen_linears(model, "bf16-mixed", keep=TRAINS)
    cast_loss, cast_grads = loss_and_gradients()
    assert torch.equal(loss, cast_loss) and grads.keys() == cast_grads.keys() != set()
    assert all(torch.equal(grads[name], cast_grads[name]) for name in grads)
    assert bf16() and all(name.startswith("language_model.") for name in bf16())
    assert not any("embed" in name or "norm" in name for name in bf16())


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_stays_in_float32(tied: bool) -> None:
    config = Qwen2Config(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    language_model = Qwen2ForCausalLM(config)
    cast_frozen_linears(nn.ModuleDict({"language_model": language_model}), "bf16-mixed")
    halved = {n for n, p in language_model.named_parameters() if p.dtype == torch.bfloat16}
    assert any("mlp" in name for name in halved)
    assert language_model.lm_head.weight.dtype == torch.float32
