"""Roles: several networks on one frozen base."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastdiff.models.roles import AdapterSpec, FullSpec, Part, Roles, adapter_layers, row_blocks

TARGETS = ("to_q", "to_k", "to_out.0", "ff.net.0.proj", "conv1", "downsamplers.0.conv", "time_emb_proj", "proj_in")
SPEC = AdapterSpec(rank=4, alpha=2.0, targets=TARGETS)


def inputs(rows: int = 2):
    generator = torch.Generator().manual_seed(5)
    x, embeds = (torch.randn(rows, *shape, generator=generator) for shape in ((4, 16, 16), (16, 16)))
    return x, torch.linspace(20.0, 900.0, rows), embeds


def randomise(roles: Roles, *names: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for name in names:
        for parameter in roles.parameters(name):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def evaluate(roles: Roles, role: str, rows: int = 2) -> torch.Tensor:
    with torch.no_grad(), roles.active.use(roles.parts(role)):
        return roles.network(role)(*inputs(rows)).sample


def test_adapters_compute_what_peft_computes(tiny_sd):
    from peft import LoraConfig

    plain = copy.deepcopy(tiny_sd.unet)
    roles = Roles(tiny_sd.unet, {"student": SPEC, "fake_score": SPEC})
    randomise(roles, "student", "fake_score")
    kinds = {type(layer).__name__ for _, layer in adapter_layers(roles.base)}
    assert kinds == {"Linear", "Conv2d"}
    for role in ("student", "fake_score"):
        reference = copy.deepcopy(plain)
        reference.add_adapter(LoraConfig(r=4, lora_alpha=2.0, target_modules=list(TARGETS)), adapter_name=role)
        own = dict(roles.named_parameters(role))
        theirs = {name: p for name, p in reference.named_parameters() if "lora_" in name}
        assert theirs.keys() == own.keys()
        for name, parameter in theirs.items():
            parameter.data = own[name].data.clone()
        with torch.no_grad():
            expected = reference(*inputs()).sample
        torch.testing.assert_close(evaluate(roles, role), expected, rtol=0, atol=1e-6)
        assert (evaluate(roles, role) - evaluate(roles, "teacher")).abs().max() > 1e-2


def test_the_teacher_is_bit_equal_to_the_original_network(tiny_sd):
    plain = copy.deepcopy(tiny_sd.unet).eval()
    roles = Roles(tiny_sd.unet, {"student": SPEC, "fake_score": SPEC, "other": FullSpec()})
    randomise(roles, "student", "fake_score")
    with torch.no_grad():
        expected = plain(*inputs()).sample
    assert torch.equal(evaluate(roles, "teacher"), expected)
    evaluate(roles, "student")
    assert torch.equal(evaluate(roles, "teacher"), expected)
    assert torch.equal(evaluate(roles, "other"), expected)  # a full module starts as the base
    with torch.no_grad():
        assert torch.equal(roles.base(*inputs()).sample, expected)  # no role entered: the teacher


def test_stacked_adapters_add_up_with_their_scales(tiny_sd):
    """On a linear network the stack is the sum of its parts; a scale of one half is half the delta."""
    roles = Roles(tiny_sd.unet, {"style": SPEC, "student": SPEC})
    randomise(roles, "style", "student")
    roles.stack("both", {"style": 0.8, "student": 1.0})
    layer = next(layer for name, layer in adapter_layers(roles.base) if name.endswith("to_q"))
    x = torch.randn(3, layer.base_layer.in_features)

    def delta(role):
        with torch.no_grad(), roles.active.use(roles.parts(role)):
            return layer(x) - layer.base_layer(x)

    torch.testing.assert_close(delta("both"), 0.8 * delta("style") + delta("student"), rtol=1e-5, atol=1e-6)
    weight = 0.5 * layer.lora_B["style"].weight @ layer.lora_A["style"].weight  # alpha / rank = 1/2
    torch.testing.assert_close(delta("style"), x @ weight.T, rtol=1e-5, atol=1e-6)
    roles.stack("teacher with style", {"style": 1.0})
    assert torch.equal(evaluate(roles, "teacher with style"), evaluate(roles, "style"))


def test_switching_walks_over_no_module_and_changes_no_flag(tiny_sd, monkeypatch):
    roles = Roles(tiny_sd.unet, {"student": SPEC, "fake_score": SPEC})
    flags = [p.requires_grad for p in roles.base.parameters()]

    def refuse(*_args, **_kwargs):
        raise AssertionError("a switch must not walk over modules")

    for walk in ("modules", "named_modules", "children", "parameters", "named_parameters", "apply", "requires_grad_"):
        monkeypatch.setattr(nn.Module, walk, refuse)
    with roles.active.use(roles.parts("student")):
        assert roles.active.parts == (Part("student"),)
        with roles.active.use(roles.parts("teacher")):
            assert roles.active.parts == ()
        with pytest.raises(KeyError), roles.active.use(roles.parts("fake_score")):
            raise KeyError
        assert roles.active.parts == (Part("student"),)
    assert roles.active.parts == ()
    monkeypatch.undo()
    assert flags == [p.requires_grad for p in roles.base.parameters()]


def test_one_scope_can_be_entered_again_and_again(tiny_sd):
    roles = Roles(tiny_sd.unet, {"student": SPEC})
    scope = roles.active.use(roles.parts("student"))
    with scope, scope:
        assert roles.active.parts == (Part("student"),)
    assert roles.active.parts == ()


def test_only_roles_are_trainable(tiny_sd):
    base_names = {name for name, _ in tiny_sd.unet.named_parameters()}
    roles = Roles(tiny_sd.unet, {"student": SPEC, "fake_score": FullSpec()})
    adapters = {id(p) for p in roles.parameters("student")}
    assert all(p.requires_grad == (id(p) in adapters) for p in roles.base.parameters())
    assert all(p.requires_grad for p in roles.parameters("fake_score"))
    assert {name for name, _ in roles.named_parameters("fake_score")} == base_names
    assert len(adapters) == 2 * len(adapter_layers(roles.base))
    assert {p.dtype for p in roles.parameters("student")} == {torch.float32}


def test_state_round_trip_and_refusal(tiny_sd):
    original = copy.deepcopy(tiny_sd.unet)
    specs = {"student": SPEC, "fake_score": FullSpec()}
    roles, fresh = Roles(tiny_sd.unet, specs), Roles(original, specs)
    randomise(roles, "student")
    for role in specs:
        state = {name: tensor.clone() + 0.01 for name, tensor in roles.state_dict(role).items()}
        fresh.load_state_dict(role, state)
        assert all(torch.equal(fresh.state_dict(role)[name], tensor) for name, tensor in state.items())

        kept = {name: tensor.clone() for name, tensor in fresh.state_dict(role).items()}
        first, last = next(iter(state)), list(state)[-1]
        for wrong in (
            {name: t + 1 for name, t in state.items() if name != last},
            {name: t + 1 for name, t in state.items()} | {"stranger": torch.zeros(1)},
            {name: t + 1 for name, t in state.items()} | {last: torch.zeros(1, 1, 1)},
        ):
            with pytest.raises(ValueError, match=f"{role}.*rank"):
                fresh.load_state_dict(role, wrong)
            assert torch.equal(fresh.state_dict(role)[first], kept[first])


def test_mistakes_are_named(tiny_sd):
    with pytest.raises(ValueError, match="teacher"):
        Roles(tiny_sd.unet, {"teacher": FullSpec()})
    with pytest.raises(ValueError, match="lora_rank"):
        Roles(tiny_sd.unet, {"student": AdapterSpec(0, 1.0, TARGETS)})
    with pytest.raises(ValueError, match="no_such_module"):
        Roles(tiny_sd.unet, {"student": AdapterSpec(4, 4.0, ("no_such_module",))})
    roles = Roles(tiny_sd.unet, {})
    with pytest.raises(KeyError, match="critic"):
        roles.network("critic")


def test_row_blocks():
    assert row_blocks([2, 4, 1]) == [slice(0, 2), slice(2, 6), slice(6, 7)]
