"""Latent consistency distillation, full and as LoRA (Luo et al. 2023, arXiv 2310.04378 and 2311.05556)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.methods._guidance import GuidanceInput, check_range
from fastdiff.methods._trajectory import Trajectory, TrajectoryConfig
from fastdiff.methods.base import MethodInfo, check_positive
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.sampler import SamplerSpec, consistency, has_boundary_weights


@dataclass(frozen=True)
class LCMConfig(TrajectoryConfig):
    """Defaults are those of the public SD1.5 recipe, but for the guidance, which it draws from 6 to 16 and feeds in
    (`guidance_range`). The public LoRA script draws it too, but does not tell the student, which learns an average;
    the LoRA paper fixes 7.5 of its own count, 8.5 here. The default is a fixed number, and ours.

    Args:
        guidance_range: draw w per sample from this range and feed it to the student as an embedding
            (full students of UNets, whose pipelines embed it; `w_min`, `w_max` of the public scripts are w - 1). None
            fixes `guidance_scale`.
        num_ddim_timesteps: points of the solver's grid; the sampler must use the same.
        num_inference_steps: steps the student is meant to be run with.
        timestep_scaling_factor: boundary scaling of c_skip, c_out; LCMScheduler must use the same.
    """

    guidance_range: tuple[float, float] | None = None
    num_inference_steps: int = 4
    timestep_scaling_factor: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self)
        check_positive(
            num_inference_steps=self.num_inference_steps, timestep_scaling_factor=self.timestep_scaling_factor
        )


class LCM(GuidanceInput, Trajectory):
    r"""Makes the student's clean prediction constant along the teacher's guided trajectory.

    On the grid t_n = 1000 n / N - 1 with t_0 = 0 (index 0, not the clean end), x_{t_n} noised data,

        f(x, t) = c_skip(t) x + c_out(t) D(x, t),   c_skip = s^2 / (tau^2 + s^2), c_out = tau / sqrt(tau^2 + s^2),
        x_{t_{n-1}} = DDIM step of the guided teacher,   L = huber(f(x_{t_n}, t_n), sg f^-(x_{t_{n-1}}, t_{n-1})),

    with tau = timestep_scaling_factor * t and s = 0.5. Everything but the first f is detached. On a flow, where every
    map is x at t = 0 by itself, c_skip = 0, c_out = 1 and t_0 is the clean end, as FlowMatchLCMScheduler has it.
    """

    info = MethodInfo(
        name="lcm",
        title="Latent consistency distillation (LCM, LCM-LoRA)",
        family="trajectory",
        paper="Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
        arxiv="2310.04378",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = LCMConfig
    config: LCMConfig

    def sampler(self) -> SamplerSpec:
        config = self.config
        spec = SamplerSpec.lcm_grid(
            config.num_inference_steps, config.num_ddim_timesteps, timestep_scaling=config.timestep_scaling_factor
        )
        return replace(spec, guidance_scale=self.sampling_guidance)

    def points(self, schedule: NoiseSchedule, device: torch.device) -> Tensor:
        """The published grid ends at index 0, where the boundary weights are exactly (1, 0)."""
        points = super().points(schedule, device)
        return points.clamp_min(0) if has_boundary_weights(schedule) else points

    def reach(self, prediction: Prediction, s: Tensor) -> Tensor:
        """The consistency function."""
        return consistency(prediction, self.config.timestep_scaling_factor)

    def inputs(self, w: float | Tensor, s: Tensor, denoiser: Denoiser) -> dict[str, Tensor]:
        return self.told(w)
