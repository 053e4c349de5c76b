"""Pictures that are 2:1 but no whole panorama are pointed out, and panoramas are not."""

from collections.abc import Iterator
from functools import cache

import cv2
import numpy as np
import pytest

from helpers import SHARED
from panollava.data.images import read_panorama
from panollava.data.picture_suspicions import SIGNS, find_signs

HEIGHT = 128


@cache
def world(height: int = HEIGHT, seed: int = 0) -> np.ndarray:
    """An equirectangular panorama of random soft blobs on a sphere, lighter above the horizon."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, : 2 * height] + 0.5
    pitch, yaw = np.pi * (0.5 - rows / height), np.pi * columns / height
    rays = np.stack([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch)], -1)
    picture = 110 + 30 * np.sin(pitch)[..., None] + np.zeros(3)
    for _ in range(150):
        center = random.normal(size=3)
        center /= np.linalg.norm(center)
        near = np.exp((rays @ center - 1) * random.choice([30, 100, 400]))
        picture += near[..., None] * random.normal(0, 90, 3)
    return picture.clip(0, 255).astype(np.uint8)


def resize(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def nearer(picture: np.ndarray, columns: int) -> np.ndarray:
    """What the other eye sees: things below the horizon are nearer, and shifted by more."""
    height = len(picture)
    shifts = [round(columns * row / height) for row in range(height)]
    return np.stack([np.roll(row, by, axis=0) for row, by in zip(picture, shifts, strict=True)])


def circles(picture: np.ndarray, size: float, black: int) -> np.ndarray:
    height = len(picture)
    away = np.abs(np.arange(height) - (height - 1) / 2) / (height / 2)
    radius = np.tile(np.hypot(away[:, None], away), 2)
    return np.where(radius[..., None] > size, black, picture).astype(np.uint8)


def panoramas() -> Iterator[np.ndarray]:
    for seed in range(6):
        yield world(seed=seed)
    yield world(height=32)
    yield np.roll(world(), 77, axis=1)
    yield world() // 4  # at night
    capped = world().copy()
    capped[:32] = capped[-32:] = 0  # black poles
    yield capped
    flat = np.full((HEIGHT, 2 * HEIGHT, 3), 90, np.uint8)
    flat[HEIGHT // 2 :] = 160  # a sky and a ground
    yield flat


def test_panoramas_have_no_signs() -> None:
    for index, panorama in enumerate(panoramas()):
        assert not find_signs(panorama, {}), index


@pytest.mark.parametrize("seed", range(4))
def test_what_is_no_whole_panorama_has_its_sign(seed: int) -> None:
    panorama = world(seed=seed)
    height, width = panorama.shape[:2]
    left, upper = resize(panorama, width // 2, height), resize(panorama, width, height // 2)
    half = np.ascontiguousarray(panorama[height // 4 : -height // 4, width // 4 : -width // 4])
    band = np.ascontiguousarray(panorama[height // 4 : -height // 4])
    for sign, how, picture in (
        ("stereo", "left and right", np.hstack([left, left])),
        ("stereo", "left and right", np.hstack([left, nearer(left, 3)])),
        ("stereo", "left and right", np.hstack([left, np.roll(left, 6, axis=1)])),
        ("stereo", "upper and lower", np.vstack([upper, upper])),
        ("stereo", "upper and lower", np.vstack([upper, nearer(upper, 5)])),
        ("fisheye", "two circles", circles(panorama, 1, 0)),
        ("fisheye", "two circles", circles(panorama, 0.85, 12)),
        ("part", "left and right edges differ by", resize(half, width, height)),
        ("part", "a pole, varies by", resize(band, width, height)),
        ("black", "brighter than 0", np.zeros_like(panorama)),
        ("one color", "differ by 0", np.full_like(panorama, 77)),
    ):
        signs = find_signs(picture, {})
        assert list(signs) == [sign], how
        assert how in signs[sign]


def test_gpano_tags_name_projection_and_tilt() -> None:
    whole = {
        "ProjectionType": "equirectangular",
        "PosePitchDegrees": "0",
        "PoseRollDegrees": "-0.0",
    }
    assert not find_signs(world(), whole)
    assert not find_signs(world(), {"PosePitchDegrees": "steep", "PoseHeadingDegrees": "225"})
    tilted = whole | {"PosePitchDegrees": "17.0", "PoseRollDegrees": "-121.5"}
    expected = "GPano:PosePitchDegrees is 17, GPano:PoseRollDegrees is -121.5"
    assert find_signs(world(), tilted) == {"tilt": expected}
    expected = "GPano:ProjectionType is cylindrical"
    assert find_signs(world(), {"ProjectionType": "cylindrical"}) == {"projection": expected}
    sizes = {"CroppedAreaImageWidthPixels": "512", "CroppedAreaImageHeightPixels": "160"}
    assert find_signs(world(), sizes) == {"tags": "they are of a part of 512 x 160 pixels"}
    assert set(SIGNS) >= {"tilt", "projection", "tags"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_panoramas_have_no_signs_but_their_tags() -> None:
    for file in (SHARED / "quic360_mini/images").iterdir():
        assert not find_signs(read_panorama(file, 256), {}), file
