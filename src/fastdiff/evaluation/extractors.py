"""Networks that turn images into features: open_clip towers and Inception."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.evaluation.resizing import to_pil
from fastdiff.models.towers import file_sha256, load_tower, open_clip_model


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
        """A tower saved as ``open_clip_config.json``, one safetensors file and its byte-pair merges (``*.txt.gz``);
        see `load_tower`.

        Raises:
            FileNotFoundError: a file is missing.
        """
        tower = load_tower(folder)
        return cls(tower.model, tower.tokenizer, tower.preprocess, tower.name, tower.sha256)

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
            open_clip_model(config, weights),
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
