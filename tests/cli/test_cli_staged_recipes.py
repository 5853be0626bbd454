"""Every stage of every recipe that ships resolves to a run of its method."""

from pathlib import Path

import pytest

from fastdiff.engine import Settings
from fastdiff.methods import method_named
from fastdiff.recipes.recipe import resolve, stage_recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "training" / "recipes").glob("*/*.yaml"))
STAGED = [path for path in RECIPES if resolve({}, path).stages]


@pytest.mark.parametrize("path", STAGED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_stages_are_runs_that_start_from_earlier_ones(path):
    recipe, earlier = resolve({}, path), set()
    for stage in recipe.stages:
        own = stage_recipe(recipe, stage)
        method = method_named(own.method)
        built, settings = method(own.build(method.Config)), own.build(Settings)
        assert settings.student in method.info.student_kinds
        assert set(built.frozen().values()) <= set(built.groups())
        if built.frozen().keys() & (built.inherits() or {}).keys():
            assert stage["init_from"] in earlier
        assert stage.get("init_from") is None or stage["init_from"] in earlier
        earlier.add(stage["name"])
    assert len(earlier) == len(recipe.stages)
