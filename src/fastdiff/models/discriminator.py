"""Discriminator heads on a denoiser's features."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_LEAST_WIDTH = 64  # features of few channels, as a closed-form teacher's are, still need room to be combined


class FeatureHead(nn.Module):
    """A logit from one activation `(B, C, H, W)` -> `(B,)`: strided convolutions, then the mean over what is left.

    Small maps are not strided below one cell, so the same head serves 2x2 and 16x16 middle blocks. It has the role of
    DMD2's classifier (Yin et al. 2024, arXiv 2405.14867), whose released layers are wider and strided otherwise.
    """

    def __init__(self, channels: int, width: int = 256, groups: int = 32) -> None:
        super().__init__()
        width = min(width, max(channels, _LEAST_WIDTH))
        groups = math.gcd(min(groups, width // 4 or 1), width)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).mean(dim=(1, 2, 3))


class FeatureHeads(nn.ModuleList):
    """One `FeatureHead` for each tapped activation: activations `(B, C_k, H_k, W_k)`, k = 1..K -> logits `(B, K)`.

    Heads compute in the precision of their own weights.
    """

    def __init__(self, channels: Iterable[int]) -> None:
        super().__init__(FeatureHead(count) for count in channels)

    def forward(self, *features: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return torch.stack([head(one.to(dtype)) for head, one in zip(self, features, strict=True)], dim=1)
