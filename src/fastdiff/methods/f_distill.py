"""f-distill: one-step diffusion models with any f-divergence (Xu et al. 2025, arXiv 2502.15681)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastdiff.diffusion.divergences import DivergenceName
from fastdiff.diffusion.losses import surrogate
from fastdiff.diffusion.tensors import broadcast_to
from fastdiff.methods._adversarial import Noisy
from fastdiff.methods._ratio import RatioConfig, RatioWeighted
from fastdiff.methods.base import Batch, Context, MethodInfo


@dataclass(frozen=True)
class FDistillConfig(RatioConfig):
    """Defaults are those of the paper's SD1.5 run, with the heads of the released code.

    Args:
        divergence: which f; `rkl` is DMD2, `js` the paper's best on COCO, `fkl` covers most modes and is noisiest.
        guidance_scale: w of the teacher's score. The ratio compares the student with the images of the data, so that
            far above 1 the weight is a heuristic.
        update_rule: as in the released code, a step updates either the student or its critics.
        student_update_every: steps per student update.
        gan_weight: weight of the adversarial term of the student; above 0, since the ratio comes from its heads.
        gan_discriminator_weight: weight of the discriminator's loss.
        gan_features: what the heads read; the released code takes the frozen teacher.
        gan_r1_weight: weight of the approximate R1 penalty of the discriminator.
        time_bins: parts of the time range in which the ratio is brought to mean 1 before h is taken (the released
            code's); 0 for none.
        time_bins_decay: share of the old mean of such a part in its new one. The released code takes 0 (0.5 on
            ImageNet), for batches of 512 and more: there a micro-batch has dozens of samples for each part. Ours serves
            small ones.
    """

    divergence: DivergenceName = "js"
    time_bins: int = 10
    time_bins_decay: float = 0.99
    guidance_scale: float = 1.75
    update_rule: Literal["every", "exclusive"] = "exclusive"
    student_update_every: int = 10
    gan_weight: float = 1e-3
    gan_discriminator_weight: float = 1.0
    gan_features: Literal["fake_score", "teacher"] = "teacher"
    gan_r1_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan_weight == 0:
            raise ValueError(
                "f_distill takes the density ratio from the GAN's heads: gan_weight must be above 0. Without a GAN only "
                "the reverse KL is possible: that is method dmd2."
            )
        self.check_logits()


class FDistill(RatioWeighted):
    r"""DMD2 with each sample weighted by h(r) = r^2 f''(r) of the density ratio r.

    With logit l at the same (x_t, t) as the scores, r = p_teacher,t(x_t) / p_student,t(x_t) = exp(l) from the
    discriminator, clamped, and everything in g detached,

        g = h(r) / mean(h) * (D_fake - D_real^w) / mean|x - D_real^w|,
        L_student = 1/2 mean (x - sg[x - g])^2 + gan_weight * softplus(-l(x_t)),

    where mean(h) is over the samples of a micro-batch on all processes, as is the mean by which r is divided in each of
    `time_bins` parts of the time range; heads at several blocks are averaged. Fake score and
    discriminator are trained as in DMD2, on independent times and noises. Two differences from the released code: its
    1e-6 in denominators is left out, so that rkl and constant logits are DMD2 exactly, and the logit needs no bound of
    its own beside that of the ratio.
    """

    info = MethodInfo(
        name="f_distill",
        title="f-distill",
        family="distribution matching",
        paper="One-step Diffusion Models with f-Divergence Distribution Matching",
        arxiv="2502.15681",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = FDistillConfig
    config: FDistillConfig

    def score_terms(self, x: Tensor, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """The weighted gap, and the adversarial term at the same noisy samples, which keep the graph for it."""
        t, x_t = self.noised(x, ctx, "student")
        logits = self.adversary.logits(Noisy(x_t, t), batch.cond, ctx)
        real, fake = ctx.denoiser.together(x_t.detach(), t, self.asks(batch, ctx))
        gap = fake.x0 - real.x0
        ctx.log("score_gap", gap.abs().mean())
        gradient = broadcast_to(self.density_weight(logits, t, ctx), gap) * self.weight(x.detach(), real) * gap
        return {
            "distribution_matching": surrogate(x, gradient),
            "gan": self.config.gan_weight * self.adversary.generator_loss(logits),
        }

    def student_terms(self, x: Tensor, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """The adversarial term stands beside the scores."""
        return {}
