"""Phased DMD: one expert for each interval of noise levels (Fan et al. 2025, arXiv 2510.27684)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.diffusion.losses import mse, surrogate
from fastdiff.diffusion.prediction import Prediction, transition_target
from fastdiff.diffusion.schedules import NoiseSchedule, Terminal
from fastdiff.diffusion.steps import jump
from fastdiff.diffusion.tensors import broadcast_to
from fastdiff.methods._adversarial import Noisy
from fastdiff.methods._ratio import RatioConfig, RatioWeighted
from fastdiff.methods.base import Batch, Context, MethodInfo, any_time, check_not_negative, check_positive, time_at
from fastdiff.models.sampler import SamplerSpec

_LARGEST_WEIGHT = 10.0


@dataclass(frozen=True)
class PhasedDMDConfig(RatioConfig):
    """Guidance, update rule and two phases of two steps are the paper's (video and image flows); times are ours.

    Args:
        guidance_scale: w of the teacher's score; the fake score is never guided.
        timesteps: the times of all phases, noisiest first.
        student_update_every: steps per student update.
        phase_steps: how many of them belong to each phase.
        phase: the phase that this run trains, from 1 (noisiest). Every later one needs `init_from`: the run of the
            phase before, whose student becomes an expert.
        boundary_margin: indices above the end of the phase at which scores are not compared.
        gradient_on: `x0` puts DMD's normalised gap of clean predictions on the student's own (released training
            code); `x_s` puts the gap of scores on the phase's sample, unnormalised (the paper's formula).
        divergence: `rkl` is the paper's; any other weighs the gap as f-distill does (Xu et al. 2025, arXiv 2502.15681)
            by a ratio that the GAN's heads learn, between images and phase's samples at the same noise.
        critic_weight: `clamped` weighs the fake score's error by min(1, 10 q^2), q the noise added since the end of the
            phase (paper); `none` not at all (released training code).
    """

    guidance_scale: float = 4.0
    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    student_update_every: int = 5
    phase_steps: tuple[int, ...] = (2, 2)
    phase: int = 1
    boundary_margin: int = 20
    gradient_on: Literal["x0", "x_s"] = "x0"
    critic_weight: Literal["clamped", "none"] = "clamped"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(phase=self.phase, **{f"phase_steps[{i}]": steps for i, steps in enumerate(self.phase_steps)})
        check_not_negative(boundary_margin=self.boundary_margin)
        if sum(self.phase_steps) != len(self.timesteps):
            raise ValueError(f"phase_steps {self.phase_steps} must share out all timesteps {self.timesteps}")
        if self.phase > len(self.phase_steps):
            raise ValueError(f"phase {self.phase} does not exist: there are {len(self.phase_steps)} phase_steps")
        self.check_logits()
        self.check_whole("experts are adapters of one base")
        if self.multi_step_input != "simulate":
            raise ValueError(
                "phased_dmd simulates its own rollout: noised data would skip the experts whose samples a later phase "
                "must start from; leave multi_step_input out"
            )
        if self.compared[0] > self.max_timestep:
            raise ValueError(
                f"phase {self.phase} ends at index {self.end}: with boundary_margin {self.boundary_margin} no time up "
                f"to max_timestep {self.max_timestep} is left to compare scores at"
            )

    @property
    def first(self) -> int:
        """Position in `timesteps` where the phase begins."""
        return sum(self.phase_steps[: self.phase - 1])

    @property
    def end(self) -> int:
        """Index at which the phase ends: where the next begins, -1 (clean) for the last."""
        after = self.first + self.phase_steps[self.phase - 1]
        return self.timesteps[after] if after < len(self.timesteps) else -1

    @property
    def compared(self) -> tuple[int, int]:
        """First and last index at which scores are compared."""
        return max(self.min_timestep, self.end + self.boundary_margin), self.max_timestep


class PhasedDMD(RatioWeighted):
    r"""Splits the noise levels into phases; expert k takes samples from the start of phase k to its end s.

    A phase's sample x_s is noisy, so both scores are compared, and the fake one is learned, at x_t = r x_s + q eps with
    r = alpha_t / alpha_s and q^2 = sigma_t^2 - r^2 sigma_s^2, for t from s up to the noisiest:

        L_fake = mean min(1, 10 q^2) |F_fake(x_t) - target|^2, the target of `transition_target`, whose mean given x_t is
        the true denoiser of the student's law (taking x_s for clean is biased),
        L_student: d/dx_s = r (score_fake - score_real^w)(x_t)                              (`gradient_on: x_s`),
                   d/dx0  = (D_fake - D_real^w)(x_t) / mean|x0 - D_real^w(x_t)|             (`gradient_on: x0`),

    x0 being the student's clean prediction in its last call: x_s moves with it by a positive factor, alpha_s -
    sigma_s alpha / sigma at that call's levels, so that both forms pull the same way. Everything but the student's
    last call is detached. The rollout runs deterministically (DDIM, Euler's step of a flow) through the frozen
    experts of earlier phases and then through the student to a random time of the phase, from which it jumps to s in
    one step (stochastic gradient truncation). The fake score is fitted to that same law, the one it is compared
    under, where the paper's listing fits it to whole rollouts. With a single phase of one step and `critic_weight:
    none` this is DMD2 without GAN.

    With `gan_weight` heads tell x_t from noised images, t above s, and L_student gains gan_weight softplus(-l(x_t));
    with another `divergence` the gap is weighted by h(exp(l)) / mean h.

    One run trains one phase: in a recipe with stages each is a stage with `init_from` the one before. Student and fake
    score of every phase start as the teacher. Experts are adapters of one base; full networks work in training and
    previews, but no pipeline folder can hold two of them, so that their export is refused from phase 2 on. Phases that
    are not trained yet are served by the newest expert.
    """

    info = MethodInfo(
        name="phased_dmd",
        title="Phased DMD",
        family="distribution matching",
        paper="Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals",
        arxiv="2510.27684",
        needs="prompts",
        student_kinds=("lora", "full"),
        steps="2-8",
    )
    Config = PhasedDMDConfig
    config: PhasedDMDConfig

    def sampler(self) -> SamplerSpec:
        return SamplerSpec("ddim", self.config.timesteps)

    def experts(self) -> tuple[str, ...]:
        phases = [phase for phase, steps in enumerate(self.config.phase_steps, 1) for _ in range(steps)]
        return tuple(_expert(phase) if phase < self.config.phase else "student" for phase in phases)

    def frozen(self) -> dict[str, str]:
        return {_expert(phase): "student" for phase in range(1, self.config.phase)}

    def inherits(self) -> dict[str, tuple[str, ...]] | None:
        if self.config.phase == 1:
            return None
        return {name: (name,) for name in self.frozen()} | {_expert(self.config.phase - 1): ("student",)}

    # The student's turn

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The score gap, on x_s or on x0."""
        last = self._rollout(batch, ctx, with_grad=True)
        x_s = jump(last, self._end(last.x_t, ctx.denoiser.schedule))
        ctx.store["x"] = x_s.detach()
        ctx.log("latent_std", x_s.detach().std())
        t, x_t = self.noised(x_s if self.config.gan_weight else x_s.detach(), ctx, "student")
        ratio_weight, terms = self._judgement(Noisy(x_t, t), batch, ctx)
        real, fake = ctx.denoiser.together(x_t.detach(), t, self.asks(batch, ctx))
        ctx.log("score_gap", (fake.x0 - real.x0).abs().mean())
        if self.config.gradient_on == "x_s":
            kept, _ = ctx.denoiser.schedule.kernel(self._end(x_s, ctx.denoiser.schedule), t, x_s)
            return {"distribution_matching": surrogate(x_s, ratio_weight * kept * (fake.score - real.score))} | terms
        gap = self.weight(last.x0.detach(), real) * (fake.x0 - real.x0)
        return {"distribution_matching": surrogate(last.x0, ratio_weight * gap)} | terms

    def _judgement(self, noisy: Noisy, batch: Batch, ctx: Context) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The weight of each sample's gap, and the adversarial term."""
        if not self.config.gan_weight:
            return 1.0, {}
        logits = self.adversary.logits(noisy, batch.cond, ctx)
        terms = {"gan": self.config.gan_weight * self.adversary.generator_loss(logits)}
        if self.config.divergence == "rkl":
            return 1.0, terms
        return broadcast_to(self.density_weight(logits, noisy.t, ctx), noisy.x_t), terms

    def noised(self, x: Tensor, ctx: Context, site: str) -> tuple[Tensor, Tensor]:
        """A time above the end of the phase for each sample, and the phase's sample `x` noised on to it."""
        t = any_time(ctx, f"{site}/t", *self.config.compared)
        eps, schedule = ctx.random.normal(f"{site}/eps", x.shape[1:]), ctx.denoiser.schedule
        return t, schedule.transition(x, self._end(x, schedule), t, eps)

    def sample(self, batch: Batch, ctx: Context, with_grad: bool) -> Tensor:
        """The student's sample at the end of the phase."""
        last = self._rollout(batch, ctx, with_grad)
        return jump(last, self._end(last.x_t, ctx.denoiser.schedule))

    def _rollout(self, batch: Batch, ctx: Context, with_grad: bool) -> Prediction:
        """The student's prediction at a random time of its phase; the calls before it run without gradient."""
        times, first, schedule = self.config.timesteps, self.config.first, ctx.denoiser.schedule
        steps = self.config.phase_steps[self.config.phase - 1]
        drawn = first + (ctx.random.shared_integer("student/step", 0, steps) if steps > 1 else 0)
        x_t = ctx.random.normal("student/0", batch.latent_shape)
        for position, role in enumerate(self.experts()[:drawn]):
            with torch.no_grad():
                prediction = ctx.denoiser(x_t, time_at(times[position], x_t, schedule), batch.cond, role)
            x_t = jump(prediction, time_at(times[position + 1], x_t, schedule))
        with torch.set_grad_enabled(with_grad):
            return ctx.denoiser(x_t, time_at(times[drawn], x_t, schedule), batch.cond, "student")

    def _end(self, like: Tensor, schedule: NoiseSchedule) -> Tensor | Terminal:
        return Terminal.CLEAN if self.config.end < 0 else time_at(self.config.end, like, schedule)

    # The fake score's turn

    def critic_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """Denoising from the end of the phase on, at all times above it, in the network's own prediction type."""
        x_s, schedule = self.critic_sample(batch, ctx), ctx.denoiser.schedule
        end = self._end(x_s, schedule)
        t = any_time(ctx, "critic/t", self.config.end + 1)
        eps = ctx.random.normal("critic/eps", batch.latent_shape)
        prediction, terms = self.critic_call(x_s, schedule.transition(x_s, end, t, eps), t, batch, ctx)
        target = transition_target(prediction.kind, schedule, x_s, end, eps, t)
        if self.config.critic_weight == "none":
            return {"denoising": mse(prediction.native, target)} | terms
        _, added = schedule.kernel(end, t, x_s)
        root = (_LARGEST_WEIGHT**0.5 * added).clamp_max(1)  # of clamp(1 / q^2, 0, 10) q^2, without dividing by q
        return {"denoising": mse(root * prediction.native, root * target)} | terms

    def judged(self, x: Tensor, ctx: Context, site: str, fake: bool) -> Noisy:
        """Samples of the phase noised on from its end, or images noised to as much."""
        t = any_time(ctx, f"{site}/t", self.config.end + 1)
        return self.adversary.noised(x, ctx, site, t, self._end(x, ctx.denoiser.schedule) if fake else None)


def _expert(phase: int) -> str:
    return f"expert_{phase}"
