"""The demo's data set: panoramas as JPEG files, and rows in QuIC-360's format."""

import csv
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from panollava.data.images import roll
from panollava.demo.questions import rows
from panollava.demo.scenes import make_scene, render, turn
from panollava.demo.settings import DemoSettings

log = logging.getLogger(__name__)

Turns = list[float]


def make_scenes(settings: DemoSettings, folder: Path) -> None:
    """Write train.csv, valid.csv, test.csv and images/ into `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        count = getattr(settings.scenes, split)
        references = 1 if split == "train" else settings.scenes.references
        seed = settings.stream(split)

        turns = _turns(split, settings)

        def write(index: int, split: str = split, seed: int = seed, turns: Turns = turns) -> None:
            panorama = roll(render(make_scene(seed, index), settings.height), turns[index])
            Image.fromarray(panorama).save(folder / _name(split, index), quality=92)

        with ThreadPoolExecutor(2) as pool:
            list(tqdm(pool.map(write, range(count)), desc=f"scenes, {split}", total=count))
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("url", "query", "annotation"))
            writer.writerows(_rows(split, seed, turns, references))
        log.info("%s: %d panoramas", split, count)


def _turns(split: str, settings: DemoSettings) -> Turns:
    """Degrees by which each panorama is turned: a share of train's, by any angle. Their objects
    may lie between two directions, as they may when a panorama is turned in the evaluation."""
    count = getattr(settings.scenes, split)
    random = np.random.default_rng((settings.stream(split), count))
    turned = random.random(count) < (settings.scenes.turned if split == "train" else 0)
    return [float(d) for d in np.where(turned, random.uniform(0, 360, count), 0)]


def _rows(split: str, seed: int, turns: Turns, references: int) -> Iterator[tuple[str, str, str]]:
    for index, degrees in enumerate(turns):
        scene = make_scene(seed, index)
        scene = turn(scene, degrees) if degrees else scene
        yield from rows(scene, str(_name(split, index)), references, seed * 1_000_003 + index)


def _name(split: str, index: int) -> Path:
    return Path("images") / f"{split}_{index:04d}.jpg"
