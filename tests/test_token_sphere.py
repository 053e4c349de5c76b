"""Tokens merged on the sphere: each cell reads its direction, whatever the views."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import ROOT, change, weights
from panollava import config, paths
from panollava.cli import main as cli
from panollava.config import load_settings
from panollava.data.shards import Shards
from panollava.errors import UserError
from panollava.geometry.projections import panorama_rays
from panollava.geometry.sphere import Array, angles_from_rays, rays_from_angles
from panollava.geometry.token_sphere import merge_matrix
from panollava.geometry.views import Sampler, layout, token_centers
from panollava.model.resampler import MLPResampler, Pooling
from panollava.model.weights import read_header

DEMO = load_settings(ROOT / "params.yaml")


def settings_of(views: dict[str, Any], **model: Any) -> tuple[config.Model, config.Views]:
    changes = {f"views__{name}": value for name, value in views.items()}
    changes |= {f"model__{name}": value for name, value in model.items()}
    settings = change(DEMO, **{"model__tokens": "sphere", **changes})
    return settings.model, settings.views


def degrees_apart(one: Array, other: Array) -> Array:
    cross = np.linalg.norm(np.cross(one, other), axis=-1)
    return np.degrees(np.arctan2(cross, (one * other).sum(axis=-1)))


def ideal_features(views: config.Views, patch: int, panorama: np.ndarray) -> torch.Tensor:
    """Views of the panorama averaged over patches: (1, views, grid, grid, channels)."""
    sampled = torch.from_numpy(Sampler(layout(views), views.size).sample(panorama))
    grid = views.size // patch
    sampled = sampled[:, : grid * patch, : grid * patch]  # a tower ignores the margin
    patches = sampled.unflatten(2, (grid, patch)).unflatten(1, (grid, patch))
    return patches.double().mean(dim=(2, 4)).float()[None]


@pytest.mark.parametrize(
    ("values", "cells", "patch"),
    [
        ({}, (4, 16), 8),  # the demo
        ({"pitch": 20.0}, (4, 16), 8),
        ({"global_view": True}, (4, 16), 8),
        ({"overlap": 0.0}, (4, 16), 8),
        ({"size": 224}, (6, 32), 16),  # the real size
        ({"size": 224}, (8, 24), 16),
        ({"size": 224, "pitch": 30.0}, (6, 32), 16),
        ({"size": 224, "pitch": 90.0}, (4, 8), 16),
        ({"size": 224, "fov": 120.0, "overlap": 0.75}, (6, 24), 16),
        ({"size": 224, "strategy": "cubemap"}, (4, 16), 16),
        ({"size": 224, "strategy": "cubemap", "fov": 110.0}, (8, 24), 16),
        ({"size": 230}, (8, 24), 16),  # patches leave a margin
    ],
    ids=str,
)
def test_each_cell_reads_its_direction_to_half_a_degree(
    values: dict[str, Any], cells: tuple[int, int], patch: int
) -> None:
    rows, columns = cells
    pooling = Pooling(*settings_of(values, sphere_rows=rows, sphere_columns=columns), patch)
    views = settings_of(values)[1]
    panorama = panorama_rays(751, 1502).astype(np.float32)  # each pixel holds its own direction
    (read,) = pooling(ideal_features(views, patch, panorama)).numpy()
    merged = rows * columns
    apart = degrees_apart(read[:merged], pooling.rays[:merged])
    assert apart.max() < 0.5
    assert np.linalg.norm(pooling.rays, axis=-1) == pytest.approx(1)
    global_view = read[merged:]
    assert len(global_view) == (16 if views.global_view else 0)  # 4 x 4
    # A pooled token of the whole panorama averages 45 x 90 degrees.
    assert (degrees_apart(global_view, pooling.rays[merged:]) < 15).all()


@pytest.mark.parametrize("values", [{}, {"pitch": 20.0}, {"strategy": "cubemap"}], ids=str)
def test_cells_are_in_order_of_yaw_and_then_from_above(values: dict[str, Any]) -> None:
    pooling = Pooling(*settings_of(values), 8)
    yaw, pitch = np.degrees(angles_from_rays(pooling.rays.reshape(16, 4, 3)))
    assert (yaw + 1) % 360 - 1 == pytest.approx(np.repeat(np.arange(16)[:, None] * 22.5, 4, axis=1))
    assert np.ptp(pitch, axis=0) == pytest.approx(0, abs=1e-9)
    assert (np.diff(pitch) < 0).all()
    if values.get("strategy") == "cubemap":
        assert np.sin(np.radians(pitch[0])) == pytest.approx([0.75, 0.25, -0.25, -0.75], abs=0.03)


@pytest.mark.parametrize(
    ("values", "columns"), [({}, 16), ({"pitch": 20.0}, 24), ({"overlap": 0.25, "fov": 60.0}, 16)]
)
def test_a_roll_by_a_stride_is_a_roll_of_the_tokens(values: dict[str, Any], columns: int) -> None:
    """Of the panorama by one view, and of the tokens by the columns between two views."""
    model, views = settings_of(values, sphere_columns=columns)
    pooling = Pooling(model, views, 8)
    count = len(layout(views).projections)
    grids = torch.randn(2, count, 8, 8, 3)
    stride = columns // count * model.sphere_rows
    for strides in (1, 3, -1):
        rolled = pooling(grids.roll(strides, dims=1))
        assert torch.allclose(rolled, pooling(grids).roll(strides * stride, dims=1), atol=1e-5)
        assert not torch.allclose(rolled, pooling(grids), atol=0.1)


def test_the_weights_are_those_of_the_formula() -> None:
    """Written out for the demo's views, one sub-ray after the other."""
    rows, columns, grid, fov, stride = 4, 16, 8, np.radians(90), np.radians(45)
    half = np.tan(fov / 2)
    top = np.sin(np.arctan(np.cos(stride / 2) * half))
    expected = np.zeros((columns, rows, 8, grid, grid))
    for column, row, i, j in np.ndindex(columns, rows, 4, 4):
        yaw = (column - 0.5 + (i + 0.5) / 4) * 2 * np.pi / columns
        pitch = np.arcsin(top - (row + (j + 0.5) / 4) * 2 * top / rows)
        seen, inner = {}, {}
        for view in range(8):
            right, up, front = rays_from_angles(np.array(yaw - view * stride), np.array(pitch))
            x, y = grid * (1 + right / front / half) / 2, grid * (1 - up / front / half) / 2
            if front > 0 and 0 <= min(x, y) <= max(x, y) <= grid:
                seen[view] = x, y, front**4
                if 0.5 <= min(x, y) <= max(x, y) <= grid - 0.5:
                    inner[view] = seen[view]
        total = sum(weight for _, _, weight in (inner or seen).values())
        for view, (x, y, weight) in (inner or seen).items():
            x, y = (min(max(at - 0.5, 0), grid - 1) for at in (x, y))
            for m, n in np.ndindex(grid, grid):
                bilinear = max(0, 1 - abs(x - n)) * max(0, 1 - abs(y - m))
                expected[column, row, view, m, n] += bilinear * weight / total / 16
    matrix, _ = merge_matrix(
        layout(settings_of({})[1]).projections, rows, columns, token_centers(8, 64)
    )
    assert matrix == pytest.approx(expected.reshape(rows * columns, -1), abs=1e-9)


