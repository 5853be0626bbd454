"""What rectified-flow methods and regressions on pairs share: the straight line that stock samplers walk, distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.losses import sample_huber, sample_mse
from fastdiff.diffusion.schedules import LAST_INDEX, NoiseSchedule, Terminal
from fastdiff.methods._small_student import SmallStudent, SmallStudentConfig
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Context, check_not_negative, check_positive, time_at
from fastdiff.models.sampler import SamplerSpec

MARGIN = 1e-5
"""Distance of noise levels from both ends, where a velocity or a weight may have no limit (arXiv 2405.20320)."""


@dataclass(frozen=True)
class StraightConfig(SmallStudentConfig):
    """What every method on straight lines can be told.

    Args:
        num_inference_steps: steps the student is meant to be run with.
        start_timestep: index at which plain noise is fed to the student, 999 or less (the next one below that
            `num_inference_steps` divides evenly); at 999 the clean prediction of
            an epsilon network amplifies errors 14.6 times, at 399 1.2 times.
        distance: `l2`, or `huber`: sqrt(|d|^2 + c^2) - c of the whole sample over its size, c = huber_c times the size
            (arXiv 2405.20320).
        huber_c: width of the quadratic part, per element.
        perceptual_weight: weight of the perceptual distance of decoded samples; 0 needs no scorer.
    """

    num_inference_steps: int = 1
    start_timestep: int = 999
    distance: Literal["l2", "huber"] = "l2"
    huber_c: float = 5.4e-4
    perceptual_weight: float = 0.0

    def __post_init__(self) -> None:
        self.shape()
        check_positive(num_inference_steps=self.num_inference_steps, huber_c=self.huber_c)
        check_not_negative(perceptual_weight=self.perceptual_weight)
        if self.distance == "l2":
            refuse_unread(self, ("huber_c",), "with the distance l2")
        if not 0 < self.start_timestep <= LAST_INDEX:
            raise ValueError(f"start_timestep must be from 1 to {LAST_INDEX}, got {self.start_timestep}")


class Straight(SmallStudent):
    """A student that one loss trains and a stock deterministic sampler runs."""

    config: StraightConfig

    def needs_scorer(self) -> bool:
        return self.config.perceptual_weight > 0

    def sampler(self) -> SamplerSpec:
        return SamplerSpec.trailing("ddim", self.config.num_inference_steps, self.config.start_timestep)

    def start(self, like: Tensor, ctx: Context) -> Tensor:
        """The time at which the sampler feeds plain noise, `(B,)`."""
        return time_at(int(self.sampler().timesteps[0]), like, ctx.denoiser.schedule)

    def clean_terms(self, x: Tensor, x0: Tensor, ctx: Context) -> dict[str, Tensor]:
        """The loss of a clean prediction `x` that should be `x0`."""
        terms = {"regression": self.sample_distance(x, x0).mean()}
        if self.config.perceptual_weight:
            terms["perceptual"] = self.config.perceptual_weight * self.perceptual(x, x0, ctx).mean()
        return terms

    def sample_distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The configured distance of each pair of samples, `(B,)`."""
        if self.config.distance == "l2":
            return sample_mse(prediction, target)
        return sample_huber(prediction, target, self.config.huber_c)

    def perceptual(self, x: Tensor, x0: Tensor, ctx: Context) -> Tensor:
        """Perceptual distance of each decoded pair of clean samples, `(B,)`."""
        with torch.no_grad():
            wanted = ctx.decode(x0)
        return ctx.scorer.distance(ctx.decode(x), wanted)


def line_through(
    x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor | Terminal, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor]:
    """(x0, eps) for which `alpha x0 + sigma eps` is `x_t` at time `t` and `x_s` at the cleaner `s`.

    Between the two times this is the line that deterministic DDIM walks when the network predicts that eps, whatever
    the process; in a flow it is the straight chord. With plain noise z at `t` and a clean sample at the other end, eps
    is (z - alpha_t x0) / sigma_t.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.levels(t, x_t), schedule.levels(s, x_t)
    scale = alpha_s * sigma_t - alpha_t * sigma_s
    return (sigma_t * x_s - sigma_s * x_t) / scale, (alpha_s * x_t - alpha_t * x_s) / scale
