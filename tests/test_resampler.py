"""Resamplers: features of any scale, the weight of directions among them, and their tokens."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers import ROOT, Killed, change, curve, outputs, run_stage, settings_for, weights
from panollava import paths
from panollava.config import Settings, load_settings
from panollava.errors import UserError
from panollava.model.network import RESAMPLERS, build_model
from panollava.model.resampler import Pooling, Resampler
from panollava.planning.plan import make_plan
from panollava.stages import STAGES
from panollava.training import curves
from panollava.training.features import write_features

GRID = 7
SETTINGS = load_settings(ROOT / "params.yaml")
POSITIONS = ("ray", "view", "none")


def make_pooling(**changes: Any) -> Pooling:
    """Of the demo's views with GRID x GRID tokens, of which each is 2 x 2 patches."""
    settings = change(SETTINGS, views__size=2 * GRID, **changes)
    return Pooling(settings.model, settings.views, patch=1)


def make_resampler(kind: str, features: int, pooling: Pooling, **changes: Any) -> Resampler:
    settings = dataclasses.replace(SETTINGS.model.resampler, **{"width": 256, **changes})
    return RESAMPLERS[kind](features, settings, pooling)


@pytest.mark.parametrize("kind", RESAMPLERS)
@pytest.mark.parametrize("tokens", ["views", "sphere"])
@pytest.mark.parametrize("features", [16, 768])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_directions_weigh_the_same_among_features_of_any_number_and_scale(
    features: int, scale: float, tokens: str, kind: str
) -> None:
    torch.manual_seed(0)
    pooling = make_pooling(model__tokens=tokens)
    resampler = make_resampler(kind, features, pooling)
    assert resampler.position is not None
    with torch.no_grad():
        content = resampler.content(scale * torch.randn(4, *pooling.shape, features)).var()
        position = resampler.position(resampler.directions).var()
    assert 0.05 < float(position / (position + content)) < 0.2


@pytest.mark.parametrize("kind", RESAMPLERS)
@pytest.mark.parametrize(("tokens", "count"), [("views", 8 * GRID**2), ("sphere", 4 * 16)])
def test_outputs_keep_their_scale_whatever_the_features(kind: str, tokens: str, count: int) -> None:
    torch.manual_seed(0)
    pooling = make_pooling(model__tokens=tokens)
    resampler = make_resampler(kind, 16, pooling, queries=9)
    expected = (9 if kind == "perceiver" else count, 16 if kind == "linear" else 256)
    assert (resampler.tokens, resampler.width) == expected
    for scale in (0.1, 10.0):
        with torch.no_grad():
            outputs = resampler(scale * torch.randn(2, *pooling.shape, 16))
        assert outputs.shape == (2, *expected)
        assert 0.9 < float(outputs.square().mean()) / resampler.mean_square < 1.4


@pytest.mark.parametrize("kind", RESAMPLERS)
@pytest.mark.parametrize("position", POSITIONS)
def test_vision_tokens_start_with_the_scale_of_the_text(
    towers: Path, kind: str, position: str
) -> None:
    resampler = {"model__resampler__type": kind, "model__resampler__position": position}
    settings = change(settings_for(towers), **resampler)
    model, _ = build_model(settings.model, settings.views)
    text = model.embed(torch.arange(100)).std()
    grid = torch.randn(3, *model.resampler.pooling.shape, 32)
    with torch.no_grad():
        assert 0.85 < float(model.vision_tokens(grid).std() / text) < 1.25


@pytest.mark.parametrize("position", POSITIONS)
def test_mlp_starts_from_the_numbers_that_it_always_started_from(
    towers: Path, position: str
) -> None:
    """A result of one seed is compared over versions of the project."""
    settings = change(settings_for(towers), model__resampler__position=position)
    model, _ = build_model(settings.model, settings.views, seed=3)
    torch.manual_seed(3)
    size, width = 9, settings.model.resampler.width
    expected = {"directions": torch.randn(8, 1, 1, size)} if position == "view" else {}
    content = nn.Sequential(nn.Linear(32, width), nn.LayerNorm(width))
    expected |= content.state_dict(prefix="content.")
    if position != "none":
        weight = nn.Linear(size, width, bias=False).weight.detach()
        expected["position.weight"] = weight
    state = model.resampler.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    projector = nn.Linear(width, 32)
    text = model.embed(torch.arange(model.language_model.config.vocab_size))
    nn.init.normal_(projector.weight, std=text.std().item() / (0.43 * width) ** 0.5)
    assert torch.equal(model.projector.state_dict()["weight"], projector.weight)

    grid = torch.randn(2, 8, 2, 2, 32)
    with torch.no_grad():
        hidden = content(grid)
        if position != "none":
            hidden = hidden + model.resampler.directions @ weight.T
        assert torch.allclose(model.resampler(grid), functional.gelu(hidden).flatten(1, 3))


