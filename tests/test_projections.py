"""Rays, panoramas and views are consistent, including at the poles and the seam."""

import numpy as np
import pytest

from panollava.geometry.projections import (
    Gnomonic,
    Projection,
    Window,
    panorama_position,
    panorama_rays,
)
from panollava.geometry.sphere import (
    Array,
    angles_from_rays,
    cell_centers,
    rays_from_angles,
)

MIDDLE = cell_centers(1)
PROJECTIONS = [
    Gnomonic(0, 0, 90),
    Gnomonic(315, 30, 75),
    Gnomonic(180, -90, 120),
    Gnomonic(-45, 90, 100),
    Window(0, 0, 360, 180),
    Window(180, 0, 90, 180),
    Window(350, 20, 60, 40),
]


def random_rays(count: int) -> Array:
    rays = np.random.default_rng(0).normal(size=(count, 3))
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def test_panorama_pixels_follow_the_convention() -> None:
    height, width = 5, 10
    yaw, pitch = np.degrees(angles_from_rays(panorama_rays(height, width)))
    for row in range(height):
        for column in range(width):
            assert yaw[row, column] == pytest.approx(((column + 0.5) / width - 0.5) * 360)
            assert pitch[row, column] == pytest.approx((0.5 - (row + 0.5) / height) * 180)


@pytest.mark.parametrize(("height", "width"), [(64, 128), (37, 75), (1, 2)])
def test_a_panorama_pixels_ray_maps_to_its_position(height: int, width: int) -> None:
    position = panorama_position(panorama_rays(height, width)) * (width, height) - 0.5
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    assert position == pytest.approx(np.stack([columns, rows], axis=-1), abs=1e-9)


def test_positions_on_the_seam_stay_below_one() -> None:
    yaw = np.pi * np.array([-1, 1, np.nextafter(1, 0), np.nextafter(-1, 0), 3, -3])
    x = panorama_position(rays_from_angles(yaw, np.zeros(6)))[..., 0]
    assert ((x >= 0) & (x < 1)).all()
    assert np.minimum(x, 1 - x) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("view", PROJECTIONS)
@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (7, 5), (1, 1)])
def test_a_views_ray_maps_to_the_position_it_came_from(
    view: Projection, rows: int, columns: int
) -> None:
    rays = view.rays(cell_centers(columns), cell_centers(rows))
    position, inside = view.position(rays)
    x, y = np.meshgrid((np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows)
    assert rays.shape == (rows, columns, 3)
    assert np.linalg.norm(rays, axis=-1) == pytest.approx(1)
    assert position == pytest.approx(np.stack([x, y], axis=-1), abs=1e-9)
    assert inside.all()


def test_the_center_of_a_view_is_at_its_yaw_and_pitch() -> None:
    for yaw, pitch in [(0, 0), (45, 0), (180, 20), (270, -60), (0, 90), (0, -90)]:
        expected = rays_from_angles(*np.radians(np.array([yaw, pitch])))
        assert Gnomonic(yaw, pitch, 90).rays(MIDDLE, MIDDLE)[0, 0] == pytest.approx(expected)
        assert Window(yaw, pitch, 30, 30).rays(MIDDLE, MIDDLE)[0, 0] == pytest.approx(expected)


def test_a_perspective_view_keeps_its_field_of_view_and_is_upright() -> None:
    rays = Gnomonic(0, 0, 90).rays(cell_centers(1001), cell_centers(1001))
    yaw, pitch = np.degrees(angles_from_rays(rays))
    assert yaw[500, [0, -1]] == pytest.approx([-45, 45], abs=0.1)
    assert pitch[[0, -1], 500] == pytest.approx([45, -45], abs=0.1)
    # Straight lines of the scene stay straight: a row of cells is in one plane with the camera.
    assert np.linalg.svd(rays[100], compute_uv=False)[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("fov", [60, 90, 150])
def test_a_perspective_view_sees_nothing_behind_it_or_beyond_its_edges(fov: int) -> None:
    rays = random_rays(5000)
    view = Gnomonic(70, 35, fov)
    _, inside = view.position(rays)
    axis, limit = view.rays(MIDDLE, MIDDLE)[0, 0], np.radians(fov / 2)
    angle = np.arccos(np.clip(rays @ axis, -1, 1))
    assert not inside[angle > np.arctan(np.sqrt(2) * np.tan(limit))].any()
    assert inside[angle < limit].all()


def test_a_window_across_the_seam_sees_both_sides() -> None:
    yaw = np.radians([170, 179.9, -179.9, -170, 130, -130])
    position, inside = Window(180, 0, 90, 180).position(rays_from_angles(yaw, np.zeros(6)))
    assert inside.tolist() == [True, True, True, True, False, False]
    assert (np.diff(position[:4, 0]) > 0).all()
