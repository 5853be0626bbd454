"""Slots for further scalar inputs: equal to the network at step 0, alive afterwards, through every family's call."""

from __future__ import annotations

import math

import pytest
import torch
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
from fastdiff.models.families import StableDiffusion, StableDiffusionXL


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


@pytest.fixture(params=["point", "residual", "sd", "sdxl"])
def case(request):
    torch.manual_seed(0)
    if request.param == "sd":
        return stable_diffusion(request.getfixturevalue("tiny_sd"))
    if request.param == "sdxl":
        return stable_diffusion_xl(request.getfixturevalue("tiny_sdxl"))
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


@pytest.mark.parametrize("times", [[999.0], [999.0, 499.0], [999.0, 899.0, 749.0, 624.0, 499.0, 374.0, 249.0, 124.0]])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_input_that_goes_with_the_time_becomes_a_matrix(kind, times, request):
    torch.manual_seed(0)
    pipeline = request.getfixturevalue(f"tiny_{kind}")
    network, family, cond, shape = (stable_diffusion if kind == "sd" else stable_diffusion_xl)(pipeline)
    wide = with_extra_times(network)
    nn.init.normal_(slot_of(wide).weight, std=0.3)
    ends = torch.tensor([*times[1:], -1.0])
    before = {k: v.clone() for k, v in wide.state_dict().items()}
    plain = with_input_at_times(wide, torch.tensor(times), time_features([ends]))
    x, largest = torch.randn(2, *shape), 0.0
    for time, end in zip(times, ends):
        t, features = torch.full((2,), time), time_features([end.expand(2)])
        with torch.no_grad():
            told = family.call(wide, x, t, cond, timestep_cond=features)
            torch.testing.assert_close(family.call(plain, x, t, cond), told, rtol=1e-4, atol=1e-5)
            largest = max(largest, (family.call(wide, x, t, cond) - told).abs().max().item())
    assert largest > 1e-3  # what it is told matters
    assert plain.config.time_cond_proj_dim is None
    assert all(torch.equal(before[name], value) for name, value in wide.state_dict().items())


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_input_that_never_changes_becomes_a_bias(kind, request):
    torch.manual_seed(0)
    pipeline = request.getfixturevalue(f"tiny_{kind}")
    network, family, cond, shape = (stable_diffusion if kind == "sd" else stable_diffusion_xl)(pipeline)
    wide = with_extra_times(network)
    nn.init.normal_(slot_of(wide).weight, std=0.3)
    features, before = time_features([torch.tensor([-1.0])]), {k: v.clone() for k, v in wide.state_dict().items()}
    plain = with_fixed_input(wide, features)
    x, t = torch.randn(2, *shape), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        told = family.call(wide, x, t, cond, timestep_cond=features.expand(2, -1))
        torch.testing.assert_close(family.call(plain, x, t, cond), told, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(family.call(wide, x, t, cond), told, atol=1e-3)
    assert plain.config.time_cond_proj_dim is None
    assert all(torch.equal(before[name], value) for name, value in wide.state_dict().items())
