"""Samples the views of stored panoramas when they are read."""

from pathlib import Path
from typing import Any

import numpy as np

from panollava import config
from panollava.data.images import read_panorama
from panollava.data.shards import Shards
from panollava.geometry.views import Sampler, layout


class SampledViews(Shards):
    """A shard set of panoramas, read like one of views."""

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: Path, settings: config.Views) -> None:
        super().__init__(folder)
        self.settings, self.sampler = settings, Sampler(layout(settings), settings.size)
        self.shape = (len(self), *self.sampler.position.shape[:3], 3)

    def __getitem__(self, panorama: int) -> Any:
        jpeg = super().__getitem__(panorama)
        return self.sampler.sample(read_panorama(jpeg, self.sampler.panorama_width))

    def __reduce__(self) -> Any:
        return SampledViews, (self.folder, self.settings)
