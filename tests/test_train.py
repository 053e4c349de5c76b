"""Training stages on small real towers, with real Lightning and real files."""

import contextlib
import dataclasses
import json
import logging
import math
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from helpers import (
    change,
    curve,
    outputs,
    read_array,
    run_stage,
    save_shards,
    settings_for,
    weights,
)
from panollava import paths
from panollava.config import Settings
from panollava.data.dialogue import Dialogue
from panollava.errors import UserError
from panollava.evaluation.evaluate import evaluate
from panollava.model.encoder import load_encoder
from panollava.model.network import build_model
from panollava.provenance.resume import remove_finished
from panollava.training.features import write_features
from panollava.training.train import check_deterministic
from panollava.training.vicreg_objective import Objective


def test_three_stages_and_an_evaluation_follow_from_each_other(settings: Settings) -> None:
    settings = change(settings, stage__resampler__epochs=1, stage__finetune__epochs=4)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    write_features(settings)
    run_stage("finetune", settings)
    evaluate(settings)
    assert {k.split(".")[0] for k in weights("vision")} == {"encoder"}
    for stage in ("resampler", "finetune"):
        assert {k.split(".")[0] for k in weights(stage)} == {"encoder", "resampler", "projector"}
        losses, accuracies = curve(stage, "val/loss"), curve(stage, "val/accuracy")
        assert losses[-1] < losses[0] and all(0 <= share <= 1 for share in accuracies)
    resampler, finetune = weights("resampler"), weights("finetune")
    for name, value in resampler.items():
        same = torch.equal(value, finetune[name])
        assert same == name.startswith("encoder."), name
    assert not torch.equal(
        weights("vision")["encoder.tower.post_layernorm.weight"],
        resampler["encoder.tower.post_layernorm.weight"],
    )
    assert len(pd.read_csv(paths.PREDICTIONS)) == 6 and paths.EVALUATION.is_file()
    for name in ("loss", "learning_rate/connector", "learning_rate/encoder", "gradient_norm"):
        assert curve("resampler", f"train/{name}")
    for name in ("invariance", "variance", "covariance"):
        assert curve("vision", f"train/{name}")
    assert (paths.speed_folder("vision") / "plots/metrics/rows_per_second.tsv").is_file()


def test_all_stages_and_an_evaluation_run_in_half_precision(settings: Settings) -> None:
    settings = change(settings, trainer__precision="bf16-mixed")
    run_stage("vision", settings)
    run_stage("resampler", settings)
    write_features(settings)
    run_stage("finetune", settings)
    evaluate(settings)
    for stage in ("vision", "resampler", "finetune"):
        assert {value.dtype for value in weights(stage).values()} == {torch.float32}


def metrics(stage: str) -> dict[str, float]:
    return json.loads(paths.metrics_file(stage).read_text())


