"""Score distillation: SDS, CSD, VSD and balanced score distillation, of any differentiable image and of a student.

The losses see latents and their graph only, so that what is trained may be a renderer or a plain tensor:

    denoiser = Denoiser(Roles(teacher.network, {}), teacher.family, teacher.schedule, teacher.prediction_type)
    loss = SDS(denoiser, guidance_scale=100.0)
    loss(render(camera), t, eps, cond, null).backward()

Times and noise are arguments, so that schedules of them (annealing, fixed noise, inverted noise) are the caller's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastdiff.diffusion.losses import mse
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.tensors import compute_dtype
from fastdiff.methods._score_gap import ScoreGap, ScoreGapConfig
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, Group, MethodInfo, any_time, check_positive
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Ask, Denoiser
from fastdiff.models.roles import TEACHER

_TINY = 1e-12


@dataclass(frozen=True)
class ScoreLoss(ABC):
    """A loss on latents whose gradient is a published one.

    Args:
        denoiser: the frozen teacher, and for some losses a role that follows what is trained.
    """

    denoiser: Denoiser

    def __call__(self, x: Tensor, t: Tensor, eps: Tensor, cond: Conditioning, null: Conditioning) -> Tensor:
        """A loss whose gradient in each `x` is `gradient` / B; its value says nothing but the gradient's size.

        Args:
            x: `(B, C, h, w)` latents with their graph.
            t: `(B,)` schedule times.
            eps: normal noise shaped like `x`.
            cond, null: conditioning, `B` rows, and the unconditional row.
        """
        gradient = self.gradient(x, t, eps, cond, null)
        x = x.to(compute_dtype(x))
        return 0.5 * (x - (x - gradient).detach()).square().sum() / len(x)

    @abstractmethod
    def gradient(self, x: Tensor, t: Tensor, eps: Tensor, cond: Conditioning, null: Conditioning) -> Tensor:
        """What the loss descends along in `x`, detached, shaped like it; arguments as in `__call__`."""

    def noised(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t without graph."""
        return self.denoiser.schedule.add_noise(x.detach(), eps, t)

    def two(self, x: Tensor, t: Tensor, eps: Tensor, cond: Conditioning, null: Conditioning) -> list[Prediction]:
        """The teacher with and without prompt, in one call."""
        asks = [Ask(TEACHER, cond), Ask(TEACHER, null.expand(len(x)))]
        return self.denoiser.together(self.noised(x, t, eps), t, asks)


@dataclass(frozen=True)
class SDS(ScoreLoss):
    r"""Score distillation sampling (DreamFusion, Poole et al. 2022, arXiv 2209.14988).

        g = sigma_t^2 (eps_real^w(x_t) - eps)

    It is VSD with the true noise for the fake score: no term keeps samples apart, so a generator collapses to a mode.
    """

    guidance_scale: float = 100.0

    def gradient(self, x, t, eps, cond, null):
        (real,) = self.denoiser.together(self.noised(x, t, eps), t, [Ask(TEACHER, cond, null, self.guidance_scale)])
        return real.levels[1] ** 2 * (real.eps - eps)


@dataclass(frozen=True)
class CSD(ScoreLoss):
    r"""Classifier score distillation: the guidance alone (Yu et al. 2023, arXiv 2310.19415).

        g = sigma_t^2 (eps_real(x_t, c) - eps_real(x_t, null))

    VSD with an untrained fake score is (w - 1) times this.
    """

    def gradient(self, x, t, eps, cond, null):
        real, unconditional = self.two(x, t, eps, cond, null)
        return real.levels[1] ** 2 * (real.eps - unconditional.eps)


@dataclass(frozen=True)
class VSD(ScoreLoss):
    r"""Variational score distillation (ProlificDreamer, Wang et al. 2023, arXiv 2305.16213).

        g = sigma_t^2 (eps_real^w(x_t) - eps_fake(x_t)),   L_fake = mean |F_fake(x_t) - target|^2 by `fit`.

    Args:
        guidance_scale: w of the teacher; the fake score is never guided.
        fake: the role that follows what is trained; it must start as the teacher, e.g. as an adapter.
        fake_cond: conditioning of the fake score where it has its own, e.g. the scene's with its camera; `fit` is then
            given the same.
    """

    guidance_scale: float = 7.5
    fake: str = "fake_score"
    fake_cond: Conditioning | None = None

    def gradient(self, x, t, eps, cond, null):
        own = cond if self.fake_cond is None else self.fake_cond
        asks = [Ask(TEACHER, cond, null, self.guidance_scale), Ask(self.fake, own)]
        real, fake = self.denoiser.together(self.noised(x, t, eps), t, asks)
        return real.levels[1] ** 2 * (real.eps - fake.eps)

    def fit(self, x: Tensor, t: Tensor, eps: Tensor, cond: Conditioning) -> Tensor:
        """The fake score's loss on samples `x`, which get no gradient."""
        prediction = self.denoiser(self.noised(x, t, eps), t, cond, self.fake)
        return mse(prediction.native, prediction.target(x.detach(), eps))


