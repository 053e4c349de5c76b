from pathlib import Path

import pytest

from conftest import ROOT
from panollava.config import load_settings
from panollava.errors import UserError

PARAMS = (ROOT / "params.yaml").read_text()


def edited(tmp_path: Path, old: str, new: str) -> Path:
    assert old in PARAMS
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.replace(old, new, 1))
    return path


@pytest.mark.parametrize("profile", ["params.yaml", "presets/quic360.yaml"])
def test_the_committed_profiles_are_valid(profile: str) -> None:
    assert load_settings(ROOT / profile).seed == 0


def test_the_real_profile_is_the_design_s_table() -> None:
    stage = load_settings(ROOT / "presets/quic360.yaml").stage
    table = [
        (s.epochs, s.batch_size, s.lr, s.max_text_length)
        for s in (stage.vision, stage.resampler, stage.finetune)
    ]
    assert table == [(3, 32, 5e-6, 32), (5, 16, 2e-5, 64), (10, 8, 1e-5, 128)]


def test_a_mistyped_parameter_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    path = edited(tmp_path, "  size: 64", "  sise: 64")
    with pytest.raises(UserError, match=r"unknown parameter 'views.sise'.*'views.size'"):
        load_settings(path)


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing parameter 'seed'"):
        load_settings(edited(tmp_path, "seed: 0", ""))


def test_a_value_of_another_type_is_named(tmp_path: Path) -> None:
    path = edited(tmp_path, "  size: 64", "  size: big")
    with pytest.raises(UserError, match=r"views.size: expected int, found 'big' \(str\)"):
        load_settings(path)


def test_numbers_as_dvc_writes_them_are_numbers(tmp_path: Path) -> None:
    path = edited(tmp_path, "lr: 2.0e-3", "lr: 3e-05")
    assert load_settings(path).stage.resampler.lr == 3e-5


def test_no_file_and_no_yaml_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_settings(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_settings(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("")
    with pytest.raises(UserError, match="expected a mapping"):
        load_settings(tmp_path / "params.yaml")


def test_undeclared_parameters_cannot_be_read() -> None:
    settings = load_settings(ROOT / "params.yaml", ("seed", "stage.vision", "model.encoder.path"))
    assert settings.stage.vision.epochs >= 0
    assert settings.model.encoder.path
    assert settings.machine.save_every  # changes no result
    for unread in (lambda: settings.data, lambda: settings.stage.finetune):
        with pytest.raises(AttributeError):
            unread()
