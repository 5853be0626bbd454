"""Rectified flow: reflow and distillation (Liu et al. 2022, arXiv 2209.03003; InstaFlow, arXiv 2309.06380)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import Terminal
from fastdiff.diffusion.timesteps import Grid, TimeSampler, Uniform, UShaped
from fastdiff.methods._flow_map import noise_share, time_of_share
from fastdiff.methods._straight import MARGIN, Straight, StraightConfig, line_through
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, MethodInfo, check_positive


@dataclass(frozen=True)
class RectifiedFlowConfig(StraightConfig):
    """Defaults are those of the papers' reflow stage.

    Args:
        objective: `reflow` learns the straight line between noise and sample at all times; `distill` regresses the
            sample itself at the student's own steps, from a student that reflow has straightened.
        times: law of the noise level sigma / (alpha + sigma), a rectified flow's time, as a part of the level at the
            start: uniform, or u_shaped with both ends more often (arXiv 2405.20320).
        u_shape: a of the density proportional to cosh(a (part - 1/2)).
        regress: in reflow, `velocity` compares eps - x0, as the papers do; `native` what the network predicts, which for
            an epsilon network weighs a level 1.06 (index 0) to 244 times (999) less.
    """

    objective: Literal["reflow", "distill"] = "reflow"
    times: Literal["uniform", "u_shaped"] = "uniform"
    u_shape: float = 4.0
    regress: Literal["velocity", "native"] = "velocity"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(u_shape=self.u_shape)
        if self.objective == "distill" and self.times != "uniform":
            raise ValueError("times is the law of reflow; distill trains at the student's own steps: leave it out")
        if self.times == "uniform":
            refuse_unread(self, ("u_shape",), "with uniform times")
        if self.objective == "distill":
            refuse_unread(self, ("regress",), "with the objective distill, which compares clean samples")


class RectifiedFlow(Straight):
    r"""Makes the trajectory from the noise of a pair to its sample a straight line.

    A pair is z and the teacher's deterministic sample x0 from it. In a flow the line is x_t = (1 - t) x0 + t z with
    the velocity z - x0. A network with a table of betas keeps its prediction type and follows the line that stock DDIM
    walks from plain noise,

        x_t = alpha_t x0 + sigma_t eps',   eps' = (z - alpha_T x0) / sigma_T,

    which is the same straight line in x / (alpha + sigma), so that the teacher's weights are a good start, the student
    may be an adapter, and any number of DDIM steps on a perfectly straight student is exact.

        reflow:   L = E_t |v_student(x_t, t) - (eps' - x0)|^2        (velocity v = eps - x0)
        distill:  L = E_t d(x0_student(x_t, t), x0), t among the student's steps: at one step x_t is z itself

    The optimum of reflow is straight where lines do not cross; its marginals are those of the pairs at all times.
    """

    info = MethodInfo(
        name="rectified_flow",
        title="Rectified flow (reflow, 2-rectified flow, InstaFlow)",
        family="trajectory",
        paper="InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation",
        arxiv="2309.06380",
        needs="pairs",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = RectifiedFlowConfig
    config: RectifiedFlowConfig

    def __init__(self, config: RectifiedFlowConfig) -> None:
        super().__init__(config)
        self._steps = Grid(self.sampler().timesteps)
        self._levels: TimeSampler = UShaped(config.u_shape) if config.times == "u_shaped" else Uniform()

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """One call of the student on the line of each pair."""
        noise, x0 = self.coupled(batch, ctx)
        schedule = ctx.denoiser.schedule
        x0, eps = line_through(noise, self.start(noise, ctx), x0, Terminal.CLEAN, schedule)
        t = self.drawn_times(ctx)
        prediction = ctx.denoiser(schedule.add_noise(x0, eps, t), t, batch.cond, "student")
        if self.config.objective == "distill":
            return self.clean_terms(prediction.x0, x0, ctx)
        distance, perceptual = self.weights(noise_share(schedule, t))
        terms = {"reflow": (distance * self.sample_distance(*self._compared(prediction, x0, eps))).mean()}
        if self.config.perceptual_weight:
            terms["perceptual"] = (perceptual * self.perceptual(prediction.x0, x0, ctx)).mean()
        return terms

    def coupled(self, batch: Batch, ctx: Context) -> tuple[Tensor, Tensor]:
        """The noise and sample whose line is learned."""
        return batch.pairs()

    def drawn_times(self, ctx: Context) -> Tensor:
        """A time for each sample, `(B,)`."""
        u = ctx.random.uniform("t")
        if self.config.objective == "distill":
            return ctx.denoiser.schedule.time_of_index(self._steps.times(u).to(u))
        schedule, start = ctx.denoiser.schedule, self.start(u, ctx)
        share = self._levels.times(u).clamp(MARGIN, 1 - MARGIN) * noise_share(schedule, start)
        return time_of_share(schedule, share).clamp_min(schedule.t_min)

    def weights(self, level: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What multiplies the distance and the perceptual distance of each sample, given its noise level."""
        return 1.0, self.config.perceptual_weight

    def _compared(self, prediction: Prediction, x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.regress == "velocity":
            return prediction.flow, eps - x0
        return prediction.native, prediction.target(x0, eps)
