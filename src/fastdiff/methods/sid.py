"""Score identity distillation: SiD, SiDA, SiD-LSG, and SIM (arXiv 2404.04057, 2410.14919, 2406.01561, 2410.16794)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.losses import mse
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.tensors import broadcast_to
from fastdiff.methods._score_identity import Scored, ScoreIdentity, ScoreIdentityConfig, dot
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import MethodInfo, check_not_negative, check_positive

Distance = Literal["l2", "l1", "pseudo_huber"]


@dataclass(frozen=True)
class SiDConfig(ScoreIdentityConfig):
    """Loss and scale are those of the paper on small images; SiD-LSG has those on text-to-image.

    Args:
        distance: of the two scores: squared, with `alpha`; pseudo-Huber, with `huber_c`; or the sum of absolute values.
            For any other, override `distance_gradient` (SIM).
        alpha: 1/2 is the gradient of the Fisher divergence, 1 the same with the sampling law held fixed, above 1
            extrapolates; the papers find 1 to 1.2 best.
        huber_c: width of the quadratic part of the pseudo-Huber distance, in the root mean square over a sample of
            D_fake - D_real; the paper's value is not known.
    """

    distance: Distance = "l2"
    alpha: float = 1.2
    huber_c: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(alpha=self.alpha)
        check_positive(huber_c=self.huber_c)
        if self.distance != "l2" and self.alpha != 1:
            raise ValueError(
                f"alpha {self.alpha} belongs to the squared distance: {self.distance} has only the gradient with the "
                "sampling law held fixed, which is alpha 1. Set alpha to 1, or distance to l2."
            )
        if self.distance != "pseudo_huber":
            refuse_unread(self, ("huber_c",), f"with distance {self.distance}")


class SiD(ScoreIdentity):
    r"""Minimises the Fisher divergence of the two scores, through the inputs of both networks.

    With x the student's sample, x_t its noised version and d = D_real(x_t) - D_fake(x_t),

        L_student = loss_scale / B sum [(1 - alpha) |d|^2 + d . (D_fake(x_t) - x)] / sg(mean|x - D_real(x_t)|)
        L_fake = 1 / B sum |F_fake(x_t) - target|^2, x detached,

    sums over the elements of all B samples. The networks' weights get no gradient from L_student, their inputs do.
    Without the normaliser and times 2 a^2 / s^4 (levels a, s of the time), the gradient at alpha = 1/2 is that of
    E|s_fake - s_real|^2, at alpha = 1 the same with the law of x_t held fixed, and it is affine in alpha. Any other
    distance rho takes L_student = loss_scale / B sum rho'(d) . (D_fake(x_t) - x), whose gradient is that of E rho(d)
    with the law held fixed likewise: rho'(d) = d / sqrt(|d|^2 + n c^2) for `pseudo_huber` and samples of n numbers,
    which normalises itself, and the signs of d for `l1`.

    With a GAN (SiDA), l the logits on the fake score's middle activation,

        L_student += gan_weight n mean(1 / mean|x - D_real|) mean softplus(-l(x_t)),
        L_fake += gan_discriminator_weight / 2 (softplus(l(x_t)) + softplus(-l(real_t))), same times and noise.

    The fake score steps before the student, both once a step and on samples of their own. The student is fed plain
    noise z where the papers feed sigma z: that is what the sampler of the exported pipeline feeds.
    """

    info = MethodInfo(
        name="sid",
        title="SiD",
        family="Fisher divergence",
        paper="Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for "
        "One-Step Generation",
        arxiv="2404.04057",
        needs="prompts",
        student_kinds=("lora", "full"),
        steps="1-4",
    )
    Config = SiDConfig
    config: SiDConfig

    def sample_loss(self, scored: Scored) -> Tensor:
        """Not a distance itself, but a number with its gradient."""
        identity = dot(self.distance_gradient(scored.gap), scored.residual)
        if self.config.distance != "l2":
            return identity
        return identity + (1 - self.config.alpha) * dot(scored.gap, scored.gap)

    def distance_gradient(self, gap: Tensor) -> Tensor:
        """rho'(d) of the gap d `(B, C, H, W)` of clean predictions, with its graph; rho is even."""
        match self.config.distance:
            case "l2":
                return gap
            case "l1":
                return gap.sign()
            case "pseudo_huber":
                width = self.config.huber_c**2 * gap[0].numel()
                return gap / broadcast_to((dot(gap, gap) + width).sqrt(), gap)

    def weight(self, x: Tensor, real: Prediction) -> Tensor:
        """`1 / mean|x - D_real|` for the squared distance."""
        if self.config.distance != "l2":
            return torch.ones((), device=x.device)
        return super().weight(x, real)


