"""The autoencoder seen as two functions."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.models.codec import Codec


def tiny_autoencoder(**config):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=8,
        **config,
    )


def images():
    return 2 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1


def test_kl_latents_are_scaled_as_the_denoiser_sees_them(tiny_sd):
    vae = tiny_sd.vae
    vae.register_to_config(scaling_factor=0.3, shift_factor=0.7)
    codec = Codec(vae)
    with torch.no_grad():
        posterior = vae.encode(images()).latent_dist
        raw = posterior.mean
    latents = codec.encode(images())
    assert (codec.factor, codec.channels, latents.shape) == (2, 4, (2, 4, 16, 16))
    torch.testing.assert_close(latents, (raw - 0.7) * 0.3)
    noise = torch.ones_like(raw)
    torch.testing.assert_close(codec.encode(images(), noise), (raw + posterior.std - 0.7) * 0.3)
    with torch.no_grad():
        torch.testing.assert_close(codec.decode(latents), vae.decode(raw).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_tiny_autoencoder_round_trip(scale):
    vae = tiny_autoencoder(scaling_factor=scale)
    codec = Codec(vae)
    with torch.no_grad():
        raw = vae.encode(images()).latents
        expected = vae.decode(raw).sample.clamp(-1, 1)
    latents = codec.encode(images(), torch.randn(2, 8, 8, 8))  # there is no posterior to sample
    assert (codec.factor, codec.channels, latents.shape) == (4, 8, (2, 8, 8, 8))
    torch.testing.assert_close(latents, raw * scale)
    torch.testing.assert_close(codec.decode(latents), expected, rtol=1e-4, atol=1e-5)


def test_decoding_is_differentiable_and_frozen():
    codec = Codec(tiny_autoencoder())
    latents = (0.1 * torch.randn(1, 8, 8, 8)).requires_grad_(True)
    codec.decode(latents).sum().backward()
    assert latents.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in codec.autoencoder.parameters())


def test_a_pixel_out_of_range_is_clamped_and_gets_its_gradient(monkeypatch):
    codec, raw = Codec(tiny_autoencoder()), torch.tensor([-7.3, -1.0, -0.1, 0.3, 1.0, 2.9, math.inf]).requires_grad_()
    monkeypatch.setattr(codec, "_decoded", lambda latents: latents)
    pixels = codec.decode(raw)
    assert torch.equal(pixels, raw.detach().clamp(-1, 1))
    slope = torch.arange(1.0, 8)
    assert torch.equal(torch.autograd.grad(pixels @ slope, raw)[0], slope)


def test_half_precision_autoencoders_give_float32(tiny_sd):
    codec = Codec(tiny_sd.vae.to(torch.bfloat16))
    assert codec.encode(images()).dtype == torch.float32
    assert codec.decode(torch.zeros(1, 4, 16, 16)).dtype == torch.float32
