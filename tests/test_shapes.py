"""Few shapes: each part fits into one, and what is filled up changes no loss and no gradient."""

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import SHARED, change, run_stage
from panollava.config import Settings
from panollava.data.batches import StepDataset, TextBatch
from panollava.data.epoch_plan import divide, group_rows, plan_epoch
from panollava.data.shapes import MAX_SHAPES, Shape, choose_shapes, describe, fit
from panollava.stages import STAGES
from panollava.training.features import write_features
from panollava.training.objective import load_objective, prepare_parts

QUIC360 = SHARED / "quic360_full/train.csv"


def random_sizes(count: int = 300) -> list[Shape]:
    draw = random.Random(0)
    return [
        Shape(draw.choice([3, 4, 4, 5]), 400 + draw.randrange(200), draw.randrange(90, 400))
        for _ in range(count)
    ]


def test_each_part_fits_into_one_of_a_few_shapes() -> None:
    sizes = random_sizes()
    for most in (1, 2, 5, MAX_SHAPES):
        shapes = choose_shapes(sizes, most)
        assert 0 < len(shapes) <= most
        assert all(fit(size, shapes).holds(size) for size in sizes)
        assert all(shape.length % 8 == 0 for shape in shapes)
        assert shapes[0].tokens == max(shape.tokens for shape in shapes)
    assert choose_shapes([]) == []


def test_shapes_do_not_depend_on_the_order_of_steps() -> None:
    sizes = random_sizes()
    shuffled = random.Random(1).sample(sizes, len(sizes))
    assert choose_shapes(sizes) == choose_shapes(shuffled)


def test_no_other_lengths_pad_less() -> None:
    draw = random.Random(2)
    sizes = [Shape(4, 8 * draw.randrange(50, 62)) for _ in range(80)]
    lengths = sorted({size.length for size in sizes})

    def padded(chosen: tuple[int, ...]) -> int:
        return sum(4 * min(length for length in chosen if length >= s.length) for s in sizes)

    for most in (1, 2, 3):
        options = itertools.combinations(lengths[:-1], most - 1)
        least = min(padded((*each, lengths[-1])) for each in options)
        shapes = choose_shapes(sizes, most)
        assert sum(fit(size, shapes).tokens for size in sizes) == least


def test_a_rare_number_of_panoramas_is_filled_up_with_blank_ones() -> None:
    sizes = [Shape(5, 400, 90)] * 50 + [Shape(4, 400, 80), Shape(2, 800, 50)]
    assert choose_shapes(sizes, 2) == [Shape(5, 400, 90), Shape(2, 800, 50)]


@pytest.mark.parametrize(("panoramas", "batch_size", "parts"), [(2676, 32, 1), (83, 32, 5)])
def test_views_without_rows_are_never_filled_up(
    panoramas: int, batch_size: int, parts: int
) -> None:
    """A blank panorama would change the statistics of the step."""
    groups = group_rows(np.arange(panoramas))
    steps = plan_epoch(groups, batch_size, 0, 0, np.array([0, panoramas]))
    sizes = [Shape(len(part)) for step in steps for part in divide(step, parts) if part]
    assert steps.divide(parts).tolist() == [
        number * parts + part
        for number, step in enumerate(steps)
        for panorama, _ in step
        for part, share in enumerate(divide(step, parts))
        if (panorama, [panorama]) in share
    ]
    assert set(choose_shapes(sizes)) == set(sizes)


@pytest.mark.parametrize("stage", ["resampler", "finetune"])
def test_filled_parts_have_the_same_loss_and_gradients(settings: Settings, stage: str) -> None:
    if STAGES[stage].reads_features:
        untrained = change(settings, stage__vision__epochs=0, stage__resampler__epochs=0)
        run_stage("vision", untrained)
        run_stage("resampler", untrained)
        write_features(settings)
    objective: Any = load_objective(STAGES[stage], settings)
    objective.open_readers()
    prepare_parts(objective.model, STAGES[stage], "32-true", checkpointing=False)
    reader = objective.readers["train"]
    trained = [p for p in objective.parameters() if p.requires_grad]

    def loss_and_gradients(batch: TextBatch) -> tuple[float, list[torch.Tensor]]:
        features = objective._features(batch)
        loss = objective.model.loss_sum(features, batch.packed, objective.text_prefix)
        return loss.item(), list(torch.autograd.grad(loss, trained))

    for step in reader.plan(0):
        n, length, answers = reader.size(step)
        shape = Shape(n + 2, length + 9, answers + 5)
        filled = reader.load(step, 0, shape)
        assert (*filled.packed.tokens.shape, len(filled.packed.labels)) == shape
        assert len(filled.vision) == shape.panoramas
        loss, gradients = loss_and_gradients(reader.load(step, 0))
        other, others = loss_and_gradients(filled)
        assert other == pytest.approx(loss, rel=1e-5)
        for one, two in zip(gradients, others, strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_an_epoch_s_parts_have_the_given_shapes(settings: Settings) -> None:
    objective: Any = load_objective(STAGES["resampler"], settings)
    objective.open_readers()
    reader = objective.readers["train"]
    for number in (1, 2, 3):
        parts = [part for step in reader.plan(0) for part in divide(step, number) if part]
        assert reader.sizes(reader.plan(0), number) == Counter(map(reader.size, parts))
    sizes = [reader.size(part) for step in reader.plan(0) for part in divide(step, 2) if part]
    shapes = choose_shapes(sizes, most=2)
    dataset = StepDataset(reader, 0, 2, shapes=shapes)
    loaded = [part for at in range(len(dataset)) for part in dataset[at].parts if part]
    found = {
        Shape(len(part.vision), part.packed.tokens.shape[1], len(part.packed.labels))
        for part in loaded
    }
    assert found == set(shapes) != set(sizes)
    assert describe(shapes, sizes).startswith(f"{len(shapes)} shapes, ")


@pytest.mark.skipif(not QUIC360.is_file(), reason="needs the rows of QuIC-360")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tokens", ["views", "sphere"])
def test_the_shapes_of_quic360_add_few_tokens(stage: str, tokens: str) -> None:
    from shapes import padding, part_sizes

    sizes = part_sizes(pd.read_csv(QUIC360).dropna(), stage, tokens)
    shapes = choose_shapes(sizes)
    assert len(shapes) <= 16
    assert padding(sizes, shapes) <= 1.06
