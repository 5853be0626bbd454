"""Continuous-time consistency distillation (Lu & Song 2024, arXiv 2410.11081)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastdiff.diffusion.losses import mse
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.diffusion.tensors import broadcast_to
from fastdiff.methods.base import (
    Batch,
    Context,
    Method,
    MethodInfo,
    check_falling,
    check_not_negative,
    check_positive,
    log_normal_time,
)
from fastdiff.models.roles import TEACHER
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.tangents import Point, Tangents, ode_direction


class TangentConfig(Protocol):
    """What the consistency term reads of a config."""

    guidance_scale: float
    time_mean: float
    time_std: float
    tangent_warmup: int
    tangent_norm: Literal["rms", "l2"]
    tangent_constant: float


@dataclass(frozen=True)
class SCMConfig:
    """Defaults are the paper's, but for `tangent_norm`; it distils no text-to-image model, so that guidance has none.
    Its learned weight of noise levels is left out, with the fixed one that goes with it.

    Args:
        guidance_scale: w of the teacher, 1 means none; the student bakes it in.
        timesteps: the student's times, noisiest first; each after the first adds fresh noise to a clean prediction.
        time_mean, time_std: ln(sigma / alpha) of the training times is normal with these.
        tangent_warmup: steps over which the unstable part of the tangent grows in.
        tangent_norm: what a tangent is divided by besides `tangent_constant`: its root mean square, which does not
            depend on the resolution (FastGen's default), or its length (`l2`, the paper's).
        tangent_constant: added to the norm.
        tangent_chord: if above zero, the student's rate of change is taken over so many indices of time, not at one:
            for networks whose time embedding turns fast, as Stable Diffusion's does (`fastdiff.models.tangents`).
    """

    guidance_scale: float = 1.0
    timesteps: tuple[int, ...] = (999,)
    time_mean: float = -1.0
    time_std: float = 1.4
    tangent_warmup: int = 10000
    tangent_norm: Literal["rms", "l2"] = "rms"
    tangent_constant: float = 0.1
    tangent_chord: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(guidance_scale=self.guidance_scale, tangent_warmup=self.tangent_warmup)
        check_not_negative(tangent_chord=self.tangent_chord)
        check_positive(time_std=self.time_std, tangent_constant=self.tangent_constant)
        check_falling(self.timesteps)


class SCM(Method):
    r"""Makes the clean prediction constant along the guided teacher's trajectory, in the limit of small steps.

    With x = cos(a) x0 + sin(a) eps, F the TrigFlow velocity cos(a) eps - sin(a) x0 of a prediction (of Stable
    Diffusion the v-prediction at the index whose sigma / alpha is tan(a)), and f = cos(a) x - sin(a) F,

        g = -cos^2(a) (F - F_teacher) - r (cos(a) sin(a) x + cos(a) sin(a) dF/da) = cos(a) df/da   at r = 1,
        L = mean (F - sg[F + g / (|g| + c)])^2,   |g| as `tangent_norm` says,   r = min(1, step / tangent_warmup),

    where dF/da is taken along the teacher's ODE and everything but the first F is detached. As cos sin d/da is
    d/d ln(sigma / alpha), nothing grows at either end; any process is trained in its own network's terms. At r = 0
    the student regresses the teacher. Times that Stable Diffusion does not reach (a above 86.09 degrees) are held at
    its last index. Samples whose tangent is not finite do not count.
    """

    info = MethodInfo(
        name="scm",
        title="Continuous-time consistency distillation (sCM, sCD)",
        family="trajectory",
        paper="Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
        arxiv="2410.11081",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-2",
    )
    Config = SCMConfig
    config: SCMConfig

    def __init__(self, config: SCMConfig) -> None:
        super().__init__(config)
        self.tangents = Tangents(chord=config.tangent_chord)

    def sampler(self) -> SamplerSpec:
        return SamplerSpec("lcm", self.config.timesteps)

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The tangent's regression at one noised version of each image."""
        return {"consistency": consistency_term(batch, ctx, self.config, self.tangents)}


def consistency_term(batch: Batch, ctx: Context, config: TangentConfig, tangents: Tangents) -> Tensor:
    """The loss of :class:`SCM`."""
    t = log_normal_time(ctx, "t", config.time_mean, config.time_std)
    x_t = ctx.denoiser.schedule.add_noise(batch.images(), ctx.random.normal("eps", batch.latent_shape), t)
    with torch.no_grad():
        teacher = ctx.denoiser(x_t, t, batch.cond, TEACHER, batch.null, config.guidance_scale)
    r = min(1.0, ctx.step / config.tangent_warmup) if config.tangent_warmup else 1.0
    g = tangent(teacher, batch, ctx, tangents, r)
    ctx.log("tangent", root_mean_square(g).mean())
    student = trig_velocity(ctx.denoiser(x_t, t, batch.cond, "student"))
    return mse(student, (student + normalised(g, config)).detach())


def tangent(teacher: Prediction, batch: Batch, ctx: Context, tangents: Tangents, r: float) -> Tensor:
    """g of the student where the teacher's prediction was made."""
    rate = log_kappa_rate(teacher.schedule, teacher.t)
    at, along = Point(teacher.x_t, teacher.t), ode_direction(teacher, rate)
    found = tangents(ctx.denoiser, batch.cond, "student", at, along, trig_velocity)
    cos, sin = trig_levels(teacher)
    x = teacher.x_t * (teacher.levels[0] ** 2 + teacher.levels[1] ** 2).rsqrt()
    g = -(cos**2) * (found.value - trig_velocity(teacher)) - r * (cos * sin * x + found.derivative)
    return drop_broken(found.finite, g)


def normalised(g: Tensor, config: TangentConfig) -> Tensor:
    """The tangent at a length below one, a sample."""
    length = root_mean_square(g)
    if config.tangent_norm == "l2":
        length = length * g[0].numel() ** 0.5
    return g / (length + config.tangent_constant)


def trig_velocity(prediction: Prediction) -> Tensor:
    """`cos eps - sin x0`: what a TrigFlow network predicts (arXiv 2410.11081); `v` of variance-preserving processes."""
    cos, sin = trig_levels(prediction)
    return cos * prediction.eps - sin * prediction.x0


def trig_levels(prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angle atan(sigma / alpha), shaped to multiply x."""
    alpha, sigma = prediction.levels
    scale = (alpha**2 + sigma**2).rsqrt()
    return alpha * scale, sigma * scale


def log_kappa_rate(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """`(B,)` dt / d ln(sigma / alpha): 0 at the ends where there is no noise or no signal."""
    return 1 / (schedule.d_sigma(t) / schedule.sigma(t) - schedule.d_alpha(t) / schedule.alpha(t))


def root_mean_square(x: Tensor) -> Tensor:
    """One number a sample, shaped to multiply `x`."""
    return x.square().mean(tuple(range(1, x.dim())), keepdim=True).sqrt()


def drop_broken(finite: Tensor, x: Tensor) -> Tensor:
    """`x` with zeros for the samples whose tangent was not finite."""
    return torch.where(broadcast_to(finite, x), x, 0)