@dataclass(frozen=True)
class SiDAConfig(SiDConfig):
    """Defaults are those of the paper.

    Args:
        alpha: as for SiD; with the adversarial term the paper takes 1.
        gan_weight: weight of the adversarial term; above 0, or it is SiD.
    """

    alpha: float = 1.0
    gan_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan_weight == 0:
            raise ValueError("sida with gan_weight 0 is sid: name that method, which needs no images")


class SiDA(SiD):
    """SiD with an adversarial term on the fake score's features, which carries what the data has and the teacher not.

    The loss is written out at SiD, which takes the same `gan_weight`.
    """

    info = MethodInfo(
        name="sida",
        title="SiDA",
        family="Fisher divergence",
        paper="Adversarial Score identity Distillation: Rapidly Surpassing the Teacher in One Step",
        arxiv="2410.14919",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-4",
    )
    Config = SiDAConfig
    config: SiDAConfig


@dataclass(frozen=True)
class SiDLSGConfig(SiDConfig):
    """Defaults are those of the paper's SD1.5 and SD2.1 runs.

    Args:
        guidance_scale: kappa of teacher and fake score; the paper also reports 2, 3 and 4.5 (sharper, less diverse).
        alpha: as for SiD.
        loss_scale: multiplies the student's score loss.
    """

    guidance_scale: float = 1.5
    alpha: float = 1.0
    loss_scale: float = 1.0


class SiDLSG(SiD):
    """SiD with long and short guidance: one kappa guides teacher and fake score, the latter in its training too.

    The fake score is fitted through D_null + kappa (D_c - D_null), so that this is the exact denoiser of the student's
    samples; 10 % of these are made and fitted without their prompts. Everything else is that of SiD at alpha = 1.
    """

    info = MethodInfo(
        name="sid_lsg",
        title="SiD-LSG",
        family="Fisher divergence",
        paper="Guided Score identity Distillation for Data-Free One-Step Text-to-Image Generation",
        arxiv="2406.01561",
        needs="prompts",
        student_kinds=("lora", "full"),
        steps="1-4",
    )
    Config = SiDLSGConfig
    config: SiDLSGConfig

    def fake_error(self, prediction: Prediction, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """A network of v is weighted by SNR / (SNR + 1), which makes its error that of the noise (released code)."""
        if prediction.kind == "v_prediction":
            return mse(prediction.eps, eps)
        return super().fake_error(prediction, x, eps, t)


@dataclass(frozen=True)
class SIMConfig(SiDConfig):
    """Pseudo-Huber as in the paper; its hyperparameters on text-to-image are not known.

    Args:
        distance: pseudo-Huber, with `huber_c`, or another; squared is SiD at alpha 1.
        alpha: of the squared distance alone.
        loss_scale: multiplies the student's score loss.
    """

    distance: Distance = "pseudo_huber"
    alpha: float = 1.0
    loss_scale: float = 1.0


class SIM(SiD):
    """Score implicit matching: any distance of the two scores, with the law of the noised sample held fixed.

    For y = s_fake - s_real the gradient of E d(y) is that of -d'(y) . (s_fake - grad log q(x_t | x)); the form in clean
    predictions stands at SiD.
    """

    info = MethodInfo(
        name="sim",
        title="SIM",
        family="Fisher divergence",
        paper="One-Step Diffusion Distillation through Score Implicit Matching",
        arxiv="2410.16794",
        needs="prompts",
        student_kinds=("lora", "full"),
        steps="1-4",
    )
    Config = SIMConfig
    config: SIMConfig
