"""Promises about the memory of a step: the estimate is what a real step holds."""

import importlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from panollava import paths
from panollava.config import Settings, load_settings
from panollava.data.packing import Row
from panollava.planning.rows import SplitRows, read_split
from panollava.planning.step_memory import (
    LiveStorage,
    Part,
    _heaviest,
    find_workload,
    run_step,
    step_memory,
)
from panollava.stages import STAGES, Stage, configured_stages
from panollava.training.objective import freeze_all_but
from panollava.training.tower_layers import checkpoint_layers


def objective_of(stage: Stage, settings: Any, weights: bool, checkpointed: bool) -> Any:
    objective = importlib.import_module(stage.objective).Objective(stage, settings, weights)
    freeze_all_but(objective.model, stage.trains)
    if checkpointed:
        checkpoint_layers(objective.model)
    return objective


def heaviest(objective: Any, settings: Settings, stage: Stage, parts: int) -> list[Part]:
    train = read_split(settings, "train")
    return find_workload(objective, settings, stage, parts, train).heaviest[0]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", [*STAGES, "finetune with lora"])
def test_the_estimate_is_what_a_real_step_holds(
    project: Path, name: str, parts: int, checkpointed: bool
) -> None:
    name, _, lora = name.partition(" with ")
    settings = load_settings(paths.PARAMS, changes={"stage.finetune.lora": bool(lora)})
    stage = configured_stages(settings.stage)[name]
    empty = objective_of(stage, settings, False, checkpointed)
    step = heaviest(empty, settings, stage, parts)
    estimate = step_memory(empty, step, "32-true", torch.device("cpu"))
    real = objective_of(stage, settings, True, checkpointed)
    with LiveStorage() as storage:
        pairs = [each for each in getattr(real, "pairs", ()) if isinstance(each, Tensor)]
        for tensor in (*real.parameters(), *real.buffers(), *pairs):
            storage.count(tensor.untyped_storage())
        before = storage.current
        sums = run_step(real, [real.blank(part) if part else None for part in step])
    gradients = sum(gradient.nbytes for gradient in sums[:-1])
    assert estimate.gradients == pytest.approx(gradients, rel=0.01)
    assert estimate.optimizer == 2 * estimate.gradients  # AdamW's two moments
    # The scalar of a CPU's `mse_loss` keeps the memory of all its terms.
    assert estimate.gradients + estimate.activations == pytest.approx(
        storage.peak - before, rel=0.04
    )
    assert estimate.weights == sum(p.nbytes for p in real.parameters())
    trained = [p for p in real.parameters() if p.requires_grad]
    for parameter, gradient in zip(trained, sums[:-1], strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert estimate.optimizer == pytest.approx(sum(t.nbytes for t in moments), rel=0.01)


def test_the_heaviest_steps_have_the_longest_sequence_or_the_most_answer_tokens(
    project: Path,
) -> None:
    settings, stage = load_settings(paths.PARAMS), STAGES["finetune"]
    objective = objective_of(stage, settings, False, False)
    long = "the red box is left ."
    texts = [[(f"{long} {long}", "a box")] * 3, [("what", long)] * 3, [("what", "a box")] * 3]
    table = [(p, f"{p}.jpg", *text) for p, rows in enumerate(texts) for text in rows]
    train = pd.DataFrame(table, columns=["panorama", "url", "query", "annotation"])
    split = SplitRows(Path("train.csv"), train.assign(row=train.index))
    work = find_workload(objective, settings, stage, 1, split)
    rows = [[objective.dialogue.row(*text) for text in panorama] for panorama in texts]
    assert work.heaviest == [[[rows[0]]], [[rows[1]]]]  # of each step, its one part
    before = objective.text_prefix + objective.vision_tokens
    assert work.longest_sequence == before + sum(map(len, rows[0]))


def test_storage_is_counted_once_and_until_it_is_freed() -> None:
    with LiveStorage() as storage:
        one = torch.zeros(100)
        view = one[:50].view(5, 10)
        assert (storage.current, storage.peak) == (400, 400)
        other = one + 1
        assert (storage.current, storage.peak) == (800, 800)
        del one, other
        assert (storage.current, storage.peak) == (400, 800)
        del view
        assert (storage.current, storage.peak) == (0, 800)


def test_the_heaviest_steps_have_the_largest_part_and_the_most_answer_tokens() -> None:
    def part(*answers: int) -> Part:
        return [[Row([0], [0] * tokens)] for tokens in answers]

    even, uneven = [part(1, 1), part(1, 1)], [part(1, 1, 1), part(1)]
    long = [part(9), part(1)]
    assert _heaviest([even, uneven, long], prefix=10) == [uneven, long]
    assert _heaviest([even, uneven], prefix=10) == [uneven]


def test_half_precision_and_more_parts_need_less(project: Path) -> None:
    settings, stage = load_settings(paths.PARAMS), STAGES["resampler"]
    activations = []
    for precision, parts in (("32-true", 1), ("bf16-mixed", 1), ("bf16-mixed", 4)):
        empty = objective_of(stage, settings, False, False)
        step = heaviest(empty, settings, stage, parts)
        memory = step_memory(empty, step, precision, torch.device("cpu"))
        activations.append(memory.activations)
    assert activations[0] > activations[1] > activations[2]
