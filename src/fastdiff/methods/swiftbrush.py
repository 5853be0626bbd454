"""SwiftBrush: image-free one-step distillation by variational scores (Nguyen & Tran 2023, arXiv 2312.05239)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.losses import mse
from fastdiff.diffusion.prediction import Prediction
from fastdiff.methods._guidance import check_range
from fastdiff.methods._score_gap import ScoreGap, ScoreGapConfig
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, MethodInfo, any_time, check_not_negative, check_positive
from fastdiff.models.denoiser import Ask
from fastdiff.models.roles import TEACHER


@dataclass(frozen=True)
class SwiftBrushConfig(ScoreGapConfig):
    """Defaults are those of the released SD2.1 run.

    Args:
        guidance_scale: w of both scores, the teacher's and the fake one's.
        guidance_range: draw w per sample from this range instead, the same for both scores.
        prompt_dropout: share of the fake score's updates that are made without prompts, which gives meaning to guiding it.
        clip_weight: weight of the clamped image-text term (SwiftBrush v2, arXiv 2408.14176, takes 0.1); 0 leaves
            it out.
        clip_threshold: image-text similarity above which that term is silent.
        clip_steps: steps over which `clip_weight` falls to 0, in a straight line; it stays if not given.
    """

    guidance_scale: float = 4.5
    guidance_range: tuple[float, float] | None = None
    prompt_dropout: float = 0.1
    clip_weight: float = 0.0
    clip_threshold: float = 0.37
    clip_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(prompt_dropout=self.prompt_dropout, clip_weight=self.clip_weight)
        if self.prompt_dropout > 1:
            raise ValueError(f"prompt_dropout must be from 0 to 1, got {self.prompt_dropout}")
        if not -1 <= self.clip_threshold <= 1:
            raise ValueError(f"clip_threshold is a cosine, from -1 to 1, got {self.clip_threshold}")
        check_positive(clip_steps=self.clip_steps)
        check_range(self)
        if self.clip_weight == 0:
            refuse_unread(self, ("clip_threshold", "clip_steps"), "with clip_weight 0")


class SwiftBrush(ScoreGap):
    r"""Variational score distillation of a one-step student, both scores guided alike.

    With x the student's sample, eps^w the guided noise predictions and everything in g detached,

        g = sigma_t^2 (eps_real^w(x_t) - eps_fake^w(x_t)),   L_student = 1/2 mean (x - sg[x - g])^2,
        L_fake = mean alpha_t^2 |eps_fake(x_t) - eps|^2, without prompt for the whole batch in a tenth of the steps,

    so that an untrained fake score gives no gradient at any w. In terms of clean predictions the weight is
    alpha sigma. SwiftBrush v2 adds clip_weight * mean max(0, clip_threshold - cos(image, prompt)) on decoded samples.
    """

    info = MethodInfo(
        name="swiftbrush",
        title="SwiftBrush",
        family="distribution matching",
        paper="SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation",
        arxiv="2312.05239",
        needs="prompts",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = SwiftBrushConfig
    config: SwiftBrushConfig

    def needs_scorer(self) -> bool:
        return self.config.clip_weight > 0

    @property
    def guided(self) -> bool:
        """Whether any w but 1 is asked."""
        return self.config.guidance_range is not None or self.config.guidance_scale != 1

    def compares_with_null(self) -> bool:
        """The fake score learns no guidance: it has one only as far as it is asked without a prompt."""
        return self.guided

    def asks(self, batch: Batch, ctx: Context) -> list[Ask]:
        """Both scores under one guidance; at w = 1 the fake score is asked as it is trained."""
        w = self.guidance(ctx)
        fake = Ask("fake_score", batch.cond, batch.null, w) if self.guided else Ask("fake_score", batch.cond)
        return [Ask(TEACHER, batch.cond, batch.null, w), fake]

    def guidance(self, ctx: Context) -> float | Tensor:
        """w for the batch, or `(B,)` drawn from the range."""
        if self.config.guidance_range is None:
            return self.config.guidance_scale
        low, high = self.config.guidance_range
        return low + (high - low) * ctx.random.uniform("student/guidance")

    def weight(self, x: Tensor, real: Prediction) -> Tensor:
        """alpha sigma, which is sigma^2 on noise predictions."""
        alpha, sigma = real.levels
        return alpha * sigma

    def student_terms(self, x: Tensor, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """The clamped image-text term while it is weighted; it costs a decoder's pass."""
        weight = self.clip_weight_at(ctx.step)
        if not weight:
            return {}
        if len(batch.prompts) != len(batch):
            raise ValueError(
                f"the image-text term needs the {len(batch)} prompts of the batch: use data with captions"
            )
        image = ctx.scorer.image_embedding(ctx.decode(x))
        cosine = (image * ctx.scorer.text_embedding(batch.prompts)).sum(-1)
        ctx.log("clip_cosine", cosine.detach().mean())
        return {"clip": weight * F.relu(self.config.clip_threshold - cosine).mean()}

    def clip_weight_at(self, step: int) -> float:
        """The weight of the image-text term at a step."""
        left = 1.0 if self.config.clip_steps is None else max(0.0, 1 - step / self.config.clip_steps)
        return self.config.clip_weight * left

    def critic_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """Denoising of noise predictions weighted by alpha^2; now and then without prompts."""
        x = self.critic_sample(batch, ctx)
        t, eps = any_time(ctx, "critic/t"), ctx.random.normal("critic/eps", batch.latent_shape)
        x_t = ctx.denoiser.schedule.add_noise(x, eps, t)
        dropped = ctx.random.shared_uniform("critic/null") < self.config.prompt_dropout
        cond = batch.null.expand(len(batch)) if dropped else batch.cond
        prediction = ctx.denoiser(x_t, t, cond, "fake_score")
        alpha, _ = prediction.levels
        return {"denoising": mse(alpha * prediction.eps, alpha * eps)}
