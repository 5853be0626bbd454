"""Losses beside their published formulas, written with plain tensors, stock schedulers and bare networks.

The public trainers themselves are run beside ours by `eval/peers/compare.py`; these hold without their sources.
"""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from method_helpers import SD, SD_BETAS, context

from fastdiff.methods import DMD2, LCM, Batch, DMD2Config, LCMConfig
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.families import StableDiffusion
from fastdiff.models.roles import FullSpec, Roles

ROWS, SHAPE = 4, (4, 16, 16)
RELATIVE = 1e-4


def _disturbed(network, seed):
    other, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean())
    return other.requires_grad_(False)


@pytest.fixture
def setting(tiny_sd):
    """A denoiser over a teacher and two networks near it, a batch, and draws."""
    full = {role: _disturbed(tiny_sd.unet, seed) for seed, role in enumerate(("student", "fake_score"))}
    denoiser = Denoiser(
        Roles(tiny_sd.unet, {role: FullSpec(one) for role, one in full.items()}), StableDiffusion(), SD, "epsilon"
    )
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(ROWS + 1, 16, 16, generator=generator)
    cond, null = (Conditioning({"prompt_embeds": rows}) for rows in (embeds[:-1], embeds[-1:]))
    latents, *noises = torch.randn(4, ROWS, *SHAPE, generator=generator)
    return denoiser, Batch(torch.arange(ROWS), cond, null, SHAPE, latents), noises


def _call(network, x, t, embeds):
    with torch.no_grad():
        return network(x, t, encoder_hidden_states=embeds.expand(len(x), -1, -1)).sample


def _x0(x, eps, kept):
    return (x - (1 - kept).sqrt() * eps) / kept.sqrt()


def _kept(index):
    """Stock cumulative products at indices, `(B, 1, 1, 1)`."""
    return DDIMScheduler(**SD_BETAS).alphas_cumprod[index][:, None, None, None]


@pytest.mark.parametrize("loss_type", ["huber", "l2"])
def test_lcm_is_algorithm_1_with_skipping_steps_and_guided_ddim(setting, loss_type):
    """arXiv 2310.04378, algorithm 1 and eq. 13-17, k = 20, Imagen's w = 8; boundary weights of stock LCMScheduler."""
    denoiser, batch, (eps, *_) = setting
    pair, w = torch.tensor([0, 7, 23, 49]), 8.0
    config = LCMConfig(guidance_scale=w, target_decay=0.0, loss_type=loss_type)
    ours = LCM(config).student_loss(batch, context(denoiser, ROWS, {"pair": pair, "eps": eps}))["consistency"]

    start = 20 * (pair + 1) - 1
    end = (start - 20).clamp_min(0)
    embeds, null = batch.cond.tensors["prompt_embeds"], batch.null.tensors["prompt_embeds"]
    teacher, student = denoiser.roles.base, denoiser.roles.network("student")
    x = DDIMScheduler(**SD_BETAS).add_noise(batch.latents, eps, start)
    cond, uncond = _call(teacher, x, start, embeds), _call(teacher, x, start, null)
    guided = uncond + w * (cond - uncond)
    solved = _kept(end).sqrt() * _x0(x, guided, _kept(start)) + (1 - _kept(end)).sqrt() * guided

    def consistency(z, t):
        skip, out = LCMScheduler().get_scalings_for_boundary_condition_discrete(t[:, None, None, None])
        return skip * z + out * _x0(z, _call(student, z, t, embeds), _kept(t))

    gap = consistency(x, start) - consistency(solved, end)
    published = {"l2": gap.square().mean(), "huber": ((gap.square() + 1e-6).sqrt() - 1e-3).mean()}[loss_type]
    assert ours.item() == pytest.approx(published.item(), rel=RELATIVE) and published > 1e-3


def test_dmd2_is_the_normalised_gap_and_the_denoising_loss(setting):
    """arXiv 2405.14867 with the normaliser of arXiv 2311.18828, eq. 7-8, one step from t = 999, w = 1.75."""
    denoiser, batch, (noise, eps, critic_eps) = setting
    t, critic_t = torch.tensor([20, 333, 700, 980]), torch.tensor([0, 250, 666, 999])
    draws = {"student/0": noise, "student/t": t, "student/eps": eps, "critic/t": critic_t, "critic/eps": critic_eps}
    method, ctx = DMD2(DMD2Config(guidance_scale=1.75)), context(denoiser, ROWS, draws)
    ours = [sum(loss(batch, ctx).values()).item() for loss in (method.student_loss, method.critic_loss)]

    stock, roles = DDIMScheduler(**SD_BETAS), denoiser.roles
    embeds, null = batch.cond.tensors["prompt_embeds"], batch.null.tensors["prompt_embeds"]
    last = torch.full((ROWS,), 999)
    x = _x0(noise, _call(roles.network("student"), noise, last, embeds), _kept(last))
    x_t = stock.add_noise(x, eps, t)
    cond, uncond = _call(roles.base, x_t, t, embeds), _call(roles.base, x_t, t, null)
    real = _x0(x_t, uncond + 1.75 * (cond - uncond), _kept(t))
    fake = _x0(x_t, _call(roles.network("fake_score"), x_t, t, embeds), _kept(t))
    gradient = (fake - real) / (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    critic_x = stock.add_noise(x, critic_eps, critic_t)
    error = _call(roles.network("fake_score"), critic_x, critic_t, embeds) - critic_eps
    published = [0.5 * gradient.square().mean().item(), error.square().mean().item()]
    assert ours == pytest.approx(published, rel=RELATIVE) and min(published) > 1e-5
