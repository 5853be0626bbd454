"""One network call instead of guidance's two (Meng et al. 2022, arXiv 2210.03142; LoRA: Golnari 2023, 2312.06899)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.losses import mse
from fastdiff.methods._guidance import GuidanceInput, check_range
from fastdiff.methods._trajectory import filled_indices, teacher_path
from fastdiff.methods.base import (
    Batch,
    Context,
    MethodInfo,
    Need,
    any_time,
    check_not_negative,
    check_positive,
)
from fastdiff.models.roles import TEACHER
from fastdiff.models.sampler import SamplerSpec


@dataclass(frozen=True)
class GuidanceDistillationConfig:
    """The usual guidance of SD1.5, fixed, which any student can bake in.

    Args:
        guidance_scale: w of the teacher.
        guidance_range: draw w per sample from this range and feed it to the student as an embedding (full students
            of UNets, whose pipelines embed it). None fixes `guidance_scale`.
        states: where x_t comes from: noised images, or the guided teacher's own trajectory from noise, which needs
            prompts only and shows the student the states that sampling will.
        num_inference_steps: steps of the student's sampler, and of the teacher's trajectory.
    """

    guidance_scale: float = 7.5
    guidance_range: tuple[float, float] | None = None
    states: Literal["data", "teacher"] = "data"
    num_inference_steps: int = 50

    def __post_init__(self) -> None:
        check_not_negative(guidance_scale=self.guidance_scale)
        check_positive(num_inference_steps=self.num_inference_steps)
        check_range(self)


class GuidanceDistillation(GuidanceInput):
    r"""The student's conditional prediction becomes the teacher's guided one, at every time.

        L = mean (S(x_t, t, c [, w]) - sg[T(x_t, t, null) + w (T(x_t, t, c) - T(x_t, t, null))])^2

    in the network's own prediction type; guidance is linear, so every type has the same optimum.
    """

    info = MethodInfo(
        name="guidance_distillation",
        title="Guidance distillation, full and as LoRA",
        family="trajectory",
        paper="On Distillation of Guided Diffusion Models",
        arxiv="2210.03142",
        needs="images",
        student_kinds=("lora", "full"),
        steps="as the teacher, half the calls",
    )
    Config = GuidanceDistillationConfig
    config: GuidanceDistillationConfig

    def needs(self) -> Need:
        return "prompts" if self.config.states == "teacher" else "images"

    def sampler(self) -> SamplerSpec:
        return SamplerSpec.trailing("ddim", self.config.num_inference_steps, guidance_scale=self.sampling_guidance)

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The regression on the guided prediction."""
        w = self.guidance(ctx)
        with torch.no_grad():
            x_t, t = self.state(batch, ctx, w)
            target = ctx.denoiser(x_t, t, batch.cond, TEACHER, batch.null, w).native
        return {"guidance": mse(ctx.denoiser(x_t, t, batch.cond, "student", **self.told(w)).native, target)}

    def state(self, batch: Batch, ctx: Context, w: float | Tensor) -> tuple[Tensor, Tensor]:
        """Noisy samples and their times."""
        schedule = ctx.denoiser.schedule
        if self.config.states == "data":
            t = any_time(ctx, "t")
            return schedule.add_noise(batch.images(), ctx.random.normal("eps", batch.latent_shape), t), t
        starts = self.sampler().timesteps
        last = ctx.random.shared_integer("t", 0, len(starts))
        z = ctx.random.normal("eps", batch.latent_shape)
        indices = filled_indices(starts[: last + 1], z)
        return teacher_path(z, indices, batch, ctx, w), schedule.time_of_index(indices[-1])
