"""Opens what `fastdiff cache` names and encodes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdiff.data import DataKind, ImageTextData, ImageTransform, PromptData, open_training_data, recognise
from fastdiff.engine.caching import build_cache
from fastdiff.recipes.errors import RecipeError
from fastdiff.recipes.opening import open_teacher
from fastdiff.recipes.options import DataOptions, TeacherOptions, picked


def cache(
    values: Mapping[str, Any],
    output: str | Path,
    resolution: int | None = None,
    seed: int = 0,
    encode_batch_size: int = 16,
    shard_size: int = 1024,
) -> tuple[int, str]:
    """Encodes the data of `values` (fields of `TeacherOptions` and `DataOptions`) into a cache folder.

    Returns:
        The number of records, and what is to be said of rejected items.

    Raises:
        RecipeError, FileNotFoundError, ValueError: bad options, teacher or data.
    """
    options = picked(DataOptions, values)
    if options.data is None:
        raise RecipeError("no data was given: pass --data prompts or captioned images")
    kind = recognise(options.data)
    if kind is DataKind.CACHE:
        raise RecipeError(f"{options.data} is a cache already")
    teacher = open_teacher(picked(TeacherOptions, values), "cpu")
    teacher.encoders_to("cuda" if torch.cuda.is_available() else "cpu")
    resolution = resolution or teacher.default_resolution
    teacher.latent_shape(resolution)
    data = open_training_data(
        options.data,
        "prompts" if kind is DataKind.PROMPTS else "images",
        transform=ImageTransform(
            resolution, options.center_crop, options.random_flip, options.image_interpolation_mode
        ),
        image_column=options.image_column,
        caption_column=options.caption_column,
        max_rejected=options.max_rejected,
        seed=seed,
    )
    data = _first(data, options.max_train_samples)
    count = build_cache(Path(output), teacher, data, resolution, seed, encode_batch_size, shard_size)
    return count, data.rejects.summary()


def _first(data: PromptData | ImageTextData, count: int | None) -> PromptData | ImageTextData:
    if count is None:
        return data
    if isinstance(data, PromptData):
        return PromptData(data.prompts[:count])
    raise RecipeError("max_train_samples applies to prompts here; for images cache all, and limit the run instead")
