"""The demo's data set: panoramas as JPEG files, and rows in QuIC-360's format."""

import csv
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from panollava.demo.questions import rows
from panollava.demo.scenes import make_scene, render
from panollava.demo.settings import DemoSettings

log = logging.getLogger(__name__)


def make_scenes(settings: DemoSettings, folder: Path) -> None:
    """Write train.csv, valid.csv, test.csv and images/ into `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        count = getattr(settings.scenes, split)
        references = 1 if split == "train" else settings.scenes.references
        seed = settings.stream(split)

        def write(index: int, split: str = split, seed: int = seed) -> None:
            picture = Image.fromarray(render(make_scene(seed, index), settings.height))
            picture.save(folder / _name(split, index), quality=92)

        with ThreadPoolExecutor(2) as pool:
            list(tqdm(pool.map(write, range(count)), desc=f"scenes, {split}", total=count))
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("url", "query", "annotation"))
            writer.writerows(_rows(split, seed, count, references))
        log.info("%s: %d panoramas", split, count)


def _rows(split: str, seed: int, count: int, references: int) -> Iterator[tuple[str, str, str]]:
    for index in range(count):
        scene = make_scene(seed, index)
        yield from rows(scene, str(_name(split, index)), references, seed * 1_000_003 + index)


def _name(split: str, index: int) -> Path:
    return Path("images") / f"{split}_{index:04d}.jpg"
