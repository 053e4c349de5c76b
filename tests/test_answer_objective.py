"""The objective on answer tokens: which rows it reads, and how long they may be."""

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from helpers import change, run_stage, save_tokenizer
from panollava.config import Settings
from panollava.errors import UserError
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


def test_only_training_rows_are_cut_and_counted(settings: Settings, caplog) -> None:
    read = []
    for limit in (30, 99):
        limited = change(settings, stage__resampler__max_text_length=limit)
        objective = Objective(STAGES["resampler"], limited)
        objective.open_readers()
        read.append([objective.readers[split] for split in ("train", "valid")])
    (train, valid), (long_train, long_valid) = read
    assert max(map(len, train.rows)) == 30 and train.truncated == len(train.rows)
    assert valid.rows == long_valid.rows and valid.truncated == long_train.truncated == 0
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
