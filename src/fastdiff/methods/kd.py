"""Regression on the teacher's solutions of its probability-flow ODE (Luhman & Luhman 2021, arXiv 2101.02388)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.diffusion.grids import trailing_grid
from fastdiff.diffusion.schedules import CLEAN_INDEX
from fastdiff.methods._straight import Straight, StraightConfig
from fastdiff.methods._trajectory import filled_indices, teacher_path
from fastdiff.methods.base import Batch, Context, MethodInfo, Need, check_not_negative


@dataclass(frozen=True)
class KDConfig(StraightConfig):
    """A one-step student.

    Args:
        online_steps: DDIM steps of the teacher from noise of each step's own, in place of stored pairs; 0 reads pairs.
            Cheaper than stored pairs only if each prompt is seen a few times: a store is solved once and read often.
        guidance_scale: w of that teacher; pairs have theirs.
    """

    online_steps: int = 0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(online_steps=self.online_steps, guidance_scale=self.guidance_scale)
        if self.guidance_scale != 1 and not self.online_steps:
            raise ValueError("guidance_scale is of online_steps; stored pairs were guided when they were made")
        if self.num_inference_steps != 1:
            raise ValueError(
                "kd makes a one-step student, since pairs hold no points in between: leave num_inference_steps at 1, "
                "or use rectified_flow with the objective distill"
            )


class KD(Straight):
    r"""Regresses the student's clean prediction on the teacher's sample from the same noise.

        L = d(x0_student(z, T), x0),   x0 = the teacher's deterministic sample from z,

    (by as many steps as the pairs were made with, or `online_steps`), plus, if weighted, the perceptual distance of the
    decoded samples. With plain squares the student blurs where it cannot follow the teacher; on a linear teacher the
    regression is exact. It is trained at the first level only: pairs hold no points of the path in between, at which
    other implementations regress the same sample to serve several steps; `rectified_flow` and the consistency methods
    make students of several steps.
    """

    info = MethodInfo(
        name="kd",
        title="ODE-pair regression (knowledge distillation)",
        family="trajectory",
        paper="Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed",
        arxiv="2101.02388",
        needs="pairs",
        student_kinds=("lora", "full"),
        steps="1",
    )
    Config = KDConfig
    config: KDConfig

    def needs(self) -> Need:
        return "prompts" if self.config.online_steps else "pairs"

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """One call of the student at the start."""
        noise, x0 = self._solved(batch, ctx) if self.config.online_steps else batch.pairs()
        return self.clean_terms(ctx.denoiser(noise, self.start(noise, ctx), batch.cond, "student").x0, x0, ctx)

    @torch.no_grad()
    def _solved(self, batch: Batch, ctx: Context) -> tuple[Tensor, Tensor]:
        """Noise and what the guided teacher makes of it."""

        noise = ctx.random.normal("online/noise", batch.latent_shape)
        return noise, teacher_path(noise, self._times(noise), batch, ctx, self.config.guidance_scale)

    def _times(self, like: Tensor) -> list[Tensor]:
        """The indices of the teacher's steps and the clean end, `(B,)` each."""
        # The grid of stored pairs: it begins at 999 also where the steps do not divide 1000.
        starts = [start for start, _ in trailing_grid(self.config.online_steps)]
        return filled_indices((*starts, CLEAN_INDEX), like)
