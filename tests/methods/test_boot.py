"""BOOT (arXiv 2306.05544): orders at the exact trajectory, DDIM's step, boundary, who learns, training."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from flow_map_helpers import LAW, PROCESSES, Latents, sd_batch, settings, teacher_network, told_end
from method_helpers import SD, batch_of, context, denoiser_of, f64, settle, spatial
from torch import nn
from trajectory_helpers import MU, S, ToldAffine, gaussian_denoiser, levels, mapped, product_map

from fastdiff.diffusion import FlowSchedule, Prediction, jump
from fastdiff.engine import Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods._trajectory import grid_points
from fastdiff.methods.boot import BOOT, BOOTConfig
from fastdiff.models.analytic import AnalyticTeacher
from fastdiff.models.teacher import Teacher


def method(**config) -> BOOT:
    return BOOT(BOOTConfig(**{"guidance_scale": 1.0} | config))


def noise(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact_point(z: torch.Tensor, t: torch.Tensor, schedule) -> torch.Tensor:
    """y_t = (x_t - sigma_t z) / alpha_t on the exact trajectory that begins with the teacher's first prediction."""
    last = torch.full_like(t, schedule.t_max)
    first = LAW.denoise(z, last, schedule)
    alpha, sigma = schedule.levels(last, z)
    x_t = LAW.flow_map(alpha * first + sigma * z, last, t, schedule)
    alpha, sigma = schedule.levels(t, z)
    return (x_t - sigma * z) / alpha


class PointNetwork(nn.Module):
    """The exact y(z, t) as a network that is fed z at the last time and told t."""

    def __init__(self, schedule, kind: str) -> None:
        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, time, labels, timestep_cond):
        t = told_end(timestep_cond).double() / (1000 if isinstance(self.schedule, FlowSchedule) else 1)
        last = torch.full_like(t, self.schedule.t_max)
        assert torch.equal(time.double(), self.schedule.network_time(last))
        return Prediction.from_x0(exact_point(x_t, t, self.schedule), x_t, last, self.schedule).as_kind(self.kind)

    def enable_gradient_checkpointing(self, _function):
        pass


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("midpoint", 3)])
def test_a_step_from_the_exact_trajectory_errs_at_the_solvers_order(solver, order):
    """On the smooth levels of a flow, halving the step divides the error by 2^order."""
    schedule, z, batch = FlowSchedule(), noise(), batch_of(4, 2)
    denoiser = denoiser_of(teacher_network("flow"), schedule, "flow")
    t, errors = f64([0.35, 0.5, 0.65, 0.8]), []
    for h in (0.04, 0.02, 0.01, 0.005):
        y, s = exact_point(z, t, schedule), t - h
        moved = method(solver=solver).next_point(z, y, t, s, batch, context(denoiser, 4))
        errors.append((moved - exact_point(z, s, schedule)).norm().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.1)
    assert all(order - 0.25 < slope < order + 0.25 for slope in slopes)


