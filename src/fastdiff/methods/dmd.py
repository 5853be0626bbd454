"""DMD, the first: distribution matching with a regression on teacher pairs (Yin et al. 2023, arXiv 2311.18828)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.losses import mse
from fastdiff.methods._rollout import student_sample
from fastdiff.methods._score_gap import ScoreGap, ScoreGapConfig
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, MethodInfo, Need, check_not_negative

JUDGED_SIZE = 224
"""Pixels along the shorter side of the images that the perceptual distance compares, at most; the paper's size."""


@dataclass(frozen=True)
class DMDConfig(ScoreGapConfig):
    """Defaults are those of the paper's SD1.5 run at guidance 3; its run at guidance 8 differs in w and pairs only.

    Args:
        guidance_scale: w of the teacher's score; pairs must be made with the same, which nothing compares.
        regression_weight: weight of the regression on pairs; 0 needs prompts only and is DMD2 without its GAN.
        regression_loss: `perceptual` (the distance of the run's scorer, on decoded samples, shrunk to 224 pixels where
            larger, as in the paper), or `latent_l2`, which needs no decoder and no scorer (not the paper's).
        regression_share: share of each batch whose noise is that of its pair; the others start from fresh noise.
    """

    guidance_scale: float = 3.0
    regression_weight: float = 0.25
    regression_loss: Literal["perceptual", "latent_l2"] = "perceptual"
    regression_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(regression_weight=self.regression_weight)
        if not 0 < self.regression_share <= 1:
            raise ValueError(f"regression_share must be above 0 and at most 1, got {self.regression_share}")
        if self.regression_weight == 0:
            refuse_unread(self, ("regression_loss", "regression_share"), "with regression_weight 0")
        if self.regression_weight and len(self.timesteps) > 1:
            raise ValueError(
                f"pairs teach the one step from noise to sample, but timesteps are {self.timesteps}: give one, or "
                "regression_weight 0"
            )


class DMD(ScoreGap):
    r"""The normalised gap of two denoisers, held to the teacher's modes by pairs (z, y) of its noise and sample.

    With x = G(z), half of the noises being those of pairs, and everything in g detached,

        g = (D_fake(x_t) - D_real^w(x_t)) / mean|x - D_real^w(x_t)|,
        L_student = 1/2 mean (x - sg[x - g])^2 + regression_weight * mean over pairs of d(decode G(z), decode y).

    With several `students` each regresses on the pairs of its own conditions; in the multi-student paper (arXiv
    2410.23274) pairs are not split.

    The fake score steps as often as the student. The paper prints a further factor alpha_t in g, which its code and
    all successors leave out.
    """

    info = MethodInfo(
        name="dmd",
        title="DMD",
        family="distribution matching",
        paper="One-step Diffusion with Distribution Matching Distillation",
        arxiv="2311.18828",
        needs="pairs",
        student_kinds=("lora", "full"),
        steps="1",
    )
    Config = DMDConfig
    config: DMDConfig

    def needs(self) -> Need:
        return "pairs" if self.config.regression_weight else super().needs()

    def needs_scorer(self) -> bool:
        return self.config.regression_weight > 0 and self.config.regression_loss == "perceptual"

    def sample(self, batch: Batch, ctx: Context, with_grad: bool) -> Tensor:
        """The student's clean sample; its last rows start from the noise of their pairs."""
        noise = None
        if self.config.regression_weight:
            rows = self.paired_rows(batch)
            fresh = ctx.random.normal("student/0", batch.latent_shape)
            noise = torch.cat([fresh[:-rows], batch.pairs()[0][-rows:].to(fresh)])
        config = self.config
        return student_sample(batch, ctx, config.timesteps, config.multi_step_input, with_grad=with_grad, noise=noise)

    def paired_rows(self, batch: Batch) -> int:
        """How many rows, at the end of the batch, are regressed."""
        return math.ceil(self.config.regression_share * len(batch))

    def student_terms(self, x: Tensor, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """The regression on pairs, if weighted."""
        if not self.config.regression_weight:
            return {}
        rows = self.paired_rows(batch)
        x, y = x[-rows:], batch.pairs()[1][-rows:]
        return {"regression": self.config.regression_weight * self._distance(x, y, ctx)}

    def _distance(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        if self.config.regression_loss == "latent_l2":
            return mse(x, y)
        with torch.no_grad():
            target = _judged(ctx.decode(y))
        return ctx.scorer.distance(_judged(ctx.decode(x)), target).mean()


def _judged(images: Tensor) -> Tensor:
    """Images `(B, C, H, W)` as the perceptual distance sees them."""
    height, width = images.shape[-2:]
    if min(height, width) <= JUDGED_SIZE:
        return images
    size = [round(side * JUDGED_SIZE / min(height, width)) for side in (height, width)]
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
