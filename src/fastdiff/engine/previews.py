"""Pictures on disk while training: teacher and student from the same prompts and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.randomness import Randomness
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.sampler import SamplerSpec, sample

if TYPE_CHECKING:
    from fastdiff.engine.trainer import Trainer

PREVIEW_STEP = -1
"""Previews draw their noise as step -1 of the run, so that they never meet training noise."""


@torch.no_grad()
def sample_role(
    trainer: Trainer, cond: Conditioning, spec: SamplerSpec, role: str = "student", first_index: int = 0
) -> Tensor:
    """Clean latents `(B, C, H, W)` of a role with a sampler, from noise fixed by the run's seed and `first_index`."""
    denoiser = trainer.networks.denoiser
    indices = torch.arange(first_index, first_index + len(cond), device=trainer.device)
    random = Randomness(trainer.settings.seed, PREVIEW_STEP % 2**32, indices)
    shape = trainer.batches.latent_shape
    inputs = trainer.method.sampling_inputs(denoiser, len(cond), trainer.device)
    served_by = iter(trainer.method.experts() if role == "student" else ())

    def predict(x_t: Tensor, t: Tensor, s: Tensor) -> Prediction:
        told = inputs | trainer.method.step_inputs(denoiser, t, s) if role == "student" else {}
        return denoiser(x_t, t, cond, next(served_by, role), **told)

    return sample(
        spec, predict, random.normal("0", shape), lambda k: random.normal(str(k + 1), shape), denoiser.schedule
    )


class Previews:
    """A hook that writes `previews/<label>.png`: one row for the teacher's deterministic samples, one for the student.

    Args:
        prompts: what to show, at most eight.
        teacher_steps: DDIM steps of the teacher's row, which is sampled once.
    """

    def __init__(self, prompts: Sequence[str], teacher_steps: int = 25) -> None:
        self.prompts = list(prompts)[:8]
        self.teacher_steps = teacher_steps
        self._teacher_row: Tensor | None = None

    def __call__(self, trainer: Trainer, label: str) -> None:
        if not self.prompts or not (trainer.is_main or trainer.networks.sharded):
            return
        cond = trainer.teacher.encode(self.prompts, trainer.batches.resolution).to(trainer.device)
        if self._teacher_row is None:
            spec = SamplerSpec.trailing("ddim", self.teacher_steps, trainer.networks.denoiser.schedule.indices - 1)
            self._teacher_row = decoded(trainer, sample_role(trainer, cond, spec, "teacher"))
        with trainer.student.evaluated():
            latents = sample_role(trainer, cond, trainer.method.sampler())
        rows = [self._teacher_row, decoded(trainer, latents)]
        if trainer.is_main:
            write_grid(trainer.folder / "previews" / f"{label}.png", rows)


@torch.no_grad()
def decoded(trainer: Trainer, latents: Tensor) -> Tensor:
    """Images, one at a time: a decoder at 1024 pixels needs gigabytes for each, which would be the peak of the run."""
    return torch.cat([trainer.teacher.decode(latent[None]) for latent in latents])


def write_grid(path: Path, rows: Sequence[Tensor], scale_to: int = 64) -> None:
    """Writes images in [-1, 1], one row a tensor `(B, 3, H, W)`; small ones are enlarged without smoothing."""
    from torchvision.utils import make_grid, save_image

    images = torch.cat([row.float().cpu() for row in rows]).add(1).div(2).clamp(0, 1)
    factor = max(1, math.ceil(scale_to / images.shape[-1]))
    images = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial.png")
    save_image(make_grid(images, nrow=len(rows[0]), padding=2, pad_value=1.0), aside)
    aside.replace(path)
