"""What a training will take, before it starts: parameters, steps, memory and disk, from the
settings, the towers' configurations and, where there are any, the rows. No weights are loaded."""

import dataclasses
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from panollava.config import Settings
from panollava.data.prepare import SPLITS
from panollava.files import atomic_write
from panollava.geometry.views import layout
from panollava.logs import table
from panollava.model.device import choose_device
from panollava.model.encoder import encoder_grid, load_encoder
from panollava.planning.step_memory import StepMemory, step_memory
from panollava.planning.workload import Workload, find_workload, read_split
from panollava.stages import STAGES, Stage
from panollava.training.objective import load_objective, prepare_parts

log = logging.getLogger(__name__)

_FP32 = 4  # bytes


@dataclass(frozen=True)
class StagePlan:
    parameters: dict[str, int]  # of each part of the model
    trained: int
    steps: int | None  # None: there are no rows to count
    panoramas_at_once: int  # in the heaviest part of a step
    vision_tokens: int  # of a panorama in a sequence; 0: the stage has no sequences
    longest_sequence: int
    memory: StepMemory
    memory_checkpointed: StepMemory  # with trainer.gradient_checkpointing
    checkpoint: int  # bytes, as the next
    model_final: int


@dataclass(frozen=True)
class Plan:
    stages: dict[str, StagePlan]
    device: str
    precision: str
    program: int  # bytes of memory beside tensors; 0 on a GPU, which has its own memory
    files: dict[str, str]  # that the rows are read from, by split that has rows, as the next two
    rows: dict[str, int]
    panoramas: dict[str, int]
    views: int  # bytes on disk of all splits and turned panoramas, as the next
    features: int


def plan(settings: Settings, stages: Sequence[Stage]) -> Plan:
    """Raises UserError for settings, towers or rows that a training would refuse as well."""
    found = {split: own for split in SPLITS if (own := read_split(settings, split))}
    tables = {split: rows for split, (rows, _) in found.items()}
    panoramas = {split: int(rows["panorama"].nunique()) for split, rows in tables.items()}
    planned = {stage.name: plan_stage(settings, stage) for stage in stages}
    size, count = settings.views.size, len(layout(settings.views).projections)
    encoder = load_encoder(settings.model.encoder, size, weights=False)
    grid = encoder_grid(encoder, size, settings.model.resampler.pool)
    feature = encoder.width * np.dtype(settings.model.features).itemsize
    rolled = panoramas.get(settings.evaluate.split, 0) * len(settings.evaluate.rolls)
    seen = sum(panoramas.values()) + rolled
    device = "cuda" if settings.trainer.accelerator == "gpu" else _device(settings).type
    return Plan(
        stages=planned,
        device=device,
        precision=settings.trainer.precision,
        program=psutil.Process().memory_info().rss if device == "cpu" else 0,
        files={split: str(file) for split, (_, file) in found.items()},
        rows={split: len(rows) for split, rows in tables.items()},
        panoramas=panoramas,
        views=seen * count * size * size * 3,
        features=seen * count * grid * grid * feature,
    )


def plan_stage(settings: Settings, stage: Stage) -> StagePlan:
    objective = _objective(settings, stage)
    work = find_workload(objective, settings, stage, getattr(settings.stage, stage.name).accumulate)
    parts = dict(objective.model.named_children())
    trained = _count(p for p in objective.parameters() if p.requires_grad)
    return StagePlan(
        parameters={name: _count(part.parameters()) for name, part in parts.items()},
        trained=trained,
        steps=work.steps,
        panoramas_at_once=work.panoramas_at_once,
        vision_tokens=getattr(objective, "vision_tokens", 0),
        longest_sequence=work.longest_sequence,
        memory=_memory(settings, stage, work, checkpointed=False),
        memory_checkpointed=_memory(settings, stage, work, checkpointed=True),
        checkpoint=3 * _FP32 * trained,  # with AdamW's two moments
        model_final=_FP32 * sum(_count(parts[name].parameters()) for name in stage.saves),
    )


