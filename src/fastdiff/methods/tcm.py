"""Truncated consistency models, as a distillation (Lee et al. 2024, arXiv 2410.14895)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import LAST_INDEX, NoiseSchedule
from fastdiff.diffusion.steps import jump
from fastdiff.diffusion.tensors import broadcast_to
from fastdiff.methods.base import (
    Batch,
    Context,
    Method,
    MethodInfo,
    check_falling,
    check_not_negative,
    check_positive,
    time_at,
)
from fastdiff.models.denoiser import Ask
from fastdiff.models.roles import TEACHER
from fastdiff.models.sampler import SamplerSpec

FIRST = "first_stage"
_CURVE = 8.0  # k of easy consistency tuning: how much longer steps are at low noise
_NOISIEST = 80.0  # where a flow, which has no last level, is cut
_TABLE = 4096


@dataclass(frozen=True)
class TCMConfig:
    """Defaults are those of the paper's ImageNet-64 run, for images of any size.

    Args:
        guidance_scale: w of the teacher's step, 1 means none; the same as in the first stage.
        timesteps: the student's times, noisiest first, none below `truncation_index`.
        truncation_index: below it the first stage's student serves; sigma / alpha is 1 at 354 of Stable Diffusion.
        boundary_share: share of samples at the truncation itself, whose target is the first stage's alone.
        boundary_weight: weight of those.
        step_base, step_stage: q and a of easy consistency tuning: a step keeps about 1 - q^-(a+1) of sigma / alpha.
        longest_kept: most that a step may keep.
        huber_c: width of the quadratic part, for one element.
    """

    guidance_scale: float = 1.0
    timesteps: tuple[int, ...] = (999,)
    truncation_index: int = 354
    boundary_share: float = 0.25
    boundary_weight: float = 0.1
    step_base: float = 4.0
    step_stage: int = 3
    longest_kept: float = 0.9961
    huber_c: float = 5.4e-4

    def __post_init__(self) -> None:
        check_falling(self.timesteps)
        check_not_negative(guidance_scale=self.guidance_scale, boundary_weight=self.boundary_weight)
        check_not_negative(truncation_index=self.truncation_index, step_stage=self.step_stage)
        check_positive(huber_c=self.huber_c)
        if not 0 < self.boundary_share < 1 or not 0 < self.longest_kept < 1:
            raise ValueError(
                f"boundary_share and longest_kept must lie between 0 and 1, got {self.boundary_share} and "
                f"{self.longest_kept}"
            )
        if not self.step_base > 1:
            raise ValueError(f"step_base must be above 1, got {self.step_base}")
        if min(self.timesteps) < self.truncation_index:
            raise ValueError(
                f"timesteps {self.timesteps} go below truncation_index {self.truncation_index}, where this student is "
                "not trained"
            )


class TCM(Method):
    r"""A second stage of consistency distillation that spends the student on the noisy part of the trajectory alone.

    f is the clean prediction, f_1 the frozen student of the first stage (any consistency student, `init_from`), from
    which the trained one starts too. With kappa = sigma / alpha, r the end of a guided teacher's DDIM step from t,

        kappa_r / kappa_t = min(1 - q^-(a+1) (1 + 8 sigmoid(-kappa_t)), longest_kept),
        l = (1 + 1 / kappa_t^2) d(f(x_t, t), target),    d(x, y) = sqrt(mean (x - y)^2 + c^2) - c,
        target = sg f(x_r, r) if r is above the truncation, f_1(x_r, r) below it, and x_r itself, the teacher's clean
                 prediction, where a step keeps no noise (early stages of a small q).

    The loss is the mean of l over times above the truncation (ln kappa by Student's t of 0.01 degrees and scale 0.2,
    cut to what the teacher knows and to 80), plus boundary_weight times its mean at the truncation itself.
    """

    info = MethodInfo(
        name="tcm",
        title="Truncated consistency model (TCM)",
        family="trajectory",
        paper="Truncated Consistency Models",
        arxiv="2410.14895",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-2",
    )
    Config = TCMConfig
    config: TCMConfig

    def frozen(self) -> Mapping[str, str]:
        return {FIRST: "student"}

    def inherits(self) -> Mapping[str, tuple[str, ...]] | None:
        return {"student": ("student",), FIRST: ("student",)}

    def sampler(self) -> SamplerSpec:
        return SamplerSpec("lcm", self.config.timesteps)

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """Consistency above the truncation, and agreement with the first stage at it."""
        config = self.config
        boundary, t = self.times(ctx)
        x_t = ctx.denoiser.schedule.add_noise(batch.images(), ctx.random.normal("eps", batch.latent_shape), t)
        student = ctx.denoiser(x_t, t, batch.cond, "student").x0
        distance = self.distance(student, self.target(x_t, t, batch, ctx), t, ctx.denoiser.schedule)
        # Divided by what the shares are, not by how many rows came: batches without either kind stay unbiased.
        at, above = boundary / config.boundary_share, (~boundary) / (1 - config.boundary_share)
        return {
            "consistency": (above * distance).mean(),
            "boundary": config.boundary_weight * (at * distance).mean(),
        }

    def times(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """Which samples are at the truncation, and all times, `(B,)`."""
        schedule = ctx.denoiser.schedule
        boundary, u = ctx.random.bernoulli("boundary", self.config.boundary_share), ctx.random.uniform("t")
        low = time_at(self.config.truncation_index, u, schedule)
        ends = [
            schedule.kappa(time).clamp_max(_NOISIEST).log()
            for time in (low[:1], time_at(LAST_INDEX, low[:1], schedule))
        ]
        above = schedule.time_of_kappa(heavy_tailed(u, *ends).exp())
        return boundary, torch.where(boundary, low, torch.maximum(above, low))

    def next_time(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Where the teacher's step ends."""
        kappa = schedule.kappa(t)
        return schedule.time_of_kappa(kappa * self.kept(kappa))

    def kept(self, kappa: Tensor) -> Tensor:
        """kappa_r / kappa_t."""
        config = self.config
        share = 1 - config.step_base ** -(config.step_stage + 1) * (1 + _CURVE * torch.sigmoid(-kappa))
        return share.clamp(0, config.longest_kept)

    @torch.no_grad()
    def target(self, x_t: Tensor, t: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """The clean prediction one step of the guided teacher further, by whoever serves there."""
        schedule = ctx.denoiser.schedule
        teacher = ctx.denoiser(x_t, t, batch.cond, TEACHER, batch.null, self.config.guidance_scale)
        r = self.next_time(t, schedule)
        own, first = self.both(jump(teacher, r), r, batch, ctx)
        low = time_at(self.config.truncation_index, t, schedule)
        further = torch.where(broadcast_to(r >= low, own.x0), own.x0, first.x0)
        # A step that keeps no noise arrives; a table's first index, where r is then held, is not clean.
        arrived = self.kept(schedule.kappa(t)) == 0
        return torch.where(broadcast_to(arrived, further), teacher.x0, further)

    def both(self, x: Tensor, r: Tensor, batch: Batch, ctx: Context) -> list[Prediction]:
        """The live student and the first stage's, in one call where both are adapters."""
        return ctx.denoiser.together(x, r, [Ask("student", batch.cond), Ask(FIRST, batch.cond)])

    def distance(self, student: Tensor, target: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The weighted distance of each sample, `(B,)`."""
        square, c = (student - target).square().flatten(1).mean(1), self.config.huber_c
        weight = (1 + 1 / schedule.kappa(t) ** 2).to(square.dtype)
        return weight * square / ((square + c * c).sqrt() + c)


def heavy_tailed(u: Tensor, low: Tensor, high: Tensor, degrees: float = 0.01, scale: float = 0.2) -> Tensor:
    """Quantiles `u` `(B,)` of Student's t with few degrees of freedom, cut to `low`..`high` (one number each)."""
    # Fine near the centre, where the density has its kink, and coarse far from it.
    bend = scale * math.sqrt(degrees)
    ends = torch.asinh(torch.cat([low, high]).double() / bend)
    x = torch.sinh(torch.lerp(ends[0], ends[1], torch.linspace(0, 1, _TABLE, device=u.device).double())) * bend
    density = (1 + (x / bend) ** 2) ** (-(degrees + 1) / 2)
    mass = torch.cumulative_trapezoid(density, x)
    mass = torch.cat([torch.zeros_like(mass[:1]), mass / mass[-1]])
    right = torch.searchsorted(mass, u.double()).clamp(1, _TABLE - 1)
    share = (u - mass[right - 1]) / (mass[right] - mass[right - 1])
    return torch.lerp(x[right - 1], x[right], share).to(u.dtype)
