"""What methods share that follow the teacher's trajectory on a grid of indices: pairs, solver step, map, target.

A grid of N points divides the indices, t_n = 1000 n / N - 1, below them the clean end (index -1); a pair is (t_n,
t_{n-1}). The student's map takes x_t to an end; it is trained to give the same from x_{t_n} as, without gradient, from
the teacher's solver step to t_{n-1}. A method says where maps end, what the map is and how the teacher steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.grids import lcm_grid
from fastdiff.diffusion.losses import mse, pseudo_huber
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import CLEAN_INDEX, NoiseSchedule
from fastdiff.diffusion.steps import jump
from fastdiff.diffusion.tensors import DeviceTable, broadcast_to
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import (
    Batch,
    Context,
    Method,
    TargetNetwork,
    check_not_negative,
    check_positive,
)
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import TEACHER
from fastdiff.models.sampler import SamplerSpec

TARGET = "target"


@dataclass(frozen=True)
class TrajectoryConfig:
    """What every method on a grid of solver steps can be told.

    Args:
        guidance_scale: w of the teacher's solver step, 1 means none; the student bakes it in.
        num_ddim_timesteps: points of the solver's grid, a divisor of the teacher's 1000 indices, 500 at most.
        loss_type: `huber` with `huber_c`, or `l2`.
        huber_c: width of the quadratic part.
        target_decay: decay of the exponential-average target of full students; 0 takes the live student. LoRA
            students always take the live student.
    """

    guidance_scale: float = 8.0
    num_ddim_timesteps: int = 50
    loss_type: Literal["huber", "l2"] = "huber"
    huber_c: float = 1e-3
    target_decay: float = 0.95

    def __post_init__(self) -> None:
        check_not_negative(guidance_scale=self.guidance_scale, target_decay=self.target_decay)
        check_positive(num_ddim_timesteps=self.num_ddim_timesteps, huber_c=self.huber_c)
        if self.loss_type == "l2":
            refuse_unread(self, ("huber_c",), "with loss_type l2")
        if not self.target_decay < 1:
            raise ValueError(f"target_decay must be in [0, 1), got {self.target_decay}")


@dataclass(frozen=True)
class Place:
    """Where one sample of the batch is on the grid; all `(B,)`.

    Args:
        number: which pair, 0 is the cleanest.
        start, next: indices t_n and t_{n-1}.
        end: index where the student's map ends, at most `next`.
    """

    number: Tensor
    start: Tensor
    next: Tensor
    end: Tensor


@dataclass(frozen=True)
class Pair:
    """The student's and the target's end points, `(B, C, H, W)`, and where they are."""

    student: Tensor
    target: Tensor
    place: Place


class Trajectory(Method):
    """Consistency along the teacher's trajectory. A method overrides what is under "What methods change"."""

    config: TrajectoryConfig

    def __init__(self, config: TrajectoryConfig) -> None:
        super().__init__(config)
        self._points = DeviceTable(grid_points(config.num_ddim_timesteps))

    def targets(self) -> tuple[TargetNetwork, ...]:
        if self.config.target_decay == 0:
            return ()
        return (TargetNetwork(TARGET, "student", self.config.target_decay),)

    def inherits(self) -> Mapping[str, tuple[str, ...]] | None:
        """A run that goes on from another starts its average anew from the student."""
        return {"student": ("student",)} | {target.role: (target.source,) for target in self.targets()}

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """One consistency pair a sample, and whatever the method adds."""
        pair = self.pair(batch, ctx)
        return {"consistency": self.distance(pair.student, pair.target)} | self.student_terms(pair, batch, ctx)

    def pair(self, batch: Batch, ctx: Context) -> Pair:
        """Both sides of the consistency loss; only the student's has a graph."""
        x0, schedule = batch.images(), ctx.denoiser.schedule
        place = self.place(ctx, x0.device)
        t, u, s = (schedule.time_of_index(index) for index in (place.start, place.next, place.end))
        w = self.guidance(ctx)
        inputs = self.inputs(w, s, ctx.denoiser)
        x_t = schedule.add_noise(x0, ctx.random.normal("eps", batch.latent_shape), t)
        student = self.reach(ctx.denoiser(x_t, t, batch.cond, "student", **inputs), s)
        with torch.no_grad():
            x_u = self.solve(x_t, place, batch, ctx, w)
            arrived = place.next == place.end
            target = self.reach_from(x_u, u, s, arrived, batch, ctx, self.target_role(ctx), inputs)
        return Pair(student, target, place)

    def reach_from(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        arrived: Tensor,
        batch: Batch,
        ctx: Context,
        role: str,
        inputs: Mapping[str, Tensor],
    ) -> Tensor:
        """A role's map from `x` at `t` to `s`; rows that have `arrived` stay what they are, whatever the network."""
        t = t.clamp_min(ctx.denoiser.schedule.t_min)  # what is at the clean end has arrived, and no network knows it
        there = self.reach(ctx.denoiser(x, t, batch.cond, role, **inputs), s)
        return torch.where(broadcast_to(arrived, x), x.to(there.dtype), there)

    # What methods change

    def place(self, ctx: Context, device: torch.device) -> Place:
        """A pair of the grid for each sample, all equally likely, and the end of its map."""
        points = self.points(ctx.denoiser.schedule, device)
        number = ctx.random.integers("pair", 0, self.config.num_ddim_timesteps)
        start, following = points[number + 1], points[number]
        return Place(number, start, following, self.end(number, points, ctx))

    def points(self, schedule: NoiseSchedule, device: torch.device) -> Tensor:
        """The grid's N + 1 indices, rising, int64; the first is where trajectories end."""
        return self._points.on(device)

    def end(self, number: Tensor, points: Tensor, ctx: Context) -> Tensor:
        """Index `(B,)` where the student's map ends, not above `points[number]`; the trajectory's own end."""
        return points[0].expand_as(number)

    def reach(self, prediction: Prediction, s: Tensor) -> Tensor:
        """The student's map from where the prediction was made to the times `s`."""
        return jump(prediction, s)

    def solve(self, x_t: Tensor, place: Place, batch: Batch, ctx: Context, w: float | Tensor) -> Tensor:
        """The guided teacher's step from `place.start` to `place.next`."""
        return teacher_path(x_t, (place.start, place.next), batch, ctx, w)

    def guidance(self, ctx: Context) -> float | Tensor:
        """w of the teacher, a number or one a sample."""
        return self.config.guidance_scale

    def target_role(self, ctx: Context) -> str:
        """Whose map the target is: the averaged student's where there is one, else the student's own."""
        return TARGET if TARGET in ctx.denoiser.roles else "student"

    def inputs(self, w: float | Tensor, s: Tensor, denoiser: Denoiser) -> dict[str, Tensor]:
        """Extra inputs of the student's network."""
        return {}

    def student_terms(self, pair: Pair, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """Further terms of the student's loss."""
        return {}

    def distance(self, student: Tensor, target: Tensor) -> Tensor:
        """The configured loss."""
        if self.config.loss_type == "l2":
            return mse(student, target)
        return pseudo_huber(student, target, self.config.huber_c)


def grid_points(count: int) -> Tensor:
    """The clean end and the `count` indices above it, rising: (-1, 19, 39, ..., 999) for 50."""
    return torch.tensor([CLEAN_INDEX, *(start for start, _ in lcm_grid(count))], device="cpu")


def sub_steps(starts: Sequence[int], ends: Sequence[int], count: int) -> Tensor:
    """Indices `(len(starts), count + 1)` of `count` nearly equal steps from each start down to its end.

    Raises:
        ValueError: where two of them would fall on one index.
    """
    rows = [
        [round(start + (end - start) * step / count) for step in range(count + 1)]
        for start, end in zip(starts, ends, strict=True)
    ]
    for row in rows:
        if any(a <= b for a, b in pairwise(row)):
            raise ValueError(f"{count} steps do not fit between the indices {row[0]} and {row[-1]}: take fewer")
    return torch.tensor(rows, device="cpu")


def filled_indices(indices: Sequence[int], like: Tensor) -> list[Tensor]:
    """Each index for all samples of `like`, `(B,)`, made on its device."""
    return [torch.full((len(like),), index, device=like.device) for index in indices]


def teacher_path(
    x: Tensor, indices: Sequence[Tensor], batch: Batch, ctx: Context, w: float | Tensor, role: str = TEACHER
) -> Tensor:
    """DDIM steps of the guided teacher from `x` at `indices[0]` through the others, each `(B,)`; float32 or better."""
    times = [ctx.denoiser.schedule.time_of_index(index) for index in indices]
    for t, s in pairwise(times):
        x = jump(ctx.denoiser(x, t, batch.cond, role, batch.null, w), s)
    return x


def jump_sampler(steps: int, eta: float) -> SamplerSpec:
    """Jumps from time to time down to the clean end, or with `eta` those of TCD."""
    if eta == 0:
        return SamplerSpec.trailing("ddim", steps)
    return SamplerSpec("tcd", SamplerSpec.trailing("tcd", steps).timesteps, eta=eta)
