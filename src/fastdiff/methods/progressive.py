"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import CLEAN_INDEX, NoiseSchedule
from fastdiff.diffusion.tensors import DeviceTable
from fastdiff.methods._trajectory import sub_steps, teacher_path
from fastdiff.methods.base import Batch, Context, Method, MethodInfo, check_not_negative, check_positive
from fastdiff.models.roles import TEACHER
from fastdiff.models.sampler import SamplerSpec

PREVIOUS = "previous"


@dataclass(frozen=True)
class ProgressiveConfig:
    """One stage; a recipe's stages halve `num_inference_steps`, each from the one before (`init_from`).

    Args:
        num_inference_steps: steps of this stage's student.
        teacher_steps: steps of its teacher for one of the student's.
        stage_teacher: `teacher` for the first stage; `previous` for the student that the run started from.
        guidance_scale: w of the teacher, 1 means none; only the first stage guides, later ones have it baked in.
        first_timestep: index of the first step, or the next below that the steps divide evenly. 999 divides into 8, 4,
            2, 1 steps; 991 also into 32 and 16.
        loss_weight: of the squared error of clean samples: max(SNR, 1), or SNR + 1 (the error of v of a network with
            alpha^2 + sigma^2 = 1), or 1 / sigma^2 (of a flow's velocity). The plain error of the noise would not count
            at the first step.
    """

    num_inference_steps: int = 8
    teacher_steps: int = 2
    stage_teacher: Literal["teacher", "previous"] = "teacher"
    guidance_scale: float = 1.0
    first_timestep: int = 999
    loss_weight: Literal["truncated_snr", "snr_plus_one", "velocity"] = "truncated_snr"

    def __post_init__(self) -> None:
        check_not_negative(guidance_scale=self.guidance_scale)
        check_positive(num_inference_steps=self.num_inference_steps, teacher_steps=self.teacher_steps)
        own = stage_steps(self)[:, :-1].flatten().tolist()
        if self.stage_teacher == PREVIOUS:
            if self.guidance_scale != 1:
                raise ValueError("a stage that goes on from another has guidance baked in: guidance_scale must be 1")
            theirs = list(_starts(len(own), self.first_timestep))
            if own != theirs:
                raise ValueError(
                    f"this stage would ask its teacher at {own}, and a stage of {len(own)} steps from the same "
                    f"first_timestep was trained at {theirs}: give a first_timestep that all stages divide, such as 991 "
                    "for 32, 16, 8, 4, 2, 1 steps, and num_inference_steps x teacher_steps as many as the earlier stage's steps"
                )


class Progressive(Method):
    r"""One DDIM step of the student becomes several of its teacher; then the student is the teacher, and so on.

    From z_t, noised data at a time t of the student's grid, the teacher steps to z'' at the next time t''. The only
    clean prediction whose DDIM step goes there is

        x~ = (z'' - (sigma''/sigma_t) z_t) / (alpha'' - (sigma''/sigma_t) alpha_t),
        L = w(t) mean (x~ - x0_S(z_t, t))^2.
    """

    info = MethodInfo(
        name="progressive",
        title="Progressive distillation",
        family="trajectory",
        paper="Progressive Distillation for Fast Sampling of Diffusion Models",
        arxiv="2202.00512",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-32",
    )
    Config = ProgressiveConfig
    config: ProgressiveConfig

    def __init__(self, config: ProgressiveConfig) -> None:
        super().__init__(config)
        self._steps = DeviceTable(stage_steps(config))

    def frozen(self) -> Mapping[str, str]:
        return {PREVIOUS: "student"} if self.config.stage_teacher == PREVIOUS else {}

    def inherits(self) -> Mapping[str, tuple[str, ...]] | None:
        """The earlier student is this stage's start and, where it says so, its teacher."""
        return {role: ("student",) for role in ("student", *self.frozen())}

    def sampler(self) -> SamplerSpec:
        return SamplerSpec.trailing("ddim", self.config.num_inference_steps, self.config.first_timestep)

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The weighted regression on what the teacher's steps imply."""
        config, schedule, x0 = self.config, ctx.denoiser.schedule, batch.images()
        steps = self._steps.on(x0.device)[ctx.random.integers("step", 0, config.num_inference_steps)].unbind(1)
        t, s = schedule.time_of_index(steps[0]), schedule.time_of_index(steps[-1])
        z = schedule.add_noise(x0, ctx.random.normal("eps", batch.latent_shape), t)
        student = ctx.denoiser(z, t, batch.cond, "student")
        role = PREVIOUS if config.stage_teacher == PREVIOUS else TEACHER
        with torch.no_grad():
            target = implied_clean(z, t, teacher_path(z, steps, batch, ctx, config.guidance_scale, role), s, schedule)
        error = (student.x0 - target).square()
        return {"progressive": (self._weight(student) * error).mean()}

    def _weight(self, prediction: Prediction) -> Tensor:
        alpha, sigma = prediction.levels
        snr = (alpha / sigma).square()
        match self.config.loss_weight:
            case "truncated_snr":
                return snr.clamp_min(1)
            case "snr_plus_one":
                return snr + 1
            case "velocity":
                return 1 / sigma.square()


def stage_steps(config: ProgressiveConfig) -> Tensor:
    """Indices `(num_inference_steps, teacher_steps + 1)`: the teacher's way through each step of the student."""
    starts = _starts(config.num_inference_steps, config.first_timestep)
    return sub_steps(starts, [*starts[1:], CLEAN_INDEX], config.teacher_steps)


def first_start(config: ProgressiveConfig) -> int:
    """Index of the sampler's first step: `first_timestep`, or the next below that the steps divide evenly."""
    return _starts(config.num_inference_steps, config.first_timestep)[0]


def implied_clean(z: Tensor, t: Tensor, z_s: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The clean prediction at (z, t) whose DDIM step to `s` is `z_s`."""
    alpha_t, sigma_t = schedule.levels(t, z_s)
    alpha_s, sigma_s = schedule.levels(s, z_s)
    ratio = sigma_s / sigma_t
    return (z_s - ratio * z) / (alpha_s - ratio * alpha_t)


def _starts(steps: int, first: int) -> tuple[int, ...]:
    return tuple(int(t) for t in SamplerSpec.trailing("ddim", steps, first).timesteps)
