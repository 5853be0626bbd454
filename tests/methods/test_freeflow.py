"""FreeFlow (arXiv 2511.19428): the identity in the end alone, the correction's fixed point and sign, who learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flow_map_helpers import LAW, PROCESSES, Latents, MapNetwork, OwnScore, sd_batch, settings, teacher_network
from method_helpers import (
    SD,
    AffineGenerator,
    LabelledGaussians,
    batch_of,
    context,
    denoiser_of,
    f64,
    signs,
    spatial,
)
from torch import nn

from fastdiff.diffusion import FlowSchedule, Gaussian
from fastdiff.engine import Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods._flow_map import end_input, moved_share, noise_share, noise_share_rate
from fastdiff.methods.base import time_at
from fastdiff.methods.freeflow import FreeFlow, FreeFlowConfig
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork
from fastdiff.models.analytic_networks import PointNet
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.embeddings import with_extra_times
from fastdiff.models.teacher import Teacher


def method(**config) -> FreeFlow:
    return FreeFlow(FreeFlowConfig(**config))


def noise(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ends(process: str) -> torch.Tensor:
    return f64([0.01, 0.3, 0.7, 0.95] if process == "flow" else [0.5, 40.25, 500.5, 930.75])


def predicted(free_flow: FreeFlow, process: str, student: nn.Module):
    schedule, kind, *_ = PROCESSES[process]
    denoiser = denoiser_of(teacher_network(process), schedule, kind, student=student)
    z, s, batch, ctx = noise(), ends(process), batch_of(4, 2), context(denoiser, 4)
    found = free_flow.tangent(z, s, batch, ctx)
    return found, free_flow.predicted_target(z, s, found, batch, ctx), denoiser


@pytest.mark.parametrize("process", PROCESSES)
def test_the_identity_holds_at_the_exact_map_and_only_there(process):
    schedule, kind, *_ = PROCESSES[process]
    for tilt, holds in ((0.0, True), (0.1, False)):
        found, target, _ = predicted(method(), process, MapNetwork(schedule, kind, tilt))
        error = (found.value - target).flatten(1).norm(dim=1)
        assert error.max() < 1e-8 if holds else error.min() > 1e-3


@pytest.mark.parametrize("process", PROCESSES)
def test_the_derivative_moves_the_end_alone(process):
    """Against a difference in the end; the noise and the time the network is called at stay."""
    schedule, _kind, *_ = PROCESSES[process]
    torch.manual_seed(0)
    student = with_extra_times(PointNet(2, 1)).double()
    nn.init.normal_(student.slot.weight, std=0.02)
    found, target, denoiser = predicted(method(), process, student)
    z, s, batch = noise(), ends(process), batch_of(4, 2)
    last, h = time_at(999, z, schedule), 1e-5 * schedule.t_max

    def u(end):
        return denoiser(z, last, batch.cond, "student", **end_input(schedule, end)).flow

    slope = (u(s + h) - u(s - h)) / (2 * h) * noise_share_rate(schedule, s)[:, None, None, None]
    torch.testing.assert_close(found.derivative, slope, rtol=1e-3, atol=1e-5)
    alpha, sigma = schedule.levels(last, z)
    where = z / (alpha + sigma) - moved_share(schedule, last, s, z) * u(s)
    alpha, sigma = schedule.levels(s, z)
    v = denoiser(where * (alpha + sigma), s, batch.cond, "teacher").flow
    torch.testing.assert_close(target, v + moved_share(schedule, last, s, z) * slope, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("process", PROCESSES)
def test_at_the_noisy_end_the_target_is_the_teachers_velocity_whatever_the_student(process):
    """The boundary needs no loss of its own."""
    schedule, kind, *_ = PROCESSES[process]
    denoiser = denoiser_of(teacher_network(process), schedule, kind, student=with_extra_times(PointNet(2, 1)))
    z, batch, ctx = noise(), batch_of(4, 2), context(denoiser, 4)
    last = time_at(999, z, schedule).double()
    found = method().tangent(z, last, batch, ctx)
    target = method().predicted_target(z, last, found, batch, ctx)
    torch.testing.assert_close(target, denoiser(z, last, batch.cond, "teacher").flow, rtol=1e-7, atol=1e-7)


def test_ends_cover_the_indices_down_to_the_clean_end():
    denoiser = denoiser_of(teacher_network("epsilon"))
    s = method().ends(context(denoiser, 4000))
    assert -1 < s.min() < 0 and 990 < s.max() < 999
    assert s.mean().item() == pytest.approx(499, abs=15)


# Correction


def corrected(fake: nn.Module | None = None, tilt: float = 0.0, **config) -> torch.Tensor:
    student = MapNetwork(FlowSchedule(), "flow", tilt)
    fake = OwnScore(student) if fake is None else fake
    denoiser = denoiser_of(teacher_network("flow"), FlowSchedule(), "flow", student=student, fake_score=fake)
    rows, residual = torch.arange(64), torch.tensor(1.0).double()
    free_flow = method(norm_power=0.0, **config)
    return free_flow.correct(noise(64), residual, rows, batch_of(64, 2), context(denoiser, 64))


def test_the_correction_rests_where_the_samples_law_is_the_teachers():
    """The fake score is the exact one of the student's own samples."""
    assert corrected() < 1e-18 and corrected(tilt=0.2) > 1e-4


