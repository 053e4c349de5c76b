"""Angles and rays are inverse, and directions are encoded smoothly."""

import numpy as np
import pytest

from panollava.geometry.sphere import (
    Array,
    angles_from_rays,
    cell_centers,
    encode_direction,
    rays_from_angles,
)


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


def test_harmonic_k_turns_k_times_and_falls_off_to_the_poles_with_power_k() -> None:
    yaw, pitch = np.radians(40), np.radians(60)
    features = encode_direction(rays_from_angles(yaw, pitch), 4)
    for k in (2, 3, 4):
        sine, cosine = features[2 * k - 1 : 2 * k + 1]
        assert np.hypot(sine, cosine) == pytest.approx(0.5**k)
        assert np.arctan2(sine, cosine) == pytest.approx(np.radians(40 * k))


def test_cells_are_named_by_their_centers() -> None:
    assert cell_centers(4).tolist() == [0.125, 0.375, 0.625, 0.875]


def test_direction_encoding_rotates_with_the_panorama() -> None:
    """Sectoral harmonics: a rotation by 90 degrees changes signs and swaps sine and cosine."""
    yaw, pitch = angles_from_rays(random_rays(100))
    plain = encode_direction(rays_from_angles(yaw, pitch), 4)
    rotated = encode_direction(rays_from_angles(yaw + np.pi / 2, pitch), 4)
    assert rotated[:, [0, 1, 2]] == pytest.approx(plain[:, [2, 1, 0]] * [1, 1, -1])
    assert rotated[:, [3, 4]] == pytest.approx(-plain[:, [3, 4]])  # k = 2: 180 degrees
    assert rotated[:, [7, 8]] == pytest.approx(plain[:, [7, 8]])  # k = 4: 360 degrees


def test_a_harmonic_fades_towards_the_poles_by_its_power_of_the_cosine() -> None:
    yaw, pitch = angles_from_rays(random_rays(100))
    encoding = encode_direction(rays_from_angles(yaw, pitch), 4)
    for k, columns in ((2, [3, 4]), (3, [5, 6]), (4, [7, 8])):
        length = np.linalg.norm(encoding[:, columns], axis=1)
        assert length == pytest.approx(np.cos(pitch) ** k)
