"""What a training needs: parameters, steps, memory and disk, computed from the settings, the
towers' configurations and, if there are any, the rows. No weights are loaded."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import torch
from tabulate import tabulate
from torch import nn

from panollava import paths
from panollava.config import Settings
from panollava.data.rows import SPLITS
from panollava.geometry.views import layout, resampled
from panollava.model.device import choose_device
from panollava.model.encoder import load_encoder
from panollava.model.resampler import Pooling
from panollava.model.weights import count_parameters
from panollava.planning.rows import SplitRows, read_split
from panollava.planning.step_memory import StepMemory, Workload, find_workload, step_memory
from panollava.stages import Stage, configured_stages
from panollava.training.objective import load_objective, prepare_parts

log = logging.getLogger(__name__)

_FP32 = 4  # bytes
_STORED_PANORAMA = 490_000  # bytes of a photo's JPEG about 2048 pixels wide, see docs/scale.md


@dataclass(frozen=True)
class StagePlan:
    parameters: dict[str, int]  # of each part of the model
    trains: tuple[str, ...]  # parts
    trained: int  # number of parameters
    steps: int | None  # None: unknown without rows
    patience: int | None  # of early stopping, before all steps are done; None: none
    rows_per_step: float | None  # the mean; None: unknown, or the stage reads no rows
    panoramas_per_step: float | None
    panoramas_at_once: int  # maximum per part of a step
    vision_tokens: int  # per panorama in a sequence; 0: the stage has no sequences
    longest_sequence: int
    memory: StepMemory
    memory_checkpointed: StepMemory  # with trainer.gradient_checkpointing
    exchange: int  # bytes that a device sends in a step, and as many that it receives
    checkpoint: int  # bytes
    model_final: int  # bytes


@dataclass(frozen=True)
class SplitPlan:
    rows: int
    panoramas: int
    rows_per_panorama: float
    file: str  # that the rows come from


@dataclass(frozen=True)
class Plan:
    stages: dict[str, StagePlan]
    device: str
    precision: str
    program: int  # bytes of memory besides tensors; 0 on a GPU, which has its own memory
    splits: dict[str, SplitPlan]  # those that have rows
    views: int  # bytes on disk of all splits, or of their panoramas, and of rolled views
    features: int  # the same


def make_plan(settings: Settings, stages: Sequence[Stage]) -> Plan:
    """Raises UserError for settings, towers or rows that a training would refuse as well."""
    tables = {split: read_split(settings, split) for split in SPLITS}
    splits = {split: _plan_split(rows) for split, rows in tables.items() if rows}
    size, views = settings.views.size, len(layout(settings.views).projections)
    encoder = load_encoder(settings.model.encoder, size, weights=False)
    tokens = math.prod(Pooling(settings.model, settings.views, encoder.patch).shape)
    feature = encoder.width * np.dtype(settings.model.features).itemsize
    evaluated = splits.get(settings.evaluate.split)
    rolls = len(resampled(settings.views, settings.evaluate.rolls))
    rolled = rolls * evaluated.panoramas if evaluated else 0
    panoramas = sum(split.panoramas for split in splits.values())
    pixels = views * size * size * 3
    stored = pixels if settings.data.store == "views" else _STORED_PANORAMA
    configured = configured_stages(settings.stage)
    device = "cuda" if settings.trainer.accelerator == "gpu" else _device(settings).type
    return Plan(
        stages={
            stage.name: _plan_stage(settings, configured[stage.name], tables["train"])
            for stage in stages
        },
        device=device,
        precision=settings.trainer.precision,
        program=psutil.Process().memory_info().rss if device == "cpu" else 0,
        splits=splits,
        views=panoramas * stored + rolled * pixels,
        features=(panoramas + rolled) * tokens * feature,
    )


def _plan_split(rows: SplitRows) -> SplitPlan:
    panoramas = rows.read()["panorama"]
    count = int(panoramas.nunique())
    return SplitPlan(len(panoramas), count, len(panoramas) / count, str(rows.file))


def _plan_stage(settings: Settings, stage: Stage, train: SplitRows | None) -> StagePlan:
    objective = _objective(settings, stage)
    accumulate = getattr(settings.stage, stage.name).accumulate
    work = find_workload(objective, settings, stage, accumulate, train)
    parts = count_parameters(objective.model)
    trained = _count(p for p in objective.parameters() if p.requires_grad)
    size = work.size
    return StagePlan(
        parameters=parts,
        trains=stage.trains,
        trained=trained,
        steps=size.steps if size else None,
        patience=getattr(settings.stage, stage.name).patience,
        rows_per_step=size.rows_per_step if size and work.reads_rows else None,
        panoramas_per_step=size.panoramas_per_step if size else None,
        panoramas_at_once=work.panoramas_at_once,
        vision_tokens=getattr(objective, "vision_tokens", 0),
        longest_sequence=work.longest_sequence,
        memory=_memory(settings, stage, work, checkpointing=False),
        memory_checkpointed=_memory(settings, stage, work, checkpointing=True),
        exchange=_FP32 * trained * (settings.machine.devices.bit_length() - 1),
        checkpoint=3 * _FP32 * trained,  # with AdamW's two moments
        model_final=_FP32 * sum(parts[name] for name in stage.saves),
    )


def memory_with(
    settings: Settings, stage: Stage, accumulate: int, checkpointing: bool
) -> StepMemory:
    """The memory of the heaviest step with other values than those of `settings`."""
    train = read_split(settings, "train")
    work = find_workload(_objective(settings, stage), settings, stage, accumulate, train)
    return _memory(settings, stage, work, checkpointing)


def _memory(settings: Settings, stage: Stage, work: Workload, checkpointing: bool) -> StepMemory:
    precision, device = settings.trainer.precision, _device(settings)
    count = settings.machine.devices
    memories = [
        step_memory(_objective(settings, stage, checkpointing), share, precision, device)
        for step in work.heaviest or [[]]
        for share in _shares(step, count)
    ]
    return max(memories, key=lambda memory: memory.total)


def _shares(step: list[Any], devices: int) -> list[list[Any]]:
    """The parts of a step on each device that has any."""
    size = max(1, len(step) // devices)
    shares = [step[first : first + size] for first in range(0, len(step), size)]
    return [share for share in shares if any(share)] or [[]]


def _objective(settings: Settings, stage: Stage, checkpointing: bool = False) -> Any:
    objective = load_objective(stage, settings, weights=False)
    prepare_parts(objective.model, stage, settings.trainer.precision, checkpointing)
    return objective


def _device(settings: Settings) -> torch.device:
    """The device whose kernels are planned with. A machine without a GPU plans for a GPU with its
    own kernels."""
    accelerator = settings.trainer.accelerator
    return choose_device("auto" if accelerator == "gpu" else accelerator)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def show(plan: Plan, checkpointing: bool, bandwidth: float) -> None:
    """Log the plan as tables. `checkpointing`: the value of trainer.gradient_checkpointing;
    `bandwidth`: between devices, in GB/s."""
    state = f"{plan.device}, {plan.precision}, checkpointing {'on' if checkpointing else 'off'}"
    steps = "trained steps rows_per_step panoramas_per_step panoramas_at_once vision_tokens "
    steps += "longest_sequence"
    for title, table in (
        ("", _parts_table(plan)),
        ("", _columns("split", plan.splits, "rows panoramas rows_per_panorama file")),
        ("", _columns("stage", plan.stages, steps)),
        (
            f"peak memory of a step in MB, per device ({state}):\n",
            _memory_table(plan, checkpointing),
        ),
        ("", _disk_table(plan)),
    ):
        text = tabulate(table, "keys", "plain", intfmt=",", floatfmt=",.1f", missingval="-")
        log.info("%s%s\n", title, text)
    for name, stage in plan.stages.items():
        if stage.patience is not None:
            log.info("%s: at most these steps, because of its patience (%d)", name, stage.patience)
        if stage.exchange:
            size, seconds = stage.exchange / 1e6, stage.exchange / 1e9 / bandwidth
            message = "%s: devices exchange %.1f MB per step, %.3f s at %g GB/s"
            log.info(message, name, size, seconds, bandwidth)
    if "train" not in plan.splits:
        log.info("no rows found: assuming one full-length row per panorama (an upper bound)")


def _parts_table(plan: Plan) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for name, stage in plan.stages.items():
        for part, count in stage.parameters.items():
            row = rows.setdefault(part, {"part": part, "parameters": count})
            row[name] = "trains" if part in stage.trains else "frozen"
    return list(rows.values())


def _columns(label: str, plans: Mapping[str, Any], fields: str) -> list[dict[str, Any]]:
    return [
        {label: name, **{key.replace("_", " "): getattr(plan, key) for key in fields.split()}}
        for name, plan in plans.items()
    ]


def _memory_table(plan: Plan, checkpointing: bool) -> list[dict[str, Any]]:
    rows = []
    for name, stage in plan.stages.items():
        without, with_ = stage.memory, stage.memory_checkpointed
        memory = {"program": plan.program, **asdict(with_ if checkpointing else without)}
        memory["total without checkpointing"] = plan.program + without.total
        memory["total with"] = plan.program + with_.total
        rows.append({"stage": name, **{key: size / 1e6 for key, size in memory.items()}})
    return rows


def _disk_table(plan: Plan) -> list[dict[str, Any]]:
    files = {str(paths.PREPARED): plan.views, str(paths.FEATURES): plan.features}
    for name, stage in plan.stages.items():
        files[f"checkpoint of {name}"] = stage.checkpoint
        files[f"model_final of {name}"] = stage.model_final
    return [{"file": file, "MB": size / 1e6} for file, size in files.items()]
