"""Flash-DMD: matching at high noise, an adversary of images at low noise (arXiv 2511.20549), without its rewards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fastdiff.methods._pixel_adversarial import PixelAdversary
from fastdiff.methods._rollout import drawn_step, student_sample
from fastdiff.methods._score_gap import ScoreGap, ScoreGapConfig
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import (
    Batch,
    Context,
    Group,
    MethodInfo,
    Need,
    TargetNetwork,
    Update,
    check_not_negative,
    check_positive,
    time_at,
)
from fastdiff.models.scorers import Scorer


@dataclass(frozen=True)
class FlashDMDConfig(ScoreGapConfig):
    """Four steps and one fake-score update a student update are the paper's for SDXL; what it leaves out is DMD2's.

    Args:
        guidance_scale: w of the teacher's score.
        timesteps: the student's times, noisiest first.
        student_update_every: steps per student update.
        high_noise_steps: how many of `timesteps`, from the noisiest, are trained by matching; the others are trained
            by the adversary. The paper's split is not public: half.
        gan_weight: weight of the adversarial term of the student (not public; DMD2's); 0 needs no images.
        gan_loss: `softplus` or `hinge`; the paper's printed signs fit neither.
        gan_r1_weight: weight of the approximate R1 penalty of the discriminator.
        discriminator_learning_rate: learning rate of the heads; the student's if not given.
        fake_score_decay: share of its own weights that the fake score keeps after each of its steps, the rest being
            the student's; 1 pulls nowhere. The paper's value is not public; on the embedded teacher 0.97 left
            no score of the student, 0.999 did leave one. Below 1 both must be full networks: pulling one adapter to another is not the paper's LoRA run either.
    """

    guidance_scale: float = 8.0
    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    student_update_every: int = 1
    high_noise_steps: int = 2
    gan_weight: float = 5e-3
    gan_loss: Literal["softplus", "hinge"] = "softplus"
    gan_r1_weight: float = 0.0
    discriminator_learning_rate: float | None = None
    fake_score_decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(gan_weight=self.gan_weight, gan_r1_weight=self.gan_r1_weight)
        check_positive(discriminator_learning_rate=self.discriminator_learning_rate)
        if self.gan_weight == 0:
            refuse_unread(self, ("gan_loss", "gan_r1_weight", "discriminator_learning_rate"), "with gan_weight 0")
        if self.high_noise_steps == 1:
            refuse_unread(self, ("multi_step_input",), "with high_noise_steps 1, whose one step starts from noise")
        if not 0 < self.fake_score_decay <= 1:
            raise ValueError(f"fake_score_decay must be above 0 and at most 1, got {self.fake_score_decay}")
        if not 0 < self.high_noise_steps <= len(self.timesteps):
            raise ValueError(
                f"high_noise_steps must be between 1 and the number of timesteps, {len(self.timesteps)}, "
                f"got {self.high_noise_steps}"
            )
        if self.gan_weight > 0 and self.high_noise_steps == len(self.timesteps):
            raise ValueError(
                f"with high_noise_steps {self.high_noise_steps} of {len(self.timesteps)} timesteps no step is left for "
                "the adversary: lower it, or set gan_weight to 0"
            )
        if self.gan_weight == 0 and self.high_noise_steps < len(self.timesteps):
            raise ValueError(
                f"with gan_weight 0 nothing trains the {len(self.timesteps) - self.high_noise_steps} cleanest steps: "
                "give gan_weight, or match at all steps with high_noise_steps"
            )


class FlashDMD(ScoreGap):
    r"""The noisy steps of a few-step student are matched to the teacher; the clean ones are judged as images.

    At a step k drawn among the noisy ones x = G(x_k) has DMD2's gradient. From sg[x] the chain of steps is finished
    without gradient; its result x_0 is noised to a time drawn among the clean steps, and with that one call of the
    student,

        y = G(alpha x_0 + sigma eps),   L_student = L_DMD2(x) + gan_weight * softplus(-l(decode(y))),
        L_heads = softplus(l(decode(y))) + softplus(-l(decode(image))), y detached,

    where l are heads on the features of a frozen image network, averaged. Real images are decoded from their latents
    too, so that the decoder's own traces tell nothing. No score is evaluated at the clean steps. The fake score denoises
    samples x and then moves towards the student: psi <- d psi + (1 - d) theta, d = `fake_score_decay`.
    """

    info = MethodInfo(
        name="flash_dmd",
        title="Flash-DMD",
        family="distribution matching",
        paper="Flash-DMD: Towards High-Fidelity Few-Step Image Generation with Efficient Distillation and Joint "
        "Reinforcement Learning",
        arxiv="2511.20549",
        needs="images",
        student_kinds=("lora", "full"),
        steps="2-8",
    )
    Config = FlashDMDConfig
    config: FlashDMDConfig

    def __init__(self, config: FlashDMDConfig) -> None:
        super().__init__(config)
        self.adversary = PixelAdversary(config.gan_loss, config.gan_r1_weight)

    def groups(self) -> dict[str, Group]:
        heads = {"discriminator": Group(self.config.discriminator_learning_rate)}
        return super().groups() | (heads if self.config.gan_weight else {})

    def needs(self) -> Need:
        return "images" if self.config.gan_weight else super().needs()

    def needs_scorer(self) -> bool:
        return bool(self.config.gan_weight)

    def scorer_modules(self, scorer: Scorer) -> dict[str, nn.Module]:
        return self.adversary.modules(scorer) if self.config.gan_weight else {}

    def targets(self) -> tuple[TargetNetwork, ...]:
        if self.config.fake_score_decay == 1:
            return ()
        return (TargetNetwork("fake_score", "student", self.config.fake_score_decay, after="fake_score"),)

    def updates(self, step: int) -> Iterable[Update]:
        for update in super().updates(step):
            if update.name == "fake_score":
                yield replace(update, trains=("fake_score",))
                continue
            yield update
            if self.config.gan_weight:
                yield Update("discriminator", self.discriminator_loss, ("discriminator",))

    def sample(self, batch: Batch, ctx: Context, with_grad: bool) -> Tensor:
        """The student's clean sample from one of its noisy steps."""
        high = self.config.timesteps[: self.config.high_noise_steps]
        return student_sample(batch, ctx, high, self.config.multi_step_input, with_grad=with_grad)

    def student_terms(self, x: Tensor, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """The adversarial term of a clean step."""
        if not self.config.gan_weight:
            return {}
        images = ctx.decode(self.low_noise_sample(x.detach(), batch, ctx))
        ctx.store["images"] = images.detach()
        return {"gan": self.config.gan_weight * self.adversary.student_term(images, ctx)}

    def discriminator_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The heads' loss on this step's decoded samples and on decoded images of the data."""
        with torch.no_grad():
            real = ctx.decode(batch.images())
        return self.adversary.discriminator_terms(real, ctx.store["images"], ctx)

    def low_noise_sample(self, x: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """What a drawn clean step makes of the finished chain that goes on from `x`; its call keeps the graph."""
        times, high = self.config.timesteps, self.config.high_noise_steps
        with torch.no_grad():
            for position in range(drawn_step(ctx, times[:high]) + 1, len(times)):
                x = self._step(x, position, f"student/finish/{position}", batch, ctx)
        position = high + drawn_step(ctx, times[high:], "student/low")
        return self._step(x, position, "student/low", batch, ctx)

    def _step(self, x0: Tensor, position: int, site: str, batch: Batch, ctx: Context) -> Tensor:
        """One step of the sampler: fresh noise on a clean sample, and the student's clean sample of that."""
        schedule = ctx.denoiser.schedule
        t = time_at(self.config.timesteps[position], x0, schedule)
        x_t = schedule.add_noise(x0, ctx.random.normal(f"{site}/eps", x0.shape[1:]), t)
        return ctx.denoiser(x_t, t, batch.cond, "student").x0
