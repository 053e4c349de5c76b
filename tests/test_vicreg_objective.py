"""The objective between overlapping views: VICReg in two passes, InfoNCE, and unusable views."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import change, curve, run_stage
from panollava import paths
from panollava.config import Settings
from panollava.data.batches import StepBatch
from panollava.data.prepare import prepare_project
from panollava.errors import UserError
from panollava.stages import STAGES
from panollava.training.objective import one_device
from panollava.training.vicreg_objective import Objective


def test_both_passes_of_a_part_use_the_same_dropout_masks(
    settings: Settings, tmp_path: Path
) -> None:
    towers = shutil.copytree(settings.model.encoder.path, tmp_path / "dropout")
    config = json.loads((towers / "config.json").read_text())
    (towers / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    objective = Objective(STAGES["vision"], change(settings, model__encoder__path=str(towers)))
    objective.train()
    views = torch.randint(0, 256, (4, *objective.view_shape), dtype=torch.uint8)
    parts = list(views.split(2))
    encoder = objective.model.encoder

    def gradient() -> torch.Tensor:
        grads = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
        encoder.zero_grad()
        return torch.cat(grads)

    def step(seeds: list[int]) -> float:
        """The loss; the gradient is left in the parameters."""
        values = []
        for terms in objective.terms(StepBatch(parts, 4, 4), seeds, one_device):
            assert terms is not None
            terms[0].backward()
            values.append(float(terms[1][0]))
        assert values[1:] == [0]  # the value is counted once
        return values[0]

    loss_in_parts, in_parts = step([0, 1]), gradient()
    matched = map(objective._matched, parts, [0, 1])
    x, y = (torch.cat(side) for side in zip(*matched, strict=True))
    loss = objective._losses(x, y)["loss"]
    loss.backward()
    assert loss_in_parts == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(in_parts, gradient(), atol=1e-4)
    step([2, 3])
    assert not torch.allclose(in_parts, gradient(), atol=1e-2)  # dropout has an effect


def test_infonce_learns_to_retrieve_counterparts(settings: Settings) -> None:
    settings = change(settings, stage__vision__objective="infonce", stage__vision__epochs=8)
    run_stage("vision", change(settings, stage__vision__lr=1e-3))
    losses = curve("vision", "train/loss")
    accuracies = curve("vision", "train/retrieval_accuracy")
    assert losses[-1] < losses[0] and accuracies[-1] > accuracies[0]


@pytest.mark.parametrize("size", [0, 60, 5000])
def test_incomplete_views_are_named(settings: Settings, size: int) -> None:
    views = paths.PREPARED / "train/panoramas/000000.npy"
    views.write_bytes(views.read_bytes()[:size])
    with pytest.raises(UserError, match=rf"panoramas/000000.npy: {size} bytes instead of"):
        run_stage("vision", settings)


def test_views_without_overlap_need_0_epochs_of_the_vision_stage(settings: Settings) -> None:
    settings = change(settings, views__strategy="resize")
    prepare_project(settings)
    with pytest.raises(UserError, match=r"set stage\.vision\.epochs to 0"):
        run_stage("vision", settings)
    run_stage("vision", change(settings, stage__vision__epochs=0))
    run_stage("resampler", settings)


@pytest.mark.parametrize("kind", ["vicreg", "infonce"])
def test_mirrored_views_have_the_same_loss_and_accuracy(settings: Settings, kind: str) -> None:
    objective: Any = Objective(STAGES["vision"], change(settings, stage__vision__objective=kind))
    objective.model = Patches()
    torch.manual_seed(0)
    views = torch.randint(256, (2, *objective.view_shape), dtype=torch.uint8)
    results = []
    for each in (views, views[:, -torch.arange(8)].flip(3)):
        values, count = objective.validate([each[:1], each[1:]])
        results.append((float(values["loss"]), float(values["accuracy"]), count))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


class Patches(torch.nn.Module):
    """An encoder whose features are the mean colors of patches: of no direction."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        batch, count, size = views.shape[:3]
        patches = views.view(batch, count, size // 8, 8, size // 8, 8, 3).float()
        return patches.mean(dim=(3, 5)) / 16


def test_samples_are_compared_with_those_of_their_panorama_and_direction(
    settings: Settings,
) -> None:
    """Each view of a repeated panorama, seen as it is by its neighbors, is retrieved: what the
    other direction reads between the same tokens is no competitor."""
    objective = Objective(STAGES["vision"], change(settings, stage__vision__objective="infonce"))
    forward, backward = objective.pairs.counts
    samples = torch.randn(2, forward + backward, 32)
    samples[:, forward:] = samples[:, : min(forward, backward)]  # the same in both directions
    flat = samples.flatten(0, 1)
    assert objective._losses(flat, flat)["retrieval_accuracy"] == 1
    shifted = samples.roll(1, dims=0).flatten(0, 1)
    assert objective._losses(flat, shifted)["retrieval_accuracy"] < 0.2
