"""SDXL-Lightning: progressive adversarial distillation (Lin et al. 2024, arXiv 2402.13929)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff.diffusion.losses import discriminator_softplus, generator_softplus
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.steps import jump
from fastdiff.diffusion.tensors import DeviceTable, broadcast_to
from fastdiff.diffusion.timesteps import Grid
from fastdiff.methods._adversarial import Noisy
from fastdiff.methods._trajectory import teacher_path
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, Group, MethodInfo, Update, check_positive
from fastdiff.methods.progressive import (
    PREVIOUS,
    Progressive,
    ProgressiveConfig,
    first_start,
    implied_clean,
    stage_steps,
)
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.discriminator import FeatureHeads
from fastdiff.models.roles import TEACHER

CRITIC, HEAD = "critic", "discriminator"


@dataclass(frozen=True)
class LightningConfig(ProgressiveConfig):
    """One phase of one stage; a recipe's stages go on from one another (`init_from`).

    Args:
        objective: `mse` is progressive distillation; `conditional` a discriminator that sees where the step began;
            `unconditional` one that sees only where it ended: sharper, and no longer bound to the teacher's own map.
        stage_teacher: `teacher` for the first stage; `previous` for the student that the run started from; `kept` for
            that run's own previous student, which a stage's second phase shares with its first.
        discriminator_learning_rate: learning rate of the critic and its head, the student's if not given; `mse` has
            neither.
        renoise_timesteps: before they are judged, both ends are noised to one of these indices, where it is noisier
            (for stages of one and two steps); none judges them as they are. Not for `mse`.
        extra_timesteps: further indices the student is trained at, each to the end of the step it lies in, where the
            teacher goes by its own grid. A student of one step trained at 749, 499 and 249 too can start from noised
            images; a stage's teacher must know the indices, from its own steps or its extra ones.
    """

    objective: Literal["mse", "conditional", "unconditional"] = "conditional"
    stage_teacher: Literal["teacher", "previous", "kept"] = "teacher"
    discriminator_learning_rate: float | None = None
    renoise_timesteps: tuple[int, ...] = ()
    extra_timesteps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage_teacher == "kept":
            dataclasses.replace(self, stage_teacher=PREVIOUS)  # the same rules
        check_positive(discriminator_learning_rate=self.discriminator_learning_rate)
        first = first_start(self)
        if any(not 0 <= index <= first for index in self.renoise_timesteps):
            raise ValueError(f"renoise_timesteps must be from 0 to {first}, got {self.renoise_timesteps}")
        if any(not 0 <= index < first for index in self.extra_timesteps):
            raise ValueError(
                f"extra_timesteps must be from 0 to {first - 1}, below the first step's, got {self.extra_timesteps}"
            )
        if self.objective == "mse":
            refuse_unread(self, ("renoise_timesteps",), "with the objective mse, which no discriminator judges")
        else:
            refuse_unread(self, ("loss_weight",), f"with the objective {self.objective}, which compares no squares")


@dataclass(frozen=True)
class Transition:
    """A step of the student and its teacher's: from `start` to `fake` and `real` at the time `end`, index `index`."""

    start: Noisy
    index: Tensor
    end: Tensor
    fake: Tensor
    real: Tensor
    student: Prediction


