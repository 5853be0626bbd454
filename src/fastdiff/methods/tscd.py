"""Trajectory-segmented consistency distillation of Hyper-SD (Ren et al. 2024, arXiv 2404.13686)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastdiff.methods._adversarial import weighted
from fastdiff.methods._adversarial_trajectory import AdversarialTrajectory, AdversarialTrajectoryConfig
from fastdiff.methods._trajectory import jump_sampler
from fastdiff.methods._trajectory_phases import check_phases, draw_end, phase_edge
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, Group, MethodInfo, Update, check_not_negative, check_positive
from fastdiff.methods.dmd2 import DMD2, DMD2Config
from fastdiff.models.sampler import SamplerSpec


@dataclass(frozen=True)
class TSCDConfig(AdversarialTrajectoryConfig):
    """One stage; a recipe's stages go through 8, 4, 2 and 1 segments, each from the one before (`init_from`).

    The segments, the squared error, the averaged target and a last stage of score distillation are the paper's. It
    weighs the squared error more in the first stages and the adversarial term more in the last ones, without numbers:
    all weights, here and in the recipes, `target_decay`, both guidance scales and learning rates are this project's.
    40 solver steps of 25 indices stand for the paper's 20 indices a step, so that segments end where stock DDIM lands.
    Its noise perturbation, its learning from human feedback and the 800 indices of its one-step LoRA are left out.

    Args:
        num_ddim_timesteps: points of the solver's grid, a divisor of 1000 that `num_segments` divides.
        num_segments: segments of the trajectory; a map ends anywhere between t_{n-1} and its segment's edge.
        num_inference_steps: steps the student is meant to be run with; as many as there are segments if not given.
        eta: stochasticity of the sampler: 0 jumps from time to time, up to 1 it jumps lower and adds noise.
        loss_type: the squared error is the paper's; or `huber` with `huber_c`.
        adversarial_weight: weight of the generator's term; 0 leaves the discriminator out.
        consistency_weight: weight of the consistency loss.
        score_weight: weight of score distillation of the one-step sample (last stage); 0 leaves the fake score out.
        score_guidance_scale: w of the teacher's score; only with score_weight.
        fake_score_learning_rate: learning rate of the fake score, the student's if not given; only with score_weight.
    """

    num_ddim_timesteps: int = 40
    num_segments: int = 8
    num_inference_steps: int | None = None
    eta: float = 0.0
    loss_type: Literal["huber", "l2"] = "l2"
    consistency_weight: float = 1.0
    adversarial_weight: float = 0.1
    score_weight: float = 0.0
    score_guidance_scale: float = 1.75
    fake_score_learning_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_phases(self.num_segments, self.num_ddim_timesteps, "num_segments")
        check_not_negative(consistency_weight=self.consistency_weight, score_weight=self.score_weight)
        check_positive(num_inference_steps=self.steps)
        if self.steps % self.num_segments:
            raise ValueError(
                f"num_inference_steps {self.steps} does not visit the edges of {self.num_segments} segments, which no "
                "map crosses: give a multiple of num_segments"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")
        if self.num_segments > 1:
            self._check_edges()
        if self.score_weight and self.num_segments != 1:
            raise ValueError(
                f"score_weight distils the one-step sample, but {self.num_segments} segments never cross the whole "
                "trajectory: use it in a stage with num_segments 1"
            )
        if not self.score_weight:
            refuse_unread(self, ("score_guidance_scale", "fake_score_learning_rate"), "with score_weight 0")

    def _check_edges(self) -> None:
        """Refuses samplers that jump over a segment's edge, which no map crosses."""
        if self.eta:
            raise ValueError(
                f"eta {self.eta} jumps below the next time, over the edges of {self.num_segments} segments, which no map "
                "crosses: use eta 0, or num_segments 1"
            )
        if 1000 % self.steps:
            raise ValueError(
                f"num_inference_steps {self.steps} does not divide 1000 indices evenly, so that a step would cross an edge "
                f"of the {self.num_segments} segments: give a divisor of 1000 that num_segments divides"
            )

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        return self.num_segments if self.num_inference_steps is None else self.num_inference_steps


class TSCD(AdversarialTrajectory):
    r"""Consistency of jumps to anywhere in a segment of the trajectory, with ever fewer segments.

    With t_b the edge of t_n's segment, t_end ~ U[t_b, t_{n-1}], and J the DDIM step from a prediction,

        L = mse(J(x_{t_n} -> t_end), sg J^-(x_{t_{n-1}} -> t_end)) + adversarial term on both noised end points,

    x_{t_{n-1}} by a DDIM step of the guided teacher, J^- the averaged student (the live one for a LoRA). In the last
    stage the student's sample from pure noise also follows the gap of the teacher's and a fake score (DMD), while
    consistency keeps the same weights good for more steps: one unified LoRA. t_end = t_b always would be PCM, one
    segment is TCD.
    """

    info = MethodInfo(
        name="tscd",
        title="Trajectory-segmented consistency distillation (Hyper-SD)",
        family="trajectory",
        paper="Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis",
        arxiv="2404.13686",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = TSCDConfig
    config: TSCDConfig
    critics: ClassVar[tuple[str, ...]] = ("fake_score",)

    def __init__(self, config: TSCDConfig) -> None:
        super().__init__(config)
        self._one_step = DMD2(
            DMD2Config(
                guidance_scale=config.score_guidance_scale, fake_score_learning_rate=config.fake_score_learning_rate
            )
        )

    @property
    def windows(self) -> int:
        return self.config.num_segments

    def groups(self) -> dict[str, Group]:
        groups = super().groups()
        if not self.config.score_weight:
            return groups
        return groups | {"fake_score": Group(self.config.fake_score_learning_rate)}

    def updates(self, step: int) -> Iterable[Update]:
        yield from super().updates(step)
        if self.config.score_weight:
            yield Update("fake_score", self._one_step.critic_loss, ("fake_score",))

    def sampler(self) -> SamplerSpec:
        return jump_sampler(self.config.steps, self.config.eta)

    def end(self, number: Tensor, points: Tensor, ctx: Context) -> Tensor:
        edge = phase_edge(number, points, self.config.num_segments)
        return draw_end(edge, points[number], ctx.random.uniform("end"))

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        terms = dict(super().student_loss(batch, ctx))
        terms["consistency"] = self.config.consistency_weight * terms["consistency"]
        if self.config.score_weight:
            terms |= weighted(self._one_step.student_loss(batch, ctx), self.config.score_weight)
        return terms
