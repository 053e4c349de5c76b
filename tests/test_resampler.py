"""The resampler's first layer: features of any scale, and the weight of directions among them."""

from typing import Any

import pytest
import torch

from helpers import ROOT, change
from panollava.config import load_settings
from panollava.model.resampler import MLPResampler, Pooling

GRID = 7


def make_pooling(**changes: Any) -> Pooling:
    """Of the demo's views with GRID x GRID tokens, of which each is 2 x 2 patches."""
    settings = change(load_settings(ROOT / "params.yaml"), views__size=2 * GRID, **changes)
    return Pooling(settings.model, settings.views, patch=1)


@pytest.mark.parametrize("tokens", ["views", "sphere"])
@pytest.mark.parametrize("features", [16, 768])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_directions_weigh_the_same_among_features_of_any_number_and_scale(
    features: int, scale: float, tokens: str
) -> None:
    torch.manual_seed(0)
    pooling = make_pooling(model__tokens=tokens)
    resampler = MLPResampler(features, 256, pooling, "ray", 4)
    assert resampler.position is not None
    with torch.no_grad():
        content = resampler.content(scale * torch.randn(4, *pooling.shape, features)).var()
        position = resampler.position(resampler.directions).var()
    assert 0.05 < float(position / (position + content)) < 0.2


@pytest.mark.parametrize(("tokens", "count"), [("views", 8 * GRID**2), ("sphere", 4 * 16)])
def test_outputs_keep_their_scale_whatever_the_features(tokens: str, count: int) -> None:
    torch.manual_seed(0)
    pooling = make_pooling(model__tokens=tokens)
    resampler = MLPResampler(16, 256, pooling, "ray", 4)
    for scale in (0.1, 10.0):
        with torch.no_grad():
            outputs = resampler(scale * torch.randn(2, *pooling.shape, 16))
        assert outputs.shape == (2, count, 256)
        assert 0.4 < float(outputs.square().mean()) < 0.6
