"""A transformer's slot: its input goes through one call and no further, whatever is done to the network around it."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tiny_transformers import build
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.models.embeddings import time_features
from fastdiff.models.families import family_of
from fastdiff.models.roles import AdapterSpec, FullSpec, Roles
from fastdiff.models.timestep_slot import time_perceptron, time_sinusoids, with_slot, without_slot

T = torch.tensor([20.0, 900.0], dtype=torch.float64)
ENDS = torch.tensor([0.0, 400.0], dtype=torch.float64)


@functools.cache
def original(name):
    pipeline = build(name)
    family = family_of(type(pipeline).__name__)
    with torch.no_grad():
        return pipeline.transformer.double(), family, family.encode_prompts(pipeline, ["a red apple", "b"], 32)


def widened(name="stable_diffusion_3"):
    """A float64 network whose slot has weights, and how to ask it about the two rows, told or not."""
    network, family, cond = original(name)
    torch.manual_seed(0)
    wide, x = with_slot(network, 256).requires_grad_(True), torch.randn(2, 4, 16, 16, dtype=torch.float64)
    nn.init.normal_(wide.timestep_slot.cond_proj.weight, std=0.1)

    def ask(ends=None, of=wide):
        told = {} if ends is None else {"timestep_cond": time_features([ends])}
        return family.call(of, x, T, cond.to(dtype=torch.float64), **told)

    return wide, ask


def assert_derivative(actual, ask, h=0.05):
    """Differences of fourth order, long enough for the norms that compute in float32."""
    expected = (8 * (ask(ENDS + h) - ask(ENDS - h)) - (ask(ENDS + 2 * h) - ask(ENDS - 2 * h))) / (12 * h)
    largest = expected.abs().max().item()
    assert largest > 1e-4
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3 * largest)


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux_schnell", "z_image"])  # Sana has kinks
def test_the_derivative_along_the_input_is_that_of_differences(name):
    wide, ask = widened(name)
    wide.requires_grad_(False)
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        derivative = forward_ad.unpack_dual(ask(forward_ad.make_dual(ENDS, torch.ones_like(ENDS)))).tangent
    assert_derivative(derivative, ask)


def test_functional_derivatives_see_the_input():
    wide, ask = widened()
    wide.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(ask, (ENDS,), (torch.ones_like(ENDS),))
    assert_derivative(derivative, ask)


def test_recomputed_blocks_give_the_same_gradient():
    wide, ask = widened()

    def gradient():
        wide.zero_grad()
        loss = ask(ENDS).square().mean()
        ask(ENDS.flip(0)).detach()  # another call before backward, told something else
        loss.backward()
        return wide.timestep_slot.cond_proj.weight.grad.clone()

    plain = gradient()
    assert plain.abs().max() > 1e-6
    roles = Roles(without_slot(wide), {"student": FullSpec(wide, torch.float64)}, gradient_checkpointing=True)
    assert roles.network("student") is wide and wide.is_gradient_checkpointing
    torch.testing.assert_close(gradient(), plain, rtol=1e-9, atol=1e-12)


def test_a_copy_has_a_slot_of_its_own():
    wide, ask = widened()
    before = ask(ENDS).detach()
    twin = copy.deepcopy(wide)
    assert torch.equal(ask(ENDS, twin), before)
    with torch.no_grad():
        twin.timestep_slot.cond_proj.weight.zero_()
    assert torch.equal(ask(ENDS, twin), ask(None, twin)) and torch.equal(ask(None, twin), ask())
    assert torch.equal(ask(ENDS), before) and not torch.allclose(before, ask(), atol=1e-4)


def test_a_call_that_is_left_early_leaves_nothing_behind():
    wide, ask = widened()
    plain = ask().detach()
    handle = wide.transformer_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(ENDS.clone().requires_grad_(True))
    handle.remove()
    assert wide.timestep_slot._told is None
    assert torch.equal(ask(None, copy.deepcopy(wide)), plain) and torch.equal(ask(), plain)


def test_an_adapter_on_the_layer_behind_it_sees_the_input():
    wide, ask = widened()
    merged = copy.deepcopy(wide)
    roles = Roles(wide, {"student": AdapterSpec(2, 2.0, ("timestep_embedder.linear_1",))})
    layer = wide.time_text_embed.timestep_embedder.linear_1
    with torch.no_grad():
        up, down = layer.lora_B["student"].weight.normal_(), layer.lora_A["student"].weight
        merged.time_text_embed.timestep_embedder.linear_1.weight += (up @ down).double()
    with roles.active.use(roles.parts("student")):
        torch.testing.assert_close(ask(ENDS), ask(ENDS, merged), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ask(ENDS), ask(ENDS, widened()[0]), rtol=1e-9, atol=1e-12)


def test_without_its_slot_the_network_is_the_stock_one_with_the_same_weights():
    wide, ask = widened()
    plain = without_slot(wide)
    assert torch.equal(ask(None, plain), ask())
    with pytest.raises(TypeError, match="timestep_cond"):
        ask(ENDS, plain)
    shared = {weight.data_ptr() for weight in wide.parameters()}
    assert {weight.data_ptr() for weight in plain.parameters()} < shared
    assert not torch.allclose(ask(ENDS), ask(), atol=1e-4)  # the network it came from keeps its slot
    assert all(weight.requires_grad for weight in wide.parameters())


def test_sinusoids_are_those_of_the_time():
    wide, ask = widened()
    rates = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128).double()
    angles = T[:, None] * rates
    for told in (None, ENDS):
        seen = time_sinusoids(wide, lambda told=told: ask(told))
        torch.testing.assert_close(seen, torch.cat([angles.cos(), angles.sin()], 1), rtol=1e-4, atol=1e-4)


def test_networks_that_do_not_embed_one_time_are_refused():
    with pytest.raises(ValueError, match="Linear with none"):
        time_perceptron(nn.Linear(1, 1))
    two = nn.ModuleDict({"a": nn.ModuleDict({"timestep_embedder": nn.Identity()}), "time_embedding": nn.Identity()})
    with pytest.raises(ValueError, match=r"a\.timestep_embedder, time_embedding"):
        time_perceptron(two)
