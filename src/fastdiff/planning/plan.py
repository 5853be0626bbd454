"""From a recipe to its predicted peak memory per device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.engine import Settings
from fastdiff.methods import method_named
from fastdiff.planning.blueprint import blueprint_of
from fastdiff.planning.sharing import device_phases
from fastdiff.planning.walk import Walk, walk
from fastdiff.recipes.errors import RecipeError
from fastdiff.recipes.options import TeacherOptions
from fastdiff.recipes.recipe import Recipe, stage_recipe

CONTEXT = round(0.5 * 2**30)
"""What a CUDA context takes before the first tensor; an ordinary value, not a measured one."""
MARGIN = 0.05
"""Share of the tensors' peak set aside for kernels' workspaces and fragmentation."""


@dataclass(frozen=True)
class Plan:
    """Predicted memory of one device.

    Args:
        method, teacher, resolution, batch: what is planned.
        gpus: how many devices take part.
        phases: the fullest moment of each phase, bytes by kind.
        walked: what the plan was made from.
    """

    method: str
    teacher: str
    resolution: int
    batch: int
    gpus: int
    phases: Mapping[str, Mapping[str, int]]
    walked: Walk

    @property
    def fullest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def split(self) -> dict[str, int]:
        """Bytes by kind at the peak."""
        return dict(self.phases[self.fullest])

    @property
    def tensors(self) -> int:
        """Bytes of all tensors at the peak."""
        return sum(self.split.values())

    @property
    def needed(self) -> int:
        """The peak with context and margin."""
        return with_margin(self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; all sizes in bytes."""
        return {
            "method": self.method,
            "teacher": self.teacher,
            "resolution": self.resolution,
            "batch": self.batch,
            "gpus": self.gpus,
            "peak_phase": self.fullest,
            "peak_tensors": self.tensors,
            "needed": self.needed,
            "split": self.split,
            "phases": {name: dict(split) for name, split in self.phases.items()},
        }


def with_margin(tensors: int) -> int:
    """Bytes of tensors with the context and a margin for what kernels and the allocator take."""
    return round(tensors * (1 + MARGIN)) + CONTEXT


def plan_recipe(recipe: Recipe, *, gpus: int = 1, like: str | None = None, cached: bool = False) -> Plan:
    """Predicts one run.

    Args:
        recipe: an ordinary recipe (of one with stages: `plan_stages`).
        gpus: devices; each holds all weights and exchanges gradients, or with `fsdp` its share of full networks.
        like: which configs the teacher has, where its own are not at hand; see `blueprint_of`.
        cached: images are encoded beforehand (`fastdiff cache`).

    Raises:
        RecipeError: if no teacher is named.
        FileNotFoundError: if the teacher's configs are not at hand.
        ValueError: as the run itself would, e.g. a student kind that the method does not train.
    """
    options = recipe.build(TeacherOptions)
    source = options.pretrained_teacher_model
    if source is None and like is None:
        raise RecipeError("no teacher was given: pass --teacher, or --like with the configs to plan with")
    blueprint = blueprint_of(source or "", like)
    settings = recipe.build(Settings)
    method_class = method_named(recipe.method)
    method = method_class(recipe.build(method_class.Config))
    frozen = _frozen_dtype(options, settings)
    walked = walk(method, blueprint, settings, frozen_dtype=frozen, cached=cached, offloaded=options.offload_encoders)
    return Plan(
        method=recipe.method,
        teacher=like or source or "",
        resolution=walked.resolution,
        batch=settings.train_batch_size,
        gpus=gpus,
        phases=device_phases(walked, gpus, sharded=settings.fsdp != "none"),
        walked=walked,
    )


def plan_stages(recipe: Recipe, **how: Any) -> list[Plan]:
    """A plan for each stage, or the one plan of an ordinary recipe."""
    if not recipe.stages:
        return [plan_recipe(recipe, **how)]
    return [plan_recipe(stage_recipe(recipe, stage), **how) for stage in recipe.stages]


def _frozen_dtype(options: TeacherOptions, settings: Settings) -> torch.dtype:
    if options.cast_teacher_unet and settings.mixed_precision == "no":
        raise RecipeError("cast_teacher_unet casts to the type of mixed_precision; give --mixed_precision bf16")
    return torch.bfloat16 if options.cast_teacher_unet else torch.float32
