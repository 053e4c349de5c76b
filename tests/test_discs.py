"""Discs cover what views show, and a map puts each value where its disc is."""

import numpy as np
import pytest

from panollava.geometry.discs import disc_centers, disc_masks, map_discs, seen
from panollava.geometry.projections import Gnomonic, Projection, Window, panorama_rays
from panollava.geometry.sphere import angles_from_rays, cell_centers, rays_from_angles


def ring(pitch: float, *yaws: float) -> list[Projection]:
    return [Gnomonic(yaw, pitch, 90) for yaw in yaws]


VIEWS: dict[str, list[Projection]] = {
    "ring": ring(0, *range(0, 360, 45)),
    "cube": [*ring(0, 0, 90, 180, 270), *ring(90, 0), *ring(-90, 0)],
    "strips": [Window(yaw, 0, 60, 180) for yaw in range(0, 360, 60)],
    "panorama": [Window(0, 0, 360, 180)],
}


def rays_of(views: list[Projection]) -> np.ndarray:
    return np.stack([view.rays(cell_centers(33), cell_centers(33)) for view in views])


@pytest.mark.parametrize("name", VIEWS)
def test_every_direction_that_a_view_shows_is_near_a_disc(name: str) -> None:
    rays = rays_of(VIEWS[name]).reshape(-1, 3)
    centers = disc_centers(rays, 15, 20)
    nearest = np.degrees(np.arccos(np.clip((rays @ centers.T).max(axis=1), -1, 1)))
    assert nearest.max() < 15


@pytest.mark.parametrize("name", VIEWS)
def test_each_disc_covers_something_that_a_view_shows(name: str) -> None:
    rays = rays_of(VIEWS[name])
    centers = disc_centers(rays, 15, 20)
    masks = disc_masks(rays, centers, 20)
    assert masks.shape == (len(centers), *rays.shape[:-1])
    assert masks.any(axis=(1, 2, 3)).all()
    assert (
        masks == (np.degrees(np.arccos((rays @ centers.T).clip(-1, 1))) < 20).transpose(3, 0, 1, 2)
    ).all()


def test_discs_are_spread_evenly() -> None:
    rays = panorama_rays(60, 120)
    centers = disc_centers(rays, 15, 20)
    cosines = centers @ centers.T - 2 * np.eye(len(centers))
    apart = np.degrees(np.arccos(cosines.max(axis=1)))
    assert len(centers) == round(4 * np.pi / np.radians(15) ** 2)
    assert 0.75 * 15 < apart.min() <= apart.max() < 1.25 * 15


@pytest.mark.parametrize("yaw", [-179, -90, 0, 37, 180])
def test_a_map_is_highest_where_the_value_is(yaw: float) -> None:
    rays = rays_of(VIEWS["ring"])
    centers = disc_centers(rays, 10, 16)
    target = rays_from_angles(np.radians(yaw), np.radians(-15))
    values = np.exp(20 * (centers @ target - 1))
    heat = map_discs(values, centers, VIEWS["ring"], 11, 45)
    top = panorama_rays(45, 90).reshape(-1, 3)[heat.argmax()]
    assert np.degrees(np.arccos(top @ target)) < 5


def test_a_map_is_zero_where_no_view_looks_and_even_elsewhere_for_even_values() -> None:
    rays = rays_of(VIEWS["ring"])
    centers = disc_centers(rays, 15, 20)
    heat = map_discs(np.ones(len(centers)), centers, VIEWS["ring"], 11, 45)
    looked_at = seen(VIEWS["ring"], panorama_rays(45, 90))
    assert np.allclose(heat[looked_at], 1)
    assert (heat[~looked_at] == 0).all()
    _, pitch = angles_from_rays(panorama_rays(45, 90)[~looked_at])
    assert np.degrees(np.abs(pitch)).min() > 40  # a view of 90 degrees ends at 45 in its middle
