"""BOOT: data-free distillation by bootstrapping along the noise-fixed trajectory (Gu et al. 2023, arXiv 2306.05544)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.grids import lcm_grid
from fastdiff.diffusion.losses import mse
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import LAST_INDEX, NoiseSchedule, Terminal
from fastdiff.diffusion.tensors import DeviceTable
from fastdiff.methods._flow_map import EndTold, end_input
from fastdiff.methods.base import (
    Batch,
    Context,
    MethodInfo,
    check_not_negative,
    check_positive,
    time_at,
)
from fastdiff.models.roles import TEACHER
from fastdiff.models.sampler import SamplerSpec


@dataclass(frozen=True)
class BOOTConfig:
    """The paper does not give its values for text-to-image models in full; these are ours.

    Args:
        guidance_scale: w of the teacher, 1 means none; the student bakes it in.
        num_ddim_timesteps: points of the teacher's grid, a divisor of its 1000 indices.
        solver: the teacher's step from point to point: `euler` is DDIM, `midpoint` asks it once more, halfway.
        boundary_weight: weight of the regression of the teacher's first prediction, from which all else is built.
    """

    guidance_scale: float = 7.5
    num_ddim_timesteps: int = 50
    solver: Literal["euler", "midpoint"] = "euler"
    boundary_weight: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative(guidance_scale=self.guidance_scale, boundary_weight=self.boundary_weight)
        check_positive(num_ddim_timesteps=self.num_ddim_timesteps)


class BOOT(EndTold):
    r"""Predicts every point of the signal's trajectory from the noise alone, each from the one before it.

    The signal y_t = (x_t - sigma_t z) / alpha_t of the trajectory x_t that begins at noise z goes from the teacher's
    first clean prediction to the sample. The student y(z, t) is the x0 that its network predicts at (z, T), told t.
    With s the grid's next cleaner point, x_t = alpha_t y(z, t) + sigma_t z and r = (sigma_s / alpha_s) / (sigma_t /
    alpha_t),

        L = |y(z, s) - sg[r y(z, t) + (1 - r) x0_teacher(x_t, t)]|^2 / step^2
            + boundary_weight |y(z, T) - x0_teacher(z, T)|^2,        step = 1 / num_ddim_timesteps.

    The target is one DDIM step of the guided teacher (or, of y, one step of the midpoint rule). The network is fed z at time T whatever t is, so that
    the untrained student is the teacher's first prediction everywhere, and the trained one takes one stock step.
    """

    info = MethodInfo(
        name="boot",
        title="BOOT",
        family="trajectory",
        paper="BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping",
        arxiv="2306.05544",
        needs="prompts",
        student_kinds=("full",),
        steps="1",
    )
    Config = BOOTConfig
    config: BOOTConfig

    def __init__(self, config: BOOTConfig) -> None:
        super().__init__(config)
        grid = lcm_grid(config.num_ddim_timesteps, terminal=Terminal.CLEAN)
        self._pairs = DeviceTable(torch.tensor(grid, device="cpu"))

    def sampler(self) -> SamplerSpec:
        return SamplerSpec("lcm", (LAST_INDEX,))

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """One step of the trajectory a sample, and its beginning."""
        schedule = ctx.denoiser.schedule
        z = ctx.random.normal("z", batch.latent_shape)
        pairs = self._pairs.on(z.device)
        t, s = (schedule.time_of_index(i) for i in pairs[ctx.random.integers("pair", 0, len(pairs))].unbind(1))
        with torch.no_grad():
            target = self.next_point(z, self.point(z, t, batch, ctx), t, s, batch, ctx)
        terms = {"bootstrap": self.config.num_ddim_timesteps**2 * mse(self.point(z, s, batch, ctx), target)}
        if self.config.boundary_weight:
            terms["boundary"] = self.config.boundary_weight * self.boundary(z, batch, ctx)
        return terms

    def boundary(self, z: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """The trajectory begins at the teacher's first prediction."""
        last = time_at(LAST_INDEX, z, ctx.denoiser.schedule)
        with torch.no_grad():
            first = self.teacher(z, last, batch, ctx).x0
        return mse(self.point(z, last, batch, ctx), first)

    def point(self, z: Tensor, t: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """The student's y(z, t)."""
        schedule = ctx.denoiser.schedule
        return ctx.denoiser(z, time_at(LAST_INDEX, z, schedule), batch.cond, "student", **end_input(schedule, t)).x0

    def next_point(self, z: Tensor, y: Tensor, t: Tensor, s: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """y one solver step of the teacher further."""
        schedule = ctx.denoiser.schedule
        clean = self.teacher(noisy(y, z, t, schedule), t, batch, ctx).x0
        if self.config.solver == "midpoint":
            middle = ((t + s) / 2).clamp_min(schedule.t_min)
            halfway = mixed(y, clean, t, middle, schedule)
            clean = self.teacher(noisy(halfway, z, middle, schedule), middle, batch, ctx).x0
        return mixed(y, clean, t, s, schedule)

    def teacher(self, x_t: Tensor, t: Tensor, batch: Batch, ctx: Context) -> Prediction:
        """The guided teacher."""
        return ctx.denoiser(x_t, t, batch.cond, TEACHER, batch.null, self.config.guidance_scale)


def noisy(y: Tensor, z: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The trajectory's own point."""
    alpha, sigma = schedule.levels(t, y)
    return alpha * y + sigma * z


def mixed(y: Tensor, clean: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """r y + (1 - r) clean; finite where there is no signal at `t`, which is where r is 0."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.levels(t, y), schedule.levels(s, y)
    ratio = sigma_s * alpha_t / (alpha_s * sigma_t)
    return ratio * y + (1 - ratio) * clean
