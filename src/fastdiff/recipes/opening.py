"""From options to a teacher and training data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fastdiff.data import ChosenData, ImageTransform, PromptData, TrainingData, open_training_data
from fastdiff.diffusion.schedules import LAST_INDEX
from fastdiff.engine import Settings, chosen_data
from fastdiff.methods import Method
from fastdiff.models.teacher import Teacher, TeacherLike
from fastdiff.recipes.errors import RecipeError
from fastdiff.recipes.options import DataOptions, TeacherOptions

logger = logging.getLogger(__name__)


def open_teacher(options: TeacherOptions, device: torch.device | str, mixed_precision: str = "no") -> Teacher:
    """Loads the teacher that the options name.

    Raises:
        RecipeError: if none is named, or frozen weights are to be cast without a type to cast to.
        FileNotFoundError, ValueError: as `Teacher.from_pretrained`.
    """
    if options.pretrained_teacher_model is None:
        raise RecipeError(
            "no teacher was given: pass --teacher a pipeline folder, a .safetensors file, a Hub id, or `embedded`"
        )
    teacher = Teacher.from_pretrained(
        options.pretrained_teacher_model,
        revision=options.teacher_revision,
        variant=options.variant,
        cache_dir=options.cache_dir,
        config=options.teacher_config,
    )
    return prepare(teacher, options, device, mixed_precision)


def prepare(
    teacher: Teacher, options: TeacherOptions, device: torch.device | str, mixed_precision: str = "no"
) -> Teacher:
    """Autoencoder, storage type, device and attention of a teacher, as the options say; a device gets what was cast.

    Raises:
        RecipeError: if its times are not numbered as methods number them, if its network is in half precision that
            cannot be trained, or is to be cast without a type to cast to.
    """
    if teacher.schedule.indices != LAST_INDEX + 1:
        raise RecipeError(
            f"the teacher's scheduler numbers {teacher.schedule.indices} training timesteps (that of a student which "
            f"starts late is cut), and methods count {LAST_INDEX + 1}: give a teacher with its whole scheduler"
        )
    if options.pretrained_vae_model_name_or_path:
        _replace_autoencoder(teacher, options)
    if next(teacher.network.parameters()).dtype == torch.float16:
        raise RecipeError(
            "the teacher's network is in float16, in which small gradients vanish: load it in float32 (or bfloat16) and "
            "give mixed_precision bf16"
        )
    if options.cast_teacher_unet:
        if mixed_precision == "no":
            raise RecipeError("cast_teacher_unet casts to the type of mixed_precision; give --mixed_precision bf16")
        teacher.network.to(torch.bfloat16)
    if options.offload_encoders:
        teacher.offload_encoders()
    teacher.to(device)
    if options.enable_xformers_memory_efficient_attention:
        _use_xformers(teacher.network)
    return teacher


def open_data(
    source: str | Sequence[str] | TrainingData | None,
    options: DataOptions,
    method: Method,
    teacher: TeacherLike,
    settings: Settings,
    verify: bool = True,
) -> TrainingData:
    """Training data for a method.

    Args:
        source: what to use instead of `options.data`: a path, a list of prompts, or opened data.
        options, settings: columns, crops, size and seed.
        method: says what the data must hold.
        teacher: a cache must be its own.
        verify: compare every file of a cache with its hash, which one process a node need do.

    Raises:
        RecipeError: if nothing was given.
        FileNotFoundError, ValueError: as `open_training_data`.
    """
    source = options.data if source is None else source
    if source is None:
        raise RecipeError(
            f"no data was given: {method.info.name} needs {method.needs()}; pass --data a prompt file, an image "
            "folder, .tar shards, a parquet file, a datasets folder or a cache"
        )
    if isinstance(source, str | Path):
        data = _open_path(source, options, method, teacher, settings, verify)
    else:
        data = PromptData(list(source)) if isinstance(source, list | tuple) else source
    if options.max_train_samples is not None:
        if options.max_train_samples < 1:
            raise RecipeError(f"max_train_samples must be at least 1, got {options.max_train_samples}")
        data = ChosenData(data, range(min(options.max_train_samples, len(data))))
    return chosen_data(method, data, teacher, settings)


def _open_path(
    path: str | Path, options: DataOptions, method: Method, teacher: TeacherLike, settings: Settings, verify: bool
) -> TrainingData:
    resolution = settings.resolution or teacher.default_resolution
    return open_training_data(
        path,
        method.needs(),
        transform=ImageTransform(
            resolution, options.center_crop, options.random_flip, options.image_interpolation_mode
        ),
        image_column=options.image_column,
        caption_column=options.caption_column,
        max_rejected=options.max_rejected,
        seed=settings.seed,
        teacher=teacher.identity()["fingerprint"],
        resolution=resolution,
        verify=verify,
    )


def _replace_autoencoder(teacher: Teacher, options: TeacherOptions) -> None:
    from diffusers import AutoencoderKL

    try:
        autoencoder = AutoencoderKL.from_pretrained(
            options.pretrained_vae_model_name_or_path, cache_dir=options.cache_dir, use_safetensors=True
        )
    except OSError as error:
        raise FileNotFoundError(
            f"autoencoder {options.pretrained_vae_model_name_or_path!r} could not be loaded: {error}"
        ) from error
    teacher.replace_autoencoder(autoencoder)


def _use_xformers(network: nn.Module) -> None:
    try:
        network.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError, ValueError) as error:
        logger.warning("xformers cannot be used (%s); going on with PyTorch's own attention", error)
