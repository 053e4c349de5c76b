"""The demo's settings, `data/demo/params.yaml`, and what its data and its towers share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from panollava.config import Count, NotNegative, Positive, Section, Seed, Share, Views, read

# Disjoint streams of scenes: scene i of a stream is made from (seed, stream, i).
# Stream 2 is retired: its scenes were inspected while the demo was developed.
STREAMS = {"train": 0, "valid": 1, "test": 6, "encoder": 3, "language_model": 4, "probe": 5}

# The views that the encoder is pretrained on.
VIEWS = Views(strategy="e2p", size=64, fov=90.0, overlap=0.5, pitch=0.0, global_view=False)

CONTEXT = 128  # context tokens of a panorama: eight views of 4 x 4
MAX_SILENT = CONTEXT // 4  # largest number of them that state nothing
MAX_PER_OBJECT = (CONTEXT - MAX_SILENT) // 4  # of four objects, so that all fit
Places = Annotated[int, Field(strict=True, ge=1, le=MAX_PER_OBJECT)]


@dataclass(frozen=True)
class SceneSettings(Section):
    train: Count
    valid: Count
    test: Count
    references: Count
    turned: Share


@dataclass(frozen=True)
class EncoderSettings(Section):
    scenes: Count
    steps: Count
    batch_size: Count
    lr: Positive
    threads: Count


@dataclass(frozen=True)
class Lesson(Section):
    steps: Count
    places: Places  # largest number of context tokens that describe one object
    turned: Share  # share of the scenes that are rolled by any angle


@dataclass(frozen=True)
class LanguageModelSettings(Section):
    lessons: Annotated[list[Lesson], Field(min_length=1)]
    batch_size: Count
    lr: Positive
    threads: Count
    noise: NotNegative


@dataclass(frozen=True)
class DemoSettings(Section):
    seed: Seed
    height: Count
    scenes: SceneSettings
    encoder: EncoderSettings
    language_model: LanguageModelSettings

    def stream(self, name: str) -> int:
        """The seed of a stream of scenes."""
        return self.seed * (1 + max(STREAMS.values())) + STREAMS[name]


def load_demo_settings(path: Path) -> DemoSettings:
    """Raises UserError for an invalid file."""
    return read(DemoSettings, path)
