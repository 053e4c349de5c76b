"""Checkpoints: what they hold, which are kept, and resuming from them to the same bytes."""

import logging
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import Killed, change, curve, outputs, run_stage
from panollava import paths
from panollava.config import Settings
from panollava.stages import STAGES
from panollava.training import curves
from panollava.training.checkpoints import Checkpoints
from panollava.training.features import write_features
from panollava.training.lightning_module import LitStage


def test_checkpoints_hold_no_path_and_no_frozen_part(settings: Settings, tmp_path: Path) -> None:
    run_stage("vision", settings)
    run_stage("resampler", settings)
    (file,) = (paths.run_folder("resampler") / "checkpoints").iterdir()
    best = min(curve("resampler", "val/loss")[1:])
    assert file.name.endswith(f"-val_loss={best:.3f}.ckpt") and file.name.startswith("epoch=0")
    assert str(tmp_path).encode() not in file.read_bytes()
    saved = torch.load(file, weights_only=True)
    assert saved["optimizer_states"] and saved["global_step"]
    assert not any("language_model" in name for name in saved["state_dict"])


def test_the_best_epochs_are_kept(settings: Settings) -> None:
    run_stage("vision", settings)
    run_stage("resampler", change(settings, trainer__keep_checkpoints=2))
    kept = sorted(p.name for p in (paths.run_folder("resampler") / "checkpoints").iterdir())
    losses = curve("resampler", "val/loss")[1:]  # without the start
    order = sorted(range(len(losses)), key=losses.__getitem__)[:2]
    assert kept == sorted(f"epoch={e:02d}-val_loss={losses[e]:.3f}.ckpt" for e in order)


STEPS = ("on_train_batch_end", "on_validation_start", "on_validation_end")
START = ("on_sanity_check_start", "on_sanity_check_end")  # its validation


