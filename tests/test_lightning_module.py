"""Optimizer steps: their division into parts, learning rates, weight decay, and losses that are not
finite."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers import change, curve, run_stage, weights
from panollava import paths
from panollava.config import Settings
from panollava.errors import UserError
from panollava.model import ranks
from panollava.model.precision import autocast
from panollava.planning.step_memory import run_step
from panollava.stages import STAGES
from panollava.training.objective import load_objective, prepare_parts
from panollava.training.train import make_module


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


@pytest.mark.parametrize("stage", ["vision", "resampler"])
def test_a_step_in_parts_is_the_same_step_in_half_precision(settings: Settings, stage: str) -> None:
    objective: Any = load_objective(STAGES[stage], settings)
    objective.open_readers()
    prepare_parts(objective.model, STAGES[stage], "bf16-mixed", checkpointing=False)
    reader = objective.readers["train"]
    step = next(step for step in reader.plan(0) if len(step) > 1)

    def loss_and_gradient(parts: list) -> tuple[float, torch.Tensor]:
        loaded = [reader.load(part) if part else None for part in parts]
        with autocast(torch.device("cpu"), "bf16-mixed"):
            *gradients, values = run_step(objective, loaded, reader.count(step))
        return float(values[0]), torch.cat([gradient.flatten() for gradient in gradients])

    loss, gradient = loss_and_gradient([step])
    other, in_parts = loss_and_gradient([*([panorama] for panorama in step), []])
    assert other == pytest.approx(loss, rel=2**-8)
    assert (in_parts - gradient).norm() < 2**-5 * gradient.norm() > 0


def test_the_encoder_and_the_connector_have_learning_rates_of_their_own(settings: Settings) -> None:
    run_stage("vision", change(settings, stage__vision__epochs=0))
    start = weights("vision")
    for rate in (0.0, 2e-4):
        run_stage("resampler", change(settings, stage__resampler__encoder_lr=rate))
        trained = weights("resampler")
        assert all(torch.equal(trained[name], start[name]) for name in start) == (rate == 0)
    connector, encoder = (
        curve("resampler", f"train/learning_rate/{name}") for name in ("connector", "encoder")
    )
    assert encoder == pytest.approx([rate / 10 for rate in connector])  # 2e-4 of 2e-3
    assert max(connector) == settings.stage.resampler.lr


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("cosine", lambda progress: math.cos(math.pi / 2 * progress) ** 2),
        ("linear", lambda progress: 1 - progress),
        ("constant", lambda progress: 1),
    ],
)
def test_the_learning_rate_rises_and_then_follows_the_schedule(
    settings: Settings, schedule: str, factor: Callable[[float], float]
) -> None:
    settings = change(settings, trainer__schedule=schedule, trainer__warmup=0.25)
    run_stage("vision", change(settings, stage__vision__epochs=4, stage__vision__lr=1e-4))
    # Eight steps, of which two rise.
    expected = [0.5e-4, 1e-4, *(1e-4 * factor(step / 6) for step in range(6))]
    assert curve("vision", "train/learning_rate/encoder") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("stage", ["vision", "resampler"])
def test_weight_decay_shrinks_matrices_but_no_bias_and_no_norm(
    settings: Settings, stage: str
) -> None:
    settings = change(settings, trainer__weight_decay=0.25, stage__vision__lr=0.1)
    settings = change(settings, stage__resampler__lr=0.2, stage__resampler__encoder_lr=0.1)
    objective: Any = load_objective(STAGES[stage], change(settings, trainer__warmup=0.0))
    objective.open_readers()
    module = make_module(STAGES[stage], settings, objective)
    optimizer = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]  # as after the warm-up
    before = {name: p.detach().clone() for name, p in objective.model.named_parameters()}
    for parameter in objective.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in objective.model.named_parameters():
        rate = 0.1 if name.startswith("encoder") else 0.2
        shrinks = parameter.requires_grad and parameter.ndim > 1
        kept = 1 - 0.25 * rate if shrinks else 1
        assert torch.allclose(parameter, kept * before[name]), name


def test_a_loss_that_is_not_finite_stops_the_run_without_a_result(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"step \d+: loss is .*gradient norm.*learning rate"):
        run_stage("vision", change(settings, stage__vision__lr=1e25, stage__vision__epochs=5))
    assert not paths.weights_file("vision").exists()
    assert not paths.metrics_file("vision").exists()


@pytest.mark.parametrize("compiles", [True, False])
def test_ranks_have_time_to_compile_shapes_that_are_new_to_one_of_them(
    settings: Settings, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = change(settings, trainer__compile=compiles)
    objective = load_objective(STAGES["vision"], settings)
    objective.open_readers()
    module = make_module(STAGES["vision"], settings, objective)
    module.ranks = 2
    patience: list[float] = []
    two: Any = ranks._Ranks(0, 2, None)  # type: ignore[arg-type]
    two.patience = ranks.PATIENCE  # after the first step
    monkeypatch.setattr(ranks, "_ranks", two)
    monkeypatch.setattr(ranks, "sum_in_pairs", lambda *_: patience.append(two.patience))
    module._sum_over_ranks([], [])
    assert patience == [ranks.START_PATIENCE if compiles else ranks.PATIENCE]
