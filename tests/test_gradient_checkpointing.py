"""Gradient checkpointing gives the same gradients, and keeps less for them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from conftest import ROWS, random_views, settings_for
from panollava.data.dialogue import Dialogue
from panollava.data.packing import pack
from panollava.errors import UserError
from panollava.model.panollava import build_model
from panollava.stages import STAGES
from panollava.training.objective import freeze_all_but
from panollava.training.tower_layers import checkpoint_layers


class Kept:
    """Counts the bytes that autograd keeps for the way back, each storage once."""

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


def loss_gradients_and_kept(
    towers: Path, trains: tuple[str, ...], checkpointed: bool
) -> tuple[float, dict[str, Tensor], int]:
    own = settings_for(towers)
    model, tokenizer = build_model(own.model, own.views, seed=0)
    dialogue = Dialogue(tokenizer, 64)
    freeze_all_but(model, trains)
    if checkpointed:
        checkpoint_layers(model)
    rows = [[dialogue.row(*row) for row in each] for each in ROWS]
    with Kept() as kept:
        features = model.features(random_views(2))
        if "encoder" not in trains:
            features = features.detach()
        packed = pack(dialogue.text_prefix, features[0, ..., 0].numel(), rows, dialogue.pad)
        loss = model.loss_sum(features, packed, len(dialogue.text_prefix))
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, kept.bytes


@pytest.mark.parametrize("stage", ["resampler", "finetune"])
def test_the_same_loss_and_gradients_with_less_kept(towers: Path, stage: str) -> None:
    trains = STAGES[stage].trains
    loss, gradients, kept = loss_gradients_and_kept(towers, trains, False)
    other, others, fewer = loss_gradients_and_kept(towers, trains, True)
    assert other == pytest.approx(loss, abs=1e-6)
    assert {name.split(".")[0] for name in gradients} == set(trains)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], rtol=1e-6, atol=1e-6), name
    assert fewer < 0.5 * kept


def test_a_frozen_part_that_would_drop_values_out_is_an_error() -> None:
    config = OPTConfig(
        vocab_size=9, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=8,
    )  # fmt: skip
    model = nn.ModuleDict({"language_model": OPTForCausalLM(config)}).eval()
    with pytest.raises(UserError, match=r"gradient_checkpointing: .* a 'opt' model would drop"):
        checkpoint_layers(model)
    model["language_model"].train()
    checkpoint_layers(model)
