"""Uni-Instruct: any f-divergence, expanded along the diffusion into weighted Fisher divergences (arXiv 2505.20755)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastdiff.diffusion.divergences import DivergenceName, divergence_named
from fastdiff.diffusion.tensors import broadcast_to
from fastdiff.methods._score_identity import LOGIT_BOUND, Scored, ScoreIdentity, ScoreIdentityConfig, dot
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import MethodInfo

OFFICIAL = ("rkl", "fkl", "jeffreys")
"""Weights that the released code has: two it runs, and that of rkl, which is 1, in a branch that stops at a missing name."""


@dataclass(frozen=True)
class UniInstructConfig(ScoreIdentityConfig):
    """Defaults are those of the paper's small-image runs; none on text-to-image are known.

    Args:
        divergence: which f; `rkl` asks no density ratio and, without `gan_weight`, no images.
        power: exponent of h(r) = r^power where `divergence` is `power`.
        mode: `official` is what the released code computes, one term with a weight, for rkl, fkl and jeffreys; `exact`
            takes all three terms of the gradient.
        gan_weight: weight of the student's adversarial term; the ratio is learned at 0 too.
        gan_head: a trained head gives a log-ratio; the mean over channels has no scale of its own.
    """

    divergence: DivergenceName = "fkl"
    power: float = 0.5
    mode: Literal["exact", "official"] = "official"
    gan_weight: float = 0.01
    gan_head: Literal["channel_mean", "trained"] = "trained"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "official" and self.divergence not in OFFICIAL:
            raise ValueError(
                f"divergence {self.divergence!r} has no official mode: the released code has weights for {OFFICIAL} only. "
                "Take mode exact."
            )
        if self.gan_discriminator_weight == 0 and self.divergence != "rkl":
            raise ValueError(
                f"divergence {self.divergence!r} takes the density ratio from the discriminator: "
                "gan_discriminator_weight must be above 0, or the divergence rkl"
            )
        if self.divergence != "power":
            refuse_unread(self, ("power",), f"with divergence {self.divergence}")

    @property
    def adversarial(self) -> bool:
        """Whether a discriminator is trained: for its term, or for the ratio."""
        return super().adversarial or self.divergence != "rkl"


class UniInstruct(ScoreIdentity):
    r"""Minimises an f-divergence as the integral over noise levels of E_q[h(r) |s_p - s_q|^2].

    With r = p_t(x_t) / q_t(x_t) of teacher and student, h(r) = r^2 f''(r), H(phi) = h(e^phi) at phi = log r, levels
    a, s of the time, d = D_real(x_t) - D_fake(x_t) and u = d . (D_fake(x_t) - x), a sample's loss is

        (H - H') |d|^2 + 2 H u + x_t . sg[a / s^2 ((H' - H'') |d|^2 + 2 H' u) d],

    weighted, scaled and reduced as in SiD (H, H', H'' detached; d and u through the inputs of both networks). Without
    the normaliser and times a^2 / s^4 its expected gradient is that of E_q[h(r) |s_p - s_q|^2] at every time. Reverse
    KL is SiD at alpha = 1/2, twice. The integral is a divergence under the diffusion's own weights over times; under
    SiD's, an h that vanishes with r (fkl, js, Hellinger) can reward samples that the discriminator is sure to tell
    from images. On two rings of modes the exact mode of js left them for good, that of fkl was no gain at one seed of
    three, and that of soft_rkl converged.

    `official` is what the released code computes, c u with c = 1 (rkl, SiD at alpha = 1), r (fkl) or 0.4 r + 0.6
    (jeffreys). Its fixed point is the same, its direction is not: between Gaussians that of fkl can have the wrong
    sign in the scale. r = exp(logit), bounded, of a discriminator of student and data that reads the fake score's middle
    activation, where the released code makes r of the discriminator's loss; fake score and discriminator are trained
    as in SiDA. The released code spends its first 200,000 images on c = 1 alone: a stage of method `sid` with `alpha: 1`
    before this one. Its student rests for the first 100,000 images where there is a GAN, as SiDA's does.
    """

    info = MethodInfo(
        name="uni_instruct",
        title="Uni-Instruct",
        family="Fisher divergence",
        paper="Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction",
        arxiv="2505.20755",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-4",
    )
    Config = UniInstructConfig
    config: UniInstructConfig

    def __init__(self, config: UniInstructConfig) -> None:
        super().__init__(config)
        self.divergence = divergence_named(config.divergence, config.power)

    def sample_loss(self, scored: Scored) -> Tensor:
        """The surrogate of the config's mode."""
        phi = self.log_ratio(scored)
        if self.config.mode == "official":
            return self._official(phi) * dot(scored.gap, scored.residual)
        gap, residual, x_t = scored.gap, scored.residual, scored.real.x_t
        square, cross = dot(gap, gap), dot(gap, residual)
        law = self.divergence
        # The last term has the gradient of its vector and no value of its own.
        alpha, sigma = scored.real.levels
        pull = law.rest_slope(phi) * square + 2 * law.slope(phi) * cross
        vector = (alpha / sigma**2 * broadcast_to(pull, gap) * gap).detach()
        return law.rest(phi) * square + 2 * law.h(phi) * cross + dot(vector, x_t - x_t.detach())

    def log_ratio(self, scored: Scored) -> Tensor:
        """`(B,)`, the discriminator's log p_t(x_t) / q_t(x_t) without graph; 0 where nothing asks for it."""
        if scored.logits is None:
            return scored.gap.new_zeros(len(scored.x))
        return scored.logits.detach().mean(dim=1).clamp(-LOGIT_BOUND, LOGIT_BOUND).to(scored.gap.dtype)

    def _official(self, phi: Tensor) -> Tensor:
        match self.config.divergence:
            case "fkl":
                return phi.exp()
            case "jeffreys":
                return 0.4 * phi.exp() + 0.6
        return phi.new_ones(())
