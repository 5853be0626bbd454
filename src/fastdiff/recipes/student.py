"""A finished student: a folder, and the stock pipeline it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastdiff.export.lora import DIFFUSERS_FILE
from fastdiff.export.student import read_record
from fastdiff.models.teacher import Teacher


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
        return {"num_inference_steps": len(self.sampler), "guidance_scale": self.sampler.guidance_scale}

    def pipeline(self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Any:
        """A stock diffusers pipeline with the trained scheduler; a folder of LoRA files goes on its teacher."""
        return load_pipeline(self.folder, dtype, device)


def load_pipeline(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Any:
    """A pipeline from any pipeline folder, or from a folder of LoRA files and the teacher its `fastdiff.json` names.

    Args:
        folder: what `save_pretrained` or fastdiff wrote.
        dtype: of all weights.
        device: the GPU where there is one, if not given.

    Raises:
        FileNotFoundError: if the folder is neither.
    """
    folder = Path(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (folder / "model_index.json").is_file():
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    elif (folder / DIFFUSERS_FILE).is_file():
        pipeline = _on_teacher(folder, dtype)
    else:
        raise FileNotFoundError(
            f"{folder} holds neither model_index.json nor {DIFFUSERS_FILE}: give a pipeline folder or a student folder"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _on_teacher(folder: Path, dtype: torch.dtype) -> Any:
    record = read_record(folder)
    teacher = Teacher.from_pretrained(record.teacher["source"], revision=record.teacher.get("revision"), dtype=dtype)
    if teacher.identity()["fingerprint"] != record.teacher["fingerprint"]:
        raise ValueError(f"{record.teacher['source']} has other weights now than when {folder} was distilled from it")
    pipeline, scheduler = teacher.pipeline, teacher.pipeline.scheduler
    pipeline.scheduler = record.sampler.build_scheduler(scheduler.config, teacher.prediction_type)
    pipeline.load_lora_weights(str(folder), weight_name=DIFFUSERS_FILE, local_files_only=True)
    return pipeline
