"""Trajectory methods that are each other's special cases or limits, as losses and gradients of one network."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from flow_map_helpers import LAW as PLANE
from flow_map_helpers import PROCESSES, MapNetwork, teacher_network
from method_helpers import SD, batch_of, context, denoiser_of, f64, spatial
from torch import nn
from trajectory_helpers import FLOW, data, gaussian_denoiser, levels, student_loss

from fastdiff.diffusion import Prediction
from fastdiff.methods import (
    BOOT,
    CTM,
    KD,
    LCM,
    BOOTConfig,
    CTMConfig,
    FreeFlow,
    FreeFlowConfig,
    KDConfig,
    LCMConfig,
    MeanFlow,
    MeanFlowConfig,
)
from fastdiff.methods._trajectory import grid_points
from fastdiff.methods.scm import tangent
from fastdiff.models.analytic_networks import PointNet
from fastdiff.models.embeddings import time_features, with_extra_times
from fastdiff.models.sampler import SamplerSpec, advance
from fastdiff.models.tangents import Tangents

PLAIN = {"guidance_scale": 1.0, "loss_type": "l2", "target_decay": 0.0}


def ctm(points: int = 40) -> CTM:
    return CTM(CTMConfig(**PLAIN, num_ddim_timesteps=points))


def first_order(errors: list[float]) -> None:
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([1] * len(orders), abs=0.25) and orders[-1] == pytest.approx(1, abs=0.1), orders


def test_consistency_over_one_interval_is_regression_on_the_solvers_endpoint():
    """On a flow, whose last time holds nothing but noise."""
    z, found = torch.randn(16, 1, 1, 1, generator=torch.Generator().manual_seed(3)), {}
    one, two = (LCM(LCMConfig(**PLAIN, num_ddim_timesteps=points)) for points in (1, 2))
    for name, method in (("one", one), ("two", two), ("kd", KD(KDConfig(online_steps=1)))):
        torch.manual_seed(0)
        network = PointNet(1, 1).double()
        denoiser = gaussian_denoiser(FLOW, student=network)
        draws = {"eps": z, "online/noise": z, "pair": torch.full((16,), int(name == "two"))}
        (loss,) = student_loss(method, denoiser, 16, draws).values()
        found[name] = [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found["one"], found["kd"], strict=True))
    assert not torch.allclose(found["two"][0], found["kd"][0], rtol=1e-2)


def test_tcd_with_full_noise_steps_as_lcm_does_up_to_the_noise_of_index_zero():
    """TCD ends at index 0, LCM at the clean end; with kappa = sigma_0 / alpha_0 the rest is linear in eps and z."""
    x, x0, z = (spatial(torch.randn(8, 1, generator=torch.Generator().manual_seed(k)).double()) for k in range(3))
    tcd, lcm = SamplerSpec("tcd", (999, 499), eta=1.0), SamplerSpec("lcm", (999, 499))
    kappa = (levels(0)[1] / levels(0)[0]).item()
    for step, time in enumerate((999, 499)):
        prediction = Prediction.from_x0(x0, x, torch.full((8,), time).double(), SD)
        gap = advance(tcd, step, prediction, z, SD) - advance(lcm, step, prediction, z, SD)
        if step == 0:
            alpha, sigma = levels(499)
            expected = alpha * kappa * prediction.eps + ((sigma**2 - (alpha * kappa) ** 2).sqrt() - sigma) * z
        else:
            expected = (levels(0)[0] - 1) * x0 + levels(0)[1] * prediction.eps
        torch.testing.assert_close(gap, expected, rtol=0, atol=1e-6)  # LCM's boundary weights are not exactly (0, 1)
        assert (gap.abs() <= kappa * (prediction.eps.abs() + 0.02 * (z.abs() + x0.abs()))).all()


def test_a_jump_to_the_next_point_is_regression_of_the_teachers_clean_prediction():
    """CTM with s = u: both sides end where the teacher's step does."""
    torch.manual_seed(0)
    network = with_extra_times(PointNet(1, 1)).double()
    nn.init.normal_(network.slot.weight, std=0.1)
    denoiser, batch, number = gaussian_denoiser(student=network), batch_of(16, 1, data(16)), torch.arange(16) * 2
    ctx = context(denoiser, 16, {"pair": number, "end": torch.full((16,), 1 - 2**-24)})
    found = ctm().student_loss(batch, ctx)["consistency"]

    points = grid_points(40)
    t, u = points[number + 1], points[number]
    x_t = SD.add_noise(batch.latents, ctx.random.normal("eps", (1, 1, 1)), t)
    student = denoiser(x_t, t.float(), batch.cond, "student", **ctm().inputs(1.0, u.float(), denoiser)).x0
    teacher = denoiser(x_t, t.float(), batch.cond, "teacher").x0
    (at, st), (as_, ss) = levels(t), levels(u)
    expected = ((as_ - at * ss / st)[:, None, None, None] * (student - teacher)).square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    for a, b in zip(*(torch.autograd.grad(one, list(network.parameters())) for one in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_ever_shorter_steps_make_ctms_jumps_meanflows_identity():
    """On a flow G(x, t, s) = x - (t - s) u; both sides' difference over the step is -(u - v + (t - s) du/dt)."""
    schedule, kind, *_ = PROCESSES["flow"]
    denoiser = denoiser_of(teacher_network("flow"), schedule, kind, student=MapNetwork(schedule, kind, tilt=0.2))
    batch = batch_of(
        16, 2, PLANE.sample(spatial(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).double()))
    )
    eps, errors = context(denoiser, 16).random.normal("eps", (2, 1, 1)), []
    t, s = torch.full((16,), 0.8), torch.full((16,), 0.3)
    x_t = schedule.add_noise(batch.latents, eps, t)
    mean_flow = MeanFlow(MeanFlowConfig())
    u, target, _ = mean_flow.sides(x_t, t, s, batch, context(denoiser, 16))
    for points in (5, 10, 20, 40):
        number = 8 * points // 10 - 1
        end = torch.full((16,), 300.5 / (1000 * number / points + 1))
        pair = ctm(points).pair(batch, context(denoiser, 16, {"pair": torch.full((16,), number), "end": end}))
        assert (pair.place.start == 799).all() and (pair.place.end == 299).all()
        errors.append(((pair.student - pair.target) * points + (u - target)).norm().item())
    assert (u - target).norm() > 0.1
    first_order(errors)


def test_ever_shorter_steps_make_boots_residual_freeflows():
    """With y = z - u, BOOT's residual over the step tends to -(u - v - (1 - t) du/dt) / (1 - t)."""
    schedule, kind, *_ = PROCESSES["flow"]
    denoiser = denoiser_of(teacher_network("flow"), schedule, kind, student=MapNetwork(schedule, kind, tilt=0.2))
    boot, free_flow = BOOT(BOOTConfig(guidance_scale=1.0)), FreeFlow(FreeFlowConfig())
    z, t = spatial(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()), f64([0.35, 0.5, 0.65, 0.8])
    batch, ctx, errors = batch_of(4, 2), context(denoiser, 4), []
    found = free_flow.tangent(z, t, batch, ctx)
    gap = found.value - free_flow.predicted_target(z, t, found, batch, ctx)
    for h in (0.02, 0.01, 0.005, 0.0025):
        target = boot.next_point(z, boot.point(z, t, batch, ctx), t, t - h, batch, ctx)
        residual = (boot.point(z, t - h, batch, ctx) - target) / h
        errors.append(((1 - t)[:, None, None, None] * residual + gap).norm().item())
    assert gap.norm() > 0.1
    first_order(errors)


class ToTheCleanEnd(MapNetwork):
    """A map that always ends there, whether or not it is told so."""

    def forward(self, x_t, time, labels, timestep_cond=None):
        return super().forward(x_t, time, labels, time_features([torch.zeros_like(time)]))


def test_meanflows_identity_at_the_clean_end_is_scms_tangent():
    """f = x - t u moves by -(u - target) dt along the teacher's ODE, and dt = (cos + sin)^-2 da of TrigFlow's angle."""
    schedule, kind, *_ = PROCESSES["flow"]
    denoiser = denoiser_of(teacher_network("flow"), schedule, kind, student=ToTheCleanEnd(schedule, kind, tilt=0.2))
    x, eps = torch.randn(2, 4, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, batch = f64([0.1, 0.4, 0.7, 0.95]), batch_of(4, 2)
    x_t, ctx = schedule.add_noise(PLANE.sample(x), eps, t), context(denoiser, 4)
    g = tangent(denoiser(x_t, t, batch.cond, "teacher"), batch, ctx, Tangents(), r=1.0)
    u, target, _ = MeanFlow(MeanFlowConfig()).sides(x_t, t, torch.zeros_like(t), batch, ctx)
    rate = ((1 - t) * ((1 - t) ** 2 + t**2).sqrt())[:, None, None, None]
    assert g.flatten(1).norm(dim=1).min() > 1e-3
    torch.testing.assert_close(g, -rate * (u - target), rtol=1e-8, atol=1e-10)
