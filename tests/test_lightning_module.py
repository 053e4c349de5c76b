"""Optimizer steps: their division into parts, and losses that are not finite."""

import pytest
import torch

from helpers import change, curve, run_stage, weights
from panollava import paths
from panollava.config import Settings
from panollava.errors import UserError


@pytest.mark.parametrize("stage", ["vision", "resampler"])
def test_a_step_in_parts_is_the_same_step(settings: Settings, stage: str) -> None:
    settings = change(settings, stage__resampler__turn=True)
    run_stage("vision", change(settings, stage__vision__epochs=0))
    results = []
    for parts in (1, 3):
        run_stage(stage, change(settings, **{f"stage__{stage}__accumulate": parts}))
        results.append((weights(stage), curve(stage, "train/loss")))
    (one, losses), (three, others) = results
    assert losses == pytest.approx(others, rel=1e-5)
    assert losses[0] != losses[-1]
    for name, value in one.items():
        assert torch.allclose(value, three[name], atol=2e-5), name


def test_a_loss_that_is_not_finite_stops_the_run_without_a_result(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"step \d+: loss is .*gradient norm.*learning rate"):
        run_stage("vision", change(settings, stage__vision__lr=1e25, stage__vision__epochs=5))
    assert not paths.weights_file("vision").exists()
    assert not paths.metrics_file("vision").exists()
