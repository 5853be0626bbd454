"""A student folder from the checkpoint of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastdiff.data import PromptData
from fastdiff.engine import Settings, Trainer
from fastdiff.engine.files import writable_folder
from fastdiff.export.pipeline import check_replaceable
from fastdiff.methods import method_named
from fastdiff.models.codec import Codec
from fastdiff.models.teacher import Teacher
from fastdiff.recipes.errors import RecipeError
from fastdiff.recipes.exporting import export_run
from fastdiff.recipes.opening import open_teacher
from fastdiff.recipes.options import TeacherOptions
from fastdiff.recipes.recipe import RECIPE_FILE, Recipe, resolve, run_folder_of
from fastdiff.recipes.starting import last_checkpoint
from fastdiff.recipes.student import Student


def export_checkpoint(
    source: str | Path,
    output: str | Path,
    pipeline: bool = True,
    tiny_decoder: str | Path | None = None,
    num_inference_steps: int | None = None,
) -> Student:
    """Rebuilds the networks of a run, loads a checkpoint and exports its student.

    Args:
        source: a run folder (its last checkpoint is taken) or one of its checkpoints.
        output: the student folder to write.
        pipeline: False writes a LoRA student's LoRA files only.
        tiny_decoder: folder of an `AutoencoderTiny` for the teacher's latents, which takes the autoencoder's place.
        num_inference_steps: steps the student is meant to be run with, if not those of the run. A student that was
            told where each step ends has them in its exported weights, so each number of steps is an export of its own.

    Raises:
        FileNotFoundError: no run, no checkpoint, or no teacher.
        ValueError: if a LoRA is asked of a full student, the tiny decoder is not one of these latents, or the method's
            steps are not a number to choose.
        LoadBackError: if stock diffusers does not give the student back.
    """
    from accelerate import Accelerator

    source, output = Path(source), Path(output)
    if tiny_decoder is not None and not pipeline:
        raise RecipeError(
            "--tiny_decoder replaces a part of the whole pipeline, and LoRA files have none: leave it out"
        )
    run = run_folder_of(source)
    recipe = _at_steps(resolve({}, run / RECIPE_FILE), num_inference_steps)
    if source == run and last_checkpoint(run) is None:
        raise FileNotFoundError(f"{run} holds no finished checkpoint; train it first (`fastdiff distill`)")
    check_replaceable(output)
    writable_folder(output.parent)
    settings = recipe.changed(output_dir=str(output.parent), report_to="none").build(Settings)
    method_class = method_named(recipe.method)
    accelerator = Accelerator(mixed_precision="no")
    teacher = open_teacher(recipe.build(TeacherOptions), accelerator.device, settings.mixed_precision)
    autoencoder = None if tiny_decoder is None else open_tiny_decoder(tiny_decoder, teacher)
    trainer = Trainer(
        method_class(recipe.build(method_class.Config)),
        teacher,
        PromptData(["unused"]),
        settings,
        accelerator=accelerator,
    )
    checkpoint = source if source != run else last_checkpoint(run)
    trainer.checkpoints.load(trainer, checkpoint)
    if autoencoder is not None and len(set(trainer.method.experts())) > 1:
        raise RecipeError("several students have no whole pipeline whose autoencoder could be replaced")
    return export_run(trainer, recipe, output, pipeline=pipeline, autoencoder=autoencoder)


def _at_steps(recipe: Recipe, steps: int | None) -> Recipe:
    if steps is None:
        return recipe
    if "num_inference_steps" not in recipe.values:
        raise RecipeError(
            f"--num_inference_steps {steps}: {recipe.method} students sample at the times they were trained for "
            "(`timesteps`): leave it out"
        )
    return recipe.changed(num_inference_steps=steps)


def open_tiny_decoder(folder: str | Path, teacher: Teacher) -> Any:
    """An `AutoencoderTiny`, checked against the teacher's latents and on its device.

    Raises:
        FileNotFoundError: if the folder holds no such autoencoder.
        ValueError: if its latents have another shape.
    """
    from diffusers import AutoencoderTiny

    config = Path(folder) / "config.json"
    if not config.is_file() or json.loads(config.read_text(encoding="utf-8")).get("_class_name") != "AutoencoderTiny":
        raise FileNotFoundError(f"--tiny_decoder {folder} is not a folder of an AutoencoderTiny with its config.json")
    tiny = AutoencoderTiny.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    own, theirs = teacher.codec, Codec(tiny)
    for what in ("channels", "factor"):
        if getattr(own, what) != getattr(theirs, what):
            raise ValueError(
                f"--tiny_decoder {folder} is for latents with {what} {getattr(theirs, what)}, this teacher's have "
                f"{getattr(own, what)}: take the one made for the teacher's family"
            )
    return tiny.to(next(teacher.network.parameters()).device)
