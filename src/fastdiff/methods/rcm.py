"""Score-regularised continuous-time consistency (rCM, Zheng et al. 2025, arXiv 2510.08431)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastdiff.methods._score_gap import ScoreGap, ScoreGapConfig
from fastdiff.methods.base import Batch, Context, MethodInfo, Need, Update, check_not_negative, check_positive
from fastdiff.methods.scm import consistency_term
from fastdiff.models.tangents import Tangents


@dataclass(frozen=True)
class RCMConfig(ScoreGapConfig):
    """Defaults are those of the released text-to-video run, but for what depends on the size of latents and on sums.

    There the consistency term weighs 100 / sqrt(D) times the score term in the student's output, D numbers a sample;
    with `tangent_norm` rms and means it weighs twice the score term at any size. `consistency_weight` 50 / sqrt(D) is
    the released balance: 0.39 for SD1.5's latents, 0.2 for SDXL's. The times of the score term and of the fake score
    are DMD2's.

    Args:
        guidance_scale: w of the teacher in both terms.
        timesteps: the student's times, noisiest first; the sample of the score term stops at a random one of them.
        update_rule: the released code updates the student or the fake score in a step, not both.
        student_update_every: steps per student update, after the warm-up.
        consistency_weight: weight of the consistency term beside the score term.
        time_mean, time_std: ln(sigma / alpha) of the consistency term's times is normal with these.
        tangent_warmup: steps in which the unstable part of the tangent grows in and the student learns it alone.
        tangent_norm: what a tangent is divided by besides `tangent_constant`: its root mean square, or its length.
        tangent_constant: added to the norm.
        tangent_chord: if above zero, the student's rate of change is taken over so many indices of time, not at one:
            for networks whose time embedding turns fast, as Stable Diffusion's does (`fastdiff.models.tangents`).
    """

    guidance_scale: float = 5.0
    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    update_rule: Literal["every", "exclusive"] = "exclusive"
    student_update_every: int = 5
    consistency_weight: float = 1.0
    time_mean: float = 0.7
    time_std: float = 1.6
    tangent_warmup: int = 1000
    tangent_norm: Literal["rms", "l2"] = "rms"
    tangent_constant: float = 0.1
    tangent_chord: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(consistency_weight=self.consistency_weight, tangent_warmup=self.tangent_warmup)
        check_not_negative(tangent_chord=self.tangent_chord)
        check_positive(time_std=self.time_std, tangent_constant=self.tangent_constant)


class RCM(ScoreGap):
    r"""sCM, which covers the teacher's modes, with DMD's score gap on the student's samples, which sharpens them.

        L = consistency_weight * L_sCM(noised images) + L_DMD(student's samples),

    the first as in :class:`SCM`, the second with the fake score of DMD2 and 1 / mean|x - D_real| as weight. Until
    `tangent_warmup` only the first is trained, with sCM's warm-up of the tangent (the released code scales its terms
    in another way, which agrees where the warm-up ends). Published weights multiply sums over pixels; these are means.
    """

    info = MethodInfo(
        name="rcm",
        title="Score-regularised consistency (rCM)",
        family="trajectory",
        paper="Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency",
        arxiv="2510.08431",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-4",
    )
    Config = RCMConfig
    config: RCMConfig

    def __init__(self, config: RCMConfig) -> None:
        super().__init__(config)
        self.tangents = Tangents(chord=config.tangent_chord)

    def needs(self) -> Need:
        return "images"

    def updates(self, step: int) -> Iterable[Update]:
        if step < self.config.tangent_warmup:
            yield Update("student", self.warm_up_loss, ("student",))
        else:
            yield from super().updates(step)

    def warm_up_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The consistency term alone."""
        return self._consistency(batch, ctx)

    def student_terms(self, x: Tensor, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """The consistency term beside the score gap."""
        return self._consistency(batch, ctx)

    def _consistency(self, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        term = consistency_term(batch, ctx, self.config, self.tangents)
        return {"consistency": self.config.consistency_weight * term}
