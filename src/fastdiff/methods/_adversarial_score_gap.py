"""Score-gap methods that may add a discriminator on the features of the fake score or of the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastdiff.diffusion.prediction import Prediction
from fastdiff.methods._adversarial import Adversary, FeatureBlocks, Noisy, check_discriminator, weighted
from fastdiff.methods._score_gap import ScoreGap, ScoreGapConfig
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, Group, Need, check_not_negative
from fastdiff.models.denoiser import Denoiser

_OF_GAN = ("gan_discriminator_weight", "gan_loss", "gan_features", "gan_blocks", "gan_r1_weight")


@dataclass(frozen=True)
class AdversarialScoreGapConfig(ScoreGapConfig):
    """A score gap and, with `gan_weight` above 0, a GAN.

    Args:
        gan_weight: weight of the adversarial term of the student; 0 needs no images.
        gan_discriminator_weight: weight of the discriminator's loss beside the denoising loss.
        gan_loss: `softplus` or `hinge`.
        gan_features: what the heads read: the fake score, trained by the discriminator's loss too (DMD2's code), or
            the frozen teacher (FastGen's code).
        gan_blocks: one head on the middle block, or one on each block of the encoder or of the whole network.
        gan_r1_weight: weight of the approximate R1 penalty of the discriminator.
    """

    gan_weight: float = 0.0
    gan_discriminator_weight: float = 1e-2
    gan_loss: Literal["softplus", "hinge"] = "softplus"
    gan_features: Literal["fake_score", "teacher"] = "fake_score"
    gan_blocks: FeatureBlocks = "middle"
    gan_r1_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(gan_weight=self.gan_weight, gan_discriminator_weight=self.gan_discriminator_weight)
        check_discriminator(self.gan_weight, self.gan_discriminator_weight)
        check_not_negative(gan_r1_weight=self.gan_r1_weight)
        if self.gan_weight == 0:
            refuse_unread(self, _OF_GAN, "with gan_weight 0")


class AdversarialScoreGap(ScoreGap):
    """A score-gap method whose student may also face a discriminator, trained in the fake score's update."""

    config: AdversarialScoreGapConfig

    def __init__(self, config: AdversarialScoreGapConfig) -> None:
        super().__init__(config)
        self.adversary = Adversary(
            config.gan_features, config.gan_loss, config.gan_blocks, r1_weight=config.gan_r1_weight
        )

    def groups(self) -> dict[str, Group]:
        groups = super().groups()
        return groups | {"discriminator": groups["fake_score"]} if self.config.gan_weight else groups

    def needs(self) -> Need:
        return "images" if self.config.gan_weight else super().needs()

    def modules(self, denoiser: Denoiser) -> dict[str, nn.Module]:
        return self.adversary.modules(denoiser) if self.config.gan_weight else {}

    def student_terms(self, x: Tensor, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """The adversarial term, if weighted."""
        if not self.config.gan_weight:
            return {}
        return {"gan": self.config.gan_weight * self.adversary.student_term(x, batch.cond, ctx)}

    def critic_call(
        self, x: Tensor, x_t: Tensor, t: Tensor, batch: Batch, ctx: Context
    ) -> tuple[Prediction, dict[str, Tensor]]:
        """Where the heads read the fake score, one call serves denoising and both sides of the discriminator."""
        if not self.config.gan_weight:
            return super().critic_call(x, x_t, t, batch, ctx)
        fake = self.judged(x, ctx, "critic/gan_fake", fake=True)
        real = self.judged(batch.images(), ctx, "critic/gan_real", fake=False)
        if self.config.gan_features == "fake_score":
            prediction, terms = self.adversary.terms_beside(Noisy(x_t, t), real, fake, batch.cond, ctx)
        else:
            prediction, _ = super().critic_call(x, x_t, t, batch, ctx)
            terms = self.adversary.discriminator_terms(real, fake, batch.cond, ctx)
        return prediction, weighted(terms, self.config.gan_discriminator_weight)

    def judged(self, x: Tensor, ctx: Context, site: str, fake: bool) -> Noisy:
        """What the discriminator is shown of the student's samples, or of clean images."""
        return self.adversary.noised(x, ctx, site)
