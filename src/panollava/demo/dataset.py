"""The demo's dataset: panoramas as JPEG files, and rows in QuIC-360's format."""

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
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
        write = partial(_write_panorama, split, settings, folder)
        with ThreadPoolExecutor(2) as pool:
            written = pool.map(write, range(len(rolls)), rolls)
            bar = tqdm(written, desc=f"scenes, {split}", total=len(rolls))
            table = pd.DataFrame(chain.from_iterable(bar), columns=["url", "query", "annotation"])
        write_text(folder / f"{split}.csv", table.to_csv(index=False, lineterminator="\n"))
        log.info("%s: %d panoramas", split, len(rolls))


def _draw_rolls(split: str, settings: DemoSettings) -> list[float]:
    """Degrees by which each panorama is rolled: any angle for a share of train's, otherwise 0.
    The objects of rolled panoramas may be between two directions, as in the evaluation."""
    count = getattr(settings.scenes, split)
    random = np.random.default_rng((settings.stream(split), count))
    rolled = random.random(count) < (settings.scenes.turned if split == "train" else 0)
    return np.where(rolled, random.uniform(0, 360, count), 0).tolist()


def _write_panorama(
    split: str, settings: DemoSettings, folder: Path, index: int, degrees: float
) -> list[tuple[str, str, str]]:
    """Write the panorama's image. Returns its rows: (url, query, annotation)."""
    seed = settings.stream(split)
    scene = make_scene(seed, index)
    url = f"images/{split}_{index:04d}.jpg"
    with atomic_write(folder / url) as temporary:
        panorama = roll(render(scene, settings.height), degrees)
        Image.fromarray(panorama).save(temporary, "JPEG", quality=92)
    references = 1 if split == "train" else settings.scenes.references
    rolled = roll_scene(scene, degrees) if degrees else scene
    return [(url, *row) for row in rows(rolled, references, seed * 1_000_003 + index)]
