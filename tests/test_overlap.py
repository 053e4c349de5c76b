"""Tokens of neighboring views are matched by exact direction, all around the horizon."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from panollava import config
from panollava.errors import UserError
from panollava.geometry.overlap import correspondences, matched_tokens
from panollava.geometry.projections import Gnomonic, panorama_rays
from panollava.geometry.sphere import cell_centers
from panollava.geometry.views import Layout, Sampler, layout, token_centers, token_rays
from panollava.model.resampler import pool_tokens
from panollava.training.losses import vicreg


def settings(**values: Any) -> config.Views:
    defaults: dict[str, Any] = {
        "strategy": "e2p",
        "size": 224,
        "fov": 90.0,
        "overlap": 0.5,
        "pitch": 0.0,
        "global_view": False,
    }
    return config.Views(**(defaults | values))


def degrees_apart(one: Tensor, other: Tensor) -> Tensor:
    one, other = one.double(), other.double()
    cross = torch.linalg.cross(one, other).norm(dim=-1)
    return torch.rad2deg(torch.atan2(cross, (one * other).sum(dim=-1)))


def what_tokens_see(values: config.Views, grid: int, panorama: np.ndarray) -> Tensor:
    """Views of the panorama, averaged over patches: (1, views, grid, grid, 3)."""
    views = Sampler(layout(values), values.size).sample(panorama).astype(np.float64)
    patch = values.size // grid
    views = views[:, : grid * patch, : grid * patch]  # a tower ignores the margin
    tokens = views.reshape(-1, grid, patch, grid, patch, 3).mean(axis=(2, 4))
    return torch.from_numpy(tokens)[None]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"pitch": 30.0},
        {"global_view": True},
        {"fov": 120.0, "overlap": 0.75},
        {"strategy": "cubemap", "fov": 120.0},
        {"strategy": "sliding_window"},
    ],
    ids=str,
)
def test_matched_tokens_see_the_same_directions_to_half_a_degree(
    values: dict[str, Any], bits: int
) -> None:
    panorama = panorama_rays(751, 1502).astype(np.float32)  # each pixel holds its own direction
    if bits == 8:
        panorama = np.round(127.5 * (panorama + 1)).astype(np.uint8)
    tokens = what_tokens_see(settings(**values), 14, panorama)
    if bits == 8:
        tokens = tokens / 127.5 - 1
    pairs = correspondences(layout(settings(**values)), cell_centers(14), "exact")
    apart = degrees_apart(*matched_tokens(tokens, pairs))
    assert len(apart) == pairs.mask.sum() > 0
    assert apart.mean() < 0.5
    assert apart.max() < 0.5


@pytest.mark.parametrize(("size", "patch", "pool"), [(384, 14, 1), (384, 14, 2), (224, 32, 2)])
def test_token_directions_are_right_if_tokens_do_not_fill_a_view(
    size: int, patch: int, pool: int
) -> None:
    """The view has a margin outside all patches, and the last token has fewer patches."""
    values = settings(size=size)
    panorama = panorama_rays(751, 1502).astype(np.float32)
    tokens = what_tokens_see(values, size // patch, panorama)
    pooled = pool_tokens(tokens, pool)
    rays = torch.from_numpy(token_rays(layout(values), token_centers(patch, size, pool)))
    assert pooled.shape[1:] == rays.shape
    # The average over a square seen at an angle is slightly nearer to the view's center.
    assert degrees_apart(pooled, rays[None]).max() < 0.03 * (patch * pool / size * 90)
    pairs = correspondences(layout(values), token_centers(patch, size), "exact")
    assert degrees_apart(*matched_tokens(tokens, pairs)).max() < 0.5


def test_every_pair_around_the_horizon_has_the_same_matches() -> None:
    pairs = correspondences(layout(settings()), cell_centers(14), "exact")
    forward = [*((i, i + 1) for i in range(7)), (7, 0)]
    backward = [(j, i) for i, j in forward]
    assert list(zip(pairs.source.tolist(), pairs.target.tolist(), strict=True)) == [
        *forward,
        *backward,
    ]
    # Half of a view's width, except tokens above, below, and within half a token of an edge.
    assert pairs.mask.sum(dim=(1, 2)).tolist() == [pairs.mask[0].sum()] * 16
    assert 40 < pairs.mask[0].sum() < 98
    assert list(pairs.counts) == [8 * int(pairs.mask[0].sum())] * 2
    for direction in (slice(8), slice(8, 16)):
        mask, weights = pairs.mask[direction], pairs.weights[direction]
        assert (mask == mask[0]).all()
        assert torch.allclose(weights, weights[:1], atol=1e-6)
    assert torch.equal(
        pairs.mask[8], pairs.mask[0].flip(1)
    )  # what is right is left on the way back


RINGS: dict[str, tuple[dict[str, Any], str]] = {
    "e2p": ({}, "exact"),
    "e2p, naive": ({}, "naive"),
    "e2p, looking up": ({"pitch": 30.0}, "exact"),
    "cubemap": ({"strategy": "cubemap", "fov": 120.0}, "exact"),
    "sliding_window": ({"strategy": "sliding_window"}, "exact"),
}


@pytest.mark.parametrize("ring", sorted(RINGS.keys() - {"cubemap"}))  # whose faces are in no order
def test_mirrored_panoramas_have_the_same_loss(ring: str) -> None:
    """Their views are in the opposite order, and each is mirrored."""
    values, mode = RINGS[ring]
    pairs = correspondences(layout(settings(**values)), cell_centers(14), mode)
    torch.manual_seed(0)
    grids = torch.randn(2, 8, 14, 14, 5)
    mirrored = grids[:, -torch.arange(8)].flip(3)
    losses = [vicreg(*matched_tokens(g, pairs), 25, 25, 1)["loss"] for g in (grids, mirrored)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


@pytest.mark.parametrize("ring", RINGS)
def test_both_sides_have_the_same_variance(ring: str) -> None:
    """Values between tokens vary less than tokens: each side has as many of them."""
    values, mode = RINGS[ring]
    views_layout = layout(settings(**values))
    torch.manual_seed(0)
    grids = torch.randn(32, len(views_layout.projections), 14, 14, 4)
    x, y = matched_tokens(grids, correspondences(views_layout, cell_centers(14), mode))
    assert float(x.var()) == pytest.approx(float(y.var()), rel=0.02)


def test_two_views_are_neighbors_once_and_compared_in_both_directions() -> None:
    strips = settings(strategy="sliding_window", fov=240.0, overlap=0.25)
    assert layout(strips).neighbors == ((0, 1),)
    pairs = correspondences(layout(strips), cell_centers(12), "exact")
    assert list(zip(pairs.source.tolist(), pairs.target.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_the_last_and_the_first_view_match_across_the_seam() -> None:
    """With random features rather than directions, the seam's pair behaves like any other."""
    torch.manual_seed(0)
    grids = torch.randn(1, 8, 14, 14, 5)
    pairs = correspondences(layout(settings()), cell_centers(14), "exact")
    sides = [side.view(2, 8, -1, 5) for side in matched_tokens(grids, pairs)]
    for shift in range(1, 8):
        rolled = matched_tokens(grids.roll(shift, dims=1), pairs)
        for side, again in zip(sides, rolled, strict=True):
            assert torch.allclose(side.roll(shift, dims=1), again.view(2, 8, -1, 5), atol=1e-5)


