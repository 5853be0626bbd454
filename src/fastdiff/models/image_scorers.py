"""Scorers of images alone: LPIPS, and the image encoder of Segment Anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.diffusion.tensors import DeviceTable

LPIPS = "lpips"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageScorer:
    """A frozen network of images `(B, 3, H, W)` in [-1, 1] that knows no text."""

    name: str
    network: nn.Module

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> ImageScorer:
        """Moves the weights."""
        self.network.to(device)
        return self

    def image_embedding(self, images: Tensor) -> Tensor:
        """Refused: an image-text term needs a tower.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"scorer {self.name!r} knows no text: give `loss_tower` or the folder of an open_clip tower")

    def text_embedding(self, prompts: Sequence[str]) -> Tensor:
        """As `image_embedding`."""
        return self.image_embedding(torch.empty(0))


class LpipsScorer(ImageScorer):
    """torchmetrics' LPIPS on a VGG (Zhang et al. 2018, arXiv 1801.03924), the regression loss of DMD (arXiv 2311.18828).

    Its VGG is torchvision's, which is downloaded once.

    Args:
        network: another of torchmetrics' `_LPIPS`.
    """

    name = LPIPS

    def __init__(self, network: nn.Module | None = None) -> None:
        from torchmetrics.functional.image.lpips import _LPIPS

        super().__init__(network or _LPIPS(net="vgg"))

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS of each pair, `(B,)`."""
        return self.network(self._typed(a), self._typed(b)).flatten()

    def features(self, images: Tensor) -> list[Tensor]:
        """The activations that LPIPS compares, finest first."""
        return list(self.network.net(self.network.scaling_layer(self._typed(images))))

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each activation."""
        return tuple(self.network.chns)

    def _typed(self, images: Tensor) -> Tensor:
        return images.to(next(self.network.parameters()))


class SamScorer(ImageScorer):
    """The image encoder of Segment Anything (arXiv 2304.02643), the features of Flash-DMD's adversary (arXiv 2511.20549).

    Images are resized to the size its positions are made for (1024 as published).

    Args:
        network: transformers' `SamVisionModel`.
    """

    name = "sam"

    @classmethod
    def from_folder(cls, folder: str | Path) -> SamScorer:
        """The encoder of a folder that transformers wrote, of the encoder alone or of a whole `SamModel`."""
        from transformers import SamVisionModel

        return cls(SamVisionModel.from_pretrained(folder, local_files_only=True, use_safetensors=True))

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Refused: no published loss compares these features.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"scorer {self.name!r} is no perceptual distance: give `loss_tower`, `{LPIPS}` or a tower")

    def features(self, images: Tensor) -> list[Tensor]:
        """The outputs of the blocks with global attention and of the neck, `(B, C, h, w)`."""
        blocks = self.network.config.global_attn_indexes
        out = self.network(pixel_values=self._pixels(images), output_hidden_states=True)
        return [out.hidden_states[block + 1].permute(0, 3, 1, 2) for block in blocks] + [out.last_hidden_state]

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """The encoder's width for each block, and the neck's."""
        config = self.network.config
        return (config.hidden_size,) * len(config.global_attn_indexes) + (config.output_channels,)

    def _pixels(self, images: Tensor) -> Tensor:
        size = self.network.config.image_size
        images = images.to(next(self.network.parameters()))
        if tuple(images.shape[-2:]) != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        mean, std = (table.like(images) for table in _IMAGENET)
        return ((images + 1) / 2 - mean) / std


_IMAGENET = tuple(DeviceTable(torch.tensor(values).view(1, 3, 1, 1)) for values in (_MEAN, _STD))
