"""`panollava train`: the options of one run, without DVC."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import ROOT, curve
from panollava import paths
from panollava.cli import main as cli
from panollava.config import load_settings
from panollava.model.weights import read_header
from panollava.training import curves
from panollava.training import lightning_module as lit

STAGES = ("vision", "resampler", "finetune")


def train(*arguments: str) -> None:
    cli.main(["train", *arguments])


def fails(*arguments: str) -> str:
    """The last line of the log of a run that must fail."""
    before = set(paths.LOGS.glob("*.log"))
    with pytest.raises(SystemExit) as ended:
        train(*arguments)
    assert ended.value.code == 1
    (log,) = set(paths.LOGS.glob("*.log")) - before
    return log.read_text().splitlines()[-1]


def weights(stage: str) -> dict[str, torch.Tensor]:
    return load_file(paths.weights_file(stage))


def results() -> dict[str, bytes]:
    folders = [Path("runs"), *(paths.curves_folder(stage) for stage in STAGES)]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


def checkpoint(stage: str) -> Path:
    (file,) = (paths.run_folder(stage) / "checkpoints").iterdir()
    return file


def test_all_stages_run_in_one_command_with_one_log(project: Path) -> None:
    train("all")
    for stage in STAGES:
        assert paths.weights_file(stage).is_file()
    (log,) = paths.LOGS.iterdir()
    assert re.fullmatch(r"full_pipeline_\d{8}_\d{6}\.log", log.name)
    order = re.findall(r"stage (\d), \w+: starts from|(features) of", log.read_text())
    assert ["".join(each) for each in order] == ["1", "2", *["features"] * 4, "3"]
    assert not list(paths.RESUME.glob("*-*"))


def test_commands_outside_the_pipeline_keep_finished_work(project: Path, small_data: Path) -> None:
    """`train all` resumes from it after a kill."""
    work = paths.RESUME / "vision-0123456789abcdef"
    work.mkdir(parents=True)
    (work / "finished").touch()
    for command in (["check", str(small_data)], ["plan", "vision"], ["digest"]):
        cli.main(command)
        assert work.is_dir(), command
    cli.main(["prepare"])
    assert not work.exists()


def test_an_unknown_stage_is_reported_with_the_known_ones(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["train", "finetuning"], ["plan", "finetuning"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert "invalid choice: 'finetuning'" in error
        assert all(stage in error.splitlines()[-1] for stage in STAGES)
    assert not paths.LOGS.exists()


def test_verify_needs_a_dvc_repository(project: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify"])
    assert ended.value.code == 1
    (log,) = paths.LOGS.iterdir()
    assert (
        f"{project}: not a DVC repository; run the command in the project's folder"
        in log.read_text()
    )


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def test_all_stages_resume_where_they_were_killed(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nothing to resume for stage 'vision'" in fails("all", "--resume")
    train("all")
    expected = results()
    with monkeypatch.context() as patch:

        def die(callback: object, trainer: object, module: lit.LitStage) -> None:
            if hasattr(module.objective.model, "resampler"):
                raise Killed

        patch.setattr(curves.Speed, "on_validation_end", die, raising=False)
        with pytest.raises((Killed, SystemExit)):
            train("all")
    capsys.readouterr()
    train("all", "--resume")
    assert results() == expected
    assert capsys.readouterr().err.count("resuming from step") == 2  # vision is finished


def test_each_option_overrides_its_parameter_for_this_run(
    project: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = paths.PARAMS.read_text().replace(str(small_data), "no/such/folder")
    paths.PARAMS.write_text(before)
    train("vision", "--data-dir", str(small_data), "--epochs", "3", "--batch-size", "3")
    assert "3 epochs, 6 steps" in capsys.readouterr().err  # six panoramas
    assert torch.load(checkpoint("vision"), weights_only=True)["epoch"] <= 3
    here = ("--data-dir", str(small_data))
    train("resampler", *here, "--lr", "0.5e-3", "--epochs", "1", "--num-workers", "1")
    assert max(curve("resampler", "train/learning_rate/connector")) == 0.5e-3
    assert max(curve("resampler", "train/learning_rate/encoder")) == 2e-4
    assert "max_text_length" in fails("resampler", *here, "--max-text-length", "1")
    message = fails("vision", "--batch-size", "-1")
    assert message.endswith("command line: stage.vision.batch_size: expected at least 1, found -1")
    assert paths.PARAMS.read_text() == before


def test_the_encoder_s_learning_rate_is_an_option_of_the_stage_that_has_it(project: Path) -> None:
    train("all", "--encoder-lr", "0.25e-3")
    assert max(curve("resampler", "train/learning_rate/encoder")) == 0.25e-3
    assert max(curve("resampler", "train/learning_rate/connector")) == 2e-3
    for stage in ("vision", "finetune"):
        message = f"--encoder-lr: stage '{stage}' has no encoder_lr; leave the option out"
        assert message in fails(stage, "--encoder-lr", "1e-4")


def test_the_help_shows_where_each_default_comes_from(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for edit, value in (("", "vision 4"), ("batch_size: 16", "vision 16")):
        if edit:
            text = paths.PARAMS.read_text().replace("batch_size: 4", edit, 1)
            paths.PARAMS.write_text(text)
        with pytest.raises(SystemExit):
            train("--help")
        text = " ".join(capsys.readouterr().out.split())
        assert f"default: stage.STAGE.batch_size of params.yaml: {value}, resampler 4" in text
        assert "default: stage.STAGE.encoder_lr of params.yaml: resampler 0.0002)" in text
    for (
        option
    ) in "epochs lr encoder-lr max-text-length data-dir workers project name from resume".split():
        assert re.search(rf"--{option}\b[^(]*\(default: ", text), option
    paths.PARAMS.unlink()
    with pytest.raises(SystemExit):
        train("--help")
    assert "default: machine.loader_workers of params.yaml)" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_stage_starts_from_weights_or_from_a_checkpoint(project: Path) -> None:
    train("all")
    started = {}
    for name, start in (
        ("weights", paths.weights_file("vision")),
        ("checkpoint", checkpoint("vision")),
    ):
        copy = project / f"elsewhere{start.suffix}"
        copy.write_bytes(start.read_bytes())
        train("resampler", "--from", str(copy), "--epochs", "0")
        started[name] = weights("resampler")
    vision = weights("vision")
    assert all(torch.equal(started["checkpoint"][name], value) for name, value in vision.items())
    assert started["weights"].keys() == started["checkpoint"].keys()
    assert all(torch.equal(v, started["checkpoint"][k]) for k, v in started["weights"].items())


def test_features_are_computed_again_for_another_start(project: Path) -> None:
    train("all")
    features = {path: path.read_bytes() for path in paths.FEATURES.rglob("*.npy")}
    copy = project / "other.ckpt"
    train("vision", "--lr", "0.01")
    train("resampler", "--lr", "0.02")
    copy.write_bytes(checkpoint("resampler").read_bytes())
    assert {path: path.read_bytes() for path in paths.FEATURES.rglob("*.npy")} == features
    train("finetune", "--from", str(copy))
    now = {path: path.read_bytes() for path in paths.FEATURES.rglob("*.npy")}
    assert all(now[path] != before for path, before in features.items())
    encoder = [name for name in weights("resampler") if name.startswith("encoder.")]
    assert all(torch.equal(weights("resampler")[n], weights("finetune")[n]) for n in encoder)


def test_features_of_another_encoder_are_an_error(project: Path) -> None:
    train("all")
    train("resampler", "--lr", "0.02")
    message = fails("finetune")
    assert "runs/features: made with other encoder weights" in message
    assert "dvc repro features (without DVC: panollava features)" in message
    cli.main(["features"])
    train("finetune")


def test_prepared_data_of_other_settings_is_an_error(project: Path, small_data: Path) -> None:
    shutil.copytree(small_data, "other")
    train("vision", "--data-dir", "other", "--epochs", "0")
    message = fails("resampler")
    assert f"runs/prepared: made with data.dir other, now {small_data}; run: dvc" in message
    assert "or pass --data-dir other" in message
    cli.main(["prepare"])
    train("resampler", "--epochs", "0")
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("pitch: 0", "pitch: 5"))
    for command in (["train", "vision"], ["features"]):
        with pytest.raises(SystemExit):
            cli.main(command)
        log = max(paths.LOGS.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        assert "runs/prepared: made with views.pitch 0.0, now 5.0; run" in log.read_text()


def test_a_hub_model_s_commit_is_in_the_weights_header(project: Path, towers: Path) -> None:
    """As the hub's cache holds it: the id is all that params.yaml names."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = project / "hub/models--someone--encoder"
    shutil.copytree(towers / "encoder", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    params = project / "params.yaml"
    text = re.sub(r"(encoder:\n    path: )\S+", r"\1someone/encoder", params.read_text())
    params.write_text(text)
    command = [sys.executable, str(ROOT / "src/run.py"), "train", "all", "--epochs", "0"]
    environment = {**os.environ, "HF_HUB_CACHE": str(project / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment)
    for stage in STAGES:
        assert read_header(paths.weights_file(stage))["towers"]["encoder"] == {"commit": commit}
    local = read_header(paths.weights_file("finetune"))["towers"]["language_model"]["files"]
    weights = (towers / "language_model/model.safetensors").read_bytes()
    assert local["model.safetensors"] == hashlib.sha256(weights).hexdigest()


def test_a_tower_that_dvc_does_not_track_gives_a_warning(project: Path, towers: Path) -> None:
    train("all", "--epochs", "0")
    params = project / "params.yaml"
    params.write_text(re.sub(r"towers: \S+", "towers: elsewhere", params.read_text(), count=1))
    train("vision", "--epochs", "0")
    logs = sorted(paths.LOGS.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    first, last = logs[0].read_text(), logs[-1].read_text()
    warning = f"model.encoder.path: {towers}/encoder is not in elsewhere (model.towers); DVC reruns"
    assert warning in last and warning not in first


def test_an_invalid_start_is_named_with_the_expected_file(project: Path) -> None:
    train("all")
    (project / "junk.ckpt").write_bytes(b"junk")
    (project / "junk.safetensors").write_bytes(b"junk")
    (project / "weights.pt").write_bytes(b"junk")
    expected = "expected a result of stage 'vision': runs/vlm_vision/model_final.safetensors"
    assert f"no.ckpt: no such file; {expected}" in fails("resampler", "--from", "no.ckpt")
    for name in ("weights.pt", "runs"):
        message = fails("resampler", "--from", name)
        assert f"{name}: neither .safetensors nor .ckpt; {expected}" in message
    for junk in ("junk.ckpt", "junk.safetensors"):
        message = fails("resampler", "--from", junk)
        assert f"{junk}: not a readable" in message and expected in message
    for stage in ("resampler", "finetune"):
        message = fails("resampler", "--from", str(paths.weights_file(stage)))
        assert f"holds the result of stage '{stage}', expected 'vision'" in message
        message = fails("resampler", "--from", str(checkpoint(stage)))
        assert f"as a checkpoint of stage '{stage}' does; {expected}" in message
    assert "starts from the pretrained encoder" in fails("vision", "--from", "no.ckpt")
    assert "--from needs one stage, not 'all'" in fails("all", "--from", "no.ckpt")


def test_resume_fails_without_unfinished_work_of_the_same_run(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from panollava.data.prepare import prepare_project

    prepare_project(load_settings(paths.PARAMS))
    assert "nothing to resume for stage 'vision'" in fails("vision", "--resume")

    def stop_at(moment: str) -> None:
        def die(*_: object) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(curves.Speed, moment, die, raising=False)
            with pytest.raises((Killed, SystemExit)):
                train("vision", "--epochs", "2")

    stop_at("on_sanity_check_start")
    message = fails("vision", "--epochs", "2", "--resume")
    assert "stopped before its first save" in message
    stop_at("on_train_batch_end")
    (work,) = paths.RESUME.glob("vision-*")
    assert f"{work} belongs to other parameters" in fails("vision", "--resume", "--epochs", "3")
    assert work.is_dir()  # and is still there
    train("vision", "--epochs", "2", "--resume")
    assert "resuming from step 1 of 4" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported_before_any_work(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("all")
    text = paths.PARAMS.read_text()
    paths.PARAMS.write_text(text.replace("accelerator: cpu", "accelerator: gpu"))
    for command in ("train all", "train vision", "train finetune", "features", "evaluate"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(command.split())
        output = capsys.readouterr().err
        assert ended.value.code == 1 and "rows over" not in output and "starts from" not in output
        assert re.search("trainer.accelerator is gpu, but .* set it to cpu or auto", output)
    cli.main(["plan", "vision"])  # it needs none
    assert "(cuda, " in capsys.readouterr().err
    paths.PARAMS.write_text(text.replace("accelerator: cpu", "accelerator: auto"))
    cli.main(["features"])


def test_weights_and_biases_is_named_if_it_is_not_installed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    message = fails("all", "--project", "panoramas")
    assert "'panoramas' needs Weights & Biases, which is not installed" in message


def test_weights_and_biases_gets_every_curve(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged: list[tuple[str, int, set[str]]] = []
    original = wandb.Run.log

    def log(run, data, step):
        logged.append((f"{run.project}/{run.name}", step, set(data)))
        original(run, data, step=step)

    monkeypatch.setattr(wandb.Run, "log", log)
    train("all", "--project", "panoramas", "--name", "first")
    wandb.finish()
    assert {run for run, _, _ in logged} == {f"panoramas/first_{stage}" for stage in STAGES}
    assert set().union(*(names for run, _, names in logged if run.endswith("resampler"))) == {
        *("train/loss", "train/gradient_norm"),
        *("train/learning_rate/connector", "train/learning_rate/encoder"),
        *("val/loss", "val/accuracy"),
        *("best", "val_loss", "val_accuracy", "truncated_rows"),
        *("rows_per_second", "peak_memory_gb"),
    }
    assert len(list(Path("wandb").glob("offline-run-*"))) == 3
