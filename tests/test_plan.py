"""What the plan says is what a training then takes."""

import csv
import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import change, write_rows
from panollava import paths
from panollava.cli import main as cli
from panollava.config import load_settings
from panollava.planning.step_memory import LiveStorage, step_memory
from panollava.planning.workload import find_workload
from panollava.stages import STAGES, Stage
from panollava.training.objective import freeze_all_but
from panollava.training.tower_layers import checkpoint_layers


def plan(*arguments: str) -> dict[str, Any]:
    cli.main(["plan", "--json", "plan.json", *arguments])
    return json.loads(Path("plan.json").read_text())


def add_rows(file: Path, rows: list[tuple[str, str, str]]) -> None:
    with file.open("a", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows(rows)


def objective_of(stage: Stage, settings: Any, weights: bool, checkpointed: bool) -> Any:
    objective = importlib.import_module(stage.objective).Objective(stage, settings, weights)
    freeze_all_but(objective.model, stage.trains)
    if checkpointed:
        checkpoint_layers(objective.model)
    return objective


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", STAGES)
def test_the_memory_of_a_step_is_what_a_real_step_holds(
    project: Path, name: str, parts: int, checkpointed: bool
) -> None:
    settings, stage = load_settings(paths.PARAMS), STAGES[name]
    empty = objective_of(stage, settings, False, checkpointed)
    step = find_workload(empty, settings, stage, parts).heaviest[0]
    estimate = step_memory(empty, step, "32-true", torch.device("cpu"))
    real = objective_of(stage, settings, True, checkpointed)
    with LiveStorage() as alive:
        for own in (*real.parameters(), *real.buffers(), *getattr(real, "pairs", ())):
            alive.count(own.untyped_storage())
        held = alive.now
        real.step([real.blank(part) for part in step], Tensor.backward)
    gradients = sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
    assert estimate.gradients == pytest.approx(gradients, rel=0.01)
    assert estimate.gradients + estimate.activations == pytest.approx(alive.peak - held, rel=0.03)
    assert estimate.weights == sum(p.nbytes for p in real.parameters())


def test_the_plan_is_what_a_training_then_does(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("labelled: 1.0", "labelled: 0.5"))
    before = plan()
    shown = capsys.readouterr().err
    assert "language_model" in shown and "activations" in shown and "model_final" in shown
    cli.main(["train", "all"])
    log = capsys.readouterr().err
    assert plan()["stages"] == before["stages"]  # from the CSV as from what prepare wrote
    for name, own in before["stages"].items():
        assert f"1 epochs, {own['steps']} steps" in log
        assert own["model_final"] == pytest.approx(
            paths.weights_file(name).stat().st_size, rel=0.1, abs=10_000
        )
        (checkpoint,) = (paths.run_folder(name) / "checkpoints").iterdir()
        assert own["checkpoint"] == pytest.approx(checkpoint.stat().st_size, rel=0.1, abs=50_000)
        for part, count in own["parameters"].items():
            assert f"{count:,}" in log, part
    for folder, size in ((paths.PREPARED, before["views"]), (paths.FEATURES, before["features"])):
        files = [*folder.rglob("*.npy")]
        assert sum(path.stat().st_size - 128 for path in files) == size and len(files) == 4


def test_no_weights_are_read(project: Path, towers: Path) -> None:
    shutil.copytree(towers, "towers", ignore=shutil.ignore_patterns("*.safetensors"))
    text = paths.PARAMS.read_text().replace(str(towers), "towers")
    Path("other.yaml").write_text(text)
    assert plan("--params", "other.yaml", "resampler")["stages"].keys() == {"resampler"}


def test_without_rows_the_plan_is_an_upper_bound(project: Path, small_data: Path) -> None:
    known = plan()["stages"]
    paths.PARAMS.write_text(paths.PARAMS.read_text().replace(str(small_data), "nowhere"))
    unknown = plan()["stages"]
    for name in STAGES:
        assert unknown[name]["steps"] is None and known[name]["steps"] > 0
        assert unknown[name]["memory"]["activations"] >= known[name]["memory"]["activations"]


def test_rows_are_those_of_the_data_whatever_has_been_prepared(
    project: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What prepare wrote counts if it is of these rows: it has found the broken pictures."""
    shutil.copytree(small_data, "own")
    Path("own/images/broken.jpg").write_text("gone")
    add_rows(Path("own/train.csv"), [("images/broken.jpg", "what\ris it", "a box")])
    text = paths.PARAMS.read_text().replace("max_rejected: 0.0", "max_rejected: 0.5")
    for folder in ("own", "other", "nowhere"):
        Path(f"{folder}.yaml").write_text(text.replace(str(small_data), folder))
    shutil.copytree("own", "other")
    write_rows(Path("other/train.csv"), [("images/train_0.jpg", "what", "a box")])
    shutil.copy("own.yaml", paths.PARAMS)

    def planned(folder: str) -> tuple[int | None, str | None, int | None]:
        found = plan("resampler", "--params", f"{folder}.yaml")
        train = found["rows"].get("train"), found["files"].get("train")
        return *train, found["stages"]["resampler"]["steps"]

    before = planned("own")
    assert before[:2] == (14, "own/train.csv") and planned("other")[0] == 1
    cli.main(["prepare"])
    assert planned("own")[:2] == (13, "runs/prepared/train/rows.csv")
    assert planned("other") == (1, "other/train.csv", 1)
    assert planned("nowhere") == (None, None, None)
    capsys.readouterr()
    add_rows(Path("own/train.csv"), [("images/train_0.jpg", "where", "a box")])
    assert planned("own")[:2] == (15, "own/train.csv")
    assert "read from: own/train.csv, runs/prepared/valid/rows.csv" in capsys.readouterr().err


def test_half_precision_and_parts_take_less(project: Path) -> None:
    settings, stage = load_settings(paths.PARAMS), STAGES["resampler"]
    taken = []
    for precision, parts in (("32-true", 1), ("bf16-mixed", 1), ("bf16-mixed", 4)):
        own = change(settings, trainer__precision=precision)
        empty = objective_of(stage, own, False, False)
        step = find_workload(empty, own, stage, parts).heaviest[0]
        taken.append(step_memory(empty, step, precision, torch.device("cpu")).activations)
    assert taken[0] > taken[1] > taken[2]


def test_a_stage_without_epochs_holds_its_weights_alone(project: Path) -> None:
    text = paths.PARAMS.read_text().replace("epochs: 1", "epochs: 0", 1)
    paths.PARAMS.write_text(text)
    own = plan("vision")["stages"]["vision"]
    assert own["steps"] == 0 and own["memory"]["activations"] == 0 < own["memory"]["weights"]


@pytest.mark.parametrize("position", ["view", "none"])
def test_positions_of_every_kind_are_planned_and_trained(project: Path, position: str) -> None:
    text = paths.PARAMS.read_text()
    text = text.replace("position: ray", f"position: {position}")
    paths.PARAMS.write_text(re.sub(r"epochs: 1", "epochs: 0", text, count=1))
    tokens = plan("resampler")["stages"]["resampler"]["vision_tokens"]
    cli.main(["prepare"])
    cli.main(["train", "vision"])
    cli.main(["train", "resampler"])
    assert tokens == 8 * 2 * 2 and paths.weights_file("resampler").is_file()


def test_an_unknown_stage_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan("stage1")
    assert "unknown stage 'stage1'" in capsys.readouterr().err