class Free(nn.Module):
    """A velocity that is a free table: its gradient is what the loss says about it."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(rows, 2, 1, 1, dtype=torch.float64))

    def forward(self, x_t, time, labels, timestep_cond):
        return self.table

    def enable_gradient_checkpointing(self, _function):
        pass


def test_a_correction_moves_samples_towards_the_teacher():
    """Samples lie a unit above the data in every coordinate; a step against the gradient lowers them."""
    schedule = FlowSchedule()
    fake = ExactNetwork(Gaussian(LAW.mean + 1, LAW.cov), schedule, "flow")
    denoiser = denoiser_of(teacher_network("flow"), schedule, "flow", student=Free(64), fake_score=fake)
    z, batch, ctx = noise(64), batch_of(64, 2), context(denoiser, 64)
    loss = method(norm_power=0.0).correct(z, torch.tensor(1.0).double(), torch.arange(64), batch, ctx)
    table = denoiser.roles.parameters("student")[0]
    (gradient,) = torch.autograd.grad(loss, table)
    moved = -gradient.mean(0).flatten()  # of u; the sample is z - u
    assert (-moved < 0).all()


def test_the_corrections_length_is_the_predictions_residual():
    schedule = FlowSchedule()
    fake = ExactNetwork(Gaussian(LAW.mean + 1, LAW.cov), schedule, "flow")
    assert corrected(fake, norm_constant=1e-12).item() == pytest.approx(1, rel=1e-6)  # |residual|^2 = 1


@pytest.mark.parametrize("process", PROCESSES)
def test_without_correction_the_loss_vanishes_at_the_exact_map_and_only_there(process):
    schedule, kind, *_ = PROCESSES[process]
    for tilt, holds in ((0.0, True), (0.1, False)):
        student = MapNetwork(schedule, kind, tilt)
        denoiser = denoiser_of(teacher_network(process), schedule, kind, student=student)
        ctx = context(denoiser, 16, {"end": torch.linspace(0.01, 0.99, 16).double()})
        terms = method(correct_every=0, norm_power=0.0).student_loss(batch_of(16, 2), ctx)
        assert set(terms) == {"predict"}
        assert terms["predict"] < 1e-14 if holds else terms["predict"] > 1e-6


@pytest.mark.parametrize("rows", [8, 10])
def test_every_fourth_row_is_corrected_and_the_others_are_predicted(rows):
    """The teacher has two labels, so that prompts must go with their rows."""
    schedule, other = FlowSchedule(), Gaussian(LAW.mean + 1, LAW.cov)
    base, student = LabelledGaussians([LAW, other], schedule, "flow"), MapNetwork(schedule, "flow", 0.1)
    fake = ExactNetwork(Gaussian(LAW.mean - 1, LAW.cov), schedule, "flow")
    denoiser = denoiser_of(base, schedule, "flow", student=student, fake_score=fake)
    batch = replace(batch_of(rows, 2), cond=Conditioning({"labels": torch.arange(rows) // 2 % 2}))
    ctx, free_flow = context(denoiser, rows), method(correction_weight=3.0)
    first, second = (torch.tensor([k for k in range(rows) if (k % 4 == 3) == last]) for last in (False, True))

    def part(of):
        return replace(batch, indices=batch.indices[of], cond=batch.cond[of])

    z, s = ctx.random.normal("z", (2, 1, 1)), free_flow.ends(ctx)
    predict, residual = free_flow.predict(z[first], s[first], part(first), ctx)
    correct = free_flow.correct(z[second], residual, second, part(second), ctx)
    terms = free_flow.student_loss(batch, ctx)
    assert set(terms) == {"predict", "correct"}
    torch.testing.assert_close(terms["predict"], len(first) / rows * predict, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["correct"], len(second) / rows * 3 * correct, rtol=1e-12, atol=0)


def test_without_correction_there_is_no_fake_score():
    assert set(method(correct_every=0).groups()) == {"student"}
    assert [update.name for update in method(correct_every=0).updates(0)] == ["student"]


# Who learns


def test_each_turn_moves_its_own_network(tiny_sd):
    free_flow = method(guidance_scale=3.0, correct_every=2)
    networks = build_networks(free_flow, Teacher(tiny_sd), settings(student="full", fake_score="full"))
    denoiser, batch, roles = networks.denoiser, sd_batch(), networks.roles
    z, t = torch.randn(2, 4, 16, 16), torch.tensor([999.0, 999.0])
    with torch.no_grad():
        student = denoiser(z, t, batch.cond, "student", **free_flow.sampling_inputs(denoiser, 2, z.device)).native
        assert torch.equal(student, denoiser(z, t, batch.cond, "teacher").native)
    first, second = free_flow.updates(0)
    for update, own, other in ((first, "student", "fake_score"), (second, "fake_score", "student")):
        assert update.trains == (own,)
        sum(update.loss(batch, context(denoiser, 2)).values()).backward()  # to whatever it reaches
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in roles.parameters(own))
        assert all(p.grad is None for p in roles.parameters(other))
        assert all(p.grad is None for p in roles.base.parameters())
        for p in roles.parameters(own):
            p.grad = None


def test_the_fake_score_rests_at_the_exact_denoiser_of_one_step_samples():
    """All signs of (z, eps) have the moments of normal draws; the loss left is the velocity's conditional variance."""
    schedule, student, points = FlowSchedule(), MapNetwork(FlowSchedule(), "flow", tilt=0.2), signs(4)
    draws = {"fake/z": spatial(points[:, :2]), "fake/eps": spatial(points[:, 2:]), "fake/t": torch.full((16,), 499)}
    assert schedule.time_of_index(draws["fake/t"]).eq(0.5).all()
    for law, holds in ((OwnScore(student).law(), True), (LAW, False)):
        gain = law.cov @ torch.linalg.inv(law.cov + torch.eye(2)) * 2  # of E[x0 | x_t] at t = 1/2
        fake = AffineGenerator(gain, law.mean - gain @ law.mean / 2, schedule, "flow")
        denoiser = denoiser_of(teacher_network("flow"), schedule, "flow", student=student, fake_score=fake)
        loss = method().fake_score_loss(batch_of(16, 2), context(denoiser, 16, draws))["denoising"]
        slopes = torch.autograd.grad(loss, [fake.A, fake.b])
        left = 4 * (law.cov - gain @ law.cov / 2).trace() / 2
        assert (max(slope.abs().max() for slope in slopes) < 1e-12) == holds
        assert (loss.item() == pytest.approx(left.item(), rel=1e-12)) == holds


@pytest.mark.parametrize(
    "bad", [{"correct_every": 1}, {"correction_weight": 0.0}, {"correction_std": 0.0}, {"norm_constant": 0.0}]
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        FreeFlowConfig(**bad)


def test_shares_of_the_last_index_are_what_stable_diffusion_reaches():
    assert noise_share(SD, f64(999.0)).item() == pytest.approx(0.93596, abs=1e-5)
    assert noise_share(SD, f64(0.0)).item() == pytest.approx(0.02834, abs=1e-5)


def test_it_trains_through_the_engine(tmp_path):
    teacher = AnalyticTeacher.gaussian(LAW.mean, LAW.cov)
    data = Latents(LAW.sample(spatial(torch.randn(64, 2))).float())
    run = settings(
        output_dir=str(tmp_path),
        student="full",
        fake_score="full",
        max_train_steps=3,
        train_batch_size=8,
        checkpointing_steps=3,
    )
    trainer = Trainer(method(), teacher, data, run)
    trainer.train()
    assert trainer.step == 3
