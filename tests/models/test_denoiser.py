"""The denoiser: guidance, several roles in one call, features, precision, checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch

from fastdiff.diffusion import VPSchedule
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Ask, Denoiser, Taps
from fastdiff.models.families import StableDiffusion
from fastdiff.models.roles import AdapterSpec, FullSpec, Roles

TARGETS = ("to_q", "to_v", "to_out.0", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj", "proj_out")
SPEC = AdapterSpec(rank=4, alpha=4.0, targets=TARGETS)
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = VPSchedule.from_scheduler_config(BETAS)


def build(unet, checkpointing=False, dtype=torch.float32, one_call=True, fake=SPEC) -> Denoiser:
    torch.manual_seed(0)
    roles = Roles(unet, {"student": SPEC, "fake_score": fake}, checkpointing)
    generator = torch.Generator().manual_seed(1)
    for role in ("student", "fake_score"):
        for name, parameter in roles.named_parameters(role):
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            elif "mid_block" in name:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return Denoiser(roles, StableDiffusion(), SCHEDULE, "epsilon", dtype, one_call)


def question(rows: int = 3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 4, 16, 16, generator=generator)
    cond, null = (Conditioning({"prompt_embeds": torch.randn(n, 16, 16, generator=generator)}) for n in (rows, 1))
    return x, torch.linspace(30.0, 950.0, rows), cond, null


def test_guidance_is_null_plus_w_times_the_difference(tiny_sd):
    denoiser = build(tiny_sd.unet)
    x, t, cond, null = question()
    with torch.no_grad():
        c, n = denoiser(x, t, cond, "teacher").native, denoiser(x, t, null.expand(3), "teacher").native
        for w in (3.0, torch.tensor([0.0, 1.0, 7.5])):
            guided = denoiser(x, t, cond, "teacher", null, w).native
            weight = w if isinstance(w, float) else w[:, None, None, None]
            torch.testing.assert_close(guided, n + weight * (c - n), rtol=1e-4, atol=1e-5)
        before = denoiser.calls
        assert torch.equal(denoiser(x, t, cond, "teacher", null, 1.0).native, c)
        assert denoiser.calls - before == 3  # w = 1 asks nothing of the null
        denoiser(x, t, cond, "teacher", null, 2.0)
        assert denoiser.calls - before == 9
    with pytest.raises(ValueError, match=r"teacher.*null"):
        denoiser(x, t, cond, "teacher", guidance=2.0)


@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("full_fake", [False, True])
def test_together_equals_separate_calls(tiny_sd, one_call, full_fake):
    denoiser = build(tiny_sd.unet, one_call=one_call, fake=FullSpec() if full_fake else SPEC)
    denoiser.roles.stack("mixed", {"student": 0.5})
    x, t, cond, null = question()
    asks = [
        Ask("fake_score", cond),
        Ask("teacher", cond, null, 4.0),
        Ask("student", cond, null, torch.tensor([1.0, 2.5, 6.0])),
        Ask("mixed", cond),
        Ask("teacher", cond),
    ]
    entered = []
    for network in {id(n): n for n in map(denoiser.roles.network, ("teacher", "fake_score"))}.values():
        network.register_forward_pre_hook(lambda *_: entered.append(1))
    got = denoiser.together(x, t, asks)
    assert len(entered) == (2 if full_fake else 1) if one_call else len(asks)
    assert denoiser.roles.active.parts == ()
    for ask, prediction in zip(asks, got):
        with torch.no_grad():
            alone = denoiser(x, t, ask.cond, ask.role, ask.null, ask.guidance)
        torch.testing.assert_close(prediction.native, alone.native, rtol=0, atol=1e-5)
        assert not prediction.native.requires_grad
    assert (got[0].native - got[4].native).abs().max() > 1e-2


@pytest.mark.parametrize("role", ["student", "fake_score"])
@pytest.mark.parametrize("full_fake", [False, True])
def test_checkpointed_gradients_are_those_of_their_own_role(tiny_sd, role, full_fake):
    fake = FullSpec() if full_fake else SPEC
    gradients = []
    for checkpointing in (False, True):
        denoiser = build(copy.deepcopy(tiny_sd.unet), checkpointing, fake=fake)
        x, t, cond, _ = question(2)
        trained = denoiser.roles.parameters(role)
        loss = denoiser(x, t, cond, role).native.square().mean()
        other = "teacher" if role == "student" else "student"
        with denoiser.roles.active.use(denoiser.roles.parts(other)):  # somebody else is at work when backward runs
            loss.backward(inputs=trained)
        assert denoiser.roles.active.parts == ()
        gradients.append([p.grad for p in trained])
    assert max(g.abs().max() for g in gradients[0]) > 1e-3
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


def test_checkpointing_recomputes_in_backward(tiny_sd):
    denoiser = build(tiny_sd.unet, checkpointing=True)
    resnet = tiny_sd.unet.down_blocks[0].resnets[0]
    calls = []
    resnet.register_forward_pre_hook(lambda *_: calls.append(1))
    x, t, cond, _ = question(1)
    loss = denoiser(x, t, cond, "student").native.sum()
    forward = len(calls)
    loss.backward(inputs=denoiser.roles.parameters("student"))
    assert (forward, len(calls)) == (1, 2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_stop_early_and_equal_the_full_forwards_tap(tiny_sd, checkpointing):
    denoiser = build(tiny_sd.unet, checkpointing)
    x, t, cond, _ = question(2)
    x.requires_grad_(True)
    taps = Taps(("mid_block",))
    denoiser(x, t, cond, "fake_score", taps=taps)
    reached = []
    handle = tiny_sd.unet.up_blocks[0].register_forward_pre_hook(lambda *_: reached.append(1))
    (features,) = denoiser.features(x, t, cond, "fake_score", ("mid_block",))
    handle.remove()
    assert not reached
    assert torch.equal(features, taps.features["mid_block"])
    assert features.shape[1] == denoiser.family.feature_taps(tiny_sd.unet)["mid_block"]
    assert not tiny_sd.unet.mid_block._forward_hooks
    (teachers,) = denoiser.features(x, t, cond, "teacher", ("mid_block",))
    assert not torch.allclose(teachers, features, atol=1e-3)
    with denoiser.roles.active.use(denoiser.roles.parts("student")):
        early, full = (torch.autograd.grad(f.sum(), x)[0] for f in (features, taps.features["mid_block"]))
    torch.testing.assert_close(early, full, rtol=1e-5, atol=1e-6)
    assert early.abs().max() > 0


def test_features_come_in_the_order_asked(tiny_sd):
    denoiser = build(tiny_sd.unet)
    x, t, cond, _ = question(1)
    names = ("mid_block", "conv_in")
    with torch.no_grad():
        mid, first = denoiser.features(x, t, cond, "teacher", names)
    assert first.shape[1:] == (16, 16, 16) and mid.shape[1] == 32


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_bf16_compute_gives_float32_gradients(tiny_sd, base_dtype):
    denoiser = build(tiny_sd.unet.to(base_dtype), dtype=torch.bfloat16, fake=FullSpec())
    x, t, cond, null = question(2)
    for role in ("student", "fake_score"):
        prediction = denoiser(x, t, cond, role)
        assert prediction.native.dtype == torch.bfloat16
        assert prediction.x0.dtype == torch.float32  # conversions never run below float32
        prediction.x0.square().mean().backward(inputs=denoiser.roles.parameters(role))
        assert {p.dtype for p in denoiser.roles.parameters(role)} == {torch.float32}
        assert {p.grad.dtype for p in denoiser.roles.parameters(role)} == {torch.float32}
        assert max(p.grad.abs().max() for p in denoiser.roles.parameters(role)) > 0
    got = denoiser.together(x, t, [Ask("teacher", cond, null, 2.0), Ask("fake_score", cond)])
    assert all(torch.isfinite(p.x0).all() for p in got)


def test_bf16_compute_is_close_to_float32(tiny_sd):
    x, t, cond, _ = question(2)
    with torch.no_grad():
        exact = build(copy.deepcopy(tiny_sd.unet))(x, t, cond, "student").native
        rough = build(tiny_sd.unet, dtype=torch.bfloat16)(x, t, cond, "student").native.float()
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_count_backward_and_recomputation(tiny_sd, checkpointing):
    denoiser = build(tiny_sd.unet, checkpointing, fake=FullSpec())
    x, t, cond, _ = question()
    again = int(checkpointing)

    def passes(role, trained, point):
        before = denoiser.cost.passes
        denoiser.cost.trained = trained
        denoiser(point, t, cond, role)
        return (denoiser.cost.passes - before) / len(x)

    assert passes("student", ("student",), x) == 2 + again  # an adapter: forward, and back through frozen weights
    assert passes("fake_score", ("fake_score",), x) == 3 + again  # a full role also has weight gradients
    assert passes("fake_score", ("student",), x) == 1  # nothing to differentiate
    assert passes("fake_score", ("student",), x.clone().requires_grad_()) == 2 + again  # only through it
    with torch.no_grad():
        assert passes("student", ("student",), x) == 1
    assert denoiser.calls == 5 * len(x)
