"""YAML, flags and defaults resolved into one recipe, and the rooms wired by it. Importing this imports no torch."""

from typing import TYPE_CHECKING, Any

from fastdiff.recipes.declared import DeclaredMethod, Option, declared_methods
from fastdiff.recipes.errors import RecipeError, RunInterrupted
from fastdiff.recipes.recipe import Recipe, Section, resolve, sections

if TYPE_CHECKING:
    from fastdiff.recipes.run import distill
    from fastdiff.recipes.student import Student

__all__ = [
    "DeclaredMethod",
    "Option",
    "Recipe",
    "RecipeError",
    "RunInterrupted",
    "Section",
    "Student",
    "declared_methods",
    "distill",
    "resolve",
    "sections",
]


def __getattr__(name: str) -> Any:
    # Torch and diffusers take seconds to import; `fastdiff --help` must not.
    if name == "distill":
        from fastdiff.recipes.run import distill

        return distill
    if name == "Student":
        from fastdiff.recipes.student import Student

        return Student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
