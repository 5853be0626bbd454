"""From a trainer to a student folder that has been loaded back and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import export
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.engine import Trainer
from fastdiff.engine.previews import decoded, sample_role, write_grid
from fastdiff.models.absent import absent_parts
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.embeddings import with_fixed_input, with_input_at_times
from fastdiff.models.quantizing import exact_weights
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.teacher import Teacher, scheduler_config
from fastdiff.models.timestep_slot import time_sinusoids
from fastdiff.recipes.options import HubOptions
from fastdiff.recipes.recipe import Recipe
from fastdiff.recipes.student import Student

logger = logging.getLogger(__name__)

PROBE_PROMPTS = ("a photo", "a drawing of a house")
"""What the loaded student and the trainer's are compared on; any prompts do."""
GRID_PROMPTS = 8


def export_run(
    trainer: Trainer,
    recipe: Recipe,
    folder: Path,
    prompts: Sequence[str] = (),
    pipeline: bool = True,
    autoencoder: nn.Module | None = None,
) -> Student:
    """Writes the student, loads it back with stock diffusers and compares; the folder appears whole or not at all.

    All processes call it: they gather what is sharded, and then wait while the main one works alone.

    Args:
        trainer: the run; its averaged weights are exported if it has them.
        recipe: goes into `fastdiff.json` and the card.
        folder: the student folder; an earlier student there is replaced.
        prompts: of the card's sample grid.
        pipeline: False writes a LoRA student's LoRA files only.
        autoencoder: of the whole pipeline, if not the teacher's.

    Raises:
        ValueError: if a LoRA is asked of a full student, or one folder of several full students.
        LoadBackError: if stock diffusers does not give the trained student back; nothing is left then.
        OSError: if the folder cannot be written.
    """
    with _whole_student(trainer):
        if trainer.is_main:
            _export(trainer, recipe, folder, prompts, pipeline, autoencoder)
    trainer.accelerator.wait_for_everyone()
    return Student(folder)


@contextlib.contextmanager
def _whole_student(trainer: Trainer) -> Iterator[None]:
    """Inside, the student has its averaged weights, and the main process holds it and the teacher whole."""
    with (
        trainer.student.evaluated(),
        _exact_base(trainer),
        trainer.networks.whole(trainer.is_main, "student") as copies,
        trainer.teacher.replaced(copies),
    ):
        yield


def _export(
    trainer: Trainer,
    recipe: Recipe,
    folder: Path,
    prompts: Sequence[str],
    pipeline: bool,
    autoencoder: nn.Module | None,
) -> None:
    with tempfile.TemporaryDirectory(prefix=".export-", dir=trainer.folder) as scratch:
        options = _options(trainer, recipe, pipeline)
        if prompts:
            options = _with_samples(trainer, options, prompts, Path(scratch))
        student = dataclasses.replace(trained_student(trainer), autoencoder=autoencoder)
        export.export_student(
            folder,
            student,
            trainer.teacher,
            _record(trainer, recipe, student),
            _predict(trainer),
            trainer.teacher.encode(PROBE_PROMPTS, trainer.batches.resolution).to(dtype=torch.float32),
            lambda: fresh_pipeline(trainer.teacher, student, Path(scratch)),
            options,
            _experts(trainer),
        )


def prove_export(trainer: Trainer, recipe: Recipe) -> None:
    """Exports the untrained student aside, loads it back and removes it, so that no run fails at its end."""
    scratch = trainer.folder / ".export-check"
    try:
        student = export_run(trainer, recipe, scratch)
        trainer.accelerator.wait_for_everyone()  # all have looked at it
    finally:
        if trainer.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
    if trainer.is_main:
        error = student.record.load_back["max_error"]
        logger.info("the untrained student exports and loads back in stock diffusers (error %.1e)", error)


def trained_student(trainer: Trainer) -> export.Student:
    """The student as the export room wants it."""
    roles, sampler, network = (
        trainer.networks.roles,
        trainer.method.sampler(),
        trainer.networks.roles.network("student"),
    )
    told = trainer.method.sampling_inputs(trainer.networks.denoiser, 1, trainer.device).get("timestep_cond")
    if told is not None and sampler.guidance_scale <= 1:  # above it, the input is the guidance that pipelines embed
        network = with_fixed_input(network, told)
    family, schedule = trainer.teacher.family, trainer.networks.denoiser.schedule
    if sampler.tells_end:
        network = with_input_at_times(network, *_told_steps(trainer))
        sampler = dataclasses.replace(sampler, tells_end=False, own_steps_only=True)
    if family.embeds_guidance(network):
        sampler = dataclasses.replace(sampler, guidance_scale=family.own_guidance)
    return export.Student(
        pipeline=trainer.teacher.pipeline,
        network=network,
        sampler=sampler.storable(scheduler_config(trainer.teacher.pipeline), schedule, family.gives_levels),
        adapters={"student": 1.0} if roles.is_adapter("student") else {},
        component=family.network_name,
        schedule=schedule,
    )


