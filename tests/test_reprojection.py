"""A panorama of directions, whose pixels are their own rays, comes back from every form of it."""

import cv2
import numpy as np
import pytest

from panollava.geometry.projections import (
    PANORAMA,
    panorama_position,
    panorama_rays,
)
from panollava.geometry.reprojection import CROSSES, CUBE, Face, Reprojection, cube_faces
from panollava.geometry.sphere import cell_centers, rotation

HEIGHT, WIDTH, SIDE = 384, 768, 192
DIRECTIONS = panorama_rays(HEIGHT, WIDTH)
UPRIGHT = (0.0, 0.0, 0.0)
LEVEL = (Face(PANORAMA, 0, 0, WIDTH, HEIGHT),)


def angle(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Degrees between directions, (...)."""
    one = one / np.linalg.norm(one, axis=-1, keepdims=True)
    return np.degrees(2 * np.arcsin(np.linalg.norm(one - other, axis=-1) / 2))


def picture_of_cube(rows: tuple[str, ...]) -> np.ndarray:
    """Each face's rays, where `rows` places it; zero elsewhere."""
    picture = np.zeros((len(rows) * SIDE, len(rows[0]) * SIDE, 3), np.float32)
    for row, letters in enumerate(rows):
        for column, letter in enumerate(letters):
            if letter != ".":
                face = CUBE[letter.lower()].rays(cell_centers(SIDE), cell_centers(SIDE))
                turned = face[::-1, ::-1] if letter.isupper() else face
                picture[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE] = turned
    return picture


@pytest.mark.parametrize("rows", [*CROSSES, ("rludfb",), tuple("frblud"), ("rlu", "dfb")])
@pytest.mark.parametrize("angles", [UPRIGHT, (30.0, -40.0, 15.0)])
def test_a_cube_comes_back(rows: tuple[str, ...], angles: tuple[float, float, float]) -> None:
    reprojection = Reprojection(cube_faces(rows, SIDE), angles, HEIGHT, WIDTH)
    world = reprojection.sample(picture_of_cube(rows)) @ rotation(*angles).T
    assert angle(world, DIRECTIONS).max() < 0.5


@pytest.mark.parametrize(
    "angles", [(30.0, 0.0, 0.0), (0.0, 10.0, 0.0), (0.0, 0.0, -7.0), (-120.0, 35.0, 160.0)]
)
def test_a_tilted_panorama_comes_back(angles: tuple[float, float, float]) -> None:
    # A camera's pixels hold rays along its own axes; the world's follow by the rotation.
    level = Reprojection(LEVEL, angles, HEIGHT, WIDTH).sample(DIRECTIONS.astype(np.float32))
    assert angle(level @ rotation(*angles).T, DIRECTIONS).max() < 0.5


def test_a_level_panorama_stays_as_it_is() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    np.testing.assert_array_equal(Reprojection(LEVEL, UPRIGHT, HEIGHT, WIDTH).sample(noise), noise)


def test_a_squeezed_panorama_is_stretched() -> None:
    squeezed = panorama_rays(HEIGHT, WIDTH // 2).astype(np.float32)
    faces = (Face(PANORAMA, 0, 0, WIDTH // 2, HEIGHT),)
    whole = Reprojection(faces, UPRIGHT, HEIGHT, WIDTH).sample(squeezed)
    assert angle(whole, DIRECTIONS).max() < 0.5


@pytest.mark.parametrize(
    ("angles", "ray", "seen_at"),
    [
        ((0, 10, 0), (0, 0, 1), (0, -10)),  # the camera looks up: the horizon is low in its picture
        ((20, 0, 0), (0, 0, 1), (-20, 0)),  # it looks to the right: the front is on its left
        ((0, 0, 10), (1, 0, 0), (90, 10)),  # its right side is down: what is right is high
    ],
)
def test_angles_are_those_of_the_camera(
    angles: tuple[float, float, float], ray: tuple, seen_at: tuple[float, float]
) -> None:
    x, y = panorama_position(np.array(ray) @ rotation(*angles))
    assert (360 * (x - 0.5), 180 * (0.5 - y)) == pytest.approx(seen_at)


def supersampled(faces: tuple[Face, ...], angles: tuple, picture: np.ndarray) -> np.ndarray:
    """Each pixel's mean over 16 rays."""
    fine = np.zeros((HEIGHT, WIDTH, 3))
    steps = (np.arange(4) + 0.5) / 4 - 0.5
    for right in steps:
        for down in steps:
            x = cell_centers(WIDTH) + right / WIDTH
            y = cell_centers(HEIGHT) + down / HEIGHT
            position = panorama_position(PANORAMA.rays(x, y) @ rotation(*angles))
            padded = np.pad(picture, ((1, 1), (0, 0), (0, 0)), mode="edge")
            fine += cv2.remap(
                padded.astype(np.float32),
                (position[..., 0] * faces[0].width - 0.5).astype(np.float32),
                (position[..., 1] * faces[0].height + 0.5).astype(np.float32),
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_WRAP,
            )
    return fine / 16


def test_sampling_is_closer_to_supersampling_than_one_sample_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    angles = (20.0, 10.0, 5.0)
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    soft = cv2.GaussianBlur(noise, (5, 5), 1)
    reference = supersampled(LEVEL, angles, soft)

    def error() -> float:
        return float(
            np.square(Reprojection(LEVEL, angles, HEIGHT, WIDTH).sample(soft) - reference).mean()
        )

    ours = error()
    monkeypatch.setattr("panollava.geometry.reprojection._MINIFIED", float("inf"))
    assert ours < 0.9 * error()
