"""YAML, flags and defaults resolved into one recipe, and the rooms wired by it. Importing this imports no torch."""

from fastdiff.recipes.declared import DeclaredMethod, Option, declared_methods
from fastdiff.recipes.errors import RecipeError, RunInterrupted
from fastdiff.recipes.recipe import Recipe, Section, resolve, sections

__all__ = [
    "DeclaredMethod",
    "Option",
    "Recipe",
    "RecipeError",
    "RunInterrupted",
    "Section",
    "declared_methods",
    "resolve",
    "sections",
]
