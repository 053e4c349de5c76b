"""The project that the GPU benchmarks train in: random towers of the real profile's size (or tiny
ones), random views and features, and rows like QuIC-360's."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import real_size
from helpers import save_shards, save_towers
from measure import ROOT
from panollava import config, paths
from panollava.config import Settings
from panollava.files import write_csv

PROFILE = ROOT / "presets/quic360.yaml"
ROWS = 3  # per panorama, as QuIC-360 has on average
WORDS = ["red", "blue", "green"]  # one token each
ANSWERS = (8, 52)  # tokens: 30 on average
LOCAL = {"model.encoder.path": "encoder", "model.language_model.path": "language_model"}


def make_project(tiny: bool, panoramas: int) -> None:
    """Write it into the current folder."""
    if tiny:
        save_towers(Path())
    else:
        model: Any = real_size.build()
        model.encoder.tower.save_pretrained("encoder")
        model.language_model.save_pretrained("language_model")
        demo = ROOT / "data/demo/towers"
        shutil.copy(demo / "encoder/preprocessor_config.json", "encoder")
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(demo / "language_model" / file, "language_model")
    size, grid, width = (32, 2, 32) if tiny else (real_size.SIZE, 7, 768)
    random, views = np.random.default_rng(0), len(real_size.LAYOUT.projections)
    for split, count in (("train", panoramas), ("valid", 1)):
        pixels = random.integers(0, 256, (count, views, size, size, 3), dtype=np.uint8)
        save_shards(paths.PREPARED / split / paths.PANORAMAS, pixels)
        features = random.normal(size=(count, views, grid, grid, width)).astype(np.float16)
        save_shards(paths.FEATURES / split, features)
        rows = [
            (panorama, ROWS * panorama + row, f"{panorama}.jpg", "red", _text(random))
            for panorama in range(count)
            for row in range(ROWS)
        ]
        table = pd.DataFrame(rows, columns=["panorama", "row", "url", "query", "annotation"])
        write_csv(paths.PREPARED / split / "rows.csv", table)


def load(tiny: bool, **changes: Any) -> Settings:
    """The real profile with this project's towers; keys with two underscores for a dot."""
    given = {name.replace("__", "."): value for name, value in changes.items()}
    small: dict[str, Any] = {}
    if tiny:
        small = {"views.size": 32, "trainer.accelerator": "cpu", "trainer.threads": 1}
        small |= {"trainer.precision": "32-true", "machine.loader_workers": 0}
        small |= {f"stage.{name}.max_text_length": 200 for name in ("resampler", "finetune")}
    every = {"model.tokens": "views", **LOCAL, **small, **given}
    return config.load_settings(PROFILE, changes=every)


def _text(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, random.integers(*ANSWERS)))
