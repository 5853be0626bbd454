"""Flags that save memory, and about how much each would save in a planned run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from fastdiff.methods import Method, method_named
from fastdiff.planning.plan import Plan
from fastdiff.planning.sharing import device_phases
from fastdiff.planning.tracker import ACTIVATIONS
from fastdiff.planning.walk import ENCODERS, FROZEN
from fastdiff.recipes.recipe import Recipe

_CHECKPOINTED, _HALF_BATCH, _SPLIT, _OFFLOADED = 0.7, 0.45, 0.1, 0.2
"""Usual shares of activations that these save; the plan after the changes says what they really do."""
_FULL, _LOW = 16, 4
"""Bytes a weight of a network trained in float32 with Adam, and in bfloat16 with 8-bit moments inside backward."""
_NEXT_STORAGE = {"none": ("int8", 1.0), "int8": ("nf4", 0.44)}
"""What a quantised base becomes, and the bytes it saves a weight: 2, then 1, then half of one and a scale for 64."""


@dataclass(frozen=True)
class Lever:
    """One change, what else it costs, and about how many bytes it saves."""

    flags: str
    price: str
    changes: Mapping[str, Any]
    saving: int


def levers(recipe: Recipe, plan: Plan) -> Iterator[Lever]:
    """Changes that are not made yet, and that a run would not refuse."""
    yield from _storage(recipe, plan)
    yield from _critics(recipe, plan)
    yield from _training(recipe, plan)
    yield from _activations(recipe, plan)


def _storage(recipe: Recipe, plan: Plan) -> Iterator[Lever]:
    values, split = recipe.values, plan.split
    if not values["offload_encoders"]:
        changes = {"offload_encoders": True}
        yield Lever("--offload_encoders", "encoders travel when they work", changes, split.get(ENCODERS, 0))
    if not values["cast_teacher_unet"]:
        changes = {"mixed_precision": "bf16", "cast_teacher_unet": True}
        flags = "--mixed_precision bf16 --cast_teacher_unet"
        yield Lever(flags, "rounded frozen weights", changes, split.get(FROZEN, 0) // 2)
    elif _can_quantize(recipe):
        storage, saved = _NEXT_STORAGE[values["quantize_base"]]
        price = "frozen weights rounded further, slower calls, needs bitsandbytes"
        saving = round(saved * plan.walked.block_weights)
        yield Lever(f"--quantize_base {storage}", price, {"quantize_base": storage}, saving)
    if plan.gpus > 1 and _can_shard(recipe):
        phases = device_phases(plan.walked, plan.gpus, sharded=True)
        saving = plan.tensors - max(split.total() for split in phases.values())
        yield Lever("--fsdp full_shard", "weights pass between devices in every call", {"fsdp": "full_shard"}, saving)


def _critics(recipe: Recipe, plan: Plan) -> Iterator[Lever]:
    values, critics = recipe.values, method_named(recipe.method).critics
    if values["fake_score"] != "full" or not critics:
        return
    critic = sum(plan.walked.sizes.get(name, 0) for name in critics)
    low, alone = values["fake_score_dtype"] == "bf16", values["fsdp"] == "none"
    if alone and not low:
        changes = {"fake_score_dtype": "bf16", "fake_score_in_backward": True, "mixed_precision": "bf16"}
        flags = "--fake_score_dtype bf16 --fake_score_in_backward --mixed_precision bf16"
        yield Lever(flags, "slower critic steps, clipped by tensor", changes, (_FULL - _LOW) * critic)
    changes = {"fake_score": "lora", "fake_score_dtype": "fp32", "fake_score_in_backward": False}
    # Where a full critic in few bytes is enough it is worth more than the last gigabytes.
    saving = (_LOW if low else _LOW - 1) if alone else _FULL / plan.gpus
    yield Lever("--fake_score lora", "a weaker fake score", changes, round(saving * critic))


def _training(recipe: Recipe, plan: Plan) -> Iterator[Lever]:
    values, sizes = recipe.values, plan.walked.sizes
    alone = values["fsdp"] == "none"
    if (
        values["student"] == "full"
        and "lora" in _method(recipe).info.student_kinds
        and not _method(recipe).own_network
    ):
        changes = {"student": "lora", "learning_rate": 1e-4}
        saving = _FULL * sizes["student"] // (1 if alone else plan.gpus)
        yield Lever("--student lora --learning_rate 1e-4", "a LoRA student", changes, saving)
    if not values["use_8bit_adam"] and (alone or not _full_roles(recipe)):
        low = method_named(recipe.method).critics if values["fake_score_dtype"] == "bf16" else ()
        exact = sum(size for name, size in sizes.items() if name not in low)
        yield Lever("--use_8bit_adam", "noisier moments", {"use_8bit_adam": True}, 6 * exact)


def _activations(recipe: Recipe, plan: Plan) -> Iterator[Lever]:
    values = recipe.values
    # The plan may be of a larger batch, where a change before this one has halved it.
    activations = plan.split.get(ACTIVATIONS, 0) * values["train_batch_size"] // plan.batch
    if not values["gradient_checkpointing"]:
        saving = round(_CHECKPOINTED * activations)
        yield Lever("--gradient_checkpointing", "about a third more time", {"gradient_checkpointing": True}, saving)
    elif not values["activation_offload"]:
        saving = round(_OFFLOADED * activations)
        yield Lever("--activation_offload", "copies to the host and back", {"activation_offload": True}, saving)
    if method_named(recipe.method).critics and not values["split_roles"]:
        saving = round(_SPLIT * activations)
        yield Lever("--split_roles", "more, smaller network calls", {"split_roles": True}, saving)
    if values["train_batch_size"] // 2 >= _method(recipe).least_batch:
        size, accumulation = values["train_batch_size"] // 2, values["gradient_accumulation_steps"] * 2
        changes = {"train_batch_size": size, "gradient_accumulation_steps": accumulation}
        flags = f"--train_batch_size {size} --gradient_accumulation_steps {accumulation}"
        yield Lever(flags, "more, smaller calls", changes, round(_HALF_BATCH * activations))


def _method(recipe: Recipe) -> Method:
    method = method_named(recipe.method)
    return method(recipe.build(method.Config))


def _full_roles(recipe: Recipe) -> bool:
    kinds = ("student", "fake_score") if method_named(recipe.method).critics else ("student",)
    return "full" in [recipe.values[kind] for kind in kinds]


def _can_quantize(recipe: Recipe) -> bool:
    """Adapters alone, and a package that the plan itself needs as well."""
    values = recipe.values
    possible = values["quantize_base"] in _NEXT_STORAGE and values["fsdp"] == "none" and not _full_roles(recipe)
    return possible and find_spec("bitsandbytes") is not None


def _can_shard(recipe: Recipe) -> bool:
    """What `Settings` and the engine accept together with fsdp."""
    values = recipe.values
    low = values["fake_score_dtype"] != "fp32" or values["fake_score_in_backward"]
    refused = low or values["quantize_base"] != "none" or values["torch_compile"]
    if values["fsdp"] != "none" or refused:
        return False
    full = "full" in (values["student"], values["fake_score"])
    return not full or not (values["use_8bit_adam"] or _method(recipe).frozen())
