"""What a recipe with stages tells its runs."""

from __future__ import annotations

import pytest

from fastdiff.recipes import RecipeError, stages
from fastdiff.recipes.recipe import resolve


@pytest.fixture
def runs(monkeypatch):
    """The recipes that would be run."""
    seen = []
    monkeypatch.setattr(stages, "run_recipe", lambda recipe, data, scorer: seen.append(recipe))
    monkeypatch.setattr(stages, "Student", lambda folder: folder)
    return seen


def staged(tmp_path, **values):
    given = {"method": "lcm", "pretrained_teacher_model": "embedded", "output_dir": str(tmp_path / "whole")}
    recipe = resolve(given | values, None)
    plan = ({"name": "one"}, {"name": "two", "init_from": "one"}, {"name": "three", "init_from": "two"})
    return recipe.changed(), plan


def test_only_the_last_student_is_published(tmp_path, runs):
    recipe, plan = staged(tmp_path, push_to_hub=True)
    stages.run_stages(stages.dataclasses.replace(recipe, stages=plan))
    assert [run.values["push_to_hub"] for run in runs] == [False, False, True]
    assert runs[-1].values["hub_model_id"] == "whole"  # not the stage's folder


def test_a_given_repository_stays(tmp_path, runs):
    recipe, plan = staged(tmp_path, push_to_hub=True, hub_model_id="you/student")
    stages.run_stages(stages.dataclasses.replace(recipe, stages=plan))
    assert runs[-1].values["hub_model_id"] == "you/student"


def test_a_folder_to_resume_from_is_refused(tmp_path, runs):
    recipe, plan = staged(tmp_path, resume_from_checkpoint="runs/x/checkpoints/step-3")
    with pytest.raises(RecipeError, match=r"resume_from_checkpoint runs/x.* latest"):
        stages.run_stages(stages.dataclasses.replace(recipe, stages=plan))
    assert not runs