def test_metrics_and_weights_are_those_of_the_best_epoch(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate, factors = Objective.validate, iter((4, 3, 1, 3))

    # One batch per epoch, before it that of the start.
    def validate_best_in_epoch_1(self: Objective, parts: list) -> tuple[dict[str, Tensor], int]:
        sums, count = validate(self, parts)
        return {**sums, "loss": sums["loss"] * next(factors)}, count

    monkeypatch.setattr(Objective, "validate", validate_best_in_epoch_1)
    run_stage("vision", change(settings, stage__vision__epochs=3))
    losses, accuracies = curve("vision", "val/loss"), curve("vision", "val/accuracy")
    assert len(losses) == 4 and losses[2] == min(losses)
    # An epoch has two steps.
    expected = {"best": {"step": 4}, "val_loss": losses[2], "val_accuracy": accuracies[2]}
    assert metrics("vision") == expected
    (file,) = (paths.run_folder("vision") / "checkpoints").iterdir()
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert file.name.startswith("epoch=01-")
    for name, value in weights("vision").items():
        assert torch.equal(saved[f"objective.model.{name}"], value), name


START_WINS = r"no epoch improves on the start \(validation loss {:.3f} at step 0\)"


@pytest.mark.parametrize("worse", [True, False])
def test_the_start_is_the_result_if_no_epoch_has_a_lower_validation_loss(
    settings: Settings, caplog, worse: bool
) -> None:
    run_stage("vision", settings)
    run_stage("resampler", settings)
    write_features(settings)
    rate = 0.3 if worse else 0.0  # 0: every epoch is as good as the start
    with caplog.at_level(logging.INFO):
        run_stage("finetune", change(settings, stage__finetune__lr=rate))
    losses, accuracies = curve("finetune", "val/loss"), curve("finetune", "val/accuracy")
    assert len(losses) == 3 and (min(losses[1:]) > losses[0]) == worse
    expected = {"best": {"step": 0}, "val_loss": losses[0], "val_accuracy": accuracies[0]}
    expected["truncated_rows"] = 0
    assert metrics("finetune") == expected
    assert re.search(START_WINS.format(losses[0]), caplog.text)
    start, published = weights("resampler"), weights("finetune")
    assert start.keys() == published.keys()
    assert all(torch.equal(start[name], value) for name, value in published.items())
    (file,) = (paths.run_folder("finetune") / "checkpoints").iterdir()
    epoch = losses.index(min(losses[1:]), 1) - 1
    assert file.name == f"epoch={epoch:02d}-val_loss={losses[epoch + 1]:.3f}.ckpt"
    trained = torch.load(file, weights_only=True)["state_dict"]
    same = [torch.equal(start[k.removeprefix("objective.model.")], v) for k, v in trained.items()]
    assert same and not any(same) if worse else all(same)


@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (2, 5), (3, 6), (None, 6)])
def test_a_stage_ends_after_patience_epochs_without_a_lower_validation_loss(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    patience: int | None,
    epochs: int,
) -> None:
    caplog.set_level(logging.INFO)
    validate, factors = Objective.validate, iter((4, 2, 3, 1, 1, 1, 3))  # the first is the start's

    def planned(self: Objective, parts: list) -> tuple[dict[str, Tensor], int]:
        sums, count = validate(self, parts)
        return {**sums, "loss": torch.full_like(sums["loss"], next(factors) * count)}, count

    monkeypatch.setattr(Objective, "validate", planned)
    settings = change(settings, stage__vision__epochs=6, stage__vision__patience=patience)
    run_stage("vision", settings)
    assert len(curve("vision", "val/loss")) == 1 + epochs
    assert metrics("vision").get("stopped_after_epochs") == (epochs if epochs < 6 else None)
    assert metrics("vision")["best"] == {"step": 2 if patience == 1 else 6}
    said = f"no lower validation loss in {patience} epochs (patience); trained {epochs} of 6"
    assert (said in caplog.text) == (epochs < 6)
    assert ("at most 6 epochs" in caplog.text) == (patience is not None)
    # The schedule is that of all epochs.
    rates = curve("vision", "train/learning_rate/encoder")
    warm, steps = 1, 12
    after = (2 * epochs - 1 - warm) / (steps - warm)
    assert rates[-1] == pytest.approx(2e-5 * (1 + math.cos(math.pi * after)) / 2)


def test_an_epoch_that_is_as_good_as_the_start_is_no_better(settings: Settings) -> None:
    settings = change(settings, stage__vision__epochs=4, stage__vision__patience=2)
    run_stage("vision", change(settings, stage__vision__lr=0.0))
    assert metrics("vision")["stopped_after_epochs"] == 2
    assert metrics("vision")["best"] == {"step": 0}


def test_the_start_includes_parts_that_are_new(settings: Settings) -> None:
    """`vision` starts from the pretrained encoder, `resampler` adds parts made from the seed."""
    settings = change(settings, stage__vision__lr=0.0, stage__resampler__lr=0.0)
    settings = change(settings, stage__resampler__encoder_lr=0.0, stage__resampler__epochs=1)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    model, _ = build_model(settings.model, settings.views, settings.seed)
    state = model.state_dict()
    for stage in ("vision", "resampler"):
        assert metrics(stage)["best"] == {"step": 0}
        assert all(torch.equal(state[name], value) for name, value in weights(stage).items())
    assert any(name.startswith("projector") for name in weights("resampler"))


