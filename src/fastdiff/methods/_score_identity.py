"""What methods share whose gradient passes through the inputs of both score networks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from fastdiff.diffusion.losses import discriminator_softplus, generator_softplus, mse
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.tensors import compute_dtype
from fastdiff.methods._adversarial import Adversary, check_discriminator
from fastdiff.methods._prompts import without_prompts
from fastdiff.methods._rollout import student_sample
from fastdiff.methods._score_gap import ScoreGap, ScoreGapConfig
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, Group, Need, any_time, check_not_negative, check_positive
from fastdiff.models.denoiser import Ask, Denoiser, Taps

LOGIT_BOUND = 10.0
"""Of logits in the student's turn, as in the released code of SiDA."""

_ADVERSARY = Adversary("fake_score", blocks="middle")


@dataclass(frozen=True)
class ScoreIdentityConfig(ScoreGapConfig):
    """Times are those of SiD on text-to-image (arXiv 2406.01561), the rest those of SiD and SiDA (arXiv 2410.14919).

    Optimizer settings are a run's, and the recipes have the papers': Adam's betas (0, 0.999) and, since these losses
    are sums, no clipping of gradients' norm that would bite (`max_grad_norm` 1e5 and more).

    Args:
        guidance_scale: w of the teacher's score and, with `guided` both, of the fake score; 1 means none.
        guided: guide teacher and fake score alike, the latter also while it is trained (SiD-LSG), or the teacher
            alone.
        prompt_dropout: share of the fake score's samples that are made and fitted without a prompt, where the fake
            score is guided.
        timesteps: the student's times; 625 has the noise-to-signal ratio 2.5 that SiD starts from.
        max_timestep: last of the times at which scores are compared and the fake score is trained.
        loss_scale: multiplies the student's score loss, which is summed over a sample's elements.
        gan_weight: weight of the student's adversarial term, which is multiplied by the number of elements and the
            score loss's mean weight, but not by `loss_scale`; 0 needs no images.
        gan_discriminator_weight: weight of the discriminator's mean loss beside the summed denoising loss.
        gan_head: what makes logits of the fake score's middle activation: its mean over channels, a map without
            further weights (SiDA), or a small trainable head.
    """

    guided: Literal["both", "teacher"] = "both"
    prompt_dropout: float = 0.1
    timesteps: tuple[int, ...] = (625,)
    max_timestep: int = 979
    loss_scale: float = 100.0
    gan_weight: float = 0.0
    gan_discriminator_weight: float = 1.0
    gan_head: Literal["channel_mean", "trained"] = "channel_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(loss_scale=self.loss_scale)
        check_not_negative(gan_weight=self.gan_weight, gan_discriminator_weight=self.gan_discriminator_weight)
        check_discriminator(self.gan_weight, self.gan_discriminator_weight)
        if not 0 <= self.prompt_dropout < 1:
            raise ValueError(f"prompt_dropout must be in [0, 1), got {self.prompt_dropout}")
        if self.guidance_scale == 1:
            refuse_unread(self, ("guided",), "with guidance_scale 1")
        if self.fake_guidance == 1:
            refuse_unread(self, ("prompt_dropout",), "where the fake score is not guided")
        if not self.adversarial:
            refuse_unread(self, ("gan_head", "gan_discriminator_weight"), "where no discriminator is trained")

    @property
    def adversarial(self) -> bool:
        """Whether a discriminator is trained."""
        return self.gan_weight > 0

    @property
    def fake_guidance(self) -> float:
        """w of the fake score, in its own training too."""
        return self.guidance_scale if self.guided == "both" else 1.0


class Scored(NamedTuple):
    """One noised version of the student's sample with both scores, all with their graphs.

    `x` `(B, C, H, W)`, predictions like it, `weight` `(B,)` detached, `logits` `(B, K)` where there is a discriminator.
    """

    x: Tensor
    real: Prediction
    fake: Prediction
    weight: Tensor
    logits: Tensor | None

    @property
    def gap(self) -> Tensor:
        """D_real - D_fake, which is sigma^2/alpha times s_real - s_fake."""
        return self.real.x0 - self.fake.x0

    @property
    def residual(self) -> Tensor:
        """D_fake - x, which is sigma^2/alpha times s_fake - grad log q(x_t | x)."""
        return self.fake.x0 - self.x


