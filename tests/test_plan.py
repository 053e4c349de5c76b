"""Promises about the plan: it states what a training then needs."""

import csv
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers import change, save_panorama, write_rows
from panollava import paths
from panollava.cli import main as cli
from panollava.config import Settings, load_settings
from panollava.planning import rows
from panollava.planning.plan import make_plan, show
from panollava.planning.rows import read_split
from panollava.stages import STAGES


def plan(*arguments: str) -> dict[str, Any]:
    cli.main(["plan", "--json", "plan.json", *arguments])
    return json.loads(Path("plan.json").read_text())


def add_rows(file: Path, rows: list[tuple[str, str, str]]) -> None:
    with file.open("a", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows(rows)


@pytest.mark.parametrize(("tokens", "count"), [("views", 8 * 2 * 2), ("sphere", 4 * 16)])
def test_a_training_needs_what_the_plan_states(
    project: Path, capsys: pytest.CaptureFixture[str], tokens: str, count: int
) -> None:
    text = Path("params.yaml").read_text().replace("tokens: sphere\n", f"tokens: {tokens}\n")
    Path("params.yaml").write_text(text.replace("labeled: 1.0", "labeled: 0.5"))
    before = plan()
    tokens_of = {name: stage["vision_tokens"] for name, stage in before["stages"].items()}
    assert tokens_of == {"vision": 0, "resampler": count, "finetune": count}
    output = capsys.readouterr().err
    for word in ("language_model", "activations", "model_final"):
        assert word in output
    cli.main(["train", "all"])
    log = capsys.readouterr().err
    assert plan()["stages"] == before["stages"]  # from the CSV as from what prepare wrote
    for name, planned in before["stages"].items():
        assert f"1 epochs, {planned['steps']} steps" in log
        assert planned["model_final"] == pytest.approx(
            paths.weights_file(name).stat().st_size, rel=0.1, abs=10_000
        )
        (checkpoint,) = (paths.run_folder(name) / "checkpoints").iterdir()
        assert planned["checkpoint"] == pytest.approx(
            checkpoint.stat().st_size, rel=0.1, abs=50_000
        )
        for part, count in planned["parameters"].items():
            assert f"{count:,}" in log, part
    for folder, size in ((paths.PREPARED, before["views"]), (paths.FEATURES, before["features"])):
        files = [*folder.rglob("*.npy")]
        assert sum(path.stat().st_size - 128 for path in files) == size and len(files) == 5


@pytest.mark.parametrize(("batch_size", "panoramas"), [(16, 5), (8, 2)])
def test_the_mean_size_of_a_step_is_planned_and_logged(
    project: Path, small_data: Path, capsys, batch_size: int, panoramas: int
) -> None:
    """`batch_size` is an upper bound, because a panorama's rows stay together."""
    text = paths.PARAMS.read_text().replace(str(small_data), "data")
    paths.PARAMS.write_text(re.sub(r"batch_size: \d+", f"batch_size: {batch_size}", text))
    shutil.copytree(small_data, "data")
    names = [f"images/{number}.jpg" for number in range(10)]
    for number, name in enumerate(names):
        save_panorama(Path("data", name), number)
    rows = [(name, query, "a box") for name in names for query in ("what", "where", "what is")]
    write_rows(Path("data/train.csv"), rows)
    stages = plan()["stages"]
    rows_per_step = {name: stages[name]["rows_per_step"] for name in stages}
    assert rows_per_step == {"vision": None, "resampler": 3 * panoramas, "finetune": 3 * panoramas}
    assert stages["resampler"]["panoramas_per_step"] == panoramas
    assert stages["vision"]["panoramas_per_step"] == (10 if batch_size == 16 else 5)
    assert re.search(rf"resampler .* {3 * panoramas}\.0 +{panoramas}\.0 ", capsys.readouterr().err)
    cli.main(["prepare"])
    for stage in ("vision", "resampler"):
        cli.main(["train", stage])
    log = capsys.readouterr().err
    steps = stages["resampler"]["steps"]
    mean = f"{3 * panoramas}.0 rows and {panoramas}.0 panoramas on average"
    assert f"1 epochs, {steps} steps of {mean}" in log
    assert f"steps of {stages['vision']['panoramas_per_step']:.1f} panoramas on average" in log
    assert "learning rates: connector 0.002, encoder 0.0002" in log


def test_no_weights_are_read(project: Path, towers: Path) -> None:
    shutil.copytree(towers, "towers", ignore=shutil.ignore_patterns("*.safetensors"))
    text = paths.PARAMS.read_text().replace(str(towers), "towers")
    Path("other.yaml").write_text(text)
    assert plan("--params", "other.yaml", "resampler")["stages"].keys() == {"resampler"}


def test_without_rows_the_plan_is_an_upper_bound(
    project: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = plan()["stages"]
    assert "no rows found" not in capsys.readouterr().err
    paths.PARAMS.write_text(paths.PARAMS.read_text().replace(str(small_data), "nowhere"))
    unknown = plan()["stages"]
    assert "no rows found: assuming one full-length row per panorama" in capsys.readouterr().err
    for name in STAGES:
        assert unknown[name]["steps"] is None and known[name]["steps"] > 0
        assert unknown[name]["panoramas_per_step"] is None
        assert unknown[name]["memory"]["activations"] >= known[name]["memory"]["activations"]


def test_rows_of_other_data_that_was_prepared_are_not_used(
    project: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What prepare wrote is preferred if it belongs to these rows: broken pictures are removed."""
    shutil.copytree(small_data, "data")
    Path("data/images/broken.jpg").write_text("gone")
    add_rows(Path("data/train.csv"), [("images/broken.jpg", "what\ris it", "a box")])
    text = paths.PARAMS.read_text().replace("max_rejected: 0.0", "max_rejected: 0.5")
    for folder in ("data", "other", "nowhere"):
        Path(f"{folder}.yaml").write_text(text.replace(str(small_data), folder))
    shutil.copytree("data", "other")
    write_rows(Path("other/train.csv"), [("images/train_0.jpg", "what", "a box")])
    shutil.copy("data.yaml", paths.PARAMS)

    def planned(folder: str) -> tuple[int | None, str | None, int | None]:
        result = plan("resampler", "--params", f"{folder}.yaml")
        train = result["splits"].get("train", {"rows": None, "file": None})
        return train["rows"], train["file"], result["stages"]["resampler"]["steps"]

    before = planned("data")
    assert before[:2] == (14, "data/train.csv") and planned("other")[0] == 1
    cli.main(["prepare"])
    assert planned("data")[:2] == (13, "runs/prepared/train/rows.csv")
    assert planned("other") == (1, "other/train.csv", 1)
    assert planned("nowhere") == (None, None, None)
    capsys.readouterr()
    add_rows(Path("data/train.csv"), [("images/train_0.jpg", "where", "a box")])
    assert planned("data")[:2] == (15, "data/train.csv")
    output = capsys.readouterr().err
    assert re.search(r"train .* data/train.csv\nvalid .* runs/prepared/valid/rows.csv\n", output)


def test_rows_are_not_read_again_while_no_file_has_changed(
    project: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_data, "data")
    paths.PARAMS.write_text(paths.PARAMS.read_text().replace(str(small_data), "data"))
    cli.main(["prepare"])
    settings, source = load_settings(paths.PARAMS), Path("data/train.csv")
    prepared = paths.PREPARED / "train/rows.csv"

    def file() -> Path:
        split = read_split(settings, "train")
        assert split is not None
        return split.file

    with monkeypatch.context() as patch:
        patch.setattr(rows, "read_rows", None)
        assert file() == prepared
    original = source.read_bytes()
    source.write_bytes(original.replace(b"\r\n", b"\n"))
    assert file() == prepared  # the texts are the same
    source.write_bytes(original.replace(b"red", b"green"))
    assert file() == source
    source.write_bytes(original)
    assert file() == prepared
    written = prepared.read_text()
    prepared.write_text(written.replace("red", "green"))
    assert file() == source
    prepared.write_text(written)
    (paths.PREPARED / "provenance.json").unlink()
    assert file() == prepared


def test_a_stage_without_epochs_needs_only_its_weights(project: Path) -> None:
    text = paths.PARAMS.read_text().replace("epochs: 1", "epochs: 0", 1)
    paths.PARAMS.write_text(text)
    vision = plan("vision")["stages"]["vision"]
    memory = vision["memory"]
    assert vision["steps"] == 0 and memory["activations"] == 0 < memory["weights"]


@pytest.mark.parametrize("position", ["view", "none"])
def test_positions_of_every_kind_are_planned_and_trained(project: Path, position: str) -> None:
    text = paths.PARAMS.read_text()
    text = text.replace("tokens: sphere\n", "tokens: views\n")  # merged ones belong to no view
    text = text.replace("position: ray", f"position: {position}")
    paths.PARAMS.write_text(re.sub(r"epochs: 1", "epochs: 0", text, count=1))
    tokens = plan("resampler")["stages"]["resampler"]["vision_tokens"]
    cli.main(["prepare"])
    cli.main(["train", "vision"])
    cli.main(["train", "resampler"])
    assert tokens == 8 * 2 * 2 and paths.weights_file("resampler").is_file()


def test_a_stage_with_patience_has_at_most_the_planned_steps(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = change(settings, stage__finetune__patience=2)
    show(make_plan(settings, list(STAGES.values())), checkpointing=False, bandwidth=10)
    assert "finetune: at most these steps, because of its patience (2)" in caplog.text
    assert "resampler: at most" not in caplog.text


def test_a_bandwidth_of_nothing_is_reported(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bandwidth in ("0", "-1", "nan"):
        with pytest.raises(SystemExit) as ended:
            plan("--bandwidth", bandwidth)
        assert ended.value.code == 1
        error = f"error: --bandwidth: expected GB/s above 0, found {bandwidth}\n"
        assert capsys.readouterr().err.endswith(error)
