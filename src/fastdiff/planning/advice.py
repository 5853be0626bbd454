"""What to change when a run does not fit, in the order of what saves most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastdiff.methods import method_named
from fastdiff.planning.plan import Plan
from fastdiff.planning.tracker import ACTIVATIONS
from fastdiff.planning.walk import ENCODERS, FROZEN
from fastdiff.recipes.recipe import Recipe

Replan = Callable[[Recipe], Plan]
_CHECKPOINTED, _HALF_BATCH, _SPLIT = 0.7, 0.45, 0.1
"""Usual shares of activations that these save; the plan after the changes says what they really do."""
_FULL, _LOW = 16, 4
"""Bytes a weight of a network trained in float32 with Adam, and in bfloat16 with 8-bit moments inside backward."""


@dataclass(frozen=True)
class Lever:
    """One change, what else it costs, and about how many bytes it saves."""

    flags: str
    price: str
    changes: Mapping[str, Any]
    saving: int


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
        taken.append(best)
        recipe, hoped = recipe.changed(**best.changes), hoped - best.saving
        if hoped <= memory:
            plan = replan(recipe)
            hoped = plan.needed
    return taken, plan


def levers(recipe: Recipe, plan: Plan) -> Iterator[Lever]:
    """Changes that are not made yet."""
    values, sizes, split = recipe.values, plan.walked.sizes, plan.split
    info, critics = method_named(recipe.method).info, method_named(recipe.method).critics
    # The plan may be of a larger batch, where a change before this one has halved it.
    activations = split.get(ACTIVATIONS, 0) * values["train_batch_size"] // plan.batch
    critic = sum(sizes.get(name, 0) for name in critics)
    if not values["gradient_checkpointing"]:
        saving = round(_CHECKPOINTED * activations)
        yield Lever("--gradient_checkpointing", "about a third more time", {"gradient_checkpointing": True}, saving)
    if not values["cast_teacher_unet"]:
        changes = {"mixed_precision": "bf16", "cast_teacher_unet": True}
        flags = "--mixed_precision bf16 --cast_teacher_unet"
        yield Lever(flags, "rounded frozen weights", changes, split.get(FROZEN, 0) // 2)
    if values["fake_score"] == "full":
        low = values["fake_score_dtype"] == "bf16"
        if not low:
            changes = {"fake_score_dtype": "bf16", "fake_score_in_backward": True, "mixed_precision": "bf16"}
            flags = "--fake_score_dtype bf16 --fake_score_in_backward --mixed_precision bf16"
            yield Lever(flags, "slower critic steps, clipped by tensor", changes, (_FULL - _LOW) * critic)
        changes = {"fake_score": "lora", "fake_score_dtype": "fp32", "fake_score_in_backward": False}
        # Where a full critic in few bytes is enough it is worth more than the last gigabytes.
        yield Lever("--fake_score lora", "a weaker fake score", changes, (_LOW if low else _LOW - 1) * critic)
    if values["student"] == "full" and "lora" in info.student_kinds:
        changes = {"student": "lora", "learning_rate": 1e-4}
        yield Lever("--student lora --learning_rate 1e-4", "a LoRA student", changes, _FULL * sizes["student"])
    if not values["use_8bit_adam"]:
        exact = sum(sizes.values()) - (critic if values["fake_score_dtype"] == "bf16" else 0)
        yield Lever("--use_8bit_adam", "noisier moments", {"use_8bit_adam": True}, 6 * exact)
    if critics and not values["split_roles"]:
        saving = round(_SPLIT * activations)
        yield Lever("--split_roles", "more, smaller network calls", {"split_roles": True}, saving)
    if not values["offload_encoders"]:
        changes = {"offload_encoders": True}
        yield Lever("--offload_encoders", "encoders travel when they work", changes, split.get(ENCODERS, 0))
    if values["train_batch_size"] > 1:
        size, accumulation = values["train_batch_size"] // 2, values["gradient_accumulation_steps"] * 2
        changes = {"train_batch_size": size, "gradient_accumulation_steps": accumulation}
        flags = f"--train_batch_size {size} --gradient_accumulation_steps {accumulation}"
        yield Lever(flags, "more, smaller calls", changes, round(_HALF_BATCH * activations))
