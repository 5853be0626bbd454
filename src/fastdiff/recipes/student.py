"""A finished student: a folder, and the stock pipeline it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastdiff.diffusion.schedules import is_flow
from fastdiff.export.experts import EXPERTS_FILE, load_experts
from fastdiff.export.lora import DIFFUSERS_FILE
from fastdiff.export.student import RECORD_FILE, read_record
from fastdiff.models.absent import absent_parts
from fastdiff.models.families import family_of
from fastdiff.models.teacher import Teacher
from fastdiff.recipes.errors import RecipeError


class Student:
    """What `distill` returns.

    Args:
        folder: a student folder, with its `fastdiff.json`.

    Attributes:
        record: what `fastdiff.json` says.
        kind: "lora" or "full".
        sampler: the sampler the student was trained for.

    Raises:
        FileNotFoundError: if the folder is not a student.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.record = read_record(self.folder)
        self.kind = self.record.kind
        self.sampler = self.record.sampler

    def __repr__(self) -> str:
        return f"Student({str(self.folder)!r}, {self.record.method}, {self.kind}, {len(self.sampler)} steps)"

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call: the trained number of steps and the guidance the student wants."""
        return self.sampler.call_arguments() | {"guidance_scale": self.sampler.guidance_scale}

    def levels_of(self, steps: int) -> dict[str, list[float]]:
        """The `sigmas` to pass for another number of steps than the trained one; nothing where the scheduler has them.

        The scheduler must be that of `pipeline(num_inference_steps=steps)`.
        """
        path = self.folder / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {"sigmas": self.sampler.levels_of(steps)} if is_flow(config) else {}

    def pipeline(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        num_inference_steps: int | None = None,
    ) -> Any:
        """A stock diffusers pipeline with the trained scheduler; see `load_pipeline`."""
        return load_pipeline(self.folder, dtype, device, num_inference_steps)


def call_settings(folder: str | Path, steps: int | None = None, guidance_scale: float | None = None) -> dict[str, Any]:
    """Arguments of a pipeline's call: what is given, else what the student in `folder` was trained for.

    A folder that is no student is not guided unless `guidance_scale` is given.

    Raises:
        FileNotFoundError: if there is no such folder.
        RecipeError: if the folder is no student and no number of steps is given, if that is below 1, or if the student
            has no other number of steps than its own.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give a pipeline folder or a student folder")
    student = Student(folder) if (folder / RECORD_FILE).is_file() else None
    call = student.call if student else {"guidance_scale": 0.0}
    given = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    call |= {name: value for name, value in given.items() if value is not None}
    if call.get("num_inference_steps", 0) < 1:
        found = f"got {steps}" if steps is not None else f"and {folder} is no student that knows it"
        raise RecipeError(f"--num_inference_steps must be at least 1, {found}")
    if student and student.sampler.own_steps_only and call["num_inference_steps"] != len(student.sampler):
        raise RecipeError(
            f"{folder} was told where each of its {len(student.sampler)} steps ends, and that is part of its weights now: "
            f"leave --num_inference_steps out, or export the run again for {steps} steps (`fastdiff export --help`)"
        )
    if student and call["num_inference_steps"] != len(student.sampler):
        call.pop("sigmas", None)
        call |= student.levels_of(call["num_inference_steps"])
    return call


def load_pipeline(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    num_inference_steps: int | None = None,
) -> Any:
    """A pipeline from any pipeline folder, or from a folder of LoRA files and the teacher its `fastdiff.json` names.

    Args:
        folder: what `save_pretrained` or fastdiff wrote.
        dtype: of all weights.
        device: the GPU where there is one, if not given.
        num_inference_steps: steps it is going to make, if not those the student was trained for; see `call_settings`.

    Raises:
        FileNotFoundError: if the folder is neither.
    """
    folder = Path(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (folder / "model_index.json").is_file():
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, **absent_parts(folder)
        )
    elif (folder / DIFFUSERS_FILE).is_file():
        pipeline = _on_teacher(folder, dtype)
    else:
        raise FileNotFoundError(
            f"{folder} holds neither model_index.json nor {DIFFUSERS_FILE}: give a pipeline folder or a student folder"
        )
    family_of(type(pipeline).__name__).prepare(pipeline)
    if num_inference_steps is not None:
        _unstretch(pipeline, folder, num_inference_steps)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _unstretch(pipeline: Any, folder: Path, steps: int) -> None:
    """Some schedulers of flow students stretch any levels to end at the last trained one; of other numbers it is not."""
    config = pipeline.scheduler.config
    student = Student(folder) if (folder / RECORD_FILE).is_file() else None
    if student and steps != len(student.sampler) and config.get("shift_terminal"):
        pipeline.scheduler = type(pipeline.scheduler).from_config(config, shift_terminal=None)


def _on_teacher(folder: Path, dtype: torch.dtype) -> Any:
    record = read_record(folder)
    own = {name: record.teacher.get(name) for name in ("revision", "variant")}
    teacher = Teacher.from_pretrained(record.teacher["source"], **own, dtype=dtype)
    if teacher.identity()["fingerprint"] != record.teacher["fingerprint"]:
        raise ValueError(f"{record.teacher['source']} has other weights now than when {folder} was distilled from it")
    pipeline = teacher.pipeline
    pipeline.scheduler = _saved_scheduler(folder / "scheduler")
    if (folder / EXPERTS_FILE).is_file():
        load_experts(pipeline, folder, teacher.family.network_name)
    else:
        pipeline.load_lora_weights(str(folder), weight_name=DIFFUSERS_FILE, local_files_only=True)
    return pipeline


def _saved_scheduler(folder: Path) -> Any:
    import diffusers

    name = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder)
