"""FreeFlow: flow maps distilled from noise alone, predicted and then corrected (Tong et al. 2025, arXiv 2511.19428)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.diffusion.losses import mse
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import CLEAN_INDEX, LAST_INDEX
from fastdiff.diffusion.steps import jump
from fastdiff.methods._flow_map import (
    EndTold,
    adaptive_distance,
    average_velocity,
    check_adaptive,
    end_input,
    moved_share,
    noise_share_rate,
)
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import (
    Batch,
    Context,
    Group,
    MethodInfo,
    Update,
    any_time,
    check_not_negative,
    check_positive,
    log_normal_time,
    time_at,
)
from fastdiff.models.denoiser import Ask
from fastdiff.models.roles import TEACHER
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.tangents import Point, Tangent, Tangents

_OF_CORRECTION = ("correction_weight", "correction_mean", "correction_std", "fake_score_learning_rate")


@dataclass(frozen=True)
class FreeFlowConfig:
    """The paper distils class-conditional transformers. The share of corrected samples, the norm's power and
    `correction_mean` are its best published ones; what it does not give is ours and marked so, as are ends drawn evenly
    over the teacher's indices and one step of the fake score for each of the student's.

    Args:
        guidance_scale: w of the teacher, 1 means none (ours); the student bakes it in.
        correct_every: every so many-th sample of a batch is corrected, the others are predicted; the paper corrects a
            quarter. 0 turns the correction off.
        correction_weight: weight of the correction after it is brought to the length of the prediction's residual
            (ours).
        correction_mean, correction_std: of ln(sigma / alpha) where the two velocities are compared; biased to noise
            (the standard deviation is ours).
        norm_power: each sample's loss is divided by its own value to this power, without gradient; 0 is plain.
        norm_constant: added to the value first (ours).
        tangent_chord: if above zero, the student's rate of change with the end is taken over so many indices of it, not
            at one: its sinusoids turn as fast as a time's (`fastdiff.models.tangents`; ours).
        fake_score_learning_rate: of the velocity of the student's samples; the student's if not given (ours).
    """

    guidance_scale: float = 1.0
    correct_every: int = 4
    correction_weight: float = 1.0
    correction_mean: float = 0.8
    correction_std: float = 1.6
    norm_power: float = 1.0
    norm_constant: float = 1e-3
    tangent_chord: float = 0.0
    fake_score_learning_rate: float | None = None

    def __post_init__(self) -> None:
        check_not_negative(guidance_scale=self.guidance_scale, correct_every=self.correct_every)
        check_not_negative(correction_weight=self.correction_weight, tangent_chord=self.tangent_chord)
        if self.correct_every and not self.correction_weight:
            raise ValueError(
                "correction_weight 0 would train a fake score that no loss reads: give correct_every 0 to leave the "
                "correction out"
            )
        check_positive(correction_std=self.correction_std)
        if not self.correct_every:
            refuse_unread(self, _OF_CORRECTION, "with correct_every 0")
        check_adaptive(self.norm_power, self.norm_constant)
        check_positive(fake_score_learning_rate=self.fake_score_learning_rate)
        if self.correct_every == 1:
            raise ValueError("correct_every 1 would leave no sample to predict: give 0 (none) or at least 2")


class FreeFlow(EndTold):
    r"""Follows the teacher from the prior alone, and lets its own samples' velocity correct what that compounds.

    In flow coordinates (share a, see `_flow_map`), u(z, s) is the student's velocity at noise z and time T, told s;
    f(z, s) = z + (a_s - a_T) u(z, s) is where the trajectory of z is at s. Differentiating in s alone, z fixed,

        predict: L = adaptive |u - sg[v_teacher(f, s) + (a_T - a_s) du/da_s]|^2     (zero at the exact map),
        correct: L = w adaptive |u(z, 0) - sg[u(z, 0) - lambda (v_fake - v_teacher)(x_r, r)]|^2,

    x_r a noised version of the sample f(z, 0), v_fake the velocity of the student's samples, which a second network
    learns by denoising them, w `correction_weight`, lambda = |predict's residual| / (|v_fake - v_teacher| + c) over the
    batch (c the norm's constant), which gives both terms one length before the norm; no code says in which order the
    paper applies the two. Both velocities and x_r are detached: the student's turn moves the student only. One step
    only: maps begin at pure noise.
    """

    info = MethodInfo(
        name="freeflow",
        title="FreeFlow",
        family="trajectory",
        paper="Flow Map Distillation Without Data",
        arxiv="2511.19428",
        needs="prompts",
        student_kinds=("full",),
        steps="1",
    )
    Config = FreeFlowConfig
    config: FreeFlowConfig
    critics: ClassVar[tuple[str, ...]] = ("fake_score",)

    def __init__(self, config: FreeFlowConfig) -> None:
        super().__init__(config)
        self.tangents = Tangents(chord=config.tangent_chord)

    @property
    def least_batch(self) -> int:
        return max(1, self.config.correct_every)

    def groups(self) -> dict[str, Group]:
        fake = {"fake_score": Group(self.config.fake_score_learning_rate)}
        return {"student": Group()} | (fake if self.config.correct_every else {})

    def updates(self, step: int) -> Iterable[Update]:
        yield Update("student", self.student_loss, ("student",))
        if self.config.correct_every:
            yield Update("fake_score", self.fake_score_loss, ("fake_score",))

    def sampler(self) -> SamplerSpec:
        return SamplerSpec("lcm", (LAST_INDEX,))

    # The student's turn

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """Prediction on most rows, correction on the others."""
        z = ctx.random.normal("z", batch.latent_shape)
        every = self.config.correct_every
        if not every:
            return {"predict": self.predict(z, self.ends(ctx), batch, ctx)[0]}
        rows = torch.arange(len(batch) - len(batch) // every, device=z.device)
        predicted = rows + torch.div(rows, every - 1, rounding_mode="floor")
        corrected = torch.arange(every - 1, len(batch), every, device=z.device)
        first, square = self.predict(z[predicted], self.ends(ctx)[predicted], _rows(batch, predicted), ctx)
        second = self.correct(z[corrected], square, corrected, _rows(batch, corrected), ctx)
        shares = len(predicted) / len(batch), len(corrected) / len(batch)
        return {"predict": shares[0] * first, "correct": shares[1] * self.config.correction_weight * second}

    def ends(self, ctx: Context) -> Tensor:
        """Times at which the trajectory is asked for, uniform over the teacher's indices down to the clean end."""
        index = ctx.random.uniform("end") * ctx.denoiser.schedule.indices - 1
        return ctx.denoiser.schedule.time_of_index(index)

    def predict(self, z: Tensor, s: Tensor, batch: Batch, ctx: Context) -> tuple[Tensor, Tensor]:
        """The loss, and the mean square of its residual, detached."""
        found = self.tangent(z, s, batch, ctx)
        target = self.predicted_target(z, s, found, batch, ctx)
        u = average_velocity(self.ask(z, s, batch, ctx))
        square = torch.where(found.finite, (u.detach() - target).flatten(1).square().mean(1), 0)
        loss = adaptive_distance(u, target, self.config.norm_power, self.config.norm_constant, found.finite)
        return loss, square.mean()

    def tangent(self, z: Tensor, s: Tensor, batch: Batch, ctx: Context) -> Tangent:
        """u(z, s) and du/da_s, everything else held."""
        schedule = ctx.denoiser.schedule
        return self.tangents(
            ctx.denoiser,
            batch.cond,
            "student",
            Point(z, time_at(LAST_INDEX, z, schedule), s),
            Point(None, None, noise_share_rate(schedule, s)),
            average_velocity,
            lambda end: end_input(schedule, end),
        )

    @torch.no_grad()
    def predicted_target(self, z: Tensor, s: Tensor, found: Tangent, batch: Batch, ctx: Context) -> Tensor:
        """The teacher is asked where the student says the trajectory is; past its first index it keeps its velocity."""
        schedule = ctx.denoiser.schedule
        last = time_at(LAST_INDEX, z, schedule)
        asked = s.clamp_min(schedule.t_min)
        x_s = jump(Prediction(found.value, "flow", z, last, schedule), asked)
        teacher = ctx.denoiser(x_s, asked, batch.cond, TEACHER, batch.null, self.config.guidance_scale)
        return teacher.flow + moved_share(schedule, last, s, z) * found.derivative

    def correct(self, z: Tensor, square: Tensor, rows: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """What the gap of two velocities says about one-step samples; `square` is what `predict` gives beside its loss."""
        schedule = ctx.denoiser.schedule
        prediction = self.ask(z, time_at(CLEAN_INDEX, z, schedule), batch, ctx)
        r = log_normal_time(ctx, "correct/t", self.config.correction_mean, self.config.correction_std)[rows]
        eps = ctx.random.normal("correct/eps", batch.latent_shape)[rows]
        x_r = schedule.add_noise(prediction.x0.detach(), eps, r)
        asks = [
            Ask(TEACHER, batch.cond, batch.null, self.config.guidance_scale),
            Ask("fake_score", batch.cond),
        ]
        teacher, fake = ctx.denoiser.together(x_r, r, asks)
        gap = fake.flow - teacher.flow
        length = ctx.global_mean(gap.square().mean()).sqrt()
        ctx.log("velocity_gap", length)
        u = average_velocity(prediction)
        lam = ctx.global_mean(square).sqrt() / (length + self.config.norm_constant)
        return adaptive_distance(u, u.detach() - lam * gap, self.config.norm_power, self.config.norm_constant)

    # The fake score's turn

    def fake_score_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """Denoising of the student's samples, in the network's own prediction type, at all times."""
        schedule = ctx.denoiser.schedule
        z = ctx.random.normal("fake/z", batch.latent_shape)
        with torch.no_grad():
            x0 = self.ask(z, time_at(CLEAN_INDEX, z, schedule), batch, ctx).x0
        t, eps = any_time(ctx, "fake/t"), ctx.random.normal("fake/eps", batch.latent_shape)
        x_t = schedule.add_noise(x0, eps, t)
        prediction = ctx.denoiser(x_t, t, batch.cond, "fake_score")
        return {"denoising": mse(prediction.native, prediction.target(x0, eps))}

    def ask(self, z: Tensor, s: Tensor, batch: Batch, ctx: Context) -> Prediction:
        """The student at pure noise, told where to end."""
        schedule = ctx.denoiser.schedule
        return ctx.denoiser(z, time_at(LAST_INDEX, z, schedule), batch.cond, "student", **end_input(schedule, s))


def _rows(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch of prompts."""
    return Batch(batch.indices[rows], batch.cond[rows], batch.null, batch.latent_shape)
