"""Checkpoints: what they hold, which are kept, and resuming from them to the same bytes."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from helpers import Killed, change, curve, outputs, run_stage
from panollava import paths
from panollava.config import Settings
from panollava.training import curves
from panollava.training.lightning_module import LitStage


def test_checkpoints_hold_no_path_and_no_frozen_part(settings: Settings, tmp_path: Path) -> None:
    run_stage("vision", settings)
    run_stage("resampler", settings)
    (file,) = (paths.run_folder("resampler") / "checkpoints").iterdir()
    best = min(curve("resampler", "val/loss"))
    assert file.name.endswith(f"-val_loss={best:.3f}.ckpt") and file.name.startswith("epoch=0")
    assert str(tmp_path).encode() not in file.read_bytes()
    saved = torch.load(file, weights_only=True)
    assert saved["optimizer_states"] and saved["global_step"]
    assert not any("language_model" in name for name in saved["state_dict"])


def test_the_best_epochs_are_kept(settings: Settings) -> None:
    run_stage("vision", settings)
    run_stage("resampler", change(settings, trainer__keep_checkpoints=2))
    kept = sorted(p.name for p in (paths.run_folder("resampler") / "checkpoints").iterdir())
    losses = curve("resampler", "val/loss")
    order = sorted(range(len(losses)), key=losses.__getitem__)[:2]
    assert kept == sorted(f"epoch={e:02d}-val_loss={losses[e]:.3f}.ckpt" for e in order)


@pytest.mark.parametrize(
    "moment", ["on_train_batch_end", "on_validation_start", "on_validation_end"]
)
@pytest.mark.parametrize("stage", ["vision", "resampler"])
def test_a_killed_stage_resumes_to_the_same_bytes(
    settings: Settings, stage: str, moment: str, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    settings = change(settings, stage__vision__epochs=2, stage__resampler__turn=True)
    run_stage("vision", settings)
    run_stage(stage, settings)
    expected = outputs(stage)
    for attempt in range(4):
        shutil.rmtree(paths.RESUME)
        moments_left = attempt

        def die(*_: object) -> None:
            nonlocal moments_left
            moments_left -= 1
            if moments_left < 0:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(curves.Speed, moment, die, raising=False)
            with pytest.raises((Killed, SystemExit)):
                for _ in range(3):
                    run_stage(stage, settings)
                raise SystemExit
        with caplog.at_level(logging.INFO):
            run_stage(stage, settings)
        assert outputs(stage) == expected
    assert "resuming from step" in caplog.text


@pytest.mark.parametrize("damaged", ["progress.ckpt", "epoch=*.ckpt", "*.ckpt"])
def test_a_damaged_checkpoint_is_named_and_skipped(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog, damaged: str
) -> None:
    settings = change(settings, stage__vision__epochs=3)
    run_stage("vision", settings)
    expected = outputs("vision")
    shutil.rmtree(paths.RESUME)

    def die_in_the_last_epoch(_: object, trainer: object, module: LitStage, *__: object) -> None:
        if module.epoch == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(curves.Speed, "on_train_batch_end", die_in_the_last_epoch)
        with pytest.raises(Killed):
            run_stage("vision", settings)
    files = list(paths.RESUME.glob(f"vision-*/{damaged}"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    with caplog.at_level(logging.INFO):
        run_stage("vision", settings)
    for file in files:
        assert f"{file}: " in caplog.text
    assert ("resuming from step" in caplog.text) == (damaged == "progress.ckpt")
    assert outputs("vision") == expected
