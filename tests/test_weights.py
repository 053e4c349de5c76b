"""Trained weights are saved atomically and loaded strictly."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from panollava.errors import UserError
from panollava.model.weights import load_weights, read_header, save_weights
from panollava.stages import STAGES, Stage

VISION = STAGES["vision"]
RESAMPLER = STAGES["resampler"]


def stage_that_saves(*parts: str) -> Stage:
    return dataclasses.replace(RESAMPLER, saves=parts)


class Model(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, width)
        self.projector = nn.Linear(width, 2)
        self.language_model = nn.Linear(2, 2)


def test_saved_parts_are_loaded_and_no_others(tmp_path: Path) -> None:
    path, one, other = tmp_path / "model_final.safetensors", Model(), Model()
    header = {"stage": "resampler", "settings": {"views": {"fov": 90.0}}}
    save_weights(path, one, ("encoder", "projector"), header)
    assert load_weights(path, other, ("encoder", "projector"), RESAMPLER) == header
    assert torch.equal(one.encoder.weight, other.encoder.weight)
    assert not torch.equal(one.language_model.weight, other.language_model.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model_final.safetensors"]


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    model = Model()
    header = {"stage": "vision", "b": 1, "a": 2}
    save_weights(tmp_path / "a", model, ("encoder",), header)
    save_weights(tmp_path / "b", model, ("encoder",), dict(reversed(header.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tied_tensors_are_saved_and_loaded(tmp_path: Path) -> None:
    """As are parts of one tensor."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first, second, third = (nn.Linear(2, 2) for _ in range(3))
            second.weight = first.weight
            both = torch.randn(2, 2)
            second.bias, third.bias = nn.Parameter(both[0]), nn.Parameter(both[1])
            self.encoder = nn.Sequential(first, second, third)

    one, other = Tied(), Tied()
    save_weights(tmp_path / "w", one, ("encoder",), {"stage": "vision"})
    load_weights(tmp_path / "w", other, ("encoder",), VISION)
    assert len([*other.encoder.parameters()]) == 5  # of six
    for name, tensor in one.encoder.state_dict().items():
        assert torch.equal(tensor, other.encoder.state_dict()[name]), name


def test_one_part_of_several_can_be_loaded(tmp_path: Path) -> None:
    path, both = tmp_path / "w", ("encoder", "projector")
    save_weights(path, Model(), both, {"stage": "resampler"})
    load_weights(path, Model(), ("encoder",), stage_that_saves(*both))
    with pytest.raises(UserError, match="is not in the model"):
        load_weights(path, Model(), ("encoder",), stage_that_saves("encoder"))


def test_weights_that_do_not_match_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save_weights(path, Model(), ("encoder",), {"stage": "vision", "settings": {"size": 64}})
    with pytest.raises(UserError, match="result of stage 'vision', expected 'resampler'"):
        load_weights(path, Model(), ("encoder",), RESAMPLER)
    with pytest.raises(UserError, match=r"shape \(3,\), expected \(4,\)"):
        load_weights(path, Model(width=4), ("encoder",), VISION)
    with pytest.raises(UserError, match=r"projector.* is missing from the file"):
        load_weights(path, Model(), ("encoder", "projector"), VISION)


def test_missing_truncated_and_foreign_files_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such file"):
        read_header(tmp_path / "nowhere")
    path = tmp_path / "w"
    save_weights(path, Model(), ("encoder",), {"stage": "vision"})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="w: not a readable safetensors file"):
        read_header(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not written by PanoLLaVA"):
        read_header(path)