class Lightning(Progressive):
    r"""Progressive distillation in which a discriminator judges the steps.

    From x_t, noised data (plain noise at the first step, as samplers feed it), the student steps once to x^_u and its
    teacher several times to x*_u. With d the middle features of a copy of the teacher that is trained as well,

        l(x_u) = head(d(x_u, u, c), d(x_t, t, c)), or without the second (unconditional),
        L_student = softplus(-l(x^_u)),    L_critic = softplus(l(sg x^_u)) + softplus(-l(x*_u)).

    Both ends are functions of x_t, so the conditional optimum is the teacher's own map; the unconditional one fixes the
    law of x_u alone. Critic and head start anew in every stage. The paper's switch to predicting clean samples at
    one step is not made: the student keeps the teacher's prediction type and exports as an adapter; what it mends, the
    14.6-fold error at index 999, an earlier `first_timestep` avoids. Training of d, phases and re-noising are as
    reported of the unpublished training code; its head is one convolution larger than ours.
    """

    info = MethodInfo(
        name="lightning",
        title="SDXL-Lightning (progressive adversarial distillation)",
        family="trajectory",
        paper="SDXL-Lightning: Progressive Adversarial Diffusion Distillation",
        arxiv="2402.13929",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = LightningConfig
    config: LightningConfig
    critics: ClassVar[tuple[str, ...]] = (CRITIC,)

    def __init__(self, config: LightningConfig) -> None:
        super().__init__(config)
        self._steps = DeviceTable(with_extra_starts(stage_steps(config), config.extra_timesteps))
        self._renoise = Grid(config.renoise_timesteps) if config.renoise_timesteps else None

    def groups(self) -> dict[str, Group]:
        if self.config.objective == "mse":
            return super().groups()
        own = Group(self.config.discriminator_learning_rate, (0.0, 0.99))
        return super().groups() | {CRITIC: own, HEAD: own}

    def modules(self, denoiser: Denoiser) -> dict[str, nn.Module]:
        if self.config.objective == "mse":
            return {}
        taps = denoiser.family.middle_taps(denoiser.roles.network(CRITIC))
        copies = 2 if self.config.objective == "conditional" else 1
        return {HEAD: FeatureHeads(copies * channels for channels in taps.values())}

    def frozen(self) -> Mapping[str, str]:
        return {} if self.config.stage_teacher == TEACHER else {PREVIOUS: "student"}

    def inherits(self) -> Mapping[str, tuple[str, ...]] | None:
        teacher = "student" if self.config.stage_teacher == PREVIOUS else PREVIOUS
        return {"student": ("student",)} | {role: (teacher,) for role in self.frozen()}

    def updates(self, step: int) -> Iterable[Update]:
        yield from super().updates(step)
        if self.config.objective != "mse":
            yield Update(HEAD, self.critic_loss, (CRITIC, HEAD))

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The regression, or what the critic says of the student's step."""
        step = self.transition(batch, ctx)
        if self.config.objective == "mse":
            target = implied_clean(step.start.x_t, step.start.t, step.real, step.end, ctx.denoiser.schedule)
            return {"progressive": (self._weight(step.student) * (step.student.x0 - target).square()).mean()}
        ctx.store["step"] = dataclasses.replace(step, fake=step.fake.detach())
        (logits,) = self.logits([self.judged(step.fake, step, ctx, "gan", "fake")], step.start, batch.cond, ctx)
        return {"gan": generator_softplus(logits)}

    def critic_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The critic's loss on the step of the student's update."""
        step: Transition = ctx.store["step"]
        both = [
            self.judged(x, step, ctx, "critic/gan", name) for name, x in (("fake", step.fake), ("real", step.real))
        ]
        fake, real = self.logits(both, step.start, batch.cond, ctx)
        ctx.log("logit_real", real.detach().mean())
        ctx.log("logit_fake", fake.detach().mean())
        return {"discriminator": discriminator_softplus(real, fake)}

    def transition(self, batch: Batch, ctx: Context) -> Transition:
        """One step of the stage's grid, or from an extra time, for each sample; only the student's has a graph."""
        config, schedule, x0 = self.config, ctx.denoiser.schedule, batch.images()
        steps = self._steps.on(x0.device)[ctx.random.integers("step", 0, len(self._steps.host))].unbind(1)
        t, end = schedule.time_of_index(steps[0]), schedule.time_of_index(steps[-1])
        eps = ctx.random.normal("eps", batch.latent_shape).to(x0.dtype)
        first = broadcast_to(steps[0] == first_start(config), x0)
        x_t = torch.where(first, eps, schedule.add_noise(x0, eps, t))
        student = ctx.denoiser(x_t, t, batch.cond, "student")
        role = TEACHER if config.stage_teacher == TEACHER else PREVIOUS
        with torch.no_grad():
            real = teacher_path(x_t, steps, batch, ctx, config.guidance_scale, role)
        return Transition(Noisy(x_t, t), steps[-1], end, jump(student, end), real, student)

    def judged(self, x: Tensor, step: Transition, ctx: Context, site: str, name: str) -> Noisy:
        """What the critic sees of an end point; both have one time, and noises of their own."""
        schedule = ctx.denoiser.schedule
        if self._renoise is None:
            return Noisy(x, step.end.clamp_min(schedule.t_min))
        index = self._renoise.times(ctx.random.uniform(f"{site}/t")).maximum(step.index)
        t = schedule.time_of_index(index)
        return Noisy(schedule.transition(x, step.end, t, ctx.random.normal(f"{site}/{name}", x.shape[1:])), t)

    def logits(self, ends: Sequence[Noisy], start: Noisy, cond: Conditioning, ctx: Context) -> list[Tensor]:
        """A logit `(B, K)` for each of `ends`, in one call of the critic's first half."""
        asked = [*ends, start] if self.config.objective == "conditional" else list(ends)
        x_t, t = (torch.cat(part) for part in zip(*asked, strict=True))
        taps = tuple(ctx.denoiser.family.middle_taps(ctx.denoiser.roles.network(CRITIC)))
        features = ctx.denoiser.features(x_t, t, cond.cat([cond] * len(asked)), CRITIC, taps)
        rows = list(zip(*(feature.split(len(cond)) for feature in features), strict=True))
        if self.config.objective == "unconditional":
            return [ctx.modules[HEAD](*own) for own in rows]
        *judged, began = rows
        return [ctx.modules[HEAD](*(torch.cat(pair, 1) for pair in zip(own, began, strict=True))) for own in judged]


def with_extra_starts(steps: Tensor, starts: Sequence[int]) -> Tensor:
    """A stage's table of indices `(N, K + 1)` with a further row for each of `starts` at which no step begins.

    Such a row goes on by the teacher's grid from the start to the end of the step it lies in. It has fewer than K
    steps where the start lies low in that step, and then stays at the start first, which moves nothing.
    """
    grid = steps.tolist()
    for start in sorted(set(starts) - set(steps[:, 0].tolist()), reverse=True):
        (way,) = (row for row in steps.tolist() if row[-1] < start < row[0])
        below = [index for index in way if index < start]
        grid.append([start] * (len(way) - len(below)) + below)
    return torch.tensor(grid, device="cpu")
