"""The demo's own settings, `data/demo/params.yaml`, and what its two towers have in common."""

from dataclasses import dataclass
from pathlib import Path

from panollava.config import Count, NotNegative, Positive, Section, Seed, Share, Views, read

# Streams of scenes that share nothing: scene i of a stream is made from (seed, stream, i).
# The test scenes of stream 2 were looked at while the demo was made: those of 6 were not.
STREAMS = {"train": 0, "valid": 1, "test": 6, "encoder": 3, "language_model": 4, "probe": 5}

VIEWS = Views(
    strategy="e2p", size=64, fov=90.0, overlap=0.5, pitch=0.0, global_view=False
)  # what the encoder learns to see


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
    places: Count  # of the context that one object has at most
    turned: Share  # of the scenes, that are turned by any angle


@dataclass(frozen=True)
class LanguageSettings(Section):
    lessons: list[Lesson]
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
    language_model: LanguageSettings

    def stream(self, name: str) -> int:
        """The seed of a stream of scenes."""
        return self.seed * (1 + max(STREAMS.values())) + STREAMS[name]


def load_demo_settings(path: Path) -> DemoSettings:
    """Raises UserError for anything but a valid file."""
    return read(DemoSettings, path)
