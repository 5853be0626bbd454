"""The adversarial block: what heads read, at which noise, and the losses of both players."""

from __future__ import annotations

import math

import pytest
import torch
from method_helpers import SD, batch_of, context, denoiser_of, f64
from torch import nn
from torch.nn.functional import relu, softplus

from fastdiff.diffusion import FlowSchedule, Gaussian
from fastdiff.methods._adversarial import Adversary, NoiseLaw, Noisy
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.discriminator import FeatureHeads
from fastdiff.models.families import StableDiffusion, StableDiffusionXL
from fastdiff.models.roles import AdapterSpec, Roles


def exact(schedule=SD, dim=2):
    law = Gaussian(f64([0.3] * dim), 0.5 * torch.eye(dim).double())
    return denoiser_of(ExactNetwork(law, schedule, "epsilon"), schedule, student=nn.Linear(1, 1))


class Given(nn.Module):
    """Two heads: a linear one and a quadratic one, of the noisy sample."""

    def forward(self, noisy, clean):
        x = noisy.flatten(1)
        return torch.stack([x @ f64([1.0, -2.0]), x.square().sum(1)], 1)


def block(**settings):
    one = Adversary(**settings)
    denoiser = exact()
    batch = batch_of(5, 2, torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(0)).double())
    return one, denoiser, batch, context(denoiser, 5, modules={"discriminator": Given()})


# What is read


def test_unets_have_a_tap_on_each_level(tiny_sd, tiny_sdxl):
    for pipeline, family in ((tiny_sd, StableDiffusion()), (tiny_sdxl, StableDiffusionXL())):
        denoiser = Denoiser(Roles(pipeline.unet, {}), family, SD, "epsilon")
        taps = {blocks: Adversary(blocks=blocks).taps(denoiser) for blocks in ("middle", "encoder", "all")}
        encoder = {"down_blocks.0": 16, "down_blocks.1": 32, "mid_block": 32}
        assert taps == {
            "middle": {"mid_block": 32},
            "encoder": encoder,
            "all": encoder | {"up_blocks.0": 32, "up_blocks.1": 16},
        }


def test_each_tap_has_its_head(tiny_sd):
    spec = AdapterSpec(4, 4.0, ("to_q", "conv1"))
    denoiser = Denoiser(Roles(tiny_sd.unet, {"fake_score": spec}), StableDiffusion(), SD, "epsilon")
    one = Adversary("fake_score")
    modules = one.modules(denoiser)
    assert isinstance(modules["discriminator"], FeatureHeads) and len(modules["discriminator"]) == 5
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, 16, 16, generator=generator).requires_grad_()
    from fastdiff.models.conditioning import Conditioning

    cond = Conditioning({"prompt_embeds": torch.randn(2, 16, 16, generator=generator)})
    noisy = Noisy(x_t, torch.tensor([100.0, 700.0]))
    logits = one.logits(noisy, cond, context(denoiser, 2, modules=modules))
    assert logits.shape == (2, 5) and logits.dtype == torch.float32
    for column in logits.T:
        (gradient,) = torch.autograd.grad(column[0], x_t, retain_graph=True)
        assert gradient[0].abs().max() > 0 and gradient[1].abs().max() == 0  # no sample sees another
    features = denoiser.features(*noisy, cond, "fake_score", tuple(one.taps(denoiser)))
    for head, one_feature, column in zip(modules["discriminator"], features, logits.T, strict=True):
        torch.testing.assert_close(head(one_feature), column)


# Noise


@pytest.mark.parametrize("schedule", [SD, FlowSchedule()])
def test_the_noise_law_means_the_same_on_every_schedule(schedule):
    """sigmoid(mean + std n) of a rectified flow; elsewhere the time of the same noise-to-signal ratio."""
    denoiser, n = exact(schedule), torch.tensor([-2.0, -0.5, 0.0, 0.7])
    ctx = context(denoiser, 4, {"here/t": n})
    t = Adversary(times=NoiseLaw(1.0, 0.8)).time(ctx, "here")
    kappa = (1.0 + 0.8 * n).exp()
    below = schedule.kappa(t - (1 if schedule is SD else 1e-3))
    assert bool((below < kappa).all()) and bool((kappa <= schedule.kappa(t) * (1 + 1e-5)).all())
    if schedule is not SD:
        torch.testing.assert_close(t, torch.sigmoid(1.0 + 0.8 * n), rtol=0, atol=1e-3)


