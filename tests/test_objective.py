"""Preparing the parts of the model for a stage, and the parameters that its optimizer holds."""

import dataclasses
from typing import Any

import pytest
import torch

from helpers import change
from panollava.config import Settings
from panollava.errors import UserError
from panollava.stages import STAGES
from panollava.training.objective import checked_groups, load_objective, prepare_parts


def test_only_parts_that_are_neither_trained_nor_saved_are_cast_to_half_precision(
    settings: Settings,
) -> None:
    stage = STAGES["resampler"]
    objective: Any = load_objective(stage, settings)
    prepare_parts(objective.model, stage, "bf16-mixed", checkpointing=False)
    parameters = objective.model.named_parameters()
    halved = {name.split(".")[0] for name, p in parameters if p.dtype == torch.bfloat16}
    assert halved == {"language_model"}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("vision", {"encoder": {"encoder"}}),
        ("resampler", {"connector": {"resampler", "projector"}, "encoder": {"encoder"}}),
        ("finetune", {"connector": {"resampler", "projector"}}),
    ],
)
def test_every_trained_parameter_is_in_one_group(
    settings: Settings, stage: str, expected: dict[str, set[str]]
) -> None:
    objective: Any = load_objective(STAGES[stage], settings)
    prepare_parts(objective.model, STAGES[stage], "32-true", checkpointing=False)
    names = {id(p): name.split(".")[0] for name, p in objective.model.named_parameters()}
    groups = checked_groups(objective)
    found = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert found == expected


@pytest.mark.parametrize("stage", ["resampler", "finetune"])
def test_a_stage_whose_optimizer_does_not_hold_what_it_trains_is_an_error(
    settings: Settings, stage: str
) -> None:
    row = STAGES[stage]
    row = dataclasses.replace(row, trains=(*row.trains, "language_model"))
    objective: Any = load_objective(row, settings)
    prepare_parts(objective.model, row, "32-true", checkpointing=False)
    message = "trains 'model.language_model.model.embed_tokens.weight', .* is in none; see .*answer"
    with pytest.raises(UserError, match=message):
        checked_groups(objective)


def test_a_group_that_trains_nothing_and_a_parameter_in_two_are_an_error(
    settings: Settings,
) -> None:
    row = dataclasses.replace(STAGES["resampler"], trains=("resampler", "projector"))
    # The row's features are still to be computed from views.
    objective: Any = load_objective(STAGES["resampler"], settings)
    prepare_parts(objective.model, row, "32-true", checkpointing=False)
    with pytest.raises(UserError, match="group 'encoder': the stage trains nothing in it"):
        checked_groups(objective)
    connector, encoder = objective.parameter_groups()
    twice = [connector, {**encoder, "params": connector["params"][:1]}]
    objective.parameter_groups = lambda: twice
    with pytest.raises(UserError, match=r"trains 'model\.resampler.*is in connector and encoder"):
        checked_groups(objective)


def test_an_expander_is_trained_with_the_encoder(settings: Settings) -> None:
    objective: Any = load_objective(STAGES["vision"], change(settings, stage__vision__expander=8))
    prepare_parts(objective.model, STAGES["vision"], "32-true", checkpointing=False)
    (group,) = checked_groups(objective)
    held = {id(p) for p in group["params"]}
    assert {id(p) for p in objective.expander.parameters()} <= held
