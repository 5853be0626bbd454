"""Opens what `fastdiff pairs` names and samples the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdiff.data import ImageTextData, ImageTransform, open_training_data
from fastdiff.engine.pairs import PairSettings, build_pairs
from fastdiff.recipes.errors import RecipeError
from fastdiff.recipes.opening import open_teacher
from fastdiff.recipes.options import DataOptions, TeacherOptions, picked

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pairs(
    values: Mapping[str, Any],
    output: str | Path,
    count: int | None = None,
    resolution: int | None = None,
    real_images: str | None = None,
    embeddings: bool = True,
    dtype: str = "float32",
    mixed_precision: str = "no",
    batch_size: int = 16,
    shard_size: int = 1024,
) -> int:
    """Makes pairs from the prompts of `values` (fields of `TeacherOptions`, `DataOptions` and `PairSettings`).

    Args:
        values: by option name.
        output: the folder.
        count: pairs; one a prompt if not given.
        resolution: image side in pixels; the teacher's own if not given.
        real_images: captioned images for the share `real_share`.
        embeddings, dtype, batch_size, shard_size: as in `build_pairs`, the type by name.
        mixed_precision: "no" or "bf16", of the teacher's calls.

    Returns:
        The number of pairs in the folder.

    Raises:
        RecipeError, FileNotFoundError, ValueError: bad options, teacher or data.
    """
    data, teacher_options, settings = (picked(cls, values) for cls in (DataOptions, TeacherOptions, PairSettings))
    if data.data is None:
        raise RecipeError("no prompts were given: pass --prompts a prompt file (or captioned images, for captions)")
    if bool(settings.real_share) != (real_images is not None):
        raise RecipeError("--real_images and --real_share belong together: give both or neither")
    prompts = open_training_data(data.data, "prompts", caption_column=data.caption_column, seed=settings.seed)
    texts = [prompts[place]["prompt"] for place in range(min(len(prompts), data.max_train_samples or len(prompts)))]
    teacher = open_teacher(teacher_options, "cuda" if torch.cuda.is_available() else "cpu")
    resolution = resolution or teacher.default_resolution
    return build_pairs(
        Path(output),
        teacher,
        texts,
        settings,
        count or len(texts),
        resolution,
        images=_images(real_images, data, resolution, settings.seed),
        embeddings=embeddings,
        dtype=DTYPES[dtype],
        compute_dtype=torch.bfloat16 if mixed_precision == "bf16" else None,
        batch_size=batch_size,
        shard_size=shard_size,
    )


def _images(path: str | None, data: DataOptions, resolution: int, seed: int) -> ImageTextData | None:
    if path is None:
        return None
    return open_training_data(
        path,
        "images",
        transform=ImageTransform(resolution, data.center_crop, data.random_flip, data.image_interpolation_mode),
        image_column=data.image_column,
        caption_column=data.caption_column,
        max_rejected=data.max_rejected,
        seed=seed,
    )