def test_the_loss_falls_with_the_square_of_the_step():
    """Residual of order two over a step of order one."""
    losses = []
    schedule, kind, *_ = PROCESSES["flow"]
    denoiser = denoiser_of(teacher_network("flow"), schedule, kind, student=PointNetwork(schedule, kind))
    for points in (100, 200):
        rows = torch.arange(points // 4, 3 * points // 4, points // 20)  # away from both ends, at the same times
        ctx = context(denoiser, 10, {"pair": rows})
        losses.append(method(num_ddim_timesteps=points).student_loss(batch_of(10, 2), ctx)["bootstrap"].item())
    assert math.log2(losses[0] / losses[1]) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_target_is_one_step_of_ddim(process):
    """x_s made of the target is the jump from x_t, also from pure noise and to the clean end."""
    schedule, kind, t, s = PROCESSES[process]
    t, s, z, batch = f64(t), f64(s), noise(), batch_of(4, 2)
    denoiser = denoiser_of(teacher_network(process), schedule, kind)
    y = 0.7 * torch.randn(4, 2, 1, 1, dtype=torch.float64)
    target = method().next_point(z, y, t, s, batch, context(denoiser, 4))
    alpha, sigma = schedule.levels(t, z)
    x_t = alpha * y + sigma * z
    there = jump(denoiser(x_t, t, batch.cond, "teacher"), s)
    alpha, sigma = schedule.levels(s, z)
    torch.testing.assert_close(alpha * target + sigma * z, there, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_boundary_is_the_teachers_first_prediction(process):
    schedule, kind, *_ = PROCESSES[process]
    student = PointNetwork(schedule, kind)
    denoiser = denoiser_of(teacher_network(process), schedule, kind, student=student)
    batch = batch_of(4, 2)
    z = context(denoiser, 4).random.normal("z", (2, 1, 1)).double()
    assert method().boundary(z, batch, context(denoiser, 4)) < 1e-12
    weighted = method(boundary_weight=3.0).student_loss(batch, context(denoiser, 4))
    assert set(weighted) == {"bootstrap", "boundary"}
    assert set(method(boundary_weight=0.0).student_loss(batch, context(denoiser, 4))) == {"bootstrap"}


def test_an_affine_student_per_told_end_learns_the_teachers_own_trajectory():
    """y_t = (x_t - sigma_t z) / alpha_t on the DDIM steps from x_T = alpha_T x0_teacher(z, T) + sigma_T z."""
    points = grid_points(20).tolist()
    boot, student = method(num_ddim_timesteps=20), ToldAffine(points, by_end=True).double()
    denoiser = gaussian_denoiser(student=student)
    batch, ctx = batch_of(80, 1), context(denoiser, 80, {"pair": torch.arange(20).repeat(4)})
    settle(lambda: sum(boot.student_loss(batch, ctx).values()), denoiser.roles.parameters("student"), len(points))
    z = f64([-1.0, 2.0])
    alpha, sigma = levels(999)
    first = MU + alpha * S / (alpha**2 * S + sigma**2) * (z - alpha * MU)
    for index in points:
        a, s = levels(index)
        expected = (mapped(product_map(points), alpha * first + sigma * z, 999, index) - s * z) / a
        with torch.no_grad():
            t = torch.full((2,), float(index))
            found = boot.point(z[:, None, None, None], t, batch_of(2, 1), context(denoiser, 2)).flatten()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_the_grid_goes_from_the_last_index_to_the_clean_end():
    seen = []

    class Spy(PointNetwork):
        def forward(self, x_t, time, labels, timestep_cond):
            seen.append([round(v) for v in told_end(timestep_cond).tolist()])
            return super().forward(x_t, time, labels, timestep_cond)

    denoiser = denoiser_of(teacher_network("epsilon"), student=Spy(SD, "epsilon"))
    ctx = context(denoiser, 3, {"pair": torch.tensor([0, 1, 49])})
    method(boundary_weight=0.0).student_loss(batch_of(3, 2), ctx)
    assert seen == [[19, 39, 999], [-1, 19, 979]]


def test_the_untrained_student_is_the_teachers_first_prediction_and_it_alone_learns(tiny_sd):
    boot = method(guidance_scale=3.0)
    networks = build_networks(boot, Teacher(tiny_sd), settings(student="full"))
    denoiser, batch = networks.denoiser, sd_batch()
    z, t = torch.randn(2, 4, 16, 16), torch.tensor([999.0, 999.0])
    with torch.no_grad():
        student = denoiser(z, t, batch.cond, "student", **boot.sampling_inputs(denoiser, 2, z.device)).x0
        assert torch.equal(student, denoiser(z, t, batch.cond, "teacher").x0)
        assert torch.equal(student, boot.point(z, torch.tensor([-1.0, 400.0]), batch, context(denoiser, 2)))
    assert method().boundary(z, batch, context(denoiser, 2)) == 0
    loss = sum(boot.student_loss(batch, context(denoiser, 2)).values())
    loss.backward(inputs=networks.parameters("student"))
    assert networks.roles.network("student").time_embedding.cond_proj.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in networks.roles.base.parameters())


def test_no_images_are_needed():
    assert method().needs() == "prompts" and batch_of(4, 2).latents is None


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="boundary_weight"):
        BOOTConfig(boundary_weight=-1.0)
    with pytest.raises(ValueError, match="divide"):
        method(num_ddim_timesteps=7)


def test_it_trains_through_the_engine(tmp_path):
    teacher = AnalyticTeacher.gaussian(LAW.mean, LAW.cov, schedule=FlowSchedule(), prediction_type="flow")
    data = Latents(LAW.sample(spatial(torch.randn(64, 2))).float())
    run = settings(
        output_dir=str(tmp_path), student="full", max_train_steps=3, train_batch_size=8, checkpointing_steps=3
    )
    trainer = Trainer(method(), teacher, data, run)
    trainer.train()
    assert trainer.step == 3