@pytest.mark.parametrize("grid", [14, 16])
def test_naive_pairs_are_6_degrees_apart_on_average(grid: int) -> None:
    views_layout = layout(settings())
    rays = torch.from_numpy(token_rays(views_layout, cell_centers(grid)))[None]
    pairs = correspondences(views_layout, cell_centers(grid), "naive")
    apart = degrees_apart(*matched_tokens(rays, pairs))
    assert apart.mean() == pytest.approx(6.6, abs=0.1)
    assert apart.max() == pytest.approx(8.8, abs=0.25)


@pytest.mark.parametrize("grid", [14, 7])
def test_naive_pairs_right_columns_with_left_ones_index_by_index(grid: int) -> None:
    """In both directions."""
    grids = torch.randn(2, 8, grid, grid, 3)
    first, second = matched_tokens(
        grids, correspondences(layout(settings()), cell_centers(grid), "naive")
    )
    half = grid // 2
    right = grids[:, :, :, grid - half :].flatten(1, 3)
    left = grids.roll(-1, dims=1)[:, :, :, :half].flatten(1, 3)
    assert torch.allclose(first, torch.cat([right, right], dim=1).flatten(0, 1), atol=1e-5)
    assert torch.allclose(second, torch.cat([left, left], dim=1).flatten(0, 1), atol=1e-5)


