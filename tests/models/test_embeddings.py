"""Slots for further scalar inputs: equal to the network at step 0, alive afterwards, through every family's call."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from tiny_transformers import BUILDERS, build
from torch import nn

from fastdiff.models.analytic import AnalyticFamily
from fastdiff.models.analytic_networks import AffinePerBin, PointNet, ResidualNet
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.embeddings import (
    guidance_embedding,
    time_features,
    with_extra_times,
    with_fixed_input,
    with_guidance_input,
    with_input_at_times,
)
from fastdiff.models.families import StableDiffusion, StableDiffusionXL, family_of
from fastdiff.models.families.flux import Flux
from fastdiff.models.timestep_slot import time_sinusoids

TRANSFORMERS = [builder.__name__ for builder in BUILDERS]


def slot_of(network: nn.Module) -> nn.Linear:
    (name,) = [n for n, _ in network.named_parameters() if n.endswith(("cond_proj.weight", "slot.weight"))]
    return network.get_submodule(name.removesuffix(".weight"))


def analytic(network):
    cond = Conditioning({"labels": torch.tensor([0, -1])})
    return network, AnalyticFamily(""), cond, (3, 1, 1)


def stable_diffusion(pipeline):
    cond = Conditioning({"prompt_embeds": torch.randn(2, 16, pipeline.unet.config.cross_attention_dim)})
    return pipeline.unet, StableDiffusion(), cond, (4, 16, 16)


def stable_diffusion_xl(pipeline):
    width = pipeline.unet.config.cross_attention_dim
    pooled = pipeline.text_encoder_2.config.projection_dim
    tensors = {"prompt_embeds": torch.randn(2, 16, width), "pooled_prompt_embeds": torch.randn(2, pooled)}
    return pipeline.unet, StableDiffusionXL(), Conditioning(tensors | {"time_ids": torch.ones(2, 6)}), (4, 16, 16)


class GuidedFlux(Flux):
    """FLUX.1-dev, whose network is also told its guidance, which a denoiser does."""

    def call(self, network, x_t, time, cond, **inputs):
        return super().call(network, x_t, time, cond, guidance=torch.full_like(time, 3.5), **inputs)


@functools.cache
def transformer(name):
    pipeline = build(name)
    family = GuidedFlux() if name == "flux" else family_of(type(pipeline).__name__)
    with torch.no_grad():
        cond = family.encode_prompts(pipeline, ["a red apple", "b"], 32)
    return pipeline.transformer, family, cond, (4, 16, 16)


def pretrained_case(request):
    """A pipeline's network, its family, conditioning of two rows and the shape of a latent, by name."""
    if request.param == "sd":
        return stable_diffusion(request.getfixturevalue("tiny_sd"))
    if request.param == "sdxl":
        return stable_diffusion_xl(request.getfixturevalue("tiny_sdxl"))
    return transformer(request.param)


@pytest.fixture
def pretrained(request):
    torch.manual_seed(0)
    return pretrained_case(request)


each_pretrained = pytest.mark.parametrize("pretrained", ["sd", "sdxl", *TRANSFORMERS], indirect=True)


@pytest.fixture(params=["point", "residual", "sd", "sdxl", *TRANSFORMERS])
def case(request):
    torch.manual_seed(0)
    if request.param not in ("point", "residual"):
        return pretrained_case(request)
    network = PointNet(3, 1) if request.param == "point" else ResidualNet(3, 1, 32, 2)
    nn.init.normal_(network.leave.weight)
    for block in getattr(network, "blocks", ()):
        nn.init.normal_(block.leave.weight)
    return analytic(network)


@pytest.mark.parametrize("count", [1, 2])
def test_a_slot_starts_without_effect_and_then_takes_part(case, count):
    network, family, cond, shape = case
    wide = with_extra_times(network, count)
    x, t = torch.randn(2, *shape), torch.tensor([3.0, 900.0])
    extra = {"timestep_cond": time_features([torch.tensor([0.0, 400.0 + 100 * k]) for k in range(count)])}
    with torch.no_grad():
        plain = family.call(network, x, t, cond)
        assert torch.equal(family.call(wide, x, t, cond, **extra), plain)
        assert torch.equal(family.call(wide, x, t, cond), plain)
        assert slot_of(wide).weight.shape[1] == 256 * count
        nn.init.normal_(slot_of(wide).weight)
        assert not torch.allclose(family.call(wide, x, t, cond, **extra), plain, atol=1e-3)
        assert torch.equal(family.call(wide, x, t, cond), plain)  # nothing is kept from the call before
        assert torch.equal(family.call(network, x, t, cond), plain)


