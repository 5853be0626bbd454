"""Latent consistency distillation, full and as LoRA (Luo et al. 2023, arXiv 2310.04378 and 2311.05556)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.methods._trajectory import Trajectory, TrajectoryConfig
from fastdiff.methods.base import Context, MethodInfo
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.embeddings import guidance_embedding, with_guidance_input
from fastdiff.models.sampler import SamplerSpec, consistency, has_boundary_weights


@dataclass(frozen=True)
class LCMConfig(TrajectoryConfig):
    """Defaults are those of the public SD1.5 recipe; the LoRA recipe fixes the guidance.

    Args:
        guidance_range: draw w per sample from this range and feed it to the student as an embedding
            (full students only; `w_min`, `w_max` of the public scripts are w - 1). None fixes `guidance_scale`.
        num_ddim_timesteps: points of the solver's grid; the sampler must use the same.
        timestep_scaling_factor: boundary scaling of c_skip, c_out; LCMScheduler must use the same.
    """

    guidance_range: tuple[float, float] | None = None
    timestep_scaling_factor: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_range is not None and self.guidance_range[0] > self.guidance_range[1]:
            raise ValueError(f"guidance_range must be (low, high), got {self.guidance_range}")


class LCM(Trajectory):
    r"""Makes the student's clean prediction constant along the teacher's guided trajectory.

    On the grid t_n = 1000 n / N - 1 with t_0 = 0 (index 0, not the clean end), x_{t_n} noised data,

        f(x, t) = c_skip(t) x + c_out(t) D(x, t),   c_skip = s^2 / (tau^2 + s^2), c_out = tau / sqrt(tau^2 + s^2),
        x_{t_{n-1}} = DDIM step of the guided teacher,   L = huber(f(x_{t_n}, t_n), sg f^-(x_{t_{n-1}}, t_{n-1})),

    with tau = timestep_scaling_factor * t and s = 0.5. Everything but the first f is detached. On a flow, where every
    map is x at t = 0 by itself, c_skip = 0, c_out = 1 and t_0 is the clean end, as in diffusers' FlowMatchLCMScheduler.
    """

    info = MethodInfo(
        name="lcm",
        title="Latent consistency distillation (LCM, LCM-LoRA)",
        family="trajectory",
        paper="Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
        arxiv="2310.04378",
        needs=("images",),
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = LCMConfig
    config: LCMConfig

    def student_network(self, network: nn.Module) -> nn.Module | None:
        return None if self.config.guidance_range is None else with_guidance_input(network)

    def sampling_inputs(self, denoiser: Denoiser, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        if self.config.guidance_range is None:
            return {}
        return _embedded(torch.full((batch_size,), self.sampling_guidance, device=device), denoiser)

    def sampler(self) -> SamplerSpec:
        config = self.config
        spec = SamplerSpec.lcm_grid(
            config.num_inference_steps, config.num_ddim_timesteps, timestep_scaling=config.timestep_scaling_factor
        )
        return replace(spec, guidance_scale=self.sampling_guidance)

    @property
    def sampling_guidance(self) -> float:
        """What a pipeline is called with: 0 where guidance is baked in, the middle of the range where it is an input."""
        return 0.0 if self.config.guidance_range is None else sum(self.config.guidance_range) / 2

    def points(self, schedule: NoiseSchedule, device: torch.device) -> Tensor:
        """The published grid ends at index 0, where the boundary weights are exactly (1, 0)."""
        points = super().points(schedule, device)
        return points.clamp_min(0) if has_boundary_weights(schedule) else points

    def reach(self, prediction: Prediction, s: Tensor) -> Tensor:
        """The consistency function."""
        return consistency(prediction, self.config.timestep_scaling_factor)

    def guidance(self, ctx: Context) -> float | Tensor:
        if self.config.guidance_range is None:
            return self.config.guidance_scale
        low, high = self.config.guidance_range
        return low + (high - low) * ctx.random.uniform("guidance")

    def inputs(self, w: float | Tensor, s: Tensor, denoiser: Denoiser) -> dict[str, Tensor]:
        return {} if self.config.guidance_range is None else _embedded(w, denoiser)


def _embedded(w: Tensor, denoiser: Denoiser) -> dict[str, Tensor]:
    features = denoiser.roles.network("student").config.time_cond_proj_dim
    return {"timestep_cond": guidance_embedding(w - 1, features)}
