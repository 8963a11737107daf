"""Images and their classes; in training each image is changed a little, anew in every epoch."""

from __future__ import annotations

from typing import Any

import numpy as np

from pikv_core.data.warp import warp
from pikv_core.training.lessons import LESSONS
from pikv_core.training.lessons.whole_samples import WholeSamples

TURN_DEGREES, STRETCH, SHIFT_PIXELS, NOISE = 12.0, 0.12, 0.8, 0.05  # noise: standard deviation, of pixels in [0, 1]


@LESSONS.register("images")
class Images(WholeSamples):
    """Tell digits by their patches."""

    head = "image-classification"

    @property
    def tokens_each(self) -> int:
        return self.source.splits["train"]["patches"].shape[1]

    def sizes(self) -> dict[str, Any]:
        side = self.source.images("test").shape[1]
        return {"image_size": side, "patch_size": self.source.task.patch, "num_channels": 1}

    def training_inputs(self, rng: np.random.Generator, rows: np.ndarray) -> dict[str, np.ndarray]:
        images = self.source.images("train")[rows]
        if self.source.task.augment:
            images = warp(rng, images, TURN_DEGREES, STRETCH, SHIFT_PIXELS)
            images = images + NOISE * rng.standard_normal(images.shape, dtype=np.float32)
        return {"pixel_values": images[:, None]}

    def test_inputs(self) -> dict[str, np.ndarray]:
        return {"pixel_values": self.source.images("test")[:, None]}