@dataclass(frozen=True)
class BSD(ScoreLoss):
    r"""Balanced score distillation (PlacidDreamer, Huang et al. 2024, arXiv 2407.13976).

    Guidance u and denoising v are two goals; the step is their combination of least norm, which harms neither:

        u = ratio * (eps_real(x_t, c) - eps_real(x_t, null)),   v = eps_real(x_t, null),
        a = clip(<v - u, v> / |v - u|^2, 0, 1) for each sample,   g = alpha_t (a u + (1 - a) v).

    Weight and rule are those of the released code, whose flag for the ratio says 18 and whose loss uses 15.

    Args:
        ratio: of guidance to denoising; more gives stronger colours.
    """

    ratio: float = 18.0

    def gradient(self, x, t, eps, cond, null):
        real, unconditional = self.two(x, t, eps, cond, null)
        guidance, denoising = self.ratio * (real.eps - unconditional.eps), unconditional.eps
        apart = denoising - guidance
        axes = tuple(range(1, apart.dim()))
        share = (apart * denoising).sum(axes, keepdim=True) / apart.square().sum(axes, keepdim=True).clamp_min(_TINY)
        return real.levels[0] * denoising.lerp(guidance, share.clamp(0, 1))


_UNREAD = {
    "sds": ("bsd_ratio", "fake_score_learning_rate"),
    "csd": ("guidance_scale", "bsd_ratio", "fake_score_learning_rate"),
    "vsd": ("bsd_ratio",),
    "bsd": ("guidance_scale", "fake_score_learning_rate"),
}


@dataclass(frozen=True)
class ScoreDistillationConfig(ScoreGapConfig):
    """The papers optimise single scenes; for students these are baselines.

    Args:
        score_loss: `sds` (teacher against true noise), `csd` (guidance alone), `vsd` (teacher against a fake score) or
            `bsd` (guidance and denoising in balance).
        guidance_scale: w of the teacher for `vsd` and `sds`, whose papers take 7.5 and 100; `csd` and `bsd` have none.
        bsd_ratio: of guidance to denoising in `bsd`.
    """

    score_loss: Literal["sds", "csd", "vsd", "bsd"] = "vsd"
    guidance_scale: float = 7.5
    bsd_ratio: float = 18.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(bsd_ratio=self.bsd_ratio)
        if self.score_loss != "vsd" and (self.student_update_every > 1 or self.update_rule != "every"):
            raise ValueError(
                f"{self.score_loss} trains no fake score, so that there is nothing to do between the student's steps: "
                "leave student_update_every at 1 and update_rule at 'every'"
            )
        refuse_unread(self, _UNREAD[self.score_loss], f"with score_loss {self.score_loss}")


class ScoreDistillation(ScoreGap):
    r"""A student trained by the losses that text-to-3D uses on scenes; see `SDS`, `CSD`, `VSD` and `BSD`.

    With x the student's sample and everything in g detached,

        sds: g = sigma^2 (eps_real^w - eps)               collapses each prompt to a mode,
        csd: g = sigma^2 (eps_real - eps_null)            goes on pushing where the prompt fits already,
        vsd: g = sigma^2 (eps_real^w - eps_fake)          matches the law (arXiv 2305.16213),
        bsd: g = alpha (a r (eps_real - eps_null) + (1 - a) eps_null), a of least norm.
    """

    info = MethodInfo(
        name="score_distillation",
        title="Score distillation (SDS, CSD, VSD, BSD)",
        family="distribution matching",
        paper="ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation",
        arxiv="2305.16213",
        needs="prompts",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = ScoreDistillationConfig
    config: ScoreDistillationConfig

    def compares_with_null(self) -> bool:
        return self.config.score_loss in ("csd", "bsd")

    def groups(self) -> dict[str, Group]:
        groups = super().groups()
        return groups if self.config.score_loss == "vsd" else {"student": groups["student"]}

    def loss(self, denoiser: Denoiser) -> ScoreLoss:
        """The loss on single images that this config means."""
        match self.config.score_loss:
            case "sds":
                return SDS(denoiser, self.config.guidance_scale)
            case "csd":
                return CSD(denoiser)
            case "vsd":
                return VSD(denoiser, self.config.guidance_scale)
            case "bsd":
                return BSD(denoiser, self.config.bsd_ratio)

    def gradient(self, x: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """The gradient of the configured loss at one noised version of `x`."""
        t = any_time(ctx, "student/t", self.config.min_timestep, self.config.max_timestep)
        eps = ctx.random.normal("student/eps", batch.latent_shape)
        return self.loss(ctx.denoiser).gradient(x, t, eps, batch.cond, batch.null)
