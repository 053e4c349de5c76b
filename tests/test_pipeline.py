"""Promises of the whole pipeline, under real DVC and git, in a copy of the project with small
data and towers."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from helpers import CODE_EDITS, PIPELINE, Project, copy_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

AFTER_VISION = set(PIPELINE[2:])


@pytest.fixture
def project(finished: Project) -> Iterator[Project]:
    """The finished project, restored after the test."""
    yield finished
    finished.run("git", "reset", "-q", "--hard")
    finished.run("git", "clean", "-fdq")
    finished.run("dvc", "checkout", "-q")


def test_a_second_repro_finds_nothing_to_do(project: Project) -> None:
    assert "up to date" in project.run("dvc", "repro")
    assert project.run("git", "status", "--short") == ""


def test_results_have_the_names_that_users_know(project: Project) -> None:
    for stage in ("vision", "resampler", "finetune"):
        folder = project.folder / f"runs/vlm_{stage}"
        assert (folder / "model_final.safetensors").is_file()
        (checkpoint,) = (folder / "checkpoints").iterdir()
        assert re.fullmatch(r"epoch=0\d-val_loss=\d+\.\d{3}\.ckpt", checkpoint.name)
    logs = {re.sub(r"\d{8}_\d{6}", "TIME", p.name) for p in (project.folder / "logs").iterdir()}
    assert {
        "stage1_vision_TIME.log",
        "stage2_resampler_TIME.log",
        "stage3_finetune_TIME.log",
    } <= logs
    shown = project.run("dvc", "metrics", "show")
    for name in ("best.step", "val_loss", "val_accuracy"):
        assert name in shown, shown


def edit_pixel(project: Project) -> None:
    path = project.folder / "small/data/images/train_0.jpg"
    picture = Image.open(path).convert("RGB")
    picture.putpixel((3, 30), (255, 0, 255))
    picture.save(path, quality=95)


def edit(file: str, old: str, new: str) -> Callable[[Project], None]:
    return lambda project: project.replace(file, old, new)


def edit_param(stage: str, name: str, value: str) -> Callable[[Project], None]:
    def change(project: Project) -> None:
        path = project.folder / "params.yaml"
        pattern = rf"(\nstage:\n(?:.*\n)*?  {stage}:\n(?:.*\n)*?    {name}: )\S+"
        text, count = re.subn(pattern, rf"\g<1>{value}", path.read_text(), count=1)
        assert count
        path.write_text(text)

    return change


def edit_machine(project: Project) -> None:
    project.set("params.yaml", decode_threads=1, loader_workers=1, save_every=7)
    project.replace("params.yaml", "wandb: null", "wandb: panoramas")


EDITS: dict[str, tuple[Callable[[Project], None], set[str]]] = {
    "vision's lr": (edit_param("vision", "lr", "2e-4"), set(PIPELINE[1:])),
    "resampler's lr": (edit_param("resampler", "lr", "3e-5"), AFTER_VISION),
    "finetune's lr": (edit_param("finetune", "lr", "3e-5"), {"finetune", "evaluate", "report"}),
    "seed": (edit("params.yaml", "seed: 0", "seed: 1"), set(PIPELINE[1:])),
    "views' pitch": (edit("params.yaml", "pitch: 0", "pitch: 10"), set(PIPELINE)),
    "a pixel of one panorama": (edit_pixel, set(PIPELINE)),
    # The pictures are the same, and the vision stage reads no text.
    "one annotation": (
        edit("small/data/train.csv", "the red box is left.", "the red ball is left."),
        {"prepare", "resampler", "features", "finetune", "evaluate", "report"},
    ),
    "one annotation of test": (
        edit("small/data/test.csv", "the red box is left.", "the red box is right."),
        {"prepare", "evaluate", "report"},
    ),
    "length of the evaluation": (
        edit("params.yaml", "max_new_tokens: ", "max_new_tokens: 1"),
        {"evaluate", "report"},
    ),
    "the angles of the evaluation": (
        edit("params.yaml", "rolls: [20, 45", "rolls: [30, 45"),
        {"prepare", "features", "evaluate", "report"},
    ),
    # It only reorders the views, so that there are no features of it.
    "a multiple of the view stride": (
        edit("params.yaml", "rolls: [20, 45", "rolls: [20, 135"),
        {"prepare", "evaluate", "report"},
    ),
    "the look of the report": (
        edit("src/panollava/serving/assets/report.css", "flex-wrap: wrap", "flex-wrap: nowrap"),
        {"report"},
    ),
    "the sphere's cells": (
        edit("params.yaml", "sphere_rows: 4", "sphere_rows: 5"),
        AFTER_VISION,
    ),
    "the resampler's width": (edit("params.yaml", "width: 512", "width: 128"), AFTER_VISION),
    "all that belongs to the machine": (edit_machine, set()),
    **{
        name: (edit(f"src/panollava/{code.file}", code.old, code.new), code.reruns)
        for name, code in CODE_EDITS.items()
    },
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_reruns_exactly_the_stages_that_it_touches(project: Project, name: str) -> None:
    change, expected = EDITS[name]
    change(project)
    assert project.repro() == expected
    assert "up to date" in project.run("dvc", "repro")


def test_an_experiment_reruns_what_its_parameter_touches(project: Project) -> None:
    output = project.run("dvc", "exp", "run", "-S", "stage.resampler.lr=4e-5", "-n", "slower")
    assert set(re.findall(r"Running stage '(\w+)'", output)) == AFTER_VISION
    rate = (project.folder / "params.yaml").read_text()
    assert re.search(r"lr: (4e-05|4e-5|0\.00004)", rate)
    difference = json.loads(project.run("dvc", "metrics", "diff", "--json"))
    changed = {Path(path).parent.name for path in difference}
    assert {"resampler", "finetune"} <= changed and "vision" not in changed
    table = project.run("dvc", "exp", "show", "--csv")
    assert "slower" in table and len(table.strip().splitlines()) >= 3


@pytest.mark.parametrize("how", ["--temp", "--queue"])
def test_an_experiment_in_a_copy_runs_the_code_of_the_copy(project: Project, how: str) -> None:
    """The change is committed only in the copy; another copy is installed on the path."""
    project.replace(
        "src/panollava/evaluation/metrics.py",
        '"grounding_gap": gap',
        '"own_code": 1, "grounding_gap": gap',
    )
    project.commit("own code")
    name = f"elsewhere{how.strip('-')}"
    project.run("dvc", "exp", "run", how, "-n", name, "-S", "evaluate.max_new_tokens=5")
    if how == "--queue":
        project.run("dvc", "queue", "start")
        project.run("dvc", "queue", "logs", name, "--follow", check=False)
    for _ in range(60):
        if name in project.run("dvc", "exp", "list", "--name-only"):
            break
        time.sleep(1)
    project.run("dvc", "exp", "apply", name)
    metrics = json.loads((project.folder / "metrics/evaluate/metrics.json").read_text())
    assert metrics["own_code"] == 1
    project.run("git", "reset", "-q", "--hard", "HEAD~1")


def test_two_clones_have_the_same_lock_file(
    finished: Project, tmp_path: Path, small_data: Path, towers: Path
) -> None:
    other = copy_project(tmp_path / "other", towers, small_data)
    other.repro()
    one, two = (project.folder / "dvc.lock" for project in (finished, other))
    assert one.read_bytes() == two.read_bytes()


def test_an_invalid_parameter_is_reported_without_a_traceback(project: Project) -> None:
    project.replace("params.yaml", "strategy: e2p", "strategy: e3p")
    output = project.run("dvc", "repro", check=False)
    assert re.search(r"views\.strategy: expected 'e2p', .* found 'e3p'", output), output
    assert "Traceback" not in output
