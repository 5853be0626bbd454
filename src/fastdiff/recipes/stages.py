"""Runs one after the other, each with its own folder, overrides and starting point."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.engine.files import writable_folder
from fastdiff.export.student import RECORD_FILE
from fastdiff.models.scorers import Scorer
from fastdiff.recipes.errors import RecipeError
from fastdiff.recipes.recipe import RECIPE_FILE, Recipe, stage_recipe
from fastdiff.recipes.run import run_recipe
from fastdiff.recipes.starting import last_checkpoint
from fastdiff.recipes.student import Student

logger = logging.getLogger(__name__)


def run_stages(recipe: Recipe, data: Any = None, scorer: Scorer | None = None) -> Student:
    """Runs the stages of a recipe in `output_dir/stage-1-name/` and so on; returns the last one's student.

    A stage's `init_from` and `teacher_from` name an earlier stage, or a folder. With `resume_from_checkpoint latest`
    finished stages are skipped and an interrupted one goes on from its last checkpoint.
    """
    plan = list(zip(stage_folders(recipe), recipe.stages, strict=True))
    named = {stage.get("name"): folder for folder, stage in plan}
    prepared = [_prepared(recipe, stage, folder, named) for folder, stage in plan]  # all are checked before any runs
    root = Path(recipe.values["output_dir"])
    if os.environ.get("RANK", "0") == "0":
        writable_folder(root)
        recipe.write(root / RECIPE_FILE)
    resuming = recipe.values["resume_from_checkpoint"] is not None
    if recipe.values["resume_from_checkpoint"] not in (None, "latest"):
        raise RecipeError(
            f"resume_from_checkpoint {recipe.values['resume_from_checkpoint']}: a recipe with stages goes on where it "
            "stopped, with --resume_from_checkpoint latest"
        )
    for own, (folder, _) in zip(prepared, plan):
        if resuming and (folder / "student" / RECORD_FILE).is_file():
            logger.info("%s is finished", folder.name)
            continue
        go_on = resuming and last_checkpoint(folder) is not None
        last = folder == plan[-1][0]  # whose student is the recipe's; earlier ones are not published
        hub = {"push_to_hub": False} if not last else {"hub_model_id": own.values["hub_model_id"] or root.name}
        run_recipe(own.changed(resume_from_checkpoint="latest" if go_on else None, **hub), data=data, scorer=scorer)
        gc.collect()  # networks, hooks and optimizers point at each other, and the next stage needs their memory
    return Student(plan[-1][0] / "student")


def stage_folders(recipe: Recipe) -> list[Path]:
    """`output_dir/stage-1-name`, ... in order; a stage without a name takes its method's."""
    root = Path(recipe.values["output_dir"])
    return [
        root / f"stage-{number}-{stage.get('name') or stage.get('method', recipe.method)}"
        for number, stage in enumerate(recipe.stages, 1)
    ]


def _prepared(recipe: Recipe, stage: Mapping[str, Any], folder: Path, named: Mapping[str, Path]) -> Recipe:
    values: dict[str, Any] = {"output_dir": str(folder)}
    if "init_from" in stage:
        values["init_from"] = str(named.get(stage["init_from"], stage["init_from"]))
    if "teacher_from" in stage:
        source = named.get(stage["teacher_from"])
        values["pretrained_teacher_model"] = str(source / "student" if source else stage["teacher_from"])
    return stage_recipe(dataclasses.replace(recipe, stages=()), stage, **values)
