"""Decoupled DMD: guidance and matching as two terms, each with its own noise levels (arXiv 2511.22677)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastdiff.diffusion.losses import surrogate
from fastdiff.methods._adversarial_score_gap import AdversarialScoreGap, AdversarialScoreGapConfig
from fastdiff.methods._rollout import drawn_step
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, Group, MethodInfo, any_time, check_not_negative, check_positive
from fastdiff.models.denoiser import Ask
from fastdiff.models.roles import TEACHER

TimeLaw = Literal["below_input", "all"]


@dataclass(frozen=True)
class DecoupledDMDConfig(AdversarialScoreGapConfig):
    """Defaults are those of the paper's four-step SDXL run, which also keeps DMD2's GAN (`gan_weight` 5e-3).

    Args:
        guidance_scale: w of the augmentation term; 1 leaves the term out.
        timesteps: the student's times, noisiest first; the two terms differ most at the later ones.
        student_update_every: steps per student update.
        augmentation_times: noise levels of the augmentation term: those cleaner than the input of the student's drawn
            step (the paper's choice), or the whole range.
        matching_times: the same choice for the matching term; the paper takes the whole range.
        matching_weight: weight of the matching term; at 0, without a GAN, there is no fake score at all and every step
            is the student's.
        moments_weight: weight of the regulariser that pulls each sample's mean and variance to the two below.
        moments_mean, moments_variance: of a clean sample; the defaults are the paper's for SDXL's latents.
    """

    guidance_scale: float = 8.0
    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    student_update_every: int = 5
    augmentation_times: TimeLaw = "below_input"
    matching_times: TimeLaw = "all"
    matching_weight: float = 1.0
    moments_weight: float = 0.0
    moments_mean: float = 0.075
    moments_variance: float = 0.81

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(matching_weight=self.matching_weight, moments_weight=self.moments_weight)
        check_positive(moments_variance=self.moments_variance)
        self._check_read()
        if self.guidance_scale == 1 and not self.has_critic:
            raise ValueError(
                "guidance_scale 1 leaves out the augmentation term and matching_weight 0 the matching term: nothing "
                "tells the student what to sample. Set one of them, or gan_weight."
            )
        if not self.has_critic and self.student_update_every > 1:
            raise ValueError(
                "matching_weight 0 without a GAN leaves no fake score to train between the student's updates: set "
                f"student_update_every to 1, not {self.student_update_every}"
            )
        if self.matching_weight == 0 and self.gan_weight and self.gan_features == "teacher":
            raise ValueError(
                "matching_weight 0 with gan_features teacher trains a fake score that nobody asks: take gan_features "
                "fake_score, or a matching_weight above 0"
            )
        augmented = self.guidance_scale != 1 and self.augmentation_times == "below_input"
        matched = self.matching_weight and self.matching_times == "below_input"
        if (augmented or matched) and self.timesteps[-1] <= self.min_timestep:
            raise ValueError(
                f"there is no noise level between min_timestep ({self.min_timestep}) and the input of the student's "
                f"last step ({self.timesteps[-1]}): lower min_timestep, or take the times of both terms from 'all'"
            )

    def _check_read(self) -> None:
        if self.guidance_scale == 1:
            refuse_unread(
                self, ("augmentation_times",), "with guidance_scale 1, which leaves out the augmentation term"
            )
        if self.matching_weight == 0:
            refuse_unread(self, ("matching_times",), "with matching_weight 0")
        if self.moments_weight == 0:
            refuse_unread(self, ("moments_mean", "moments_variance"), "with moments_weight 0")
        if not self.has_critic:
            refuse_unread(self, ("fake_score_learning_rate",), "without a fake score")

    @property
    def has_critic(self) -> bool:
        """Whether a term asks the fake score."""
        return bool(self.matching_weight or self.gan_weight)


class DecoupledDMD(AdversarialScoreGap):
    r"""Splits DMD with guidance into the part that guides and the part that matches.

    Since D_fake - D_real^w = (D_fake - D_c) - (w - 1) (D_c - D_null), the gradient in the student's sample x is

        g_DM = (D_fake - D_c)(x_s) / mean|D_c(x_s) - x|,      s over all noise levels,
        g_CA = -(w - 1) (D_c - D_null)(x_r) / mean|D_c(x_r) - x|,      r cleaner than the student's input,
        L_student = 1/2 mean (x - sg[x - g_DM])^2 + 1/2 mean (x - sg[x - g_CA])^2,

    with independent times and noises, everything in g_DM and g_CA detached; the fake score is fitted unguided at all
    times. Optional: a GAN as in DMD2, and the divergence KL(N(mean_x, var_x) || N(mean, variance)) of each sample's own
    moments. With equal times, noises and normalisers the gradient is that of guided DMD; with equal covariances of the
    conditional and unconditional law and weights a(t)^2 / s(t)^2 in place of the normalisers, its optimum has the mean
    m_c + (w - 1) H^-1 C (m_c - m_null), H and C the means of a^2 (a^2 S + s^2 I)^-1 over the times of the two terms.
    """

    info = MethodInfo(
        name="decoupled_dmd",
        title="Decoupled DMD",
        family="distribution matching",
        paper="Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield",
        arxiv="2511.22677",
        needs="prompts",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = DecoupledDMDConfig
    config: DecoupledDMDConfig

    def groups(self) -> dict[str, Group]:
        groups = super().groups()
        if not self.config.has_critic:
            del groups["fake_score"]
        return groups

    def asks(self, batch: Batch, ctx: Context) -> list[Ask]:
        """Of the matching term: nobody is guided."""
        return [Ask(TEACHER, batch.cond), Ask("fake_score", batch.cond)]

    def compares_with_null(self) -> bool:
        return self.config.guidance_scale != 1

    def score_terms(self, x: Tensor, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """The two terms as far as they are weighted, and the moments."""
        config, terms = self.config, {}
        if config.matching_weight:
            gradient = self.gradient(x.detach(), batch, ctx)
            terms["distribution_matching"] = config.matching_weight * surrogate(x, gradient)
        if config.guidance_scale != 1:
            terms["guidance_augmentation"] = surrogate(x, self.augmentation(x.detach(), batch, ctx))
        if config.moments_weight:
            divergence = moments_divergence(x, config.moments_mean, config.moments_variance)
            terms["moments"] = config.moments_weight * divergence
        return terms

    def augmentation(self, x: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """The x-gradient, detached, that moves a sample along the teacher's guidance."""
        t, x_t = self._noised(x, ctx, "augmentation", self.config.augmentation_times)
        asks = [Ask(TEACHER, batch.cond), Ask(TEACHER, batch.null.expand(len(batch)))]
        cond, null = ctx.denoiser.together(x_t, t, asks)
        gap = cond.x0 - null.x0
        ctx.log("guidance_gap", gap.abs().mean())
        return (1 - self.config.guidance_scale) * self.weight(x, cond) * gap

    def noised(self, x: Tensor, ctx: Context, site: str) -> tuple[Tensor, Tensor]:
        """For the matching term."""
        return self._noised(x, ctx, site, self.config.matching_times)

    def _noised(self, x: Tensor, ctx: Context, site: str, law: TimeLaw) -> tuple[Tensor, Tensor]:
        last = self.config.max_timestep
        if law == "below_input":
            last = min(last, self.config.timesteps[drawn_step(ctx, self.config.timesteps)])
        t = any_time(ctx, f"{site}/t", self.config.min_timestep, last)
        return t, ctx.denoiser.schedule.add_noise(x, ctx.random.normal(f"{site}/eps", x.shape[1:]), t)


def moments_divergence(x: Tensor, mean: float, variance: float) -> Tensor:
    """Mean over samples of KL(N(m, v) || N(mean, variance)), m and v the mean and variance of a sample's numbers."""
    own = x.flatten(1)
    v = own.var(dim=1, correction=0)
    return ((v + (own.mean(dim=1) - mean).square()) / variance - 1 - (v / variance).log()).mean() / 2
