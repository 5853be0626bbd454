"""Teacher score matching: a small network is fitted to the teacher's scores (Song et al. 2024, arXiv 2410.23274)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fastdiff.diffusion.losses import mse
from fastdiff.methods._small_student import SmallStudent, SmallStudentConfig
from fastdiff.methods.base import Batch, Context, MethodInfo, any_time, check_positive
from fastdiff.models.denoiser import Ask
from fastdiff.models.roles import TEACHER
from fastdiff.models.sampler import SamplerSpec


@dataclass(frozen=True)
class ScoreMatchingConfig(SmallStudentConfig):
    """The paper does not say how it weighs noise levels.

    Args:
        num_inference_steps: steps of previews and of the exported sampler, since this student is no few-step one.
    """

    num_inference_steps: int = 25

    def __post_init__(self) -> None:
        check_positive(num_inference_steps=self.num_inference_steps)
        self.shape()


class ScoreMatching(SmallStudent):
    r"""Fits the student to the teacher at all noise levels of real images; a first stage for small students.

        L = E mean |F_student(x_t, t, c) - F_teacher(x_t, t, c)|^2,   x_t = alpha x + sigma eps,  t uniform,

    F being the network's own prediction (for epsilon this weighs clean predictions by alpha^2 / sigma^2). The teacher is
    neither guided nor trained. Its least value over all networks is 0, unlike that of denoising, so that it needs fewer
    samples. The student's weights then start both the student and the fake score of a distillation.
    """

    info = MethodInfo(
        name="score_matching",
        title="Teacher score matching (TSM, first stage of MSD)",
        family="distribution matching",
        paper="Multi-student Diffusion Distillation for Better One-step Generators",
        arxiv="2410.23274",
        needs="images",
        student_kinds=("full",),
        steps="25",
    )
    Config = ScoreMatchingConfig
    config: ScoreMatchingConfig

    def sampler(self) -> SamplerSpec:
        return SamplerSpec.trailing("ddim", self.config.num_inference_steps)

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The squared gap of the two predictions."""
        t = any_time(ctx, "t")
        x_t = ctx.denoiser.schedule.add_noise(batch.images(), ctx.random.normal("eps", batch.latent_shape), t)
        (teacher,) = ctx.denoiser.together(x_t, t, [Ask(TEACHER, batch.cond)])
        student = ctx.denoiser(x_t, t, batch.cond, "student")
        return {"score_matching": mse(student.native, teacher.native)}
