"""A fingerprint changes with each thing that a result depends on."""

from pathlib import Path

import pytest
import torch

from panollava.provenance.fingerprint import fingerprint

SETTINGS = {"seed": 0, "views": {"fov": 90.0, "size": 32}}
TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(3, dtype=torch.bfloat16)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "views.npy"
    path.write_bytes(b"views")
    return path


def test_it_depends_on_contents_and_not_on_their_order_or_place(file: Path, tmp_path: Path) -> None:
    key = fingerprint(SETTINGS, [file], TENSORS)
    assert len(key) == 16 and int(key, 16)
    settings = {"views": {"size": 32, "fov": 90.0}, "seed": 0}
    tensors = dict(reversed(TENSORS.items()))
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    assert fingerprint(settings, [copy], tensors) == key


@pytest.mark.parametrize(
    "tensors",
    [
        {**TENSORS, "weight": TENSORS["weight"] + 1},
        {**TENSORS, "bias": torch.ones(3, dtype=torch.bfloat16)},
        {"weight": TENSORS["weight"], "other": TENSORS["bias"]},
        {"weight": TENSORS["weight"]},
        {},
    ],
)
def test_each_tensor_changes_it(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert fingerprint(SETTINGS, [file], tensors) != fingerprint(SETTINGS, [file], TENSORS)


def test_settings_and_files_change_it(file: Path) -> None:
    keys = [fingerprint(SETTINGS, [file], {}), fingerprint({**SETTINGS, "seed": 1}, [file], {})]
    keys += [fingerprint(SETTINGS, [], {}), fingerprint(SETTINGS, [file, file], {})]
    file.write_bytes(b"other")
    keys.append(fingerprint(SETTINGS, [file], {}))
    assert len(set(keys)) == len(keys)
