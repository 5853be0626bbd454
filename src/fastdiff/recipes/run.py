"""Wires the rooms: one recipe in, one student out."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastdiff.data import TrainingData
from fastdiff.engine import Settings, Trainer
from fastdiff.engine.previews import Previews
from fastdiff.engine.tracking import tracker_class
from fastdiff.engine.validation import FeatureMoments
from fastdiff.methods import method_named
from fastdiff.models.scorers import Scorer
from fastdiff.models.teacher import Teacher
from fastdiff.recipes.errors import RecipeError, RunInterrupted
from fastdiff.recipes.exporting import export_run, prove_export
from fastdiff.recipes.opening import open_data, open_teacher, prepare
from fastdiff.recipes.options import DataOptions, HubOptions, TeacherOptions
from fastdiff.recipes.recipe import RECIPE_FILE, Recipe, resolve
from fastdiff.recipes.starting import last_checkpoint, start_from
from fastdiff.recipes.student import Student

logger = logging.getLogger(__name__)

PREVIEW_PROMPTS = 8
_ACCELERATES_OWN = {
    "MIXED_PRECISION": "precision is the recipe's, give --mixed_precision bf16",
    "USE_FSDP": "networks are cut by --fsdp full_shard",
    "USE_DEEPSPEED": "networks are cut by --fsdp full_shard",
}


def distill(
    teacher: str | Path | Teacher | Any | None = None,
    method: str | None = None,
    data: str | Path | Sequence[str] | TrainingData | None = None,
    *,
    config: str | Path | None = None,
    scorer: str | Scorer | None = None,
    **settings: Any,
) -> Student:
    """Distils a teacher into a few-step student, exports it and loads it back.

    Args:
        teacher: pipeline folder, .safetensors file, Hub id, `embedded`, a diffusers pipeline or a `Teacher`.
        method: name of the method (`fastdiff methods`); dmd2 if neither this nor the recipe says.
        data: what the method needs: a path, a list of prompts, or opened data.
        config: a YAML recipe; arguments override it.
        scorer: the frozen network of perceptual, image-text and pixel-adversarial terms, or its name.
        settings: any option of `fastdiff distill --help`.

    Returns:
        The student: its folder, sampler and stock pipeline.

    Raises:
        RecipeError, FileNotFoundError, ValueError: bad options, teacher or data; nothing is written then.
        NonFiniteError: naming the loss term that became NaN or infinite.
        LoadBackError: if the exported files do not give back the trained student.
        RunInterrupted: after SIGTERM or SIGINT; the run can be resumed.
    """
    given = dict(settings)
    named = {"method": method}
    if isinstance(teacher, str | Path):
        named["pretrained_teacher_model"], teacher = str(teacher), None
    if isinstance(data, str | Path):
        named["data"], data = str(data), None
    if isinstance(scorer, str):
        named["scorer"], scorer = scorer, None
    given |= {name: value for name, value in named.items() if value is not None}
    recipe = resolve(given, config)
    if recipe.stages:
        from fastdiff.recipes.stages import run_stages

        if teacher is not None:
            raise RecipeError("a recipe with stages needs the teacher's name, since every stage loads it anew")
        return run_stages(recipe, data, scorer)
    return run_recipe(recipe, teacher, data, scorer)


def run_recipe(recipe: Recipe, teacher: Any = None, data: Any = None, scorer: Scorer | None = None) -> Student:
    """One ordinary run; see `distill`. `teacher`, `data` and `scorer` replace those that the recipe names."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    settings = recipe.build(Settings)
    method_class = method_named(recipe.method)
    method = method_class(recipe.build(method_class.Config))
    folder = Path(settings.output_dir)
    _refuse_mixing(folder, settings)
    tracker_class(settings.report_to)
    # Others wait while the main process exports and loads back, which takes long for large students.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[patience])
    _warn_of_accelerates_own(settings)
    options = recipe.build(TeacherOptions)
    if teacher is None:
        teacher = open_teacher(options, accelerator.device, settings.mixed_precision)
    else:
        given = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        teacher = prepare(given, options, accelerator.device, settings.mixed_precision)
    first_here = accelerator.is_local_main_process
    opened = open_data(data, recipe.build(DataOptions), method, teacher, settings, verify=first_here)
    prompts = list(settings.validation_prompts) or some_prompts(opened)
    with _no_empty_folder(folder):
        trainer = Trainer(
            method,
            teacher,
            opened,
            settings,
            accelerator=accelerator,
            on_preview=Previews(prompts),
            on_start=lambda trainer, _: prove_export(trainer, recipe),
            validate=validation(opened, settings.validation_samples),
            scorer=scorer,
        )
        start_from(trainer, options.init_from)
    if trainer.is_main:
        recipe.write(folder / RECIPE_FILE)
    outcome = trainer.train()
    if outcome != "done":
        raise RunInterrupted(outcome, folder, trainer.step)
    return _finish(trainer, recipe, prompts)


def validation(data: TrainingData, samples: int) -> FeatureMoments | None:
    """What picks the best checkpoint; nothing if no samples are wanted."""
    return FeatureMoments(some_prompts(data, samples)) if samples else None


def some_prompts(data: TrainingData, count: int = PREVIEW_PROMPTS) -> list[str]:
    """Prompts from all over the data, for previews."""
    places = sorted({index * len(data) // count for index in range(count)})
    return [data[place]["prompt"] for place in places]


def _finish(trainer: Trainer, recipe: Recipe, prompts: Sequence[str]) -> Student:
    folder = trainer.folder / "student"
    student = export_run(trainer, recipe, folder, prompts=prompts)
    if trainer.is_main:
        upload(folder, recipe)
    trainer.accelerator.wait_for_everyone()
    return student


def upload(folder: Path, recipe: Recipe) -> None:
    """Pushes a student folder if the recipe says so."""
    from fastdiff.export import push_to_hub

    options = recipe.build(HubOptions)
    if options.push_to_hub:
        repository = options.hub_model_id or Path(recipe.values["output_dir"]).name
        logger.info("pushed: %s", push_to_hub(folder, repository, options.hub_token))


def _warn_of_accelerates_own(settings: Settings) -> None:
    """Says which of accelerate's launch settings have no effect here, and what has."""
    for name, ours in _ACCELERATES_OWN.items():
        own = os.environ.get(f"ACCELERATE_{name}", "no").lower()
        if own not in ("no", "false", "0", "", settings.mixed_precision):
            logger.warning("accelerate's %s=%s has no effect here: %s", name.lower(), own, ours)


def _refuse_mixing(folder: Path, settings: Settings) -> None:
    found = last_checkpoint(folder)
    if found and not settings.resume_from_checkpoint:
        raise RecipeError(
            f"output_dir {folder} already holds a run (up to {found.name}): go on with --resume_from_checkpoint "
            "latest, or give another --output_dir"
        )


@contextlib.contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """What fails before anything was written leaves no empty run folder behind."""
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
