"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867)."""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.methods._adversarial_score_gap import AdversarialScoreGap, AdversarialScoreGapConfig
from fastdiff.methods.base import MethodInfo


@dataclass(frozen=True)
class DMD2Config(AdversarialScoreGapConfig):
    """Defaults are those of the paper's one-step SD1.5 run without GAN.

    Args:
        guidance_scale: w of the teacher's score; the fake score is never guided.
        student_update_every: steps per student update.
    """

    guidance_scale: float = 1.75
    student_update_every: int = 10


class DMD2(AdversarialScoreGap):
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
        needs="prompts",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = DMD2Config
    config: DMD2Config
