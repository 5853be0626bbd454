"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastdiff.diffusion.losses import discriminator_softplus, dmd_normaliser, generator_softplus, mse, surrogate
from fastdiff.diffusion.prediction import prediction_target
from fastdiff.methods._student import MultiStepInput, student_sample
from fastdiff.methods.base import (
    Batch,
    Context,
    Group,
    Method,
    MethodInfo,
    Need,
    Update,
    check_not_negative,
    check_positive,
)
from fastdiff.models.denoiser import Ask, Denoiser, Taps
from fastdiff.models.discriminator import FeatureHead
from fastdiff.models.sampler import SamplerSpec


@dataclass(frozen=True)
class DMD2Config:
    """Defaults are those of the paper's one-step SD1.5 run without GAN.

    Args:
        guidance_scale: w of the teacher's score; the fake score is never guided.
        timesteps: the student's times, noisiest first; one entry makes a one-step student.
        multi_step_input: how later steps get their input: simulate the student itself, or noise clean images.
        update_rule: `every` updates the fake score in each step and the student in every `student_update_every`-th
            (official code); `exclusive` updates one or the other (FastGen's reading).
        student_update_every: steps per student update.
        min_timestep, max_timestep: range of the times at which scores are compared.
        gan_weight: weight of the adversarial term of the student; 0 needs no images.
        gan_discriminator_weight: weight of the discriminator's loss beside the denoising loss.
        fake_score_learning_rate: learning rate of fake score and discriminator; the student's if not given.
    """

    guidance_scale: float = 1.75
    timesteps: tuple[int, ...] = (999,)
    multi_step_input: MultiStepInput = "simulate"
    update_rule: Literal["every", "exclusive"] = "every"
    student_update_every: int = 10
    min_timestep: int = 20
    max_timestep: int = 980
    gan_weight: float = 0.0
    gan_discriminator_weight: float = 1e-2
    fake_score_learning_rate: float | None = None

    def __post_init__(self) -> None:
        check_not_negative(guidance_scale=self.guidance_scale, gan_weight=self.gan_weight)
        check_not_negative(gan_discriminator_weight=self.gan_discriminator_weight, min_timestep=self.min_timestep)
        check_positive(student_update_every=self.student_update_every)
        if self.fake_score_learning_rate is not None:
            check_positive(fake_score_learning_rate=self.fake_score_learning_rate)
        if self.max_timestep < self.min_timestep:
            raise ValueError(
                f"max_timestep ({self.max_timestep}) must not be below min_timestep ({self.min_timestep})"
            )
        if not self.timesteps or list(self.timesteps) != sorted(set(self.timesteps), reverse=True):
            raise ValueError(f"timesteps must fall strictly, noisiest first, got {self.timesteps}")


class DMD2(Method):
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
    critics = ("fake_score",)

    def groups(self) -> dict[str, Group]:
        critic = Group(self.config.fake_score_learning_rate)
        groups = {"student": Group(), "fake_score": critic}
        return groups | {"discriminator": critic} if self.config.gan_weight else groups

    def needs(self) -> Need:
        from_data = len(self.config.timesteps) > 1 and self.config.multi_step_input == "noised_data"
        return "images" if self.config.gan_weight or from_data else "prompts"

    def modules(self, denoiser: Denoiser) -> dict[str, nn.Module]:
        if not self.config.gan_weight:
            return {}
        network = denoiser.roles.network("fake_score")
        return {"discriminator": FeatureHead(denoiser.family.feature_channels(network))}

    def updates(self, step: int) -> Iterable[Update]:
        student_turn = step % self.config.student_update_every == 0
        critic = ("fake_score", "discriminator") if self.config.gan_weight else ("fake_score",)
        if student_turn:
            yield Update("student", self.student_loss, ("student",))
        if not student_turn or self.config.update_rule == "every":
            yield Update("fake_score", self.critic_loss, critic)

    def sampler(self) -> SamplerSpec:
        return SamplerSpec("lcm", self.config.timesteps)

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The distribution-matching term, and the adversarial one if weighted."""
        x = self._sample(batch, ctx, with_grad=True)
        ctx.store["x"] = x.detach()
        t, x_t = self._noised(x.detach(), ctx, "student")
        real, fake = ctx.denoiser.together(
            x_t,
            t,
            [Ask("teacher", batch.cond, batch.null, self.config.guidance_scale), Ask("fake_score", batch.cond)],
        )
        normaliser = dmd_normaliser(x.detach(), real.x0)
        gradient = (fake.x0 - real.x0) / normaliser
        ctx.log("score_gap", (fake.x0 - real.x0).abs().mean())
        ctx.log("latent_std", x.detach().std())
        terms = {"distribution_matching": surrogate(x, gradient)}
        if self.config.gan_weight:
            terms["gan"] = self.config.gan_weight * generator_softplus(self._logits(x, batch, ctx, "student/gan"))
        return terms

    def critic_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """Denoising on the student's samples, and the discriminator's loss on the same network call."""
        x = ctx.store.get("x")
        if x is None:
            x = self._sample(batch, ctx, with_grad=False)
        t = self._any_time(ctx, "critic")
        eps = ctx.random.normal("critic/eps", batch.latent_shape)
        schedule = ctx.denoiser.schedule
        x_t = schedule.add_noise(x, eps, t)
        if not self.config.gan_weight:
            prediction = ctx.denoiser(x_t, t, batch.cond, "fake_score")
            target = prediction_target(prediction.kind, schedule, x, eps, t)
            return {"denoising": mse(prediction.native, target)}
        return self._critic_with_gan(batch, ctx, x, x_t, t, eps)

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

    def _sample(self, batch: Batch, ctx: Context, with_grad: bool) -> Tensor:
        return student_sample(batch, ctx, self.config.timesteps, self.config.multi_step_input, with_grad=with_grad)

    def _noised(self, x: Tensor, ctx: Context, site: str) -> tuple[Tensor, Tensor]:
        t = ctx.random.integers(f"{site}/t", self.config.min_timestep, self.config.max_timestep + 1).float()
        return t, ctx.denoiser.schedule.add_noise(x, ctx.random.normal(f"{site}/eps", x.shape[1:]), t)

    def _any_time(self, ctx: Context, site: str) -> Tensor:
        """A time of the teacher's whole table for each sample."""
        return ctx.random.integers(f"{site}/t", 0, int(ctx.denoiser.schedule.t_max) + 1).float()

    def _gan_input(self, x: Tensor, ctx: Context, site: str) -> tuple[Tensor, Tensor]:
        t = self._any_time(ctx, site)
        return t, ctx.denoiser.schedule.add_noise(x, ctx.random.normal(f"{site}/eps", x.shape[1:]), t)

    def _logits(self, x: Tensor, batch: Batch, ctx: Context, site: str) -> Tensor:
        t, x_t = self._gan_input(x, ctx, site)
        (features,) = ctx.denoiser.features(x_t, t, batch.cond, "fake_score", (ctx.denoiser.family.feature_tap,))
        return ctx.modules["discriminator"](features.float())
