"""Maps to any end of the trajectory, which the network is told (CTM, Kim et al. 2023, arXiv 2310.02279)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff.diffusion.losses import mse
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import CLEAN_INDEX, NoiseSchedule
from fastdiff.diffusion.steps import heun_flow, jump
from fastdiff.diffusion.tensors import DeviceTable, broadcast_to
from fastdiff.methods._flow_map import end_input
from fastdiff.methods._trajectory import (
    TARGET,
    Pair,
    Place,
    Trajectory,
    TrajectoryConfig,
    grid_points,
    jump_sampler,
    sub_steps,
)
from fastdiff.methods._trajectory_phases import draw_end
from fastdiff.methods.base import Batch, Context, MethodInfo, any_time, check_not_negative, check_positive, time_at
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.embeddings import with_extra_times
from fastdiff.models.roles import TEACHER
from fastdiff.models.sampler import SamplerSpec

Predict = Callable[[Tensor, Tensor], Prediction]


@dataclass(frozen=True)
class CTMConfig(TrajectoryConfig):
    """Defaults are for latents, and differ from the paper's: it compares pixels at time 0 by a perceptual distance,
    averages its target with a decay of 0.999, solves by Heun's steps over up to 17 grid points (39 on ImageNet-64), and
    adds a denoising and an adversarial term.

    Args:
        num_inference_steps: steps the student is meant to be run with.
        eta: the sampler jumps to index (1 - eta) of the next time and adds noise up to it, as TCD does (arXiv
            2402.19159); the paper's gamma jumps to sqrt(1 - gamma^2) of the next noise level instead, and both agree at
            0, which adds no noise, and at 1, which jumps to the clean end and is served by stock schedulers.
        solver: the teacher's step: `ddim` of first order; `heun` of second order with two calls, the paper's.
        solver_steps: steps of the teacher between neighbours of the grid.
        max_skip: the teacher solves over m neighbours of the grid, m <= max_skip drawn with a share proportional to m
            as in the paper's code; 1 takes neighbours. The teacher is asked for max_skip steps on every sample.
        compare_at: `end` compares both maps where they end; `clean` takes both on to the clean end by the averaged
            student first, as in the paper (full students with target_decay > 0).
        denoising_weight: weight of denoising clean data by the map from t to t itself, at times uniform over the
            teacher's indices; the paper's weight is adaptive, its times are half log-normal.
    """

    num_inference_steps: int = 4
    eta: float = 0.0
    solver: Literal["ddim", "heun"] = "ddim"
    solver_steps: int = 1
    max_skip: int = 1
    compare_at: Literal["end", "clean"] = "end"
    denoising_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(num_inference_steps=self.num_inference_steps, solver_steps=self.solver_steps)
        check_not_negative(denoising_weight=self.denoising_weight)
        if not 1 <= self.max_skip <= self.num_ddim_timesteps:
            raise ValueError(
                f"max_skip must be from 1 to num_ddim_timesteps ({self.num_ddim_timesteps}), got {self.max_skip}"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")
        if self.compare_at == "clean" and self.target_decay == 0:
            raise ValueError(
                "compare_at clean maps on by an averaged student: give target_decay > 0, or compare_at end"
            )


class CTM(Trajectory):
    r"""One network jumps from any t to any s <= t, and is told s.

    G(x, t, s) = J(x -> s | g(x, t, s)) with the DDIM step J, so G(x, t, t) = x; with u one of the grid's next
    `max_skip` points below t, s ~ U over the indices up to u, x_u the teacher's solution from x_t,

        L = d(G(x_t, t, s), sg G^-(x_u, u, s)) + denoising_weight * mse(g(x_t, t, t), target of the network's kind),

    and with `compare_at` clean both arguments of d are first mapped to the clean end by G^-, with gradient through the
    left one's input, and the target's jump to s is the live student's. s = 0 always is consistency distillation. The
    paper's adversarial term is left out, its best figures are with it; its grid is EDM's levels, this one is even in
    the teacher's indices. s enters by a zero-initialised layer beside the time embedding, which LoRA files cannot
    carry. What a step of the sampler is told is known from its time, so that the export makes it part of the network:
    stock DDIM or TCD run the student, at its own steps. With eta = 1 all steps end clean, and any number of them will
    do.
    """

    info = MethodInfo(
        name="ctm",
        title="Consistency trajectory model (CTM)",
        family="trajectory",
        paper="Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion",
        arxiv="2310.02279",
        needs="images",
        student_kinds=("full",),
        steps="1-8",
    )
    Config = CTMConfig
    config: CTMConfig
    tells_end: ClassVar[bool] = True

    def __init__(self, config: CTMConfig) -> None:
        super().__init__(config)
        points = grid_points(config.num_ddim_timesteps).tolist()
        self._steps = DeviceTable(sub_steps(points[1:], points[:-1], config.solver_steps))

    @property
    def own_network(self) -> bool:
        return self.tells_end

    def student_network(self, network: nn.Module) -> nn.Module | None:
        return with_extra_times(network) if self.own_network else None

    @property
    def always_clean(self) -> bool:
        """Whether all steps of sampling end at the clean end, so that what the network is told is a constant."""
        return self.tells_end and (self.config.num_inference_steps == 1 or self.config.eta == 1)

    def sampler(self) -> SamplerSpec:
        steps, eta = self.config.num_inference_steps, self.config.eta
        if self.always_clean:
            return SamplerSpec.trailing("lcm", steps)
        return dataclasses.replace(jump_sampler(steps, eta), tells_end=self.tells_end)

    def sampling_inputs(self, denoiser: Denoiser, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        clean = time_at(CLEAN_INDEX, torch.empty(batch_size, device=device), denoiser.schedule)
        return end_input(denoiser.schedule, clean) if self.always_clean else {}

    def step_inputs(self, denoiser: Denoiser, t: Tensor, s: Tensor) -> dict[str, Tensor]:
        return {} if self.always_clean else self.told_end(s, denoiser)

    def inputs(self, w: float | Tensor, s: Tensor, denoiser: Denoiser) -> dict[str, Tensor]:
        return self.told_end(s, denoiser)

    def told_end(self, s: Tensor, denoiser: Denoiser) -> dict[str, Tensor]:
        """What says where a jump ends, where the network is told."""
        return end_input(denoiser.schedule, s) if self.tells_end else {}

    def end(self, number: Tensor, points: Tensor, ctx: Context) -> Tensor:
        return draw_end(points[0], points[number], ctx.random.uniform("end"))

    def place(self, ctx: Context, device: torch.device) -> Place:
        """As in every trajectory method, with `next` up to `max_skip` points below `start`, and the end below that."""
        points = self.points(ctx.denoiser.schedule, device)
        number = ctx.random.integers("pair", 0, self.config.num_ddim_timesteps)
        skip = longer_more_often(ctx.random.uniform("skip"), self.config.max_skip).minimum(number + 1)
        reached = number + 1 - skip
        return Place(number, points[number + 1], points[reached], self.end(reached, points, ctx))

    def solve(self, x_t: Tensor, place: Place, batch: Batch, ctx: Context, w: float | Tensor) -> Tensor:
        def predict(x: Tensor, t: Tensor) -> Prediction:
            return ctx.denoiser(x, t, batch.cond, TEACHER, batch.null, w)

        for skipped in range(self.config.max_skip):
            steps = self._steps.on(x_t.device)[(place.number - skipped).clamp_min(0)].unbind(1)
            there = self._solve_step(x_t, steps, predict, ctx.denoiser.schedule)
            on_the_way = (place.number >= skipped) & (steps[-1] >= place.next)
            x_t = torch.where(broadcast_to(on_the_way, x_t), there, x_t.to(there.dtype))
        return x_t

    def _solve_step(self, x_t: Tensor, steps: Sequence[Tensor], predict: Predict, schedule: NoiseSchedule) -> Tensor:
        """The teacher's solution between neighbours of the grid."""
        for start, end in pairwise(steps):
            t, s = schedule.time_of_index(start), schedule.time_of_index(end)
            x_t = jump(predict(x_t, t), s) if self.config.solver == "ddim" else _heun(predict, x_t, t, s, end)
        return x_t

    def pair(self, batch: Batch, ctx: Context) -> Pair:
        pair = super().pair(batch, ctx)
        if self.config.compare_at == "end":
            return pair
        student = self._to_clean(pair.student, pair.place, batch, ctx)
        with torch.no_grad():
            return Pair(student, self._to_clean(pair.target, pair.place, batch, ctx), pair.place)

    def student_terms(self, pair: Pair, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        if not self.config.denoising_weight:
            return {}
        return {"denoising": self.config.denoising_weight * self._denoising(batch, ctx)}

    def target_role(self, ctx: Context) -> str:
        return "student" if self.config.compare_at == "clean" else super().target_role(ctx)

    def _to_clean(self, x: Tensor, place: Place, batch: Batch, ctx: Context) -> Tensor:
        if TARGET not in ctx.denoiser.roles:
            raise ValueError("compare_at clean needs an averaged student, which a LoRA has not: use compare_at end")
        schedule = ctx.denoiser.schedule
        clean = time_at(CLEAN_INDEX, x, schedule)
        arrived, inputs = place.end == CLEAN_INDEX, self.told_end(clean, ctx.denoiser)
        return self.reach_from(x, schedule.time_of_index(place.end), clean, arrived, batch, ctx, TARGET, inputs)

    def _denoising(self, batch: Batch, ctx: Context) -> Tensor:
        x0, schedule = batch.images(), ctx.denoiser.schedule
        t, eps = any_time(ctx, "denoising/t"), ctx.random.normal("denoising/eps", batch.latent_shape)
        x_t = schedule.add_noise(x0, eps, t)
        prediction = ctx.denoiser(x_t, t, batch.cond, "student", **self.told_end(t, ctx.denoiser))
        return mse(prediction.native, prediction.target(x0, eps))


def longer_more_often(u: Tensor, most: int) -> Tensor:
    """Whole numbers from 1 to `most`, each with a share proportional to itself, for uniform draws `u` in [0, 1)."""
    # The k-th share ends at k (k + 1) / (most (most + 1)).
    return (((1 + 4 * u * (most * (most + 1))).sqrt() - 1) / 2).ceil().clamp(1, most).long()


def _heun(predict: Predict, x: Tensor, t: Tensor, s: Tensor, end: Tensor) -> Tensor:
    """Heun's step, or the plain jump to the clean end, where a second evaluation has no say."""
    first = predict(x, t)
    lowest = first.schedule.t_min
    stepped = heun_flow(lambda y, u: first if u is t else predict(y, u.clamp_min(lowest)), x, t, s)
    return torch.where(broadcast_to(end == CLEAN_INDEX, x), jump(first, s), stepped)
