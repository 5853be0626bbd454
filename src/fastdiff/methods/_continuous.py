"""What methods in continuous time share: noise levels drawn on a logarithmic scale, and paths along the teacher's ODE."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.diffusion.steps import pf_velocity
from fastdiff.diffusion.tensors import broadcast_to
from fastdiff.methods.base import Context
from fastdiff.models.tangents import Point


def log_normal_time(ctx: Context, site: str, mean: float, std: float) -> Tensor:
    """`(B,)` times at which ln(sigma / alpha) is normal, held inside the range the teacher knows.

    In flow matching's time this is the logit-normal law, in TrigFlow's ln tan(angle) is normal.
    """
    return ctx.denoiser.schedule.time_of_kappa((mean + std * ctx.random.normal(site, ())).exp())


def log_kappa_rate(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """`(B,)` dt / d ln(sigma / alpha): 0 at the ends where there is no noise or no signal."""
    return 1 / (schedule.d_sigma(t) / schedule.sigma(t) - schedule.d_alpha(t) / schedule.alpha(t))


def ode_direction(teacher: Prediction, rate: Tensor) -> Point:
    """The direction of the teacher's probability-flow ODE when the schedule's time moves at `rate` `(B,)`."""
    return Point(broadcast_to(rate, teacher.x_t) * pf_velocity(teacher), rate)


def trig_levels(prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angle atan(sigma / alpha), shaped to multiply x."""
    alpha, sigma = prediction.levels
    scale = (alpha**2 + sigma**2).rsqrt()
    return alpha * scale, sigma * scale


def trig_velocity(prediction: Prediction) -> Tensor:
    """`cos eps - sin x0`: what a TrigFlow network predicts (arXiv 2410.11081); `v` of variance-preserving processes."""
    cos, sin = trig_levels(prediction)
    return cos * prediction.eps - sin * prediction.x0


def root_mean_square(x: Tensor) -> Tensor:
    """One number a sample, shaped to multiply `x`."""
    return x.square().mean(tuple(range(1, x.dim())), keepdim=True).sqrt()


def drop_broken(finite: Tensor, x: Tensor) -> Tensor:
    """`x` with zeros for the samples whose tangent was not finite."""
    return torch.where(broadcast_to(finite, x), x, 0)
