"""Samples the views of stored panoramas when they are read."""

from pathlib import Path
from typing import Any

import cv2

from panollava import config
from panollava.data.images import PictureError, read_panorama
from panollava.data.shards import Shards
from panollava.geometry.views import Sampler, layout


class SampledViews(Shards):
    """A shard set of panoramas, read like one of views."""

    def __init__(self, folder: Path, settings: config.Views) -> None:
        super().__init__(folder)
        self.settings, self.sampler = settings, Sampler(layout(settings), settings.size)
        self.shape = (len(self), *self.sampler.position.shape[:3], 3)
        # Loader workers are forked, and OpenCV's threads do not survive that.
        cv2.setNumThreads(1)

    def __getitem__(self, panorama: int) -> Any:
        jpeg = super().__getitem__(panorama)
        try:
            pixels = read_panorama(jpeg, self.sampler.panorama_width)
        except PictureError as error:
            number, place = self.locate(panorama)
            raise self.mismatch(
                self.files[number], f"picture {place} cannot be decoded ({error.reason}), but is in"
            ) from None
        return self.sampler.sample(pixels)

    def __reduce__(self) -> Any:
        return SampledViews, (self.folder, self.settings)