def perceive(position: str) -> tuple[Resampler, Tensor]:
    torch.manual_seed(0)
    pooling = make_pooling(model__tokens="views")
    resampler = make_resampler("perceiver", 16, pooling, queries=5, position=position)
    return resampler, torch.randn(2, *pooling.shape, 16)


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_a_perceiver_knows_where_tokens_are_only_by_their_directions(position: str) -> None:
    resampler, features = perceive(position)
    before = resampler(features)
    after = resampler(features[:, torch.randperm(features.shape[1])])
    assert torch.allclose(after, before, atol=1e-5) == (position == "none")


@torch.no_grad()
def test_a_panoramas_tokens_do_not_depend_on_its_neighbors_in_the_batch() -> None:
    resampler, features = perceive("ray")
    both, alone = resampler(features), resampler(features[1:])
    assert torch.allclose(both[1:], alone, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


def test_a_perceiver_has_no_width_that_its_heads_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"^model\.resampler\.width: .* multiple of 64, found 100"):
        make_resampler("perceiver", 16, make_pooling(), width=100)


def test_a_vector_for_each_view_is_an_error_for_merged_tokens() -> None:
    pooling = make_pooling(model__tokens="sphere")
    for kind in RESAMPLERS:
        with pytest.raises(UserError, match=r"^model\.resampler\.position: .*set it to ray"):
            make_resampler(kind, 16, pooling, position="view")


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [("mlp", "raise model.resampler.pool"), ("perceiver", "lower model.resampler.queries")],
)
def test_a_sequence_that_is_too_long_names_what_makes_fewer_tokens(
    towers: Path, kind: str, remedy: str
) -> None:
    settings = change(settings_for(towers), model__resampler__type=kind)
    model, _ = build_model(settings.model, settings.views)
    with pytest.raises(UserError, match=f"shorten the row, .*{remedy}, or use another"):
        model.check_length(99999, "shorten the row")


def small(settings: Settings, kind: str, **changes: Any) -> Settings:
    changes = {"width": 64, "queries": 3, "type": kind, **changes}
    return change(settings, **{f"model__resampler__{key}": value for key, value in changes.items()})


@pytest.mark.parametrize("kind", ["linear", "perceiver"])
def test_each_type_trains_and_a_killed_run_ends_in_the_same_bytes(
    settings: Settings, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = change(small(settings, kind), stage__resampler__lr=1e-2)
    run_stage("vision", settings)
    run_stage("resampler", settings)
    losses = curve("resampler", "val/loss")
    assert losses[-1] < losses[0]
    first = outputs("resampler")
    shutil.rmtree(paths.RESUME)
    steps = iter(range(4))

    def die(*_: object) -> None:
        if next(steps, None) is None:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(curves.Speed, "on_train_batch_end", die)
        with pytest.raises(Killed):
            run_stage("resampler", settings)
    run_stage("resampler", settings)
    assert outputs("resampler") == first
    write_features(settings)
    run_stage("finetune", settings)
    before, after = weights("resampler"), weights("finetune")
    start = build_model(settings.model, settings.views, settings.seed)[0].state_dict()
    for name in (name for name in before if name.startswith("resampler.")):
        assert not torch.equal(before[name], start[name]), name
    assert before.keys() == after.keys()


@pytest.mark.parametrize(("kind", "tokens"), [("mlp", 32), ("linear", 32), ("perceiver", 3)])
def test_the_plan_counts_the_tokens_of_the_resampler(
    settings: Settings, kind: str, tokens: int
) -> None:
    settings = small(settings, kind)
    stage = make_plan(settings, [STAGES["resampler"]]).stages["resampler"]
    model, _ = build_model(settings.model, settings.views)
    assert stage.vision_tokens == model.resampler.tokens == tokens
    assert stage.parameters["resampler"] == sum(p.numel() for p in model.resampler.parameters())
