"""What all score-gap methods share: the student's sample, two scores of its noised version, and the fake score's fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastdiff.diffusion.losses import dmd_normaliser, mse, surrogate
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import LAST_INDEX
from fastdiff.methods._rollout import MultiStepInput, student_sample
from fastdiff.methods._routed_student import RoutedStudent, RoutedStudentConfig
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import (
    Batch,
    Context,
    Group,
    Need,
    Update,
    any_time,
    check_falling,
    check_not_negative,
    check_positive,
)
from fastdiff.models.denoiser import Ask
from fastdiff.models.roles import TEACHER
from fastdiff.models.sampler import SamplerSpec


@dataclass(frozen=True)
class ScoreGapConfig(RoutedStudentConfig):
    """What every score-gap method can be told.

    Args:
        guidance_scale: w of the teacher's score.
        timesteps: the student's times, noisiest first; one entry makes a one-step student.
        multi_step_input: how later steps get their input: simulate the student itself, or noise clean images.
        update_rule: `every` updates the fake score in each step and the student in every `student_update_every`-th
            (official code); `exclusive` updates one or the other (FastGen's reading).
        student_update_every: steps per student update.
        min_timestep, max_timestep: range of the times at which scores are compared.
        fake_score_learning_rate: learning rate of the fake score; the student's if not given.
    """

    guidance_scale: float = 1.0
    timesteps: tuple[int, ...] = (999,)
    multi_step_input: MultiStepInput = "simulate"
    update_rule: Literal["every", "exclusive"] = "every"
    student_update_every: int = 1
    min_timestep: int = 20
    max_timestep: int = 980
    fake_score_learning_rate: float | None = None

    def __post_init__(self) -> None:
        self.check_students()
        check_not_negative(guidance_scale=self.guidance_scale, min_timestep=self.min_timestep)
        check_positive(student_update_every=self.student_update_every)
        check_positive(fake_score_learning_rate=self.fake_score_learning_rate)
        if not self.min_timestep <= self.max_timestep <= LAST_INDEX:
            raise ValueError(
                f"max_timestep ({self.max_timestep}) must not be below min_timestep ({self.min_timestep}) nor above "
                f"{LAST_INDEX}"
            )
        check_falling(self.timesteps)
        if len(self.timesteps) == 1:
            refuse_unread(self, ("multi_step_input",), "with one timestep, where the student starts from noise")
        if self.update_rule == "exclusive" and self.student_update_every == 1:
            raise ValueError(
                "with update_rule exclusive, student_update_every 1 never trains the fake score: take a larger number, "
                "or update_rule every"
            )


class ScoreGap(RoutedStudent):
    """A student trained by `weight * (D_fake - D_real)` at noised versions of its own sample.

    A method overrides the smallest of these that says what it changes: `weight` (which divergence), `asks` (who is
    guided), `gradient` (which score terms), `student_terms` (what is added), `critic_loss` (what the fake score fits).
    """

    critics: ClassVar[tuple[str, ...]] = ("fake_score",)
    student_first: ClassVar[bool] = True
    """Whether the student steps before the fake score where both do."""
    config: ScoreGapConfig

    def groups(self) -> dict[str, Group]:
        return {"student": Group(), "fake_score": Group(self.config.fake_score_learning_rate)}

    def needs(self) -> Need:
        from_data = len(self.config.timesteps) > 1 and self.config.multi_step_input == "noised_data"
        return "images" if from_data else "prompts"

    def updates(self, step: int) -> Iterable[Update]:
        student_turn = step % self.config.student_update_every == 0
        critic_turn = not student_turn or self.config.update_rule == "every"
        student = Update("student", self.student_loss, ("student",))
        critic = Update("fake_score", self.critic_loss, tuple(name for name in self.groups() if name != "student"))
        critic_turn = critic_turn and bool(critic.trains)
        turns = [update for update, due in ((student, student_turn), (critic, critic_turn)) if due]
        yield from turns if self.student_first else turns[::-1]

    def sampler(self) -> SamplerSpec:
        return SamplerSpec("lcm", self.config.timesteps)

    # The student's turn

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The terms of the scores, and whatever the method adds."""
        x = self.sample(batch, ctx, with_grad=True)
        ctx.store["x"] = x.detach()
        ctx.log("latent_std", x.detach().std())
        return self.score_terms(x, batch, ctx) | self.student_terms(x, batch, ctx)

    def score_terms(self, x: Tensor, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """What the two scores say about the student's sample; `x` carries its graph."""
        return {"distribution_matching": surrogate(x, self.gradient(x.detach(), batch, ctx))}

    def gradient(self, x: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """The x-gradient, detached: the weighted gap of the two scores at one noised version of `x`."""
        t, x_t = self.noised(x, ctx, "student")
        real, fake = ctx.denoiser.together(x_t, t, self.asks(batch, ctx))
        ctx.log("score_gap", (fake.x0 - real.x0).abs().mean())
        return self.weight(x, real) * (fake.x0 - real.x0)

    def asks(self, batch: Batch, ctx: Context) -> list[Ask]:
        """The teacher's and the fake score's question; only the teacher is guided unless a method says otherwise."""
        return [
            Ask(TEACHER, batch.cond, batch.null, self.config.guidance_scale),
            Ask("fake_score", batch.cond),
        ]

    def weight(self, x: Tensor, real: Prediction) -> Tensor:
        """What multiplies the gap of clean predictions, one number a sample: `1 / mean|x - D_real|` (DMD's code)."""
        return 1 / dmd_normaliser(x, real.x0)

    def student_terms(self, x: Tensor, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """Further terms of the student's loss; `x` carries its graph."""
        return {}

    # The fake score's turn

    def critic_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """Denoising on the student's samples, in the network's own prediction type, at all times."""
        x = self.critic_sample(batch, ctx)
        t = any_time(ctx, "critic/t")
        eps = ctx.random.normal("critic/eps", batch.latent_shape)
        x_t = ctx.denoiser.schedule.add_noise(x, eps, t)
        prediction, terms = self.critic_call(x, x_t, t, batch, ctx)
        return {"denoising": mse(prediction.native, prediction.target(x, eps))} | terms

    def critic_call(
        self, x: Tensor, x_t: Tensor, t: Tensor, batch: Batch, ctx: Context
    ) -> tuple[Prediction, dict[str, Tensor]]:
        """The fake score's prediction at `x_t`, and terms of the same update that can share its call."""
        return ctx.denoiser(x_t, t, batch.cond, "fake_score"), {}

    # Pieces

    def sample(self, batch: Batch, ctx: Context, with_grad: bool) -> Tensor:
        """The student's clean sample."""
        return student_sample(batch, ctx, self.config.timesteps, self.config.multi_step_input, with_grad=with_grad)

    def critic_sample(self, batch: Batch, ctx: Context) -> Tensor:
        """The student's sample without graph: that of this step's student update, or a new one."""
        x = ctx.store.get("x")
        return self.sample(batch, ctx, with_grad=False) if x is None else x

    def noised(self, x: Tensor, ctx: Context, site: str) -> tuple[Tensor, Tensor]:
        """A time in the compared range for each sample, and `x` noised to it."""
        t = any_time(ctx, f"{site}/t", self.config.min_timestep, self.config.max_timestep)
        return t, ctx.denoiser.schedule.add_noise(x, ctx.random.normal(f"{site}/eps", x.shape[1:]), t)
