"""The objective on answer tokens: which rows it reads, and how long they may be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from helpers import change, pair_head_rows, run_stage, save_language_model, save_tokenizer
from panollava import paths
from panollava.config import Settings
from panollava.data.batches import StepBatch, StepDataset, TextBatch, TextReader, turns
from panollava.data.images import read_panorama, roll
from panollava.data.prepare import prepare_project
from panollava.errors import UserError
from panollava.files import read_prepared_rows
from panollava.geometry.views import Sampler, layout
from panollava.model.network import build_model
from panollava.model.precision import autocast
from panollava.stages import STAGES
from panollava.training.answer_objective import Objective
from panollava.training.features import write_features
from panollava.training.objective import one_device


def rows_of(reader: TextReader) -> dict[int, list[int]]:
    """Of each panorama."""
    return {panorama: rows for step in reader.plan(None) for panorama, rows in step}


def test_labeled_is_the_share_of_panoramas_whose_rows_are_used(settings: Settings) -> None:
    kept = []
    for share in (1.0, 0.5, 0.01):
        objective = Objective(
            STAGES["resampler"], change(settings, stage__resampler__labeled=share)
        )
        objective.open_readers()
        train, valid = objective.readers["train"], objective.readers["valid"]
        kept.append({panorama: len(rows) for panorama, rows in rows_of(train).items()})
        assert sum(map(len, rows_of(valid).values())) == 3
        planned = {panorama for step in train.plan(0) for panorama, _ in step}
        assert planned == kept[-1].keys()
    every, half, one = kept
    assert len(half) == round(len(every) / 2) and len(one) == 1  # with all their rows
    assert one.items() <= half.items() <= every.items()


def test_only_training_rows_are_cut_and_counted(settings: Settings, caplog) -> None:
    read = []
    for limit in (30, 99):
        limited = change(settings, stage__resampler__max_text_length=limit)
        objective = Objective(STAGES["resampler"], limited)
        objective.open_readers()
        read.append([objective.readers[split] for split in ("train", "valid")])
    (train, valid), (long_train, long_valid) = read
    assert max(map(len, [*train.rows])) == 30 and train.truncated == len(train.rows)
    assert [*valid.rows] == [*long_valid.rows] and valid.truncated == long_train.truncated == 0
    assert "train: 13 of 13 answers are cut to max_text_length 30" in caplog.text
    assert "valid" not in caplog.text


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


def reader_of(settings: Settings, stage: str, turn: bool) -> tuple[Objective, TextReader]:
    """The objective and its reader of train."""
    changed = change(settings, **{f"stage__{stage}__turn": turn})
    objective = Objective(STAGES[stage], changed)
    objective.open_readers()
    return objective, objective.readers["train"]


def epoch_of(reader: Any, epoch: int | None, parts: int = 1) -> list[list[TextBatch]]:
    dataset = StepDataset[TextBatch](reader, epoch, parts)
    steps = [dataset[step] for step in range(len(dataset))]
    for step in steps:
        assert step.divisor == sum(len(part.packed.labels) for part in step.parts if part)
    return [[part for part in step.parts if part] for step in steps]


@pytest.mark.parametrize("stage", ["resampler", "finetune"])
@pytest.mark.parametrize(
    "changes",
    [{"views__pitch": 20.0}, {"views__strategy": "sliding_window"}, {"model__tokens": "sphere"}],
    ids=str,
)
def test_the_loss_of_a_turned_panorama_is_that_of_a_rolled_one(
    settings: Settings, stage: str, changes: dict[str, Any]
) -> None:
    """Of views in `resampler`, of cached features in `finetune`."""
    settings = change(settings, **changes)
    settings = change(settings, **{f"stage__{name}__epochs": 0 for name in STAGES})
    # Large random weights, with which the answers depend on the panorama.
    language_model = str(save_language_model(Path("language_model"), spread=0.3))
    settings = change(settings, model__language_model__path=language_model, evaluate__rolls=[])
    prepare_project(settings)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    write_features(settings)
    objective, turning = reader_of(settings, stage, True)
    plain = reader_of(settings, stage, False)[1]
    step = sorted(rows_of(plain).items())
    shifts = turns(settings.seed, 3, [panorama for panorama, _ in step], 8)
    assert len({*shifts}) > 2
    pictures = dict.fromkeys(read_prepared_rows(paths.PREPARED / "train/rows.csv")["url"])
    sampler = Sampler(layout(settings.views), settings.views.size)
    rolled = []
    for picture, shift in zip(pictures, shifts, strict=True):
        panorama = read_panorama(Path(settings.data.dir) / picture, sampler.panorama_width)
        rolled.append(sampler.sample(roll(panorama, 45 * shift)))
    vision = torch.from_numpy(np.stack(rolled))
    with torch.no_grad():
        if objective.reads_features:
            model, _ = build_model(settings.model, settings.views)
            vision = model.eval().features(vision)
        turned, unturned = turning.load(step, 3), plain.load(step, 3)
        count = plain.count(step)
        first, second, third = (
            terms[0]
            for batch in (turned, unturned._replace(vision=vision), unturned)
            for terms in objective.terms(StepBatch([batch], count, 1), [0], one_device)
            if terms
        )
    assert abs(first - second) < 1e-5 and abs(first - third) > 1e-3


def test_turning_changes_nothing_but_the_order_of_views_in_training(settings: Settings) -> None:
    (_, turning), (_, plain) = (reader_of(settings, "resampler", turn) for turn in (True, False))
    assert [[*turning.plan(epoch)] for epoch in (None, 0, 1)] == [
        [*plain.plan(epoch)] for epoch in (None, 0, 1)
    ]
    whole, divided = (
        [batch for parts in epoch_of(turning, 1, count) for batch in parts] for count in (1, 3)
    )
    assert len(divided) > len(whole)
    seen = [
        {view.numpy().tobytes() for b in x for view in b.vision[:, 0]} for x in (whole, divided)
    ]
    assert seen[0] == seen[1]  # whatever the division into parts
    for epoch in (None, 0):
        ordered = []
        pairs = zip(epoch_of(turning, epoch), epoch_of(plain, epoch), strict=True)
        for (one,), (other,) in pairs:
            assert all(map(torch.equal, one.packed, other.packed))
            assert torch.equal(one.vision.sort(1).values, other.vision.sort(1).values)
            ordered.append(torch.equal(one.vision, other.vision))
        assert all(ordered) == (epoch is None)


@pytest.mark.parametrize("stage", ["resampler", "finetune"])
@pytest.mark.parametrize(
    "views", [{"strategy": "cubemap"}, {"strategy": "resize"}, {"global_view": True}], ids=str
)
def test_panoramas_turn_only_where_that_is_exact(
    settings: Settings, stage: str, views: dict[str, Any]
) -> None:
    views = {f"views__{name}": value for name, value in views.items()}
    with pytest.raises(UserError, match=rf"stage\.{stage}\.turn: .* set it to false") as error:
        reader_of(change(settings, **views), stage, True)
    assert len(str(error.value).split()) <= 30
    Objective(STAGES[stage], change(settings, **views))


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
