"""Networks that turn images into features: open_clip towers and Inception."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.evaluation.resizing import to_pil


class Extractor(Protocol):
    """What a protocol measures with. ``sha256`` is that of the weights file."""

    name: str
    sha256: str

    def image_features(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) to float32 (N, D)."""
        ...


class ClipTower:
    """An open_clip model with its preprocessing and tokenizer.

    ``image_features`` and ``text_features`` give the projected embeddings, *not* normalised: the Frechet distance uses
    them as they are, cosines normalise.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        preprocess: Callable[[Tensor], Tensor],
        name: str,
        sha256: str,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.name, self.sha256 = name, sha256

    @classmethod
    def from_folder(cls, folder: str | Path) -> ClipTower:
        """A tower saved as ``open_clip_config.json``, one safetensors file and its byte-pair merges (``*.txt.gz``).

        The config is open_clip's own, and a key ``preprocess`` with ``mean`` and ``std`` (of channels in [0, 1]),
        ``size`` (pixels an image must have) and ``upsample`` (each pixel becomes a square of that side).

        Raises:
            FileNotFoundError: a file is missing.
        """
        import open_clip

        folder = Path(folder)
        config = json.loads(_only_file(folder, "open_clip_config.json").read_text())
        merges, weights = _only_file(folder, "*.txt.gz"), _only_file(folder, "*.safetensors")
        preprocess = PixelPreprocess(**config.pop("preprocess"))
        tokenizer = open_clip.SimpleTokenizer(str(merges), context_length=config["text_cfg"]["context_length"])
        model = _open_clip_model(config, weights)
        return cls(model, tokenizer, preprocess, folder.name, file_sha256(weights))

    @classmethod
    def from_open_clip(cls, name: str, weights: str | Path) -> ClipTower:
        """A model open_clip knows by name (``ViT-g-14``) with weights from a local file; nothing is downloaded.

        Raises:
            FileNotFoundError: no such weights file.
            ValueError: open_clip knows no model of that name.
        """
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        config = open_clip.get_model_config(name)
        if config is None:
            near = difflib.get_close_matches(name, open_clip.list_models(), 3, 0.0)
            raise ValueError(f"open_clip knows no model {name!r}; the nearest names are {', '.join(near)}")
        weights = Path(weights)
        if not weights.is_file():
            raise FileNotFoundError(
                f"no weights of {name} at {weights}; download the open_clip checkpoint and pass its path"
            )
        transform = image_transform_v2(PreprocessCfg(size=config["vision_cfg"]["image_size"]), is_train=False)
        context = config["text_cfg"].get("context_length", 77)
        return cls(
            _open_clip_model(config, weights),
            open_clip.get_tokenizer(name, context_length=context),
            lambda images: torch.stack([transform(to_pil(image)) for image in images]),
            name,
            file_sha256(weights),
        )

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) to float32 (N, D)."""
        return self.model.encode_image(self.preprocess(images)).float()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """N captions to float32 (N, D)."""
        return self.model.encode_text(self.tokenizer(list(texts))).float()


@dataclass(frozen=True)
class PixelPreprocess:
    """(pixel / 255 - mean) / std, then every pixel enlarged to ``upsample`` x ``upsample``.

    Raises:
        ValueError: images of another side than ``size``.
    """

    mean: Sequence[float]
    std: Sequence[float]
    size: int
    upsample: int = 1

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, size, size) to float32 (N, 3, size * upsample, size * upsample)."""
        if tuple(images.shape[-2:]) != (self.size, self.size):
            raise ValueError(f"images are {tuple(images.shape[-2:])}, this tower takes ({self.size}, {self.size})")
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        scaled = (images.float() / 255 - mean) / std
        return torch.nn.functional.interpolate(scaled, scale_factor=self.upsample, mode="nearest")


class InceptionFeatures:
    """torch-fidelity's Inception (pool3, 2048) with weights from a file.

    The file is read once with torch's restricted loader before torch-fidelity, which uses the unrestricted one, sees
    it.

    Raises:
        FileNotFoundError: no such file; the message names the public download.
    """

    name = "inception-v3-2015-12-05"

    def __init__(self, weights: str | Path) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        weights = Path(weights)
        if not weights.is_file():
            raise FileNotFoundError(
                f"no Inception weights at {weights}; download {URL_INCEPTION_V3} and pass its path"
            )
        torch.load(weights, map_location="cpu", weights_only=True)
        self.model = FeatureExtractorInceptionV3(self.name, ["2048"], feature_extractor_weights_path=str(weights))
        self.sha256 = file_sha256(weights)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) to float32 (N, 2048)."""
        return self.model(images)[0].float()


def in_batches(function: Callable[[Any], Tensor], items: Any, batch_size: int = 250) -> Tensor:
    """``function`` over slices of ``items``, concatenated."""
    return torch.cat([function(items[start : start + batch_size]) for start in range(0, len(items), batch_size)])


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _open_clip_model(config: dict, weights: Path) -> torch.nn.Module:
    """open_clip's model of a config, with weights from a file, read without pickled code."""
    from open_clip.factory import load_checkpoint
    from open_clip.model import CLIP, CustomTextCLIP

    config = dict(config)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    model = (CustomTextCLIP if custom else CLIP)(**config)
    load_checkpoint(model, str(weights), strict=True, weights_only=True)
    return model


def _only_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise FileNotFoundError(
            f"expected one {pattern} in {folder}, found {names}; give the folder of an open_clip tower"
        )
    return found[0]
