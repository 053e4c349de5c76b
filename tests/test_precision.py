"""Frozen parts in half precision compute what autocast computes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import settings_for
from panollava.data.dialogue import Dialogue
from panollava.data.packing import pack
from panollava.model.device import autocast, cast_frozen_linears
from panollava.model.panollava import PanoLLaVA, build_model
from panollava.training.objective import freeze_all_but
from test_language_models import KINDS, built, with_language_model
from test_model import ROWS, loss_of, random_views

TRAINS = ("encoder", "resampler", "projector")
CPU = torch.device("cpu")


def make(towers: Path) -> tuple[PanoLLaVA, Dialogue]:
    own = settings_for(towers)
    model, tokenizer = build_model(own.model, own.views, seed=0)
    freeze_all_but(model, TRAINS)
    return model, Dialogue(tokenizer, 64)


def step(
    model: PanoLLaVA, dialogue: Dialogue, panoramas: int = 2, precision: str = "32-true"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step and its gradients."""
    rows = [[dialogue.row(*row) for row in own] for own in ROWS][:panoramas]
    views = random_views(panoramas)
    model.zero_grad()
    with autocast(CPU, precision):
        features = model.features(views)
        packed = pack(dialogue.prefix, features[0, ..., 0].numel(), rows, dialogue.pad)
        loss = model.loss_sum(features, packed, len(dialogue.prefix))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def test_a_frozen_part_in_half_precision_computes_what_autocast_does(towers: Path) -> None:
    model, dialogue = make(towers)
    language = sum(p.nbytes for p in model.language_model.parameters())
    loss, grads = step(model, dialogue, precision="bf16-mixed")
    cast_frozen_linears(model, "32-true", keep=TRAINS)
    assert language == sum(p.nbytes for p in model.language_model.parameters())
    cast_frozen_linears(model, "bf16-mixed", keep=TRAINS)
    held, held_grads = step(model, dialogue, precision="bf16-mixed")
    assert torch.equal(loss, held) and grads.keys() == held_grads.keys() != set()
    assert all(torch.equal(grads[name], held_grads[name]) for name in grads)
    halved = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert halved and all(name.startswith("language_model.") for name in halved)
    assert not any("embed" in name or "norm" in name for name in halved)
    # A tied head is the embedding.
    assert model.language_model.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_that_holds_for_language_models_of_many_kinds(
    kind: str, towers: Path, tmp_path: Path
) -> None:
    model, dialogue = built(with_language_model(tmp_path, towers, kind, **KINDS[kind]))
    views = random_views(2)
    with torch.no_grad(), autocast(CPU, "bf16-mixed"):
        plain = loss_of(model, dialogue, views, ROWS)
        cast_frozen_linears(model, "bf16-mixed")
        assert torch.equal(loss_of(model, dialogue, views, ROWS), plain)