def test_the_loss_at_step_0_is_the_last_one_of_the_stage_before(settings: Settings) -> None:
    """Validation rows are never cut, so that stages with other limits can be compared."""
    settings = change(settings, stage__resampler__epochs=1, stage__resampler__max_text_length=25)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    write_features(settings)
    run_stage("finetune", change(settings, stage__finetune__batch_size=2))  # several batches
    before, start = curve("resampler", "val/loss")[-1], curve("finetune", "val/loss")[0]
    assert start == pytest.approx(before, rel=1e-5)


def test_a_text_stage_s_metrics_count_the_training_rows_that_were_cut(settings: Settings) -> None:
    run_stage("vision", change(settings, stage__vision__epochs=0))
    rows = pd.read_csv(paths.PREPARED / "train/rows.csv")
    tokenizer = AutoTokenizer.from_pretrained(settings.model.language_model.path)
    dialogue = Dialogue(tokenizer, 99)
    lengths = [len(dialogue.row(row.query, row.annotation)) for row in rows.itertuples()]
    limit = max(lengths) - 1
    changes = {"stage__resampler__epochs": 1, "stage__resampler__max_text_length": limit}
    run_stage("resampler", change(settings, **changes))
    assert [*metrics("resampler")] == ["best", "val_loss", "val_accuracy", "truncated_rows"]
    assert metrics("resampler")["truncated_rows"] == lengths.count(limit + 1) < len(rows)


def test_0_epochs_copy_the_input_weights_and_give_no_metrics(settings: Settings) -> None:
    run_stage("vision", change(settings, stage__vision__epochs=0))
    pretrained = load_encoder(settings.model.encoder, settings.views.size).state_dict()
    assert all(
        torch.equal(v, pretrained[k.removeprefix("encoder.")]) for k, v in weights("vision").items()
    )
    assert metrics("vision") == {}
    assert (paths.curves_folder("vision") / "plots").is_dir()


def test_a_stage_does_not_start_from_another_s_result(settings: Settings) -> None:
    run_stage("vision", change(settings, stage__vision__epochs=0))
    run_stage("resampler", settings)
    paths.weights_file("vision").write_bytes(paths.weights_file("resampler").read_bytes())
    with pytest.raises(UserError, match="result of stage 'resampler', expected 'vision'"):
        run_stage("resampler", settings)


def test_what_belongs_to_the_machine_changes_no_byte_and_no_fingerprint(
    settings: Settings,
) -> None:
    run_stage("vision", settings)
    expected, (work,) = outputs("vision"), paths.RESUME.glob("vision-*")
    shutil.rmtree(work)
    run_stage("vision", change(settings, machine__loader_workers=2, machine__save_every=1000))
    assert outputs("vision") == expected
    assert work.is_dir()


def test_unfinished_work_of_other_settings_is_removed(settings: Settings, caplog) -> None:
    run_stage("vision", settings)
    (work,) = paths.RESUME.glob("vision-*")
    with caplog.at_level(logging.INFO):
        run_stage("vision", change(settings, stage__vision__lr=1e-3))
    assert "resuming" not in caplog.text and f"deleting {work}" in caplog.text
    assert len(list(paths.RESUME.glob("vision-*"))) == 1


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("encoder/preprocessor_config.json", '"image_mean": [0.5', '"image_mean": [0.4'),
        ("encoder/config.json", '"layer_norm_eps": 1e-06', '"layer_norm_eps": 1e-05'),
        ("language_model/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        ("language_model/chat_template.jinja", "<|im_start|>", "<|im_start|> the"),
    ],
)
def test_unfinished_work_of_other_towers_is_not_used(
    settings: Settings, towers: Path, caplog, file: str, old: str, new: str
) -> None:
    """What these files say is neither in the weights nor in the parameters."""
    shutil.copytree(towers, "towers")
    copy = settings_for(Path("towers")).model
    settings = dataclasses.replace(settings, model=copy)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    text = Path("towers", file).read_text()
    assert old in text
    Path("towers", file).write_text(text.replace(old, new, 1))
    with caplog.at_level(logging.INFO):
        run_stage("resampler", settings)
    assert "resuming" not in caplog.text


