"""A whole student folder in one call: weights, record and card, kept only if all of it loads back."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.engine.files import whole_folder
from fastdiff.export.card import GRID_FILE, License, write_card
from fastdiff.export.experts import Experts, Predict, write_experts
from fastdiff.export.loadback import (
    HALF_TOLERANCES,
    TOLERANCE,
    LoadBackCheck,
    LoadBackReport,
    Probe,
    check_experts,
    check_lora,
    check_pipeline,
    make_probe,
)
from fastdiff.export.lora import LoraFiles, save_lora
from fastdiff.export.pipeline import Student, check_replaceable, write_pipeline
from fastdiff.export.student import StudentRecord, write_record
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.teacher import Teacher

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What goes into the folder.

    Args:
        pipeline: write the whole pipeline; a LoRA student may do without.
        network_dtype: storage of the pipeline's network; None keeps the weights' own.
        lora_dtype: storage of LoRA files.
        guidance_free: as in `save_pipeline`.
        tolerance: largest load-back error; None allows 1e-5, and what rounding needs where weights are in half precision.
        license, repo_id, datasets, prompt: as in `write_card`.
        grid: a picture to show on the card.
        beside: further files of tensors, by name, such as a router.
        resolution: pixels of the samples that are compared; None is the teacher's own size.
    """

    pipeline: bool = True
    network_dtype: torch.dtype | None = None
    lora_dtype: torch.dtype = torch.float32
    guidance_free: bool | None = None
    tolerance: float | None = None
    license: License | None = None
    repo_id: str = ""
    datasets: Sequence[str] = ()
    prompt: str = "a photo of a cat"
    grid: Path | None = None
    beside: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    resolution: int | None = None


def export_student(
    folder: str | Path,
    student: Student,
    teacher: Teacher,
    record: StudentRecord,
    predict: Callable[[Tensor, Tensor, Conditioning], Prediction],
    conditioning: Conditioning,
    fresh_pipeline: Callable[[], DiffusionPipeline],
    options: ExportOptions = ExportOptions(),
    experts: Experts | None = None,
) -> LoadBackReport:
    """Writes the student folder aside, loads everything back in stock diffusers, and only then renames it.

    Args:
        folder: the student folder; an earlier student in it is replaced.
        student: what to export.
        teacher: the teacher it was distilled from.
        record: content of `fastdiff.json`; the load-back report is added to it.
        predict: the trainer's own student, (x_t, t, conditioning) -> prediction, for the comparison.
        conditioning: a few prompts' worth, at `options.resolution`.
        fresh_pipeline: loads the teacher's pipeline anew (called once for each LoRA file, and not without adapters).
        options: what goes into the folder.
        experts: earlier adapters of a student that is several; there is no whole pipeline then.

    Raises:
        LoadBackError: if any file does not give the trained student back; the folder is not written then.
        FileExistsError: if the folder holds something else.
        ValueError: as `save_pipeline` and `save_lora`.
    """
    folder = Path(folder)
    check_replaceable(folder)
    if not (options.pipeline or student.adapters):
        raise ValueError(
            "a student of full weights has no LoRA form: export the whole pipeline (fastdiff export --format pipeline)."
        )
    if options.pipeline and experts is not None:
        raise ValueError("a student of several adapters has no whole pipeline: switch options.pipeline off.")
    if not (options.pipeline or student.family.loads_lora):
        raise ValueError(
            f"{type(student.pipeline).__name__} of diffusers loads no LoRA files: export the whole pipeline, with the "
            "adapter merged."
        )
    schedule = student.schedule or teacher.schedule
    shape = teacher.latent_shape(options.resolution or teacher.default_resolution)
    device = next(student.network.parameters()).device
    probe = make_probe(predict, conditioning, shape, student.sampler, schedule, teacher.family, device)
    with whole_folder(folder) as aside:
        files = _write_weights(aside, student, options)
        checks = []
        if options.pipeline:
            tolerance = _tolerance(options, options.network_dtype, student)
            checks.append(check_pipeline(aside, probe, student.sampler, teacher.family, tolerance))
        if files is not None:
            checks += _check_files(files, student, teacher, probe, fresh_pipeline, options)
        if experts is not None:
            checks += _write_checked_experts(aside, student, experts, teacher, conditioning, fresh_pipeline, options)
        report = LoadBackReport(tuple(checks)).require_ok()
        record = dataclasses.replace(record, load_back=report.to_dict())
        write_record(aside, record)
        for name, tensors in options.beside.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside / f"{name}.safetensors")
        if options.grid is not None:
            shutil.copyfile(options.grid, aside / GRID_FILE)
        write_card(
            aside,
            record,
            type(teacher.pipeline).__name__,
            options.license,
            repo_id=options.repo_id or folder.name,
            datasets=options.datasets,
            prompt=options.prompt,
        )
    return report


def _write_weights(folder: Path, student: Student, options: ExportOptions) -> LoraFiles | None:
    if options.pipeline:
        write_pipeline(student, folder, options.network_dtype, options.guidance_free)
    else:
        student.scheduler().save_pretrained(folder / "scheduler")
    family = student.family
    if not (student.adapters and family.loads_lora):
        return None
    return save_lora(
        folder, student.network, student.adapters, student.component, options.lora_dtype, family.kohya_file
    )


def _check_files(
    files: LoraFiles,
    student: Student,
    teacher: Teacher,
    probe: Probe,
    fresh_pipeline: Callable[[], DiffusionPipeline],
    options: ExportOptions,
) -> list:
    tolerance = _tolerance(options, options.lora_dtype, student)
    scheduler = student.scheduler()
    return [
        check_lora(path, fresh_pipeline, scheduler, probe, student.sampler, teacher.family, files.modules, tolerance)
        for path in files.paths()
    ]


def _write_checked_experts(
    folder: Path,
    student: Student,
    experts: Experts,
    teacher: Teacher,
    conditioning: Conditioning,
    fresh_pipeline: Callable[[], DiffusionPipeline],
    options: ExportOptions,
) -> list[LoadBackCheck]:
    """Every file by itself, as that of a single student, and then a pipeline that switches between them."""
    schedule = student.schedule or teacher.schedule
    shape = teacher.latent_shape(options.resolution or teacher.default_resolution)
    device = next(student.network.parameters()).device

    def probe(predict: Predict) -> Probe:
        return make_probe(predict, conditioning, shape, student.sampler, schedule, teacher.family, device)

    checks = []
    for name, files in write_experts(folder, student, experts, schedule, options.lora_dtype).items():
        own = probe(experts.predict[name])
        for check in _check_files(files, student, teacher, own, fresh_pipeline, options):
            checks.append(dataclasses.replace(check, name=f"{name}/{check.name}"))
    switched = probe(experts.in_turn(student.sampler, schedule))
    tolerance = _tolerance(options, options.lora_dtype, student)
    pipeline, scheduler = fresh_pipeline(), student.scheduler()
    return [*checks, check_experts(folder, pipeline, scheduler, switched, student.sampler, teacher.family, tolerance)]


def _tolerance(options: ExportOptions, stored: torch.dtype | None, student: Student) -> float:
    if options.tolerance is not None:
        return options.tolerance
    used = (stored, next(student.network.parameters()).dtype)
    return max([TOLERANCE, *(HALF_TOLERANCES[dtype] for dtype in used if dtype in HALF_TOLERANCES)])
