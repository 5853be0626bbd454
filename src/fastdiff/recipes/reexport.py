"""A student folder from the checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

from fastdiff.data import PromptData
from fastdiff.engine import Settings, Trainer
from fastdiff.engine.files import writable_folder
from fastdiff.export.pipeline import check_replaceable
from fastdiff.methods import method_named
from fastdiff.recipes.exporting import export_run
from fastdiff.recipes.opening import open_teacher
from fastdiff.recipes.options import TeacherOptions
from fastdiff.recipes.recipe import RECIPE_FILE, resolve, run_folder_of
from fastdiff.recipes.starting import last_checkpoint
from fastdiff.recipes.student import Student


def export_checkpoint(source: str | Path, output: str | Path, pipeline: bool = True) -> Student:
    """Rebuilds the networks of a run, loads a checkpoint and exports its student.

    Args:
        source: a run folder (its last checkpoint is taken) or one of its checkpoints.
        output: the student folder to write.
        pipeline: False writes a LoRA student's LoRA files only.

    Raises:
        FileNotFoundError: no run, no checkpoint, or no teacher.
        ValueError: if a LoRA is asked of a full student.
        LoadBackError: if stock diffusers does not give the student back.
    """
    from accelerate import Accelerator

    source, output = Path(source), Path(output)
    run = run_folder_of(source)
    recipe = resolve({}, run / RECIPE_FILE)
    if source == run and last_checkpoint(run) is None:
        raise FileNotFoundError(f"{run} holds no finished checkpoint; train it first (`fastdiff distill`)")
    check_replaceable(output)
    writable_folder(output.parent)
    settings = recipe.changed(output_dir=str(output.parent), report_to="none").build(Settings)
    method_class = method_named(recipe.method)
    accelerator = Accelerator(mixed_precision="no")
    teacher = open_teacher(recipe.build(TeacherOptions), accelerator.device, settings.mixed_precision)
    trainer = Trainer(
        method_class(recipe.build(method_class.Config)),
        teacher,
        PromptData(["unused"]),
        settings,
        accelerator=accelerator,
    )
    checkpoint = source if source != run else last_checkpoint(run)
    trainer.checkpoints.load(trainer, checkpoint)
    return export_run(trainer, recipe, output, pipeline=pipeline)
