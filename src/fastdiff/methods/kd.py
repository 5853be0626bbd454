"""Regression on the teacher's solutions of its probability-flow ODE (Luhman & Luhman 2021, arXiv 2101.02388)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fastdiff.methods._straight import Straight, StraightConfig
from fastdiff.methods.base import Batch, Context, MethodInfo


@dataclass(frozen=True)
class KDConfig(StraightConfig):
    """A one-step student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_inference_steps != 1:
            raise ValueError(
                "kd makes a one-step student, since pairs hold no points in between: leave num_inference_steps at 1, "
                "or use rectified_flow with the objective distill"
            )


class KD(Straight):
    r"""Regresses the student's clean prediction on the teacher's sample from the same noise.

        L = d(x0_student(z, T), x0),   x0 = the teacher's deterministic sample from z,

    plus, if weighted, the perceptual distance of the decoded samples. With plain squares the student blurs where it
    cannot follow the teacher; on a linear teacher the regression is exact.
    """

    info = MethodInfo(
        name="kd",
        title="ODE-pair regression (knowledge distillation)",
        family="trajectory",
        paper="Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed",
        arxiv="2101.02388",
        needs=("pairs",),
        student_kinds=("lora", "full"),
        steps="1",
    )
    Config = KDConfig
    config: KDConfig

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """One call of the student at the start."""
        noise, x0 = batch.pairs()
        return self.clean_terms(ctx.denoiser(noise, self.start(noise, ctx), batch.cond, "student").x0, x0, ctx)
