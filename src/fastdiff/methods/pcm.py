"""Phased consistency model (Wang et al. 2024, arXiv 2405.18407)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastdiff.methods._adversarial import Adversary
from fastdiff.methods._adversarial_trajectory import AdversarialTrajectory, AdversarialTrajectoryConfig
from fastdiff.methods._prompts import without_prompts
from fastdiff.methods._trajectory_phases import check_phases, phase_edge
from fastdiff.methods.base import Batch, Context, MethodInfo
from fastdiff.models.sampler import SamplerSpec


@dataclass(frozen=True)
class PCMConfig(AdversarialTrajectoryConfig):
    """Defaults are the paper's for SD1.5, but for 40 solver steps instead of 50, so that phases end where stock DDIM
    lands, a fixed guidance where the paper draws it, the clean end where the official code ends at index 0, and heads
    that learn at every step, where the code's take turns with the student. Its loss without guidance of the teacher
    drops a tenth of the captions (`prompt_dropout`).

    Args:
        guidance_scale: w of the teacher's solver step (the paper's 4 to 5 is w - 1). With 1 and `prompt_dropout`
            the student takes guidance when it is sampled, as its teacher does.
        num_ddim_timesteps: points of the solver's grid, a divisor of 1000 that `num_phases` divides.
        num_phases: phases of the trajectory, and steps of the deterministic sampler.
        target_decay: decay of an averaged target; the paper's LoRAs take the live student.
        adversarial_weight: weight of the generator's term; the paper's is 0.1, 0 leaves the discriminator out.
        discriminator_learning_rate: learning rate of the heads.
        prompt_dropout: share of samples trained without a caption.
    """

    guidance_scale: float = 5.5
    num_ddim_timesteps: int = 40
    num_phases: int = 4
    target_decay: float = 0.0
    adversarial_weight: float = 0.1
    discriminator_learning_rate: float | None = 1e-5
    prompt_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_phases(self.num_phases, self.num_ddim_timesteps, "num_phases")
        if not 0 <= self.prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout must be in [0, 1], got {self.prompt_dropout}")


class PCM(AdversarialTrajectory):
    r"""A consistency function for each phase of the trajectory, ending at the phase's edge s_m, so that M
    deterministic steps cross it.

    f(x, t) = J(x -> s_m | x0(x, t), eps(x, t)) with the DDIM step J, which is x at t = s_m for any network;

        L = huber(f(x_{t_n}, t_n), sg f(x_{t_{n-1}}, t_{n-1})),   x_{t_{n-1}} = DDIM step of the guided teacher,

    both with the edge of t_n's phase. The adversarial term compares f with its target, both noised into the phase;
    the generator's form is relu(1 - logit) as in the official code. One phase is LCM without its boundary weights.
    The paper's one-step SDXL student divides by max(alpha, 0.5) in its clean prediction, (x - sigma eps) / alpha; stock
    schedulers divide by alpha, 0.068 at Stable Diffusion's last index, so that this is not offered.
    """

    info = MethodInfo(
        name="pcm",
        title="Phased consistency model (PCM)",
        family="trajectory",
        paper="Phased Consistency Models",
        arxiv="2405.18407",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-16",
    )
    Config = PCMConfig
    config: PCMConfig
    adversary: ClassVar[Adversary] = Adversary(loss="margin")

    @property
    def windows(self) -> int:
        return self.config.num_phases

    def end(self, number: Tensor, points: Tensor, ctx: Context) -> Tensor:
        return phase_edge(number, points, self.config.num_phases)

    def sampler(self) -> SamplerSpec:
        return SamplerSpec.trailing("ddim", self.config.num_phases)

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        return super().student_loss(self._some_without_caption(batch, ctx), ctx)

    def discriminator_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        return super().discriminator_loss(self._some_without_caption(batch, ctx), ctx)

    def _some_without_caption(self, batch: Batch, ctx: Context) -> Batch:
        if not self.config.prompt_dropout:
            return batch
        return without_prompts(batch, ctx.random.bernoulli("empty_prompt", self.config.prompt_dropout))
