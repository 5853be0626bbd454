"""Extra network inputs that start without effect."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Sinusoidal features `(B, dim)` of guidance `w` (LCM's w, which is guidance_scale - 1), as stock pipelines embed it.

    Source: Meng et al. 2023, arXiv 2210.03142; `get_guidance_scale_embedding` of diffusers' pipelines.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * w[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def with_guidance_input(network: nn.Module, dim: int = 256) -> nn.Module:
    """A copy of a UNet that takes a guidance embedding through a zero-initialised layer: equal outputs at step 0.

    Raises:
        ValueError: if the network is not a UNet2DConditionModel.
    """
    from diffusers import UNet2DConditionModel

    if not isinstance(network, UNet2DConditionModel):
        raise ValueError(
            f"guidance embedding needs a UNet2DConditionModel, got {type(network).__name__}. Fix guidance_scale."
        )
    copy = UNet2DConditionModel.from_config(network.config, time_cond_proj_dim=dim)
    missing, unexpected = copy.load_state_dict(network.state_dict(), strict=False)
    if list(missing) != ["time_embedding.cond_proj.weight"] or unexpected:
        raise ValueError(f"weights do not fit the widened network: missing {missing}, unexpected {unexpected}")
    nn.init.zeros_(copy.time_embedding.cond_proj.weight)
    return copy
