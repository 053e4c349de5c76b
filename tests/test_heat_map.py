"""A heat map says how much less likely an answer becomes without a part of the picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers import change, random_views, settings_for
from panollava.geometry.projections import panorama_rays
from panollava.geometry.sphere import angles_from_rays
from panollava.model.header import TOWERS, make_header
from panollava.model.heat_map import HEIGHT, RADIUS, SMOOTHING, HeatMaps
from panollava.model.network import RESAMPLERS, build_model
from panollava.model.panollava import PanoLLaVA
from panollava.model.weights import save_weights
from panollava.stages import STAGES

QUERY, ANSWER = "what is behind?", "a red ball and a blue box."


@pytest.fixture(scope="module")
def model(
    request: pytest.FixtureRequest, towers: Path, tmp_path_factory: pytest.TempPathFactory
) -> PanoLLaVA:
    """With an untrained resampler, whose tokens are made louder so that they change answers."""
    file = tmp_path_factory.mktemp("model") / "model_final.safetensors"
    settings, stage = settings_for(towers), STAGES["finetune"]
    settings = change(settings, model__resampler__type=getattr(request, "param", "mlp"))
    network: Any
    network, _ = build_model(settings.model, settings.views)
    with torch.no_grad():
        network.projector.weight *= 20
    save_weights(file, network, stage.saves, make_header(stage, settings, TOWERS))
    return PanoLLaVA.from_pretrained(file, accelerator="cpu")


@pytest.fixture
def views() -> NDArray:
    return random_views(1)[0].numpy()


def log_likelihood(model: PanoLLaVA, views: NDArray, query: str, answer: str) -> float:
    """Of one unpacked row, from the logits of the whole sequence."""
    network, dialogue = model.network, model.dialogue
    row = dialogue.row(query, answer, truncate=False)
    vision = network.vision_tokens(model.features_of_views(views[None]).clone())
    before, after = (
        network.embed(torch.tensor([t])) for t in (dialogue.text_prefix, row.query + row.answer)
    )
    embedded = torch.cat([before, vision, after], dim=1)
    with torch.no_grad():
        logits = network.language_model(inputs_embeds=embedded, use_cache=False).logits[0]
    answer_logits = logits[-len(row.answer) - 1 : -2].log_softmax(-1)  # without the end token
    return float(answer_logits.gather(1, torch.tensor(row.answer[:-1])[:, None]).sum())


@pytest.mark.parametrize("model", RESAMPLERS, indirect=True)
def test_a_loss_is_that_of_the_views_painted_over(model: PanoLLaVA, views: NDArray) -> None:
    maps = HeatMaps(model, views)
    losses = maps.losses(QUERY, ANSWER)
    assert losses.shape == (len(maps.centers),)
    assert np.ptp(losses) > 0.05
    original = log_likelihood(model, views, QUERY, ANSWER)
    color = views.mean((0, 1, 2)).round().astype(np.uint8)
    for disc in (0, len(losses) // 2, int(losses.argmax())):
        angle = np.degrees(np.arccos((maps.rays @ maps.centers[disc]).clip(-1, 1)))
        painted = np.where((angle < RADIUS)[..., None], color, views)
        expected = original - log_likelihood(model, painted, QUERY, ANSWER)
        assert losses[disc] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("view", "yaw"), [(0, 0), (2, 90), (4, 180), (6, -90)])
def test_a_map_marks_only_what_the_answer_depends_on(
    model: PanoLLaVA, views: NDArray, monkeypatch: pytest.MonkeyPatch, view: int, yaw: float
) -> None:
    resampler = model.network.resampler

    def forward(features: Tensor) -> Tensor:
        """Tokens of one view; the others are always the same."""
        kept = torch.zeros_like(features)
        kept[:, view] = features[:, view]
        return type(resampler).forward(resampler, kept)

    monkeypatch.setattr(resampler, "forward", forward)
    maps = HeatMaps(model, views)
    heat = maps.heat_map(QUERY, ANSWER)
    assert heat.shape == (HEIGHT, 2 * HEIGHT)
    assert heat.dtype == np.float32
    yaws, _ = np.degrees(angles_from_rays(panorama_rays(*heat.shape)))
    off = np.abs((yaws - yaw + 180) % 360 - 180)
    assert heat[off < 45 + RADIUS].max() == heat.max() > 0
    assert heat[off > 45 + RADIUS + 4 * SMOOTHING].max() < 0.01 * heat.max()


def test_a_map_stays_empty_if_the_answer_does_not_depend_on_the_picture(
    model: PanoLLaVA, views: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision_tokens = model.network.vision_tokens
    monkeypatch.setattr(model.network, "vision_tokens", lambda f: vision_tokens(f.clone()) * 0)
    assert np.abs(HeatMaps(model, views).heat_map(QUERY, ANSWER)).max() < 1e-4


def test_losses_of_the_parts_of_an_answer_sum_to_those_of_the_answer(
    model: PanoLLaVA, views: NDArray
) -> None:
    maps, at = HeatMaps(model, views), ANSWER.index(" and")
    parts = [maps.losses(QUERY, ANSWER, part) for part in (slice(0, at), slice(at, None))]
    assert min(np.ptp(part) for part in parts) > 0
    assert sum(parts) == pytest.approx(maps.losses(QUERY, ANSWER), abs=1e-9)


def test_maps_computed_together_are_those_computed_one_by_one(
    model: PanoLLaVA, views: NDArray
) -> None:
    pairs = [(QUERY, ANSWER), ("how many?", "two."), ("what is in front?", ANSWER)]
    together = HeatMaps(model, views)
    together.compute(pairs)
    for pair in pairs:
        alone = HeatMaps(model, views).losses(*pair)
        assert together.losses(*pair) == pytest.approx(alone, abs=1e-4)