def memory_if(
    settings: Settings, stage: Stage, accumulate: int, checkpointed: bool
) -> tuple[StepMemory, Workload]:
    """The memory of the heaviest step with other values than those of `settings`."""
    work = find_workload(_objective(settings, stage), settings, stage, accumulate)
    return _memory(settings, stage, work, checkpointed), work


def _memory(settings: Settings, stage: Stage, work: Workload, checkpointed: bool) -> StepMemory:
    found = []
    for step in work.heaviest or [[]]:
        objective = _objective(settings, stage, checkpointed)
        found.append(step_memory(objective, step, settings.trainer.precision, _device(settings)))
    return max(found, key=lambda memory: memory.total)


def _objective(settings: Settings, stage: Stage, checkpointing: bool = False) -> Any:
    objective = load_objective(stage, settings, weights=False)
    prepare_parts(objective.model, stage, settings.trainer.precision, checkpointing)
    return objective


def _device(settings: Settings) -> torch.device:
    """Whose kernels are planned with: a machine without a GPU plans for one with its own."""
    accelerator = settings.trainer.accelerator
    return choose_device("auto" if accelerator == "gpu" else accelerator)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def show(planned: Plan, checkpointed: bool) -> None:
    """Log the plan as tables. `checkpointed`: trainer.gradient_checkpointing as it is set."""
    stages = planned.stages
    sizes = {part: n for own in stages.values() for part, n in own.parameters.items()}
    state = {
        (part, name): "trains" if part in STAGES[name].trains else "frozen"
        for name, own in stages.items()
        for part in own.parameters
    }
    lines = [
        (part, f"{count:,}", *(state.get((part, name), "not there") for name in stages))
        for part, count in sizes.items()
    ]
    trained = ("trained in all", "", *(f"{own.trained:,}" for own in stages.values()))
    log.info("%s", table([*lines, trained], ("part", "parameters", *stages)))
    rows = ", ".join(f"{split} {count:,}" for split, count in planned.rows.items())
    panoramas = ", ".join(f"{split} {count:,}" for split, count in planned.panoramas.items())
    log.info("\nrows: %s; panoramas: %s", rows or "none found", panoramas or "none found")
    log.info("read from: %s", ", ".join(planned.files.values()) or "no file")
    if "train" in planned.rows:
        mean = planned.rows["train"] / planned.panoramas["train"]
        log.info("rows a panorama of train: %.1f", mean)
    else:
        log.info("without rows, every panorama of a step is taken to have one, of full length")
    log.info(
        "\n%s",
        table(
            [
                (name, "?" if own.steps is None else f"{own.steps:,}", own.panoramas_at_once)
                + (own.vision_tokens, own.longest_sequence)
                for name, own in stages.items()
            ],
            ("stage", "steps", "panoramas at once", "tokens a panorama", "longest sequence"),
        ),
    )
    other = "without" if checkpointed else "with"
    log.info(
        "\nmemory at a step's peak, MB (%s, %s, gradient checkpointing %s):\n%s",
        *(planned.device, planned.precision, "on" if checkpointed else "off"),
        table(
            [_line(name, own, planned.program, checkpointed) for name, own in stages.items()],
            ("stage", "program", "weights", "gradients", "AdamW", "activations", "total")
            + (f"total {other} checkpointing",),
        ),
    )
    files = [("runs/prepared", planned.views), ("runs/features", planned.features)]
    for name, own in stages.items():
        files.append((f"a checkpoint of {name}", own.checkpoint))
        files.append((f"model_final of {name}", own.model_final))
    log.info("\n%s", table([(name, f"{size / 1e6:,.1f}") for name, size in files], ("disk", "MB")))


def _line(name: str, own: StagePlan, program: int, checkpointed: bool) -> tuple[str, ...]:
    memory, other = own.memory, own.memory_checkpointed
    if checkpointed:
        memory, other = other, memory
    sizes = (program, memory.weights, memory.gradients, memory.optimizer, memory.activations)
    totals = (program + memory.total, program + other.total)
    return (name, *(f"{size / 1e6:,.0f}" for size in (*sizes, *totals)))


def write_json(planned: Plan, file: Path) -> None:
    with atomic_write(file) as beside:
        beside.write_text(json.dumps(dataclasses.asdict(planned), indent=2) + "\n")
