"""Discriminator heads on a denoiser's features."""

from __future__ import annotations

from torch import Tensor, nn


class FeatureHead(nn.Module):
    """A logit from one activation `(B, C, H, W)` -> `(B,)`: strided convolutions, then the mean over what is left.

    Small maps are not strided below one cell, so the same head serves 2x2 and 16x16 middle blocks (the role of the
    classifier in DMD2, Yin et al. 2024, arXiv 2405.14867).
    """

    def __init__(self, channels: int, width: int = 256, groups: int = 32) -> None:
        super().__init__()
        width = min(width, channels)
        groups = min(groups, width // 4 or 1)
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
