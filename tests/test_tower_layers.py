"""Gradient checkpointing and compiled layers: the same gradients, in less memory or faster."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from helpers import (
    ROWS,
    Killed,
    change,
    curve,
    outputs,
    random_views,
    run_stage,
    settings_for,
    weights,
)
from panollava import paths
from panollava.config import Settings
from panollava.data.dialogue import Dialogue
from panollava.data.packing import pack
from panollava.errors import UserError
from panollava.model.network import Network, build_model
from panollava.stages import STAGES
from panollava.training import curves
from panollava.training.lightning_module import LitStage
from panollava.training.objective import freeze_all_but
from panollava.training.tower_layers import checkpoint_layers, compile_layers


class Kept:
    """Counts the bytes that autograd stores for the backward pass, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, Tensor] = {}

    def __enter__(self) -> "Kept":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            self.storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages.values())


def build(towers: Path, trains: tuple[str, ...]) -> tuple[Network, Dialogue]:
    settings = settings_for(towers)
    model, tokenizer = build_model(settings.model, settings.views, seed=0)
    freeze_all_but(model, trains)
    return model, Dialogue(tokenizer, 64)


def step(model: Network, dialogue: Dialogue, panoramas: int) -> tuple[float, dict, int]:
    """Loss, gradients and stored bytes of a step on the first `panoramas`."""
    model.zero_grad()
    rows = [[dialogue.row(*row) for row in each] for each in ROWS[:panoramas]]
    with Kept() as kept:
        features = model.features(random_views(panoramas))
        packed = pack(dialogue.text_prefix, features[0, ..., 0].numel(), rows, dialogue.pad)
        loss = model.loss_sum(features, packed, len(dialogue.text_prefix))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, kept.bytes


@pytest.mark.parametrize("stage", ["resampler", "finetune"])
def test_checkpointing_gives_the_same_gradients_and_stores_less(towers: Path, stage: str) -> None:
    trains = STAGES[stage].trains
    model, dialogue = build(towers, trains)
    loss, gradients, kept = step(model, dialogue, 2)
    checkpoint_layers(model)
    other, others, fewer = step(model, dialogue, 2)
    assert other == pytest.approx(loss, abs=1e-6)
    assert {name.split(".")[0] for name in gradients} == set(trains)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], rtol=1e-6, atol=1e-6), name
    assert fewer < 0.5 * kept


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_random_states_are_saved_only_for_dropout(
    towers: Path, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph cannot save them."""
    model, dialogue = build(towers, STAGES["resampler"].trains)
    encoder: Any = model.encoder
    for layer in encoder.tower.encoder.layers:
        layer.self_attn.dropout = rate
    checkpoint_layers(model)
    state, saved = torch.get_rng_state, []

    def count() -> Tensor:
        saved.append(1)
        return state()

    monkeypatch.setattr(torch, "get_rng_state", count)
    step(model, dialogue, 2)
    assert bool(saved) == bool(rate)


def test_dropout_in_a_checkpointed_frozen_part_is_an_error() -> None:
    config = OPTConfig(
        vocab_size=9, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=8,
    )  # fmt: skip
    model = nn.ModuleDict({"language_model": OPTForCausalLM(config)}).eval()
    with pytest.raises(UserError, match=r"gradient_checkpointing: .* a 'opt' model would apply"):
        checkpoint_layers(model)
    model["language_model"].train()
    checkpoint_layers(model)


def test_a_tower_that_cannot_be_checkpointed_is_an_error(
    towers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = build(towers, STAGES["finetune"].trains)
    monkeypatch.setattr(type(model.language_model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"gradient_checkpointing: .* do not support it; set it to"):
        checkpoint_layers(model)


def test_exactly_the_layers_of_the_towers_are_compiled(towers: Path) -> None:
    model, _ = build(towers, STAGES["finetune"].trains)
    compile_layers(model)
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    kinds = {type(module).__name__ for module in compiled}
    assert kinds == {"SiglipEncoderLayer", "Qwen2DecoderLayer"}


@pytest.mark.parametrize("stage", ["vision", "resampler"])
def test_checkpointing_stays_enabled_after_each_validation(
    settings: Settings, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = change(settings, stage__vision__epochs=2)
    run_stage("vision", settings)
    kept: list[int] = []
    training_step: Callable[..., None] = LitStage.training_step

    def counted(*arguments: object) -> None:
        with Kept() as stored:
            training_step(*arguments)
        kept.append(stored.bytes)

    monkeypatch.setattr(LitStage, "training_step", counted)
    results = []
    for checkpointed in (False, True):
        shutil.rmtree(paths.RESUME)
        kept.clear()
        run_stage(stage, change(settings, trainer__gradient_checkpointing=checkpointed))
        results.append((weights(stage), curve(stage, "train/loss"), kept[:]))
    (one, losses, much), (other, others, less) = results
    assert losses == pytest.approx(others, rel=1e-6) and len(losses) == len(much) > 2
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-6) for name in one)
    assert all(few < 0.6 * many for few, many in zip(less, much, strict=True)), (much, less)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointed", "shapes"), [(False, (2, 1)), (True, (2,))])
# The limit must be the project's: beyond torch's own limit, nothing is compiled.
@torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
def test_compiled_layers_give_the_same_gradients_for_any_shape(
    towers: Path, checkpointed: bool, shapes: tuple[int, ...]
) -> None:
    torch._dynamo.reset()
    model, dialogue = build(towers, STAGES["resampler"].trains)
    names = list(model.state_dict())
    if checkpointed:
        checkpoint_layers(model)
    eager = [step(model, dialogue, panoramas) for panoramas in shapes]
    compile_layers(model)
    torch._dynamo.utils.counters.clear()
    for (loss, gradients, _), panoramas in zip(eager, shapes, strict=True):
        other, others, _ = step(model, dialogue, panoramas)
        assert other == pytest.approx(loss, rel=1e-5)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(others[name], gradient, rtol=1e-3, atol=1e-6), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_a_killed_stage_with_compiled_layers_resumes_to_the_same_bytes(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The resumed run meets shapes in another order."""
    settings = change(settings, trainer__compile=True, stage__vision__epochs=0)
    run_stage("vision", settings)
    torch._dynamo.reset()
    run_stage("resampler", settings)
    expected = outputs("resampler")
    shutil.rmtree(paths.RESUME)
    steps = 0

    def die(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise Killed

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(curves.Speed, "on_train_batch_end", die)
        with pytest.raises(Killed):
            run_stage("resampler", settings)
    torch._dynamo.reset()
    run_stage("resampler", settings)
    assert outputs("resampler") == expected
