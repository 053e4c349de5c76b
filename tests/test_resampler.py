"""The resampler's first layer: features of any scale, and the weight of directions among them."""

import pytest
import torch

from helpers import ROOT
from panollava.config import load_settings
from panollava.geometry.sphere import cell_centers, encode_direction
from panollava.geometry.views import layout, token_rays
from panollava.model.resampler import MLPResampler

GRID = 7


@pytest.fixture(scope="module")
def directions() -> torch.Tensor:
    views = layout(load_settings(ROOT / "params.yaml").views)
    return torch.from_numpy(encode_direction(token_rays(views, cell_centers(GRID)), 4))


@pytest.mark.parametrize("features", [16, 768])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_directions_weigh_the_same_among_features_of_any_number_and_scale(
    directions: torch.Tensor, features: int, scale: float
) -> None:
    torch.manual_seed(0)
    resampler = MLPResampler(features, 256, directions, "ray")
    assert resampler.position is not None
    with torch.no_grad():
        content = resampler.content(scale * torch.randn(4, *directions.shape[:3], features)).var()
        position = resampler.position(resampler.directions).var()
    assert 0.05 < float(position / (position + content)) < 0.2


def test_outputs_are_normalized(directions: torch.Tensor) -> None:
    torch.manual_seed(0)
    resampler = MLPResampler(16, 256, directions, "ray")
    with torch.no_grad():
        tokens = resampler(torch.randn(2, *directions.shape[:3], 16))
    assert tokens.shape == (2, len(directions) * GRID**2, 256)
    assert torch.allclose(tokens.mean(dim=-1), torch.zeros(tokens.shape[:2]), atol=1e-5)
    assert torch.allclose(tokens.var(dim=-1), torch.ones(tokens.shape[:2]), atol=0.01)
