"""PeRFlow: piecewise rectified flow (Yan et al. 2024, arXiv 2405.07510; code: magic-research/piecewise-rectified-flow)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.losses import mse, pseudo_huber, sample_mse
from fastdiff.diffusion.schedules import LAST_INDEX
from fastdiff.diffusion.tensors import broadcast_to
from fastdiff.diffusion.timesteps import Segments
from fastdiff.methods._prompts import without_prompts
from fastdiff.methods._straight import line_through
from fastdiff.methods._trajectory import teacher_path
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import (
    Batch,
    Context,
    Method,
    MethodInfo,
    check_not_negative,
    check_positive,
)
from fastdiff.models.sampler import SamplerSpec

_INDICES = LAST_INDEX + 1


@dataclass(frozen=True)
class PeRFlowConfig:
    """Defaults are those of the public SD1.5 run, but for three: guidance is baked in (`cfg_sync` false) and the target is
    `ddim_eps`, both as in the public SDXL run, and the input lies on DDIM's line (see the method).

    Args:
        guidance_scale: w of the teacher's solver.
        windows: pieces of the trajectory.
        solver_steps: DDIM steps of the teacher in a window.
        num_inference_steps: steps the student is meant to be run with, a multiple of `windows`.
        cfg_sync: the teacher is unguided and sees the same dropped prompts as the student, so that a LoRA student takes
            guidance when it is run, as in the public SD1.5 run.
        prompt_dropout: share of samples whose student sees no prompt.
        loss_type: `l2`, or `huber` with `huber_c`.
        huber_c: width of the quadratic part.
        reweighting: squares count 1 / max(1 - t, 0.1) / 2.3 times, t = (index + 1) / 1000, as the public code offers. In
            an epsilon's terms the cleanest window has the largest loss and moves samples the least.
        edge_gap: share of each window, at its clean end, that is not trained. The lines of two windows meet at an edge
            with different noise, which a network of smooth times smears over both, and samplers ask right there: at the
            noisy edge. They do not ask in the gap as long as it is at most windows / num_inference_steps (ours).
    """

    guidance_scale: float = 7.5
    windows: int = 4
    solver_steps: int = 8
    num_inference_steps: int = 4
    cfg_sync: bool = False
    prompt_dropout: float = 0.1
    loss_type: Literal["l2", "huber"] = "l2"
    huber_c: float = 1e-3
    reweighting: bool = False
    edge_gap: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(guidance_scale=self.guidance_scale, prompt_dropout=self.prompt_dropout)
        check_positive(windows=self.windows, solver_steps=self.solver_steps, huber_c=self.huber_c)
        check_positive(num_inference_steps=self.num_inference_steps)
        if self.loss_type == "l2":
            refuse_unread(self, ("huber_c",), "with loss_type l2")
        if self.cfg_sync:
            refuse_unread(self, ("guidance_scale",), "with cfg_sync, whose teacher is unguided")
        if self.reweighting and self.loss_type != "l2":
            raise ValueError("reweighting is of squares: leave it out, or give loss_type: l2")
        if self.prompt_dropout > 1:
            raise ValueError(f"prompt_dropout is a share, got {self.prompt_dropout}")
        if _INDICES % self.num_inference_steps or self.num_inference_steps % self.windows:
            raise ValueError(
                f"num_inference_steps ({self.num_inference_steps}) must be a multiple of windows ({self.windows}) and "
                f"divide {_INDICES}, so that the sampler's steps end at the windows' edges; e.g. 4 windows and 4, 8, "
                "20 or 40 steps"
            )
        if not (0 <= self.edge_gap < 1 and self.edge_gap * self.num_inference_steps <= self.windows):
            raise ValueError(
                f"edge_gap must be a share below 1 and at most windows / num_inference_steps "
                f"({self.windows / self.num_inference_steps:g}), where samplers ask, got {self.edge_gap}"
            )
        if self.solver_steps * self.windows > _INDICES:
            raise ValueError(f"{self.solver_steps} solver steps do not fit in one of {self.windows} windows")


class PeRFlow(Method):
    r"""Reflow inside windows of the trajectory: short, cheap pairs that need no store, and more steps always help.

    In a window from time s down to e, x_s is noised data (plain noise at the noisiest edge, as samplers feed it) and
    x_e the teacher's solution at e from it. The student learns the line that stock DDIM walks from one to the other,

        x_t = alpha_t x~ + sigma_t eps~,  with (x~, eps~) such that the line meets x_s at s and x_e at e,

    so L = d(F_student(x_t, t), F(x~, eps~)) in the network's own prediction type, t uniform, everything but F_student
    detached. eps~ = (x_e / alpha_e - x_s / alpha_s) / (kappa_e - kappa_s) is the mean of the teacher's noise prediction
    over the window, the public code's `ddim_eps` target; there the input lies on the chord in x, for which no stock
    sampler exists, here on DDIM's line, so that stock DDIM is exact at any multiple of `windows`. In a flow both are
    the same chord. One window is reflow with pairs made on the way.

    The public code's other targets are not offered, for only its own scheduler samples their students: `diff_eps`, its
    SD1.5 run's, is eps~ times a factor of the window (0.751, 0.658, 0.632, 0.959 from the noisiest of four, the last of
    which ends at index 0 there; at the clean end it would be 1), and `velocity` makes the network predict (x_e - x_s) / (e - s) itself.
    """

    info = MethodInfo(
        name="perflow",
        title="PeRFlow (piecewise rectified flow)",
        family="trajectory",
        paper="PeRFlow: Piecewise Rectified Flow as Universal Plug-and-Play Accelerator",
        arxiv="2405.07510",
        needs="images",
        student_kinds=("lora", "full"),
        steps="4-8",
    )
    Config = PeRFlowConfig
    config: PeRFlowConfig

    def __init__(self, config: PeRFlowConfig) -> None:
        super().__init__(config)
        width = _INDICES // config.windows
        # Index -1 is the clean end on every process.
        self._windows = Segments(tuple(float(width * number - 1) for number in range(config.windows + 1)))

    def sampler(self) -> SamplerSpec:
        return SamplerSpec.trailing("ddim", self.config.num_inference_steps)

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """One window and one place in it for each sample."""
        schedule = ctx.denoiser.schedule
        drawn = ctx.random.integers("t", 0, _INDICES).to(torch.float32)
        edges = self._windows.ends(drawn)
        index = (drawn + self.config.edge_gap * (edges[1] - drawn)).round()
        end, start = (schedule.time_of_index(edge) for edge in edges)
        asked = without_prompts(batch, ctx.random.bernoulli("drop", self.config.prompt_dropout))
        x_s = self._window_start(batch, edges[1], ctx)
        with torch.no_grad():
            x_e = self._solve(x_s, edges, asked if self.config.cfg_sync else batch, ctx)
        x0, eps = line_through(x_s, start, x_e, end, schedule)
        t = schedule.time_of_index(index)
        student = ctx.denoiser(schedule.add_noise(x0, eps, t), t, asked.cond, "student")
        target = student.target(x0, eps)
        return {"perflow": self._distance(student.native, target, index)}

    def _distance(self, prediction: Tensor, target: Tensor, index: Tensor) -> Tensor:
        if self.config.loss_type == "huber":
            return pseudo_huber(prediction, target, self.config.huber_c)
        if not self.config.reweighting:
            return mse(prediction, target)
        return (noisy_weight(index) * sample_mse(prediction, target)).mean()

    def _window_start(self, batch: Batch, edge: Tensor, ctx: Context) -> Tensor:
        x0, eps = batch.images(), ctx.random.normal("eps", batch.latent_shape)
        noised = ctx.denoiser.schedule.add_noise(x0, eps, ctx.denoiser.schedule.time_of_index(edge))
        return torch.where(broadcast_to(edge == LAST_INDEX, noised), eps.to(noised), noised)

    def _solve(self, x_s: Tensor, edges: tuple[Tensor, Tensor], batch: Batch, ctx: Context) -> Tensor:
        """The teacher's DDIM steps from the noisy to the clean edge of each sample's window, at whole indices."""
        end, start = edges
        steps = self.config.solver_steps
        indices = [torch.lerp(start, end, step / steps).round() for step in range(steps + 1)]
        return teacher_path(x_s, indices, batch, ctx, 1.0 if self.config.cfg_sync else self.config.guidance_scale)


def noisy_weight(index: Tensor) -> Tensor:
    """`(B,)` weights of squares at indices 0 to 999: from 0.43 at the clean end to 4.3 at the last tenth."""
    return 1 / (1 - (index + 1) / _INDICES).clamp_min(0.1) / 2.3