def _told_steps(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Sinusoids of each step's time as the student makes them, `(N, channels)`, and what it is told there, `(N, n)`."""
    denoiser, teacher, resolution = trainer.networks.denoiser, trainer.teacher, trainer.batches.resolution
    times, ends = _times_and_ends(trainer.method.sampler(), denoiser.schedule, trainer.device)
    told = trainer.method.step_inputs(denoiser, times, ends)["timestep_cond"]
    x = torch.zeros(len(times), *teacher.latent_shape(resolution), device=trainer.device)
    cond, predict = teacher.null(resolution).to(trainer.device).expand(len(times)), _predict(trainer)
    return time_sinusoids(denoiser.roles.network("student"), lambda: predict(x, times, cond)), told


def _times_and_ends(sampler: SamplerSpec, schedule: NoiseSchedule, device: torch.device) -> tuple[Tensor, Tensor]:
    ends = [sampler.end_time(step, schedule) for step in range(len(sampler))]
    return torch.tensor(sampler.schedule_times(schedule), device=device), torch.tensor(ends, device=device)


def fresh_pipeline(teacher: Teacher, student: export.Student, scratch: Path) -> Any:
    """The teacher's pipeline anew: from where it came, or by way of a file if it was given as an object."""
    if teacher.source:
        return teacher.reloaded().pipeline
    from diffusers import DiffusionPipeline

    base = dataclasses.replace(student, network=teacher.network, adapters={})
    folder = export.save_pipeline(base, scratch / "teacher", guidance_free=False)
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent_parts(folder))


def _exact_base(trainer: Trainer) -> contextlib.AbstractContextManager:
    """Inside, a quantised base has its original weights again, which users of the student will have."""
    if trainer.settings.quantize_base == "none":
        return contextlib.nullcontext()
    teacher = trainer.teacher
    if not teacher.source:
        raise ValueError(
            "quantize_base needs a teacher that can be loaded again for the export: give its folder or Hub id, not a "
            "pipeline object"
        )
    exact = teacher.reloaded().network
    return exact_weights(trainer.networks.roles.base, exact)


def _record(trainer: Trainer, recipe: Recipe, student: export.Student) -> export.StudentRecord:
    return export.StudentRecord(
        method=trainer.method.info.name,
        kind="lora" if student.adapters else "full",
        teacher=trainer.teacher.identity(),
        sampler=student.sampler,
        recipe=recipe.to_dict(),
        effort=trainer.effort(),
    )


def _experts(trainer: Trainer) -> export.Experts | None:
    """The adapters of a student that is several."""
    by_step = trainer.method.experts()
    if set(by_step) == {"student"}:
        return None
    if not trainer.networks.roles.is_adapter("student"):
        raise ValueError(
            f"the student of this {trainer.method.info.name} run is {len(set(by_step))} full networks, and a pipeline "
            "folder holds one: train adapters (--student lora)"
        )
    return export.Experts(by_step, {role: _predict(trainer, role) for role in dict.fromkeys(by_step)})


def _predict(trainer: Trainer, role: str = "student") -> export.Predict:
    """The trainer's student, computed in the type its weights are stored in."""
    own, sampler = trainer.networks.denoiser, trainer.method.sampler()
    weight = next(own.roles.network(role).parameters())
    denoiser = Denoiser(own.roles, own.family, own.schedule, own.kind, weight.dtype)

    def predict(x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        inputs = trainer.method.sampling_inputs(denoiser, len(x_t), x_t.device)
        if sampler.tells_end:
            times, ends = _times_and_ends(sampler, denoiser.schedule, x_t.device)
            step = (times - t[:, None]).abs().argmin(dim=1)
            inputs |= trainer.method.step_inputs(denoiser, t, ends[step])
        return denoiser(x_t, t, cond, role, **inputs)

    return predict


def _options(trainer: Trainer, recipe: Recipe, pipeline: bool) -> export.ExportOptions:
    hub, teacher = recipe.build(HubOptions), trainer.teacher
    license = export.License(hub.license, hub.license_name, hub.license_link) if hub.license else None
    if license is None and teacher.source:
        license = export.teacher_license(teacher.source, teacher.revision, hub.hub_token)
    return export.ExportOptions(
        pipeline=pipeline and set(trainer.method.experts()) == {"student"},
        license=license,
        beside=trainer.method.export_files(),
        resolution=trainer.batches.resolution,
        repo_id=hub.hub_model_id or Path(recipe.values["output_dir"]).name,
    )


def _with_samples(
    trainer: Trainer, options: export.ExportOptions, prompts: Sequence[str], scratch: Path
) -> export.ExportOptions:
    cond = trainer.teacher.encode(list(prompts[:GRID_PROMPTS]), trainer.batches.resolution).to(trainer.device)
    write_grid(scratch / "grid.png", [decoded(trainer, sample_role(trainer, cond, trainer.method.sampler()))])
    return dataclasses.replace(options, grid=scratch / "grid.png", prompt=prompts[0])
