"""What to change when a run does not fit, in the order of what saves most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastdiff.planning.levers import Lever, levers
from fastdiff.planning.plan import Plan
from fastdiff.recipes.recipe import Recipe

Replan = Callable[[Recipe], Plan]


def advise(recipe: Recipe, plan: Plan, replan: Replan, memory: int) -> tuple[list[Lever], Plan]:
    """Changes to make together, the most saving first, and the plan with all of them.

    What saves most is estimated from the plan's own numbers; then the changed recipe is planned anew, and a change that
    the method refuses (a LoRA of a student with a new input, say) is not advised.
    """
    taken: list[Lever] = []
    refused: set[str] = set()
    while plan.needed > memory:
        left = [lever for lever in levers(recipe, plan) if lever.saving > 0 and lever.flags not in refused]
        if not left:
            break
        best = max(left, key=lambda lever: lever.saving)
        try:
            changed = recipe.changed(**best.changes)
            plan = replan(changed)
        except ValueError:
            refused.add(best.flags)
            continue
        taken, recipe = _with(taken, best), changed
    return taken, plan


def _with(taken: list[Lever], lever: Lever) -> list[Lever]:
    """A lever that sets again what an earlier one set takes its place, with the savings of both."""
    again = [old for old in taken if old.changes.keys() == lever.changes.keys()]
    both = replace(lever, saving=lever.saving + sum(old.saving for old in again))
    return sorted([*(old for old in taken if old not in again), both], key=lambda one: -one.saving)
