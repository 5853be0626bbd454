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

    Savings are estimated from the plan's own numbers; when they should suffice the changed recipe is planned anew, and
    if it does not fit after all the next changes follow.
    """
    taken: list[Lever] = []
    hoped = plan.needed
    while plan.needed > memory:
        left = [lever for lever in levers(recipe, plan) if lever.saving > 0]
        if not left:
            return taken, replan(recipe) if hoped < plan.needed else plan
        best = max(left, key=lambda lever: lever.saving)
        taken = _with(taken, best)
        recipe, hoped = recipe.changed(**best.changes), hoped - best.saving
        if hoped <= memory:
            plan = replan(recipe)
            hoped = plan.needed
    return taken, plan


def _with(taken: list[Lever], lever: Lever) -> list[Lever]:
    """A lever that sets again what an earlier one set takes its place, with the savings of both."""
    again = [old for old in taken if old.changes.keys() == lever.changes.keys()]
    both = replace(lever, saving=lever.saving + sum(old.saving for old in again))
    return sorted([*(old for old in taken if old not in again), both], key=lambda one: -one.saving)