def test_the_slot_learns(case):
    network, family, cond, shape = case
    wide = with_extra_times(network)
    features = time_features([torch.tensor([0.0, 400.0])])
    out = family.call(wide, torch.randn(2, *shape), torch.tensor([3.0, 900.0]), cond, timestep_cond=features)
    out.square().mean().backward()
    assert slot_of(wide).weight.grad.abs().max() > 0


def test_features_are_sines_of_the_value_in_its_own_precision():
    a, b = torch.tensor([0.0, 999.0], dtype=torch.float64), torch.tensor([250.0, 1.5], dtype=torch.float64)
    features = time_features([a, b], 8)
    assert features.shape == (2, 16) and features.dtype == torch.float64
    frequencies = [1.0, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4]
    assert features[1, :4].tolist() == pytest.approx([math.sin(999 * f) for f in frequencies], abs=1e-10)
    assert features[0, 12:].tolist() == pytest.approx([math.cos(250 * f) for f in frequencies], abs=1e-10)
    assert torch.equal(time_features([1000.0 * b], 256), guidance_embedding(b, 256))
    assert time_features([a.float()]).shape == (2, 256)


def test_networks_without_a_slot_are_refused(tiny_sd):
    with pytest.raises(ValueError, match="AffinePerBin"):
        with_extra_times(AffinePerBin(1, (0.0, 999.0)))
    with pytest.raises(ValueError, match="already takes 256"):
        with_extra_times(with_guidance_input(tiny_sd.unet))
    with pytest.raises(ValueError, match="already takes 512"):
        with_guidance_input(with_extra_times(transformer("stable_diffusion_3")[0], 2))


def fed(network, family, cond, shape, times):
    """Sinusoids of the times, one row each."""
    x, rows = torch.zeros(len(times), *shape), Conditioning({k: v[:1] for k, v in cond.tensors.items()})
    return time_sinusoids(network, lambda: family.call(network, x, torch.tensor(times), rows.expand(len(times))))


def assert_stock(plain, network):
    """What stock pipelines load: class, config and weights' names are the teacher's, and no hook is left."""
    assert type(plain) is type(network)
    own, config = (
        {key: value for key, value in dict(one.config).items() if not key.startswith("_")} for one in (plain, network)
    )
    assert own == config
    assert plain.state_dict().keys() == network.state_dict().keys()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in plain.modules())


@pytest.mark.parametrize("times", [[999.0], [999.0, 499.0], [999.0, 899.0, 749.0, 624.0, 499.0, 374.0, 249.0, 124.0]])
@each_pretrained
def test_an_input_that_goes_with_the_time_becomes_a_matrix(pretrained, times):
    network, family, cond, shape = pretrained
    wide = with_extra_times(network)
    nn.init.normal_(slot_of(wide).weight, std=0.3)
    ends = torch.tensor([*times[1:], -1.0])
    before = {k: v.clone() for k, v in wide.state_dict().items()}
    plain = with_input_at_times(wide, fed(wide, family, cond, shape, times), time_features([ends]))
    x, largest = torch.randn(2, *shape), 0.0
    for time, end in zip(times, ends):
        t, features = torch.full((2,), time), time_features([end.expand(2)])
        with torch.no_grad():
            told = family.call(wide, x, t, cond, timestep_cond=features)
            torch.testing.assert_close(family.call(plain, x, t, cond), told, rtol=1e-4, atol=1e-5)
            largest = max(largest, (family.call(wide, x, t, cond) - told).abs().max().item())
    assert largest > 1e-3  # what it is told matters
    assert_stock(plain, network)
    assert all(torch.equal(before[name], value) for name, value in wide.state_dict().items())


@each_pretrained
def test_an_input_that_never_changes_becomes_a_bias(pretrained):
    network, family, cond, shape = pretrained
    wide = with_extra_times(network)
    nn.init.normal_(slot_of(wide).weight, std=0.3)
    features, before = time_features([torch.tensor([-1.0])]), {k: v.clone() for k, v in wide.state_dict().items()}
    plain = with_fixed_input(wide, features)
    x, t = torch.randn(2, *shape), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        told = family.call(wide, x, t, cond, timestep_cond=features.expand(2, -1))
        torch.testing.assert_close(family.call(plain, x, t, cond), told, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(family.call(wide, x, t, cond), told, atol=1e-3)
    assert_stock(plain, network)
    assert all(torch.equal(before[name], value) for name, value in wide.state_dict().items())
    assert all(parameter.requires_grad for parameter in slot_of(wide).parameters())  # it may still be training
