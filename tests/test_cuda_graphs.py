"""Recorded steps. Only a GPU can record them: here the programs that it would replay are run again
from the same buffers."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from helpers import ROOT, Killed, change, curve, outputs, run_stage
from panollava import paths
from panollava.config import Settings
from panollava.errors import UserError
from panollava.stages import STAGES
from panollava.training import cuda_graphs, curves, lightning_module, train
from panollava.training.cuda_graphs import (
    CannotRecord,
    Program,
    Rerun,
    StepGraphs,
    check_recordable,
)
from panollava.training.features import write_features

CPU = torch.device("cpu")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Without a recorder, steps run as usual."""
    return change(settings, trainer__threads=1, trainer__cuda_graphs=True)


class Recorded(Rerun):
    """As on a GPU: programs set no seeds. No operation of a program may wait for the GPU: neither
    forward and backward pass nor clipping and the optimizer."""

    replays = True

    def warm_up(self, program: Program) -> None:
        check_recordable(program, CPU, random=False)


def record(monkeypatch: pytest.MonkeyPatch, recorder: type[Rerun] = Recorded) -> None:
    monkeypatch.setattr(lightning_module, "make_recorder", lambda *_: recorder())


def run_before(stage: str, settings: Settings) -> None:
    """What the stage starts from."""
    untrained = change(settings, stage__vision__epochs=0, stage__resampler__epochs=0)
    for name in STAGES:
        if name == stage:
            break
        run_stage(name, untrained)
        if name == "resampler":
            write_features(settings)


