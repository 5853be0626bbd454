"""FreeFlow (arXiv 2511.19428): the identity in the end alone, the correction's fixed point and sign, who learns."""

from __future__ import annotations

import pytest
import torch
from flow_map_helpers import LAW, PROCESSES, Latents, MapNetwork, sd_batch, settings, teacher_network
from method_helpers import SD, batch_of, context, denoiser_of, f64, spatial
from torch import nn

from fastdiff.diffusion import FlowSchedule, Gaussian, Terminal
from fastdiff.engine import Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods._flow_map import end_input, moved_share, noise_share, noise_share_rate
from fastdiff.methods.base import time_at
from fastdiff.methods.freeflow import FreeFlow, FreeFlowConfig
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork
from fastdiff.models.analytic_networks import PointNet
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


def corrected(fake: nn.Module, process: str = "flow", tilt: float = 0.0, **config):
    schedule, kind, *_ = PROCESSES[process]
    student = MapNetwork(schedule, kind, tilt)
    denoiser = denoiser_of(teacher_network(process), schedule, kind, student=student, fake_score=fake)
    batch, z, rows = batch_of(64, 2), spatial(torch.randn(64, 2, dtype=torch.float64)), torch.arange(64)
    ctx = context(denoiser, 64)
    loss = method(norm_power=0.0, **config).correct(z, torch.tensor(1.0).double(), rows, batch, ctx)
    return loss, denoiser, z, batch


def test_the_correction_rests_where_the_samples_law_is_the_teachers():
    schedule, kind, *_ = PROCESSES["flow"]
    exact, *_ = corrected(ExactNetwork(LAW, schedule, kind))
    other, *_ = corrected(ExactNetwork(Gaussian(LAW.mean + 1, LAW.cov), schedule, kind))
    assert exact < 1e-20 < 1e-4 < other


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
    one, *_ = corrected(fake, norm_constant=1e-12)
    assert one.item() == pytest.approx(1, rel=1e-6)  # |residual|^2 = 1


def test_rows_are_split_in_three_and_one():
    seen = {}

    class Spy(FreeFlow):
        def predict(self, z, s, batch, ctx):
            seen["predict"] = batch.indices.tolist()
            return super().predict(z, s, batch, ctx)

        def correct(self, z, residual, rows, batch, ctx):
            seen["correct"] = batch.indices.tolist()
            assert torch.equal(rows, batch.indices)
            return super().correct(z, residual, rows, batch, ctx)

    schedule, kind, *_ = PROCESSES["flow"]
    student, fake = MapNetwork(schedule, kind), teacher_network("flow")
    denoiser = denoiser_of(teacher_network("flow"), schedule, kind, student=student, fake_score=fake)
    for rows in (4, 8, 10):
        terms = Spy(FreeFlowConfig()).student_loss(batch_of(rows, 2), context(denoiser, rows))
        assert seen["correct"] == list(range(3, rows, 4))
        assert sorted(seen["predict"] + seen["correct"]) == list(range(rows)) and set(terms) == {"predict", "correct"}
    assert set(method(correct_every=0).student_loss(batch_of(3, 2), context(denoiser, 3))) == {"predict"}
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


def test_the_fake_score_denoises_one_step_samples():
    schedule, kind, *_ = PROCESSES["flow"]
    fake = teacher_network("flow")
    denoiser = denoiser_of(
        teacher_network("flow"), schedule, kind, student=MapNetwork(schedule, kind), fake_score=fake
    )
    batch, ctx = batch_of(16, 2), context(denoiser, 16)
    loss = method().fake_score_loss(batch, ctx)["denoising"]
    z = ctx.random.normal("fake/z", (2, 1, 1)).double()
    x0 = LAW.flow_map(z, torch.ones(16).double(), Terminal.CLEAN, schedule)
    t = schedule.time_of_index(ctx.random.integers("fake/t", 0, 1000))
    eps = ctx.random.normal("fake/eps", (2, 1, 1)).double()
    x_t = schedule.add_noise(x0, eps, t)
    expected = (denoiser(x_t, t, batch.cond, "fake_score").flow - (eps - x0)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)


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
