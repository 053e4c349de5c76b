"""The objective on answer tokens: which rows it reads, and how long they may be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from helpers import change, pair_head_rows, run_stage, save_tokenizer
from panollava.config import Settings
from panollava.data.batches import TextBatch
from panollava.errors import UserError
from panollava.model.precision import autocast
from panollava.stages import STAGES
from panollava.training.answer_objective import Objective


def test_labeled_is_the_share_of_panoramas_whose_rows_are_used(settings: Settings) -> None:
    kept = []
    for share in (1.0, 0.5, 0.01):
        objective = Objective(
            STAGES["resampler"], change(settings, stage__resampler__labeled=share)
        )
        objective.open_readers()
        train, valid = objective.readers["train"], objective.readers["valid"]
        kept.append({panorama: len(rows) for panorama, rows in train.by_panorama.items()})
        assert len(valid.rows) == 3
        planned = {panorama for step in train.plan(0) for panorama, _ in step}
        assert planned == kept[-1].keys()
    every, half, one = kept
    assert len(half) == round(len(every) / 2) and len(one) == 1  # with all their rows
    assert one.items() <= half.items() <= every.items()


def test_rows_that_are_too_long_for_the_language_model_are_an_error(
    settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "gpt2"
    tokenizer = save_tokenizer(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=40, n_embd=32, n_head=4, n_layer=1,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    run_stage("vision", change(settings, stage__vision__epochs=0))
    with pytest.raises(UserError, match=r"attends to 40 tokens.*max_text_length \(99\)"):
        run_stage("resampler", change(settings, model__language_model__path=str(folder)))


def test_validation_compares_float32_logits_also_under_autocast(settings: Settings) -> None:
    """Of two rows of the head that are equal in bf16, the second one wins in float32."""
    objective = Objective(STAGES["resampler"], settings)
    model = objective.model.eval().requires_grad_(False)
    pair_head_rows(model.language_model)
    dialogue = objective.dialogue
    rows = [dialogue.row("what", "the red box is left."), dialogue.row("where", "behind.")]
    views = torch.randint(256, (2, *objective.vision_shape), dtype=torch.uint8)
    part = objective.blank([[row] for row in rows])._replace(vision=views)
    with autocast(torch.device("cpu"), "bf16-mixed"):
        predicted = exact_logits(objective, part).argmax(dim=-1)
        assert predicted.remainder(2).all(), "the second row of each pair"
        part = part._replace(packed=part.packed._replace(labels=predicted))
        values, count = objective.validate([part])
        logits = exact_logits(objective, part)
    assert values["accuracy"] == count == len(predicted)
    expected = functional.cross_entropy(logits, predicted, reduction="sum")
    assert float(values["loss"]) == pytest.approx(float(expected), rel=1e-6)


def exact_logits(objective: Objective, part: TextBatch) -> Tensor:
    """From the hidden states of autocast, by the head in double precision."""
    states: list[Tensor] = []
    model = objective.model
    head: Any = model.language_model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    model.loss_sum(model.features(part.vision), part.packed, objective.text_prefix)
    handle.remove()
    return (states[0].double() @ head.weight.double().T).float()
