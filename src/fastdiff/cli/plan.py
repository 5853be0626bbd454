"""`fastdiff plan`: what a recipe will need on a device, before anything is downloaded or loaded."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from fastdiff.cli.parsing import Parser, show_progress_only
from fastdiff.recipes.errors import RecipeError

if TYPE_CHECKING:
    from fastdiff.planning.advice import Lever
    from fastdiff.planning.plan import Plan

HELP = "predict a recipe's peak memory, without weights or GPU"
DESCRIPTION = """Walks through the recipe's heaviest steps on tensors without values. Options of the recipe can be
overridden as in `fastdiff distill`: fastdiff plan recipe.yaml --memory 24GB train_batch_size=2."""
_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z_0-9]*=")
_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def main(arguments: list[str]) -> int:
    """Prints the plan; 1 where it does not fit into `--memory`."""
    parser = Parser("plan", DESCRIPTION, usage="fastdiff plan recipe.yaml [name=value ...] [options]")
    parser.add_argument("recipe", help="YAML recipe; name=value after it overrides its options")
    parser.add_argument(
        "--gpus", type=int, default=1, help="devices, each with all weights, or its share with fsdp [1]"
    )
    parser.add_argument(
        "--memory", help="of one device, such as 24GB or 22GiB; says what to change if it is too small"
    )
    parser.add_argument("--like", help="configs to plan with: sd15, sdxl, sd35m, flux1dev ... or a folder")
    parser.add_argument("--cached", action="store_true", help="images are encoded beforehand (`fastdiff cache`)")
    parser.add_argument("--scale", action="store_true", help="also a table from 1 to 256 devices, on paper")
    parser.add_argument("--json", action="store_true", help="all numbers, in bytes")
    overrides = [text for text in arguments if _OVERRIDE.match(text)]
    flags = parser.parse_all([text for text in arguments if text not in overrides])
    if flags.gpus < 1:
        raise RecipeError(f"--gpus must be at least 1, got {flags.gpus}")
    memory = None if flags.memory is None else read_size(flags.memory)

    import yaml

    from fastdiff.recipes.recipe import resolve

    recipe = resolve(
        {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in overrides)}, flags.recipe
    )
    show_progress_only()
    from fastdiff.planning.advice import advise
    from fastdiff.planning.plan import plan_recipe, plan_stages

    how = {"gpus": flags.gpus, "like": flags.like, "cached": flags.cached}
    plans = plan_stages(recipe, **how)
    plan = max(plans, key=lambda one: one.needed)
    fits = memory is None or plan.needed <= memory
    taken, changed = [], None
    if not fits and not recipe.stages:
        taken, changed = advise(recipe, plan, lambda other: plan_recipe(other, **how), memory)
    if flags.json:
        print(json.dumps(_values(plans, taken, changed, memory), indent=2))
    else:
        print(_text(plans, taken, changed, memory))
    if flags.scale and not flags.json:
        from fastdiff.planning.scaling import table

        print(f"\n{table(plan)}")
    return 0 if fits else 1


def read_size(text: str) -> int:
    """Bytes of `24GB`, `22.5GiB`, `900MB`.

    Raises:
        RecipeError: if it is no such size.
    """
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]+)", text.strip())
    if not found or found[2].upper() not in _UNITS:
        raise RecipeError(f"--memory must be a size such as 24GB or 22.5GiB, got {text!r}")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def _values(plans: list[Plan], taken: list[Lever], changed: Plan | None, memory: int | None) -> dict[str, Any]:
    return {
        "memory": memory,
        "plans": [plan.to_dict() for plan in plans],
        "advice": [{"flags": one.flags, "price": one.price, "saves_about": one.saving} for one in taken],
        "with_advice": None if changed is None else changed.to_dict(),
    }


def _text(plans: list[Plan], taken: list[Lever], changed: Plan | None, memory: int | None) -> str:
    lines = [line for plan in plans for line in (*_table(plan), "")]
    plan = max(plans, key=lambda one: one.needed)
    if memory is None:
        return "\n".join(lines[:-1])
    if plan.needed <= memory:
        return "\n".join([*lines, f"fits into {_gib(memory)} with {_gib(memory - plan.needed)} to spare"])
    lines.append(f"does not fit into {_gib(memory)}: {_gib(plan.needed - memory)} too much")
    if changed is not None and taken:
        lines.append("what to change, the most saving first:")
        lines += [f"  about -{_gib(one.saving)}  {one.flags}  ({one.price})" for one in taken]
        lines += ["", "with all of these:", *_table(changed)]
    if changed is None or changed.needed > memory:
        lines.append("that is not enough: take a smaller --resolution, or a larger device")
    return "\n".join(lines)


def _table(plan: Plan) -> list[str]:
    head = f"{plan.method} on {plan.teacher}, {plan.resolution} px, batch {plan.batch}, {plan.gpus} device(s)"
    kinds = list(dict.fromkeys(kind for split in plan.phases.values() for kind, size in split.items() if size))
    width = max(map(len, [*kinds, "context and margin", "peak of tensors"]))
    columns = [f"{name:>16}" for name in plan.phases]
    rows = [f"{'GiB':{width}}  {'  '.join(columns)}"]
    for kind in kinds:
        cells = [f"{split.get(kind, 0) / 2**30:16.3f}" for split in plan.phases.values()]
        rows.append(f"{kind:{width}}  {'  '.join(cells)}")
    totals = [f"{sum(split.values()) / 2**30:16.3f}" for split in plan.phases.values()]
    rows.append(f"{'peak of tensors':{width}}  {'  '.join(totals)}")
    extra = plan.needed - plan.tensors
    return [head, *rows, f"needed: {_gib(plan.needed)} a device ({_gib(extra)} of it context and margin)"]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
