"""Preparing the parts of the model for a stage."""

from typing import Any

import torch

from panollava.config import Settings
from panollava.stages import STAGES
from panollava.training.objective import load_objective, prepare_parts


def test_only_parts_that_are_neither_trained_nor_saved_are_cast_to_half_precision(
    settings: Settings,
) -> None:
    stage = STAGES["resampler"]
    objective: Any = load_objective(stage, settings)
    prepare_parts(objective.model, stage, "bf16-mixed", checkpointing=False)
    parameters = objective.model.named_parameters()
    halved = {name.split(".")[0] for name, p in parameters if p.dtype == torch.bfloat16}
    assert halved == {"language_model"}
