"""Rays, panoramas and views are consistent, including at the poles and the seam."""

import numpy as np
import pytest

from panollava.geometry.sphere import (
    Array,
    Gnomonic,
    Projection,
    Window,
    angles_from_rays,
    cell_centers,
    encode_direction,
    panorama_position,
    panorama_rays,
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


def test_axes_are_right_up_and_forward() -> None:
    yaw, pitch = np.radians([[0, 90, 180, -90, 0, 0], [0, 0, 0, 0, 90, -90]])
    expected = [[0, 0, 1], [1, 0, 0], [0, 0, -1], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]
    assert rays_from_angles(yaw, pitch) == pytest.approx(np.array(expected))


def test_angles_and_rays_are_inverse_for_rays_of_any_length() -> None:
    rays = random_rays(1000)
    assert rays_from_angles(*angles_from_rays(7 * rays)) == pytest.approx(rays, abs=1e-14)


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


@pytest.mark.parametrize("degree", [1, 2, 4, 6])
def test_direction_encoding_is_smooth_across_the_seam_and_over_the_poles(degree: int) -> None:
    generator = np.random.default_rng(1)
    seam = rays_from_angles(np.full(9, np.pi), np.linspace(-1.5, 1.5, 9))
    centers = np.concatenate([random_rays(500), seam, [[0, 1, 0], [0, -1, 0]]])
    near = centers + 1e-5 * generator.normal(size=centers.shape)
    near /= np.linalg.norm(near, axis=-1, keepdims=True)
    change = np.linalg.norm(
        encode_direction(near, degree) - encode_direction(centers, degree), axis=-1
    )
    assert encode_direction(centers, degree).shape == (len(centers), 3 + 2 * (degree - 1))
    # The k-th harmonic changes k times as fast, and is at most 1.
    limit = 2 * degree * np.sqrt(degree + 1)
    assert (change <= limit * np.linalg.norm(near - centers, axis=-1)).all()


def test_different_directions_have_different_encodings() -> None:
    rays = random_rays(300)
    features = encode_direction(rays, 4)
    apart = np.linalg.norm(features[:, None] - features[None], axis=-1)
    chord = np.linalg.norm(rays[:, None] - rays[None], axis=-1)
    assert (apart >= chord - 1e-12).all()


def test_direction_encoding_rotates_with_the_panorama() -> None:
    """Sectoral harmonics: a rotation by 90 degrees changes signs and swaps sine and cosine."""
    yaw, pitch = angles_from_rays(random_rays(100))
    plain = encode_direction(rays_from_angles(yaw, pitch), 4)
    rotated = encode_direction(rays_from_angles(yaw + np.pi / 2, pitch), 4)
    assert rotated[:, [0, 1, 2]] == pytest.approx(plain[:, [2, 1, 0]] * [1, 1, -1])
    assert rotated[:, [3, 4]] == pytest.approx(-plain[:, [3, 4]])  # k = 2: 180 degrees
    assert rotated[:, [7, 8]] == pytest.approx(plain[:, [7, 8]])  # k = 4: 360 degrees
