"""What `trainer.precision`, `compile` and `deterministic` do, as far as a processor shows it."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from conftest import ROWS, random_views, settings_for
from panollava import paths
from panollava.config import Settings
from panollava.data.dialogue import Dialogue
from panollava.data.packing import pack
from panollava.errors import UserError
from panollava.evaluation.evaluate import evaluate
from panollava.model.device import autocast
from panollava.model.panollava import PanoLLaVA, build_model
from panollava.stages import find_stage
from panollava.training import curves
from panollava.training.answer_objective import Objective
from panollava.training.features import write_features
from panollava.training.objective import freeze_all_but
from panollava.training.tower_layers import checkpoint_layers, compile_layers
from panollava.training.train import check_deterministic, make_module
from test_training import Killed, change, outputs, run, settings, weights  # noqa: F401

TRAINS = ("encoder", "resampler", "projector")
CPU = torch.device("cpu")


def make(towers: Path) -> tuple[PanoLLaVA, Dialogue]:
    own = settings_for(towers)
    model, tokenizer = build_model(own.model, own.views, seed=0)
    freeze_all_but(model, TRAINS)
    return model, Dialogue(tokenizer, 64)


def step(
    model: PanoLLaVA, dialogue: Dialogue, panoramas: int = 2, precision: str = "32-true"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step and its gradients."""
    rows = [[dialogue.row(*row) for row in own] for own in ROWS][:panoramas]
    views = random_views(panoramas)
    model.zero_grad()
    with autocast(CPU, precision):
        features = model.features(views)
        packed = pack(dialogue.text_prefix, features[0, ..., 0].numel(), rows, dialogue.pad)
        loss = model.loss_sum(features, packed, len(dialogue.text_prefix))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def test_all_stages_and_an_evaluation_run_in_half_precision(settings: Settings) -> None:  # noqa: F811
    settings = change(settings, trainer__precision="bf16-mixed")
    run("vision", settings)
    run("resampler", settings)
    write_features(settings)
    run("finetune", settings)
    evaluate(settings)
    for stage in ("vision", "resampler", "finetune"):
        assert {value.dtype for value in weights(stage).values()} == {torch.float32}


def test_a_stage_holds_what_it_neither_trains_nor_saves_in_half_precision(
    settings: Settings,  # noqa: F811
) -> None:
    settings = change(settings, trainer__precision="bf16-mixed")
    objective: Any = Objective(find_stage("resampler"), settings)
    objective.open_readers()
    make_module(find_stage("resampler"), settings, objective)
    parameters = dict(objective.model.named_parameters())
    halved = {n.split(".")[0] for n, p in parameters.items() if p.dtype == torch.bfloat16}
    assert halved == {"language_model"}


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointed", "shapes"), [(False, (2, 1)), (True, (2,))])
# Torch's own limit must not be the one that holds: beyond it nothing is compiled.
@torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
def test_compiled_layers_give_the_same_gradients_for_any_shape(
    towers: Path, checkpointed: bool, shapes: tuple[int, ...]
) -> None:
    torch._dynamo.reset()
    model, dialogue = make(towers)
    names = list(model.state_dict())
    if checkpointed:
        checkpoint_layers(model)
    plain = [step(model, dialogue, panoramas) for panoramas in shapes]
    compile_layers(model)
    torch._dynamo.utils.counters.clear()
    for (loss, grads), panoramas in zip(plain, shapes, strict=True):
        compiled, own = step(model, dialogue, panoramas)
        assert torch.allclose(compiled, loss, rtol=1e-5)
        assert own.keys() == grads.keys()
        for name, grad in grads.items():
            assert torch.allclose(own[name], grad, rtol=1e-3, atol=1e-6), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_a_killed_stage_with_compiled_layers_goes_on_to_the_same_bytes(
    settings: Settings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It meets shapes in another order than the run that wasn't killed."""
    settings = change(settings, trainer__compile=True, stage__vision__epochs=0)
    run("vision", settings)
    torch._dynamo.reset()
    run("resampler", settings)
    expected = outputs("resampler")
    shutil.rmtree(paths.RESUME)
    steps = 0

    def die(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise Killed

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(curves.Speed, "on_train_batch_end", die)
        with pytest.raises(Killed):
            run("resampler", settings)
    torch._dynamo.reset()
    run("resampler", settings)
    assert outputs("resampler") == expected


def test_what_cannot_be_compiled_is_told(
    settings: Settings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with pytest.raises(UserError, match="trainer.compile: .* set it to false"):
        run("vision", change(settings, trainer__compile=True))
    torch._dynamo.reset()


class Nondeterministic(torch.autograd.Function):
    """What a kernel without a deterministic form does on a GPU."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(
                "odd_backward_cuda does not have a deterministic implementation, but you set "
                "'torch.use_deterministic_algorithms(True)'. You can turn off determinism"
            )
        return grad


def test_a_tower_without_deterministic_kernels_is_told(
    settings: Settings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = functional.layer_norm
    monkeypatch.setattr(
        functional, "layer_norm", lambda *args, **kw: Nondeterministic.apply(plain(*args, **kw))
    )
    message = (
        "trainer.deterministic: odd_backward_cuda does not have a deterministic "
        "implementation; set it to false"
    )
    with pytest.raises(UserError, match=message):
        run("vision", settings)
    run("vision", change(settings, trainer__deterministic=False))
    assert weights("vision")


@pytest.mark.parametrize(
    ("device", "compiled", "deterministic", "keeps"),
    [
        ("cuda", True, True, False),
        ("cuda", True, False, True),
        ("cuda", False, True, True),
        ("cpu", True, True, True),
    ],
)
def test_what_a_killed_run_on_a_gpu_would_break_is_told(
    settings: Settings,  # noqa: F811
    device: str,
    compiled: bool,
    deterministic: bool,
    keeps: bool,
) -> None:
    own = change(settings, trainer__compile=compiled, trainer__deterministic=deterministic).trainer
    told = pytest.raises(UserError, match="trainer.compile: found true, .* Set trainer.determini")
    with contextlib.nullcontext() if keeps else told:
        check_deterministic(own, torch.device(device))


def test_a_training_on_a_gpu_is_checked_for_what_a_kill_would_break(
    settings: Settings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("panollava.training.train.choose_device", lambda _: torch.device("cuda"))
    with pytest.raises(UserError, match="trainer.compile: found true"):
        run("vision", change(settings, trainer__compile=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_two_trainings_on_a_gpu_leave_the_same_bytes(settings: Settings) -> None:  # noqa: F811
    settings = change(settings, trainer__accelerator="gpu", trainer__precision="bf16-mixed")
    left = []
    for _ in range(2):
        run("vision", settings)
        run("resampler", settings)
        left.append([paths.weights_file(stage).read_bytes() for stage in ("vision", "resampler")])
        shutil.rmtree(paths.RESUME)
    assert left[0] == left[1]


def test_features_of_other_panoramas_or_turns_are_told(settings: Settings) -> None:  # noqa: F811
    for stage in ("vision", "resampler"):
        run(stage, settings)
    write_features(settings)
    run("finetune", settings)
    turns = len(settings.evaluate.rolls) + 1
    more = change(settings, evaluate__rolls=[10.0] * turns)
    with pytest.raises(UserError, match=rf"rolled.npy: holds .* by the {turns} angles.*dvc repro"):
        evaluate(more)
    train = paths.FEATURES / "train.npy"
    np.save(train, np.load(train)[:1])
    shutil.rmtree(paths.RESUME)
    with pytest.raises(UserError, match=r"train.npy: holds 1 panoramas, but .*rows.csv has rows"):
        run("finetune", settings)
