"""A discriminator of decoded images: small trainable heads on the features of the run's frozen scorer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff.methods._adversarial import GanLoss, Players
from fastdiff.methods.base import Context
from fastdiff.models.discriminator import FeatureHeads
from fastdiff.models.scorers import Scorer


@dataclass(frozen=True)
class PixelAdversary(Players):
    """Heads on each activation of `ctx.scorer`; only they learn. Images are `(B, 3, H, W)` in [-1, 1].

    Args:
        loss: `softplus`; `hinge`, whose generator maximises the logit; `margin`, hinge with generator relu(1 - logit).
        r1_weight, r1_std: of the squared change of real logits when noise of this deviation is added to the image.
        name: name of the heads as a module and trainable group.
    """

    loss: GanLoss = "softplus"
    r1_weight: float = 0.0
    r1_std: float = 0.1
    name: str = "discriminator"

    def modules(self, scorer: Scorer) -> dict[str, nn.Module]:
        """The heads, for `Method.scorer_modules`."""
        return {self.name: FeatureHeads(scorer.feature_channels)}

    def logits(self, images: Tensor, ctx: Context) -> Tensor:
        """`(B, K)`, one for each head; differentiable in the images."""
        return ctx.modules[self.name](*ctx.scorer.features(images))

    def student_term(self, images: Tensor, ctx: Context) -> Tensor:
        """The generator's loss on images with their graph."""
        return self.generator_loss(self.logits(images, ctx))

    def discriminator_terms(
        self, real: Tensor, fake: Tensor, ctx: Context, site: str = "critic/pixels"
    ) -> dict[str, Tensor]:
        """The heads' losses on detached images."""
        with torch.no_grad():
            features = ctx.scorer.features(self.sides(real, fake, ctx, site))
        return self.terms(ctx.modules[self.name](*features), len(real), ctx)