@pytest.mark.parametrize(
    ("stage", "parts"), [("vision", 1), ("vision", 2), ("resampler", 2), ("finetune", 1)]
)
def test_recorded_steps_leave_the_same_bytes(
    settings: Settings, stage: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = change(
        settings,
        **{f"stage__{stage}__accumulate": parts, f"stage__{stage}__epochs": 2},
        trainer__gradient_checkpointing=parts == 2,
        trainer__log_every=2,
    )
    run_before(stage, settings)
    run_stage(stage, settings)
    expected = outputs(stage)
    shutil.rmtree(paths.RESUME)
    record(monkeypatch)
    run_stage(stage, settings)
    assert outputs(stage) == expected


def test_a_killed_stage_with_recorded_steps_resumes_to_the_same_bytes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(monkeypatch)
    monkeypatch.setattr(lightning_module, "needs_few_shapes", lambda _: True)
    run_before("resampler", settings)
    run_stage("resampler", settings)
    expected = outputs("resampler")
    shutil.rmtree(paths.RESUME)
    steps = 0

    def die(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(curves.Speed, "on_train_batch_end", die)
        with pytest.raises(Killed):
            run_stage("resampler", settings)
    run_stage("resampler", settings)
    assert outputs("resampler") == expected


@pytest.mark.parametrize("parts", [1, 2])
def test_steps_of_few_shapes_are_the_same_steps(
    settings: Settings, parts: int, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Fewer programs than parts of different sizes, and the losses of the usual steps."""
    settings = change(settings, stage__resampler__accumulate=parts)
    run_before("resampler", settings)
    run_stage("resampler", settings)
    expected = curve("resampler", "train/loss")
    shutil.rmtree(paths.RESUME)
    programs: list[int] = []
    update = StepGraphs.update

    def counted(graphs: StepGraphs, *arguments: Any) -> None:
        programs.append(len(graphs.differentiate))
        update(graphs, *arguments)

    record(monkeypatch)
    monkeypatch.setattr(lightning_module, "needs_few_shapes", lambda _: True)
    monkeypatch.setattr(lightning_module.choose_shapes, "__defaults__", (2,))
    monkeypatch.setattr(StepGraphs, "update", counted)
    with caplog.at_level(logging.INFO):
        run_stage("resampler", settings)
    assert programs[-1] == 2 < len(programs)
    assert curve("resampler", "train/loss") == pytest.approx(expected, rel=1e-5)
    lines = caplog.text.splitlines()
    (table,) = (at for at, line in enumerate(lines) if "2 shapes" in line)
    assert table < next(at for at, line in enumerate(lines) if "epochs," in line)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: bool(torch.isfinite(x).all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(torch.arange(len(x))),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_operations_that_wait_for_the_gpu_are_refused(
    operation: Callable[[torch.Tensor], Any],
) -> None:
    x = torch.arange(3.0)
    with pytest.raises(CannotRecord, match="waits for the GPU"):
        check_recordable(lambda: operation(x), CPU)
    check_recordable(lambda: x[x.argsort()], CPU)
    with pytest.raises(CannotRecord, match="random numbers"):
        check_recordable(lambda: torch.rand(1), CPU, random=False)
    check_recordable(lambda: torch.rand(1), CPU)


@pytest.mark.parametrize("cause", ["tower", "recorder"])
def test_a_model_that_cannot_be_recorded_runs_as_usual(
    settings: Settings, cause: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    forward = SiglipEncoderLayer.forward

    def waiting(layer: Any, hidden: torch.Tensor, *rest: Any, **named: Any) -> Any:
        assert hidden.is_meta or hidden.sum().item() < 1e9
        return forward(layer, hidden, *rest, **named)

    class Refusing(Recorded):
        def record(self, program: Program) -> Program:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    settings = change(settings, stage__vision__epochs=2)
    run_stage("vision", settings)
    expected = outputs("vision")
    shutil.rmtree(paths.RESUME)
    record(monkeypatch, Recorded if cause == "tower" else Refusing)
    if cause == "tower":
        monkeypatch.setattr(Recorded, "warm_up", Rerun.warm_up)
        monkeypatch.setattr(SiglipEncoderLayer, "forward", waiting)
    run_stage("vision", settings)
    assert outputs("vision") == expected
    reason = {"tower": "waits for the GPU", "recorder": "operation not permitted"}[cause]
    (line,) = (record for record in caplog.records if "cuda_graphs" in record.message)
    assert reason in line.message and "\n" not in line.message


@pytest.mark.parametrize(("stage", "recorded"), [("resampler", True), ("vision", False)])
def test_dropout_masks_of_recorded_parts_are_those_of_usual_ones(
    settings: Settings, stage: str, recorded: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Parts that depend on each other need several seeds, which a program cannot set."""
    shutil.copytree(settings.model.encoder.path, "dropout")
    config = Path("dropout/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.5}))
    settings = change(settings, model__encoder__path="dropout", stage__resampler__epochs=1)
    settings = change(settings, **{f"stage__{stage}__accumulate": 2})
    run_before(stage, settings)
    run_stage(stage, settings)
    expected = outputs(stage)
    shutil.rmtree(paths.RESUME)
    monkeypatch.setattr(Recorded, "warm_up", Rerun.warm_up)
    record(monkeypatch)
    run_stage(stage, settings)
    assert outputs(stage) == expected
    assert ("random numbers" in caplog.text) != recorded


@pytest.mark.parametrize("log_every", [4, 1000])
def test_a_loss_that_is_not_finite_stops_recorded_steps_before_a_checkpoint(
    settings: Settings, log_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the step, and is raised when values are next read or saved."""
    settings = change(
        settings, stage__vision__lr=1e25, stage__vision__epochs=9, stage__vision__batch_size=2
    )
    settings = change(settings, trainer__log_every=log_every)

    def error() -> str:
        with pytest.raises(UserError, match=r"loss is .*gradient norm.*learning rate") as raised:
            run_stage("vision", settings)
        return str(raised.value)

    usual = error()
    for file in paths.RESUME.rglob("*.ckpt"):
        file.unlink()
    record(monkeypatch)
    assert re.findall(r"step \d+", error()) == re.findall(r"step \d+", usual)
    saved = [torch.load(file, weights_only=True) for file in paths.RESUME.rglob("*.ckpt")]
    assert saved
    for checkpoint in saved:
        assert all(bool(value.isfinite().all()) for value in checkpoint["state_dict"].values())


def test_a_processor_records_nothing_and_pads_nothing(settings: Settings) -> None:
    assert cuda_graphs.make_recorder(CPU) is None
    if not torch.cuda.is_available():
        assert not cuda_graphs.needs_few_shapes(change(settings, trainer__compile=True).trainer)


def test_each_of_few_shapes_is_compiled_by_itself_and_validation_is_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = change(settings, trainer__compile=True)
    run_before("resampler", settings)
    programs: list[tuple[int, ...]] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        assert torch.is_grad_enabled()
        programs.append(tuple(max(value.shape for value in inputs)))
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda *a, **k: compile_module(*a, **k, backend=count)
    )
    for module in (lightning_module, train):
        monkeypatch.setattr(module, "needs_few_shapes", lambda _: True)
    monkeypatch.setattr(lightning_module.choose_shapes, "__defaults__", (2,))
    torch._dynamo.reset()
    run_stage("resampler", settings)
    assert len(programs) == 4, programs  # of two towers


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_processor(tmp_path: Path) -> None:
    """With tiny towers, so that no GPU is needed to find a mistake in it."""
    lines = tmp_path / "lines.jsonl"
    only = ("product", "steps finetune", "bytes vision", "attention", "answers", "loop graphs")
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--tiny", "--repeats=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([*command, f"--lines={lines}", "--only", *only], env=environment, check=True)
    measured = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {line["section"].split(" ", 1)[0] for line in measured if "section" in line} == {
        name.split(" ", 1)[0] for name in only
    }
    assert not [line for line in measured if "error" in line or "skipped" in line]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("stage", "parts"), [("vision", 1), ("vision", 2), ("resampler", 2)])
def test_a_gpu_replays_what_the_same_programs_compute(
    settings: Settings, stage: str, parts: int, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    settings = change(settings, trainer__accelerator="gpu", trainer__precision="bf16-mixed")
    settings = change(settings, **{f"stage__{stage}__accumulate": parts})
    run_before(stage, settings)
    run_stage(stage, settings)
    replayed = outputs(stage)
    assert "not recorded" not in caplog.text
    shutil.rmtree(paths.RESUME)
    record(monkeypatch, Rerun)
    run_stage(stage, settings)
    assert outputs(stage) == replayed
