"""How a student makes a clean sample inside training; the gradient starts at the last network call."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastdiff.methods.base import Batch, Context, time_at

MultiStepInput = Literal["simulate", "noised_data"]


def drawn_step(ctx: Context, timesteps: tuple[int, ...], site: str = "student") -> int:
    """Which entry of `timesteps` the sample of this step comes from; the same for all samples and processes."""
    return ctx.random.shared_integer(f"{site}/step", 0, len(timesteps)) if len(timesteps) > 1 else 0


def student_sample(
    batch: Batch,
    ctx: Context,
    timesteps: tuple[int, ...],
    multi_step_input: MultiStepInput = "simulate",
    site: str = "student",
    with_grad: bool = True,
    noise: Tensor | None = None,
) -> Tensor:
    """The student's clean sample `(B, C, H, W)` in float32.

    One step: x0 of the student at `timesteps[0]` from plain noise. Several steps: a step k is drawn, the same for all
    samples and processes, and only that call keeps its graph; the calls before it run without gradient and are
    re-noised with fresh noise, as at inference (backward simulation, DMD2, Yin et al. 2024, arXiv 2405.14867, sec.
    4.5). `noised_data` noises clean data to the drawn time instead. The rollout stops at the drawn step. `noise` is
    what the student starts from if not a draw.
    """
    step = drawn_step(ctx, timesteps, site)
    schedule = ctx.denoiser.schedule
    shape = batch.latent_shape
    x_t = ctx.random.normal(f"{site}/0", shape) if noise is None else noise
    if step > 0 and multi_step_input == "noised_data":
        x_t = schedule.add_noise(
            batch.images(), ctx.random.normal(f"{site}/{step}", shape), time_at(timesteps[step], x_t, schedule)
        )
    elif step > 0:
        for position in range(step):
            with torch.no_grad():
                x0 = ctx.denoiser(x_t, time_at(timesteps[position], x_t, schedule), batch.cond, "student").x0
            eps = ctx.random.normal(f"{site}/{position + 1}", shape)
            x_t = schedule.add_noise(x0, eps, time_at(timesteps[position + 1], x_t, schedule))
    with torch.set_grad_enabled(with_grad):
        return ctx.denoiser(x_t, time_at(timesteps[step], x_t, schedule), batch.cond, "student").x0
