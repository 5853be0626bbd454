"""Frozen networks that judge images inside a loss: perceptual distances and agreement of image and text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.models.image_scorers import LPIPS, LpipsScorer, SamScorer
from fastdiff.models.towers import SHIPPED, Tower, file_sha256, load_tower

LOSS_TOWER = "loss_tower"
_EPS = 1e-6


class Scorer(Protocol):
    """What a loss may ask about images `(B, 3, H, W)` in [-1, 1]; gradients reach the images, never the weights."""

    name: str

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Perceptual distance of each pair, `(B,)`; 0 for equal images."""
        ...

    def features(self, images: Tensor) -> list[Tensor]:
        """Activations `(B, C, h, w)`, finest first, e.g. for a discriminator's heads."""
        ...

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels C of each activation."""
        ...

    def image_embedding(self, images: Tensor) -> Tensor:
        """`(B, D)` of length 1; inner products with text embeddings are cosines."""
        ...

    def text_embedding(self, prompts: Sequence[str]) -> Tensor:
        """`(B, D)` of length 1, without gradient."""
        ...


class TowerScorer:
    """A scorer made of one open_clip tower.

    The distance compares activations whose channels are scaled to unit length at every place: the sum over layers of
    the mean over places of the squared difference (Zhang et al. 2018, arXiv 1801.03924, without its learned channel
    weights). Images of another size are resized, with antialiasing.

    Raises:
        ValueError: if the tower is the one that this package measures with.
    """

    def __init__(self, tower: Tower) -> None:
        if tower.sha256 == _measuring_sha256():
            raise ValueError(
                f"scorer {tower.name!r} holds the weights that students are measured with; what is trained on is "
                f"never measured with: give {LOSS_TOWER!r} or the folder of another tower"
            )
        self.tower, self.name = tower, tower.name

    @classmethod
    def from_folder(cls, folder: str | Path) -> TowerScorer:
        """The tower of a folder; see `load_tower` for what it must hold.

        Raises:
            FileNotFoundError: a file is missing.
        """
        return cls(load_tower(folder))

    def to(self, device: torch.device | str) -> TowerScorer:
        """Moves the weights."""
        self.tower.model.to(device)
        return self

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum over layers of the mean squared difference of unit activations, `(B,)`."""
        pairs = zip(self.features(a), self.features(b), strict=True)
        return torch.stack([(_unit(one) - _unit(other)).square().sum(1).mean((1, 2)) for one, other in pairs]).sum(0)

    def features(self, images: Tensor) -> list[Tensor]:
        """The outputs of the image network's blocks, finest first."""
        visual = self.tower.model.visual
        return visual.forward_intermediates(self._pixels(images), intermediates_only=True)["image_intermediates"]

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Found by looking at one black image."""
        size = self.tower.preprocess.size
        with torch.no_grad():
            return tuple(one.shape[1] for one in self.features(self._weight.new_zeros(1, 3, size, size)))

    def image_embedding(self, images: Tensor) -> Tensor:
        """The projected image feature, scaled to length 1."""
        return F.normalize(self.tower.model.encode_image(self._pixels(images)).float(), dim=-1)

    @torch.no_grad()
    def text_embedding(self, prompts: Sequence[str]) -> Tensor:
        """The projected text feature, scaled to length 1."""
        tokens, device = self.tower.tokenizer(list(prompts)), self._weight.device
        if device.type == "cuda":
            tokens = tokens.pin_memory()  # a copy from other memory waits for the device
        return F.normalize(self.tower.model.encode_text(tokens.to(device, non_blocking=True)).float(), dim=-1)

    @property
    def _weight(self) -> Tensor:
        return next(self.tower.model.parameters())

    def _pixels(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"scorer {self.name!r} judges images (B, 3, H, W), got {tuple(images.shape)}: decode latents first; "
                "closed-form teachers without a codec have no images"
            )
        size = self.tower.preprocess.size
        images = (images.to(self._weight) + 1) / 2
        if tuple(images.shape[-2:]) != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return self.tower.preprocess.of_unit(images)


def open_scorer(name: str, device: torch.device | str = "cpu") -> Scorer:
    """The shipped `loss_tower`, torchmetrics' `lpips`, or the network of a folder: an open_clip tower or a SAM encoder.

    Raises:
        FileNotFoundError: if the folder lacks a file.
        ValueError: if it is the tower that students are measured with.
    """
    if name == LPIPS:
        return LpipsScorer().to(device)
    folder = SHIPPED / "loss" if name == LOSS_TOWER else Path(name)
    if (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file():
        return SamScorer.from_folder(folder).to(device)
    return TowerScorer.from_folder(folder).to(device)


def _unit(features: Tensor) -> Tensor:
    """Channels scaled to length 1 at every place; smooth where a place is silent."""
    return features / (features.square().sum(1, keepdim=True) + _EPS).sqrt()


def _measuring_sha256() -> str:
    return file_sha256(SHIPPED / "measuring" / "model.safetensors")
