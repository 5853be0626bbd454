"""A number to compare checkpoints of one run by; never a result, and never made with what results are measured by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff.diffusion.randomness import Randomness
from fastdiff.engine.previews import PREVIEW_STEP, sample_role
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.sampler import SamplerSpec

if TYPE_CHECKING:
    from fastdiff.engine.trainer import Trainer

_TIME = 0.25
"""Where on the schedule features are read: noisy enough to look at shapes, clean enough to see detail."""


class FeatureMoments:
    """Squared distance between means and standard deviations of the teacher's own middle features, student against
    teacher samples of the same prompts.

    Args:
        prompts: what to sample; 64 are enough to tell a collapsing student from an improving one.
        teacher_steps: deterministic steps of the teacher's samples, which are made once.
        batch_size: samples at a time.
    """

    def __init__(self, prompts: Sequence[str], teacher_steps: int = 25, batch_size: int = 16) -> None:
        self.prompts = list(prompts)
        self.teacher_steps = teacher_steps
        self.batch_size = batch_size
        self._target: Tensor | None = None

    def __call__(self, trainer: Trainer) -> float:
        """The distance of the student as it is now, with averaged weights where the run has them."""
        if self._target is None:
            last = trainer.networks.denoiser.schedule.indices - 1
            spec = SamplerSpec.trailing("ddim", self.teacher_steps, last)
            # Other noise than the student's: the two sets are then compared as sets, not pair by pair.
            self._target = self._moments(trainer, spec, "teacher", first_index=len(self.prompts))
        found = self._moments(trainer, trainer.method.sampler(), "student", first_index=0)
        return float((found - self._target).square().mean())

    @torch.no_grad()
    def _moments(self, trainer: Trainer, spec: SamplerSpec, role: str, first_index: int) -> Tensor:
        features = []
        for start in range(0, len(self.prompts), self.batch_size):
            prompts = self.prompts[start : start + self.batch_size]
            cond = trainer.teacher.encode(prompts, trainer.batches.resolution).to(trainer.device)
            latents = sample_role(trainer, cond, spec, role, first_index + start)
            features.append(self._features(trainer, latents, cond, first_index + start))
        rows = torch.cat(features)
        return torch.cat([rows.mean(0), rows.std(0, correction=0)])

    @staticmethod
    def _features(trainer: Trainer, latents: Tensor, cond: Conditioning, first_index: int) -> Tensor:
        denoiser = trainer.networks.denoiser
        indices = torch.arange(first_index, first_index + len(latents), device=latents.device)
        noise = Randomness(trainer.settings.seed, PREVIEW_STEP % 2**32, indices).normal(
            "validation", latents.shape[1:]
        )
        index = round(_TIME * denoiser.schedule.indices)
        t = denoiser.schedule.time_of_index(torch.full((len(latents),), float(index), device=latents.device))
        x_t = denoiser.schedule.add_noise(latents, noise, t)
        taps = tuple(denoiser.family.middle_taps(denoiser.roles.network("teacher")))
        features = denoiser.features(x_t, t, cond, "teacher", taps)
        return torch.cat([one.float().flatten(2).mean(2) for one in features], dim=1)
