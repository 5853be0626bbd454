"""Named ways to bring images to the size a feature extractor sees; the resize changes a distance as much as a model
does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Resize:
    """Centre crop to a square, then Lanczos to ``lanczos`` px, then "clean" bicubic to ``bicubic`` px; None skips a
    step.

    The bicubic step filters each channel in floating point with Pillow (arXiv:2104.11222 calls this "clean") and
    rounds to 8 bit, since extractors take uint8.
    """

    lanczos: int | None = None
    bicubic: int | None = None

    @property
    def name(self) -> str:
        """How manifests and tables spell it."""
        parts = [f"lanczos-{self.lanczos}" if self.lanczos else "", f"clean-{self.bicubic}" if self.bicubic else ""]
        return "+".join(part for part in parts if part) or "none"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) to uint8 (N, 3, S, S); images that need nothing come back as they are."""
        if self.name == "none":
            return images
        return torch.stack([self.one(to_pil(image)) for image in images])

    def one(self, image: Image.Image) -> Tensor:
        """One PIL image to uint8 (3, S, S)."""
        from PIL import Image

        image = image.convert("RGB")
        if self.lanczos:
            image = _centre_square(image).resize((self.lanczos, self.lanczos), Image.Resampling.LANCZOS)
        if self.bicubic is None:
            return to_tensor(image)
        channels = [
            _clean_bicubic(channel, self.bicubic) for channel in np.asarray(image, np.float32).transpose(2, 0, 1)
        ]
        return torch.from_numpy(np.stack(channels).clip(0, 255).round().astype(np.uint8))


NO_RESIZE = Resize()


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) to a PIL image."""
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB PIL image to uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _centre_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _clean_bicubic(channel: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(channel, mode="F").resize((size, size), Image.Resampling.BICUBIC))
