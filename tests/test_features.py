"""Cached features: equal to what the encoder computes, refused for other panoramas."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import ROOT, change, read_array, run_stage, save_shards
from panollava import paths
from panollava.config import Settings
from panollava.data.batches import gather
from panollava.data.prepare import prepare_project
from panollava.errors import UserError
from panollava.evaluation.evaluate import evaluate
from panollava.model import resampler
from panollava.model.network import build_model
from panollava.model.weights import load_weights
from panollava.stages import STAGES
from panollava.training.features import write_features


def read(folder: Path) -> torch.Tensor:
    return torch.from_numpy(read_array(folder))


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (8, 2, 2)),
        ({"model__tokens": "sphere"}, (64,)),
        ({"model__tokens": "sphere", "model__sphere_rows": 2, "model__sphere_columns": 8}, (16,)),
    ],
    ids=str,
)
def test_features_equal_what_the_encoder_computes(
    settings: Settings, changes: dict[str, Any], shape: tuple[int, ...]
) -> None:
    settings = change(settings, **changes)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    write_features(settings)
    model, _ = build_model(settings.model, settings.views)
    stage = STAGES["resampler"]
    load_weights(paths.weights_file("resampler"), model, stage.saves, stage)
    for split in ("train", "valid", "test"):
        views = read(paths.PREPARED / split / paths.PANORAMAS)
        expected = model.eval().features(views)
        written = read(paths.FEATURES / split)
        assert written.shape == (len(views), *shape, model.encoder.width)
        assert torch.allclose(written, expected, atol=1e-5)


def test_features_are_stored_in_the_precision_of_model_features(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = change(settings, **{f"stage__{name}__epochs": 0 for name in STAGES})
    run_stage("vision", settings)
    run_stage("resampler", settings)
    arrays = {}
    for precision in ("float32", "float16"):
        write_features(change(settings, model__features=precision))
        folders = [folder for folder in paths.FEATURES.iterdir() if folder.is_dir()]
        arrays[precision] = {folder.name: read_array(folder) for folder in folders}
        assert {str(array.dtype) for array in arrays[precision].values()} == {precision}
    for name, full in arrays["float32"].items():
        assert np.array_equal(arrays["float16"][name], full.astype(np.float16)), name
        batch = gather(arrays["float16"][name], [1, 0])
        assert batch.dtype == torch.float32
        assert np.array_equal(batch, arrays["float16"][name][[1, 0]])
    assert len(arrays["float32"]) == 4
    shutil.rmtree(paths.RESUME)
    pool = resampler.pool_tokens
    monkeypatch.setattr(resampler, "pool_tokens", lambda *inputs: pool(*inputs) * 1e5)
    message = r"train: features of panoramas 0-3 are not finite in float16; set model\.features"
    with pytest.warns(RuntimeWarning, match="overflow"), pytest.raises(UserError, match=message):
        write_features(change(settings, model__features="float16"))
    with pytest.raises(UserError, match="runs/features/provenance.json: no such file"):
        run_stage("finetune", settings)


def test_features_of_other_panoramas_or_rolls_are_an_error(settings: Settings) -> None:
    for stage in ("vision", "resampler"):
        run_stage(stage, settings)
    write_features(settings)
    run_stage("finetune", settings)
    others = (("rolls", [30.0, 45.0, 90.0, 180.0, 270.0]), ("split", "valid"))
    for name, value in others:  # of the same number of panoramas
        with pytest.raises(UserError, match=rf"made with evaluate\.{name} .*, now .*repro prepare"):
            evaluate(change(settings, **{f"evaluate__{name}": value}))
    other = change(settings, evaluate__rolls=others[0][1])
    prepare_project(other)
    with pytest.raises(UserError, match="runs/features: made with other prepared views"):
        evaluate(other)
    prepare_project(settings)
    run_stage("finetune", other)  # a training does not read the rolled panoramas
    save_shards(paths.FEATURES / "train", read(paths.FEATURES / "train")[:1].numpy())
    shutil.rmtree(paths.RESUME)
    with pytest.raises(UserError, match=r"train: contains 1 panoramas, but .*rows.csv refers to"):
        run_stage("finetune", settings)


@pytest.mark.parametrize("module", ["training.features", "evaluation.evaluate"])
def test_features_and_evaluate_do_not_import_lightning(module: str) -> None:
    script = (
        f"import sys; import panollava.{module}; "
        "sys.exit('pytorch_lightning' in sys.modules or 'lightning_fabric' in sys.modules)"
    )
    environment = {"PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0
