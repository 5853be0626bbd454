"""2-rectified flow++ (Lee et al. 2024, arXiv 2405.20320): one reflow, trained better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastdiff.methods.base import MethodInfo
from fastdiff.methods.rectified_flow import RectifiedFlow, RectifiedFlowConfig


@dataclass(frozen=True)
class RFPPConfig(RectifiedFlowConfig):
    """Defaults are those of the paper's best published setting for small images.

    Args:
        times: law of the noise level.
        distance: as in the other methods on straight lines.
        perceptual_weight: weight of the perceptual distance of decoded samples; 0 needs no scorer.
        level_weights: `divt` weighs the distance by 1 - level and the perceptual distance by 1 / level; `none` by 1.
    """

    times: Literal["uniform", "u_shaped"] = "u_shaped"
    distance: Literal["l2", "huber"] = "huber"
    perceptual_weight: float = 1.0
    level_weights: Literal["divt", "none"] = "divt"

    def __post_init__(self) -> None:
        if self.objective == "distill":
            raise ValueError("rfpp is about reflow; distil its student with the method rectified_flow")
        super().__post_init__()


class RFPP(RectifiedFlow):
    r"""Reflow with times at both ends, a robust distance and a perceptual one on the clean prediction.

        L = E_t (1 - t) huber(v_student(x_t, t), eps' - x0) + weight / t * perceptual(x0_student(x_t, t), x0),
        p(t) proportional to exp(a t) + exp(a (1 - t)), a = 4,   t = sigma / (alpha + sigma)

    The student starts as the teacher seen as a rectified flow, which is exact for every process: equal noise-to-signal
    ratio, rescaled input (the paper's schedule conversion). The paper's own sampler steps to (1 - t') x0 + t' z with the
    clean prediction x0 and the run's first noise z. Where a student is straight that is Euler's step; elsewhere it is
    none that a stock scheduler makes, so that students are run, and previewed, with Euler's (DDIM's on tables of betas).
    Real images enter through the pairs: `fastdiff pairs
    --real_images ... --real_share ...` stores them with the noise from which the teacher would make them.
    """

    info = MethodInfo(
        name="rfpp",
        title="2-rectified flow++",
        family="trajectory",
        paper="Improving the Training of Rectified Flows",
        arxiv="2405.20320",
        needs="pairs",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = RFPPConfig
    config: RFPPConfig

    def weights(self, level: Tensor) -> tuple[Tensor | float, Tensor | float]:
        if self.config.level_weights == "none":
            return super().weights(level)
        return 1 - level, self.config.perceptual_weight / level
