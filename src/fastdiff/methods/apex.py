"""APEX: a network as its own adversary, without a discriminator (Liu et al. 2026, arXiv 2604.12322)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import CLEAN_INDEX, LAST_INDEX
from fastdiff.diffusion.steps import jump
from fastdiff.diffusion.tensors import broadcast_to
from fastdiff.methods._apex_paper import paper_losses
from fastdiff.methods._flow_map import moved_share, noise_share, time_of_share
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import (
    Batch,
    Context,
    Method,
    MethodInfo,
    check_falling,
    check_not_negative,
    check_positive,
    time_at,
)
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.embeddings import time_features, with_extra_times
from fastdiff.models.sampler import SamplerSpec

GROUPS = 4
_FLAG = 1000.0  # in the units of network times
_BARRON = 1e-3
_OF_LOSSES = {
    "code": ("guidance_strength", "near_share", "difference_step", "segments", "adversarial_weight"),
    "paper": ("shift_scale", "shift_bias", "mix"),
}


@dataclass(frozen=True)
class APEXConfig:
    """Defaults are those of the released code, whose integral asks an average of the weights where this asks the live ones.

    Args:
        losses: `code` is what the authors released; `paper` is what the paper prints, whose optimum at one step is
            the mean of the data (a warning says so).
        timesteps: the student's times, noisiest first; each after the first adds fresh noise to a clean prediction.
        guidance_strength: share of the conditional minus the unconditional velocity that is added to the target (code).
        near_share: longest jump of the group of short ones, as a share of its time (code).
        difference_step: step, in noise share, of the finite difference along the trajectory (code).
        segments: calls that integrate the rest of the trajectory (code).
        adversarial_weight: weight of the term that compares samples seen as data and as samples (code).
        shift_scale, shift_bias: the shifted condition is scale * embedding + bias (paper).
        mix: share of the network's own velocity under the shifted condition in the target (paper; not stated there).
    """

    losses: Literal["code", "paper"] = "code"
    timesteps: tuple[int, ...] = (999,)
    guidance_strength: float = 0.8
    near_share: float = 0.05
    difference_step: float = 0.01
    segments: int = 2
    adversarial_weight: float = 0.5
    shift_scale: float = -0.5
    shift_bias: float = 1.0
    mix: float = 0.5

    def __post_init__(self) -> None:
        check_falling(self.timesteps)
        check_not_negative(guidance_strength=self.guidance_strength, adversarial_weight=self.adversarial_weight)
        check_positive(near_share=self.near_share, difference_step=self.difference_step, segments=self.segments)
        if not 0 <= self.mix < 1:
            raise ValueError(f"mix must be in [0, 1), got {self.mix}")
        refuse_unread(self, _OF_LOSSES["paper" if self.losses == "code" else "code"], f"with losses {self.losses}")


class APEX(Method):
    r"""Average velocities of the data, and a gap between two velocities of the same network as the adversary.

    In flow coordinates (share a, see `_flow_map`); F(x, t, s) is the student's velocity told the end s of its jump
    and a flag, v = eps - x0. A batch falls into four groups: end to end (last noise level to clean), short jumps, any
    jumps, and fakes (noised one-step samples, flagged, s = t). v of the first three has guidance_strength (F(x, t, t;
    prompt) - F(x, t, t; none)) added. With R = [(a_t - a_s) F - integral of F from x_t - d v to s] / d - v (which is
    F + (a_t - a_s) dF/da - v for small d),

        L = barron(F, sg[F - clip(R, 1)]) for the first three (R = F - v where the jump is shorter than d),
            barron(F, sg[v of the fakes]) for the fourth, the first three times tan(0.4 pi (1 - (a_t - a_s))) + 1,
        + adversarial_weight * barron(F, sg[F - clip(F(y, t', t'; flag) - F(y, t', t'), 1)]) for the first,

    y a noised one-step sample, barron(d) = |d|^2 / sg sqrt(|d|^2 / c^2 + 1) / c with c = 1e-3. At the exact flow map
    with fakes like the data all of it is at rest. The released code says "fake" by negative times; the flag, a further
    zero-initialised input, says the same without asking the network for times it does not know.

    With `losses` paper (LoRA too, nothing is added to the network): the fake velocity is F under the shifted condition and
    L = |F(y, t; shifted) - (z - x)|^2 + a_t (1 - a_t) |F(x_t, t) - sg[(1 - mix)(eps - x0) + mix F(x_t, t; shifted)]|^2
    with x = x_t - a_t F one step's sample, through which the first term's gradient flows. At the population's optimum
    of these losses the one-step sample from pure noise is (1 - mix) E[x0] + mix E[x | z], whose fixed point is the
    mean of the data.
    """

    info = MethodInfo(
        name="apex",
        title="APEX (self-adversarial condition shifting)",
        family="trajectory",
        paper="Self-Adversarial One Step Generation via Condition Shifting",
        arxiv="2604.12322",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-4",
    )
    Config = APEXConfig
    config: APEXConfig

    def __init__(self, config: APEXConfig) -> None:
        super().__init__(config)
        if config.losses == "paper":
            warnings.warn(
                "apex: losses 'paper' trains the printed losses, whose optimum for one step from noise is the mean "
                "of the data; take it for study, and 'code' for students.",
                stacklevel=2,
            )

    def sampler(self) -> SamplerSpec:
        return SamplerSpec("lcm", self.config.timesteps)

    @property
    def own_network(self) -> bool:
        return self.config.losses == "code"

    @property
    def least_batch(self) -> int:
        return GROUPS if self.config.losses == "code" else 1

    def student_network(self, network: nn.Module) -> nn.Module | None:
        return with_extra_times(network, 2) if self.own_network else None

    def sampling_inputs(self, denoiser: Denoiser, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        if self.config.losses == "paper":
            return {}
        like = torch.empty(batch_size, device=device)
        return told(denoiser, time_at(CLEAN_INDEX, like, denoiser.schedule))

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The losses that the config chooses."""
        if self.config.losses == "paper":
            config = self.config
            return paper_losses(batch, ctx, config.shift_scale, config.shift_bias, config.mix)
        return self.code_losses(batch, ctx)

    def code_losses(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """Groups are every fourth sample each, laid side by side: end to end, short, any, fake."""
        rows, schedule = len(batch), ctx.denoiser.schedule
        group = torch.arange(rows, device=batch.indices.device) % GROUPS
        order = torch.cat([torch.arange(k, rows, GROUPS, device=group.device) for k in range(GROUPS)])
        whole, real = len(range(0, rows, GROUPS)), rows - len(range(GROUPS - 1, rows, GROUPS))
        t, s = (times[order] for times in self.intervals(group, ctx))
        cond, eps = batch.cond[order], ctx.random.normal("eps", batch.latent_shape)[order]
        x = batch.images()[order]
        fakes = self.fakes(cond[real:], order[real:], batch, ctx)
        x = torch.cat([x[:real], fakes.to(x.dtype)])
        x_t, fake = schedule.add_noise(x, eps, t), torch.arange(rows, device=group.device) >= real
        student = self.ask(x_t, t, s, cond, ctx, fake)
        F, v = student.flow, eps - x
        with torch.no_grad():
            v = torch.cat([self.guided(v[:real], x_t[:real], t[:real], cond[:real], batch, ctx), v[real:]])
            residual = self.residual(F[:real].detach(), v[:real], x_t[:real], t[:real], s[:real], cond[:real], ctx)
            target = torch.cat([F[:real] - residual.clamp(-1, 1), v[real:]])
        loss = (barron(F, target) * torch.where(fake, 1, self.weight(t, s, ctx))).mean()
        if not self.config.adversarial_weight:
            return {"average_velocity": loss}
        gap = self.gap(student.x0[:whole].detach(), cond[:whole], order[:whole], batch, ctx)
        adversarial = barron(F[:whole], F[:whole].detach() - gap).mean()
        return {"average_velocity": loss, "adversarial": self.config.adversarial_weight * adversarial}

    def intervals(self, group: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Where each sample's jump begins and ends."""
        schedule = ctx.denoiser.schedule
        place, length = ctx.random.uniform("t"), ctx.random.uniform("jump")
        last = time_at(LAST_INDEX, place, schedule)
        t = time_of_share(schedule, noise_share(schedule, last) * place).clamp_min(schedule.t_min)
        length = torch.where(group == 1, self.config.near_share * length, length)
        s = time_of_share(schedule, noise_share(schedule, t) * (1 - length))
        t, s = torch.where(group == 0, last, t), torch.where(group == 0, time_at(CLEAN_INDEX, place, schedule), s)
        return t, torch.where(group == GROUPS - 1, t, torch.minimum(s, t))

    @torch.no_grad()
    def fakes(self, cond: Conditioning, rows: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """One-step samples."""
        z = ctx.random.normal("fake/z", batch.latent_shape)[rows]
        last, clean = (time_at(index, z, ctx.denoiser.schedule) for index in (LAST_INDEX, CLEAN_INDEX))
        return self.ask(z, last, clean, cond, ctx).x0

    def compares_with_null(self) -> bool:
        return self.config.losses == "code" and self.config.guidance_strength > 0

    def guided(self, v: Tensor, x_t: Tensor, t: Tensor, cond: Conditioning, batch: Batch, ctx: Context) -> Tensor:
        """The data's velocity, pushed along what the prompt changes in the student's own."""
        if not self.config.guidance_strength:
            return v
        with_prompt = self.ask(x_t, t, t, cond, ctx).flow
        without = self.ask(x_t, t, t, batch.null.expand(len(x_t)), ctx).flow
        return v + self.config.guidance_strength * (with_prompt - without)

    def residual(
        self, F: Tensor, v: Tensor, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning, ctx: Context
    ) -> Tensor:
        """R: how much the jump to `s` fails to agree with a small step by `v` and the student's way on from there."""
        schedule, segments = ctx.denoiser.schedule, self.config.segments
        share, end = noise_share(schedule, t), noise_share(schedule, s)
        start = share - self.config.difference_step
        here = torch.maximum(time_of_share(schedule, start), s).clamp_min(schedule.t_min)
        x = jump(Prediction(v, "flow", x_t, t, schedule), here)
        first, covered = noise_share(schedule, here), torch.zeros_like(v)
        for number in range(1, segments + 1):
            following = time_of_share(schedule, first + (end - first) * number / segments).clamp_min(schedule.t_min)
            following = s if number == segments else torch.minimum(following, here)
            prediction = self.ask(x, here, following, cond, ctx)
            covered = covered + moved_share(schedule, here, following, v) * prediction.flow
            x, here = jump(prediction, following), following
        # At the first index of a table no network knows the step's end, and no difference can be taken.
        taken, least = share - first, self.config.difference_step / 2
        near = (share - end < self.config.difference_step) | (taken < least)
        far = (moved_share(schedule, t, s, v) * F - covered) / broadcast_to(taken.clamp_min(least).to(v.dtype), v) - v
        return torch.where(broadcast_to(near, v), F - v, far)

    @torch.no_grad()
    def gap(self, x0: Tensor, cond: Conditioning, rows: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """Velocity of samples minus velocity of data at a noised sample, clipped."""
        schedule = ctx.denoiser.schedule
        share = noise_share(schedule, time_at(LAST_INDEX, x0, schedule)) * ctx.random.uniform("gap/t")[rows]
        t = time_of_share(schedule, share).clamp_min(schedule.t_min)
        y = schedule.add_noise(x0, ctx.random.normal("gap/eps", batch.latent_shape)[rows], t)
        flag = torch.ones(len(y), dtype=torch.bool, device=y.device)
        found = (self.ask(y, t, t, cond, ctx, flag).flow - self.ask(y, t, t, cond, ctx).flow).clamp(-1, 1)
        ctx.log("velocity_gap", found.abs().mean())
        return found

    def weight(self, t: Tensor, s: Tensor, ctx: Context) -> Tensor:
        """Short jumps count up to four times as much as the whole one."""
        schedule = ctx.denoiser.schedule
        return (math.pi * (1 - (noise_share(schedule, t) - noise_share(schedule, s))) / 2.5).tan() + 1

    def ask(
        self, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning, ctx: Context, fake: Tensor | None = None
    ) -> Prediction:
        """The student, told where to end and which rows are samples of its own."""
        return ctx.denoiser(x_t, t, cond, "student", **told(ctx.denoiser, s, fake))


def told(denoiser: Denoiser, s: Tensor, fake: Tensor | None = None) -> dict[str, Tensor]:
    """The network's further inputs: the end of the jump, and a flag for fakes (none if not given), both `(B,)`."""
    time = denoiser.schedule.network_time(s)
    flag = torch.zeros_like(time) if fake is None else _FLAG * fake.to(time.dtype)
    return {"timestep_cond": time_features([time, flag])}


def barron(prediction: Tensor, target: Tensor) -> Tensor:
    """`(B,)`: |d|^2 / sg sqrt(|d|^2 / c^2 + 1) / c with the mean over elements: |d| where that exceeds c."""
    square = (prediction - target.detach()).square().flatten(1).mean(1)
    return square * (square.detach() / _BARRON**2 + 1).rsqrt() / _BARRON
