"""TSCD (arXiv 2404.13686): where maps end, what it becomes at its limits, stages, the unified student's last stage."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from method_helpers import SD, batch_of, context, denoiser_of, f64, settle
from trajectory_helpers import (
    FLOW,
    KINDS,
    LAW,
    PROCESSES,
    JumpNet,
    data,
    every_pair,
    exact_map,
    gaussian_denoiser,
    images,
    jumps,
    mapped,
    orders,
    product_map,
    settings,
    student_loss,
)

from fastdiff.engine import Trainer
from fastdiff.methods import (
    CTM,
    DMD2,
    LCM,
    PCM,
    TCD,
    TSCD,
    CTMConfig,
    DMD2Config,
    LCMConfig,
    PCMConfig,
    TCDConfig,
    TSCDConfig,
)
from fastdiff.methods._trajectory import grid_points
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.analytic_networks import AffinePerBin, PointNet
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.teacher import Teacher
from fastdiff.recipes.starting import start_from

PLAIN = {"guidance_scale": 1.0, "loss_type": "l2", "target_decay": 0.0, "num_ddim_timesteps": 40}
SCHEDULES = pytest.mark.parametrize("schedule", [SD, FLOW], ids=["vp", "flow"])


def method(**config) -> TSCD:
    return TSCD(TSCDConfig(**PLAIN | {"adversarial_weight": 0.0} | config))


class NotListening(PointNet):
    """Takes a told end, and does with it what a network does that is told none."""

    def forward(self, x_t, time, labels, timestep_cond=None):
        return super().forward(x_t, time, labels)


def loss_and_gradients(one, schedule, draws=None, kind=None):
    torch.manual_seed(0)
    network, kind = NotListening(1, 1).double(), kind or KINDS[schedule]
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, student=network)
    loss = student_loss(one, denoiser, 16, draws)["consistency"]
    grads = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return [loss.detach(), *(g for g in grads if g is not None)]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Ends


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_maps_end_anywhere_between_the_segments_edge_and_the_next_point(segments):
    points, number = grid_points(40), torch.arange(40).repeat(64)
    ctx = context(gaussian_denoiser(), len(number))
    end = method(num_segments=segments).end(number, points, ctx)
    edge = torch.div(number, 40 // segments, rounding_mode="floor") * (1000 // segments) - 1
    assert (end >= edge).all() and (end <= points[number]).all()
    for extreme, bound in ((1e-9, edge), (1 - 2**-24, points[number])):
        draws = {"end": torch.full((len(number),), extreme)}
        assert torch.equal(
            method(num_segments=segments).end(number, points, context(gaussian_denoiser(), len(number), draws)), bound
        )
    longest = number == 39
    assert len(end[longest].unique()) > 30  # all indices, not grid points alone


# Limits


def test_one_segment_that_ends_clean_is_lcm():
    ends = {"end": torch.zeros(16)}
    lcm = LCM(LCMConfig(**PLAIN))
    assert same(loss_and_gradients(method(num_segments=1), FLOW, ends), loss_and_gradients(lcm, FLOW, ends))
    assert not same(loss_and_gradients(method(num_segments=1), FLOW), loss_and_gradients(lcm, FLOW))


@SCHEDULES
@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_ends_at_the_edge_make_it_pcm(schedule, segments):
    ends = {"end": torch.zeros(16)}
    pcm = PCM(PCMConfig(**PLAIN, num_phases=segments, adversarial_weight=0.0))
    tscd = method(num_segments=segments)
    assert same(loss_and_gradients(tscd, schedule, ends), loss_and_gradients(pcm, schedule, ends))
    assert not same(loss_and_gradients(tscd, schedule), loss_and_gradients(pcm, schedule))


@SCHEDULES
def test_one_segment_is_tcd(schedule):
    tcd = TCD(TCDConfig(**PLAIN))
    assert same(loss_and_gradients(method(num_segments=1), schedule), loss_and_gradients(tcd, schedule))


@pytest.mark.parametrize(("schedule", "kind"), PROCESSES.values(), ids=PROCESSES)
def test_one_segment_is_ctm_of_a_network_that_does_not_listen(schedule, kind):
    ctm = loss_and_gradients(CTM(CTMConfig(**PLAIN)), schedule, None, kind)
    assert same(loss_and_gradients(method(num_segments=1), schedule, None, kind), ctm)
    assert not same(loss_and_gradients(method(num_segments=2), schedule, None, kind), ctm)


def test_as_many_segments_as_points_regress_the_teachers_step_when_they_end_there():
    teacher = ExactNetwork(LAW, SD, "epsilon")
    ends = {"end": torch.ones(160)}
    assert every_pair(method(num_segments=40), gaussian_denoiser(student=teacher), ends) < 1e-24
    assert every_pair(method(num_segments=8), gaussian_denoiser(student=teacher)) > 1e-9


def test_an_affine_student_per_grid_time_learns_the_product_map_of_each_segment():
    points, draws = grid_points(20).tolist(), {"pair": torch.arange(20).repeat(4), "end": torch.zeros(80)}
    tscd, student = method(num_segments=2, num_ddim_timesteps=20), AffinePerBin(1, points[1:]).double()
    denoiser = gaussian_denoiser(student=student)
    settle(lambda: student_loss(tscd, denoiser, 80, draws)["consistency"], denoiser.roles.parameters("student"), 10)
    x = f64([-1.0, 2.0])
    for start, edge in ((999, 499), (749, 499), (499, -1), (49, -1)):
        expected = mapped(product_map(points), x, start, edge)
        torch.testing.assert_close(jumps(denoiser, x, start, edge), expected, rtol=0, atol=1e-8)


def test_residual_of_the_exact_map_to_a_fixed_end_is_of_second_order():
    found = []
    for points in (5, 10, 20, 40):
        number = torch.full((64,), 8 * points // 10 - 1)
        low, high = -1, grid_points(points)[number][0].item()
        u = torch.full((64,), (299 - low + 0.5) / (high - low + 1))
        student = JumpNet(exact_map(FLOW), lambda index: torch.full_like(index, 299.0), FLOW)
        denoiser = gaussian_denoiser(FLOW, student=student)
        one = method(num_segments=1, num_ddim_timesteps=points)
        found.append(student_loss(one, denoiser, 64, {"pair": number, "end": u})["consistency"].item())
    assert orders(found) == pytest.approx([2] * 3, abs=0.35)
    assert orders(found)[-1] == pytest.approx(2, abs=0.1)


# Weights, sampler and refusals


def test_weights_scale_their_terms():
    draws = {"pair": torch.arange(16)}
    plain = loss_and_gradients(method(), SD, draws)[0]
    heavy = loss_and_gradients(method(consistency_weight=0.25), SD, draws)[0]
    assert heavy.item() == pytest.approx(plain.item() / 4, rel=1e-12)


def test_each_stage_has_its_own_sampler():
    assert method(num_segments=8).sampler() == SamplerSpec.trailing("ddim", 8)
    assert method(num_segments=1, num_inference_steps=4).sampler() == SamplerSpec.trailing("ddim", 4)
    unified = method(num_segments=1, num_inference_steps=4, eta=0.3).sampler()
    assert (unified.kind, unified.timesteps, unified.eta) == ("tcd", (999, 749, 499, 249), 0.3)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"num_segments": 3}, "num_segments 3"),
        ({"score_weight": 1.0}, "num_segments 1"),
        ({"eta": 2.0}, "eta"),
        ({"num_segments": 8, "num_inference_steps": 4}, "multiple of num_segments"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_segments": 8, "eta": 0.3}, "over the edges of 8 segments"),
        ({"num_segments": 8, "num_inference_steps": 24}, "divisor of 1000"),
        ({"num_segments": 8, "huber_c": 0.1}, "huber_c has no effect"),
        ({"score_guidance_scale": 4.0}, "score_guidance_scale has no effect with score_weight 0"),
        ({"fake_score_learning_rate": 1e-4}, "fake_score_learning_rate has no effect"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        method(**config)


# Last stage


def test_last_stage_adds_the_score_gap_of_the_one_step_sample():
    torch.manual_seed(0)
    roles = {"student": PointNet(1, 1).double(), "fake_score": PointNet(1, 1).double()}
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), **roles)
    tscd = method(num_segments=1, score_weight=0.5, score_guidance_scale=1.0)
    dmd = DMD2(DMD2Config(guidance_scale=1.0))
    ctx, batch = context(denoiser, 8), batch_of(8, 1, data(8))
    terms = tscd.student_loss(batch, ctx)
    alone = dmd.student_loss(batch, context(denoiser, 8))["distribution_matching"]
    assert terms["distribution_matching"].item() == pytest.approx(alone.item() / 2, rel=1e-12)
    own, theirs = (
        torch.autograd.grad(term, roles["student"].leave.weight)[0] for term in (terms["distribution_matching"], alone)
    )
    torch.testing.assert_close(own, theirs / 2)
    names = {update.name: update.trains for update in tscd.updates(0)}
    assert names == {"student": ("student",), "fake_score": ("fake_score",)}
    (update,) = [update for update in tscd.updates(0) if update.name == "fake_score"]
    fitted = update.loss(batch, ctx)["denoising"]
    assert torch.equal(fitted, dmd.critic_loss(batch, ctx)["denoising"])
    assert "fake_score" not in method(num_segments=1).groups()


def test_stages_hand_their_lora_on_and_start_their_optimizers_anew(tiny_sd_folder, tmp_path):
    """8 segments, then 1 with score distillation: adapters, discriminator and a fake score on one base."""
    first = Trainer(
        TSCD(TSCDConfig(guidance_scale=2.0)),
        Teacher.from_pretrained(tiny_sd_folder),
        images(),
        settings(tmp_path / "a", student="lora", max_train_steps=1),
    )
    first.train()
    last = Trainer(
        TSCD(TSCDConfig(guidance_scale=2.0, num_segments=1, score_weight=1.0)),
        Teacher.from_pretrained(tiny_sd_folder),
        images(),
        settings(tmp_path / "b", student="lora", fake_score="lora", max_train_steps=1),
    )
    start_from(last, str(tmp_path / "a"))
    for group in ("student", "discriminator"):
        pairs = zip(first.networks.parameters(group), last.networks.parameters(group), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert max(p.abs().max() for p in last.networks.parameters("student")) > 0
    fresh = [p for n, p in last.networks.roles.named_parameters("fake_score") if "lora_B" in n]
    assert all(not p.any() for p in fresh)
    before = [p.clone() for p in last.networks.parameters("student")]
    last.train_step(next(last.batches.steps(0)))
    assert any(not torch.equal(a, b) for a, b in zip(before, last.networks.parameters("student"), strict=True))
    assert any(p.any() for p in fresh)


def test_a_full_students_average_starts_from_the_stage_before():
    inherited = TSCD(TSCDConfig()).inherits()
    assert inherited == {"student": ("student",), "target": ("student",), "discriminator": ("discriminator",)}
    assert dataclasses.asdict(TSCDConfig())["target_decay"] == 0.95
