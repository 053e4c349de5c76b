"""Promises of the training stages, on small real towers, with real Lightning and real files."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import settings_for
from panollava import paths
from panollava.config import Settings
from panollava.data.prepare import prepare_project
from panollava.errors import UserError
from panollava.evaluation.evaluate import evaluate
from panollava.provenance.resume import remove_finished
from panollava.stages import find_stage
from panollava.training import curves
from panollava.training import lightning_module as lit
from panollava.training import vicreg_objective as vicreg
from panollava.training.answer_objective import Objective
from panollava.training.features import write_features
from panollava.training.train import train
from test_gradient_checkpointing import Kept
from test_language_model import with_language_model


def change(settings: Any, **changes: Any) -> Any:
    """`stage__vision__lr=1` sets settings.stage.vision.lr."""
    for name, value in changes.items():
        first, _, rest = name.partition("__")
        part = getattr(settings, first)
        settings = dataclasses.replace(
            settings, **{first: change(part, **{rest: value}) if rest else value}
        )
    return settings


@pytest.fixture
def settings(
    towers: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """A folder in which prepare has run."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    settings = change(
        settings_for(towers),
        data__dir=str(small_data),
        stage__vision__batch_size=3,
        stage__resampler__batch_size=4,
        stage__resampler__epochs=3,
        stage__finetune__batch_size=4,
        stage__resampler__max_text_length=99,
        stage__finetune__max_text_length=99,
        trainer__log_every=1,
        machine__save_every=1,
    )
    prepare_project(settings)
    yield settings
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def run(name: str, settings: Settings) -> None:
    train(find_stage(name), settings)


def weights(stage: str) -> dict[str, torch.Tensor]:
    return load_file(paths.weights_file(stage))


def curve(stage: str, name: str) -> list[float]:
    lines = (paths.curves_folder(stage) / f"plots/metrics/{name}.tsv").read_text().splitlines()
    return [float(line.split("\t")[1]) for line in lines[1:]]


