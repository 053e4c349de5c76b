"""Prepared data and features that were made from something else are an error that says what to
run."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import change
from panollava import paths
from panollava.config import Settings, load_settings
from panollava.data.prepare import prepare_project
from panollava.errors import UserError
from panollava.model.encoder import load_encoder
from panollava.provenance.made_from import (
    check_features,
    check_prepared,
    invalidate,
    record_features,
)


@pytest.fixture
def settings(project: Path) -> Settings:
    """A folder in which `prepare` has run."""
    settings = load_settings(paths.PARAMS)
    prepare_project(settings)
    return settings


@pytest.fixture
def encoder(settings: Settings) -> torch.nn.Module:
    """The encoder whose features are recorded."""
    encoder = load_encoder(settings.model.encoder, settings.views.size)
    record_features(settings, encoder)
    return encoder


def test_what_was_made_from_the_same_passes(settings: Settings, encoder: torch.nn.Module) -> None:
    check_prepared(settings.views, settings.data)
    check_prepared(settings.views, replace(settings.data, dir=f"{settings.data.dir}/."))
    check_features(settings, encoder)


def test_prepared_data_of_other_views_is_an_error(settings: Settings) -> None:
    message = (
        "runs/prepared: made with views.fov 90.0, now 80.0; "
        "run: dvc repro prepare (without DVC: panollava prepare)"
    )
    with pytest.raises(UserError, match=re.escape(message) + "$"):
        check_prepared(replace(settings.views, fov=80.0))


def test_prepared_data_of_other_rows_is_an_error(settings: Settings) -> None:
    other = replace(settings.data, dir="other")
    check_prepared(settings.views)
    with pytest.raises(UserError) as error:
        check_prepared(settings.views, other)
    assert f"made with data.dir {settings.data.dir}, now other; run: dvc repro" in str(error.value)
    assert str(error.value).endswith(f", or pass --data-dir {settings.data.dir}")


@pytest.mark.parametrize(("name", "value"), [("rolls", [45.0]), ("split", "valid")])
def test_prepared_data_for_another_evaluation_is_an_error(
    settings: Settings, name: str, value: object
) -> None:
    before = getattr(settings.evaluate, name)
    check_prepared(settings.views, settings.data, settings.evaluate)
    message = (
        f"runs/prepared: made with evaluate.{name} {before}, now {value}; "
        "run: dvc repro prepare (without DVC: panollava prepare)"
    )
    with pytest.raises(UserError, match=re.escape(message) + "$"):
        check_prepared(settings.views, evaluate=change(settings.evaluate, **{name: value}))
    check_prepared(settings.views, settings.data)  # what a training reads


def test_features_of_other_rolled_panoramas_are_an_error(
    settings: Settings, encoder: torch.nn.Module
) -> None:
    other = replace(settings, evaluate=replace(settings.evaluate, rolls=[30.0]))
    prepare_project(other)
    check_prepared(settings.views, evaluate=other.evaluate)
    with pytest.raises(UserError, match="runs/features: made with other prepared views"):
        check_features(other, encoder)
    same = replace(settings, evaluate=replace(settings.evaluate, rolls=[20.0, 135.0]))
    prepare_project(same)  # a multiple of the stride has no features
    check_features(same, encoder)


def test_features_of_other_weights_or_settings_are_an_error(
    settings: Settings, encoder: torch.nn.Module
) -> None:
    for name, before, now in (
        ("features", "float32", "float16"),
        ("tokens", "sphere", "views"),
        ("sphere_rows", 4, 5),
        ("sphere_columns", 16, 24),
    ):
        model = change(settings.model, **{name: now})
        with pytest.raises(UserError, match=rf"with model\.{name} {before}, now {now}; run: dvc"):
            check_features(replace(settings, model=model), encoder)
    with pytest.raises(UserError, match=r"model\.resampler\.pool 2, now 4; run: dvc repro feat"):
        check_features(change(settings, model__resampler__pool=4), encoder)
    trainer = replace(settings.trainer, precision="bf16-mixed")
    with pytest.raises(UserError, match=r"trainer\.precision 32-true, now bf16-mixed; run: dvc"):
        check_features(replace(settings, trainer=trainer), encoder)
    with torch.no_grad():
        next(encoder.parameters()).flatten()[0] += 1
    message = (
        "runs/features: made with other encoder weights; "
        "run: dvc repro features (without DVC: panollava features)"
    )
    with pytest.raises(UserError, match=re.escape(message) + "$"):
        check_features(settings, encoder)


def test_features_of_pixels_normalized_otherwise_are_an_error(
    settings: Settings, encoder: torch.nn.Module
) -> None:
    encoder.get_buffer("mean").add_(0.1)
    with pytest.raises(UserError, match="runs/features: made with other encoder configuration; ru"):
        check_features(settings, encoder)


def test_features_of_another_layer_are_an_error(
    settings: Settings, encoder: torch.nn.Module
) -> None:
    other = replace(settings.model.encoder, layer=-2)
    shallow = load_encoder(other, settings.views.size)
    with pytest.raises(UserError, match=r"model\.encoder\.layer -1, now -2; run: dvc repro feat"):
        check_features(settings, shallow)


def test_features_of_other_views_are_an_error(
    settings: Settings, encoder: torch.nn.Module, small_data: Path
) -> None:
    shutil.copytree(small_data, "other")
    shutil.copy("other/images/train_1.jpg", "other/images/train_0.jpg")
    prepare_project(replace(settings, data=replace(settings.data, dir="other")))
    with pytest.raises(UserError, match="runs/features: made with other prepared views"):
        check_features(settings, encoder)


def test_what_is_being_overwritten_has_no_record(
    settings: Settings, encoder: torch.nn.Module
) -> None:
    invalidate(paths.FEATURES)
    with pytest.raises(UserError, match="no such file; run: dvc repro features"):
        check_features(settings, encoder)
    with pytest.raises(UserError):  # a run that ends early
        prepare_project(replace(settings, data=replace(settings.data, dir="runs")))
    with pytest.raises(UserError, match="no such file; run: dvc repro prepare"):
        check_prepared(settings.views)


def test_a_damaged_record_is_named(settings: Settings) -> None:
    (paths.PREPARED / "provenance.json").write_text('{"files": ')
    with pytest.raises(UserError, match=r"provenance\.json: not valid JSON .*run: dvc repro prep"):
        check_prepared(settings.views)