@pytest.mark.parametrize(
    ("stage", "moment", "rate"),
    [
        *((stage, moment, 2e-5) for stage in ("vision", "resampler") for moment in STEPS),
        *(("vision", moment, 0.0) for moment in (*START, STEPS[0])),  # the start is the result
    ],
)
def test_a_killed_stage_resumes_to_the_same_bytes(
    settings: Settings,
    stage: str,
    moment: str,
    rate: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog,
) -> None:
    settings = change(
        settings,
        stage__vision__epochs=2,
        stage__vision__lr=rate,
        stage__resampler__turn=True,
    )
    run_stage("vision", settings)
    run_stage(stage, settings)
    expected = outputs(stage)
    for attempt in range(1 if moment in START else 4):
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
    assert ("resuming from step" in caplog.text) == (moment != START[0])
    assert ("no epoch improves on the start" in caplog.text) == (rate == 0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_stops_early_is_resumed_to_the_same_bytes(
    settings: Settings, stage: str, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """Killed in any step or epoch, also right after the one that ends the stage."""
    caplog.set_level(logging.INFO)
    settings = change(settings, stage__resampler__epochs=1)
    if stage != "vision":
        run_stage("vision", settings)
    if stage == "finetune":
        run_stage("resampler", settings)
        write_features(settings)
    early = {"epochs": 4, "patience": 1, "lr": 0.0}
    settings = change(settings, **{f"stage__{stage}__{key}": each for key, each in early.items()})
    settings = change(settings, stage__resampler__encoder_lr=0.0)
    run_stage(stage, settings)
    assert "trained 1 of 4" in caplog.text
    expected = outputs(stage)
    # The first validation is that of the start.
    for moment, before in ((STEPS[0], 0), (STEPS[2], 1), ("on_train_epoch_end", 0)):
        shutil.rmtree(paths.RESUME)
        calls = iter(range(before))

        def die(*_: object, calls: Iterator[int] = calls) -> None:
            if next(calls, None) is None:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(curves.Speed, moment, die, raising=False)
            with pytest.raises(Killed):
                run_stage(stage, settings)
        caplog.clear()
        run_stage(stage, settings)
        assert "resuming from step" in caplog.text and "trained 1 of 4" in caplog.text
        # The epoch that ends the stage is not trained again.
        assert ("at most 4 epochs" in caplog.text) == (moment == STEPS[0])
        assert outputs(stage) == expected


def test_a_resumed_stage_does_not_validate_its_start_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    validated = []
    validate = LitStage.validation_step

    def count(self: LitStage, *arguments: Any) -> None:
        validated.append(self.step)
        validate(self, *arguments)

    def die(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(LitStage, "validation_step", count)
    with monkeypatch.context() as patch:
        patch.setattr(curves.Speed, "on_train_batch_end", die)
        with pytest.raises(Killed):
            run_stage("vision", change(settings, machine__save_every=1000))
    with caplog.at_level(logging.INFO):
        run_stage("vision", settings)
    assert "resuming from step 0 of 2" in caplog.text
    assert validated == [0, 2]


def test_an_interrupt_during_the_validation_of_the_start_saves_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    caplog.set_level(logging.INFO)

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(curves.Speed, "on_sanity_check_start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_stage("vision", settings)
    assert "step 0 of 2 is saved" in caplog.text
    run_stage("vision", settings)
    assert "resuming from step 0 of 2" in caplog.text


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NODELIST": "node1",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
TORCHRUN = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "TORCHELASTIC_RUN_ID": "none",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "environment",
    [{}, SLURM, {**SLURM, "SLURM_NTASKS": "2"}, TORCHRUN],
    ids=["no scheduler", "SLURM", "SLURM with two tasks", "torchrun"],
)
def test_usr1_saves_and_the_run_resumes_whatever_the_scheduler_s_environment(
    environment: dict[str, str],
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog,
) -> None:
    """SLURM sends USR1 before the end of a job's time. Lightning's checkpoint for that, of another
    run here, is neither written nor read."""
    caplog.set_level(logging.INFO)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    foreign = tmp_path / "hpc_ckpt_1.ckpt"
    torch.save({"state_dict": {}, "epoch": 7, "global_step": 700}, foreign)
    before = foreign.read_bytes()

    def usr1(*_: object) -> None:
        signal.raise_signal(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(curves.Speed, "on_train_batch_start", usr1, raising=False)
        with pytest.raises(KeyboardInterrupt):
            run_stage("vision", settings)
    assert "step 1 of 2 is saved" in caplog.text
    run_stage("vision", settings)
    assert "resuming from step 1 of 2" in caplog.text
    assert list(tmp_path.glob("*.ckpt")) == [foreign] and foreign.read_bytes() == before
    resumed = outputs("vision")
    for name in {**SLURM, **TORCHRUN}:
        monkeypatch.delenv(name, raising=False)
    shutil.rmtree(paths.RESUME)
    run_stage("vision", settings)
    assert outputs("vision") == resumed


def test_epochs_are_restored_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """By name, 99 comes after 100."""
    checkpoints = Checkpoints(tmp_path, keep=2, every=1)
    best = [(0.5, 99), (0.25, 100)]
    files = checkpoints.files(best)
    for file, (_, epoch) in zip([*files, checkpoints.start], [*best, (0, -1)], strict=True):
        saved = {"state_dict": {}, "epoch_step": 0, "epoch": epoch, "best": best}
        torch.save(saved, file)
    restored = []

    class Module:
        def resume_from(self, checkpoint: dict, path: Path) -> None:
            restored.append((checkpoint["epoch"], path))

    assert checkpoints.restore(Module())  # type: ignore[arg-type]
    assert restored == [(100, files[1])]


@pytest.mark.parametrize("damaged", ["progress.ckpt", "epoch=*.ckpt", "start.ckpt", "*.ckpt"])
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
    # Without its epochs the stage resumes from its start, without that from nothing.
    assert ("resuming from step 0 of" in caplog.text) == (damaged == "epoch=*.ckpt")
    assert ("resuming from step 4 of" in caplog.text) == (damaged == "progress.ckpt")
    assert outputs("vision") == expected
