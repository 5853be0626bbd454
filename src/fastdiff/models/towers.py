"""Reading image and text towers: an open_clip model, its tokenizer and what it does to pixels, from one folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.diffusion.tensors import DeviceTable

SHIPPED = Path(__file__).resolve().parents[1] / "assets" / "towers"


class PixelPreprocess:
    """(pixel / 255 - mean) / std, then every pixel enlarged to ``upsample`` x ``upsample``.

    Raises:
        ValueError: images of another side than ``size``.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: int, upsample: int = 1) -> None:
        self.size, self.upsample = size, upsample
        self._mean, self._std = (DeviceTable(torch.tensor(values).view(1, 3, 1, 1)) for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, size, size) to float32 (N, 3, size * upsample, size * upsample)."""
        return self.of_unit(images.float() / 255)

    def of_unit(self, images: Tensor) -> Tensor:
        """The same of floating point images in [0, 1]; differentiable."""
        if tuple(images.shape[-2:]) != (self.size, self.size):
            raise ValueError(f"images are {tuple(images.shape[-2:])}, this tower takes ({self.size}, {self.size})")
        scaled = (images - self._mean.like(images)) / self._std.like(images)
        return torch.nn.functional.interpolate(scaled, scale_factor=self.upsample, mode="nearest")


@dataclass(frozen=True)
class Tower:
    """A frozen open_clip model; ``sha256`` is that of its weights file."""

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    preprocess: PixelPreprocess
    name: str
    sha256: str


def load_tower(folder: str | Path) -> Tower:
    """A tower saved as ``open_clip_config.json``, one safetensors file and its byte-pair merges (``*.txt.gz``).

    The config is open_clip's own, and a key ``preprocess`` with ``mean`` and ``std`` (of channels in [0, 1]),
    ``size`` (pixels an image must have) and ``upsample`` (each pixel becomes a square of that side).

    Raises:
        FileNotFoundError: a file is missing.
    """
    import open_clip

    folder = Path(folder)
    config = json.loads(only_file(folder, "open_clip_config.json").read_text())
    merges, weights = only_file(folder, "*.txt.gz"), only_file(folder, "*.safetensors")
    preprocess = PixelPreprocess(**config.pop("preprocess"))
    tokenizer = open_clip.SimpleTokenizer(str(merges), context_length=config["text_cfg"]["context_length"])
    model = open_clip_model(config, weights).eval().requires_grad_(False)
    return Tower(model, tokenizer, preprocess, folder.name, file_sha256(weights))


def open_clip_model(config: dict, weights: Path) -> nn.Module:
    """open_clip's model of a config, with weights from a file, read without pickled code."""
    from open_clip.factory import load_checkpoint
    from open_clip.model import CLIP, CustomTextCLIP

    config = dict(config)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    model = (CustomTextCLIP if custom else CLIP)(**config)
    load_checkpoint(model, str(weights), strict=True, weights_only=True)
    return model


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def only_file(folder: Path, pattern: str) -> Path:
    """The one file of that pattern in a folder.

    Raises:
        FileNotFoundError: there is none, or more than one.
    """
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise FileNotFoundError(
            f"expected one {pattern} in {folder}, found {names}; give the folder of an open_clip tower"
        )
    return found[0]
