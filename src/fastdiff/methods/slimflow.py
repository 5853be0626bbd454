"""SlimFlow: rectified flows for small students (Zhu et al. 2024, arXiv 2407.12718)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.steps import jump
from fastdiff.diffusion.tensors import broadcast_to
from fastdiff.methods._flow_map import noise_share, time_of_share
from fastdiff.methods._straight import MARGIN
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, MethodInfo, check_not_negative, check_positive
from fastdiff.methods.rectified_flow import RectifiedFlow, RectifiedFlowConfig

GUIDE = "guide"
_OF_GUIDE = ("guided_weight", "first_step", "min_elapsed", "max_elapsed")


@dataclass(frozen=True)
class SlimFlowConfig(RectifiedFlowConfig):
    """Defaults are those of the public code for small images, but for its perceptual distance in `distill`
    (`perceptual_weight`), which needs a scorer, and its smaller network (`student_width` and the like).

    Args:
        anneal_steps: steps until the noise of the pairs has replaced random noise.
        anneal: how its share falls: `linear`, or `cosine`.
        flip_pairs: mirror noise and sample of a pair together, at random (latents of an autoencoder are mirrored only
            roughly by this; leave it out there).
        guided_weight: weight of the flow-guided term of the distillation; 0 leaves the regression on pairs.
        first_step: who goes the first part of the guide's two steps: the `student` (public code) or the `guide` (the
            paper's text).
        min_elapsed, max_elapsed: range of the length of that part, of a whole of 1 from the start to the clean end.
    """

    anneal_steps: int = 300_000
    anneal: Literal["linear", "cosine"] = "linear"
    flip_pairs: bool = True
    guided_weight: float = 1.0
    first_step: Literal["student", "guide"] = "student"
    min_elapsed: float = 0.2
    max_elapsed: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(anneal_steps=self.anneal_steps)
        check_not_negative(guided_weight=self.guided_weight)
        if not 0 <= self.min_elapsed <= self.max_elapsed <= 1:
            raise ValueError(
                f"min_elapsed and max_elapsed must be parts of 1 in order, got {self.min_elapsed}, {self.max_elapsed}"
            )
        if self.objective == "distill":
            refuse_unread(self, ("anneal", "anneal_steps"), "with the objective distill, which anneals nothing")
        else:
            refuse_unread(self, _OF_GUIDE, "with the objective reflow, which no guide helps")
        if self.objective == "distill" and self.num_inference_steps != 1:
            raise ValueError("flow-guided distillation makes a one-step student: leave num_inference_steps at 1")


class SlimFlow(RectifiedFlow):
    r"""Annealing reflow, then distillation that a two-step sample of the reflowed model guides.

        reflow:   z' = sqrt(1 - beta^2) z + beta z_new,  beta = max(0, 1 - step / anneal_steps); as reflow with z' for z
        distill:  L = d(x0_student(z, T), x0) + weight * d(x0_student(z_new, T), sg x0_guide(x_u, u)),
                  x_u = jump(student (or guide) at (z_new, T) -> u),   level of u uniform in 1 - [0.2, 0.8] of the start's

    At beta = 1 sample and noise are independent, which trains from scratch as flow matching does; at 0 it is reflow.
    With v = z - x0 and elapsed time tau = 1 - u the second term compares v_student(z, 1) with the public code's
    tau v_student + (1 - tau) v_guide(x_u, u), all detached: at t = 1 both differ from the clean samples by z. The guide
    is the earlier, reflowed run, given as init_from; the student starts from it too, and both have its size.
    """

    info = MethodInfo(
        name="slimflow",
        title="SlimFlow (annealing reflow, flow-guided distillation)",
        family="trajectory",
        paper="SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow",
        arxiv="2407.12718",
        needs="pairs",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = SlimFlowConfig
    config: SlimFlowConfig

    def frozen(self) -> Mapping[str, str]:
        return {GUIDE: "student"} if self.config.objective == "distill" and self.config.guided_weight else {}

    def inherits(self) -> Mapping[str, tuple[str, ...]] | None:
        return {name: ("student",) for name in ("student", *self.frozen())} if self.frozen() else super().inherits()

    def coupled(self, batch: Batch, ctx: Context) -> tuple[Tensor, Tensor]:
        noise, x0 = batch.pairs()
        if self.config.flip_pairs:
            mirror = broadcast_to(ctx.random.bernoulli("flip", 0.5), x0)
            noise, x0 = (torch.where(mirror, one.flip(-1), one) for one in (noise, x0))
        if self.config.objective == "distill":
            return noise, x0
        beta = self.beta(ctx.step)
        fresh = ctx.random.normal("anneal/noise", batch.latent_shape)
        return math.sqrt(1 - beta**2) * noise + beta * fresh, x0

    def beta(self, step: int) -> float:
        """Amplitude of fresh noise at a step."""
        share = min(1.0, step / self.config.anneal_steps)
        return 1 - share if self.config.anneal == "linear" else math.cos(math.pi / 2 * share)

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The terms of the objective."""
        terms = dict(super().student_loss(batch, ctx))
        if self.frozen():
            terms["flow_guided"] = self.config.guided_weight * self._guided(batch, ctx)
        return terms

    def _guided(self, batch: Batch, ctx: Context) -> Tensor:
        z = ctx.random.normal("guided/noise", batch.latent_shape)
        start, schedule = self.start(z, ctx), ctx.denoiser.schedule
        student = ctx.denoiser(z, start, batch.cond, "student")
        clean = student.x0  # before no_grad: predictions remember what they have converted
        with torch.no_grad():
            first = student if self.config.first_step == "student" else ctx.denoiser(z, start, batch.cond, GUIDE)
            span = self.config.max_elapsed - self.config.min_elapsed
            left = 1 - self.config.min_elapsed - span * ctx.random.uniform("guided/elapsed")
            share = left.clamp_min(MARGIN) * noise_share(schedule, start)
            u = time_of_share(schedule, share).clamp_min(schedule.t_min).minimum(start)
            target = ctx.denoiser(jump(first, u), u, batch.cond, GUIDE).x0
        return sum(self.clean_terms(clean, target, ctx).values())