@pytest.mark.parametrize("values", [{}, {"global_view": True}, {"strategy": "cubemap"}], ids=str)
def test_the_weights_of_a_token_sum_to_1(values: dict[str, Any]) -> None:
    matrix = Pooling(*settings_of(values), 8).matrix
    assert matrix is not None and (matrix >= 0).all()
    assert torch.allclose(matrix.sum(dim=1), torch.ones(len(matrix)), atol=1e-6)


def test_tokens_of_the_global_view_follow_as_they_are_without_merging() -> None:
    model, views = settings_of({"global_view": True})
    grids = torch.randn(2, 9, 8, 8, 5)
    merged, pooled = Pooling(model, views, 8), Pooling(change(model, tokens="views"), views, 8)
    assert torch.allclose(merged(grids)[:, 64:], pooled(grids)[:, 8].flatten(1, 2), atol=1e-6)
    assert np.array_equal(merged.rays[64:], pooled.rays[8].reshape(-1, 3))
    without = Pooling(*settings_of({}), 8)
    assert torch.allclose(merged(grids)[:, :64], without(grids[:, :8]), atol=1e-6)


def test_features_in_half_precision_are_merged_in_float32() -> None:
    pooling = Pooling(*settings_of({}), 8)
    grids = torch.randn(1, 8, 8, 8, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        merged = pooling(grids)
    assert merged.dtype == torch.float32 and torch.equal(merged, pooling(grids.float()))


@pytest.mark.parametrize(
    ("values", "columns", "message"),
    [
        ({}, 20, "multiple of the 8 views around the horizon, found 20; the nearest is 16"),
        ({}, 21, "multiple of the 8 views around the horizon, found 21; the nearest is 24"),
        ({}, 3, "found 3; the nearest is 8"),
        ({"strategy": "cubemap"}, 18, "multiple of the 4 views around the horizon, found 18"),
        ({"strategy": "resize"}, 16, "perspective views; set views.strategy to e2p or cubemap"),
        ({"strategy": "sliding_window"}, 16, "perspective views; set views.strategy to e2p"),
        (
            {"overlap": 0.0, "pitch": 20.0},
            16,
            "none shows yaw .*; raise views.overlap",
        ),
    ],
)
def test_views_that_cannot_be_merged_are_an_error(
    values: dict[str, Any], columns: int, message: str
) -> None:
    with pytest.raises(UserError, match=f"^model.(tokens|sphere_columns): .*{message}") as error:
        Pooling(*settings_of(values, sphere_columns=columns), 8)
    assert len(str(error.value).split()) <= 30
    Pooling(*settings_of(values, sphere_columns=columns, tokens="views"), 8)


def test_the_stages_train_and_answer_with_merged_tokens(project: Path) -> None:
    """As the demo does."""
    cli.main(["train", "all"])
    cli.main(["evaluate"])
    assert Shards(paths.FEATURES / "test").shape == (3, 64, 32)
    assert Shards(paths.PREPARED / "test/panoramas").shape == (3, 8, 32, 32, 3)
    saved = read_header(paths.weights_file("finetune"))["settings"]["model"]
    assert (saved["tokens"], saved["sphere_rows"], saved["sphere_columns"]) == ("sphere", 4, 16)
    assert not [name for name in weights("finetune") if "pooling" in name]
    assert len(pd.read_csv(paths.PREDICTIONS)) == 6
    merged = weights("vision")
    text = paths.PARAMS.read_text()
    paths.PARAMS.write_text(text.replace("tokens: sphere\n", "tokens: views\n"))
    with pytest.raises(SystemExit):
        cli.main(["evaluate"])
    cli.main(["train", "vision"])  # which compares views
    assert all(torch.equal(tensor, merged[name]) for name, tensor in weights("vision").items())


def test_a_vector_for_each_view_is_an_error() -> None:
    model, views = settings_of({})
    pooling = Pooling(model, views, 8)
    with pytest.raises(UserError, match=r"^model\.resampler\.position: .*set it to ray") as error:
        MLPResampler(16, replace(model.resampler, position="view"), pooling)
    assert len(str(error.value).split()) <= 30
    MLPResampler(16, replace(model.resampler, position="none"), pooling)
