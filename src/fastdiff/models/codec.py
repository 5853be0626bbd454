"""Images to latents and back, with the scaling every diffusers autoencoder carries in its config."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdiff.diffusion.tensors import DeviceTable


class Codec:
    """An autoencoder seen as two functions; works with AutoencoderKL, AutoencoderDC and AutoencoderTiny alike.

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
        return self._scaled(self._encoded(images.to(weight), noise).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images in [-1, 1], clamped; differentiable, also where a pixel is clamped."""
        weight = next(self.autoencoder.parameters())
        return _Clamped.apply(self._decoded(self._unscaled(latents).to(weight)).float())

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - self.shift) * self.scale

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.scale + self.shift

    def _decoded(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents, return_dict=False)[0]

    def _encoded(self, images: Tensor, noise: Tensor | None) -> Tensor:
        encoded = self.autoencoder.encode(images)
        if "latent_dist" not in encoded:
            return encoded[0]
        posterior = encoded.latent_dist
        return posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.std)


class _Clamped(torch.autograd.Function):
    """[-1, 1] forward, the identity backward: a loss can call back a pixel that has left the range."""

    @staticmethod
    def forward(ctx, images):
        return images.clamp(-1, 1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class FrameCodec(Codec):
    """A video autoencoder (AutoencoderKLQwenImage) on single frames; each latent channel has a mean and a deviation.

    Latents are in the scale the denoiser sees: `(z - mean) / std`.
    """

    def __init__(self, autoencoder: nn.Module) -> None:
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        config = autoencoder.config
        self.channels = config.z_dim
        self.mean, self.std = (
            DeviceTable(torch.tensor(values).view(-1, 1, 1)) for values in (config.latents_mean, config.latents_std)
        )

    @property
    def factor(self) -> int:
        return 2 ** len(self.autoencoder.config.temperal_downsample)

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - self.mean.like(latents)) / self.std.like(latents)

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents * self.std.like(latents) + self.mean.like(latents)

    def _encoded(self, images: Tensor, noise: Tensor | None) -> Tensor:
        noise = None if noise is None else noise.unsqueeze(2)
        return super()._encoded(images.unsqueeze(2), noise).squeeze(2)

    def _decoded(self, latents: Tensor) -> Tensor:
        return super()._decoded(latents.unsqueeze(2)).squeeze(2)
