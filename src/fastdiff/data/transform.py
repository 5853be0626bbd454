"""From a PIL image to the tensor a network sees."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@dataclass(frozen=True)
class ImageTransform:
    """Shorter side to `resolution`, then a square crop, then perhaps a mirror image.

    Args:
        resolution: side of the result in pixels.
        center_crop: crop the middle; otherwise a place drawn from `rng`.
        random_flip: mirror left to right with probability 1/2.
        interpolation: PIL resampling filter (PIL's filters do antialias when shrinking).

    Raises ValueError for a resolution below 1 or an unknown filter.
    """

    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"resolution must be at least 1 pixel, got {self.resolution}")
        if self.interpolation not in _RESAMPLING:
            raise ValueError(f"unknown interpolation {self.interpolation!r}: expected one of {', '.join(_RESAMPLING)}")

    @property
    def is_random(self) -> bool:
        """Whether a call needs `rng`."""
        return self.random_flip or not self.center_crop

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> torch.Tensor:
        """RGB image of any size -> float32 of shape (3, resolution, resolution) in [-1, 1]."""
        if self.is_random and rng is None:
            raise ValueError(
                "random crops and flips need a random generator: pass rng, or use center_crop and no flip"
            )
        place = (0.5, 0.5) if self.center_crop else tuple(rng.random(2))
        image = self._crop(self._resize(image), *place)
        if self.random_flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
        return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0).contiguous()

    def _resize(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        size = tuple(max(self.resolution, side * self.resolution // short) for side in image.size)
        return image if size == image.size else image.resize(size, _RESAMPLING[self.interpolation])

    def _crop(self, image: Image.Image, across: float, down: float) -> Image.Image:
        """`across` and `down` in [0, 1) spread evenly over all places; 0.5 is the middle."""
        left = int(across * (image.width - self.resolution + 1))
        top = int(down * (image.height - self.resolution + 1))
        return image.crop((left, top, left + self.resolution, top + self.resolution))


def visit_rng(seed: int, epoch: int, item: int) -> np.random.Generator:
    """Draws for one visit of one item: a function of its arguments only, whichever worker or process asks.

    Philox is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    return np.random.Generator(np.random.Philox(key=seed % 2**128, counter=[0, 0, epoch, item]))
