"""MeanFlow as a distillation: average velocities of the teacher's trajectory (Geng et al. 2025, arXiv 2505.13447)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import CLEAN_INDEX
from fastdiff.methods._flow_map import (
    EndTold,
    adaptive_distance,
    average_velocity,
    check_adaptive,
    end_input,
    moved_share,
    noise_share_rate,
)
from fastdiff.methods.base import (
    Batch,
    Context,
    MethodInfo,
    check_falling,
    check_not_negative,
    check_positive,
    log_normal_time,
    time_at,
)
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import TEACHER
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.tangents import Point, Tangent, Tangents, ode_direction


@dataclass(frozen=True)
class MeanFlowConfig:
    """Defaults are those of the paper's ImageNet runs, which distil no text-to-image model, but for `norm_constant`.

    Args:
        guidance_scale: w of the teacher, 1 means none; the student bakes it in.
        timesteps: the student's times, noisiest first.
        time_mean, time_std: of ln(sigma / alpha), which is normal; the logit-normal law of the paper.
        instant_share: share of samples whose jump has no length, where the teacher's velocity itself is the target.
        clean_share: share of samples whose jump ends at the clean image, as one-step sampling does (AnyFlow, arXiv
            2605.13724, takes a quarter); the paper has none.
        sampling: `renoise` jumps to the clean end at every step and adds fresh noise, which stock schedulers do at any
            number of steps; `jump` goes from time to time as the paper does: the export makes each step's end part of
            the network, and stock DDIM runs it at `timesteps` only.
        norm_power: each sample's loss is divided by its own value to this power, without gradient; 0 is plain.
        norm_constant: added to the value first. Here the value is a mean over a sample's numbers, in the paper their
            sum: the paper's 1e-3 would be 1e-3 over the count of numbers here, so that the default normalises less.
        tangent_chord: if above zero, the student's rate of change is taken over so many indices of time, not at one:
            for networks whose time embedding turns fast, as Stable Diffusion's does (`fastdiff.models.tangents`).
    """

    guidance_scale: float = 1.0
    timesteps: tuple[int, ...] = (999,)
    time_mean: float = -0.4
    time_std: float = 1.0
    instant_share: float = 0.75
    clean_share: float = 0.0
    sampling: Literal["renoise", "jump"] = "renoise"
    norm_power: float = 1.0
    norm_constant: float = 1e-3
    tangent_chord: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(guidance_scale=self.guidance_scale, tangent_chord=self.tangent_chord)
        check_positive(time_std=self.time_std)
        check_adaptive(self.norm_power, self.norm_constant)
        check_falling(self.timesteps)
        if not (self.instant_share >= 0 and self.clean_share >= 0 and self.instant_share + self.clean_share <= 1):
            raise ValueError(
                "instant_share and clean_share must be shares of the samples, together at most 1, got "
                f"{self.instant_share} and {self.clean_share}"
            )


class MeanFlow(EndTold):
    r"""Learns the velocity that, held from t to s, leads where the guided teacher's trajectory leads.

    In flow coordinates (share a = sigma / (alpha + sigma), x / (alpha + sigma); any process, see `_flow_map`) the
    average velocity u(x_t, t, s) = (x_t - x_s) / (a_t - a_s) obeys u = v - (a_t - a_s) du/da along the ODE, so

        L = |u - sg[v - (a_t - a_s) du/da]|^2 / sg(|.|^2 + c)^p,   du/da along (x, t, s) : (v, 1, 0),

    with v the guided teacher's velocity at (x_t, t), not the paper's eps - x0: the target then has no variance, and at
    the exact map the loss is zero. Where s = t it is the regression of the teacher. `s` is a new, zero-initialised
    input, so that the untrained student is the teacher.
    """

    info = MethodInfo(
        name="meanflow",
        title="MeanFlow distillation",
        family="trajectory",
        paper="Mean Flows for One-step Generative Modeling",
        arxiv="2505.13447",
        needs="images",
        student_kinds=("full",),
        steps="1-8",
    )
    Config = MeanFlowConfig
    config: MeanFlowConfig

    def __init__(self, config: MeanFlowConfig) -> None:
        super().__init__(config)
        self.tangents = Tangents(chord=config.tangent_chord)

    def sampler(self) -> SamplerSpec:
        if self.config.sampling == "renoise":
            return SamplerSpec("lcm", self.config.timesteps)
        return SamplerSpec("ddim", self.config.timesteps, tells_end=True)

    def sampling_inputs(self, denoiser: Denoiser, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        return super().sampling_inputs(denoiser, batch_size, device) if self.config.sampling == "renoise" else {}

    def step_inputs(self, denoiser: Denoiser, t: Tensor, s: Tensor) -> dict[str, Tensor]:
        return {} if self.config.sampling == "renoise" else end_input(denoiser.schedule, s)

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The identity's residual on one interval a sample."""
        config = self.config
        t, s = self.interval(ctx)
        x_t = ctx.denoiser.schedule.add_noise(batch.images(), ctx.random.normal("eps", batch.latent_shape), t)
        u, target, finite = self.sides(x_t, t, s, batch, ctx)
        return {"average_velocity": adaptive_distance(u, target, config.norm_power, config.norm_constant, finite)}

    def sides(self, x_t: Tensor, t: Tensor, s: Tensor, batch: Batch, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """The student's average velocity, what it should be (detached), and which samples count."""
        schedule = ctx.denoiser.schedule
        with torch.no_grad():
            teacher = ctx.denoiser(x_t, t, batch.cond, TEACHER, batch.null, self.config.guidance_scale)
        found = self.tangent(teacher, s, batch, ctx)
        u = average_velocity(ctx.denoiser(x_t, t, batch.cond, "student", **end_input(schedule, s)))
        return u, teacher.flow - moved_share(schedule, t, s, u) * found.derivative, found.finite

    def interval(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """Where jumps begin and end, `(B,)` each."""
        config = self.config
        one, other = (log_normal_time(ctx, site, config.time_mean, config.time_std) for site in ("one", "other"))
        t, s = torch.maximum(one, other), torch.minimum(one, other)
        kind = ctx.random.uniform("kind")
        s = torch.where(kind < config.instant_share, t, s)
        clean = time_at(CLEAN_INDEX, t, ctx.denoiser.schedule).to(t.dtype)
        return t, torch.where(kind > 1 - config.clean_share, clean, s)

    def tangent(self, teacher: Prediction, s: Tensor, batch: Batch, ctx: Context) -> Tangent:
        """The student's average velocity and its rate along the teacher's ODE, the end held."""
        schedule = teacher.schedule
        along = ode_direction(teacher, noise_share_rate(schedule, teacher.t))
        return self.tangents(
            ctx.denoiser,
            batch.cond,
            "student",
            Point(teacher.x_t, teacher.t, s),
            along,
            average_velocity,
            lambda end: end_input(schedule, end),
        )
