"""Images to latents and back, with the scaling every diffusers autoencoder carries in its config."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Codec:
    """An autoencoder seen as two functions; works with AutoencoderKL and AutoencoderTiny alike.

    Latents are in the scale the denoiser sees: `(z - shift) * scaling_factor`.
    """

    def __init__(self, autoencoder: nn.Module) -> None:
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        config = autoencoder.config
        self.scale = config.get("scaling_factor") or 1.0
        self.shift = config.get("shift_factor") or 0.0
        self.channels = config.latent_channels

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side."""
        config = self.autoencoder.config
        blocks = config.get("encoder_block_out_channels") or config.block_out_channels
        return 2 ** (len(blocks) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] to latents; a KL posterior is sampled with `noise`, or its mean is taken."""
        weight = next(self.autoencoder.parameters())
        encoded = self.autoencoder.encode(images.to(weight))
        if "latents" in encoded:
            latents = encoded.latents
        else:
            posterior = encoded.latent_dist
            latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.std)
        return (latents.float() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images in [-1, 1], clamped; differentiable."""
        weight = next(self.autoencoder.parameters())
        images = self.autoencoder.decode((latents / self.scale + self.shift).to(weight), return_dict=False)[0]
        return images.float().clamp(-1, 1)