def test_unfinished_work_of_other_data_is_not_used(settings: Settings, caplog) -> None:
    run_stage("vision", settings)
    views = read_array(paths.PREPARED / "train/panoramas")
    views[0, 0, 0, 0, 0] ^= 1
    save_shards(paths.PREPARED / "train/panoramas", views)
    with caplog.at_level(logging.INFO):
        run_stage("vision", settings)
    assert "resuming" not in caplog.text


def test_finished_work_is_kept_until_another_stage_starts(settings: Settings) -> None:
    """DVC may have been killed before it recorded the outputs."""
    run_stage("vision", settings)
    remove_finished(except_stage="vision")
    assert list(paths.RESUME.glob("vision-*"))
    remove_finished(except_stage="resampler")
    assert not list(paths.RESUME.glob("vision-*"))


def test_a_failed_compilation_names_the_parameter(settings: Settings) -> None:
    torch._dynamo.reset()
    broken = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(broken),
        pytest.raises(UserError, match="trainer.compile: .* set it to false"),
    ):
        run_stage("vision", change(settings, trainer__compile=True))
    torch._dynamo.reset()


class Nondeterministic(torch.autograd.Function):
    """Behaves like a GPU kernel that has no deterministic implementation."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        if torch.are_deterministic_algorithms_enabled() and not grad.is_meta:
            raise RuntimeError(
                "odd_backward_cuda does not have a deterministic implementation, but you set "
                "'torch.use_deterministic_algorithms(True)'. You can turn off determinism"
            )
        return grad


def test_a_tower_without_deterministic_kernels_names_the_parameter(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = functional.layer_norm
    monkeypatch.setattr(
        functional, "layer_norm", lambda *args, **kw: Nondeterministic.apply(plain(*args, **kw))
    )
    message = (
        "trainer.deterministic: odd_backward_cuda does not have a deterministic "
        "implementation; set it to false"
    )
    with pytest.raises(UserError, match=message):
        run_stage("vision", settings)
    run_stage("vision", change(settings, trainer__deterministic=False))
    assert weights("vision")


@pytest.mark.parametrize(
    ("device", "compiled", "deterministic", "allowed"),
    [
        ("cuda", True, True, False),
        ("cuda", True, False, True),
        ("cuda", False, True, True),
        ("cpu", True, True, True),
    ],
)
def test_compiled_and_deterministic_layers_exclude_each_other_on_a_gpu(
    settings: Settings, device: str, compiled: bool, deterministic: bool, allowed: bool
) -> None:
    trainer = change(
        settings, trainer__compile=compiled, trainer__deterministic=deterministic
    ).trainer
    refused = pytest.raises(UserError, match="compile and trainer.deterministic cannot both be")
    with contextlib.nullcontext() if allowed else refused:
        check_deterministic(trainer, torch.device(device))


def test_training_on_a_gpu_checks_that_a_resumed_run_would_be_bit_identical(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panollava.training.train.choose_device", lambda _: torch.device("cuda"))
    with pytest.raises(UserError, match="cannot both be true on a GPU"):
        run_stage("vision", change(settings, trainer__compile=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_two_trainings_on_a_gpu_leave_the_same_bytes(settings: Settings) -> None:
    settings = change(settings, trainer__accelerator="gpu", trainer__precision="bf16-mixed")
    published = []
    for _ in range(2):
        run_stage("vision", settings)
        run_stage("resampler", settings)
        published.append(
            [paths.weights_file(stage).read_bytes() for stage in ("vision", "resampler")]
        )
        shutil.rmtree(paths.RESUME)
    assert published[0] == published[1]
