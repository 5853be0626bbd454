"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff.diffusion.losses import discriminator_softplus, generator_softplus, mse
from fastdiff.diffusion.prediction import prediction_target
from fastdiff.methods._score_gap import ScoreGap, ScoreGapConfig
from fastdiff.methods.base import Batch, Context, Group, MethodInfo, Need, any_time, check_not_negative
from fastdiff.models.denoiser import Denoiser, Taps
from fastdiff.models.discriminator import FeatureHead


@dataclass(frozen=True)
class DMD2Config(ScoreGapConfig):
    """Defaults are those of the paper's one-step SD1.5 run without GAN.

    Args:
        guidance_scale: w of the teacher's score; the fake score is never guided.
        student_update_every: steps per student update.
        gan_weight: weight of the adversarial term of the student; 0 needs no images.
        gan_discriminator_weight: weight of the discriminator's loss beside the denoising loss.
    """

    guidance_scale: float = 1.75
    student_update_every: int = 10
    gan_weight: float = 0.0
    gan_discriminator_weight: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(gan_weight=self.gan_weight, gan_discriminator_weight=self.gan_discriminator_weight)


class DMD2(ScoreGap):
    r"""Matches the student's noised law to the teacher's by the gap of two denoisers.

    With x the student's sample, x_t its noised version and everything in g detached,

        g = (D_fake(x_t) - D_real^w(x_t)) / mean|x - D_real^w(x_t)|,   L_student = 1/2 mean (x - sg[x - g])^2
        L_fake = mean |F_fake(x_t) - target|^2 in the network's own prediction type, x detached,

    and, with a GAN on the fake score's middle features, L_student += gan_weight * softplus(-logit(x_t')),
    L_fake += gan_discriminator_weight * (softplus(logit_fake) + softplus(-logit_real)).
    """

    info = MethodInfo(
        name="dmd2",
        title="DMD2",
        family="distribution matching",
        paper="Improved Distribution Matching Distillation for Fast Image Synthesis",
        arxiv="2405.14867",
        needs=("prompts",),
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = DMD2Config
    config: DMD2Config

    def groups(self) -> dict[str, Group]:
        groups = super().groups()
        return groups | {"discriminator": groups["fake_score"]} if self.config.gan_weight else groups

    def needs(self) -> Need:
        return "images" if self.config.gan_weight else super().needs()

    def modules(self, denoiser: Denoiser) -> dict[str, nn.Module]:
        if not self.config.gan_weight:
            return {}
        network = denoiser.roles.network("fake_score")
        return {"discriminator": FeatureHead(denoiser.family.feature_channels(network))}

    def student_terms(self, x: Tensor, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """The adversarial term, if weighted."""
        if not self.config.gan_weight:
            return {}
        return {"gan": self.config.gan_weight * generator_softplus(self._logits(x, batch, ctx, "student/gan"))}

    def critic_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """Denoising on the student's samples, and the discriminator's loss on the same network call."""
        if not self.config.gan_weight:
            return super().critic_loss(batch, ctx)
        x = self.critic_sample(batch, ctx)
        t, eps = any_time(ctx, "critic/t"), ctx.random.normal("critic/eps", batch.latent_shape)
        return self._critic_with_gan(batch, ctx, x, ctx.denoiser.schedule.add_noise(x, eps, t), t, eps)

    def _critic_with_gan(self, batch, ctx, x, x_t, t, eps) -> Mapping[str, Tensor]:
        """One call serves denoising and both sides of the discriminator: three row blocks, features tapped."""
        schedule, tap = ctx.denoiser.schedule, ctx.denoiser.family.feature_tap
        t_fake, fake = self._gan_input(x, ctx, "critic/gan_fake")
        t_real, real = self._gan_input(batch.images(), ctx, "critic/gan_real")
        taps = Taps((tap,))
        cond = batch.cond.cat([batch.cond] * 3)
        inputs, inputs_t = torch.cat([x_t, fake, real]), torch.cat([t, t_fake, t_real])
        prediction = ctx.denoiser(inputs, inputs_t, cond, "fake_score", taps=taps)
        rows = len(batch)
        target = prediction_target(prediction.kind, schedule, x, eps, t)
        logits = ctx.modules["discriminator"](taps.features[tap][rows:].float())
        discriminator = discriminator_softplus(logits[rows:], logits[:rows])
        return {
            "denoising": mse(prediction.native[:rows], target),
            "discriminator": self.config.gan_discriminator_weight * discriminator,
        }

    def _gan_input(self, x: Tensor, ctx: Context, site: str) -> tuple[Tensor, Tensor]:
        t = any_time(ctx, f"{site}/t")
        return t, ctx.denoiser.schedule.add_noise(x, ctx.random.normal(f"{site}/eps", x.shape[1:]), t)

    def _logits(self, x: Tensor, batch: Batch, ctx: Context, site: str) -> Tensor:
        t, x_t = self._gan_input(x, ctx, site)
        (features,) = ctx.denoiser.features(x_t, t, batch.cond, "fake_score", (ctx.denoiser.family.feature_tap,))
        return ctx.modules["discriminator"](features.float())
