"""From a path to training data, by looking at what lies there."""

from enum import StrEnum
from pathlib import Path
from typing import Literal

from fastdiff.data.cache import CacheReader
from fastdiff.data.cache_index import INDEX, CacheMismatchError, is_cache
from fastdiff.data.image_datasets import DatasetsImages
from fastdiff.data.image_folder import METADATA, ImageFolder
from fastdiff.data.image_parquet import ParquetImages, is_image_type, open_parquet
from fastdiff.data.image_shards import ImageShards
from fastdiff.data.images import ImageSource
from fastdiff.data.prompts import PROMPT_SUFFIXES, read_prompts
from fastdiff.data.source import CachedData, Captions, ImageTextData, PromptData, TrainingData
from fastdiff.data.transform import ImageTransform

Needs = Literal["prompts", "images", "pairs"]

PAIR_FIELDS = ("noise", "latents")


class DataKind(StrEnum):
    """What a path holds."""

    PROMPTS = "prompts"
    IMAGE_FOLDER = "image folder"
    PARQUET_IMAGES = "parquet with images"
    SHARDS = "webdataset shards"
    DATASETS = "datasets folder"
    CACHE = "cache"


class UnsuitableDataError(ValueError):
    """The data does not hold what the method needs."""


def recognise(path: str | Path) -> DataKind:
    """Looks at a file, folder or brace pattern. FileNotFoundError if nothing is there, ValueError if it is unknown."""
    text, path = str(path), Path(path)
    remote = text.startswith("pipe:") or "://" in text  # refused by the shard reader, with the reason
    if remote or "{" in text or text.lower().endswith((".tar", ".tar.gz", ".tgz")):
        return DataKind.SHARDS
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}")
    if path.is_dir():
        return _recognise_folder(path)
    if path.suffix.lower() == ".parquet":
        return _recognise_parquet(path)
    if path.suffix.lower() in PROMPT_SUFFIXES:
        return DataKind.PROMPTS
    raise ValueError(f"{path} is no known data: expected {', '.join(PROMPT_SUFFIXES)}, .tar, or a folder of these")


def open_images(
    path: str | Path,
    *,
    image_column: str = "image",
    caption_column: str | None = None,
    max_rejected: float = 0.05,
) -> ImageSource:
    """The captioned images at `path`, whatever their format; UnsuitableDataError for prompts or a cache."""
    kind = recognise(path)
    common = {"caption_column": caption_column, "max_rejected": max_rejected}
    if kind is DataKind.IMAGE_FOLDER:
        return ImageFolder(path, **common)
    if kind is DataKind.SHARDS:
        return ImageShards(path, **common)
    if kind is DataKind.PARQUET_IMAGES:
        return ParquetImages(path, image_column=image_column, **common)
    if kind is DataKind.DATASETS:
        return DatasetsImages(path, image_column=image_column, **common)
    if kind is DataKind.CACHE:
        raise UnsuitableDataError(f"images are needed, but {path} is a cache of tensors: give the images it came from")
    raise UnsuitableDataError(f"images are needed, but {path} holds prompts only: give {_image_kinds(image_column)}")


def open_training_data(
    path: str | Path,
    needs: Needs,
    *,
    transform: ImageTransform | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    max_rejected: float = 0.05,
    seed: int = 0,
    teacher: str | None = None,
    resolution: int | None = None,
    verify: bool = True,
) -> TrainingData:
    """Opens `path` as what the method needs.

    `prompts`: prompt files, the captions of images, or a cache. `images`: images (then `transform` is required) or a
    cache with the field `latents`. `pairs`: a cache with the fields `noise` and `latents`.

    Args:
        transform: size and crop of images.
        image_column, caption_column, max_rejected: as in the image sources and `read_prompts`.
        seed: of random crops and flips.
        teacher, verify: as in `CacheReader`.
        resolution: image side that a cache must have been made at, where its tensors depend on it; None takes any.

    Raises UnsuitableDataError when the data lacks what is needed, and what the sources raise.
    """
    kind = recognise(path)
    if kind is DataKind.CACHE:
        return _cached(CacheReader(path, teacher, verify), needs, resolution)
    if needs == "pairs":
        raise UnsuitableDataError(
            f"this method needs pairs of noise and sample, but {path} holds a {kind}: make pairs from prompts with "
            "`fastdiff pairs`"
        )
    if kind is DataKind.PROMPTS:
        if needs == "images":
            raise UnsuitableDataError(
                f"this method needs images, but {path} holds prompts only: give {_image_kinds(image_column)}, or a "
                "cache of latents; or choose a method that needs prompts only (`fastdiff methods`)"
            )
        return PromptData(read_prompts(path, caption_column))
    images = open_images(path, image_column=image_column, caption_column=caption_column, max_rejected=max_rejected)
    if needs == "prompts":
        return PromptData(Captions(images))
    if transform is None:
        raise ValueError("images need a transform: pass ImageTransform(resolution=...)")
    return ImageTextData(images, transform, seed)


def _image_kinds(column: str) -> str:
    return f"a folder with {METADATA}, a parquet file with a column {column!r}, .tar shards or a datasets folder"


def _cached(reader: CacheReader, needs: Needs, resolution: int | None) -> CachedData:
    verb = "pairs" if needs == "pairs" else "cache"
    required = {"prompts": (), "images": ("latents",), "pairs": PAIR_FIELDS}[needs]
    missing = [name for name in required if name not in reader.fields]
    if missing:
        raise UnsuitableDataError(
            f"this method needs {needs}, but the cache {reader.folder} lacks {', '.join(missing)} (it holds "
            f"{', '.join(reader.fields)}): make a cache of {needs} with `fastdiff {verb}`"
        )
    sized = [name for name in (*required, "time_ids") if name in reader.fields]
    if resolution not in (None, reader.meta.resolution) and sized:
        raise CacheMismatchError(
            f"the cache {reader.folder} was made at {reader.meta.resolution} px, which its {', '.join(sized)} hold, and "
            f"this run is at {resolution} px: give --resolution {reader.meta.resolution}, or make it again with `fastdiff "
            f"{verb} --resolution {resolution}`"
        )
    return CachedData(reader)


def _recognise_folder(folder: Path) -> DataKind:
    if (folder / INDEX).is_file() and is_cache(folder):
        return DataKind.CACHE
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return DataKind.DATASETS
    if (folder / METADATA).is_file():
        return DataKind.IMAGE_FOLDER
    if any(folder.glob("*.tar")):
        return DataKind.SHARDS
    parquet = sorted(folder.glob("*.parquet"))
    if parquet:
        return _recognise_parquet(parquet[0])
    if any(file.suffix.lower() in PROMPT_SUFFIXES for file in folder.iterdir()):
        return DataKind.PROMPTS
    raise ValueError(
        f"{folder} is no known data: expected a cache, a datasets folder, images with {METADATA}, .tar shards, or "
        f"prompt files ({', '.join(PROMPT_SUFFIXES)})"
    )


def _recognise_parquet(path: Path) -> DataKind:
    schema = open_parquet(path).schema_arrow
    has_images = any(is_image_type(field.type) for field in schema)
    return DataKind.PARQUET_IMAGES if has_images else DataKind.PROMPTS
