"""The demo's dataset: panoramas as JPEG files, and rows in QuIC-360's format."""

import csv
import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from panollava.data.images import roll
from panollava.demo.questions import rows
from panollava.demo.render import render
from panollava.demo.scenes import make_scene, roll_scene
from panollava.demo.settings import DemoSettings
from panollava.files import atomic_write, write_text

log = logging.getLogger(__name__)


def make_scenes(settings: DemoSettings, folder: Path = Path()) -> None:
    """Write train.csv, valid.csv, test.csv and images/ into `folder`."""
    for split in ("train", "valid", "test"):
        rolls = _draw_rolls(split, settings)
        _write_images(split, settings, rolls, folder)
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("url", "query", "annotation"))
        writer.writerows(_rows(split, settings, rolls))
        write_text(folder / f"{split}.csv", table.getvalue())
        log.info("%s: %d panoramas", split, len(rolls))


def _draw_rolls(split: str, settings: DemoSettings) -> list[float]:
    """Degrees by which each panorama is rolled: any angle for a share of train's, otherwise 0.
    The objects of rolled panoramas may be between two directions, as in the evaluation."""
    count = getattr(settings.scenes, split)
    random = np.random.default_rng((settings.stream(split), count))
    rolled = random.random(count) < (settings.scenes.turned if split == "train" else 0)
    return [float(d) for d in np.where(rolled, random.uniform(0, 360, count), 0)]


def _write_images(split: str, settings: DemoSettings, rolls: list[float], folder: Path) -> None:
    def write(index: int) -> None:
        scene = make_scene(settings.stream(split), index)
        panorama = roll(render(scene, settings.height), rolls[index])
        with atomic_write(folder / _name(split, index)) as temporary:
            Image.fromarray(panorama).save(temporary, "JPEG", quality=92)

    count = len(rolls)
    with ThreadPoolExecutor(2) as pool:
        list(tqdm(pool.map(write, range(count)), desc=f"scenes, {split}", total=count))


def _rows(split: str, settings: DemoSettings, rolls: list[float]) -> Iterator[tuple[str, str, str]]:
    seed = settings.stream(split)
    references = 1 if split == "train" else settings.scenes.references
    for index, degrees in enumerate(rolls):
        scene = make_scene(seed, index)
        scene = roll_scene(scene, degrees) if degrees else scene
        yield from rows(scene, str(_name(split, index)), references, seed * 1_000_003 + index)


def _name(split: str, index: int) -> Path:
    return Path("images") / f"{split}_{index:04d}.jpg"
