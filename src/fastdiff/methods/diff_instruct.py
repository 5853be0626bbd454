"""Diff-Instruct: the integral of KL divergences over noise levels (Luo et al. 2023, arXiv 2305.18455)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.losses import mse
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.tensors import broadcast_to
from fastdiff.methods._score_gap import ScoreGap, ScoreGapConfig
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, MethodInfo, check_positive, log_normal_time

_SIGMA_DATA = 0.5  # of images in [-1, 1], as in EDM (arXiv 2206.00364)


@dataclass(frozen=True)
class DiffInstructConfig(ScoreGapConfig):
    """The paper distils EDM teachers of small images; for latent teachers it gives no numbers.

    Args:
        noise_law: `uniform` over the times between `min_timestep` and `max_timestep`, with the fake score's loss in
            its own prediction type; `log_normal` is the published setting of EDM teachers, where log(sigma / alpha) is
            normal for both networks and the fake score's loss is EDM's.
        noise_mean, noise_std: of log(sigma / alpha) under the log-normal law.
    """

    noise_law: Literal["uniform", "log_normal"] = "uniform"
    noise_mean: float = -1.2
    noise_std: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(noise_std=self.noise_std)
        of_other = ("noise_mean", "noise_std") if self.noise_law == "uniform" else ("min_timestep", "max_timestep")
        refuse_unread(self, of_other, f"with noise_law {self.noise_law}")


class DiffInstruct(ScoreGap):
    r"""Distribution matching with the plain gap of two denoisers: no normaliser, weight 1.

    With x the student's sample and everything in g detached,

        g = D_fake(x_t) - D_real^w(x_t),   L_student = 1/2 mean (x - sg[x - g])^2.

    Weight 1 on denoisers counts high noise more than the exact divergence does, whose weight is (alpha / sigma)^2. The
    released code sums over elements where this averages; Adam sees the difference only through clipping.
    """

    info = MethodInfo(
        name="diff_instruct",
        title="Diff-Instruct",
        family="distribution matching",
        paper="Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models",
        arxiv="2305.18455",
        needs="prompts",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = DiffInstructConfig
    config: DiffInstructConfig

    def weight(self, x: Tensor, real: Prediction) -> Tensor:
        """1: the plain gap of the denoisers."""
        return torch.ones_like(real.x0)

    def noised(self, x: Tensor, ctx: Context, site: str) -> tuple[Tensor, Tensor]:
        """A time of the noise law for each sample, and `x` noised to it."""
        if self.config.noise_law == "uniform":
            return super().noised(x, ctx, site)
        t = log_normal_time(ctx, f"{site}/t", self.config.noise_mean, self.config.noise_std)
        return t, ctx.denoiser.schedule.add_noise(x, ctx.random.normal(f"{site}/eps", x.shape[1:]), t)

    def critic_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """Denoising on the student's samples; under the log-normal law weighted by 1/kappa^2 + 1/sigma_data^2."""
        if self.config.noise_law == "uniform":
            return super().critic_loss(batch, ctx)
        x = self.critic_sample(batch, ctx)
        t, x_t = self.noised(x, ctx, "critic")
        prediction, terms = self.critic_call(x, x_t, t, batch, ctx)
        weight = (ctx.denoiser.schedule.kappa(t).to(x.dtype) ** -2 + _SIGMA_DATA**-2).sqrt()
        weight = broadcast_to(weight, x)
        return {"denoising": mse(weight * prediction.x0, weight * x)} | terms
