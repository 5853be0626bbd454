"""Latent consistency distillation, full and as LoRA (Luo et al. 2023, arXiv 2310.04378 and 2311.05556)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fastdiff.diffusion.grids import lcm_grid
from fastdiff.diffusion.losses import mse, pseudo_huber
from fastdiff.diffusion.steps import jump
from fastdiff.diffusion.tensors import DeviceTable
from fastdiff.methods.base import (
    Batch,
    Context,
    Group,
    Method,
    MethodInfo,
    TargetNetwork,
    Update,
    check_not_negative,
    check_positive,
)
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.embeddings import guidance_embedding, with_guidance_input
from fastdiff.models.sampler import SamplerSpec, consistency


@dataclass(frozen=True)
class LCMConfig:
    """Defaults are those of the public SD1.5 recipe; the LoRA recipe fixes the guidance.

    Args:
        guidance_scale: w of the teacher's solver step, 1 means none; the student bakes it in.
        guidance_range: draw w per sample from this range and feed it to the student as an embedding
            (full students only; `w_min`, `w_max` of the public scripts are w - 1). None fixes `guidance_scale`.
        num_ddim_timesteps: points of the solver's grid; the sampler must use the same.
        num_inference_steps: steps the student is meant to be run with.
        loss_type: `huber` with `huber_c`, or `l2`.
        huber_c: width of the quadratic part.
        target_decay: decay of the exponential-average target of full students; 0 takes the live student. LoRA
            students always take the live student.
        timestep_scaling_factor: boundary scaling of c_skip, c_out; LCMScheduler must use the same.
    """

    guidance_scale: float = 8.0
    guidance_range: tuple[float, float] | None = None
    num_ddim_timesteps: int = 50
    num_inference_steps: int = 4
    loss_type: Literal["huber", "l2"] = "huber"
    huber_c: float = 1e-3
    target_decay: float = 0.95
    timestep_scaling_factor: float = 10.0

    def __post_init__(self) -> None:
        check_not_negative(guidance_scale=self.guidance_scale, target_decay=self.target_decay)
        check_positive(num_ddim_timesteps=self.num_ddim_timesteps, huber_c=self.huber_c)
        check_positive(num_inference_steps=self.num_inference_steps)
        if self.guidance_range is not None and self.guidance_range[0] > self.guidance_range[1]:
            raise ValueError(f"guidance_range must be (low, high), got {self.guidance_range}")
        if not self.target_decay < 1:
            raise ValueError(f"target_decay must be in [0, 1), got {self.target_decay}")


class LCM(Method):
    r"""Makes the student's clean prediction constant along the teacher's guided trajectory.

    On the grid t_n = 1000 n / N - 1 with t_0 = 0 (index 0, not the clean end), x_{t_n} noised data,

        f(x, t) = c_skip(t) x + c_out(t) D(x, t),   c_skip = s^2 / (tau^2 + s^2), c_out = tau / sqrt(tau^2 + s^2),
        x_{t_{n-1}} = DDIM step of the guided teacher,   L = huber(f(x_{t_n}, t_n), sg f^-(x_{t_{n-1}}, t_{n-1})),

    with tau = timestep_scaling_factor * t and s = 0.5. Everything but the first f is detached.
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

    def __init__(self, config: LCMConfig) -> None:
        super().__init__(config)
        self._grid = DeviceTable(torch.tensor(lcm_grid(config.num_ddim_timesteps), device="cpu"))

    def groups(self) -> dict[str, Group]:
        return {"student": Group()}

    def student_network(self, network: nn.Module) -> nn.Module | None:
        return None if self.config.guidance_range is None else with_guidance_input(network)

    def sampling_inputs(self, denoiser: Denoiser, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        if self.config.guidance_range is None:
            return {}
        return self._embedded(torch.full((batch_size,), self.sampling_guidance, device=device), denoiser)

    def targets(self) -> tuple[TargetNetwork, ...]:
        if self.config.target_decay == 0:
            return ()
        return (TargetNetwork("target", "student", self.config.target_decay),)

    def updates(self, step: int) -> Iterable[Update]:
        yield Update("student", self.student_loss, ("student",))

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

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """One consistency pair a sample."""
        x0 = batch.images()
        scaling = self.config.timestep_scaling_factor
        pairs = self._grid.on(x0.device)
        t, s = pairs[ctx.random.integers("pair", 0, len(pairs))].float().unbind(1)
        w = self._guidance(ctx)
        inputs = self._embedded(w, ctx.denoiser)
        x_t = ctx.denoiser.schedule.add_noise(x0, ctx.random.normal("eps", batch.latent_shape), t)
        student = consistency(ctx.denoiser(x_t, t, batch.cond, "student", **inputs), scaling)
        with torch.no_grad():
            x_s = jump(ctx.denoiser(x_t, t, batch.cond, "teacher", batch.null, w), s)
            role = "target" if "target" in ctx.denoiser.roles else "student"
            target = consistency(ctx.denoiser(x_s, s, batch.cond, role, **inputs), scaling)
        return {"consistency": self._distance(student, target)}

    def _distance(self, student: Tensor, target: Tensor) -> Tensor:
        if self.config.loss_type == "l2":
            return mse(student, target)
        return pseudo_huber(student, target, self.config.huber_c)

    def _guidance(self, ctx: Context) -> float | Tensor:
        if self.config.guidance_range is None:
            return self.config.guidance_scale
        low, high = self.config.guidance_range
        return low + (high - low) * ctx.random.uniform("guidance")

    def _embedded(self, w: float | Tensor, denoiser: Denoiser) -> dict[str, Tensor]:
        if self.config.guidance_range is None:
            return {}
        return {
            "timestep_cond": guidance_embedding(w - 1, denoiser.roles.network("student").config.time_cond_proj_dim)
        }
