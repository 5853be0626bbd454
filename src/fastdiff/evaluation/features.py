"""Per-image features on disk: fp16 npz read without pickle, with a manifest that says what they were computed from."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.evaluation.extractors import Extractor, in_batches
from fastdiff.evaluation.metrics import gradient_energy
from fastdiff.evaluation.resizing import NO_RESIZE, Resize, to_tensor
from fastdiff.models.towers import file_sha256


class FeatureFileError(ValueError):
    """A feature file that is damaged, holds something else, or was made under other settings."""


@dataclass(frozen=True)
class ImageFeatures:
    """Features of N images.

    features: float32 (N, D), already rounded to half precision, so that fresh and stored features compare equal;
    sharpness: float32 (N,), gradient energy of each image; manifest: JSON facts, at least ``n``, ``extractor``,
    ``extractor_sha256`` and ``resize``.
    """

    features: Tensor
    sharpness: Tensor
    manifest: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def of(cls, images: Tensor, extractor: Extractor, resize: Resize = NO_RESIZE, **facts: object) -> ImageFeatures:
        """Features of uint8 images (N, 3, H, W); ``facts`` are added to the manifest."""
        features = in_batches(lambda part: extractor.image_features(resize(part)), images)
        return cls._rounded(features, in_batches(gradient_energy, images), extractor, resize, facts)

    @classmethod
    def of_folder(cls, folder: str | Path, extractor: Extractor, resize: Resize = NO_RESIZE) -> ImageFeatures:
        """Features of all PNG, JPEG and WebP files under ``folder``, in the order of their names.

        Raises:
            FileNotFoundError: no image there.
        """
        files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
        if not files:
            raise FileNotFoundError(f"no PNG, JPEG or WebP image under {folder}; pass the folder of reference images")
        parts = [_features_of_files(chunk, extractor, resize) for chunk in _chunks(files, 100)]
        features, sharpness = (torch.cat(column) for column in zip(*parts))
        return cls._rounded(features, sharpness, extractor, resize, {"source": Path(folder).name})

    @classmethod
    def _rounded(
        cls, features: Tensor, sharpness: Tensor, extractor: Extractor, resize: Resize, facts: dict
    ) -> ImageFeatures:
        if not torch.isfinite(features.half()).all():
            raise FeatureFileError(
                f"{extractor.name} gave features beyond half precision; check its weights and input"
            )
        manifest = {
            "n": len(features),
            "extractor": extractor.name,
            "extractor_sha256": extractor.sha256,
            "resize": resize.name,
            **facts,
        }
        return cls(features.half().float(), sharpness.half().float(), manifest)

    def save(self, path: str | Path) -> Path:
        """Writes ``path`` (npz) and ``path`` with ``.json`` (the manifest, with the npz's own hash), each in one
        rename."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, features=self.features.half().numpy(), sharpness=self.sharpness.half().numpy())
        _replace(path, buffer.getvalue())
        manifest = {**self.manifest, "sha256": file_sha256(path)}
        _replace(path.with_suffix(".json"), (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())
        return path

    @classmethod
    def load(
        cls, path: str | Path, extractor: Extractor | None = None, resize: Resize | None = None, n: int | None = None
    ) -> ImageFeatures:
        """Reads what ``save`` wrote and checks it against the given extractor weights, resize and count.

        Raises:
            FileNotFoundError: the npz or its manifest is missing.
            FeatureFileError: pickled or damaged content, or another extractor, resize or count than expected.
        """
        path = Path(path)
        for needed in (path, path.with_suffix(".json")):
            if not needed.is_file():
                raise FileNotFoundError(f"{needed} does not exist; write reference features with ImageFeatures.save")
        manifest = json.loads(path.with_suffix(".json").read_text())
        digest = file_sha256(path)
        if digest != manifest.get("sha256"):
            raise FeatureFileError(
                f"{path} has sha256 {digest}, its manifest says {manifest.get('sha256')}; make it again"
            )
        features, sharpness = _read_arrays(path)
        expected = {
            "n": (len(features), n),
            "extractor_sha256": (manifest.get("extractor_sha256"), extractor.sha256 if extractor else None),
            "resize": (manifest.get("resize"), resize.name if resize else None),
        }
        for name, (found, wanted) in expected.items():
            if wanted is not None and found != wanted:
                raise FeatureFileError(
                    f"{path} has {name} = {found}, expected {wanted}; make it again with this protocol"
                )
        return cls(features, sharpness, manifest)


def _read_arrays(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            features, sharpness = (torch.from_numpy(archive[name]).float() for name in ("features", "sharpness"))
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise FeatureFileError(
            f"{path} is not a feature file ({error}); expected arrays features and sharpness"
        ) from error
    if features.ndim != 2 or sharpness.shape != features.shape[:1]:
        raise FeatureFileError(
            f"{path} holds features {tuple(features.shape)} and sharpness {tuple(sharpness.shape)}; "
            "expected (N, D) and (N,)"
        )
    return features, sharpness


def _features_of_files(files: list[Path], extractor: Extractor, resize: Resize) -> tuple[Tensor, Tensor]:
    from PIL import Image

    features, sharpness = [], []
    for file in files:
        with Image.open(file) as image:
            pixels = to_tensor(image)
        features.append(resize(pixels[None])[0])
        sharpness.append(gradient_energy(pixels[None]))
    shapes = {tuple(image.shape) for image in features}
    if len(shapes) > 1:
        raise ValueError(f"images of several sizes {sorted(shapes)} and no resize; use a protocol that resizes")
    return extractor.image_features(torch.stack(features)), torch.cat(sharpness)


def _chunks(items: list[Path], size: int) -> Iterable[list[Path]]:
    iterator: Iterator[int] = iter(range(0, len(items), size))
    return (items[start : start + size] for start in iterator)


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content)
    os.replace(aside, path)