def outputs(stage: str) -> dict[str, bytes]:
    """All that DVC records of a stage."""
    return {
        str(path): path.read_bytes()
        for folder in (paths.run_folder(stage), paths.curves_folder(stage))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_three_stages_and_an_evaluation_follow_from_each_other(settings: Settings) -> None:
    settings = change(settings, stage__resampler__epochs=8, stage__finetune__epochs=4)
    run("vision", settings)
    run("resampler", settings)
    write_features(settings)
    run("finetune", settings)
    evaluate(settings)
    assert {k.split(".")[0] for k in weights("vision")} == {"encoder"}
    for stage in ("resampler", "finetune"):
        assert {k.split(".")[0] for k in weights(stage)} == {"encoder", "resampler", "projector"}
        losses, right = curve(stage, "val/loss"), curve(stage, "val/accuracy")
        assert losses[-1] < losses[0] and all(0 <= share <= 1 for share in right)
    resampler, finetune = weights("resampler"), weights("finetune")
    for name, value in resampler.items():
        same = torch.equal(value, finetune[name])
        assert same == name.startswith("encoder."), name
    assert not torch.equal(
        weights("vision")["encoder.tower.post_layernorm.weight"],
        resampler["encoder.tower.post_layernorm.weight"],
    )
    details = json.loads(paths.EVALUATION_DETAILS.read_text())
    assert details["captions"] == 6 and details["panoramas"] == 3
    for name in ("loss", "learning_rate", "gradient_norm"):
        assert curve("resampler", f"train/{name}")
    for name in ("invariance", "variance", "covariance"):
        assert curve("vision", f"train/{name}")
    assert (paths.speed_folder("vision") / "plots/metrics/rows_per_second.tsv").is_file()


def test_features_are_what_the_encoder_gives(settings: Settings) -> None:
    """Finetuning from features has the loss of finetuning from views."""
    import numpy as np

    from panollava.model.panollava import build_model
    from panollava.model.weights import load_weights

    run("vision", settings)
    run("resampler", settings)
    write_features(settings)
    model, _ = build_model(settings.model, settings.views)
    stage = find_stage("resampler")
    load_weights(paths.weights_file("resampler"), model, stage.saves, stage)
    for split in ("train", "valid", "test"):
        views = torch.from_numpy(np.load(paths.PREPARED / split / "views.npy"))
        expected = model.eval().features(views)
        assert torch.allclose(
            torch.from_numpy(np.load(paths.FEATURES / f"{split}.npy")), expected, atol=1e-5
        )


def test_rows_of_a_share_of_the_panoramas_are_trained_on(settings: Settings) -> None:
    kept = []
    for share in (1.0, 0.5, 0.01):
        objective = Objective(
            find_stage("resampler"), change(settings, stage__resampler__labeled=share)
        )
        objective.open_readers()
        train, valid = objective.readers["train"], objective.readers["valid"]
        kept.append({panorama: len(rows) for panorama, rows in train.by_panorama.items()})
        assert len(valid.rows) == 3
        planned = {panorama for step in train.plan(0) for panorama, _ in step}
        assert planned == kept[-1].keys()
    every, half, one = kept
    assert len(half) == round(len(every) / 2) and len(one) == 1  # of each panorama all rows
    assert one.items() <= half.items() <= every.items()
    with pytest.raises(UserError, match=r"stage\.resampler\.labeled: .* found 0"):
        run("resampler", change(settings, stage__resampler__labeled=0.0))


@pytest.mark.parametrize("stage", ["vision", "resampler"])
def test_a_step_in_parts_is_the_same_step(settings: Settings, stage: str) -> None:
    run("vision", change(settings, stage__vision__epochs=0))
    results = []
    for parts in (1, 3):
        run(stage, change(settings, **{f"stage__{stage}__accumulate": parts}))
        results.append((weights(stage), curve(stage, "train/loss")))
    (one, losses), (three, others) = results
    assert losses == pytest.approx(others, rel=1e-5)
    assert losses[0] != losses[-1]
    for name, value in one.items():
        assert torch.allclose(value, three[name], atol=2e-5), name


def test_what_drops_out_is_the_same_in_both_passes_of_a_part(
    settings: Settings, tmp_path: Path
) -> None:
    towers = shutil.copytree(settings.model.encoder.path, tmp_path / "dropout")
    config = json.loads((towers / "config.json").read_text())
    (towers / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    objective = vicreg.Objective(
        find_stage("vision"), change(settings, model__encoder__path=str(towers))
    )
    objective.train()
    views = torch.randint(0, 256, (4, *objective.view_shape), dtype=torch.uint8)
    parts = list(views.split(2))
    encoder = objective.model.encoder

    def gradient() -> torch.Tensor:
        own = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
        encoder.zero_grad()
        return own

    torch.manual_seed(0)
    told = objective.step(parts, lambda loss: loss.backward())["loss"]
    in_parts = gradient()
    torch.manual_seed(0)
    x, y = (torch.cat(side) for side in zip(*map(objective._matched, parts), strict=True))
    loss = objective._losses(x, y)["loss"]
    loss.backward()
    assert told == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(in_parts, gradient(), atol=1e-4)
    torch.manual_seed(1)
    objective.step(parts, lambda loss: loss.backward())
    assert not torch.allclose(in_parts, gradient(), atol=1e-2)  # something does drop out


def test_the_views_may_be_brought_together_by_contrast(settings: Settings) -> None:
    settings = change(settings, stage__vision__objective="infonce", stage__vision__epochs=8)
    run("vision", change(settings, stage__vision__lr=1e-3))
    losses, found = curve("vision", "train/loss"), curve("vision", "train/found")
    assert losses[-1] < losses[0] and found[-1] > found[0]
    with pytest.raises(UserError, match=r"stage.vision.objective: expected vicreg or infonce"):
        run("vision", change(settings, stage__vision__objective="simclr"))


@pytest.mark.parametrize("stage", ["vision", "resampler"])
def test_gradient_checkpointing_holds_after_each_validation(
    settings: Settings, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = change(settings, stage__vision__epochs=2)
    run("vision", settings)
    kept: list[int] = []
    step: Callable[..., None] = lit.LitStage.training_step

    def counted(*arguments: object) -> None:
        with Kept() as own:
            step(*arguments)
        kept.append(own.bytes)

    monkeypatch.setattr(lit.LitStage, "training_step", counted)
    results = []
    for checkpointed in (False, True):
        shutil.rmtree(paths.RESUME)
        kept.clear()
        run(stage, change(settings, trainer__gradient_checkpointing=checkpointed))
        results.append((weights(stage), curve(stage, "train/loss"), kept[:]))
    (one, losses, much), (other, others, less) = results
    assert losses == pytest.approx(others, rel=1e-6) and len(losses) == len(much) > 2
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-6) for name in one)
    assert all(few < 0.6 * many for few, many in zip(less, much, strict=True)), (much, less)


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


@pytest.mark.parametrize(
    "moment", ["on_train_batch_end", "on_validation_start", "on_validation_end"]
)
@pytest.mark.parametrize("stage", ["vision", "resampler"])
def test_a_killed_stage_goes_on_to_the_same_bytes(
    settings: Settings, stage: str, moment: str, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    settings = change(settings, stage__vision__epochs=2)
    run("vision", settings)
    run(stage, settings)
    expected = outputs(stage)
    for attempt in range(4):
        shutil.rmtree(paths.RESUME)
        left = attempt

        def die(*_: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(curves.Speed, moment, die, raising=False)
            with pytest.raises((Killed, SystemExit)):
                for _ in range(3):
                    run(stage, settings)
                raise SystemExit
        with caplog.at_level(logging.INFO):
            run(stage, settings)
        assert outputs(stage) == expected
    assert "goes on from step" in caplog.text


def test_what_belongs_to_the_machine_changes_no_byte_and_no_fingerprint(
    settings: Settings,
) -> None:
    run("vision", settings)
    expected, (work,) = outputs("vision"), paths.RESUME.iterdir()
    shutil.rmtree(work)
    run("vision", change(settings, machine__loader_workers=2, machine__save_every=1000))
    assert outputs("vision") == expected
    assert work.is_dir()


def test_unfinished_work_of_other_settings_is_removed(settings: Settings, caplog) -> None:
    run("vision", settings)
    with caplog.at_level(logging.INFO):
        run("vision", change(settings, stage__vision__lr=1e-3))
    assert "goes on" not in caplog.text and "the work of another run" in caplog.text
    assert len(list(paths.RESUME.iterdir())) == 1


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
    """Neither weights nor parameters say what these files say."""
    shutil.copytree(towers, "towers")
    copy = settings_for(Path("towers")).model
    settings = dataclasses.replace(settings, model=copy)
    run("vision", settings)
    run("resampler", settings)
    text = Path("towers", file).read_text()
    assert old in text
    Path("towers", file).write_text(text.replace(old, new, 1))
    with caplog.at_level(logging.INFO):
        run("resampler", settings)
    assert "goes on" not in caplog.text


def test_rows_that_are_too_long_for_the_language_model_are_an_error(
    settings: Settings, towers: Path, tmp_path: Path
) -> None:
    other = with_language_model(tmp_path / "gpt2", towers, "gpt2", n_positions=40, n_head=4)
    settings = dataclasses.replace(settings, model=other.model)
    run("vision", settings)
    with pytest.raises(UserError, match=r"attends to 40 tokens.*max_text_length \(99\)"):
        run("resampler", settings)


def test_unfinished_work_of_other_data_is_not_used(settings: Settings, caplog) -> None:
    run("vision", settings)
    views = paths.PREPARED / "train/views.npy"
    changed = bytearray(views.read_bytes())
    changed[-1] ^= 1
    views.write_bytes(changed)
    with caplog.at_level(logging.INFO):
        run("vision", settings)
    assert "goes on" not in caplog.text


@pytest.mark.parametrize("size", [0, 60, 5000])
def test_views_that_are_not_whole_are_named(settings: Settings, size: int) -> None:
    views = paths.PREPARED / "train/views.npy"
    views.write_bytes(views.read_bytes()[:size])
    with pytest.raises(UserError, match=r"prepared/train/views.npy: not a whole \.npy file"):
        run("vision", settings)


@pytest.mark.parametrize("damaged", ["progress.ckpt", "epoch=*.ckpt", "*.ckpt"])
def test_a_damaged_checkpoint_is_named_and_left_out(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog, damaged: str
) -> None:
    settings = change(settings, stage__vision__epochs=3)
    run("vision", settings)
    expected = outputs("vision")
    shutil.rmtree(paths.RESUME)

    def die_in_the_last_epoch(
        _: object, trainer: object, module: lit.LitStage, *__: object
    ) -> None:
        if module.epoch == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(curves.Speed, "on_train_batch_end", die_in_the_last_epoch)
        with pytest.raises(Killed):
            run("vision", settings)
    files = list(paths.RESUME.glob(f"vision-*/{damaged}"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    with caplog.at_level(logging.INFO):
        run("vision", settings)
    for file in files:
        assert f"{file}: not a readable checkpoint" in caplog.text
    assert ("goes on from step" in caplog.text) == (damaged == "progress.ckpt")
    assert outputs("vision") == expected


def test_finished_work_outlives_a_second_start_of_its_stage_alone(settings: Settings) -> None:
    """DVC may have been killed before it recorded the outputs."""
    run("vision", settings)
    remove_finished(except_stage="vision")
    assert list(paths.RESUME.glob("vision-*"))
    remove_finished(except_stage="resampler")
    assert not list(paths.RESUME.glob("vision-*"))


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_no_result(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"step \d+: the loss is .*learning rate"):
        run("vision", change(settings, stage__vision__lr=1e25, stage__vision__epochs=5))
    assert not paths.weights_file("vision").exists()


def test_checkpoints_hold_no_path_and_no_frozen_part(settings: Settings, tmp_path: Path) -> None:
    run("vision", settings)
    run("resampler", settings)
    (file,) = (paths.run_folder("resampler") / "checkpoints").iterdir()
    best = min(curve("resampler", "val/loss"))
    assert file.name.endswith(f"-val_loss={best:.3f}.ckpt") and file.name.startswith("epoch=0")
    assert str(tmp_path).encode() not in file.read_bytes()
    saved = torch.load(file, weights_only=True)
    assert saved["optimizer_states"] and saved["global_step"]
    assert not any("language_model" in name for name in saved["state_dict"])


def test_the_best_epochs_are_kept(settings: Settings) -> None:
    run("vision", settings)
    run("resampler", change(settings, trainer__keep_checkpoints=2))
    kept = sorted(p.name for p in (paths.run_folder("resampler") / "checkpoints").iterdir())
    losses = curve("resampler", "val/loss")
    order = sorted(range(len(losses)), key=losses.__getitem__)[:2]
    assert kept == sorted(f"epoch={e:02d}-val_loss={losses[e]:.3f}.ckpt" for e in order)


def test_no_epochs_pass_the_start_on(settings: Settings) -> None:
    run("vision", change(settings, stage__vision__epochs=0))
    from panollava.model.encoder import load_encoder

    own = load_encoder(settings.model.encoder, settings.views.size).state_dict()
    assert all(
        torch.equal(v, own[k.removeprefix("encoder.")]) for k, v in weights("vision").items()
    )


def test_a_stage_does_not_start_from_another_s_result(settings: Settings) -> None:
    run("vision", change(settings, stage__vision__epochs=0))
    run("resampler", settings)
    paths.weights_file("vision").write_bytes(paths.weights_file("resampler").read_bytes())
    with pytest.raises(UserError, match="result of stage 'resampler', expected 'vision'"):
        run("resampler", settings)


def test_views_that_share_nothing_do_without_the_vision_stage(settings: Settings) -> None:
    settings = change(settings, views__strategy="resize")
    prepare_project(settings)
    with pytest.raises(UserError, match=r"set stage\.vision\.epochs to 0"):
        run("vision", settings)
    run("vision", change(settings, stage__vision__epochs=0))
    run("resampler", settings)
