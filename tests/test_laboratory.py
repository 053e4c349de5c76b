"""The laboratory: many trainings at once equal `panollava train` and `evaluate`; its intervals
contain the truth as often as they say."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import laboratory_work
from helpers import change, curve, run_stage
from panollava import paths
from panollava.config import Settings
from panollava.evaluation.evaluate import evaluate
from panollava.evaluation.metrics import group_references
from panollava.files import read_prepared_rows
from panollava.stages import STAGES
from panollava.training.features import write_features
from replicas import Replicas

SEEDS = (0, 1)  # whose epochs have different numbers of steps
CPU = torch.device("cpu")
# The softmax of attention ignores a bias that all keys share: its gradient is rounding.
WITHOUT_GRADIENT = "k_proj.bias"


@pytest.fixture
def each(settings: Settings) -> list[Settings]:
    """Settings of every seed."""
    settings = change(
        settings,
        trainer__threads=1,
        stage__resampler__batch_size=5,
        stage__resampler__labeled=0.7,
        stage__finetune__epochs=3,
        stage__finetune__batch_size=5,
        stage__finetune__labeled=0.7,
    )
    return [change(settings, seed=seed) for seed in SEEDS]


def train_stages(settings: Settings, last: str, folder: Path) -> dict[str, list[float]]:
    """Train up to the stage `last` by Lightning, and keep the weights in `folder`. Returns the
    validation losses."""
    losses = {}
    for name in ("vision", "resampler", "finetune"):
        if STAGES[name].reads_features:
            write_features(settings)
        run_stage(name, settings)
        losses[name] = curve(name, "val/loss")
        shutil.copytree(paths.run_folder(name), folder / name)
        if name == last:
            break
    return losses


@pytest.mark.parametrize("name", ["vision", "resampler", "finetune"])
def test_replicas_end_in_the_losses_and_weights_of_panollava_train(
    each: list[Settings], name: str, tmp_path: Path
) -> None:
    stage, folders = STAGES[name], [tmp_path / f"seed{seed}" for seed in SEEDS]
    expected = [
        train_stages(settings, name, folder)[name]
        for settings, folder in zip(each, folders, strict=True)
    ]
    starts = [
        folder / stage.starts_from / paths.WEIGHTS if stage.starts_from else None
        for folder in folders
    ]
    trained = Replicas(stage, each, starts, CPU)
    history = trained.train()
    steps = [module.epoch_steps for module in trained.modules]
    assert steps == ([[2], [2]] if name == "vision" else [[3, 2, 2], [3, 3, 2]])
    for losses, reference in zip(history, expected, strict=True):
        assert losses == pytest.approx(reference, rel=1e-5)
        assert min(losses) < losses[0]
    for objective, folder in zip(trained.objectives, folders, strict=True):
        saved = load_file(folder / name / paths.WEIGHTS)
        state = objective.model.state_dict()
        for key, value in saved.items():
            if not key.endswith(WITHOUT_GRADIENT):
                torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)


def test_replicas_answer_as_panollava_evaluate_does(each: list[Settings], tmp_path: Path) -> None:
    expected, folders = [], []
    for settings in each:
        folders.append(tmp_path / f"seed{settings.seed}")
        train_stages(settings, "resampler", folders[-1])
        write_features(settings)
        run_stage("finetune", settings)
        evaluate(settings)
        expected.append(pd.read_csv(paths.PREDICTIONS, keep_default_na=False))
    starts = [folder / "resampler" / paths.WEIGHTS for folder in folders]
    trained = Replicas(STAGES["finetune"], each, starts, CPU)
    trained.train()
    split = paths.PREPARED / each[0].evaluate.split
    references = group_references(read_prepared_rows(split / "rows.csv"))
    answered = laboratory_work.answer_all(trained, references)
    for answers, table in zip(answered, expected, strict=True):
        assert answers.keys() >= {"prediction", "turned by 20", "turned by 45"}
        for name, texts in answers.items():
            rows = zip(table["panorama"], table["query"], table[name], strict=True)
            assert texts == {(panorama, query): text for panorama, query, text in rows}
        assert len(set(answers["prediction"].values())) > 1
