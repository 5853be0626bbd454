"""A student as a whole diffusers pipeline folder, loaded by plain `DiffusionPipeline.from_pretrained`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.engine.files import whole_folder
from fastdiff.export.weights import student_state
from fastdiff.models.embeddings import TIME_FEATURES, UNET_SLOT
from fastdiff.models.families import Family, family_of
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.teacher import prediction_type_of, scheduler_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


@dataclass(frozen=True)
class Student:
    """What is exported: a network, the pipeline it belongs in, and the sampler it was trained for.

    Args:
        pipeline: the teacher's pipeline, not changed; all components but network and scheduler are taken from it.
        network: a full module, or the base that carries the student's adapters.
        sampler: the trained sampler.
        adapters: role {adapter: scale}; empty when `network` itself is the student.
        component: the pipeline's name of the network, "unet" or "transformer".
        prediction_type: what the student predicts; None means what the teacher's scheduler says.
        schedule: what it was trained with, where the teacher's depends on the resolution; None means what the teacher's
            scheduler says.
        autoencoder: takes the place of the pipeline's own in a whole pipeline, such as a small and fast decoder.
    """

    pipeline: DiffusionPipeline
    network: nn.Module
    sampler: SamplerSpec
    adapters: Mapping[str, float] = field(default_factory=dict)
    component: str = "unet"
    prediction_type: str | None = None
    schedule: NoiseSchedule | None = None
    autoencoder: nn.Module | None = None

    @property
    def family(self) -> Family:
        """The family of the pipeline."""
        return family_of(type(self.pipeline).__name__)

    def scheduler(self) -> SchedulerMixin:
        """The stock scheduler with the trained times in its config."""
        config = scheduler_config(self.pipeline)
        kind = self.prediction_type or prediction_type_of(config)
        return self.sampler.build_scheduler(config, kind, self.schedule, self.family.gives_levels)

    def ignores_guidance(self) -> bool:
        """Whether a full export should switch the pipeline's guidance off: a UNet trained for unguided sampling."""
        config = self.network.config
        return self.component == "unet" and self.sampler.guidance_scale <= 1 and _may_embed_guidance(config)


def save_pipeline(
    student: Student, folder: str | Path, dtype: torch.dtype | None = None, guidance_free: bool | None = None
) -> Path:
    """Writes the student as a pipeline folder, aside and then renamed; safetensors only.

    Frozen weights are not copied in memory: the saved module refers to the network's own tensors, and only weights
    that an adapter changes (or a cast) are new.

    Args:
        student: what to write.
        folder: the folder to write; an earlier student there is replaced.
        dtype: storage of the network's weights; None keeps them as they are.
        guidance_free: add a guidance embedding of zeros, after which stock pipelines run no guidance whatever
            `guidance_scale` says, so that the user passes `num_inference_steps` only. None: where it applies.

    Raises:
        FileExistsError: if the folder holds something that is not a diffusers pipeline or an exported student.
        ValueError: if the sampler has no stock scheduler, or `guidance_free` does not apply to this network.
    """
    folder = Path(folder)
    check_replaceable(folder)
    with whole_folder(folder) as aside:
        write_pipeline(student, aside, dtype, guidance_free)
    return folder


def write_pipeline(
    student: Student, folder: Path, dtype: torch.dtype | None = None, guidance_free: bool | None = None
) -> None:
    """As `save_pipeline`, straight into a folder that the caller renames when more has been added to it."""
    scheduler = student.scheduler()
    if guidance_free is None:
        guidance_free = student.ignores_guidance()
    network = _bare_network(student, dtype, guidance_free)
    changed = {student.component: network, "scheduler": scheduler}
    if student.autoencoder is not None:
        changed["vae"] = student.autoencoder
    pipeline = _with_components(student.pipeline, changed)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        _forget_origin(path)


def check_replaceable(folder: Path) -> None:
    """Refuses to replace a folder of something else than an exported student.

    Raises:
        FileExistsError: naming the folder.
    """
    known = ("fastdiff.json", "model_index.json", "pytorch_lora_weights.safetensors")
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not any((folder / name).is_file() for name in known):
        raise FileExistsError(f"{folder} exists and is not an exported student; give another folder or remove it.")


def _forget_origin(path: Path) -> None:
    """Drops the folder a component was once loaded from, which diffusers and transformers write into configs."""
    if path.name not in ("model_index.json", "config.json"):
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _may_embed_guidance(config: Mapping[str, Any]) -> bool:
    return "time_cond_proj_dim" in config and config["time_cond_proj_dim"] is None


def _bare_network(student: Student, dtype: torch.dtype | None, guidance_free: bool) -> nn.Module:
    """The student's network without adapters, for saving: its tensors are those of `student_state`."""
    config = {key: value for key, value in dict(student.network.config).items() if not key.startswith("_")}
    state = student_state(student.network, student.adapters, dtype)
    if guidance_free:
        if not _may_embed_guidance(config):
            raise ValueError(
                f"guidance_free needs a UNet without a guidance embedding; {type(student.network).__name__} has "
                "its own or cannot have one. Pass guidance_free=False."
            )
        config["time_cond_proj_dim"] = TIME_FEATURES
        state[UNET_SLOT] = _zero_projection(state)
    with torch.device("meta"):
        network = type(student.network).from_config(config)
    network.load_state_dict(state, strict=True, assign=True)
    return network


def _zero_projection(state: Mapping[str, Tensor]) -> Tensor:
    first = state["time_embedding.linear_1.weight"]
    return torch.zeros(first.shape[1], TIME_FEATURES, dtype=first.dtype)


def _with_components(pipeline: DiffusionPipeline, changed: Mapping[str, Any]) -> DiffusionPipeline:
    """A pipeline of the same class and settings around the same component objects, some of them replaced.

    `DiffusionPipeline.from_pipe` would cast the shared components in place.
    """
    accepted = inspect.signature(type(pipeline).__init__).parameters
    settings = {
        key: value
        for key, value in pipeline.config.items()
        if key in accepted and key not in pipeline.components and not key.startswith("_")
    }
    return type(pipeline)(**{**pipeline.components, **settings, **changed})
