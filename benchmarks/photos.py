"""Synthetic photos: the dead leaves model (occluding discs of all sizes), which has the spectrum
and the edges of natural images, plus grain. Their JPEG files have about as many bits per pixel as
real ones."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZES = ((6006, 3003), (4096, 2048), (2048, 1024))  # width, height


def save_photos(folder: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Path]:
    paths = [folder / f"{width}x{height}.jpg" for width, height in sizes]
    for seed, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        Image.fromarray(make_photo(*size, seed)).save(path, quality=88)
    return paths


def make_photo(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """(height, width, 3), continuous across the seam."""
    random = np.random.default_rng(seed)
    panorama = np.zeros((height, width, 3), np.uint8)
    count = 20_000
    # Scale invariance: the density of radii falls with their cube.
    smallest, largest = height / 400, height / 3
    share = random.random(count)
    radii = (smallest**-2 - share * (smallest**-2 - largest**-2)) ** -0.5
    columns, rows = random.random(count) * width, random.random(count) * height
    colors = random.normal(128, 50, count)[:, None] + random.normal(0, 18, (count, 3))
    for radius, x, y, color in zip(radii, columns, rows, colors.clip(0, 255), strict=True):
        for shift in (-width, 0, width):
            if -radius < x + shift < width + radius:
                center = (round(x + shift), round(y))
                cv2.circle(panorama, center, round(radius), color.tolist(), -1, cv2.LINE_AA)
    grain = random.normal(0, 5, (height, width, 1)).astype(np.float32)
    photo: NDArray = (cv2.GaussianBlur(panorama, (3, 3), 0) + grain).clip(0, 255)
    return photo.astype(np.uint8)