def test_noise_laws_are_cut_at_the_ends_of_a_schedule():
    ctx = context(exact(), 2, {"here/t": torch.tensor([-50.0, 50.0])})
    assert Adversary(times=NoiseLaw()).time(ctx, "here").tolist() == [0.0, 999.0]
    plain = Adversary().time(context(exact(), 5000), "here")
    assert plain.min() < 3 and plain.max() > 996 and torch.equal(plain, plain.round())


def test_noising_from_a_noisy_sample_keeps_the_marginals():
    s, t = torch.full((2,), 300.0), torch.full((2,), 700.0)
    x_s, eps = f64([[1.0], [0.0]])[:, :, None, None], torch.tensor([[0.0], [1.0]])[:, :, None, None]
    ctx = context(exact(dim=1), 2, {"here/eps": eps})
    x_t, at = Adversary().noised(x_s, ctx, "here", t, start=s)
    assert torch.equal(at, t)
    mean, std = x_t.flatten()  # x_t = mean x_s + std eps
    alpha, sigma = SD.alpha(f64([300, 700])), SD.sigma(f64([300, 700]))
    assert (mean * alpha[0]).item() == pytest.approx(alpha[1].item(), rel=1e-12)
    assert (mean**2 * sigma[0] ** 2 + std**2).item() == pytest.approx((sigma[1] ** 2).item(), rel=1e-12)


# Losses


@pytest.mark.parametrize("loss", ["softplus", "hinge", "margin"])
def test_losses_are_means_over_samples_and_heads(loss):
    one, _denoiser, batch, ctx = block(loss=loss)
    x = torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(1)).double()
    fake, real = (one.noised(data, ctx, site) for data, site in ((x, "f"), (batch.latents, "r")))
    heads = Given()
    on_fake, on_real = heads(fake.x_t, None), heads(real.x_t, None)
    student = {"softplus": softplus(-on_fake), "hinge": -on_fake, "margin": relu(1 - on_fake)}[loss].mean()
    fooled = softplus(on_fake).mean() + softplus(-on_real).mean()
    margins = relu(1 + on_fake).mean() + relu(1 - on_real).mean()
    torch.testing.assert_close(one.student_term(x, batch.cond, ctx, "f"), student)
    terms = one.discriminator_terms(real, fake, batch.cond, ctx)
    assert set(terms) == {"discriminator"}
    torch.testing.assert_close(terms["discriminator"], fooled if loss == "softplus" else margins)


def test_r1_moves_the_noised_input_at_its_own_time():
    one, denoiser, batch, ctx = block(r1_weight=3.0, r1_std=0.1)
    seen = []
    denoiser.roles.base.register_forward_pre_hook(lambda _module, args: seen.append(args[:2]))
    real = one.noised(batch.latents, ctx, "r")
    fake = one.noised(batch.latents, ctx, "f")
    terms = one.discriminator_terms(real, fake, batch.cond, ctx, "gan")
    (x, time), noise = seen[0], ctx.random.normal("gan/r1", (2, 1, 1)).double()
    torch.testing.assert_close(x, torch.cat([fake.x_t, real.x_t, real.x_t + 0.1 * noise]))
    assert torch.equal(time, torch.cat([fake.t, real.t, real.t]))
    heads = Given()
    change = heads(real.x_t + 0.1 * noise, None) - heads(real.x_t, None)
    torch.testing.assert_close(terms["r1"], 3 * change.square().mean())


def test_one_call_beside_a_prediction_equals_two():
    one, denoiser, batch, ctx = block(r1_weight=1.0)
    noisy, real, fake = (one.noised(batch.latents, ctx, site) for site in "nrf")
    before = denoiser.calls
    prediction, together = one.terms_beside(noisy, real, fake, batch.cond, ctx)
    assert denoiser.calls - before == 4 * len(batch)
    apart = one.discriminator_terms(real, fake, batch.cond, ctx)
    for name in ("discriminator", "r1"):
        torch.testing.assert_close(together[name], apart[name], rtol=1e-12, atol=0)
    alone = denoiser(*noisy, batch.cond, "teacher")
    torch.testing.assert_close(prediction.x0, alone.x0, rtol=1e-12, atol=1e-14)


def test_heads_on_a_frozen_teacher_keep_no_graph_of_it():
    one, _denoiser, batch, ctx = block()
    x = batch.latents.clone().requires_grad_()
    noisy = one.noised(x, ctx, "f")
    assert not one.discriminator_terms(noisy, noisy, batch.cond, ctx)["discriminator"].requires_grad
    (gradient,) = torch.autograd.grad(one.student_term(x, batch.cond, ctx, "f"), x)
    assert gradient.abs().max() > 0 and math.isfinite(gradient.sum().item())
