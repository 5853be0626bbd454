"""The losses APEX prints (arXiv 2604.12322); why they are not the default is said in `apex.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.diffusion.losses import mse
from fastdiff.diffusion.schedules import LAST_INDEX
from fastdiff.methods._flow_map import noise_share, time_of_share
from fastdiff.methods.base import Batch, Context, time_at
from fastdiff.models.conditioning import Conditioning


def paper_losses(batch: Batch, ctx: Context, scale: float, bias: float, mix: float) -> dict[str, Tensor]:
    """Denoising of one-step samples under the shifted condition, and the mixed regression."""
    schedule = ctx.denoiser.schedule
    x0, eps = batch.images(), ctx.random.normal("eps", batch.latent_shape)
    last = time_at(LAST_INDEX, x0, schedule)
    t = time_of_share(schedule, noise_share(schedule, last) * ctx.random.uniform("t")).clamp_min(schedule.t_min)
    x_t, elsewhere = schedule.add_noise(x0, eps, t), shifted(batch.cond, scale, bias)
    student = ctx.denoiser(x_t, t, batch.cond, "student")
    with torch.no_grad():
        fake = ctx.denoiser(x_t, t, elsewhere, "student").flow
    noise = ctx.random.normal("fake/eps", batch.latent_shape)
    sample = student.x0  # its gradient is part of the method
    seen = ctx.denoiser(schedule.add_noise(sample, noise, t), t, elsewhere, "student").flow
    square = (student.flow - (1 - mix) * (eps - x0) - mix * fake).square().flatten(1).mean(1)
    share = noise_share(schedule, t)
    return {"fake": mse(seen, noise - sample), "mixed": (share * (1 - share) * square).mean()}


def shifted(cond: Conditioning, scale: float, bias: float) -> Conditioning:
    """scale * embedding + bias for every embedding of the prompt.

    Raises:
        ValueError: if the conditioning has no embeddings, e.g. class labels.
    """
    names = [name for name in cond.tensors if name.endswith("embeds")]
    if not names:
        raise ValueError(
            f"apex's losses 'paper' shift prompt embeddings, and this teacher is conditioned on {list(cond.tensors)}: "
            "take losses code"
        )
    return Conditioning({k: scale * v + bias if k in names else v for k, v in cond.tensors.items()})