class ScoreIdentity(ScoreGap):
    """A student trained by a number made of both scores at its noised sample; their inputs carry its graph.

    The fake score steps first, on samples of its own. Losses are summed over the elements of a sample, as in the
    released code of the family, whose weights are meant so. A subclass says `sample_loss`.
    """

    student_first = False
    config: ScoreIdentityConfig

    def groups(self) -> dict[str, Group]:
        groups = super().groups()
        with_head = self.config.adversarial and self.config.gan_head == "trained"
        return groups | {"discriminator": groups["fake_score"]} if with_head else groups

    def needs(self) -> Need:
        return "images" if self.config.adversarial else super().needs()

    def modules(self, denoiser: Denoiser) -> dict[str, nn.Module]:
        return _ADVERSARY.modules(denoiser) if "discriminator" in self.groups() else {}

    # The student's turn

    @abstractmethod
    def sample_loss(self, scored: Scored) -> Tensor:
        """`(B,)`, before weights; its gradient is what counts."""

    def score_terms(self, x: Tensor, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """The weighted loss, and the adversarial term at the same noised sample."""
        scored = self.scored(x, batch, ctx)
        terms = {"score_identity": self.config.loss_scale * (scored.weight * self.sample_loss(scored)).mean()}
        if self.config.gan_weight:
            fooling = generator_softplus(scored.logits.clamp(-LOGIT_BOUND, LOGIT_BOUND))
            terms["gan"] = self.config.gan_weight * x[0].numel() * scored.weight.mean() * fooling
        return terms

    def scored(self, x: Tensor, batch: Batch, ctx: Context) -> Scored:
        """Teacher, fake score and, on its features, the discriminator at one noised version of `x`."""
        t, x_t = self.noised(x, ctx, "student")
        taps = self._taps(ctx)
        asked, asking = self.asks(batch, ctx)
        real = ctx.denoiser(x_t, t, asked.cond, asked.role, asked.null, asked.guidance)
        fake = ctx.denoiser(x_t, t, asking.cond, asking.role, asking.null, asking.guidance, taps)
        logits = self._logits(taps, len(batch), ctx) if taps else None
        scored = Scored(x, real, fake, self.weight(x, real).detach().flatten(), logits)
        ctx.log("score_gap", scored.gap.detach().abs().mean())
        return scored

    def asks(self, batch: Batch, ctx: Context) -> list[Ask]:
        """The teacher's question, then the fake score's."""
        teacher, fake = super().asks(batch, ctx)
        return [teacher, Ask(fake.role, batch.cond, batch.null, self.config.fake_guidance)]

    # The turn of fake score and discriminator

    def critic_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """Denoising of the student's samples through the guidance the fake score is asked with."""
        if self.config.fake_guidance != 1:
            batch = without_prompts(batch, ctx.random.bernoulli("critic/no_prompt", self.config.prompt_dropout))
        x = self.critic_sample(batch, ctx)
        t = any_time(ctx, "critic/t", self.config.min_timestep, self.config.max_timestep)
        eps = ctx.random.normal("critic/eps", batch.latent_shape)
        taps = self._taps(ctx)
        x_t = ctx.denoiser.schedule.add_noise(x, eps, t)
        prediction = ctx.denoiser(x_t, t, batch.cond, "fake_score", batch.null, self.config.fake_guidance, taps)
        terms = {"denoising": x[0].numel() * self.fake_error(prediction, x, eps, t)}
        if taps:
            fake = self._logits(taps, len(batch), ctx)
            # Real images get the same noise; the network stops at the activation that is read.
            real_t = ctx.denoiser.schedule.add_noise(batch.images(), eps, t)
            real = self._real_logits(real_t, t, batch, ctx)
            terms["discriminator"] = self.config.gan_discriminator_weight / 2 * discriminator_softplus(real, fake)
        return terms

    def fake_error(self, prediction: Prediction, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of the fake score, in its own prediction type."""
        return mse(prediction.native, prediction.target(x, eps))

    def critic_sample(self, batch: Batch, ctx: Context) -> Tensor:
        """The student's sample without graph, from noise of its own."""
        config = self.config
        return student_sample(
            batch, ctx, config.timesteps, config.multi_step_input, site="critic/student", with_grad=False
        )

    def _taps(self, ctx: Context) -> Taps | None:
        return Taps(tuple(_ADVERSARY.taps(ctx.denoiser))) if self.config.adversarial else None

    def _logits(self, taps: Taps, rows: int, ctx: Context) -> Tensor:
        """Of the conditional rows, which come after the unconditional ones where there is guidance."""
        return self._head(*(taps.features[name][-rows:] for name in taps.names), ctx=ctx)

    def _real_logits(self, x_t: Tensor, t: Tensor, batch: Batch, ctx: Context) -> Tensor:
        names = tuple(_ADVERSARY.taps(ctx.denoiser))
        return self._head(*ctx.denoiser.features(x_t, t, batch.cond, "fake_score", names), ctx=ctx)

    def _head(self, features: Tensor, ctx: Context) -> Tensor:
        if self.config.gan_head == "trained":
            return ctx.modules[_ADVERSARY.name](features)
        return features.to(compute_dtype(features)).mean(dim=1).flatten(1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, `(B,)`."""
    return (a * b).flatten(1).sum(dim=1)
