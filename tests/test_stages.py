import contextlib
import dataclasses

import pytest
from ruamel.yaml import YAML
from torch import nn

from helpers import ROOT
from panollava.config import ALWAYS_READABLE, VisionStage, load_settings
from panollava.data import prepare
from panollava.errors import UserError
from panollava.evaluation import evaluate
from panollava.serving import report
from panollava.stages import STAGES
from panollava.training import features
from panollava.training.objective import freeze_all_but

LISTED = {
    name: tuple(stage.get("params", ()))
    for name, stage in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].items()
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
        self.projector = nn.Linear(3, 2)
        self.empty = nn.GELU()


def test_named_parts_train_and_all_others_are_frozen() -> None:
    model = Model()
    table = freeze_all_but(model, ("projector",))
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert all(p.requires_grad for p in model.projector.parameters())
    assert not model.encoder.training and model.projector.training
    lines = [line.split() for line in table.splitlines()]
    assert ["encoder", "frozen", "9"] in lines and ["projector", "trains", "8"] in lines


def test_a_name_that_matches_no_parameter_is_an_error() -> None:
    for name in ("resampler", "empty"):
        with pytest.raises(UserError, match=name):
            freeze_all_but(Model(), (name,))


def test_each_stage_starts_from_the_one_before() -> None:
    assert [s.starts_from for s in STAGES.values()] == [None, "vision", "resampler"]


def test_the_pipeline_lists_exactly_the_parameters_that_its_stages_read() -> None:
    reads = {stage.name: stage.reads for stage in STAGES.values()}
    reads |= {
        module.__name__.split(".")[-1]: module.READS
        for module in (prepare, features, evaluate, report)
    }
    assert {name: LISTED[name] for name in LISTED if name != "digest"} == reads


def test_no_stage_of_the_pipeline_lists_what_changes_no_result() -> None:
    keys = {key for listed in LISTED.values() for key in listed}
    assert keys and not {key for key in keys if key.split(".")[0] in ALWAYS_READABLE}


def test_the_vision_stage_reads_every_parameter_of_its_section_except_the_text_length() -> None:
    keys = {f"stage.vision.{field.name}" for field in dataclasses.fields(VisionStage)}
    read = {key for key in STAGES["vision"].reads if key.startswith("stage.")}
    assert keys - read == {"stage.vision.max_text_length"} and read < keys


def test_undeclared_parameters_cannot_be_read_by_a_stage() -> None:
    vision = load_settings(ROOT / "params.yaml", STAGES["vision"].reads).stage.vision
    assert vision.temperature > 0
    with pytest.raises(AttributeError):
        _ = vision.max_text_length


def test_the_prompt_is_read_by_the_stages_that_read_text_and_by_no_others() -> None:
    readers = set()
    for name, keys in LISTED.items():
        with contextlib.suppress(AttributeError):
            assert load_settings(ROOT / "params.yaml", keys).model.prompt
            readers.add(name)
    assert readers == {"resampler", "finetune", "evaluate", "report"}