def test_exactly_the_tokens_with_four_neighbors_in_the_target_are_matched() -> None:
    """Each target value is a bilinear average of tokens, without padding."""
    views_layout, centers = layout(settings()), cell_centers(14)
    pairs = correspondences(views_layout, centers, "exact")
    for side in matched_tokens(torch.ones(1, 8, 14, 14, 1), pairs):
        assert torch.allclose(side, torch.ones_like(side))
    assert (pairs.weights > 0).sum(dim=-1).max() <= 4
    assert not pairs.weights[~pairs.mask.flatten(1)].any()
    # No other token has four neighbors: the target's projection gives the same mask.
    neighbors = views_layout.neighbors
    for pair, (source, target) in enumerate([*neighbors, *((j, i) for i, j in neighbors)]):
        position, _ = views_layout.projections[target].position(
            views_layout.projections[source].rays(centers, centers)
        )
        tokens = position * 14 - 0.5
        front = (
            token_rays(views_layout, cell_centers(14))[source]
            @ token_rays(views_layout, cell_centers(1))[target, 0, 0]
            > 0
        )
        expected = ((tokens >= -1e-6) & (tokens <= 13 + 1e-6)).all(axis=-1) & front
        assert np.array_equal(pairs.mask[pair].numpy(), expected)


def test_sliding_windows_match_column_by_column() -> None:
    """Strips of the panorama are flat: exact and naive are the same."""
    torch.manual_seed(0)
    grids = torch.randn(2, 8, 14, 14, 4)
    views_layout = layout(settings(strategy="sliding_window"))
    exact = matched_tokens(grids, correspondences(views_layout, cell_centers(14), "exact"))
    naive = matched_tokens(grids, correspondences(views_layout, cell_centers(14), "naive"))
    for one, other in zip(exact, naive, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_panoramas_of_a_batch_are_independent() -> None:
    torch.manual_seed(0)
    grids = torch.randn(3, 8, 14, 14, 4)
    pairs = correspondences(layout(settings()), cell_centers(14), "exact")
    together = matched_tokens(grids, pairs)
    separate = [matched_tokens(grid[None], pairs) for grid in grids]
    for one, others in zip(together, zip(*separate, strict=True), strict=True):
        assert torch.equal(one, torch.cat(others))


def test_both_sides_have_gradients() -> None:
    grids = torch.randn(1, 12, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    pairs = correspondences(layout(settings(fov=120.0, overlap=0.75)), cell_centers(3), "exact")
    assert torch.autograd.gradcheck(lambda x: matched_tokens(x, pairs), (grids,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_read_at_exact_positions(dtype: torch.dtype) -> None:
    """Features that are exact in half precision: small integers that grow with the column."""
    grids = (torch.arange(14) % 14).view(1, 1, 1, 14, 1).expand(1, 8, 14, 14, 1).to(dtype)
    pairs = correspondences(layout(settings()), cell_centers(14), "exact")
    exact = matched_tokens(grids.double(), pairs)
    for read, expected in zip(matched_tokens(grids, pairs), exact, strict=True):
        assert read.dtype == dtype
        assert torch.equal(read, expected.to(dtype))


@pytest.mark.parametrize(
    ("values", "mode", "message"),
    [
        (
            {"strategy": "resize"},
            "exact",
            r"share no token.*views\.fov.*stage\.vision\.epochs to 0",
        ),
        ({"strategy": "resize"}, "naive", r"share no token.*views\.overlap"),
        ({"overlap": 0.0}, "exact", r"share no token \(14 x 14 each\)"),
        ({"strategy": "cubemap"}, "exact", r"share no token"),
        ({"strategy": "cubemap", "fov": 120.0}, "naive", r"naive needs views.*side by side.*exact"),
    ],
)
def test_views_without_matches_are_an_error(
    values: dict[str, Any], mode: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        correspondences(layout(settings(**values)), cell_centers(14), mode)


def test_views_that_match_in_one_direction_only_are_an_error() -> None:
    """The tokens of a narrow view are inside a wide one, whose own lie outside the narrow one."""
    narrow, wide = Gnomonic(0, 0, 4), Gnomonic(0, 0, 90)
    for pair in ((0, 1), (1, 0)):
        with pytest.raises(UserError, match="share no token"):
            correspondences(Layout((narrow, wide), (pair,)), cell_centers(2), "exact")
